"""``xfast bench swap``: ways to switch between host and guest FPU state, compared.

By time, on this CPU and in the engine; by bytes moved; and by what they let out. A round trip is
four moves: the host's state out, the guest's in, the guest's out, the host's in. Every answer is
checked before it is timed; data is non-zero; ratios are to a plain copy of four areas, measured
on both sides of every sample.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xfast.bench import plot
from xfast.bench.strategies import (
    COMPACTING,
    CPU,
    GUESTS,
    HOST_LIVE,
    HOST_XCR0,
    STRATEGIES,
    Consequence,
    Guest,
    Strategy,
    consequence,
    host_mask,
    random_area,
    restore_mask,
    save_mask,
    skips,
)
from xfast.engine import hw
from xfast.report.rows import SCHEMA, console
from xfast.store.staged import write_text
from xfast.xsave import area
from xfast.xsave.features import PKRU, bits, name_of, names_of
from xfast.xsave.layout import Layout, from_leaf_d, recognise

ROUNDS = 400
ROWS = 32
"""Round trips of one sample: on the CPU, and in the engine (one a row)."""

Trip = Callable[[], float]
"""Takes a sample, and returns the nanoseconds of one round trip."""


class Timing(NamedTuple):
    """Medians: nanoseconds of a round trip, and the ratio to a copy of four areas."""

    ns: float
    ratio: float


class Result(NamedTuple):
    """One strategy with one guest. `cpu` or `engine` is None where `absent` says why."""

    strategy: Strategy
    guest: Guest
    does: Consequence
    cpu: Timing | None
    engine: Timing | None
    absent: str

    @property
    def kind(self) -> str:
        """What it lets out, worst first, as the plot colours it."""
        if self.does.seen:
            return "exposes"
        return "leaks" if self.does.reported else "clean"

    def as_json(self) -> dict[str, Any]:
        """Return the row of ``--json``."""
        return {
            **self.strategy._asdict(),
            "guest": self.guest.name,
            "bytes_saved": self.does.saved,
            "bytes_restored": self.does.restored,
            "reported": [name_of(nr) for nr in bits(self.does.reported)],
            "seen_by_guest": [name_of(nr) for nr in bits(self.does.seen)],
            "leak_source": self.does.source,
            "cpu": self.cpu._asdict() if self.cpu else None,
            "engine": self.engine._asdict() if self.engine else None,
            "absent": self.absent,
        }


class Machine:
    """The CPU at hand, as user mode sees it; `xcr0` is 0 where it can't run the instructions."""

    def __init__(self) -> None:
        self.xcr0, self.layout = 0, Layout(())
        self.instructions: frozenset[str] = frozenset()
        if hw.available():
            hw.request_permission(18)
            self.xcr0 = hw.xgetbv(0)
            self.layout, _ = from_leaf_d({nr: hw.cpuid(0xD, nr) for nr in range(64)})
            extra = hw.cpuid(0xD, 1)[0]
            names = enumerate(("xsaveopt", "xsavec", "xgetbv"))
            self.instructions = frozenset(name for bit, name in names if extra >> bit & 1)

    def lacks(self, strategy: Strategy, guest: Guest) -> str:
        """Return why this CPU can't time the strategy in user mode; empty if it can."""
        if not self.xcr0:
            return "no XSAVE here"
        if strategy.save == "xsaves":
            return "XSAVES needs CPL 0"
        if strategy.save not in self.instructions | {"xsave"}:
            return f"no {strategy.save.upper()} here"
        if strategy.mask == "live" and "xgetbv" not in self.instructions:
            return "no XGETBV(1) here"
        missing = guest.live & ~self.xcr0
        return f"no {names_of(missing)} here" if missing else ""

    def trip(self, strategy: Strategy, guest: Guest) -> Trip:
        """Return a sample of round trips with the real instructions, its answer checked.

        The state goes to another area each time, so that no save finds it unmodified; the
        guest's does not where the strategy is about that.
        """
        live = HOST_LIVE & self.xcr0 & ~PKRU
        host, given = (random_area(self.layout, bv, 3) for bv in (live, guest.live))
        in_host, out_host, in_guest, out_guest = area.empty(4, self.layout)
        in_host[:], in_guest[:] = host, given
        if strategy.unmodified:
            out_guest = in_guest
        restore = restore_mask(strategy, self.xcr0)
        steps: list[hw.Step] = []
        for one, two, three, four in (
            (in_host, out_host, in_guest, out_guest),
            (out_host, in_host, out_guest, in_guest),
        ):
            for source, target, mask in (
                (one, two, host_mask(strategy, self.xcr0, live)),
                (three, four, save_mask(strategy, guest, self.xcr0, guest.live)),
            ):
                steps.append(("xrstor64", source, restore))
                if strategy.mask == "live":
                    steps.append(("xgetbv", None, 0))
                steps.append((f"{strategy.save}64", target, mask))
        if any(signal for signal, _, _ in hw.run(steps)):
            raise AssertionError(f"{strategy.name}: an instruction faulted")
        for held, expected in (
            (in_host, host),
            (out_host, host),
            (in_guest, given),
            (out_guest, given),
        ):
            check(strategy, area.diff(held, expected, self.layout) & ~PKRU)
        return lambda: hw.time(steps, ROUNDS) / ROUNDS / 2


