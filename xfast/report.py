"""Rows for people and for programs: the text, JSON, NDJSON, CSV and Parquet of each answer."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from xfast.area import classify, headers
from xfast.errors import XfastError
from xfast.features import bits, name_of
from xfast.layout import Layout, recognise
from xfast.registers import REGISTERS, as_integers
from xfast.rules import SEVERITIES
from xfast.snapshots.model import Snapshot, Vcpu
from xfast.verdict import Verdict

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "xfast/1"
FORMATS = ("table", "json", "ndjson", "csv", "parquet")

MARKS = {
    "identical": ("identical", "green"),
    "superset": ("superset", "green"),
    "incompatible": ("incompatible", "red"),
    "unknown": ("unknown", "yellow"),
}


def console(file: TextIO) -> Console:
    """Return a console on `file`: colours on a terminal only, lines never broken elsewhere."""
    from rich.console import Console

    wide = None if file.isatty() else 10_000
    return Console(file=file, width=wide, highlight=False, markup=False, soft_wrap=wide is not None)


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
            for name, (value, size) in as_integers(vcpu.area, known).items()
        }
    return answer


def snapshot_as_json(snapshot: Snapshot, *, registers: bool = True) -> dict[str, Any]:
    """Return one snapshot as ``xfast show --json`` has it."""
    return {
        "path": snapshot.path,
        "format": snapshot.format,
        "kind": snapshot.kind,
        "producer": snapshot.producer,
        "container": list(snapshot.container),
        "vcpus": [vcpu_as_json(vcpu, registers=registers) for vcpu in snapshot.vcpus],
    }


def show_text(snapshot: Snapshot, out: Console, *, registers: bool) -> None:
    """Print what is in a snapshot, for people."""
    wrapped = " in " + " in ".join(reversed(snapshot.container)) if snapshot.container else ""
    by = f", written by {snapshot.producer}" if snapshot.producer else ""
    out.print(f"{snapshot.path}: {snapshot.format}{wrapped}{by}", style="bold")
    whose = "thread" if snapshot.kind == "process" else "vCPU"
    for vcpu in snapshot.vcpus:
        answer = vcpu_as_json(vcpu, registers=registers)
        note = f": {vcpu.layout_note}" if vcpu.layout_note else ""
        optional = "".join(f"  {n} {answer[n]}" for n in ("xss", "xfd") if answer[n] is not None)
        out.print(
            f"  {whose} {vcpu.index}  xcr0 {answer['xcr0'] or 'unknown'}  xstate_bv "
            f"{answer['xstate_bv']}{optional}  layout {answer['layout']} "
            f"({vcpu.layout_source}{note})"
        )
        for component in answer["components"]:
            out.print(f"    {component['nr']:>2} {component['name']:<10} {component['state']}")
        for name, value in answer.get("registers", {}).items():
            out.print(f"      {name:<10} {value}")


def matrix_text(verdicts: list[Verdict], out: Console, *, notes: bool) -> None:
    """Print the verdict matrix, snapshots by hosts, and the reasons under it."""
    from rich.table import Table
    from rich.text import Text

    hosts = list(dict.fromkeys(v.host for v in verdicts))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("snapshot", overflow="fold")
    for host in hosts:
        table.add_column(host, overflow="fold")
    cells: dict[str, dict[str, Verdict]] = {}
    for verdict in verdicts:
        cells.setdefault(verdict.snapshot, {})[verdict.host] = verdict
    for snapshot, row in cells.items():
        words = []
        for host in hosts:
            word, colour = MARKS[row[host].verdict]
            fix = row[host].fixable
            if word == "incompatible" and fix != "none":
                word += f" ({fix} fix)"
            words.append(Text(word, style=colour))
        table.add_row(snapshot, *words)
    out.print(table)
    for line in _reasons(verdicts, notes=notes):
        out.print(line)


class Reason(NamedTuple):
    """The part of a finding that many pairs share."""

    severity: str
    code: str
    component: str
    fix: str
    why: str
    ref: str


def _reasons(verdicts: list[Verdict], *, notes: bool) -> Iterator[str]:
    """Yield the findings, each text once, with the pairs that it is about."""
    about: dict[Reason, dict[str, set[str]]] = {}
    for verdict in verdicts:
        for f in verdict.findings:
            if f.severity != "note" or notes:
                reason = Reason(f.severity, f.code, f.component, f.fix, f.why, f.ref)
                about.setdefault(reason, {}).setdefault(verdict.host, set()).add(verdict.snapshot)
    for reason in sorted(about, key=lambda r: -SEVERITIES.index(r.severity)):
        yield ""
        subject = f" {reason.component}" if 0 < len(reason.component) < 40 else ""
        fix = f", {reason.fix} fix" if reason.fix != "none" else ""
        yield f"{reason.code}{subject}: {reason.severity}{fix}"
        yield f"  {reason.why}"
        together: dict[frozenset[str], list[str]] = {}
        for host, where in about[reason].items():
            together.setdefault(frozenset(where), []).append(host)
        for snapshots, hosts in together.items():
            some = sorted(snapshots)
            more = f" and {len(some) - 3} more" if some[3:] else ""
            yield f"  in {', '.join(some[:3])}{more} on {', '.join(hosts)}"
        yield f"  {reason.ref}"


def summary(verdicts: list[Verdict], unread: int) -> str:
    """Return the closing line: how many pairs of each kind."""
    counts = Counter(v.verdict for v in verdicts)
    fixable = sum(v.verdict == "incompatible" and v.fixable == "safe" for v in verdicts)
    parts = [f"{counts[word]} {word}" for word in MARKS if counts[word]]
    text = f"{len(verdicts)} pairs: " + (", ".join(parts) or "none judged")
    text += f"; {fixable} can be fixed without loss" if fixable else ""
    return text + (f"; {unread} inputs could not be read" if unread else "")


COLUMNS = (
    "snapshot", "host", "verdict", "fixable", "code", "component", "vcpu", "severity",
    "snapshot_value", "host_value", "fix", "why", "ref",
)  # fmt: skip


def flat(verdicts: Iterable[Verdict]) -> Iterator[dict[str, Any]]:
    """Yield a row for each finding, and one for each verdict without findings."""
    for verdict in verdicts:
        whole = verdict.as_json()
        findings = whole.pop("findings")
        for finding in findings or [{}]:
            yield {**dict.fromkeys(COLUMNS), **whole, **finding}


def write_verdicts(verdicts: list[Verdict], form: str, out: TextIO, *, notes: bool) -> None:
    """Write an answer of ``xfast check`` in one of FORMATS."""
    if form == "table":
        matrix_text(verdicts, console(out), notes=notes)
    elif form == "json":
        json.dump({"schema": SCHEMA, "verdicts": [v.as_json() for v in verdicts]}, out, indent=1)
        out.write("\n")
    elif form == "ndjson":
        for verdict in verdicts:
            out.write(json.dumps({"schema": SCHEMA, **verdict.as_json()}) + "\n")
    elif form == "csv":
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        writer.writerows(flat(verdicts))
    else:
        _parquet(verdicts, out)


def _parquet(verdicts: list[Verdict], out: TextIO) -> None:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise XfastError("parquet needs pyarrow: pip install 'xfast[arrow]'") from None
    rows = list(flat(verdicts))
    columns = {name: [row[name] for row in rows] for name in COLUMNS}
    parquet.write_table(pa.table(columns), out.buffer)
