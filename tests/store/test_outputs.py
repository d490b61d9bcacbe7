"""Answers that are kept in files, and a scan's folder, where a tenant has set up the names."""

import os
import stat

import pytest

from xfast.cli.main import main
from xfast.errors import XfastError
from xfast.fleet import run as fleet
from xfast.hosts import resolve
from xfast.store.staged import TEMPORARY, write_text

TENANT = 4321
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "victim"
    path.write_text("as it was")
    return path


def set_up(place, name, kind, victim):
    """Put what a tenant could make where a file is to be written, or its temporary one."""
    path = place / (TEMPORARY.format(name) if "temporary" in kind else name)
    if "link" in kind and "hard" not in kind:
        path.symlink_to(victim)
    elif "hard" in kind:
        os.link(victim, path)
    elif "fifo" in kind:
        os.mkfifo(path)
    else:
        path.mkdir()
    return path


KINDS = ("link", "hard link", "fifo", "folder", "temporary link", "temporary hard link",
         "temporary fifo", "temporary folder")  # fmt: skip


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_answer_goes_through_what_a_tenant_put_there(tmp_path, victim, kind, replace):
    """`host dump -o` wrote through a symbolic link, and cut off what it led to."""
    folder = tmp_path / "out"
    folder.mkdir()
    set_up(folder, "answer.json", kind, victim)
    try:
        write_text(str(folder / "answer.json"), "new", replace=replace)
    except XfastError as problem:
        assert "\n" not in str(problem)  # noqa: PT017
    else:
        assert (folder / "answer.json").read_text() == "new"
        assert not (folder / "answer.json").is_symlink()
    assert victim.read_text() == "as it was"
    assert stat.S_IMODE(victim.stat().st_mode) & 0o022 == 0


@pytest.mark.parametrize("replace", [False, True])
def test_answers_are_not_writable_for_others_whatever_the_umask(tmp_path, replace):
    path = tmp_path / "answer"
    before = os.umask(0)
    try:
        write_text(str(path), "x", replace=replace)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert os.listdir(tmp_path) == ["answer"]


def test_a_host_is_not_dumped_through_a_link(tmp_path, victim, capsys):
    path = tmp_path / "host.json"
    path.symlink_to(victim)
    assert main(["host", "dump", "-o", str(path)]) == 2
    assert "exists; expected a new name" in capsys.readouterr().err
    assert victim.read_text() == "as it was"
    path.unlink()
    assert main(["host", "dump", "-o", str(path)]) == 0
    assert '"xcr0"' in path.read_text()


def scan(tmp_path, folder):
    pytest.importorskip("pyarrow")
    image = bytearray(4096)
    image[512] = 3
    (tmp_path / "vm.xsave").write_bytes(image)
    hosts = [resolve("intel-broadwell@6.12")]
    return fleet.scan([str(tmp_path / "vm.xsave")], hosts, str(folder), jobs=1)


@pytest.mark.parametrize("name", [".lock", "manifest.json", "_work", "snapshots", "verdicts"])
def test_a_scan_goes_through_no_link_in_its_folder(tmp_path, victim, name):
    """The lock, the parts and the notes were opened by path: a link led out of the folder."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "old.parquet").write_text("kept")
    (outside / "old.json").write_text("kept")
    folder = tmp_path / "out"
    folder.mkdir()
    is_file = name in (".lock", "manifest.json")
    (folder / name).symlink_to(victim if is_file else outside)
    if name == "manifest.json":
        scan(tmp_path, folder)
        assert not (folder / name).is_symlink()
    else:
        with pytest.raises(XfastError):
            scan(tmp_path, folder)
    assert victim.read_text() == "as it was"
    assert sorted(os.listdir(outside)) == ["old.json", "old.parquet"]


@pytest.mark.parametrize("bits", [0o755, 0o2777])
def test_what_a_scan_makes_nobody_else_can_write(tmp_path, bits):
    tmp_path.chmod(bits)
    before = os.umask(0)
    try:
        scan(tmp_path, tmp_path / "new" / "out")
    finally:
        os.umask(before)
    for path in [tmp_path / "new", *(tmp_path / "new").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & ~0o755 == 0, path


def test_a_folder_that_everybody_can_write_is_no_place_for_a_scan(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    folder.chmod(0o1777)
    with pytest.raises(XfastError, match="others can write it"):
        scan(tmp_path, folder)


@AS_ROOT
def test_a_folder_that_another_group_can_write_is_no_place_for_a_scan(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    folder.chmod(0o2775)
    os.chown(folder, 0, TENANT)
    with pytest.raises(XfastError, match=r"others can write it .*group 4321"):
        scan(tmp_path, folder)
    os.chown(folder, 0, os.getegid())
    scan(tmp_path, folder)


@AS_ROOT
def test_a_tenants_folder_is_no_place_for_a_scan(tmp_path):
    """Who made it can put chunks there that would be taken for finished ones."""
    folder = tmp_path / "out"
    folder.mkdir()
    os.chown(folder, TENANT, TENANT)
    with pytest.raises(XfastError, match="user 4321"):
        scan(tmp_path, folder)
