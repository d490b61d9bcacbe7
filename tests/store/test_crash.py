"""Killed, failed and attacked at every system call: the old file or the new one, and no other."""

import errno
import hashlib
import json
import lzma
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tracing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import xfast
from xfast.errors import XfastError
from xfast.repair.convert import convert
from xfast.store import put
from xfast.store.journal import recover
from xfast.store.undo import undo

HOST = "intel-haswell@6.1"
LEAK = "qemu/q72-kvm-pkru-leak-bv207.qemustate.xz"
MODES = ("replace", "patch", "backup", "patch-backup", "new")
EVERY_CALL = frozenset(tracing.CALLS) - {"read", "lseek"}

pytestmark = pytest.mark.skipif(not tracing.works(), reason="processes can't be traced here")


def area() -> bytes:
    """An area with a leaked PKRU bit, in Intel's layout."""
    image = np.zeros(4096, np.uint8)
    image[0:2] = 0x7F, 0x03
    image[24:26] = 0x80, 0x1F
    image[28:30] = 0xFF, 0xFF
    image[160:416] = np.arange(256) % 251
    image[512:514] = 7, 2
    image[576:832] = 0x5A
    return image.tobytes()


def plan(path, name=HOST):
    host = xfast.resolve(name)
    return xfast.plan_fix(xfast.read(path, layout=xfast.preset("intel"))[0], host)


def unstamped(ready):
    """Return a plan that holds for another file with the same bytes."""
    ready.snapshot.stamp = None
    return ready


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def how(path: Path, mode: str) -> dict:
    if mode == "new":
        return {"output": str(path) + ".new"}
    return {"in_place": True, "backup": mode.endswith("backup")}


def fixing(ready, path: Path, mode: str):
    """Return what a child is to do, and to answer: 0, or 1 where it was refused or failed."""

    def work() -> int:
        try:
            if mode == "undo":
                undo(str(path) + ".xfast.json")
            elif mode == "convert":
                convert(ready.snapshot, str(path) + ".new")
            else:
                ready.apply(**how(path, mode))
        except XfastError:
            return 1
        return 0

    return work


def killing(step: int, *, half: bool = False):
    return lambda number, name: tracing.Kill(half) if number == step else None


@pytest.mark.parametrize("mode", ["replace", "backup", "patch", "undo"])
def test_a_newer_file_that_is_renamed_into_place_at_any_call_stays(tmp_path, monkeypatch, mode):
    """It came between the last look and the rename, and was replaced by the old one, repaired."""
    monkeypatch.setattr(put, "PATCH_FROM", 0 if mode == "patch" else 1 << 40)
    newer = area()[::-1]
    step = 0
    while True:
        folder = tmp_path / "here"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path = folder / "leak.xsave"
        path.write_bytes(area())
        if mode == "undo":
            plan(path).apply(in_place=True)
        ready = plan(path)

        def script(number, name, path=path, step=step):
            if number == step:
                path.with_name("newer").write_bytes(newer)
                path.with_name("newer").rename(path)
            return tracing.Release() if number == step else None

        ended = tracing.run(fixing(ready, path, mode), script, EVERY_CALL)
        if ended.calls <= step:
            break
        assert os.waitstatus_to_exitcode(ended.status) in (0, 1)
        assert path.read_bytes() == newer, f"lost at call {step}"
        step += 1
    assert step > 20


def interrupting(step: int):
    return lambda number, name: tracing.Interrupt() if number == step else None


