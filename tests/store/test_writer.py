"""The old file or the new one, whole, whatever happens: kills, full disks, links, other writers."""

import hashlib
import json
import lzma
import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import xfast
from xfast.cli.main import main
from xfast.errors import PolicyError, XfastError
from xfast.repair.apply import _Job
from xfast.snapshots.bytes.copying import copy_bytes
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.model import Splice
from xfast.store import journal, put, staged
from xfast.store.journal import Warrant
from xfast.store.names import Directory
from xfast.store.record import sha256
from xfast.store.staged import Staged

HOST = "intel-haswell@6.1"
LEAK = "qemu/q72-kvm-pkru-leak-bv207.qemustate.xz"


@pytest.fixture
def leak(data, tmp_path) -> Path:
    """A stream whose vCPU has a leaked PKRU bit; its file is 408235 bytes."""
    path = tmp_path / "leak"
    path.write_bytes(lzma.decompress((data / LEAK).read_bytes()))
    path.chmod(0o640)
    os.utime(path, ns=(1_600_000_000_000_000_001, 1_600_000_001_000_000_003))
    return path


def plan(path, host=HOST):
    (snapshot,) = xfast.read(path)
    return xfast.plan_fix(snapshot, xfast.resolve(host))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def identity(path: Path):
    status = path.stat()
    return status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns


def changed(one: bytes, two: bytes) -> list[int]:
    assert len(one) == len(two)
    return np.flatnonzero(np.frombuffer(one, "u1") != np.frombuffer(two, "u1")).tolist()


def test_a_new_file_differs_in_the_one_byte_that_was_planned(leak):
    old = leak.read_bytes()
    record = plan(leak).apply(str(leak) + ".new")
    new = Path(str(leak) + ".new").read_bytes()
    (edit,) = record["edits"]
    assert (edit["before"], edit["after"]) == ("0000000000000207", "0000000000000007")
    assert changed(old, new) == [edit["offset"] + 6]
    assert leak.read_bytes() == old
    assert record == json.loads((leak.parent / "leak.new.xfast.json").read_text())
    (file,) = record["files"]
    assert file["before"] == hashlib.sha256(old).hexdigest()
    assert file["after"] == hashlib.sha256(new).hexdigest()
    (change,) = record["changes"]
    assert (change["rule"], change["component"], change["state"]) == ("LEAK", "pkru", "init")
    assert "leaves the vCPU's PKRU as it was" in record["notes"][0]
    assert record["schema"] == "xfast/1"
    assert record["xfast"] == xfast.__version__


@pytest.mark.parametrize("patched", [False, True])
def test_in_place_keeps_mode_owner_and_times(leak, monkeypatch, patched):
    monkeypatch.setattr(put, "PATCH_FROM", 0 if patched else 1 << 40)
    before, inode, old = identity(leak), leak.stat().st_ino, leak.read_bytes()
    assert plan(leak).apply(in_place=True, backup=True)
    assert identity(leak) == before
    assert (leak.stat().st_ino == inode) is patched
    assert names(leak.parent) == {"leak", "leak.orig", "leak.xfast.json"}
    assert (leak.parent / "leak.orig").read_bytes() == old
    assert identity(leak.parent / "leak.orig") == before
    assert len(changed(old, leak.read_bytes())) == 1
    assert plan(leak).apply(in_place=True) is None  # the second time there is nothing to do


def test_a_patch_touches_the_pages_that_it_changes(leak, monkeypatch):
    written = []
    real = os.pwrite

    def count(fd, piece, offset):
        written.append(len(piece))
        return real(fd, piece, offset)

    monkeypatch.setattr(put, "PATCH_FROM", 0)
    monkeypatch.setattr(os, "pwrite", count)
    assert plan(leak).apply(in_place=True)
    assert written == [8]


def test_what_a_killed_process_left_is_no_obstacle(leak):
    for end in ("", ".xfast.json", ".xfast-journal"):
        (leak.parent / f".leak{end}.xfast-new").write_bytes(b"half")
    assert plan(leak).apply(in_place=True)
    assert names(leak.parent) == {"leak", "leak.xfast.json"}
    (leak.parent / ".leak.xfast.json.xfast-new").write_bytes(b"half")
    assert plan(leak).apply(in_place=True) is None
    assert names(leak.parent) == {"leak", "leak.xfast.json"}


