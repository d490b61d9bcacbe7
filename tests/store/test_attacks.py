"""Run as root over a tenant's files: modes, owners, links, and names that the tenant set up."""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from snapshot_files import leaked_area as area

import xfast
from xfast.cli.main import main
from xfast.errors import XfastError
from xfast.repair.convert import convert
from xfast.store import journal, names, put, tree
from xfast.store.names import Directory, open_folder
from xfast.store.undo import undo

HOST = "intel-haswell@6.1"
TENANT = 4321
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another")


@pytest.fixture
def leak(tmp_path) -> Path:
    path = tmp_path / "leak.xsave"
    path.write_bytes(area())
    return path


def plan(path):
    (found,) = xfast.read(path, layout=xfast.preset("intel"))
    return xfast.plan_fix(found, xfast.resolve(HOST))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def everything(folder: Path) -> set[str]:
    return {str(one.relative_to(folder)) for one in folder.rglob("*")}


WAYS = {
    "new": {"output": "leak.new"},
    "replaced": {"in_place": True, "backup": True},
    "patched": {"in_place": True, "backup": True},
}


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000])
@pytest.mark.parametrize("bits", [0o4777, 0o2775, 0o6711, 0o666, 0o600, 0o440])
@pytest.mark.parametrize("way", [*WAYS, "convert", "undone"])
def test_nothing_is_executable_setuid_or_writable_for_others(
    leak, tmp_path, monkeypatch, way, bits, mask
):
    """A tenant's file of mode 4777 gave a setuid file that root owned."""
    monkeypatch.setattr(put, "PATCH_FROM", 0 if way == "patched" else 1 << 40)
    monkeypatch.chdir(tmp_path)
    leak.chmod(bits)
    old = os.umask(mask)
    try:
        if way == "convert":
            convert(xfast.read(leak, layout=xfast.preset("intel"))[0], "leak.new")
        else:
            plan(leak).apply(**WAYS.get(way, WAYS["replaced"]))
        if way == "undone":
            undo("leak.xsave.xfast.json")
    finally:
        os.umask(old)
    made = everything(tmp_path) - (set() if way in ("replaced", "undone") else {"leak.xsave"})
    assert len(made) >= 1 + (way != "convert")
    for name in made:
        found = mode(tmp_path / name)
        assert not found & 0o7133, f"{name}: {found:04o}"
        assert not found & ~bits
        if name not in ("leak.xsave", "leak.xsave.orig"):
            assert not found & mask


def test_what_is_in_the_making_is_private(leak, monkeypatch):
    leak.chmod(0o644)
    seen = []
    real = os.open

    def look(name, flags, *args, **kwargs):
        fd = real(name, flags, *args, **kwargs)
        if flags & os.O_CREAT:
            seen.append((str(name), stat.S_IMODE(os.fstat(fd).st_mode)))
        return fd

    monkeypatch.setattr(os, "open", look)
    monkeypatch.setattr(put, "PATCH_FROM", 0)
    plan(leak).apply(in_place=True, backup=True)
    assert {bits for _, bits in seen} == {0o600}
    assert any("journal" in name for name, _ in seen)


@AS_ROOT
@pytest.mark.parametrize("way", [*WAYS, "convert", "undone"])
def test_the_owner_stays_and_the_record_is_roots(leak, tmp_path, monkeypatch, way):
    monkeypatch.setattr(put, "PATCH_FROM", 0 if way == "patched" else 1 << 40)
    monkeypatch.chdir(tmp_path)
    os.chown(leak, TENANT, TENANT)
    if way == "convert":
        convert(xfast.read(leak, layout=xfast.preset("intel"))[0], "leak.new")
    else:
        plan(leak).apply(**WAYS.get(way, WAYS["replaced"]))
    if way == "undone":
        undo("leak.xsave.xfast.json")
    for path in tmp_path.iterdir():
        owner = os.geteuid() if path.name.endswith(".xfast.json") else TENANT
        assert path.stat().st_uid == owner, path.name


