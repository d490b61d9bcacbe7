"""What a reader costs at most: the table of bounds, walked with files that want more.

Time is CPU time beside that of a fixed piece of Python (`effort`), growth is counted in lines of
Python and bytes read, memory is that of a process of its own: none of it depends on the machine.
"""

import gzip
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from bombs import BOMBS, criu_threads, elf_states, elf_threads, qemu_vcpus, raw_areas
from effort import at_most
from qemu_files import with_pages
from snapshot_files import BUILDERS, area, elf_core, elf_notes, sealed

from xfast import snapshots
from xfast.cli.main import main
from xfast.errors import XfastError
from xfast.hosts import resolve
from xfast.repair.filter import Filter, Wanted
from xfast.snapshots import FORMATS, state_plans
from xfast.snapshots.bounds import BOUNDS, value_of
from xfast.snapshots.bytes.source import EXPAND_LEAST, EXPAND_RATIO, Source
from xfast.snapshots.qemu import plans
from xfast.snapshots.qemu.forward import from_pipe

ROOT = Path(__file__).parents[2]
SECONDS = 1
MEBIBYTES = 256
SIZE = 1 << 20
UNPACKED = 8 << 20
"""Of a file that packs to some kilobytes; docs/security.md has what 64 MiB take."""
SMALL = 20_000


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
    for _ in range(2):
        whole = inflated(name, data, rng)
        (tmp_path / target).write_bytes(gzip.compress(whole, 1) if packed else whole)
        with at_most(SECONDS):
            try:
                snapshots.read(tmp_path if len(files) > 1 else tmp_path / target, format=name)
            except XfastError as problem:
                assert "\n" not in str(problem)  # noqa: PT017


@pytest.mark.parametrize(
    "name", ["qemu-subsection-chains.qemustate", "libvirt-deep.save.gz", "pax-digits.tar"]
)
def test_the_hostile_cases_cost_little(shared, name):
    with at_most(SECONDS), pytest.raises(XfastError) as caught:
        snapshots.read(shared / "cases" / "hostile" / name)
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


READ = """
import json, re, sys
from effort import Clock
from xfast import snapshots
from xfast.errors import XfastError
from xfast.hosts import resolve
from xfast.repair.filter import Filter, Wanted

def peak():
    with open("/proc/self/status") as file:  # ru_maxrss would count the process that forked
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", file.read())[1])

for name in snapshots.FORMATS:
    snapshots.format_named(name)
for path in sys.argv[1:]:
    with Clock() as clock:
        try:
            snapshots.read(path)
        except XfastError as problem:
            assert len(str(problem)) < 1000
    print(json.dumps([path, clock.seconds, peak()]))
"""


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("name", BOMBS)
def test_what_costs_most_takes_a_second_and_256_mebibytes(tmp_path, name, packed):
    """Seen before there were bounds for them: 22 s for 15 KB of pstree.img, 18 s for 5 KB of a Xen
    image's records, 20 s for CRIU's threads, 7 s and 407 MB for headers of `cpu` sections, 6 s for
    segments of an ELF core, 1.8 s for a disk image that names one snapshot 1,024 times.
    """
    paths = []
    for number, bomb in enumerate(BOMBS[name]):
        ((file, data),) = bomb(UNPACKED if packed else SIZE - 20_000).items()
        if packed:
            data = gzip.compress(data, 1)
            if len(data) > SIZE:
                continue
        assert len(data) <= SIZE
        paths.append(tmp_path / f"{number}-{file}")
        paths[-1].write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", READ, *paths],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'helpers'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = list(map(json.loads, done.stdout.splitlines()))
    assert all(seconds < SECONDS for _, seconds, _ in found), "\n".join(map(str, found))
    assert all(kilobytes < MEBIBYTES << 10 for *_, kilobytes in found), found


