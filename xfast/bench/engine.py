"""``xfast bench engine``: the engine's operations against the limits of this machine.

Every number is a ratio of times taken in one process: limit / candidate / limit on three
different chunks of memory, so that neither finds the other's data in a cache. The limits are a
streaming copy of the bytes written, or reading all bytes; other lines have what Linux, Xen and QEMU
do instead (`xfast.engine.peers`), their answers compared first. Times are those of the thread, so
that what else the machine does counts less. Data are random and not zero where a component is
present, and poison where it is absent.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

from xfast import _core
from xfast.bench.targets import CpuClass, class_of, target_of
from xfast.engine import clock, convert, peers
from xfast.engine import memory as pool
from xfast.xsave import area
from xfast.xsave.features import XCOMP_BV_COMPACTED
from xfast.xsave.layout import Layout, preset
from xfast.xsave.rows import DEFAULT_THREADS, Areas

MIB = 1 << 20
CHUNK = 64 * MIB

MIXES: dict[str, dict[int, float]] = {
    "init": {0: 1},
    "sse": {0x3: 1},
    "avx": {0x7: 1},
    "avx512": {0xE7: 1},
    "full": {0x2E7: 1},
    "amx": {0x602E7: 1},
    "mixed": {
        0: 0.05, 0x203: 0.1, 0x207: 0.35, 0x7: 0.1, 0x2E7: 0.15, 0xE7: 0.1, 0x2A7: 0.1, 0x206: 0.05,
    },
    "64 keys": {bv: 1 / 64 for bv in range(0x300) if not bv & ~0x2E7 and bv & 1},
}  # fmt: skip
"""XSTATE_BV of the areas of a mix, and how often each occurs."""


@dataclass(frozen=True)
class Row:
    """One result; ratios are limit / candidate, so that more is better."""

    op: str
    case: str
    limit: str
    target: float | None
    """None: not known for this class of CPU."""
    ratio: float
    low: float
    high: float
    ns: float
    """Nanoseconds for one area, or one call."""

    @property
    def reached(self) -> bool:
        """Whether the median is as good as the target, if there is one."""
        return self.target is None or self.ratio >= self.target


def fill(rows: Areas, layout: Layout, mix: str, xcomp_bv: int = 0, seed: int = 1) -> None:
    """Make areas of a mix: random bytes (never 0) in what is present, poison elsewhere."""
    rng = np.random.default_rng(seed)
    n, size = rows.shape
    keys = list(MIXES[mix])
    bvs = rng.choice(np.array(keys, "u8"), n, p=list(MIXES[mix].values()))
    pool = rng.integers(1, 256, (97, size), np.uint8)
    where = layout.compacted_offsets(xcomp_bv) if xcomp_bv else None
    for bv in keys:
        chosen = np.flatnonzero(bvs == bv)
        sample = np.full((97, size), 0xA5, np.uint8)
        spans = [(0, 24), (32, 160)] if bv & 1 else []
        spans += [(160, 416)] if bv & 2 else []
        for slot in layout.slots:
            if bv >> slot.nr & 1:
                start = where[slot.nr] if where else slot.offset
                spans.append((start, start + slot.size))
        for start, end in spans:
            sample[:, start:end] = pool[:, start:end]
        sample[:, 24:32] = np.frombuffer(np.array([0x1F80, 0xFFFF], "<u4").tobytes(), np.uint8)
        head = np.array([bv, xcomp_bv, *[0] * 6], "<u8")
        sample[:, 512:576] = np.frombuffer(head.tobytes(), np.uint8)
        for i in range(97):
            rows[chosen[i::97]] = sample[i]


class Memory:
    """Source and target, each cut into chunks; every sample takes the next ones."""

    def __init__(self, size: int) -> None:
        self.size = min(CHUNK, size // 16)
        self.chunks = size // self.size
        self.buffers = [self._block(self.chunks) for _ in range(2)]
        self.scratch = self._block(4)
        self.turn = 0

    def _block(self, chunks: int) -> Areas:
        return np.frombuffer(memoryview(pool.Block(chunks * self.size, True)), np.uint8)

    def chunk(self, which: int, turn: int) -> Areas:
        """Return one chunk of the source (0) or target (1)."""
        return self.buffers[which][turn % self.chunks * self.size :][: self.size]

    def next(self) -> int:
        """Return the number of the next chunk."""
        self.turn += 1
        return self.turn


@dataclass(frozen=True)
class Cold:
    """A case that goes through memory."""

    op: str
    mix: str
    size: int
    out_size: int
    limit: str
    """``copy``: stream `out_size` bytes an area; ``read``: read `size` bytes, ``read2``: twice;
    ``2 lines``: load from the two lines of each area that an audit needs."""
    run: Callable[[Areas, Areas], object]
    layout: Layout
    xcomp_bv: int = 0
    both: bool = False
    """Whether the target holds areas too."""
    refill: bool = False
    """Whether the run changes the source, so that its headers are put back each time."""


INTEL = preset("intel")
KVM_MASK = 0x602E7
COMPACTED = XCOMP_BV_COMPACTED | 0x2E7


@lru_cache
def _get(layout: Layout = INTEL, to: Layout = INTEL, mask: int = KVM_MASK) -> convert.Converter:
    return area.converter(layout, to, mask=mask, mxcsr_mask=0xFFFF, software=0x2E7, kernel=True)


@lru_cache
def _compact() -> convert.Converter:
    return area.converter(INTEL, INTEL, xcomp_bv=0)


@lru_cache
def _set() -> convert.Merger:
    return area.merger(INTEL, INTEL, user_xfeatures=KVM_MASK, mxcsr_mask=0xFFFF)


def _audit(src: Areas, _: Areas) -> object:
    return area.audit(src, KVM_MASK, 0xFFFF)


def _keep(scrub: bool) -> Callable[[Areas, Areas], object]:
    return lambda src, _: area.keep(src, INTEL, 7, scrub=scrub)


def _xinuse(early: bool) -> Callable[[Areas, Areas], object]:
    return lambda src, _: area.xinuse(src, INTEL, early)


def cold_cases() -> Iterator[Cold]:
    """Yield the cases and their targets."""
    get = _get().convert
    compact = _compact().convert
    zen4 = _get(INTEL, preset("amd-zen4")).convert
    merge = _set().merge
    mixes = ("mixed", "full")
    for mix in (*mixes, "64 keys"):
        yield Cold("get_uabi", mix, 4096, 4096, "copy", get, INTEL)
    for size, out_size in ((2496, 2752), (2440, 2696)):
        for mix in mixes:
            yield Cold("get_uabi", mix, size, out_size, "copy", get, INTEL, COMPACTED)
    yield Cold("get_uabi", "amx", 11008, 11008, "copy", get, INTEL)
    for mix in mixes:
        yield Cold("set_uabi", mix, 4096, 4096, "copy", merge, INTEL, both=True)
    for mix in mixes:
        yield Cold("compact", mix, 4096, 4096, "copy", compact, INTEL)
        yield Cold("relayout zen4", mix, 4096, 4096, "copy", zen4, INTEL)
    yield Cold("audit", "mixed", 4096, 0, "read", _audit, INTEL)
    yield Cold("audit", "mixed", 4096, 0, "2 lines", _audit, INTEL)
    for mix in mixes:
        yield Cold("xinuse", mix, 4096, 0, "read", _xinuse(False), INTEL)
        yield Cold("xinuse", mix, 2752, 0, "read", _xinuse(False), INTEL)
    yield Cold("xinuse early", "mixed", 4096, 0, "read", _xinuse(True), INTEL)
    for size in (4096, 2752):
        yield Cold(
            "diff", "full", size, size, "read2", lambda a, b: area.diff(a, b, INTEL), INTEL,
            both=True,
        )  # fmt: skip
    yield Cold("classify", "mixed", 4096, 0, "read", lambda a, _: area.classify(a, INTEL), INTEL)
    yield Cold("group", "mixed", 4096, 0, "read", lambda a, _: area.group(a, INTEL), INTEL)
    for mix in ("full", "mixed"):
        yield Cold("keep scrub", mix, 4096, 4096, "copy", _keep(True), INTEL, refill=True)
    yield Cold("keep header", "full", 4096, 4096, "copy", _keep(False), INTEL, refill=True)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def measure_cold(case: Cold, memory: Memory, samples: int, of: CpuClass | None) -> Row:
    """Time one case against its limit."""
    stride = case.out_size or case.size
    n = memory.size // max(stride, case.size)
    for which, size in ((0, case.size), (1, case.size if case.both else 0)):
        if size:
            first = memory.chunk(which, 0)[: n * size].reshape(n, size)
            fill(first, case.layout, case.mix, case.xcomp_bv if which == 0 else 0)
            for turn in range(1, memory.chunks):
                memory.chunk(which, turn)[: n * size] = first.reshape(-1)
    bits = memory.chunk(0, 0)[: n * case.size].reshape(n, case.size)[:, 512:520].copy()

    def limit() -> float:
        turn = memory.next()
        if case.limit == "copy":
            into = memory.chunk(1, turn)
            if case.both:  # the areas in the target are still needed
                into = memory.scratch[turn % 4 * memory.size :][: memory.size]
            return clock.copy(memory.chunk(0, turn), into[: n * case.out_size], True)
        if case.limit == "2 lines":
            clock.read(memory.chunk(1, turn))  # two lines of each area could stay in a cache
            return clock.touch(memory.chunk(0, turn)[: n * case.size].reshape(n, case.size))
        seconds = clock.read(memory.chunk(0, turn)[: n * case.size])
        if case.limit == "read2":
            seconds += clock.read(memory.chunk(1, turn)[: n * case.size])
        return seconds

    def candidate() -> float:
        turn = memory.next()
        rows = memory.chunk(0, turn)[: n * case.size].reshape(n, case.size)
        out = memory.chunk(1, turn)[: n * stride].reshape(n, stride)
        if case.limit == "2 lines":
            clock.read(out)
        start = time.thread_time()
        case.run(rows, out)
        seconds = time.thread_time() - start
        if case.refill:  # long before this chunk's next turn
            rows[:, 512:520] = bits
        return seconds

    ratios, seconds = [], []
    for i in range(samples + 2):
        before, middle, after = limit(), candidate(), limit()
        if i >= 2:
            ratios.append((before + after) / 2 / middle)
            seconds.append(middle)
    low, median, high = quartiles(ratios)
    what = f"{case.mix}, {case.size}" + (f" -> {case.out_size}" if case.out_size else "")
    target = target_of(case.op, what, case.limit, of)
    return Row(
        case.op, what, case.limit, target, median, low, high, statistics.median(seconds) / n * 1e9
    )


PEERS = (
    ("get_uabi", "Linux get"),
    ("get_uabi", "Xen expand"),
    ("get_uabi", "QEMU"),
    ("get_uabi", "memcpy"),
    ("set_uabi", "Linux set"),
    ("compact", "Xen compress"),
)
"""The engine's operations, and who else has one (or, for memcpy, copies the rows)."""


