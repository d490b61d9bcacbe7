"""``xfast bench fleet``: what is around the engine, against what cannot be left out.

Every number is a ratio of times taken in one process, what is measured between two runs of its
denominator, and every answer is checked. Times are those of the thread where one process works, of
the wall where several do. Inputs are files that were read before, so no disk is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from xfast.bench.engine import INTEL, fill, machine
from xfast.hosts.catalogue import catalogue
from xfast.hosts.model import Host
from xfast.judge.judgement import check, forget
from xfast.snapshots import raw
from xfast.snapshots.model import Snapshot, Vcpu
from xfast.snapshots.registry import read
from xfast.xsave.area import classify

SOURCE = "the aims of this project; each is a multiple of what no reader can do without"


@dataclass(frozen=True)
class Row:
    """One result. `ratio` is what was measured as a multiple of `against`, less is better.

    Where `unit` is not empty it is no multiple but a time or size, in that unit.
    """

    what: str
    against: str
    target: float
    ratio: float
    low: float
    high: float
    each: float
    """Microseconds for one input or call; 0 where that says nothing."""
    unit: str = ""
    more: bool = False
    """Whether more is better."""

    @property
    def reached(self) -> bool:
        """Whether the median is as good as the target."""
        return self.ratio >= self.target if self.more else self.ratio <= self.target


def print_row(row: Row) -> None:
    """Print one result for people."""
    sign = "at least" if row.more else "at most"
    print(
        f"{row.what:58} {row.ratio:9.2f} {row.unit or 'x ' + row.against}  ({sign} "
        f"{row.target:g}){'' if row.reached else '  missed'}",
        flush=True,
    )


def tell(name: str, results: Iterable[Row], source: str, as_json: bool) -> int:
    """Print results as they come, or all as JSON; return 1 if a target is missed."""
    rows = []
    if not as_json:
        print(f"targets: {source}", file=sys.stderr)
    for row in results:
        rows.append(row)
        if not as_json:
            print_row(row)
    if as_json:
        found = [asdict(row) | {"reached": row.reached} for row in rows]
        answer = {"schema": "xfast/1", "machine": machine(), "targets": source, name: found}
        print(json.dumps(answer, indent=1))
    return 0 if all(row.reached for row in rows) else 1


def bracket(
    what: str, against: str, target: float, floor: Callable[[], object],
    candidate: Callable[[], object], n: int, samples: int,
) -> Row:  # fmt: skip
    """Time `candidate` between two runs of its denominator; both do `n` inputs."""

    def seconds(call: Callable[[], object]) -> float:
        start = time.thread_time()
        call()
        return time.thread_time() - start

    floor(), candidate()
    ratios, times = [], []
    for _ in range(samples):
        before, middle, after = seconds(floor), seconds(candidate), seconds(floor)
        ratios.append(2 * middle / (before + after))
        times.append(middle / n * 1e6)
    low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    return Row(what, against, target, median, low, high, statistics.median(times))


def alike(folder: str, data: bytes, count: int, name: str) -> list[str]:
    """Write `count` files of equal content, and bring them into the page cache."""
    paths = [os.path.join(folder, f"{i:05}-{name}") for i in range(count)]
    for path in paths:
        with open(path, "wb") as file:
            file.write(data)
    return paths


def _hosts(count: int) -> list[Host]:
    """Return hosts that differ, or are at least called differently."""
    known = list(catalogue().values())
    return [known[i % len(known)].replace(name=f"host-{i}") for i in range(count)]


def _answers(snapshot: Snapshot, hosts: Sequence[Host]) -> list[tuple[Any, ...]]:
    return [(v.host, v.verdict, v.fixable, v.findings) for v in check(snapshot, hosts)]


def _judge(paths: Sequence[str], hosts: Sequence[Host]) -> None:
    for path in paths:
        for snapshot in read(path):
            check(snapshot, hosts)


def _require_equal(got: object, expected: object, what: str) -> None:
    if got != expected:
        raise AssertionError(f"bench fleet: {what}: expected the first answer, got another")


def _whole(paths: Sequence[str], size: int) -> None:
    """Open, read and close files of `size` bytes."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.read(fd, size)
        os.close(fd)


