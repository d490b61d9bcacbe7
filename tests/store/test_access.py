"""Run as root: what is written has no reader that what it was made from does not have."""

import errno
import os
import shutil
import stat
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sandbox
from snapshot_files import leaked_area as area

import xfast
from xfast.cli.main import main
from xfast.errors import XfastError
from xfast.repair.convert import convert
from xfast.store import access, put
from xfast.store.names import Directory
from xfast.store.undo import undo

HOST = "intel-haswell@6.1"
TENANT, TEAM, OTHERS = 4321, 4400, 4500
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another")
USER_OBJ, USER, GROUP_OBJ, NAMED_GROUP, MASK, OTHER = 1, 2, 4, 8, 0x10, 0x20
NOBODY = 0xFFFFFFFF


@pytest.fixture
def leak(tmp_path) -> Path:
    folder = tmp_path / "tenant"
    folder.mkdir()
    path = folder / "leak.xsave"
    path.write_bytes(area())
    path.chmod(0o640)
    return path


def plan(path):
    (found,) = xfast.read(path, layout=xfast.preset("intel"))
    return xfast.plan_fix(found, xfast.resolve(HOST))


def planned_dump(data, folder):
    """Copy a directory of images; return it and a plan for it."""
    shutil.copytree(data / "criu" / "criu42-regs64s-3thr", folder)
    drop = ["avx", "opmask", "zmm_hi256", "hi16_zmm"]
    host = xfast.resolve("amd-milan")
    return xfast.plan_fix(xfast.read(folder)[0], host, drop=drop, even_if_live=True)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def access_list(*entries) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def set_list(path, name, found) -> None:
    try:
        os.setxattr(path, name, found)
    except OSError:
        pytest.skip("this file system has no access lists")


def readers(path: Path) -> set[int]:
    """The users that a file's access list names and lets read."""
    try:
        found = os.getxattr(path, access.LIST)
    except OSError:
        return set()
    entries = list(struct.iter_unpack("<HHI", found[4:]))
    mask = next((bits for tag, bits, _ in entries if tag == MASK), 7)
    return {who for tag, bits, who in entries if tag == USER and bits & mask & 4}


WAYS = ["new", "replaced", "patched", "undone", "convert"]


def go(leak, way, monkeypatch) -> set[Path]:
    """Write in one of the ways; return all files that were made."""
    monkeypatch.setattr(put, "PATCH_FROM", 0 if way == "patched" else 1 << 40)
    out = str(leak) + ".new"
    if way == "convert":
        convert(xfast.read(leak, layout=xfast.preset("intel"))[0], out)
    elif way == "new":
        plan(leak).apply(out)
    else:
        plan(leak).apply(in_place=True, backup=True)
        if way == "undone":
            undo(str(leak) + ".xfast.json")
    made = set(leak.parent.iterdir()) - ({leak} if way in ("new", "convert") else set())
    assert len(made) >= 1 + (way != "convert")
    return made


@AS_ROOT
@pytest.mark.parametrize("way", WAYS)
def test_a_folders_default_list_adds_no_reader(leak, monkeypatch, way):
    """Whoever owns the folder had every file that root made there readable for a user of choice."""
    default = access_list(
        (USER_OBJ, 7, NOBODY), (USER, 7, TENANT), (GROUP_OBJ, 7, NOBODY), (MASK, 7, NOBODY),
        (OTHER, 0, NOBODY),
    )  # fmt: skip
    set_list(leak.parent, access.DEFAULT_LIST, default)
    for path in go(leak, way, monkeypatch):
        assert not readers(path), path.name
        assert not mode(path) & ~0o640


@AS_ROOT
@pytest.mark.parametrize("way", WAYS)
def test_an_access_lists_mask_is_no_right_of_the_group(leak, monkeypatch, way):
    """The bits of a file with a list show its mask; a new one without the list gave them away."""
    own = access_list(
        (USER_OBJ, 6, NOBODY), (USER, 6, TENANT), (GROUP_OBJ, 0, NOBODY), (MASK, 6, NOBODY),
        (OTHER, 0, NOBODY),
    )  # fmt: skip
    set_list(leak, access.LIST, own)
    assert mode(leak) == 0o660
    for path in go(leak, way, monkeypatch):
        with path.open("rb") as file:
            assert not access.access_of(file.fileno()).mode & 0o077, path.name
        assert readers(path) <= {TENANT}
        kept = path.name in ("leak.xsave", "leak.xsave.orig")
        assert readers(path) == ({TENANT} if kept else set())
        assert not mode(path) & 0o022 or (way, path) == ("patched", leak)  # the file itself


