"""What a reader costs at most: the table of bounds, walked with files that want more."""

import gzip
import random
import time

import pytest
from snapshot_files import BUILDERS, sealed

from xfast import snapshots
from xfast.errors import XfastError
from xfast.snapshots import FORMATS
from xfast.snapshots.bounds import BOUNDS, value_of

SECONDS = 10
"""Of CPU, ten times what a file of 1 MiB may take: this is no benchmark."""
SIZE = 1 << 20


def test_every_format_states_its_bound():
    assert set(BOUNDS) == set(FORMATS)
    for bound in BOUNDS.values():
        assert all(value_of(name) > 0 for name in bound if name)


def inflated(name, data, rng):
    """Return a snapshot with a piece of it repeated until it fills 1 MiB."""
    at = rng.randrange(len(data))
    piece = data[at : at + rng.choice((1, 2, 4, 8, 12, 20, 40, 64, 200, 2000))]
    where = rng.choice((at, at + len(piece), len(data)))
    return sealed(name, data[:where] + piece * ((SIZE - len(data)) // len(piece)) + data[where:])


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", BOUNDS)
def test_a_mebibyte_of_anything_costs_little(tmp_path, name, packed):
    rng = random.Random(f"bounds {name}")
    files = BUILDERS[name]()
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    target, data = max(files.items(), key=lambda item: len(item[1]))
    for _ in range(3):
        whole = inflated(name, data, rng)
        (tmp_path / target).write_bytes(gzip.compress(whole, 1) if packed else whole)
        begin = time.process_time()
        try:
            snapshots.read(tmp_path if len(files) > 1 else tmp_path / target, format=name)
        except XfastError as problem:
            assert "\n" not in str(problem)  # noqa: PT017
        assert time.process_time() - begin < SECONDS


@pytest.mark.parametrize(
    "name", ["qemu-subsection-chains.qemustate", "libvirt-deep.save.gz", "pax-digits.tar"]
)
def test_the_hostile_cases_cost_little(shared, name):
    begin = time.process_time()
    with pytest.raises(XfastError) as caught:
        snapshots.read(shared / "cases" / "hostile" / name)
    assert time.process_time() - begin < SECONDS
    assert "\n" not in str(caught.value)


def test_a_chain_of_subsections_is_walked_once(tmp_path, monkeypatch):
    """85 s once: each of thousands of fake headers walked the chain behind it again."""
    from xfast.snapshots.qemu.search import Window

    links = []
    original = Window.subsections

    def counting(self, at):
        for link in original(self, at):
            links.append(link)
            yield link

    monkeypatch.setattr(Window, "subsections", counting)
    link = b"\5\x08cpu/pkru\0\0\0\1" + bytes(4)
    header = b"\4\0\0\0\7\3cpu\0\0\0\1\0\0\0\x0c"
    data = b"QEVM\0\0\0\3" + (header + bytes(1300)) * 200 + link * 4000 + b"\0"
    path = tmp_path / "stream"
    path.write_bytes(data)
    with pytest.raises(XfastError):
        snapshots.read(path, format="qemu")
    assert len(links) < 3 * 4000