def _needed(snapshot: Snapshot) -> int:
    """Return where what no reader of a stream can do without begins: the vCPUs, then the rest."""
    return min(place for vcpu in snapshot.vcpus for place, _ in vcpu.where.values())


def stream_rows(folder: str, stream: bytes, samples: int) -> Iterator[Row]:
    """Yield what a QEMU stream costs whose description was seen."""
    paths = alike(folder, stream, 200, "stream")
    (first,) = read(paths[0])
    tail = stream[_needed(first) :]

    def floor() -> None:
        for path in paths:
            fd = os.open(path, os.O_RDONLY)
            size = os.fstat(fd).st_size
            found = os.pread(fd, len(tail), size - len(tail))
            os.close(fd)
            _require_equal(found, tail, "tail")

    hosts = _hosts(20)
    _require_equal(_answers(read(paths[-1])[0], hosts), _answers(first, hosts), "stream")
    yield bracket(
        "QEMU stream, 20 hosts", "open, fstat, pread of the tail, compare, close", 3.0, floor,
        lambda: _judge(paths, hosts), len(paths), samples,
    )  # fmt: skip
    one = _hosts(1)
    yield bracket(
        "QEMU stream, 100 hosts", "the same for one host", 1.2, lambda: _judge(paths, one),
        lambda: _judge(paths, _hosts_100), len(paths), samples,
    )  # fmt: skip


_hosts_100 = _hosts(100)


def file_rows(
    folder: str, samples_of: dict[str, bytes], companions: dict[str, bytes], samples: int
) -> Iterator[Row]:
    """Yield what small files cost that hold one vCPU each.

    `companions` are files by the end of their name that lie beside a raw area. No reader can do
    without them, so that they are read on both sides.
    """
    for what, data in samples_of.items():
        yield _file_row(folder, what, {"": data}, samples)
    if companions and "raw area" in samples_of:
        files = {"": samples_of["raw area"]} | companions
        yield _file_row(folder, "raw area and its companions", files, samples)


def _file_row(folder: str, what: str, files: dict[str, bytes], samples: int) -> Row:
    """Return what snapshots cost that are `files`, each by the end of its name."""
    hosts = _hosts(20)
    name = what.replace(" ", "-").lower()
    sets = [alike(folder, data, 200, name + end) for end, data in files.items()]
    paths = sets[0]
    expected = _answers(read(paths[0])[0], hosts)
    _require_equal(_answers(read(paths[-1])[0], hosts), expected, what)

    def floor() -> None:
        for some, data in zip(sets, files.values(), strict=True):
            _whole(some, len(data))

    return bracket(
        f"{what}, 20 hosts", f"open, read, close{' of all' * (len(sets) > 1)}", 3.0, floor,
        partial(_judge, paths, hosts), len(paths), samples,
    )  # fmt: skip


