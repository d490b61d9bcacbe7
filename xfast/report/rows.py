"""Rows for people and for programs: the text, JSON, NDJSON, CSV and Parquet of each answer."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from xfast.errors import XfastError, printable
from xfast.judge.rules import RULES
from xfast.judge.verdict import Verdict
from xfast.snapshots.model import Snapshot, Vcpu
from xfast.xsave.area import classify, headers
from xfast.xsave.features import bits, name_of
from xfast.xsave.layout import Layout, recognise
from xfast.xsave.registers import REGISTERS, as_integers

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "xfast/1"
FORMATS = ("table", "json", "ndjson", "csv", "parquet")

COLOURS = {"identical": "green", "superset": "green", "incompatible": "red", "unknown": "yellow"}
"""The verdicts, and how a terminal shows them."""


def console(file: TextIO) -> Console:
    """Return a console on `file`: colours on a terminal only, lines never broken elsewhere."""
    from rich.console import Console

    class Pipe(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    wide = None if file.isatty() else 10_000
    return Pipe(file=file, width=wide, highlight=False, markup=False, soft_wrap=wide is not None)


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
    return answer


def snapshot_as_json(snapshot: Snapshot, *, registers: bool = True) -> dict[str, Any]:
    """Return one snapshot as ``xfast show --json`` has it."""
    return {
        "path": snapshot.path,
        "part": snapshot.part,
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
    out.print(f"{printable(snapshot.name)}: {snapshot.format}{wrapped}{by}", style="bold")
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

    if not verdicts:
        return
    labels = _labels({v.snapshot: None for v in verdicts})
    cells: dict[str, dict[str, Verdict]] = {}
    for verdict in verdicts:
        cells.setdefault(verdict.snapshot, {})[verdict.host] = verdict
    hosts = list(dict.fromkeys(v.host for v in verdicts))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("snapshot", *hosts):
        table.add_column(title, overflow="fold")
    for snapshot, row in cells.items():
        words = []
        for host in hosts:
            verdict = row[host]
            fix = verdict.fixable if verdict.verdict == "incompatible" else "none"
            word = verdict.verdict + (f" ({fix} fix)" if fix != "none" else "")
            word += f", {verdict.kvm}" if verdict.kvm else ""
            words.append(Text(word, style=COLOURS[verdict.verdict]))
        table.add_row(labels[snapshot], *words)
    out.print(table)
    for line in _reasons(verdicts, labels, notes=notes):
        out.print(line)


def _labels(paths: Iterable[str]) -> dict[str, str]:
    """Return what to call each path: without the folder that all of them share."""
    names = list(paths)
    parents = {os.path.dirname(name) for name in names}
    shared = os.path.commonpath(parents) if len(names) > 1 and "" not in parents else ""
    return {name: printable(os.path.relpath(name, shared) if shared else name) for name in names}


def _reasons(verdicts: list[Verdict], labels: Mapping[str, str], *, notes: bool) -> Iterator[str]:
    """Yield the findings by rule: each text once, and the pairs that it is about."""
    about: dict[str, dict[tuple[str, str, str], dict[str, set[str]]]] = {}
    refs: dict[str, dict[str, None]] = {}
    for verdict in verdicts:
        for f in verdict.findings:
            if f.severity != "note" or notes:
                fix = "" if f.fix == "none" else f", {f.fix} fix"
                text = (f.component, f.severity + fix, f.why)
                pairs = about.setdefault(f.code, {}).setdefault(text, {})
                pairs.setdefault(verdict.host, set()).add(labels[verdict.snapshot])
                refs.setdefault(f.code, {})[f.ref] = None
    for code in (code for code in RULES if code in about):
        yield f"\n{code}: {RULES[code].title}"
        for where, texts in _together(about[code]).items():
            yield from (f"  {text}" for text in texts)
            yield where
        yield from (f"    source: {ref}" for ref in refs[code])
        yield f"    next: {RULES[code].next}"


def _together(
    about: Mapping[tuple[str, str, str], Mapping[str, set[str]]],
) -> dict[str, list[str]]:
    """Return {pairs: texts}; texts that differ in nothing but the component become one."""
    names: dict[str, dict[tuple[str, str], list[str]]] = {}
    for (component, weight, why), hosts in about.items():
        template = why.replace(component, "\0", 1) if component else why
        alike = names.setdefault(_pairs(hosts), {}).setdefault((weight, template), [])
        alike.append(component)
    return {
        where: [f"{w}: {t.replace(chr(0), ', '.join(some))}" for (w, t), some in texts.items()]
        for where, texts in names.items()
    }


def _pairs(hosts: Mapping[str, set[str]]) -> str:
    """Say which snapshots on which hosts; hosts with the same snapshots together."""
    together: dict[tuple[str, ...], list[str]] = {}
    for host, snapshots in hosts.items():
        together.setdefault(tuple(sorted(snapshots)), []).append(host)
    lines = []
    for some, names in together.items():
        more = f" and {len(some) - 4} more" if some[4:] else ""
        lines.append(f"    in {', '.join(some[:4])}{more} on {', '.join(names)}")
    return "\n".join(lines)


class Tally:
    """Counts verdicts as they pass, for the closing line and the exit code."""

    def __init__(self) -> None:
        self.words: Counter[str] = Counter()
        self.fixable = 0
        self.contradicted = False

    def count(self, verdicts: Iterable[Verdict]) -> Iterator[Verdict]:
        """Yield `verdicts` on, and count them."""
        for verdict in verdicts:
            self.words[verdict.verdict] += 1
            self.fixable += verdict.verdict == "incompatible" and verdict.fixable == "safe"
            self.contradicted |= verdict.kvm is not None and verdict.kvm.doubtful
            yield verdict

    def closing_line(self, unread: int) -> str:
        """Say how many pairs of each kind there were, and how many inputs were `unread`."""
        parts = [f"{self.words[word]} {word}" for word in COLOURS if self.words[word]]
        total = self.words.total()
        text = f"{total} pair{'' if total == 1 else 's'}: " + (", ".join(parts) or "none judged")
        text += f"; {self.fixable} can be fixed without loss" if self.fixable else ""
        return text + (f"; {unread} inputs could not be read" if unread else "")


COLUMNS = (
    "snapshot", "host", "verdict", "fixable", "code", "component", "vcpu", "severity",
    "snapshot_value", "host_value", "fix", "why", "ref", "count",
)  # fmt: skip


def flat(verdicts: Iterable[Verdict]) -> Iterator[dict[str, Any]]:
    """Yield a row for each finding, and one for each verdict without findings."""
    for verdict in verdicts:
        whole = verdict.as_json()
        whole.pop("live", None)
        findings = whole.pop("findings")
        for finding in findings or [{}]:
            count = {"count": 1} if finding else {}
            yield {**dict.fromkeys(COLUMNS), **whole, **count, **finding}


def write_verdicts(verdicts: Iterable[Verdict], form: str, out: TextIO, *, notes: bool) -> None:
    """Write an answer of ``xfast check`` in one of FORMATS; JSON and CSV as the verdicts come."""
    if form == "table":
        matrix_text(list(verdicts), console(out), notes=notes)
    elif form == "json":
        out.write(f'{{"schema": "{SCHEMA}", "verdicts": [')
        for i, verdict in enumerate(verdicts):
            out.write(",\n" if i else "\n")
            json.dump(verdict.as_json(), out)
        out.write("\n]}\n")
    elif form == "ndjson":
        for verdict in verdicts:
            out.write(json.dumps({"schema": SCHEMA, **verdict.as_json()}) + "\n")
    elif form == "csv":
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        writer.writerows(flat(verdicts))
    else:
        _parquet(verdicts, out)


def _parquet(verdicts: Iterable[Verdict], out: TextIO) -> None:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise XfastError("parquet needs pyarrow: pip install 'xfast[arrow]'") from None
    rows = list(flat(verdicts))
    columns = {name: [row[name] for row in rows] for name in COLUMNS}
    parquet.write_table(pa.table(columns), out.buffer)