def engine_trip(strategy: Strategy, guest: Guest) -> Trip:
    """Return a sample of round trips in the engine, one a row, its answer checked."""
    layout, live = CPU.layout, HOST_LIVE
    saves = host_mask(strategy, HOST_XCR0, live), save_mask(strategy, guest, HOST_XCR0, guest.live)
    restore = restore_mask(strategy, HOST_XCR0)
    host, given = (np.tile(random_area(layout, bv, 3), (ROWS, 1)) for bv in (live, guest.live))
    registers, held = host.copy(), [host.copy(), given.copy()]
    if strategy.save in COMPACTING:
        held = [
            area.relayout(rows, layout, layout, xcomp_bv=mask | own)
            for rows, mask, own in zip(held, saves, (live, guest.live), strict=True)
        ]
    theirs, guests = held

    def sample() -> float:
        began = time.perf_counter_ns()
        area.swap(registers, theirs, guests, layout, save_mask=saves[0], restore_mask=restore)
        area.swap(registers, guests, theirs, layout, save_mask=saves[1], restore_mask=restore)
        return (time.perf_counter_ns() - began) / ROWS

    sample()
    check(strategy, int(np.bitwise_or.reduce(area.diff(registers, host, layout))))
    check(strategy, int(np.bitwise_or.reduce(area.diff(guests, given, layout))) & ~PKRU)
    return sample


def check(strategy: Strategy, differing: int) -> None:
    """Raise if a round trip did not bring every component back."""
    if differing:
        raise AssertionError(f"{strategy.name}: {names_of(differing)} came back changed")


def copy_trip(layout: Layout) -> Trip:
    """Return a sample of the denominator: numpy copying four areas of `layout`."""
    rows = np.stack([random_area(layout, 3, seed) for seed in range(4)])
    target = np.empty_like(rows)

    def sample() -> float:
        began = time.perf_counter_ns()
        for _ in range(100):
            np.copyto(target, rows)
        return (time.perf_counter_ns() - began) / 100

    return sample


def measure(trip: Trip, copy: Trip, samples: int) -> Timing:
    """Return medians over samples; each has the denominator before and behind it."""
    taken = []
    for _ in range(samples):
        before, ns, after = copy(), trip(), copy()
        taken.append((ns, 2 * ns / (before + after)))
    return Timing(*(round(statistics.median(column), 3) for column in zip(*taken, strict=True)))


def results(guests: Sequence[Guest], samples: int) -> Iterator[Result]:
    """Yield every strategy with each guest, checked and timed."""
    machine = Machine()
    copy = copy_trip(CPU.layout)
    for guest in guests:
        for strategy in STRATEGIES:
            absent = machine.lacks(strategy, guest)
            cpu = engine = None
            if skips(strategy, guest):
                cpu, absent = Timing(0, 0), ""
            elif not absent:
                cpu = measure(machine.trip(strategy, guest), copy, samples)
            if strategy.save != "xsaveopt" and not strategy.lazy:
                engine = measure(engine_trip(strategy, guest), copy, samples)
            yield Result(strategy, guest, consequence(strategy, guest), cpu, engine, absent)


def averaged(rows: Sequence[Result]) -> list[Guest]:
    """Return the guests that a mark is the mean of: those that this CPU runs, else all."""
    runs = {row.guest for row in rows if row.cpu and row.cpu.ns} or {row.guest for row in rows}
    return [guest for guest in dict.fromkeys(row.guest for row in rows) if guest in runs]


def points(rows: Sequence[Result]) -> Iterator[plot.Point]:
    """Yield one mark a strategy: means over the guests that `averaged` names."""
    runs = averaged(rows)
    for strategy in STRATEGIES:
        own = [row for row in rows if row.strategy is strategy and row.guest in runs]
        measured = all(row.cpu for row in own)
        timings = [row.cpu if measured else row.engine for row in own]
        known = [timing.ns for timing in timings if timing]
        if len(known) == len(own):
            yield plot.Point(
                strategy.name,
                statistics.fmean(row.does.saved + row.does.restored for row in own),
                statistics.fmean(known),
                min((row.kind for row in own), key=list(plot.KINDS).index),
                measured,
            )