def peer_rows(memory: Memory, samples: int) -> Iterator[Row]:
    """Yield how many times as fast the engine is as others' algorithms; answers compared first."""
    n = memory.size // 4096
    for mix in ("mixed", "full"):
        for op, name in PEERS:
            for which, kind in ((0, mix), (1, "full")):
                first = memory.chunk(which, 0)[: n * 4096].reshape(n, 4096)
                fill(first, INTEL, kind)
                for turn in range(1, memory.chunks):
                    memory.chunk(which, turn)[: n * 4096] = first.reshape(-1)
            run: Callable[[Areas, Areas], object] = _get().convert
            if op != "get_uabi":
                run = _set().merge if op == "set_uabi" else _compact().convert

            def rows(memory: Memory = memory, n: int = n) -> tuple[Areas, Areas]:
                turn = memory.next()
                source, target = memory.chunk(0, turn), memory.chunk(1, turn)
                return source[: n * 4096].reshape(n, 4096), target[: n * 4096].reshape(n, 4096)

            def theirs(name: str = name) -> float:
                return peers.run(
                    name, area.table_of(INTEL), *rows(), mask=0x2E7, software=0x2E7,
                    mxcsr_mask=0xFFFF,
                )  # fmt: skip

            check_peer(name, run, *rows())
            who = name.split()[0]
            yield bracket(
                op, f"{mix}, 4096", target_of(op, f"{mix}, 4096", who, None), theirs,
                lambda run=run: seconds_of(run, *rows()), n, samples, who,  # type: ignore[misc]
            )  # fmt: skip