@pytest.mark.parametrize("tag", [USER, NAMED_GROUP])
def test_whom_an_access_list_denies_a_file_is_denied_what_is_made_of_it(leak, tmp_path, tag):
    """Of a file that all but one may read a new one without the list was readable for that one."""
    named = sorted([(tag, 0, TENANT), (GROUP_OBJ, 4, NOBODY)])  # as the kernel wants them
    own = access_list((USER_OBJ, 6, NOBODY), *named, (MASK, 4, NOBODY), (OTHER, 4, NOBODY))
    set_list(leak, access.LIST, own)
    assert mode(leak) == 0o644
    plan(leak).apply(str(tmp_path / "new"))
    assert mode(tmp_path / "new") == mode(tmp_path / "new.xfast.json") == 0o600


@AS_ROOT
@pytest.mark.parametrize("way", WAYS)
def test_a_group_of_the_folders_reads_nothing(leak, monkeypatch, way):
    """In a setgid folder what is made belongs to its group, and that had the record's bits."""
    os.chown(leak, TENANT, TEAM)
    os.chown(leak.parent, TENANT, OTHERS)
    leak.parent.chmod(0o2775)
    for path in go(leak, way, monkeypatch):
        assert path.stat().st_gid == TEAM or not mode(path) & 0o070, path.name
        assert path.stat().st_uid == (0 if path.name.endswith(".json") else TENANT)


@AS_ROOT
def test_who_may_not_give_the_group_gives_no_bits_to_another(leak, tmp_path):
    """A member of the team writes a new file: it is of the member's own group, not the team's."""
    os.chown(leak, TENANT, TEAM)
    leak.parent.chmod(0o755)
    leak.chmod(0o640)
    out = tmp_path / "out"
    out.mkdir()
    os.chown(out, OTHERS, OTHERS)

    def work() -> int:
        os.setgroups([TEAM])
        os.setresgid(OTHERS, OTHERS, OTHERS)
        os.chdir(out)
        os.setresuid(OTHERS, OTHERS, OTHERS)
        ready.apply("one")
        return 0

    ready = plan(leak)
    with leak.open("rb") as file:
        ready.snapshot.path = f"/dev/fd/{file.fileno()}"
        pid = os.fork()
        if not pid:
            code = 9
            try:
                code = work()
            finally:
                os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        pytest.skip("another user can't run here")
    assert {path.name for path in out.iterdir()} == {"one", "one.xfast.json"}
    for path in out.iterdir():
        assert path.stat().st_gid == TEAM or not mode(path) & 0o070, path.name


@pytest.mark.parametrize("size", [0, 3, 4, 11, 12, 43])
def test_an_access_list_that_is_cut_off_is_read_as_far_as_it_goes(size):
    whole = access_list((USER_OBJ, 7, NOBODY), (USER, 7, TENANT), (GROUP_OBJ, 7, NOBODY),
                        (MASK, 7, NOBODY), (OTHER, 7, NOBODY))  # fmt: skip
    count = max(size - 4, 0) // 8
    safe = access_list((USER_OBJ, 6, NOBODY), (USER, 4, TENANT), (GROUP_OBJ, 4, NOBODY),
                       (MASK, 4, NOBODY), (OTHER, 4, NOBODY))  # fmt: skip
    assert access.safe_list(whole[:size]) == safe[: min(size, 4 + 8 * count)]


@pytest.mark.parametrize(
    ("bits", "given"), [(0o644, 0o644), (0o640, 0o600), (0o664, 0o644), (0o604, 0o600)]
)
def test_a_group_that_is_not_the_originals_has_no_more_than_others(tmp_path, bits, given):
    path = tmp_path / "one"
    path.write_bytes(b"")
    with path.open("rb") as file:
        access.restrict(file.fileno(), access.Access(bits, None, None))
    assert mode(path) == given


@pytest.mark.parametrize("private", ["the images", "the directory"])
@pytest.mark.parametrize("way", ["convert", "new", "replaced"])
def test_what_comes_of_a_directory_is_as_private_as_it(data, tmp_path, private, way):
    """Areas of a dump that only its owner could read were written for everybody."""
    dump = tmp_path / "dump"
    ready = planned_dump(data, dump)
    dump.chmod(0o700 if private == "the directory" else 0o755)
    for path in dump.iterdir():
        path.chmod(0o644 if private == "the directory" else 0o600)
        if not os.geteuid():
            os.chown(path, TENANT, TENANT)
    if not os.geteuid():
        os.chown(dump, TENANT, TENANT)
    made = tmp_path / "out.npy"
    if way == "convert":
        convert(xfast.read(dump)[0], str(made), wrapping="npy")
        assert made.stat().st_uid == dump.stat().st_uid
    elif way == "new":
        ready.apply(str(tmp_path / "out"))
        made = tmp_path / "out.xfast.json"
    else:
        ready.apply(in_place=True)
        made = tmp_path / "dump.xfast.json"
    assert mode(made) == 0o600