@AS_ROOT
def test_a_directory_of_another_keeps_its_owners(data, tmp_path):
    source = tmp_path / "dump"
    shutil.copytree(data / "criu" / "criu42-regs64s-3thr", source)
    for path in [source, *source.iterdir()]:
        os.chown(path, TENANT, TENANT)
        path.chmod(0o6777)
    (found,) = xfast.read(source)
    host = xfast.resolve("amd-milan")
    drop = ["avx", "opmask", "zmm_hi256", "hi16_zmm"]
    xfast.plan_fix(found, host, drop=drop, even_if_live=True).apply(str(tmp_path / "out"))
    for path in [tmp_path / "out", *(tmp_path / "out").iterdir()]:
        assert path.stat().st_uid == TENANT
        assert mode(path) == (0o755 if path.is_dir() else 0o644)


@pytest.mark.parametrize("name", [".leak.xsave.xfast-new", ".leak.xsave.xfast.json.xfast-new"])
@pytest.mark.parametrize("kind", ["pipe", "link", "hard link", "folder", "file"])
def test_what_a_tenant_puts_at_our_temporary_names(leak, tmp_path, name, kind):
    victim = tmp_path / "victim"
    victim.write_bytes(b"another's")
    place = tmp_path / name
    {
        "pipe": lambda: os.mkfifo(place),
        "link": lambda: place.symlink_to(victim),
        "hard link": lambda: os.link(victim, place),
        "folder": place.mkdir,
        "file": lambda: place.write_bytes(b"x"),
    }[kind]()
    old = leak.read_bytes()
    try:
        plan(leak).apply(in_place=True)
    except XfastError:
        assert leak.read_bytes() == old
    assert victim.read_bytes() == b"another's"
    assert victim.stat().st_nlink == 1 + place.exists() * (kind == "hard link")


RESULT_KINDS = ["pipe", "socket", "device", "link", "dangling link", "hard link", "folder"]


@pytest.mark.parametrize("kind", RESULT_KINDS)
@pytest.mark.parametrize("end", [".xfast.json", ".orig", ""])
def test_what_a_tenant_puts_at_the_names_of_results(leak, tmp_path, end, kind):
    victim = tmp_path / "victim"
    victim.write_bytes(b"another's")
    way = {"in_place": True, "backup": True} if end else {"output": str(leak) + ".new"}
    place = Path(str(leak) + (end or ".new"))
    if kind == "device" and os.geteuid():
        pytest.skip("only root can make a device")
    {
        "pipe": lambda: os.mkfifo(place),
        "socket": lambda: os.mknod(place, stat.S_IFSOCK | 0o666),
        "device": lambda: os.mknod(place, stat.S_IFCHR | 0o666, os.makedev(1, 3)),
        "link": lambda: place.symlink_to(victim),
        "dangling link": lambda: place.symlink_to(tmp_path / "nothing"),
        "hard link": lambda: os.link(victim, place),
        "folder": place.mkdir,
    }[kind]()
    old = leak.read_bytes()
    with pytest.raises(XfastError, match="exists"):
        plan(leak).apply(**way)
    assert leak.read_bytes() == old
    assert victim.read_bytes() == b"another's"
    assert not (tmp_path / "nothing").exists()


def test_a_name_that_leads_through_a_descriptor_is_a_link(leak):
    """/proc/PID/fd has names that lead anywhere, though no link can be seen on the way."""
    with leak.open("rb") as file:
        there = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        with pytest.raises(XfastError, match="is a symbolic link"):
            plan(there).apply(in_place=True)
        for output in (there, "/dev/null", "/proc/self/fd/new"):
            with pytest.raises(XfastError, match=r"exists|a symbolic link lies on the way"):
                plan(leak).apply(output)
    assert leak.read_bytes() == area()


