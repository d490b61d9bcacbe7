"""What a walk finds in a directory is opened through no link; what is named is followed."""

import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest

from xfast import snapshots
from xfast.cli.main import main
from xfast.errors import FormatError, XfastError
from xfast.snapshots.bytes.entry import Entry, found, is_folder
from xfast.snapshots.bytes.source import Source

DATA = Path(__file__).parents[1] / "data"
AREA = DATA / "raw" / "kvm618-guestxcr0_e7-bve7.xsave"


@pytest.fixture
def tree(tmp_path):
    """Return a directory with two areas, one of them in a directory below, and a secret outside."""
    secret = tmp_path / "secret"
    secret.mkdir()
    shutil.copy(AREA, secret / "one.xsave")
    top = tmp_path / "top"
    (top / "below").mkdir(parents=True)
    shutil.copy(AREA, top / "a.xsave")
    shutil.copy(AREA, top / "below" / "b.xsave")
    return top


def test_links_in_a_directory_are_passed_over_and_told(tree):
    (tree / "file.xsave").symlink_to(tree.parent / "secret" / "one.xsave")
    (tree / "folder").symlink_to(tree.parent / "secret")
    (tree / "circle").symlink_to(tree)
    (tree / "broken").symlink_to("nowhere")
    links: list[str] = []
    paths = [os.path.relpath(path, tree) for path in snapshots.walk([tree], links)]
    assert paths == ["a.xsave", "below/b.xsave"]
    assert sorted(os.path.basename(link) for link in links) == [
        "broken",
        "circle",
        "file.xsave",
        "folder",
    ]


def test_the_command_line_says_how_many(tree, capsys):
    (tree / "circle").symlink_to(tree)
    assert main(["show", str(tree)]) == 0
    told = capsys.readouterr()
    assert "1 symbolic link in it: none is followed" in told.err
    assert told.out.count("vCPU 0") == 2


def test_what_is_named_is_followed(tree):
    (tree.parent / "named").symlink_to(tree)
    (tree.parent / "one").symlink_to(tree / "a.xsave")
    assert len(list(snapshots.walk([tree.parent / "named"]))) == 2
    for path in snapshots.walk([tree.parent / "named", tree.parent / "one"]):
        assert snapshots.read(path)


def test_a_file_that_becomes_a_link_after_it_was_found_is_not_followed(tree):
    path = next(snapshots.walk([tree]))
    os.unlink(path)
    os.symlink(tree.parent / "secret" / "one.xsave", path)
    with pytest.raises(FormatError, match=r"a\.xsave: expected .*, got a symbolic link"):
        snapshots.read(path)


@pytest.mark.parametrize("name", ["below", "."])
def test_a_directory_that_becomes_a_link_after_it_was_found_is_not_followed(tree, name):
    *_, path = snapshots.walk([tree])
    shutil.move(tree / "below", tree.parent / "gone")
    (tree.parent / "secret" / "b.xsave").write_bytes(AREA.read_bytes())
    (tree / "below").symlink_to(tree.parent / "secret")
    with pytest.raises(XfastError, match="can't be opened: Not a directory"):
        snapshots.read(path)


def test_the_images_of_a_checkpoint_may_be_no_links(tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(DATA / "criu" / "criu42-regs64s-3thr", folder)
    name = min(folder.glob("core-*.img"))
    shutil.move(name, tmp_path / "elsewhere")
    name.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match="got a symbolic link, which is followed only where"):
        snapshots.read(folder)


def test_a_companion_of_a_found_area_may_be_no_link(tree):
    shutil.copy(DATA / "raw" / "kvm618-guestxcr0_e7.xcrs", tree.parent / "secret" / "a.xcrs")
    (tree / "a.xcrs").symlink_to(tree.parent / "secret" / "a.xcrs")
    path = next(snapshots.walk([tree]))
    with pytest.raises(FormatError, match=r"a\.xcrs: expected .*, got a symbolic link"):
        snapshots.read(path)
    assert snapshots.read(str(path))[0].vcpus[0].xcr0 == 0xE7  # named: followed


def test_a_file_that_vanishes_is_one_line(tree):
    path = next(snapshots.walk([tree]))
    os.unlink(path)
    with pytest.raises(XfastError, match="can't be opened: No such file"):
        snapshots.read(path)


def test_special_files_are_not_opened(tree):
    os.mkfifo(tree / "a.fifo")
    path = next(path for path in snapshots.walk([tree]) if path.endswith("fifo"))
    with pytest.raises(FormatError, match=r"expected a file .*, got .*pipe or socket"):
        snapshots.read(path)


def test_directories_nested_1900_deep_are_walked(tmp_path):
    place = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1900):
        os.mkdir("d", dir_fd=place)
        below = os.open("d", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = below
    fd = os.open("x.xsave", os.O_CREAT | os.O_WRONLY, dir_fd=place)
    os.write(fd, AREA.read_bytes())
    os.close(fd)
    os.close(place)
    try:
        (path,) = snapshots.walk([tmp_path])
        assert snapshots.read(path)[0].vcpus
    finally:  # the clean-up of temporary folders calls itself for every level
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)


def test_a_name_that_is_not_utf_8_is_walked_and_read(tree):
    shutil.copy(AREA, os.fsencode(tree) + b"/\xff\xfe.xsave")
    (path,) = (path for path in snapshots.walk([tree]) if "\udcff" in path)
    assert snapshots.read(path)[0].path == path


def test_an_entry_is_a_path_that_travels(tree):
    entry = found(found(str(tree), "below"), "b.xsave")
    assert entry == str(tree / "below" / "b.xsave")
    again = pickle.loads(pickle.dumps(entry))
    assert (again, again.root, type(again)) == (entry, str(tree), Entry)
    assert is_folder(found(str(tree), "below"))
    assert not is_folder(entry)
    with Source.open(entry) as source:
        assert source.size == 4096


@pytest.mark.parametrize("suffix", [".xcrs", ".cpuid2"])
def test_a_companion_that_leads_elsewhere_shows_nothing_of_what_is_there(tree, suffix):
    """Its first four bytes were shown as the number that they should be."""
    secret = tree.parent / "secret" / "text"
    secret.write_bytes(b"root:$6$salt" * 50)
    companion = (tree / "a.xsave").with_suffix(suffix)
    companion.symlink_to(secret)
    with pytest.raises(FormatError) as caught:
        snapshots.read(tree / "a.xsave")
    assert f"{int.from_bytes(b'root', 'little')}" not in str(caught.value)
    assert "root" not in str(caught.value).removeprefix(str(companion))