def check_peer(name: str, run: Callable[[Areas, Areas], object], src: Areas, out: Areas) -> None:
    """Raise if the engine and a peer do not give areas with the same values."""
    src, out = src[:97], out[:97]
    ours, theirs = out.copy(), out.copy()
    run(src, ours)
    peers.run(
        name, area.table_of(INTEL), src, theirs, mask=0x2E7, software=0x2E7, mxcsr_mask=0xFFFF
    )
    # A compacted area keeps MXCSR with SSE only; QEMU drops the reserved byte behind FTW.
    but = {"Xen compress": 2, "QEMU": 1}.get(name, 0)
    if (area.diff(ours, theirs, INTEL) & ~np.uint64(but)).any():
        raise AssertionError(f"{name}: its areas differ from the engine's")


def bracket(
    op: str, case: str, target: float | None, limit: Callable[[], float],
    candidate: Callable[[], float], n: int, samples: int, limit_name: str,
) -> Row:  # fmt: skip
    """Time something that stays in the caches, `n` areas or calls at a time."""
    ratios, seconds = [], []
    for _ in range(samples):
        before, middle, after = limit(), candidate(), limit()
        ratios.append((before + after) / 2 / middle)
        seconds.append(middle)
    low, median, high = quartiles(ratios)
    return Row(
        op, case, limit_name, target, median, low, high, statistics.median(seconds) / n * 1e9
    )