@AS_ROOT
def test_a_directory_of_several_owners_gives_none_of_them_the_areas(data, tmp_path):
    """A tenant's directory with root's images in it: what is made of these is root's."""
    dump = tmp_path / "dump"
    planned_dump(data, dump)
    os.chown(dump, TENANT, TENANT)
    dump.chmod(0o755)
    for path in dump.iterdir():
        path.chmod(0o640)
    convert(xfast.read(dump)[0], str(tmp_path / "out.npy"), wrapping="npy")
    assert (tmp_path / "out.npy").stat().st_uid == 0
    assert mode(tmp_path / "out.npy") == 0o600


@pytest.mark.parametrize("what", ["file", "pipe"])
def test_what_comes_of_standard_input_is_as_private_as_it(leak, tmp_path, what):
    leak.chmod(0o600)
    words = ["convert", "-", "--layout", "intel", "--as", "npy", "-o", tmp_path / "out.npy"]
    with leak.open("rb") as file:
        feed = {"stdin": file} if what == "file" else {"input": area()}
        here = {**os.environ, "PYTHONPATH": str(Path(xfast.__file__).parents[1])}
        subprocess.run([sys.executable, "-m", "xfast", *words], env=here, check=True, **feed)
    assert mode(tmp_path / "out.npy") == 0o600


def test_no_answer_goes_into_a_file_called_minus(leak, tmp_path, monkeypatch, capsys):
    """Where other programs would write to standard output; ./- names the file."""
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(leak), "--layout", "intel", "--as", "npy", "-o", "-"]) == 2
    assert main(["host", "dump", "-o", "-"]) == 2
    assert capsys.readouterr().err == "xfast: -: expected the name of a file\n" * 2
    assert not (tmp_path / "-").exists()
    assert main(["convert", str(leak), "--layout", "intel", "--as", "npy", "-o", "./-"]) == 0


def test_records_and_journals_in_a_directory_are_not_made_ours(data, tmp_path):
    """A copy belongs to who makes it: a tenant's forgery would have become a trusted record."""
    dump = tmp_path / "dump"
    ready = planned_dump(data, dump)
    for name in ("x.xfast.json", "core-23807.img.xfast-journal", "pages.orig"):
        (dump / name).write_bytes(b"{}")
    (dump / "core-23807.img.xfast-journal").unlink()
    (dump / "other.xfast-journal").write_bytes(b"{}")
    ready.apply(str(tmp_path / "out"))
    kept = {path.name for path in (tmp_path / "out").iterdir()}
    assert kept == {path.name for path in dump.iterdir()} - {"x.xfast.json", "other.xfast-journal"}


