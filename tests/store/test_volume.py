"""Volumes patched where they lie: the old stream or the new one, whatever stops it.

Files stand in for devices where `--journal` asks for it, so that this is always tested; loop
devices follow where the machine has them.
"""

import json
import lzma
import os
import shutil
import subprocess

import pytest
import tracing
from loop_devices import loop_device
from snapshot_files import leaked_area

import xfast
from xfast.cli.main import main
from xfast.errors import XfastError
from xfast.store.undo import undo
from xfast.store.volume import Volume

HOST = "intel-haswell@6.1"
LEAK = "qemu/q72-kvm-pkru-leak-bv207.qemustate.xz"
traced = pytest.mark.skipif(not tracing.works(), reason="processes can't be traced here")


@pytest.fixture(scope="module")
def leak(data):
    return lzma.decompress((data / LEAK).read_bytes())


@pytest.fixture
def state(tmp_path):
    """A private folder for journals and records."""
    folder = tmp_path / "state"
    folder.mkdir(0o700)
    return folder


@pytest.fixture
def padded(tmp_path, leak):
    """A file such as a volume is: a stream, then old data and zeros."""
    path = tmp_path / "vm-100-state-before"
    path.write_bytes(leak + b"\x5a" * 5000 + bytes(1 << 20))
    return path


def area() -> bytes:
    """Two vCPUs' areas with a leaked PKRU bit, small enough to be tried many times."""
    return leaked_area() * 2


def plan(path):
    size = 4096 if path.suffix == ".xsave" else None
    found = xfast.read(path, layout=xfast.preset("intel"), size=size)
    return xfast.plan_fix(found[0], xfast.resolve(HOST))


def recover(path, state) -> bool:
    with Volume(str(path), str(state)) as volume:
        return volume.recover()


def record_in(state):
    (path,) = state.glob("*.xfast.json")
    return path


def changed(one: bytes, two: bytes) -> list[int]:
    return [i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]


def test_only_the_pages_that_change_are_written_and_undone(padded, state, tmp_path, capsys):
    old, before = padded.read_bytes(), padded.stat()
    pages = tmp_path / "pages"
    words = ["fix", str(padded), "--host", HOST, "--in-place", "--journal", str(state)]
    assert main([*words, "--backup", str(pages)]) == 0
    told = capsys.readouterr().out
    new = padded.read_bytes()
    (place,) = changed(old, new)
    assert padded.stat().st_ino == before.st_ino
    record = record_in(state)
    assert f"record {record}" in told
    assert f"backup {pages}" in told
    assert record.stat().st_mode & 0o777 == 0o600
    assert not list(state.glob("*journal"))
    page = place // 4096 * 4096
    kept = pages.read_bytes()
    assert len(kept) == len(old)
    assert kept[page : page + 4096] == old[page : page + 4096]
    assert not any(kept[:page])
    assert not any(kept[page + 4096 :])
    assert pages.stat().st_mode & 0o777 == 0o600
    assert main(["check", str(padded), "--host", HOST]) == 0
    assert main(["undo", str(record), "--dry-run"]) == 0
    assert padded.read_bytes() == new
    assert main(["undo", str(record)]) == 0
    assert padded.read_bytes() == old
    assert main(["undo", str(record)]) == 0
    assert "is as it was before the change" in capsys.readouterr().out