def seconds_of(
    call: Callable[..., object], one: object, two: object, times: int = 1,
    clock: Callable[[], float] = time.thread_time,
) -> float:  # fmt: skip
    """Return the seconds that `times` calls with two arguments take, the loop included."""
    again = itertools.repeat(None, times)
    start = clock()
    for _ in again:
        call(one, two)
    return clock() - start


def hot_rows(samples: int) -> Iterator[Row]:
    """Yield what one area costs that is in the nearest cache, in the core and from Python."""
    times, size = 20_000, 2752
    src, out, image = area.empty(1, size), area.empty(1, size), area.empty(1, size)
    for mix in ("full", "avx"):
        fill(src, INTEL, mix)
        fill(image, INTEL, "full")

        def straight() -> float:
            return clock.copy(src[0], out[0], False, times)

        for op, run in (
            ("get_uabi", lambda: clock.convert(_get(), src, out, times)),
            ("set_uabi", lambda: clock.merge(_set(), src, image, times)),
            ("compact", lambda: clock.convert(_compact(), src, out, times)),
        ):
            yield bracket(
                op, f"hot, {mix}, {size}", 0.95, straight, run, times, samples, "row copy"
            )
    fill(src, INTEL, "full")
    one, into = src[0], out[0]
    yield bracket(
        "get_uabi", "call from Python", 5.0, lambda: seconds_of(np.copyto, into, one, times=times),
        lambda: seconds_of(_get().convert, one, into, times=times), times, samples, "np.copyto",
    )  # fmt: skip
    many, results = area.empty(1024, 4096), area.empty(1024, 4096)
    fill(many, INTEL, "mixed")
    yield bracket(
        "get_uabi", "batch of 1024 from Python", 0.95,
        lambda: clock.convert(_get(), many, results, 20),
        lambda: seconds_of(_get().convert, many, results, times=20), 20 * 1024, samples, "in core",
    )  # fmt: skip


