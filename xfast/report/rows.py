"""Rows for programs, JSON, NDJSON, CSV and Parquet; and what ``xfast show`` prints."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from xfast.errors import XfastError, escape, printable
from xfast.judge.verdict import Verdict
from xfast.report.tally import Problem, Tally
from xfast.snapshots.model import Snapshot, Vcpu, classes_of
from xfast.xsave.area import classify, headers
from xfast.xsave.features import bits, name_of
from xfast.xsave.layout import Layout, recognise
from xfast.xsave.registers import REGISTERS, as_integers, without_place

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "xfast/1"
FORMATS = ("table", "json", "ndjson", "csv", "parquet")
FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")
"""How what a spreadsheet takes for a formula begins."""


def console(file: TextIO) -> Console:
    """Return a console on `file`: colours on a terminal only, lines never broken elsewhere.

    What is printed means nothing to it: neither markup nor the names of emoji.
    """
    from rich.console import Console

    class Pipe(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

        def print(self, *objects: Any, **how: Any) -> None:
            plain = self.soft_wrap and self.color_system is None
            if plain and all(isinstance(one, str) for one in objects):
                print(*objects, file=file)
            else:
                super().print(*objects, **how)

    wide = None if file.isatty() else 10_000
    soft = wide is not None
    return Pipe(file=file, width=wide, highlight=False, markup=False, emoji=False, soft_wrap=soft)


def _hex(value: int | None) -> str | None:
    return None if value is None else f"{value:#x}"


def layout_name(vcpu: Vcpu) -> str:
    """Return the name of a vCPU's layout: a preset's where one fits, ``unknown`` without one."""
    if vcpu.layout is None:
        return "unknown"
    if vcpu.layout.name and vcpu.layout_source in ("given", "format", "inferred"):
        return vcpu.layout.name
    return recognise(vcpu.layout) or vcpu.layout.name


def vcpu_as_json(vcpu: Vcpu, *, registers: bool) -> dict[str, Any]:
    """Return one vCPU as ``xfast show --json`` has it."""
    head = headers(vcpu.area)
    known = vcpu.layout or Layout(())
    classes = classify(vcpu.area, known)
    shown = head.xstate_bv | (vcpu.xcr0 or 0)
    answer: dict[str, Any] = {
        "vcpu": vcpu.index,
        "xcr0": _hex(vcpu.xcr0),
        "xstate_bv": _hex(head.xstate_bv),
        "xcomp_bv": _hex(head.xcomp_bv),
        "layout": layout_name(vcpu),
        "layout_source": vcpu.layout_source,
        "size": len(vcpu.area),
        "xss": _hex(vcpu.xss),
        "xfd": _hex(vcpu.xfd),
        "components": [
            {"nr": nr, "name": name_of(nr), "state": classes.state(nr)} for nr in bits(shown)
        ],
    }
    if registers:
        answer["registers"] = {
            name: f"{value:#x}"
            if name == "ftag" or REGISTERS[name].dtype
            else f"0x{value:0{2 * size}x}"
            for name, (value, size) in as_integers(vcpu.area, known, vcpu.mode).items()
        }
        answer["registers_without_place"] = without_place(vcpu.area, known, vcpu.mode)
    return answer


def snapshot_as_json(snapshot: Snapshot, *, registers: bool = True) -> dict[str, Any]:
    """Return one snapshot as ``xfast show --json`` has it."""
    return {
        "path": escape(snapshot.path),
        "part": snapshot.part,
        "format": snapshot.format,
        "kind": snapshot.kind,
        "producer": snapshot.producer,
        "container": list(snapshot.container),
        **({"stream_end": snapshot.facts["stream_end"]} if "stream_end" in snapshot.facts else {}),
        "vcpus": [
            vcpu_as_json(vcpu, registers=registers) | ({"count": alike} if alike > 1 else {})
            for vcpu, alike in classes_of(snapshot.vcpus)
        ],
    }


def show_text(snapshot: Snapshot, out: Console, *, registers: bool) -> None:
    """Print what is in a snapshot, for people."""
    wrapped = " in " + " in ".join(reversed(snapshot.container)) if snapshot.container else ""
    by = f", written by {snapshot.producer}" if snapshot.producer else ""
    out.print(f"{escape(snapshot.name)}: {snapshot.format}{wrapped}{by}", style="bold")
    whose = "thread" if snapshot.kind == "process" else "vCPU"
    for vcpu, alike in classes_of(snapshot.vcpus):
        answer = vcpu_as_json(vcpu, registers=registers)
        note = f": {vcpu.layout_note}" if vcpu.layout_note else ""
        optional = "".join(f"  {n} {answer[n]}" for n in ("xss", "xfd") if answer[n] is not None)
        lines = [
            f"  {whose} {vcpu.index}  xcr0 {answer['xcr0'] or 'unknown'}  xstate_bv "
            f"{answer['xstate_bv']}{optional}  layout {answer['layout']} "
            f"({vcpu.layout_source}{note})" + (f"  and {alike - 1:,} alike" if alike > 1 else "")
        ]
        for component in answer["components"]:
            lines.append(f"    {component['nr']:>2} {component['name']:<10} {component['state']}")
        for name, value in answer.get("registers", {}).items():
            lines.append(f"      {name:<10} {value}")
        if answer.get("registers_without_place"):
            names = ", ".join(answer["registers_without_place"])
            lines.append(f"      not shown, for their place is unknown: {names}")
        out.print("\n".join(lines))


COLUMNS = (
    "snapshot", "host", "verdict", "fixable", "code", "component", "vcpu", "severity",
    "snapshot_value", "host_value", "fix", "why", "ref", "count",
)  # fmt: skip


UNJUDGED = "not judged"
"""What stands in the column of verdicts for an input that could not be judged."""


def flat(verdict: Verdict) -> Iterator[dict[str, Any]]:
    """Yield a row for each finding of a verdict, or one without a finding."""
    whole = verdict.as_json()
    whole.pop("live", None)
    findings = whole.pop("findings")
    for finding in findings or [{}]:
        count = {"count": 1} if finding else {}
        row = {**dict.fromkeys(COLUMNS), **whole, **count, **finding}
        yield {name: row[name] for name in COLUMNS}


def _flat_problem(problem: Problem) -> dict[str, Any]:
    """Return the row of an input that could not be judged."""
    return {
        **dict.fromkeys(COLUMNS),
        "snapshot": escape(problem.path),
        "verdict": UNJUDGED,
        "why": escape_message(problem.message),
    }


def cell(value: object) -> object:
    """Return a CSV cell that no spreadsheet takes for a formula, the wide signs of Japanese too."""
    text = "" if value is None else str(value)
    return (
        f"'{text}" if text.lstrip().startswith(FORMULA) or text.startswith(("\t", "\r")) else value
    )


def write_verdicts(verdicts: Iterable[Verdict], form: str, out: TextIO, tally: Tally) -> None:
    """Write an answer of ``xfast check`` for programs, in one of FORMATS but ``table``.

    JSON, NDJSON and CSV are written as the verdicts come; inputs that could not be judged, which
    `tally` has when all verdicts have come, stand at the end.
    """
    if form == "json":
        out.write(f'{{"schema": "{SCHEMA}", "verdicts": [')
        for i, verdict in enumerate(verdicts):
            out.write(",\n" if i else "\n")
            out.write(json.dumps(verdict.as_json()))  # json.dump takes four times as long
        out.write('\n], "errors": ')
        json.dump([problem_as_json(problem) for problem in tally.problems], out)
        out.write(f', "skipped": {tally.skipped}}}\n')
    elif form == "ndjson":
        for verdict in verdicts:
            out.write(json.dumps({"schema": SCHEMA, **verdict.as_json()}) + "\n")
        for problem in tally.problems:
            out.write(json.dumps({"schema": SCHEMA, **problem_as_json(problem)}) + "\n")
    elif form == "csv":
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        for verdict in verdicts:
            for row in flat(verdict):
                writer.writerow({name: cell(value) for name, value in row.items()})
        for problem in tally.problems:
            row = _flat_problem(problem)
            writer.writerow({name: cell(value) for name, value in row.items()})
    else:
        _write_parquet(verdicts, out, tally)


def problem_as_json(problem: Problem) -> dict[str, str]:
    """Return an input that could not be judged as the JSON answers have it."""
    return {"snapshot": escape(problem.path), "error": escape_message(problem.message)}


def escape_message(message: str) -> str:
    """Return an error's line fit for every output."""
    return printable(message).encode("utf-8", "backslashreplace").decode()


def _write_parquet(verdicts: Iterable[Verdict], out: TextIO, tally: Tally) -> None:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise XfastError("parquet needs pyarrow: pip install 'xfast[arrow]'") from None
    rows = [row for verdict in verdicts for row in flat(verdict)]
    rows += [_flat_problem(problem) for problem in tally.problems]
    columns = {name: [row[name] for row in rows] for name in COLUMNS}
    types = {name: pa.int64() if name in ("vcpu", "count") else pa.string() for name in COLUMNS}
    arrays = [pa.array(columns[name], types[name]) for name in COLUMNS]
    parquet.write_table(pa.table(arrays, names=list(COLUMNS)), out.buffer)