def as_plot(rows: Sequence[Result]) -> str:
    """Return the SVG: time against bytes."""
    guests = ", ".join(guest.name for guest in averaged(rows))
    return plot.scatter(
        list(points(rows)),
        "Switching FPU state: host to guest and back",
        f"{cpu_name()}; each mark is the mean over guests {guests}; marks never cover each other",
        ("bytes moved in a round trip", "nanoseconds of a round trip"),
        {
            "leaks": "GET reports PKRU that the guest lacks",
            "exposes": "guest can see host registers",
            "clean": "neither",
            "measured": "this CPU's instructions",
            "computed": "xfast's engine",
        },
    )


def cpu_name() -> str:
    """Return the CPU's name as /proc/cpuinfo has it, or the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def as_json(rows: Sequence[Result], machine: Machine) -> str:
    """Return the JSON answer."""
    return json.dumps(
        {
            "schema": SCHEMA,
            "benchmark": "swap",
            "machine": {
                "cpu": cpu_name(),
                "kernel": platform.release(),
                "xcr0": f"{machine.xcr0:#x}",
                "layout": recognise(machine.layout) if machine.xcr0 else None,
            },
            "modelled_host": {"xcr0": f"{HOST_XCR0:#x}", "layout": CPU.layout.name},
            "results": [row.as_json() for row in rows],
        },
        indent=2,
    )


COLUMNS = ("strategy", "CPU ns (x)", "engine ns (x)", "saved B", "loaded B", "lets out")


def cells(row: Result) -> tuple[str, ...]:
    """Return one line of the table."""
    timings = (
        f"{timing.ns:.0f} ({timing.ratio:.2f})" if timing else "-"
        for timing in (row.cpu, row.engine)
    )
    does = row.does
    out = []
    if does.reported:
        out.append(f"GET {names_of(does.reported)}{'*' * (does.source == 'kvm')}")
    if does.seen:
        out.append(f"guest {names_of(does.seen)}")
    return row.strategy.name, *timings, f"{does.saved}", f"{does.restored}", ", ".join(out) or "-"


def print_table(rows: Sequence[Result]) -> None:
    """Print a table a guest, and the strategies that let PKRU out."""
    from rich.table import Table

    out = console(sys.stdout)
    out.print(
        "A round trip is host out, guest in, guest out, host in. (x): how many times as long as a "
        "copy of four areas."
    )
    out.print(
        "lets out: what KVM_GET_XSAVE reports beyond the guest's CPUID (GET), and which registers "
        "of the host the guest can see (guest). *: by the model of the kernel."
    )
    for guest in dict.fromkeys(row.guest for row in rows):
        table = Table(
            title=f"\nround trips with guest {guest.name} (in use: {names_of(guest.live)})",
            title_justify="left",
            box=None,
            pad_edge=False,
        )
        for column in COLUMNS:
            words = column in (COLUMNS[0], COLUMNS[-1])
            table.add_column(column, justify="left" if words else "right", no_wrap=not words)
        table.columns[0].no_wrap = True
        for row in rows:
            if row.guest is guest:
                table.add_row(*cells(row))
        out.print(table)
    absent = sorted({row.absent for row in rows if row.absent})
    if absent:
        out.print("\nNot timed on this CPU:", "; ".join(absent))
    leaky = dict.fromkeys(row.strategy.name for row in rows if row.does.reported & PKRU)
    out.print("\nGET reports PKRU to a guest without PKU:", "; ".join(leaky) or "none of these")


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a number from 1, got {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``xfast bench swap``."""
    parser.add_argument(
        "--guest",
        action="append",
        choices=[guest.name for guest in GUESTS],
        help="only this mix of components in use; may be repeated (default: all)",
    )
    parser.add_argument(
        "--samples", type=_count, default=21, metavar="N", help="samples of each time (default: 21)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", metavar="FILE.svg", help="draw time against bytes")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark and print what it found; return the exit code."""
    guests = [guest for guest in GUESTS if not args.guest or guest.name in args.guest]
    rows = list(results(guests, args.samples))
    if args.json:
        print(as_json(rows, Machine()))
    else:
        print_table(rows)
    if args.plot:
        write_text(args.plot, as_plot(rows), replace=True)
    return 0