@pytest.mark.parametrize(
    "name", [b"\xff\xfe.xsave", b"\x1b[31m\r\n.xsave", "\u202e.xsave".encode()]
)
def test_a_name_that_is_no_text_is_fixed_and_undone(tmp_path, capsys, name):
    """Bytes that are no UTF-8, escapes, a line's end: in the record as they are, shown escaped."""
    path = os.path.join(os.fsencode(tmp_path), name)
    Path(os.fsdecode(path)).write_bytes(area())
    words = ["fix", os.fsdecode(path), "--host", HOST, "--layout", "intel", "--in-place"]
    assert main(words) == 3
    new = Path(os.fsdecode(path)).read_bytes()
    assert new != area()
    assert main(["undo", os.fsdecode(path) + ".xfast.json"]) == 0
    assert Path(os.fsdecode(path)).read_bytes() == area()
    said = capsys.readouterr()
    assert not {"\x1b", "\r", "\u202e"} & set(said.out + said.err)
    assert "xsave\n" in said.out


@AS_ROOT
def test_a_file_that_is_mounted_on_another_name_is_not_replaced(leak, tmp_path):
    """rename() refuses a mount point: the file stays, and nothing else is left."""
    name = tmp_path / "mounted.xsave"
    name.touch()
    run = f"mount --bind {leak} {name} && exec {sys.executable} -m xfast fix {name} --in-place "
    run += f"--layout intel --host {HOST}"
    here = {**os.environ, "PYTHONPATH": str(Path(xfast.__file__).parents[1])}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", run], env=here, capture_output=True, text=True, check=False
    )
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip("mounts are not allowed here")
    assert done.returncode == 3
    assert done.stderr.endswith("can't be written: Device or resource busy\n")
    assert leak.read_bytes() == area()
    assert everything(tmp_path) == {"leak.xsave", "mounted.xsave"}