def stack_rows(folder: str, count: int, samples: int) -> Iterator[Row]:
    """Yield what a stack of areas costs, reading and hosts included."""
    path = os.path.join(folder, "stack.npy")
    areas = np.lib.format.open_memmap(path, "w+", np.uint8, (count, 4096))
    fill(areas[: min(count, 16384)], INTEL, "mixed")
    head = areas[:16384]
    for part in (head[:, :512], head[:, 576:]):
        part[part == 0xA5] = 0
    head[:, :2], head[:, 2:24] = (0x7F, 3), 0
    for start in range(16384, count, 16384):
        areas[start : start + 16384] = areas[: min(16384, count - start)]
    del areas, head
    hosts = _hosts(20)
    rows = np.load(path, mmap_mode="r")

    def mapped() -> None:
        classify(np.load(path, mmap_mode="r"), INTEL)

    found = read(path, layout=INTEL)[0]
    if sum(one.alike for one in found.vcpus.classes) != count:  # type: ignore[attr-defined]
        raise AssertionError(f"bench fleet: stack: expected {count} areas in all classes")
    floors: tuple[tuple[str, Callable[[], object]], ...] = (
        ("one classify of the array, its pages mapped before", lambda: classify(rows, INTEL)),
        ("mapping the file and one classify", mapped),
    )
    for what, layout in (("layout given", INTEL), ("layout inferred", None)):
        for against, floor in floors:
            yield bracket(
                f"stack of {count:,} areas, 20 hosts, {what}", against, 1.5, floor,
                lambda layout=layout: [check(one, hosts) for one in read(path, layout=layout)],  # type: ignore[misc]
                count, samples,
            )  # fmt: skip
    more = _stack_memory(path)
    yield Row(
        f"memory for a stack of {count:,} areas, beside the page cache", "", 150.0, more, more,
        more, 0, "MiB",
    )  # fmt: skip


_STACK = """
import sys, threading
from xfast.hosts.catalogue import catalogue
from xfast.judge.judgement import check
from xfast.snapshots.registry import read

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

most = [anonymous()]
over = threading.Event()
def watch():
    while not over.wait(0.002):
        most.append(anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
check(read(sys.argv[1])[0], list(catalogue().values())[:20])
over.set()
watcher.join()
print(max(most))
"""