def test_two_at_once(leak):
    with (
        Directory.open(str(leak.parent)) as folder,
        staged.Staged(folder, "leak"),
        pytest.raises(XfastError, match="another process is writing"),
    ):
        plan(leak).apply(in_place=True)
    assert names(leak.parent) == {"leak"}


def edits_of(path: Path) -> list[Splice]:
    old = path.read_bytes()
    return [Splice(at, old[at : at + 8], b"12345678", "") for at in (100, 5000)]


NONCE = "0123456789abcdef"


def a_record(path: Path) -> Path:
    """Write the record that a journal of this file has to name."""
    record = path.with_name(path.name + ".xfast.json")
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    rows = [{"name": path.name, "before": before, "after": ""}]
    words = {"schema": "xfast/1", "nonce": NONCE, "snapshot": str(path), "output": str(path)}
    record.write_text(json.dumps(words | {"edits": [], "changes": [], "files": rows}))
    return record


def a_journal(path: Path, **facts) -> Path:
    """Write a journal as this program does."""
    place = path.with_name(path.name + ".xfast-journal")
    record = path.with_name(path.name + ".xfast.json")
    words = {"schema": "xfast-journal/1", "name": path.name, "nonce": NONCE, "record": str(record)}
    rows = [
        {"offset": edit.offset, "old": edit.old.hex(), "new": edit.new.hex()}
        for edit in edits_of(path)
    ]
    words |= {"size": path.stat().st_size, "edits": rows}
    place.write_text(json.dumps(words | facts))
    place.chmod(0o600)
    return place


def patch(path: Path, source) -> None:
    """Patch a file as `fix` does a large one."""
    with Directory.open(str(path.parent)) as folder:
        warrant = Warrant(str(path) + ".xfast.json", NONCE)
        journal.patch(
            journal.Site.beside(folder, path.name), source, edits_of(path), lambda: None, warrant
        )


def interrupted(path: Path) -> bytes:
    """Leave a file as a crash does: an edit and a half done, the journal beside it."""
    old = path.read_bytes()
    a_record(path)
    a_journal(path)
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), b"12345678", 100)
        os.pwrite(file.fileno(), b"12", 5000)
    return old


def test_a_patch_that_fails_is_undone(leak, monkeypatch):
    old, before = leak.read_bytes(), identity(leak)
    real = Source.patch

    def fails(self, splices, fd):
        real(self, list(splices)[:1], fd)
        assert "leak.xfast-journal" in names(leak.parent)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Source, "patch", fails)
    with (
        Source.open(leak) as source,
        pytest.raises(OSError, match="No space left"),
    ):
        patch(leak, source)
    assert leak.read_bytes() == old
    assert identity(leak) == before
    assert names(leak.parent) == {"leak"}


def test_a_patch_that_goes_on_is_not_undone(leak, monkeypatch):
    def slow(self, splices, fd):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                f"from xfast.store import journal; journal.recover({str(leak)!r})",
            ],
            capture_output=True,
            text=True,
        )
        assert "another process is writing it" in done.stderr

    monkeypatch.setattr(Source, "patch", slow)
    with Source.open(leak) as source:
        patch(leak, source)
    assert names(leak.parent) == {"leak"}


def test_an_interrupted_patch_is_not_read_and_is_undone(leak, capsys):
    old = interrupted(leak)
    assert main(["check", str(leak), "--host", HOST]) == 3
    assert "interrupted edit" in capsys.readouterr().err
    assert main(["fix", str(leak), "--host", HOST, "--in-place"]) == 0
    assert "undid an edit" in capsys.readouterr().err
    assert names(leak.parent) == {"leak", "leak.xfast.json"}
    assert len(changed(old, leak.read_bytes())) == 1


@pytest.mark.parametrize("content", [b"", b"{}", b'{"size": 3, "edits": [{"offset": "x"}]}', b"[]"])
def test_a_strange_journal_is_refused(leak, content):
    old = leak.read_bytes()
    (leak.parent / "leak.xfast-journal").write_bytes(content)
    with pytest.raises(XfastError, match="journal"):
        journal.recover(str(leak))
    assert leak.read_bytes() == old


def test_a_journal_of_another_file_is_refused(leak):
    interrupted(leak)
    found = bytearray(leak.read_bytes())
    found[5003] ^= 0xFF
    leak.write_bytes(found)
    with pytest.raises(XfastError, match="is not the file"):
        journal.recover(str(leak))
    assert leak.read_bytes() == found