def test_what_follows_the_stream_is_no_matter_of_the_record(padded, state, leak):
    """The room behind a stream may be used again; the change is still known, and undone."""
    plan(padded).apply(in_place=True, journal=str(state))
    with padded.open("r+b") as file:
        file.seek(len(leak) + 100)
        file.write(b"something else")
    undo(str(record_in(state)))
    assert padded.read_bytes()[: len(leak)] == leak
    with padded.open("r+b") as file:
        file.seek(len(leak) // 2)
        file.write(b"something else")
    with pytest.raises(XfastError, match="is not what the record left"):
        undo(str(record_in(state)))


def how(state, pages) -> dict:
    return {"in_place": True, "journal": str(state), "backup": str(pages)}


@traced
@pytest.mark.parametrize("way", ["fix", "undo"])
def test_killed_at_every_step_it_is_the_old_or_the_new_one(tmp_path, way):
    seen, half, step = [], False, 0
    while True:
        here = tmp_path / "here"
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir()
        state, pages, path = here / "state", here / "pages", here / "leak.xsave"
        state.mkdir(0o700)
        path.write_bytes(area())
        ready = plan(path)
        if way == "undo":
            ready.apply(**how(state, pages))

        def work(ready=ready, state=state, pages=pages):
            try:
                undo(str(record_in(state))) if way == "undo" else ready.apply(**how(state, pages))
            except XfastError:
                return 1
            return 0

        def script(number, name, step=step, half=half):
            return tracing.Kill(half) if number == step else None

        ended = tracing.run(work, script)
        recover(path, state)
        assert not list(state.glob("*journal"))
        left = changed(area(), path.read_bytes())
        assert left in ([], [513, 4096 + 513])  # never one without the other
        seen.append(not left)
        if left:
            assert record_in(state)
        if way == "undo":
            undo(str(record_in(state)))
            assert path.read_bytes() == area()
        else:
            plan(path).apply(**how(state, pages))
            undo(str(record_in(state)))
            assert path.read_bytes() == area()
        assert not [name for name in os.listdir(state) if name.startswith(".")]
        if ended.status == 0:
            break
        assert ended.status == 9
        step, half = (step, True) if not half else (step + 1, False)
    assert step > 12
    assert seen == sorted(seen, reverse=way == "fix")
    assert len(set(seen)) == 2


@traced
def test_what_a_crash_left_is_undone_by_the_next_fix_or_by_undo(tmp_path, state, capsys):
    """Between the two edits: neither the old nor the new, until the journal is followed."""
    path = tmp_path / "leak.xsave"
    words = [str(path), "--layout", "intel", "--size", "4096", "--host", HOST]
    fix = ["fix", *words, "--in-place", "--journal", str(state)]

    def crash():
        path.write_bytes(area())
        ready, writes = plan(path), 0

        def script(number, name):
            nonlocal writes
            writes += name == "pwrite64"
            return tracing.Kill() if writes == 2 else None

        tracing.run(lambda: ready.apply(in_place=True, journal=str(state)), script)
        assert changed(area(), path.read_bytes()) == [513]
        assert list(state.glob("*journal"))

    crash()
    assert main(fix) == 3  # bare areas tell no CPUID, so the verdict stays unknown
    assert "undid an edit that was interrupted" in capsys.readouterr().err
    assert changed(area(), path.read_bytes()) == [513, 4096 + 513]
    undo(str(record_in(state)))
    crash()
    with pytest.raises(XfastError, match="interrupted edit"):
        undo(str(record_in(state)), dry_run=True)
    undo(str(record_in(state)))
    assert path.read_bytes() == area()
    assert not list(state.glob("*journal"))


def interrupted(path, state) -> None:
    """Leave a file as a crash does, its journal in `state`."""
    ready = plan(path)
    stem = path.read_bytes()

    def fail(*_):
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xfast.store.journal._require_between", fail)
        patch.setattr("xfast.repair.apply._Job._check", fail)
        with pytest.raises(SystemExit):
            ready.apply(in_place=True, journal=str(state))
    assert path.read_bytes() != stem
    assert list(state.glob("*journal"))


def test_a_journal_is_believed_by_its_content(tmp_path, state):
    """Another stream under the same number, as after a restart: nothing is put back into it."""
    path = tmp_path / "leak.xsave"
    path.write_bytes(area())
    interrupted(path, state)
    other = bytearray(path.read_bytes())
    other[600] ^= 1
    path.write_bytes(other)
    with pytest.raises(XfastError, match="is not the file that"):
        recover(path, state)
    assert path.read_bytes() == other


def test_a_journal_of_another_volume_of_this_number_is_passed_over(tmp_path, state, capsys):
    path = tmp_path / "leak.xsave"
    path.write_bytes(area())
    interrupted(path, state)
    (journal,) = state.glob("*journal")
    path.write_bytes(b"\xff" * 8192)
    assert not recover(path, state)
    assert path.read_bytes() == b"\xff" * 8192
    assert journal.exists()
    again = tmp_path / "moved.xsave"  # undo finds the journal by the record, whatever the number
    again.write_bytes(area()[:513] + b"\0" + area()[514:])
    undo(str(record_in(state)), file=str(again))
    assert again.read_bytes() == area()
    assert not journal.exists()


@pytest.mark.parametrize("how", ["mode", "link", "nonce", "record"])
def test_a_journal_that_another_may_have_written_is_refused(tmp_path, state, how):
    path = tmp_path / "leak.xsave"
    path.write_bytes(area())
    interrupted(path, state)
    found = path.read_bytes()
    (journal,) = state.glob("*journal")
    if how == "mode":
        journal.chmod(0o644)
    elif how == "link":
        os.link(journal, tmp_path / "second")
    elif how == "nonce":
        told = json.loads(journal.read_text())
        journal.write_text(json.dumps(told | {"nonce": "0" * 32}))
    else:
        record_in(state).unlink()
    with pytest.raises(XfastError, match="expected a journal of ours"):
        recover(path, state)
    assert path.read_bytes() == found


@pytest.mark.parametrize("kind", ["pipe", "link", "file"])
def test_what_is_no_folder_is_no_place_for_journals(padded, tmp_path, kind, capsys):
    place = tmp_path / "place"
    {
        "pipe": lambda: os.mkfifo(place),
        "link": lambda: place.symlink_to(tmp_path),
        "file": lambda: place.write_bytes(b""),
    }[kind]()
    words = ["fix", str(padded), "--host", HOST, "--in-place", "--journal", str(place)]
    assert main(words) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"xfast: {place}: ")
    assert "Errno" not in line