def test_a_directory_deeper_than_any_path_leaves_nothing_behind(data, tmp_path, capsys):
    """The copy could neither be finished nor removed, and stood in the way of the next."""
    dump = tmp_path / "dump"
    ready = planned_dump(data, dump)
    fd = os.open(dump, os.O_RDONLY)
    for _ in range(25):
        os.mkdir("n" * 200, dir_fd=fd)
        below = os.open("n" * 200, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    for _ in range(2):
        with pytest.raises(XfastError, match="File name too long"):
            ready.apply(str(tmp_path / "out"))
        assert os.listdir(tmp_path) == ["dump"]
    shutil.rmtree(dump)


def test_a_directory_put_in_the_place_of_ours_is_not_filled(data, tmp_path, monkeypatch):
    """The folder is a tenant's: a directory with files in it took the place of the new one."""
    ready = planned_dump(data, tmp_path / "dump")
    real = Directory.make_folder

    def exchanged(self, name, bits):
        real(self, name, bits)
        if name == ".out.xfast-new":
            (tmp_path / name).rename(tmp_path / "aside")
            (tmp_path / name).mkdir(0o700)
            (tmp_path / name / "core-1.img").write_bytes(b"the tenant's")

    monkeypatch.setattr(Directory, "make_folder", exchanged)
    with pytest.raises(XfastError, match="somebody exchanged the directory in the making"):
        ready.apply(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_image_that_changes_while_it_is_copied(data, tmp_path, monkeypatch):
    from xfast.store import tree

    ready = planned_dump(data, tmp_path / "dump")
    real = tree.copy_bytes

    def meddle(source, target, size):
        real(source, target, size)
        with (tmp_path / "dump" / "pstree.img").open("ab") as file:
            file.write(b"x")

    monkeypatch.setattr(tree, "copy_bytes", meddle)
    with pytest.raises(XfastError, match="changed while it was copied"):
        ready.apply(str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["dump"]


@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_file_system_that_can_not_rename_where_free(data, leak, tmp_path, monkeypatch, what):
    """NFS answers EINVAL to renameat2's flag; a directory was linked then, which no system does."""
    monkeypatch.setattr(Directory, "_renameat2", lambda *_: False)
    ready = planned_dump(data, tmp_path / "dump") if what == "directory" else plan(leak)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "kept").write_bytes(b"")
    assert ready.apply(str(tmp_path / "out"))
    assert (tmp_path / "out").is_dir() == (what == "directory")
    with Directory.open(str(tmp_path)) as top, pytest.raises(OSError, match=r"exists|not empty"):
        top.rename("out", "taken", replace=False)
    if what == "file":
        assert plan(leak).apply(in_place=True, backup=True)
        assert leak.read_bytes() == (tmp_path / "out").read_bytes()


def test_a_newer_file_that_can_not_go_back_is_not_removed(leak, monkeypatch):
    """It came during the exchange of the two names, and then the disk failed."""
    real, calls = Directory.exchange, []

    def failing(self, one, two):
        calls.append(two)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        newer = leak.with_name("newer")
        newer.write_bytes(b"newer")
        newer.rename(leak)
        if not real(self, one, two):
            pytest.skip("this file system can't exchange two names")
        return True

    monkeypatch.setattr(Directory, "exchange", failing)
    with pytest.raises(XfastError, match="Input/output error"):
        plan(leak).apply(in_place=True)
    assert leak.with_name(".leak.xsave.xfast-new").read_bytes() == b"newer"


def test_the_companion_of_a_result_that_has_its_place_stays(leak, tmp_path, monkeypatch):
    """The last sync failed: the result stood there, and what tells its XCR0 was taken away."""
    from xfast.store import staged

    xcrs = np.zeros(392, np.uint8)
    xcrs[0], xcrs[16] = 1, 7
    leak.with_suffix(".xcrs").write_bytes(xcrs.tobytes())
    ready = plan(leak)
    real = staged.Staged.publish

    def failing(self, **how):
        real(self, **how)
        if self.name == "out":
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(staged.Staged, "publish", failing)
    with pytest.raises(XfastError, match="Input/output error"):
        ready.apply(str(tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} >= {"out", "out.xcrs", "out.xfast.json"}


@pytest.mark.parametrize(
    ("names", "error"),
    [(["openat2", "faccessat2"], errno.EPERM), (sandbox.NEW_CALLS, errno.ENOSYS)],
    ids=["docker", "kernel"],
)
def test_an_old_sandbox_takes_no_promise_away(data, leak, tmp_path, names, error):
    """Without openat2, faccessat2 and more, links and journals are seen as ever."""
    (tmp_path / "link").symlink_to("tenant")
    interrupted = tmp_path / "interrupted.xsave"
    interrupted.write_bytes(area())
    Path(str(interrupted) + ".xfast-journal").write_bytes(b"")
    dump = planned_dump(data, tmp_path / "dump")

    def refused(call, *args, **how) -> str:
        try:
            call(*args, **how)
        except XfastError as problem:
            return str(problem)
        return ""

    def work() -> int:
        assert "symbolic link" in refused(plan(leak).apply, str(tmp_path / "link" / "out"))
        assert "an interrupted edit" in refused(xfast.read, str(interrupted))
        assert any(
            "interrupted" in refused(xfast.read, path) for path in xfast.snapshots.walk(tmp_path)
        )
        assert dump.apply(str(tmp_path / "out"))
        assert "exists" in refused(dump.apply, str(tmp_path / "out"))
        for limit in (0, 1 << 40):
            put.PATCH_FROM = limit
            assert plan(leak).apply(in_place=True)
            undo(str(leak) + ".xfast.json")
            os.unlink(str(leak) + ".xfast.json")
        assert plan(leak).apply(str(tmp_path / "new"))
        assert "exists" in refused(plan(leak).apply, str(tmp_path / "new"))
        return 0

    code = sandbox.run(work, names, error)
    if code < 0:
        pytest.skip("system calls can't be filtered here")
    assert code == 0
    assert leak.read_bytes() == area()