def thread_rows(memory: Memory, samples: int) -> Iterator[Row]:
    """Yield what the threads that the engine takes by itself give, against one thread."""
    for size, target in ((1, 0.95), (16, 0.95), (64, 1.2), (256, 1.2)):
        n = min(size * MIB, memory.size * memory.chunks // 2) // 4096
        src, out = (buffer[: n * 4096].reshape(n, 4096) for buffer in memory.buffers)
        fill(src[: min(n, 16384)], INTEL, "mixed")
        for start in range(16384, n, 16384):
            src[start : start + 16384] = src[:16384]

        def run(threads: int, src: Areas = src, out: Areas = out) -> float:
            area.tune(threads=threads)
            return seconds_of(
                lambda rows, into: area.get_uabi(
                    rows, INTEL, mask=KVM_MASK, features=0x2E7, out=into
                ), src, out, clock=time.perf_counter,
            )  # fmt: skip

        yield bracket(
            "get_uabi", f"2 threads, {size} MiB", target, lambda: run(1), lambda: run(2), n,
            samples, "1 thread",
        )  # fmt: skip


def run_all(size: int = 1 << 30, samples: int = 32, only: str = "") -> Iterator[Row]:
    """Yield every result whose operation and case contain `only`.

    Parameters
    ----------
    size : int
        Bytes of source, and of target: several times the last-level cache.
    samples : int
        Of each result; the median is reported.
    """
    memory = Memory(size)
    of = cpu_class()
    area.tune(threads=1)
    try:
        for case in cold_cases():
            if only in f"{case.op} {case.mix}":
                yield measure_cold(case, memory, samples, of)
        if only in "peers":
            yield from peer_rows(memory, samples)
        if only in "hot":
            yield from hot_rows(samples)
        if only in "threads":
            yield from thread_rows(memory, samples)
    finally:
        area.tune(threads=DEFAULT_THREADS)


def machine() -> dict[str, object]:
    """Return the facts that results depend on; nothing that names the machine or its owner."""
    facts: dict[str, object] = {
        "kernel": ".".join(platform.release().split(".")[:2]),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "isa": _core.ISA,
        "cpus": os.cpu_count(),
    }
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        wanted = {
            "vendor_id": "vendor", "model name": "cpu", "cpu family": "family", "model": "model",
        }  # fmt: skip
        for line in itertools.takewhile(str.strip, lines):
            key, _, value = line.partition(":")
            if key.strip() in wanted:
                facts[wanted[key.strip()]] = value.strip()
    return facts


def cpu_class() -> CpuClass | None:
    """Return the class of the CPU at hand, whose targets hold; None if it is of none."""
    facts = machine()
    return class_of(
        str(facts.get("vendor")), int(str(facts.get("family", 0))),
        int(str(facts.get("model", 0))), _core.ISA,
    )  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``xfast bench engine``."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only operations whose names contain TEXT"
    )
    parser.add_argument(
        "--samples", type=int, default=32, metavar="N", help="samples of each result (default: 32)"
    )
    parser.add_argument(
        "--memory",
        type=int,
        default=1024,
        metavar="MIB",
        help="size of each buffer (default: 1024)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the results as they come; return 1 if a target is missed."""
    if args.memory < 16:
        print(f"xfast: --memory: expected 16 or more, got {args.memory}", file=sys.stderr)
        return 2
    results = []
    of = cpu_class()
    if not args.json:
        whose = f"{of.cpus}; from {of.source}" if of else "none known for this CPU"
        print(f"targets: {whose}", file=sys.stderr)
        print(f"{'operation':14} {'case':26} {'limit':9} {'ratio':>6} {'target':>7} {'ns':>8}")
    for row in run_all(args.memory * MIB, max(args.samples, 2), args.only):
        results.append(row)
        if not args.json:
            target = "-" if row.target is None else f"{row.target:.2f}"
            print(
                f"{row.op:14} {row.case:26} {row.limit:9} {row.ratio:6.2f} {target:>7} "
                f"{row.ns:8.1f}{'' if row.reached else '  below'}",
                flush=True,
            )
    if args.json:
        rows = [asdict(row) | {"reached": row.reached} for row in results]
        targets = of._asdict() if of else None
        print(
            json.dumps(
                {"schema": "xfast/1", "machine": machine(), "targets": targets, "engine": rows},
                indent=1,
            )
        )
    return 0 if all(row.reached for row in results) else 1