def _stack_memory(path: str) -> float:
    """Return the most memory of its own (MiB) of a process that reads and judges a stack."""
    done = subprocess.run(
        [sys.executable, "-c", _STACK, path], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def call_rows(samples: int) -> Iterator[Row]:
    """Yield what a pure call costs: `xfast.check` of a snapshot for 100 hosts."""
    areas = np.zeros((samples * 8, 4096), np.uint8)
    areas[:, 512] = 7
    areas[:, :2] = 0x7F, 3
    areas[:, 24:32] = np.frombuffer(struct.pack("<2I", 0x1F80, 0xFFFF), np.uint8)
    new: list[float] = []
    seen: list[float] = []
    check(Snapshot("", "raw", "vm", "kvm", [Vcpu(0, areas[0], INTEL, "given")]), _hosts_100)
    for i, area in enumerate(areas):
        mask = (0x7, 0xE7, 0x207, 0x2E7)[i % 4]
        one = Vcpu(0, area, INTEL, "given", xcr0=mask, guest_mask=mask, pkru_enabled=bool(i & 4))
        snapshot = Snapshot(f"{i}", "raw", "vm", "kvm", [one])
        forget()
        check(Snapshot("", "raw", "vm", "kvm", [Vcpu(0, area, INTEL, "given")]), _hosts_100)
        for times in (new, seen):
            start = time.perf_counter()
            check(snapshot, _hosts_100)
            times.append((time.perf_counter() - start) * 1e6)
    for what, target, times in (("seen", 100.0, seen), ("new", 1500.0, new)):
        low, median, high = np.quantile(times, [0.25, 0.5, 0.75]).tolist()
        yield Row(
            f"xfast.check, 100 hosts, class {what}", "", target, median, low, high, median, "us"
        )


def scan_rows(folder: str, stream: bytes, count: int) -> Iterator[Row]:
    """Yield what two processes give, and the memory of a scan of many files."""
    several = os.path.join(folder, "several")
    os.mkdir(several)
    paths = alike(several, stream, 16, "stream")
    for i in range(len(paths), count):
        os.link(paths[i % 16], os.path.join(several, f"{i:07}"))
    first, peak = _scan(several, os.path.join(folder, "one"), 1)
    second, _ = _scan(several, os.path.join(folder, "two"), 2)
    ratio = first / second
    yield Row(
        f"scan of {count:,} QEMU streams, -j 2", "-j 1", 1.8, ratio, ratio, ratio,
        second / count * 1e6, more=True,
    )  # fmt: skip
    small = os.path.join(folder, "few")
    os.mkdir(small)
    for i in range(count // 2):
        os.link(paths[i % 16], os.path.join(small, f"{i:07}"))
    _, less = _scan(small, os.path.join(folder, "three"), 1)
    slope = max(0.0, peak - less) / (count - count // 2)
    million = peak + slope * max(0, 1_000_000 - count)
    yield Row(
        f"memory of a scan of 10^6 files, by the slope of {count // 2:,} to {count:,}", "", 300.0,
        million, less, peak, 0, "MiB",
    )  # fmt: skip


_SCAN = """
import sys, time
from xfast.fleet.run import scan
from xfast.hosts.catalogue import catalogue
hosts = list(catalogue().values())[:20]
start = time.perf_counter()
done = scan([sys.argv[1]], hosts, sys.argv[2], jobs=int(sys.argv[3]))
seconds = time.perf_counter() - start
assert not done["failed"], done
with open("/proc/self/status") as status:  # getrusage would count the parent's memory too
    most = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(seconds, most / 1024)
"""


def _scan(folder: str, results: str, jobs: int) -> tuple[float, float]:
    """Scan a folder in a process of its own: seconds, and the most memory it had (MiB)."""
    done = subprocess.run(
        [sys.executable, "-c", _SCAN, folder, results, str(jobs)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    seconds, peak = map(float, done.stdout.split())
    return seconds, peak


def run_all(
    inputs: dict[str, bytes],
    samples: int = 15,
    areas: int = 65_536,
    streams: int = 100_000,
    companions: dict[str, bytes] | None = None,
) -> Iterator[Row]:
    """Yield every result.

    Parameters
    ----------
    inputs : dict
        The bytes of one file of each sort; ``QEMU stream`` and others by what they are called.
    samples : int
        Of each result; the median is reported.
    areas, streams : int
        How many are in a stack, and in a scan.
    companions : dict, optional
        What lies beside the raw area, by the end of the file's name.
    """
    others = dict(inputs)
    stream = others.pop("QEMU stream", None)
    with tempfile.TemporaryDirectory(prefix="xfast-bench-") as folder:
        if stream:
            yield from stream_rows(folder, stream, samples)
        yield from file_rows(folder, others, companions or {}, samples)
        yield from stack_rows(folder, areas, max(5, samples // 3))
        yield from call_rows(samples)
        if stream and streams:
            yield from scan_rows(folder, stream, streams)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``xfast bench fleet``."""
    parser.add_argument(
        "inputs", nargs="+", metavar="FILE",
        help="one file of each sort to measure: a QEMU stream, a raw area, a Firecracker state ...",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--samples", type=int, default=15, help="of each result (default: 15)")
    parser.add_argument("--areas", type=int, default=65_536, help="in a stack (default: 65,536)")
    parser.add_argument(
        "--streams", type=int, default=100_000, help="in a scan (default: 100,000; 0: no)"
    )


NAMES = {
    "qemu": "QEMU stream", "raw": "raw area", "firecracker": "Firecracker vCPU",
    "cloud-hypervisor": "Cloud Hypervisor vCPU",
}  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print the results as they come; return 1 if a target is missed."""
    inputs, companions = {}, {}
    for path in args.inputs:
        (snapshot,) = read(path)
        inputs[NAMES.get(snapshot.format, snapshot.format)] = Path(path).read_bytes()
        if snapshot.format == "raw":
            companions = {
                end: found[0].read_bytes()
                for end in raw.COMPANIONS
                if (found := [p for p in map(Path, raw.companion_paths(path, end)) if p.is_file()])
            }
    samples = max(args.samples, 3)
    rows = run_all(inputs, samples, args.areas, args.streams, companions)
    return tell("fleet", rows, SOURCE, args.json)