def test_the_folder_of_journals_is_private(padded, tmp_path):
    old = padded.read_bytes()
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(XfastError, match=r"expected a folder that only you can enter"):
        plan(padded).apply(in_place=True, journal=str(tmp_path / "open"))
    (tmp_path / "private").mkdir(0o700)
    (tmp_path / "link").symlink_to("private")
    with pytest.raises(XfastError, match="symbolic link"):
        plan(padded).apply(in_place=True, journal=str(tmp_path / "link"))
    assert padded.read_bytes() == old
    plan(padded).apply(in_place=True, journal=str(tmp_path / "new"))
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_what_can_not_be_done_is_refused_before_anything_is_written(
    padded, state, tmp_path, capsys
):
    old = padded.read_bytes()
    (tmp_path / "pages").write_text("mine")
    fix = ["fix", str(padded), "--host", HOST]
    put = ["--in-place", "--journal", str(state)]
    for words, told in (
        (["--journal", str(state), "--dry-run"], "expected --in-place with --journal"),
        ([*put, "--backup", str(tmp_path / "pages")], "pages: exists; expected a new name"),
        ([*put, "--backup"], "expected --backup FILE"),
        (["--in-place", "--backup", str(tmp_path / "x")], "expected --backup without FILE"),
    ):
        assert main([*fix, *words]) == 3 - (told.startswith("expected --in"))
        assert told in capsys.readouterr().err
    with lzma.open(tmp_path / "packed.xz", "wb") as file:
        file.write(area())
    with pytest.raises(XfastError, match="is compressed"):
        plan(tmp_path / "packed.xz").apply(in_place=True, journal=str(state))
    assert padded.read_bytes() == old
    assert (tmp_path / "pages").read_text() == "mine"
    assert not os.listdir(state)


def test_a_block_device_is_repaired_where_it_lies_and_undone(padded, state, tmp_path, leak):
    old = padded.read_bytes()
    with loop_device(padded) as device:
        link = tmp_path / "pve-vm-100-state"  # as /dev/VOLUME-GROUP/NAME is
        link.symlink_to(device)
        words = ["fix", str(link), "--host", HOST, "--in-place", "--journal", str(state)]
        assert main([*words, "--backup", str(tmp_path / "pages")]) == 0
        assert main(["check", str(link), "--host", HOST]) == 0
        assert changed(old[: len(leak)], padded.read_bytes()[: len(leak)])
        assert changed(old[len(leak) :], padded.read_bytes()[len(leak) :]) == []
        assert main(["undo", str(record_in(state))]) == 0
    assert padded.read_bytes() == old


def test_a_block_device_in_use_is_refused(padded, state, capsys):
    old = padded.read_bytes()
    with loop_device(padded) as device:
        words = ["fix", device, "--host", HOST, "--in-place", "--journal", str(state)]
        held = os.open(device, os.O_RDONLY | os.O_EXCL)
        assert main(words) == 3
        assert "is in use (mounted, or another program holds it)" in capsys.readouterr().err
        os.close(held)
        with subprocess.Popen(["sh", "-c", f"exec 3<>{device}; echo; read x"],
                              stdin=-1, stdout=-1) as writer:  # fmt: skip
            writer.stdout.readline()
            assert main(words) == 3
            told = f"process {writer.pid} has it open for writing"
            assert told in capsys.readouterr().err
            writer.stdin.close()
        assert not os.listdir(state)
    assert padded.read_bytes() == old


@traced
@pytest.mark.parametrize("way", ["fix", "undo"])
def test_a_block_device_that_is_killed_at_every_write(tmp_path, state, way):
    """Every write to the device and to the journal's folder, two areas in front of zeros."""
    image = tmp_path / "image.xsave"
    step = 0
    while True:
        image.write_bytes(area())
        with loop_device(image) as device:
            path = tmp_path / "device.xsave"
            path.unlink(missing_ok=True)
            path.symlink_to(device)
            ready = plan(path)
            if way == "undo":
                ready.apply(in_place=True, journal=str(state))
                ready = str(record_in(state))

            def work(ready=ready):
                if way == "undo":
                    undo(ready)
                else:
                    ready.apply(in_place=True, journal=str(state))
                return 0

            writes = 0

            def script(number, name, step=step):
                nonlocal writes
                writes += name in ("write", "pwrite64", "fsync", "renameat2", "unlinkat")
                return tracing.Kill() if writes == step + 1 else None

            ended = tracing.run(work, script)
            recover(path, state)
            assert changed(area(), image.read_bytes()) in ([], [513, 4096 + 513])
            plan(path).apply(in_place=True, journal=str(state))
            undo(str(record_in(state)))
        assert image.read_bytes() == area()
        assert not list(state.glob("*journal"))
        if ended.status == 0:
            break
        step += 1
    assert step > 6