@pytest.mark.parametrize("bomb", BOMBS["qemu"])
def test_what_comes_through_a_pipe_costs_as_little(bomb):
    """A pipe is read once and has no size to compare with; the filter holds the devices back."""
    ((_, data),) = bomb(SIZE - 20_000).items()
    data = with_pages(data)
    with at_most(SECONDS):
        try:
            with from_pipe("-", io.BytesIO(data), SIZE) as source:
                snapshots.format_named("qemu").read(source)
        except XfastError as problem:
            assert "\n" not in str(problem)  # noqa: PT017
    stream, out = os.memfd_create("stream"), os.memfd_create("out")
    os.write(stream, data)
    os.lseek(stream, 0, os.SEEK_SET)
    try:
        with at_most(SECONDS):
            Filter(stream, out, Wanted(resolve("intel-haswell@6.1"))).run()
    except XfastError as problem:
        assert "\n" not in str(problem)  # noqa: PT017
    finally:
        os.close(stream)
        os.close(out)


def effort_of(path):
    """Return the lines of Python and the bytes that reading a file takes."""
    plans.forget()
    state_plans.forget()
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        lines += event == "line"
        return trace

    source = Source.open(path)
    old = sys.gettrace()
    sys.settrace(trace)
    try:
        snapshots.read(source)
    except XfastError:
        pass
    finally:
        sys.settrace(old)
    return lines, source.bytes_read


@pytest.mark.parametrize("bomb", [bomb for bombs in BOMBS.values() for bomb in bombs])
def test_twice_the_size_is_twice_the_work(tmp_path, bomb):
    efforts, sizes = [], []
    # first: what is done once; none is seen twice; more areas than are looked at one by one
    small = 4 * SMALL if bomb is raw_areas else SMALL
    for size in (small // 2, small, 2 * small):
        ((file, data),) = bomb(size).items()
        (tmp_path / file).write_bytes(data)
        efforts.append(effort_of(tmp_path / file))
        sizes.append(len(data))
    grown = max(2, sizes[2] / sizes[1])
    for one, two in zip(efforts[1], efforts[2], strict=True):
        assert two <= 1.15 * grown * one + 1000, efforts


@pytest.mark.parametrize("size", [1, 100])
def test_what_is_packed_is_expanded_as_far_as_it_can_be_somebodys(tmp_path, size):
    """64 MiB, or 64 times the file: the rest is nobody's, until --expand-limit says so."""
    noise = random.Random(7).randbytes(size << 14)
    path = tmp_path / "packed.gz"
    path.write_bytes(gzip.compress(noise + bytes(EXPAND_LEAST), 1))
    most = max(EXPAND_LEAST, EXPAND_RATIO * path.stat().st_size)
    if most > EXPAND_LEAST + len(noise):
        Source.open(path).close()
        return
    with pytest.raises(XfastError, match=f"at most {most} bytes, got more: .*--expand-limit"):
        Source.open(path)
    Source.open(path, expand_limit=2 * EXPAND_LEAST).close()


VERBS = (
    "show",
    "show --registers",
    "show --json",
    "check --host intel-nehalem@6.12 --all -v",
    "check --host intel-nehalem@6.12 --format csv",
    "check --host intel-nehalem@6.12 --format json",
    "diff {}",
    "fix --host intel-nehalem@6.12 --dry-run",
)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("bomb", [elf_states, elf_threads, criu_threads, qemu_vcpus, raw_areas])
def test_what_is_printed_of_a_mebibyte_of_vcpus_costs_little(tmp_path, capsys, bomb, verb):
    """5 s once for the registers of 850 threads, 3 s for their comparison, 4 s for the hosts that
    would do for 1,100 threads in as many states.

    A second is about half a second of today's machines; what is read and printed may take two.
    """
    ((file, data),) = bomb(SIZE - 20_000).items()
    path, other = tmp_path / file, tmp_path / "other"
    path.write_bytes(data)
    other.write_bytes(elf_core(b"".join(elf_notes(7, area(3))) * 650))
    words = [word.format(other) for word in verb.split()]
    with at_most(2 * SECONDS):
        assert main([*words[:1], str(path), *words[1:]]) in (0, 1)
    assert capsys.readouterr().out