def test_a_folder_behind_a_link_is_not_written_to(leak, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for output in ("link/out", "link/../link/out"):
        with pytest.raises(XfastError, match="a symbolic link lies on the way"):
            plan(leak).apply(str(tmp_path / output))
    assert not list((tmp_path / "real").iterdir())
    assert main(["fix", str(leak), "--host", HOST, "-o", str(tmp_path / "link") + "/"]) == 3
    assert not list((tmp_path / "real").iterdir())


@pytest.mark.parametrize("missing", [False, True], ids=["openat2", "without openat2"])
def test_a_path_is_resolved_without_links(tmp_path, monkeypatch, missing):
    if missing:

        def absent(path, at):
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(names, "_openat2", absent)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    for path in ("a/b", str(tmp_path / "a/b"), "./a//b/", "a/../a/b"):
        fd = open_folder(path)
        assert os.path.samestat(os.fstat(fd), (tmp_path / "a/b").stat())
        os.close(fd)
    for path in ("link", "link/b", str(tmp_path / "link/b")):
        with pytest.raises(XfastError, match="symbolic link"):
            open_folder(path)
    with pytest.raises(OSError, match="Not a directory"):
        open_folder("file")
    with pytest.raises(FileNotFoundError):
        open_folder("none/b")
    top = open_folder("a")
    below = open_folder("b", top)
    os.close(top)
    os.close(below)


def test_a_file_with_a_second_name_outside_is_not_changed(leak, tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    outside.mkdir()
    os.link(leak, outside / "same")
    for limit in (0, 1 << 40):
        monkeypatch.setattr(put, "PATCH_FROM", limit)
        with pytest.raises(XfastError, match="hard links"):
            plan(leak).apply(in_place=True)
    assert (outside / "same").read_bytes() == area()
    assert everything(tmp_path) == {"leak.xsave", "outside", "outside/same"}


@pytest.fixture
def interrupted(leak, monkeypatch):
    """A patch that was interrupted: its journal, its record, and the file half done."""
    monkeypatch.setattr(put, "PATCH_FROM", 0)
    ready = plan(leak)

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(journal, "_put_back", stop)
    monkeypatch.setattr(xfast.snapshots.raw, "read", stop, raising=False)
    with pytest.raises(KeyboardInterrupt):
        ready.apply(in_place=True)
    monkeypatch.undo()
    assert Path(str(leak) + ".xfast-journal").exists()
    return leak


def test_an_interrupted_patch_is_taken_back(interrupted):
    assert interrupted.read_bytes() != area()
    assert journal.recover(str(interrupted))
    assert interrupted.read_bytes() == area()


def test_a_journal_of_another_file_of_the_name_changes_nothing(interrupted, tmp_path):
    """Root wrote it, and its record stands: moved to where a neighbour's file has the same name.

    The neighbour's holds new bytes where the journal has them; the rest of it is the neighbour's.
    """
    there = tmp_path / "there"
    there.mkdir()
    other = there / "leak.xsave"
    other.write_bytes(interrupted.read_bytes()[:-1] + b"!")
    before = other.read_bytes()
    Path(str(interrupted) + ".xfast-journal").rename(str(other) + ".xfast-journal")
    with pytest.raises(XfastError, match=r"is not the file that .* belongs to"):
        journal.recover(str(other))
    assert other.read_bytes() == before


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "link"])
def test_what_is_no_file_in_the_journals_place_is_one_line(leak, tmp_path, kind, capsys):
    place = Path(str(leak) + ".xfast-journal")
    {
        "pipe": lambda: os.mkfifo(place),
        "socket": lambda: os.mknod(place, stat.S_IFSOCK | 0o666),
        "folder": place.mkdir,
        "link": lambda: place.symlink_to("/etc/shadow"),
    }[kind]()
    assert main(["fix", str(leak), "--host", HOST, "--layout", "intel", "--in-place"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected a journal of ours: " in line
    assert "Errno" not in line
    assert leak.read_bytes() == area()


FORGERIES = ["nonce", "no record", "another's name", "open", "linked", "group"]


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_journal_that_its_files_record_does_not_name(interrupted, forgery):
    place = Path(str(interrupted) + ".xfast-journal")
    record = Path(str(interrupted) + ".xfast.json")
    half = interrupted.read_bytes()
    words = json.loads(place.read_text())
    if forgery == "nonce":
        place.write_text(json.dumps(words | {"nonce": "0" * 32}))
    elif forgery == "no record":
        record.unlink()
    elif forgery == "another's name":
        place.write_text(json.dumps(words | {"name": "other"}))
    elif forgery == "linked":
        os.link(place, place.with_name("second"))
    else:
        place.chmod(0o666 if forgery == "open" else 0o640)
    with pytest.raises(XfastError, match="expected a journal of ours"):
        journal.recover(str(interrupted))
    assert interrupted.read_bytes() == half


def test_a_record_renamed_to_the_journals_name_is_none(leak, tmp_path):
    plan(leak).apply(in_place=True)
    new = leak.read_bytes()
    Path(str(leak) + ".xfast.json").rename(str(leak) + ".xfast-journal")
    with pytest.raises(XfastError, match="expected a journal of ours"):
        journal.recover(str(leak))
    assert leak.read_bytes() == new


@AS_ROOT
def test_a_record_that_a_tenant_wrote_before_is_not_taken_for_ours(leak):
    """With a record in the right place that covers the change, none would be written."""
    ready = plan(leak)
    ready.apply(in_place=True)
    record = Path(str(leak) + ".xfast.json")
    forged = json.loads(record.read_text()) | {"changes": []}
    leak.write_bytes(area())
    record.write_text(json.dumps(forged))
    os.chown(record, TENANT, TENANT)
    with pytest.raises(XfastError, match="exists; expected a new name"):
        plan(leak).apply(in_place=True)
    assert leak.read_bytes() == area()


def test_capabilities_are_not_taken_over(leak):
    try:
        os.setxattr(leak, "user.note", b"kept")
    except OSError:
        pytest.skip("this file system has no extended attributes")
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    try:
        os.setxattr(leak, "security.capability", capability)
    except OSError:
        capability = b""
    plan(leak).apply(in_place=True)
    assert os.getxattr(leak, "user.note") == b"kept"
    if capability:
        assert "security.capability" not in os.listxattr(leak)


def test_directories_nested_1900_deep(tmp_path, data):
    """No walk and no copy calls itself for every level."""
    dump = tmp_path / "dump"
    shutil.copytree(data / "criu" / "criu42-regs64s-3thr", dump)
    fd = os.open(dump, os.O_RDONLY)
    for _ in range(1900):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    leaf = os.open("leaf", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=fd)
    os.write(leaf, b"deep")
    os.close(leaf)
    os.close(fd)
    try:
        (found,) = xfast.read(dump)
        drop = ["avx", "opmask", "zmm_hi256", "hi16_zmm"]
        host = xfast.resolve("amd-milan")
        xfast.plan_fix(found, host, drop=drop, even_if_live=True).apply(str(tmp_path / "out"))
        with Directory.open(str(tmp_path / "out")) as out:
            paths = [path for path, _, _ in tree.folders(out)]
            assert len(paths) == 1901
            with out.below(paths[-1]) as last:
                assert os.listdir(last.fd) == ["leaf"]
        deep = tmp_path / "deep"
        deep.mkdir()
        (dump / "d").rename(deep / "d")
        found = list(xfast.snapshots.walk([deep]))
        assert [os.path.basename(path) for path in found] == ["leaf"]
    finally:
        with Directory.open(str(tmp_path)) as top:
            for name in ("dump", "out", "deep"):
                tree.remove_tree(top, name)


def test_a_tree_is_removed_without_leaving_it(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"kept")
    inside = tmp_path / "tree"
    (inside / "sub").mkdir(parents=True)
    (inside / "sub" / "link").symlink_to(outside)
    (inside / "link").symlink_to(outside / "kept")
    os.mkfifo(inside / "pipe")
    with Directory.open(str(tmp_path)) as top:
        tree.remove_tree(top, "tree")
        tree.remove_tree(top, "tree")
        (tmp_path / "tree").symlink_to(outside)
        with pytest.raises(XfastError, match="symbolic link"):
            tree.remove_tree(top, "tree")
    assert everything(outside) == {"kept"}


def test_convert_looks_before_it_writes(leak, tmp_path):
    """As fix does: the stamp, the lease, and what was written read back."""
    (found,) = xfast.read(leak, layout=xfast.preset("intel"))
    with leak.open("r+b"), pytest.raises(XfastError, match="is open for writing"):
        convert(found, str(tmp_path / "out"))
    leak.write_bytes(area()[::-1])
    for wrapping in ("same", "raw", "npy", "qemu", "elfcore"):
        with pytest.raises(XfastError, match="changed since it was read"):
            convert(found, str(tmp_path / "out"), wrapping=wrapping)
    assert everything(tmp_path) == {"leak.xsave"}


def test_what_convert_wrote_is_read_back(leak, tmp_path, monkeypatch):
    (found,) = xfast.read(leak, layout=xfast.preset("intel"))
    real = os.fdopen

    class Lossy:
        """A file that keeps a byte to itself."""

        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            return self.file.write(bytes(data)[:-1] + b"!")

    monkeypatch.setattr(os, "fdopen", lambda fd, mode: Lossy(real(fd, mode)))
    for wrapping in ("raw", "npy", "qemu"):
        with pytest.raises(XfastError):
            convert(found, str(tmp_path / "out"), wrapping=wrapping)
    assert everything(tmp_path) == {"leak.xsave"}


def test_the_hash_of_the_record_is_the_files(leak, tmp_path):
    record = plan(leak).apply(str(tmp_path / "out"))
    digest = hashlib.sha256((tmp_path / "out").read_bytes()).hexdigest()
    assert record["files"][0]["after"] == digest


def test_a_snapshot_that_a_link_names_is_read_and_not_replaced(leak, tmp_path):
    link = tmp_path / "link.xsave"
    link.symlink_to(leak)
    assert plan(link).apply(str(tmp_path / "out"))
    with pytest.raises(XfastError, match="is a symbolic link"):
        plan(link).apply(in_place=True)
    assert leak.read_bytes() == area()
    assert link.is_symlink()


@pytest.mark.parametrize("when", ["linked", "exchanged"])
def test_a_file_in_the_making_that_a_tenant_gets_hold_of_is_not_published(
    leak, tmp_path, monkeypatch, when
):
    """The folder is the tenant's: he may give our file a second name, or put his own there."""
    temporary = tmp_path / ".leak.xsave.xfast-new"
    real = put.complete

    def meddle(row, source):
        real(row, source)
        if when == "linked":
            os.link(temporary, tmp_path / "second")
        else:
            temporary.rename(tmp_path / "second")
            temporary.write_bytes(b"the tenant's")

    monkeypatch.setattr(put, "complete", meddle)
    with pytest.raises(XfastError, match="somebody exchanged or linked the file in the making"):
        plan(leak).apply(in_place=True)
    assert leak.read_bytes() == area()
    assert everything(tmp_path) <= {"leak.xsave", "second"}


@AS_ROOT
@pytest.mark.parametrize("owner", [0, TENANT])
def test_in_a_folder_that_everybody_writes(leak, tmp_path, owner):
    tmp_path.chmod(0o1777)
    os.chown(tmp_path, owner, owner)
    os.chown(leak, TENANT, TENANT)
    record = str(leak) + ".xfast.json"
    assert plan(leak).apply(in_place=True)
    assert leak.stat().st_uid == TENANT
    undo(record)
    assert leak.read_bytes() == area()
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    Path(record).rename(outside / "r.json")  # a path in a record that lies where others write
    outside.chmod(0o777)
    with pytest.raises(XfastError, match="--file names another"):
        undo(str(outside / "r.json"))


@AS_ROOT
def test_an_access_list_gives_nobody_the_right_to_write(leak):
    acl = bytes.fromhex("02000000" "01000600ffffffff" "02000600e1100000" "04000600ffffffff"
                        "10000600ffffffff" "20000000ffffffff")  # fmt: skip
    try:
        os.setxattr(leak, "system.posix_acl_access", acl)
    except OSError:
        pytest.skip("this file system has no access lists")
    plan(leak).apply(in_place=True)
    kept = os.getxattr(leak, "system.posix_acl_access")
    mask = kept[kept.index(b"\x10\x00", 4) + 2]
    assert not mask & 2


def test_a_companion_that_is_damaged_between_two_looks_is_one_line(leak, tmp_path, monkeypatch):
    from xfast.snapshots import raw

    ready = plan(leak)
    (tmp_path / "leak.xcrs").write_bytes(b"short")
    assert set(raw.COMPANIONS) == {".xcrs", ".cpuid2"}
    with pytest.raises(XfastError, match=r"leak\.xcrs"):
        ready.apply(str(tmp_path / "out"))
    assert everything(tmp_path) == {"leak.xsave", "leak.xcrs"}


def test_a_device_is_not_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda *a, **k: opened.append(a[0]) or real(*a, **k))
    with Directory.open(str(tmp_path)) as top, pytest.raises(XfastError, match="no regular file"):
        put.open_in(top, "pipe")
    assert "pipe" not in opened


@pytest.mark.parametrize("in_place", [False, True])
def test_the_record_of_a_directory_is_as_private_as_its_images(data, tmp_path, in_place):
    """The directory may be open to all and its images not; the record holds their registers."""
    dump = tmp_path / "dump"
    shutil.copytree(data / "criu" / "criu42-regs64s-3thr", dump)
    dump.chmod(0o755)
    for path in dump.iterdir():
        path.chmod(0o600)
    (found,) = xfast.read(dump)
    drop = ["avx", "opmask", "zmm_hi256", "hi16_zmm"]
    ready = xfast.plan_fix(found, xfast.resolve("amd-milan"), drop=drop, even_if_live=True)
    way = {"in_place": True} if in_place else {"output": str(tmp_path / "out")}
    assert ready.apply(**way, record=str(tmp_path / "record"))
    assert mode(tmp_path / "record") == 0o600


def test_the_first_companion_goes_where_the_second_fails(leak, tmp_path):
    ready = plan(leak)
    xcrs = np.zeros(392, np.uint8)
    xcrs[0], xcrs[16] = 1, 7
    (tmp_path / "leak.xcrs").write_bytes(xcrs.tobytes())
    (tmp_path / "leak.cpuid2").write_bytes(b"short")
    with pytest.raises(XfastError, match=r"leak\.cpuid2"):
        ready.apply(str(tmp_path / "out"))
    assert everything(tmp_path) == {"leak.xsave", "leak.xcrs", "leak.cpuid2"}