def test_a_journal_that_is_a_link_is_not_followed(leak, tmp_path):
    (tmp_path / "leak.xfast-journal").symlink_to("elsewhere")
    with pytest.raises(XfastError, match=r"expected a journal of ours: .*symbol"):
        journal.recover(str(leak))


@pytest.mark.parametrize("offset", ['"x"', "1.5", "-8", "1" + "0" * 23, "[" * 100_000])
def test_a_hostile_journal(leak, offset, capsys):
    old = leak.read_bytes()
    row = f'{{"offset": {offset}, "old": "00", "new": "01"}}'
    a_record(leak)
    place = a_journal(leak, edits="HERE")
    place.write_text(place.read_text().replace('"HERE"', f"[{row}]"))
    assert main(["fix", str(leak), "--host", HOST, "--in-place"]) == 3
    assert "expected a journal of ours" in capsys.readouterr().err
    place.unlink()
    place.mkdir()
    assert main(["fix", str(leak), "--host", HOST, "--in-place"]) == 3
    assert "expected a journal of ours" in capsys.readouterr().err
    assert leak.read_bytes() == old


@pytest.mark.parametrize("change", ["longer", "touched", "replaced"])
def test_a_file_that_is_no_longer_the_one_that_was_planned_for(leak, change):
    ready, old = plan(leak), leak.read_bytes()
    if change == "replaced":
        leak.unlink()
    leak.write_bytes(old + b"!" * (change == "longer"))
    with pytest.raises(XfastError, match="changed since it was read"):
        ready.apply(in_place=True)
    assert names(leak.parent) == {"leak"}


def test_the_records_name_is_needed_for_the_backup(leak):
    with pytest.raises(XfastError, match="needed for another file"):
        plan(leak).apply(in_place=True, backup=True, record=str(leak) + ".orig")
    assert names(leak.parent) == {"leak"}
    assert plan(leak).before.verdict == "incompatible"