@pytest.mark.parametrize("mode", MODES)
def test_killed_at_every_step_there_is_the_old_or_the_new_file(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(put, "PATCH_FROM", 0 if mode.startswith("patch") else 1 << 40)
    path = tmp_path / "leak.xsave"
    path.write_bytes(area())
    old = digest(path)
    plan(path).apply(str(tmp_path / "new"))
    new = digest(tmp_path / "new")
    record = "leak.xsave.new.xfast.json" if mode == "new" else "leak.xsave.xfast.json"
    seen, half, step = [], False, 0
    while True:
        folder = tmp_path / "here"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path = folder / "leak.xsave"
        path.write_bytes(area())
        ready = plan(path)

        ended = tracing.run(fixing(ready, path, mode), killing(step, half=half))
        recovered = recover(str(path))
        left = {one.name: digest(one) for one in folder.iterdir()}
        assert left["leak.xsave"] == old if mode == "new" else left["leak.xsave"] in (old, new)
        assert left.get("leak.xsave.new", new) == new
        assert left.get("leak.xsave.orig", old) == old
        assert recovered <= mode.startswith("patch")
        if mode == "backup" and left["leak.xsave"] == new:
            assert left["leak.xsave.orig"] == old
        result = left.get("leak.xsave.new", left["leak.xsave"])
        if result == new:
            assert record in left
        seen.append(result == new)
        assert all(name.endswith(".xfast-new") for name in left if name.startswith("."))
        if not (mode == "new" and result == new):
            plan(path).apply(**how(path, mode))
            again = names(folder)
            assert not [name for name in again if name.startswith(".")]
            assert record in again
            assert digest(folder / ("leak.xsave.new" if mode == "new" else "leak.xsave")) == new
        if ended.status == 0:
            break
        assert ended.status == 9
        step, half = (step, True) if not half else (step + 1, False)
    assert step > 12
    assert seen == sorted(seen)  # old, ..., old, new, ..., new
    assert seen[-1]


@pytest.mark.parametrize("mode", MODES)
def test_an_undo_that_is_killed_at_every_step_leaves_the_one_or_the_other(
    tmp_path, monkeypatch, mode
):
    monkeypatch.setattr(put, "PATCH_FROM", 0 if mode.startswith("patch") else 1 << 40)
    seen, half, step = [], False, 0
    while True:
        folder = tmp_path / "here"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path = folder / "leak.xsave"
        path.write_bytes(area())
        old = digest(path)
        plan(path).apply(**how(path, mode))
        path = folder / "leak.xsave.new" if mode == "new" else path
        new, record = digest(path), str(path) + ".xfast.json"

        ended = tracing.run(fixing(None, path, "undo"), killing(step, half=half))
        recovered = recover(str(path))
        assert recovered <= mode.startswith("patch")
        assert digest(path) in (old, new)
        seen.append(digest(path) == old)
        undo(record)
        assert digest(path) == old
        assert not [name for name in names(folder) if name.startswith(".")]
        if ended.status == 0:
            break
        assert ended.status == 9
        step, half = (step, True) if not half else (step + 1, False)
    assert step > 4
    assert seen == sorted(seen)
    assert seen[-1]


@pytest.mark.parametrize("mode", ["replace", "backup", "patch-backup", "new", "undo", "directory"])
def test_interrupted_at_every_step_what_was_changed_has_its_record(
    data, tmp_path, monkeypatch, mode
):
    """Ctrl-C during the rename took the record away, and the backup, of what had its place."""
    monkeypatch.setattr(put, "PATCH_FROM", 0 if mode.startswith("patch") else 1 << 40)

    def work():
        try:
            return fixing(ready, path, "new" if mode == "directory" else mode)()
        except KeyboardInterrupt:
            return 1

    seen, step = [], 0
    while True:
        folder = tmp_path / "here"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path = folder / "leak.xsave"
        if mode == "directory":
            shutil.copytree(data / "criu" / "criu42-regs64s-3thr", path)
            host = xfast.resolve("amd-milan")
            drop = ["avx", "opmask", "zmm_hi256", "hi16_zmm"]
            ready = xfast.plan_fix(xfast.read(path)[0], host, drop=drop, even_if_live=True)
        else:
            path.write_bytes(area())
            if mode == "undo":
                plan(path).apply(in_place=True, backup=True)
            ready = plan(path)
        ended = tracing.run(work, interrupting(step))
        if ended.calls <= step:
            assert ended.status == 0
            break
        assert os.waitstatus_to_exitcode(ended.status) in (0, 1)
        recover(str(path)) if path.is_file() else None
        left = names(folder)
        if mode in ("new", "directory"):
            changed = "leak.xsave.new" in left
        else:
            changed = path.read_bytes() != area()
        seen.append(changed)
        if changed or mode == "undo":
            assert any(name.endswith(".xfast.json") for name in left), f"no record at call {step}"
        if changed and "backup" in mode:
            assert (folder / "leak.xsave.orig").read_bytes() == area(), f"no backup at call {step}"
        step += 1
    assert step > 10
    assert True in seen


class Scene:
    """A tenant's folder with a snapshot, and a folder outside that is none of his."""

    def __init__(self, top: Path) -> None:
        self.inside, self.outside = top / "tenant", top / "outside"
        self.path = self.inside / "leak.xsave"
        shutil.rmtree(top, ignore_errors=True)
        for folder in (self.inside, self.outside):
            folder.mkdir(parents=True)
        self.path.write_bytes(area())
        for name in ("leak.xsave", "leak.xsave.new", ".leak.xsave.xfast-new"):
            (self.outside / name).write_bytes(area()[::-1])
        (self.outside / "leak.xsave.orig").write_bytes(b"another's")

    def outer(self) -> dict[str, tuple]:
        """All that is outside: bytes, owner, mode, time, names."""
        found = {}
        for one in sorted(self.outside.iterdir()):
            status = one.stat()
            facts = status.st_mode, status.st_uid, status.st_nlink, status.st_mtime_ns
            found[one.name] = (one.read_bytes(), facts)
        return found

    def swap(self) -> None:
        """Do what the tenant does: put a link in the place of his folder."""
        self.inside.rename(self.inside.with_name("aside"))
        self.inside.symlink_to(self.outside)

    def swapping(self, step: int, *, back: bool):
        """Return a script: swap at one call, and back again at the next one if asked to."""

        def script(number: int, name: str) -> tracing.Action:
            if number == step:
                self.swap()
            elif number == step + 1 and back:
                self.undo_swap()
            return tracing.Release() if number == step + back else None

        return script

    def undo_swap(self) -> None:
        self.inside.unlink()
        self.inside.with_name("aside").rename(self.inside)


SWAPS = [(mode, False) for mode in ("backup", "patch-backup", "new", "undo", "convert")]
SWAPS += [(mode, True) for mode in ("patch-backup", "undo")]


@pytest.mark.parametrize(("mode", "back"), SWAPS)
def test_a_parent_swapped_for_a_link_at_any_call_changes_nothing_outside(
    tmp_path, monkeypatch, mode, back
):
    monkeypatch.setattr(put, "PATCH_FROM", 0 if mode.startswith("patch") else 1 << 40)
    step, ready = 0, None
    while True:
        scene = Scene(tmp_path / "scene")
        if mode == "undo":
            plan(scene.path).apply(in_place=True)
            shutil.copy(str(scene.path) + ".xfast.json", scene.outside)
        ready = ready or unstamped(plan(scene.path))
        before = scene.outer()

        script = scene.swapping(step, back=back)
        ended = tracing.run(fixing(ready, scene.path, mode), script, EVERY_CALL)
        assert os.WIFEXITED(ended.status)
        assert os.WEXITSTATUS(ended.status) in (0, 1), "an error that is none of ours"
        assert scene.outer() == before, f"escaped at call {step}"
        if ended.calls <= step:
            break
        step += 1
    assert step > 25


ERRORS = (errno.EIO, errno.ENOSPC, errno.ESTALE, errno.EINTR, errno.EACCES, errno.EDQUOT)
FAULTS = st.one_of(st.sampled_from(ERRORS).map(tracing.Fail), st.just(tracing.Shorten()))
FAILING = (tracing.CHANGING | {"pread64", "read", "openat2"}) - {"ioctl", "unlinkat", "unlink"}


def _import_all(folder: Path, mode: str):
    """Do once without a fault what is to be done, so that no fault hits an import."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = folder / "leak.xsave"
    path.write_bytes(area())
    if mode == "undo":
        plan(path).apply(in_place=True)
    fixing(plan(path), path, mode)()
    recover(str(path))
    shutil.rmtree(folder)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    mode=st.sampled_from([*MODES, "undo"]),
    faults=st.dictionaries(st.integers(0, 45), FAULTS, min_size=1, max_size=3),
)
def test_whatever_fails_there_is_the_old_or_the_new_file(tmp_path, mode, faults):
    _import_all(tmp_path / "first", mode)
    folder = tmp_path / "here"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = folder / "leak.xsave"
    path.write_bytes(area())
    old = digest(path)
    limit, put.PATCH_FROM = put.PATCH_FROM, 0 if mode.startswith("patch") else 1 << 40
    try:
        plan(path).apply(str(tmp_path / "new"))
        new = digest(tmp_path / "new")
        if mode == "undo":
            plan(path).apply(in_place=True)
        ready = plan(path)

        ended = tracing.run(
            fixing(ready, path, mode), lambda number, name: faults.get(number), FAILING
        )
        assert os.WIFEXITED(ended.status)
        assert os.WEXITSTATUS(ended.status) in (0, 1), "an error that is none of ours"
        recover(str(path))
        assert digest(path) in (old, new)
        result = folder / "leak.xsave.new" if mode == "new" else path
        if os.WEXITSTATUS(ended.status) == 0:
            assert digest(result) == (old if mode == "undo" else new)
        elif mode == "new":
            assert digest(path) == old
        if result.exists() and digest(result) == new and mode != "undo":
            assert (folder / f"{result.name}.xfast.json").exists()
    finally:
        put.PATCH_FROM = limit
        for name in ("new", "new.xfast.json"):
            (tmp_path / name).unlink(missing_ok=True)


def test_a_result_that_has_its_place_keeps_its_record_if_the_last_sync_fails(tmp_path):
    """The record went, and a new file without one was left: what was done to it was lost."""
    _import_all(tmp_path / "first", "new")
    path = tmp_path / "leak.xsave"
    path.write_bytes(area())
    old = digest(path)
    names: list[str] = []
    tracing.run(fixing(plan(path), path, "new"), lambda n, name: names.append(name), FAILING)
    for one in ("leak.xsave.new", "leak.xsave.new.xfast.json"):
        (tmp_path / one).unlink()
    last = len(names) - 1
    assert names[last - 1 :] == ["renameat2", "fsync"]

    faults = {last: tracing.Fail(errno.EIO)}
    ended = tracing.run(fixing(plan(path), path, "new"), lambda n, name: faults.get(n), FAILING)
    assert os.WEXITSTATUS(ended.status) == 1
    undo(str(tmp_path / "leak.xsave.new.xfast.json"))
    assert digest(tmp_path / "leak.xsave.new") == old


def shrinking(path: Path, step: int, what: str):
    def script(number: int, name: str) -> tracing.Action:
        if number == step and what == "gone":
            path.unlink()
        elif number == step:
            os.truncate(path, 100 if what == "shorter" else 0)
        return tracing.Release() if number == step else None

    return script


@pytest.mark.parametrize("what", ["shorter", "gone", "empty"])
@pytest.mark.parametrize("mode", ["replace", "new", "undo"])
def test_a_file_that_shrinks_or_vanishes_at_any_read(tmp_path, mode, what):
    step = 0
    while True:
        folder = tmp_path / "here"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path = folder / "leak.xsave"
        path.write_bytes(area())
        if mode == "undo":
            plan(path).apply(in_place=True)
        ready = plan(path)

        calls = frozenset({"pread64", "copy_file_range", "openat2", "newfstatat"})
        script = shrinking(path, step, what)
        ended = tracing.run(fixing(ready, path, mode), script, calls)
        assert os.WIFEXITED(ended.status)
        if ended.calls <= step:
            break
        assert os.WEXITSTATUS(ended.status) in (0, 1)
        if mode == "new" and os.WEXITSTATUS(ended.status) == 1:
            assert not (folder / "leak.xsave.new").exists()
        step += 1
    assert step > 4


def test_the_stream_of_a_real_machine_is_killed_too(data, tmp_path):
    path = tmp_path / "leak"
    path.write_bytes(lzma.decompress((data / LEAK).read_bytes()))
    old, ready = digest(path), plan(path)
    for step in range(0, 20, 3):
        ended = tracing.run(fixing(ready, path, "replace"), killing(step, half=True))
        if ended.status == 0:
            break
        assert digest(path) == old or json.loads((tmp_path / "leak.xfast.json").read_text())


@pytest.mark.parametrize("what", ["in place", "new", "undo"])
def test_a_directory_that_is_killed_at_every_step_is_finished_later(data, tmp_path, what):
    """Each image is the old or the new one, and the same command again makes all of them new."""
    source = data / "criu" / "criu42-regs64s-3thr"
    old = {path.name: digest(path) for path in source.iterdir()}

    def planned(folder):
        drop = ["avx", "opmask", "zmm_hi256", "hi16_zmm"]
        host = xfast.resolve("amd-milan")
        return xfast.plan_fix(xfast.read(folder)[0], host, drop=drop, even_if_live=True)

    planned(source).apply(str(tmp_path / "done"))
    new = {path.name: digest(path) for path in (tmp_path / "done").iterdir()}
    step = 0
    while True:
        top = tmp_path / "here"
        shutil.rmtree(top, ignore_errors=True)
        dump = top / "dump"
        shutil.copytree(source, dump)
        if what == "undo":
            planned(dump).apply(in_place=True)
        mode = {"in place": "replace"}.get(what, what)
        ready = None if what == "undo" else planned(dump)
        ended = tracing.run(fixing(ready, dump, mode), killing(step))
        images = {name: digest(dump / name) for name in old}
        assert all(images[name] in (old[name], new[name]) for name in old)
        place = dump.with_name("dump.new") if what == "new" else dump
        if what == "undo":
            undo(str(dump) + ".xfast.json")
        elif what == "new":
            assert images == old
            if not place.exists():
                planned(dump).apply(str(place))
        else:
            planned(dump).apply(in_place=True)
        assert {name: digest(place / name) for name in old} == (old if what == "undo" else new)
        assert not [name for name in (*names(top), *names(place)) if name.startswith(".")]
        if ended.status == 0:
            break
        step += 1
    assert step > 12
