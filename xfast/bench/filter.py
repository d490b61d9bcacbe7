"""``xfast bench filter``: the filter in a pipe, against `cat` in the same pipe.

Guest memory that is full of random bytes is put into a real stream and comes from the page cache.
`cat` runs before and after each run of the filter, which has started before the clock does.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np

from xfast.bench.fleet import Row, tell
from xfast.errors import XfastError
from xfast.hosts import resolve
from xfast.hosts.model import Host
from xfast.repair.filter import Filter, Wanted, warm_up
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.qemu.forward import walk
from xfast.snapshots.registry import read

SOURCE = "the aims of this project: 0.8 of cat, 20 ms of downtime, 64 MiB of memory"
PAGE = 4096
SAME_BLOCK, FULL_PAGE, END_OF_PAGES = 0x20, 0x08, 0x10
PATTERN = 1024
"""So many different pages are repeated."""


def with_pages(stream: bytes, devices: int, count: int, file: BinaryIO) -> None:
    """Write a stream with another part of guest memory in front of its devices.

    Raises
    ------
    XfastError
        If it has no memory to add to.
    """
    ram = re.search(b"\x01(.{4})\x03ram\0{7}\x04", stream[:devices], re.DOTALL)
    if not ram:
        raise XfastError("bench filter: expected a stream with guest memory, got none")
    pages = np.zeros((PATTERN, 8 + PAGE), np.uint8)
    pages[:, 7] = FULL_PAGE | SAME_BLOCK
    pages[:, 8:] = np.frombuffer(os.urandom(PATTERN * PAGE), np.uint8).reshape(PATTERN, PAGE)
    first = FULL_PAGE.to_bytes(8, "big") + b"\x06pc.ram" + pages[0, 8:].tobytes()
    file.write(stream[:devices] + b"\2" + ram[1] + first)
    for _ in range(max(1, count // PATTERN)):
        file.write(pages.tobytes())
    file.write(END_OF_PAGES.to_bytes(8, "big") + b"\x7e" + ram[1] + stream[devices:])
    file.flush()


def _forked(call: Callable[[], object], *unused: int) -> int:
    """Run `call` in a process of its own, without what it does not use; return its number."""
    number = os.fork()
    if number:
        return number
    try:
        for fd in unused:
            os.close(fd)
        call()
    except BaseException as problem:
        print(f"bench filter: {problem}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def _await(number: int) -> resource.struct_rusage:
    _, status, usage = os.wait4(number, 0)
    if status:
        raise XfastError(f"bench filter: expected exit code 0, got {status >> 8 or status}")
    return usage


def seconds(path: str, wanted: Wanted | None) -> tuple[float, float]:
    """Return how long ``cat FILE | filter > /dev/null`` takes, and the filter's peak memory (MiB).

    Without `wanted` it is another `cat`.
    """
    source, write = os.pipe()
    with open(os.devnull, "wb") as null, open(path, "rb") as file:

        def cat() -> None:
            os.dup2(source, 0)
            os.dup2(null.fileno(), 1)
            os.execlp("cat", "cat")

        def through() -> None:
            assert wanted
            Filter(source, null.fileno(), wanted).run()

        number = _forked(through if wanted else cat, write)
        os.close(source)
        time.sleep(0.05)  # both are started, and wait for their first byte
        start = time.monotonic()
        writer = subprocess.Popen(["cat"], stdin=file, stdout=write)
        os.close(write)
        try:
            usage = _await(number)
            taken = time.monotonic() - start
        finally:
            writer.wait()
    return taken, usage.ru_maxrss / 1024


def delays(stream: bytes, devices: int, wanted: Wanted | None) -> tuple[float, float]:
    """Return the time from a stream's last byte in to its last byte out, and from its devices in.

    Without `wanted` nothing stands between.
    """
    source, write = os.pipe()
    receive, target = os.pipe() if wanted else (source, -1)
    number = 0
    if wanted:
        number = _forked(lambda: Filter(source, target, wanted).run(), write, receive)
        os.close(source)
        os.close(target)
    times: list[float] = []

    def feed() -> None:
        with open(write, "wb", 0) as file:
            _write(file, stream[:devices])
            time.sleep(0.1)  # memory is through
            times.append(time.monotonic())
            _write(file, stream[devices:-1])
            times.append(time.monotonic())
            _write(file, stream[-1:])

    feeder = threading.Thread(target=feed)
    feeder.start()
    passed = 0
    last = 0.0
    while piece := os.read(receive, 1 << 20):
        passed += len(piece)
        last = time.monotonic()
    feeder.join()
    os.close(receive)
    if number:
        _await(number)
    if passed != len(stream):
        raise XfastError(f"bench filter: expected {len(stream)} bytes out, got {passed}")
    return (last - times[1]) * 1e3, (last - times[0]) * 1e3


def _write(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _row(
    what: str, against: str, target: float, values: list[float], unit: str = "", more: bool = False
) -> Row:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return Row(what, against, target, median, low, high, 0, unit, more)


def run_all(path: str, host: Host, samples: int, size: int) -> Iterator[Row]:
    """Yield every result.

    Parameters
    ----------
    path : str
        A QEMU stream that `host` takes.
    host : Host
    samples : int
    size : int
        Bytes of guest memory.
    """
    (snapshot,) = read(path)
    with Source.open(path) as source:
        _, devices = walk(source, 0)
        stream = source.read(0, source.size)
    wanted = Wanted(host)
    warm_up(wanted)
    with tempfile.TemporaryDirectory(prefix="xfast-bench-") as folder:
        large = os.path.join(folder, "stream")
        with open(large, "wb") as file:
            with_pages(stream, devices, size // PAGE, file)
        ratios, peaks = [], []
        seconds(large, None)
        for _ in range(samples):
            before, (middle, peak), after = (
                seconds(large, None)[0], seconds(large, wanted), seconds(large, None)[0]
            )  # fmt: skip
            ratios.append((before + after) / 2 / middle)
            peaks.append(peak)
    yield _row(
        f"a stream of {size / 1e9:.1f} GB through the filter", "cat in the same pipe", 0.8, ratios,
        more=True,
    )  # fmt: skip
    yield _row("its peak of memory", "", 64, peaks, "MiB")
    found = [delays(stream, devices, wanted) for _ in range(3 * samples)]
    bare = [delays(stream, devices, None)[1] for _ in range(3 * samples)]
    cpus = f"{len(snapshot.vcpus)} vCPUs"
    yield _row(f"last byte in to last byte out, {cpus}", "", 20, [one[0] for one in found], "ms")
    more_time = [one[1] - without for one, without in zip(found, bare, strict=True)]
    yield _row(f"devices in to last byte out, {cpus}, more than bare", "", 20, more_time, "ms")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``xfast bench filter``."""
    parser.add_argument("stream", metavar="STREAM", help="a QEMU stream, which HOST takes")
    parser.add_argument(
        "--host", default="this", metavar="HOST[@KERNEL]", help="the host (default: this machine)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--samples", type=int, default=7, help="of each result (default: 7)")
    parser.add_argument(
        "--memory", type=int, default=1500, metavar="MB", help="of the guest (default: 1500)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the results as they come; return 1 if a target is missed."""
    size = max(args.memory, 16) * 1_000_000
    rows = run_all(args.stream, resolve(args.host), max(args.samples, 3), size)
    return tell("filter", rows, SOURCE, args.json)