def test_a_directory_that_was_half_done_is_finished_under_its_first_record(
    data, tmp_path, monkeypatch
):
    folder, record = tmp_path / "dump", tmp_path / "record"
    shutil.copytree(data / "criu" / "criu42-regs64s-3thr", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def planned():
        words = ["avx", "opmask", "zmm_hi256", "hi16_zmm"]
        host = xfast.resolve("amd-milan")
        return xfast.plan_fix(xfast.read(folder)[0], host, drop=words, even_if_live=True)

    with pytest.raises(XfastError, match="can't be written"):
        planned().apply(in_place=True, record=str(tmp_path / "none" / "record"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    real, published = staged.Staged.publish, []

    def publish(self, **how):
        if published[1:]:  # the record and one image are out
            raise KeyboardInterrupt
        real(self, **how)
        published.append(self.name)

    monkeypatch.setattr(staged.Staged, "publish", publish)
    with pytest.raises(KeyboardInterrupt):
        planned().apply(in_place=True, record=str(record))
    monkeypatch.undo()
    first = record.read_bytes()
    assert planned().apply(in_place=True, record=str(record))
    assert record.read_bytes() == first
    files = json.loads(first)["files"]
    assert len(files) > 1
    for row in files:
        assert hashlib.sha256(before[row["name"]]).hexdigest() == row["before"]
        now = (folder / row["name"]).read_bytes()
        assert hashlib.sha256(now).hexdigest() == row["after"]


def test_a_file_that_is_open_for_writing(leak):
    old = leak.read_bytes()
    with leak.open("r+b"), pytest.raises(XfastError, match="is open for writing"):
        plan(leak).apply(in_place=True)
    assert leak.read_bytes() == old
    assert names(leak.parent) == {"leak"}


def test_a_file_that_changed_since_it_was_read(leak):
    ready = plan(leak)
    data = bytearray(leak.read_bytes())
    data[data.index(bytes.fromhex("9999aaaabbbbcccc"))] ^= 1
    leak.write_bytes(data)
    with pytest.raises(XfastError, match="changed since it was read"):
        ready.apply(in_place=True)
    assert leak.read_bytes() == data
    assert names(leak.parent) == {"leak"}


def test_a_file_that_changes_while_it_is_copied(leak, monkeypatch):
    ready = plan(leak)
    real = Source.rewrite

    def slow(self, edits, out):
        real(self, edits, out)
        leak.write_bytes(b"other")

    monkeypatch.setattr(Source, "rewrite", slow)
    with pytest.raises(XfastError, match="changed since it was read"):
        ready.apply(in_place=True)
    assert leak.read_bytes() == b"other"
    assert names(leak.parent) == {"leak"}


def test_a_file_that_another_one_replaced(leak, monkeypatch):
    ready = plan(leak)
    real = Source.rewrite

    def swap(self, edits, out):
        real(self, edits, out)
        leak.rename(leak.with_name("aside"))
        leak.write_bytes(b"new one")

    monkeypatch.setattr(Source, "rewrite", swap)
    with pytest.raises(XfastError, match="another file has taken its place"):
        ready.apply(in_place=True)
    assert leak.read_bytes() == b"new one"


def test_links_are_not_followed(leak, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(leak)
    outside = tmp_path / "outside"
    dangling = tmp_path / "out"
    dangling.symlink_to(outside)
    old = leak.read_bytes()
    with pytest.raises(XfastError, match="symbolic link"):
        plan(link).apply(in_place=True)
    with pytest.raises(XfastError, match="exists"):
        plan(leak).apply(str(dangling))
    (tmp_path / ".leak.xfast-new").symlink_to(outside)
    with pytest.raises(XfastError, match="symbolic"):
        plan(leak).apply(in_place=True)
    assert not outside.exists()
    assert leak.read_bytes() == old


@pytest.mark.parametrize("taken", ["out", "out.xfast.json"])
def test_nothing_is_overwritten(leak, tmp_path, taken):
    (tmp_path / taken).write_bytes(b"mine")
    with pytest.raises(XfastError, match="exists; expected a new name"):
        plan(leak).apply(str(tmp_path / "out"))
    assert (tmp_path / taken).read_bytes() == b"mine"
    assert names(tmp_path) == {"leak", taken}


def test_a_backup_is_not_overwritten(leak, tmp_path):
    (tmp_path / "leak.orig").write_bytes(b"mine")
    old = leak.read_bytes()
    with pytest.raises(XfastError, match=r"leak\.orig: exists"):
        plan(leak).apply(in_place=True, backup=True)
    assert leak.read_bytes() == old
    assert names(tmp_path) == {"leak", "leak.orig"}


@pytest.mark.parametrize("way", ["patched", "replaced"])
def test_a_backup_goes_with_the_change_that_failed(leak, tmp_path, monkeypatch, way):
    """The fuzzer's: what was patched did not read back, and its backup stayed without a change."""

    def fail(self, *args, **kwargs):
        if getattr(self, "name", "leak") == "leak":
            raise XfastError("another than was planned")
        return publish(self, *args, **kwargs)

    monkeypatch.setattr(put, "PATCH_FROM", 0 if way == "patched" else 1 << 40)
    ready, old, publish = plan(leak), leak.read_bytes(), Staged.publish
    monkeypatch.setattr(*((_Job, "_check") if way == "patched" else (Staged, "publish")), fail)
    with pytest.raises(XfastError, match="another than was planned"):
        ready.apply(in_place=True, backup=True, record=str(tmp_path / "record"))
    assert leak.read_bytes() == old
    assert leak.stat().st_nlink == 1
    assert names(tmp_path) == {"leak"}


def test_a_full_disk(leak, tmp_path, capsys):
    old = leak.read_bytes()
    words = ["fix", str(leak), "--host", HOST]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for where in (["-o", str(tmp_path / "out")], ["--in-place"]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            assert main([*words, *where]) == 3
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        (line,) = capsys.readouterr().err.splitlines()
        assert "can't be written: File too large" in line
        assert leak.read_bytes() == old
        assert names(tmp_path) == {"leak"}


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for the stream, and not for a second one."""
    place = tmp_path / "disk"
    place.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(options, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system, and not everywhere")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def sharing_disk(tmp_path):
    """A file system on which a copy shares the blocks of the original."""
    if os.geteuid() or not shutil.which("mkfs.btrfs"):
        pytest.skip("only root with mkfs.btrfs can make a file system that shares blocks")
    image, place = tmp_path / "image", tmp_path / "disk"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(256 << 20)
    subprocess.run(["mkfs.btrfs", "-q", image], check=True, capture_output=True)
    if subprocess.run(["mount", "-o", "loop", image, place], capture_output=True).returncode:
        pytest.skip("btrfs can't be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_copy_that_costs_nothing_replaces_a_large_file(leak, sharing_disk, monkeypatch):
    monkeypatch.setattr(put, "PATCH_FROM", 0)
    path = sharing_disk / "leak"
    path.write_bytes(leak.read_bytes())
    inode = path.stat().st_ino
    assert plan(path).apply(in_place=True, backup=True)
    assert path.stat().st_ino != inode
    assert path.with_name("leak.orig").stat().st_ino == inode
    assert len(changed(leak.read_bytes(), path.read_bytes())) == 1
    source, copy = sharing_disk / "large", sharing_disk / "copy"
    source.write_bytes(np.random.default_rng(1).bytes(32 << 20))
    os.sync()
    free = os.statvfs(sharing_disk).f_bfree
    with source.open("rb") as one, copy.open("wb") as two:
        copy_bytes(one.fileno(), two.fileno(), 32 << 20)
    os.sync()
    assert (free - os.statvfs(sharing_disk).f_bfree) * 4096 < 4 << 20
    assert copy.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("where", ["in place", "new"])
def test_a_file_system_without_room(leak, small_disk, capsys, where):
    path = small_disk / "leak"
    path.write_bytes(leak.read_bytes())
    how = ["--in-place"] if where == "in place" else ["-o", str(small_disk / "out")]
    assert main(["fix", str(path), "--host", HOST, *how]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line
    assert path.read_bytes() == leak.read_bytes()
    assert names(small_disk) == {"leak"}


def as_nobody(work) -> int:
    """Run `work` in a child without root's rights; return its exit code."""
    child = os.fork()
    if not child:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            os._exit(work())
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def public(leak):
    """A folder that everybody reaches, with the stream in it."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        copy = folder / "leak"
        copy.write_bytes(leak.read_bytes())
        copy.chmod(0o644)
        yield copy
        folder.chmod(0o755)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("where", ["out", "in place"])
def test_a_folder_that_can_not_be_written(public, where):
    public.parent.chmod(0o555)
    old = public.read_bytes()
    ready = plan(public)
    said = public.with_name("said")

    def work():
        try:
            how = {"in_place": True} if where == "in place" else {"output": str(public) + ".new"}
            ready.apply(**how)
        except XfastError as problem:
            return 7 if "Permission denied" in str(problem) else 8
        return 0

    assert as_nobody(work) == 7
    assert not said.exists()
    assert public.read_bytes() == old
    assert names(public.parent) == {"leak"}


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another's file")
def test_an_owner_that_can_not_be_kept(public):
    public.parent.chmod(0o777)
    ready = plan(public)
    before = identity(public)

    def work():
        try:
            ready.apply(in_place=True)
        except XfastError as problem:
            return 7 if "not permitted" in str(problem) else 8
        return 0

    assert as_nobody(work) == 7
    assert identity(public) == before
    assert names(public.parent) == {"leak"}


def test_a_new_file_has_the_old_ones_mode(leak, tmp_path):
    leak.chmod(0o600)
    plan(leak).apply(str(tmp_path / "out"))
    for name in ("out", "out.xfast.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


@pytest.mark.parametrize("kind", ["gz", "xz", "zst"])
def test_compressed_files_come_out_compressed(leak, tmp_path, kind):
    import gzip

    if kind == "zst":
        zstd = pytest.importorskip("backports.zstd")
    packed = tmp_path / f"leak.{kind}"
    modules = {"gz": gzip, "xz": lzma} | ({"zst": zstd} if kind == "zst" else {})
    module = modules[kind]
    packed.write_bytes(module.compress(leak.read_bytes()))
    record = plan(packed).apply(str(tmp_path / "out"))
    out = (tmp_path / "out").read_bytes()
    assert out[:4] == packed.read_bytes()[:4]
    assert len(changed(leak.read_bytes(), module.decompress(out))) == 1
    assert record["files"][0]["after"] == hashlib.sha256(out).hexdigest()


def test_a_decompression_bomb_stops_at_the_limit(tmp_path, capsys):
    bomb = tmp_path / "bomb.xz"
    bomb.write_bytes(lzma.compress(bytes(64 << 20)))
    words = ["fix", str(bomb), "--host", HOST, "--in-place", "--expand-limit", "1M"]
    assert main(words) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected at most 1048576 bytes, got more" in line
    assert names(tmp_path) == {"bomb.xz"}


def test_nothing_to_do_writes_nothing(data, tmp_path, capsys):
    raw = data / "raw" / "kvm618-guestxcr0_e7-bve7.xsave"
    assert plan(raw, "amd-genoa@6.6").apply(str(tmp_path / "out")) is None
    words = ["fix", str(raw), "--host", "amd-genoa@6.6", "-o", str(tmp_path / "out")]
    main(words)
    assert "nothing was written" in capsys.readouterr().out
    assert names(tmp_path) == set()


def test_what_stays_unknown_is_not_written(data, tmp_path, capsys):
    core = tmp_path / "core"
    core.write_bytes(lzma.decompress((data / "elf" / "gdb13-regs64-3thr.core.xz").read_bytes()))
    assert main(["fix", str(core), "--host", "amd-genoa", "-o", str(tmp_path / "out")]) == 3
    assert "stays unknown" in capsys.readouterr().err
    assert names(tmp_path) == {"core"}


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["leak", "leak", "--in-place"], "more than once"),
        (["leak", "other", "-o", "none"], "expected a directory for 2 snapshots"),
        (["leak", "-o", "-"], "got -o -"),
        (["leak", "other", "--in-place", "--record", "record"], "expected one snapshot with"),
    ],
)
def test_what_the_verb_refuses_before_it_writes(leak, monkeypatch, capsys, words, why):
    shutil.copy(leak, leak.with_name("other"))
    monkeypatch.chdir(leak.parent)
    assert main(["fix", *words, "--host", HOST]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line
    assert names(leak.parent) == {"leak", "other"}
    assert leak.read_bytes() == leak.with_name("other").read_bytes()


def test_a_file_with_other_names_is_not_replaced(leak):
    os.link(leak, leak.with_name("other"))
    with pytest.raises(XfastError, match="other names"):
        plan(leak).apply(in_place=True)
    assert names(leak.parent) == {"leak", "other"}


def test_holes_stay_holes(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    with old.open("wb") as file:
        file.truncate(64 << 20)
        os.pwrite(file.fileno(), b"data", 40 << 20)
    with old.open("rb") as source, new.open("wb") as target:
        copy_bytes(source.fileno(), target.fileno(), 64 << 20)
    assert new.read_bytes() == old.read_bytes()
    assert new.stat().st_blocks <= old.stat().st_blocks + 256


def test_a_plan_that_leaves_a_finding_is_not_applied(data, tmp_path):
    raw = data / "raw" / "kvm618-guestxcr0_e7-bve7.xsave"
    ready = plan(raw, "intel-haswell@6.6")
    assert {finding.code for finding in ready.left} >= {"XCR0"}
    with pytest.raises(PolicyError, match="would still refuse it"):
        ready.apply(str(tmp_path / "out"))
    assert not names(tmp_path)


@pytest.mark.parametrize("edges", [(0, 8), ((1 << 20) - 3, (1 << 20) + 5), (5, 6)])
def test_the_hash_of_a_file_that_is_still_to_be_edited(tmp_path, edges):
    start, end = edges
    old = np.random.default_rng(1).bytes((2 << 20) + 77)
    new = old[:start] + bytes(end - start) + old[end:]
    path = tmp_path / "file"
    path.write_bytes(old)
    with path.open("rb") as file:
        edit = Splice(start, old[start:end], new[start:end])
        assert sha256(file.fileno(), [edit]) == hashlib.sha256(new).hexdigest()
        assert sha256(file.fileno()) == hashlib.sha256(old).hexdigest()


def test_a_lease_harms_nobody(leak):
    """Another process's open is not held up for the lease's 45 seconds, nor are we signalled."""
    code = (
        "import sys, time\nslowest = 0\nfor _ in range(20000):\n    start = time.monotonic()\n"
        "    open(sys.argv[1], 'r+b').close()\n"
        "    slowest = max(slowest, time.monotonic() - start)\nprint(slowest)"
    )
    busy = rests = 0
    writer = subprocess.Popen([sys.executable, "-c", code, leak], stdout=subprocess.PIPE, text=True)
    with writer, leak.open("rb") as file:
        original = put.Original(str(leak), file.fileno())
        while writer.poll() is None:
            try:
                original.require_at_rest()
                rests += 1
            except XfastError:
                busy += 1
        slowest = float(writer.stdout.read())
    assert slowest < 5
    assert rests
    assert busy
