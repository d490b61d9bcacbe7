"""The answer of ``xfast check`` for people: a summary, a matrix, and each reason once.

Snapshots with the same answers are one row with a count. A cell is one short word, so that the
matrix fits into a terminal: where the names of the hosts do not, the columns are numbered, and a
key stands below.
"""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xfast.errors import escape
from xfast.judge.advice import next_steps
from xfast.judge.rules import RULES
from xfast.judge.verdict import Finding, PerClass, Verdict, Verdicts
from xfast.report.tally import counted

if TYPE_CHECKING:
    from rich.console import Console

CELLS = {
    "ok": ("green", "the host can restore it"),
    "risk": ("yellow", "the host can restore it, with a risk named below"),
    "fix": ("magenta", "refused as it is; xfast fix makes it restorable and loses nothing"),
    "no": ("red", "the host can't restore it"),
    "?": ("yellow", "unknown: a fact is missing"),
}
"""The words of the matrix: their colour on a terminal, and what they mean."""

NAMED = 4
"""How many snapshots of a group are named where not all are asked for."""

UNBROKEN = 10_000
"""How wide the answer is where it goes to no terminal: a line is a sentence (columns)."""


def cell(verdict: Verdict) -> str:
    """Return the word of CELLS for a verdict."""
    if verdict.verdict == "unknown":
        return "?"
    if verdict.verdict == "incompatible":
        return "fix" if verdict.fixable == "safe" else "no"
    return "risk" if verdict.risky else "ok"


@dataclass
class Group:
    """Snapshots to which all hosts answer the same: the first one's verdicts, some names, a count.

    `names` holds the first few names, or all where the answer is to name all.
    """

    verdicts: tuple[Verdict, ...]
    names: list[str] = field(default_factory=list)
    count: int = 0


class Fleet:
    """All answers to one question, collected snapshot by snapshot; memory grows with groups only.

    Parameters
    ----------
    every_name : bool
        Keep the names of all snapshots, not just the first few of each group.
    """

    def __init__(self, *, every_name: bool = False) -> None:
        self.every_name = every_name
        self.groups: dict[tuple[tuple[object, ...], ...], Group] = {}
        self._alike = PerClass(self._group)

    def _group(self, verdicts: Sequence[Verdict]) -> Group:
        """Return the group of such answers."""
        key = tuple(verdict[1:] for verdict in verdicts)
        return self.groups.setdefault(key, Group(tuple(verdicts)))

    def add(self, verdicts: Sequence[Verdict]) -> None:
        """Add the answers of all hosts to one snapshot."""
        if isinstance(verdicts, Verdicts):
            group = self._alike.of(verdicts)
        else:
            group = self._group(verdicts)
        group.count += 1
        if self.every_name or len(group.names) < NAMED:
            group.names.append(verdicts[0].snapshot)

    @property
    def count(self) -> int:
        """How many snapshots there are."""
        return sum(group.count for group in self.groups.values())

    @property
    def hosts(self) -> list[str]:
        """The hosts, in the order in which they were named."""
        names: dict[str, None] = {}
        for group in self.groups.values():
            names.update(dict.fromkeys(verdict.host for verdict in group.verdicts))
        return list(names)


STEPS = 6
"""Sentences of advice that an answer about many pairs has at most."""

FLEET = 24
"""Pairs from which on an answer is about a fleet, and not every reason is told at once."""

REASONS = 3
"""Sets of pairs that an answer about a fleet tells of each rule; with notes it tells all."""


class Answer:
    """A fleet's answer laid out for a terminal of `width` columns."""

    def __init__(self, fleet: Fleet, width: int, *, notes: bool = False) -> None:
        self.groups = list(fleet.groups.values())
        self.hosts = fleet.hosts
        self.count = fleet.count
        self.width = width
        self.notes = notes
        self.every_reason = notes or self.count * len(self.hosts) < FLEET
        self.labels = _labels(name for group in self.groups for name in group.names)

    def name(self, group: Group) -> str:
        """Return what to call a group: its only snapshot, or the first one and how many more."""
        first = self.labels[group.names[0]]
        return first if group.count == 1 else f"{first} and {group.count - 1} more like it"

    def print(self, out: Console, by: str) -> None:
        """Print the answer by ``snapshot``, ``host`` or ``rule``."""
        if not self.groups:
            return
        if self.count == 1 and len(self.hosts) == 1:
            self._print_pair(out)
            return
        self.every_reason |= by == "rule"
        for line in self._summary():
            out.print(line)
        if by == "host":
            self._print_hosts(out)
        elif by == "snapshot":
            self._print_matrix(out)
        for line in self._reasons():
            out.print(line)

    def _wrap(self, text: str, indent: str, hanging: str | None = None) -> Iterator[str]:
        """Yield a paragraph's lines; continued lines keep the indentation, words stay whole."""
        yield from textwrap.wrap(
            text,
            max(self.width, 40),
            initial_indent=indent,
            subsequent_indent=indent if hanging is None else hanging,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [indent]

    def _print_pair(self, out: Console) -> None:
        """Print the answer for one snapshot and one host: yes or no first, and why."""
        (verdict,) = self.groups[0].verdicts
        word = cell(verdict)
        yes_or_no = {"ok": "yes", "risk": "yes, with a risk", "?": "unknown"}.get(word, "no")
        head = f"{yes_or_no}: {self.labels[verdict.snapshot]} on {escape(verdict.host)}"
        if word == "fix":
            head += ", but xfast fix makes it restorable and loses nothing"
        if verdict.kvm:
            head += f" ({verdict.kvm})"
        for line in self._wrap(head, "", "  "):
            out.print(line, style=CELLS[word][0])
        for line in self._reasons():
            out.print(line)

    def _summary(self) -> Iterator[str]:
        """Yield what can go nowhere, and what each host takes, as it is and after a fix."""
        totals: Counter[str] = Counter()
        takes: Counter[str] = Counter()
        fixable: Counter[str] = Counter()
        nowhere: list[Group] = []
        for group in self.groups:
            words = {verdict.host: cell(verdict) for verdict in group.verdicts}
            for host, word in words.items():
                totals[word] += group.count
                takes[host] += group.count * (word in ("ok", "risk"))
                fixable[host] += group.count * (word == "fix")
            if not set(words.values()) & {"ok", "risk", "?"}:
                nowhere.append(group)
        parts = ", ".join(f"{totals[word]} {word}" for word in CELLS if totals[word])
        snapshots, hosts = counted(self.count, "snapshot"), counted(len(self.hosts), "host")
        yield f"{snapshots}, {hosts}: {parts}"
        if nowhere:
            clears = sum(
                group.count
                for group in nowhere
                if any(cell(verdict) == "fix" for verdict in group.verdicts)
            )
            helped = f" (xfast fix helps {clears})" if clears else ""
            names = ", ".join(self.name(group) for group in nowhere[:NAMED])
            more = f" and {counted(len(nowhere) - NAMED, 'more kind')}" if nowhere[NAMED:] else ""
            count = sum(group.count for group in nowhere)
            yield from self._wrap(
                f"no host here takes {count} of {self.count}{helped}: {names}{more}", "", "  "
            )
        if len(self.hosts) > 1:
            each = ", ".join(
                f"{escape(host)} {takes[host]}" + (f" (+{fixable[host]})" * bool(fixable[host]))
                for host in self.hosts
            )
            with_fix = " (+ after xfast fix)" if any(fixable.values()) else ""
            yield from self._wrap(f"each host takes{with_fix}: {each}", "", "  ")
        yield ""

    def _print_hosts(self, out: Console) -> None:
        """Print, host by host, how many snapshots have which answer."""
        for host in self.hosts:
            out.print(escape(host), style="bold")
            for word, (style, _) in CELLS.items():
                here = [
                    group
                    for group in self.groups
                    if any(v.host == host and cell(v) == word for v in group.verdicts)
                ]
                if here:
                    names = ", ".join(self.name(group) for group in here)
                    count = sum(group.count for group in here)
                    for line in self._wrap(f"{word} {count}: {names}", "  ", "    "):
                        out.print(line, style=style)
        self._print_legend(out)

    def _print_matrix(self, out: Console) -> None:
        """Print groups by hosts, in blocks of as many hosts as fit into the width."""
        names = [self.name(group) for group in self.groups]
        named = max(map(len, ["snapshot", *names]))
        hosts = [escape(host) for host in self.hosts]
        spelled = named + sum(len(host) + 2 for host in hosts) <= self.width
        titles = hosts if spelled else [f"[{i}]" for i in range(1, len(hosts) + 1)]
        widths = [max(len(title), 4) + 2 for title in titles]
        label = min(named, max(self.width - sum(widths), self.width * 3 // 5, 24))
        start = 0
        while start < len(hosts):
            end, used = start, label
            while end < len(hosts) and (end == start or used + widths[end] <= self.width):
                used += widths[end]
                end += 1
            self._print_block(out, names, titles, widths, slice(start, end), label)
            start = end
        if not spelled:
            for title, host in zip(titles, hosts, strict=True):
                out.print(f"{title} {host}")
        self._print_legend(out)

    def _print_block(
        self,
        out: Console,
        names: Sequence[str],
        titles: Sequence[str],
        widths: Sequence[int],
        block: slice,
        label: int,
    ) -> None:
        """Print the columns of some hosts; a name that is too long gets a line of its own."""
        from rich.text import Text

        head = "".join(
            "  " + title.ljust(width - 2)
            for title, width in zip(titles[block], widths[block], strict=True)
        )
        out.print(("snapshot".ljust(label) + head).rstrip(), style="bold")
        for name, group in zip(names, self.groups, strict=True):
            if len(name) > label:
                out.print(name)
                name = ""
            line = Text(name.ljust(label))
            for verdict, width in zip(group.verdicts[block], widths[block], strict=True):
                word = cell(verdict)
                line.append("  " + word.ljust(width - 2), style=CELLS[word][0])
            line.rstrip()
            out.print(line)

    def _print_legend(self, out: Console) -> None:
        """Print what the words mean that the matrix uses, and what a real KVM said."""
        used = {cell(verdict) for group in self.groups for verdict in group.verdicts}
        out.print()
        for word, (style, meaning) in CELLS.items():
            if word in used:
                for line in self._wrap(f"{word:<5} {meaning}", "", " " * 6):
                    out.print(line, style=style)
        for group in self.groups:
            for verdict in group.verdicts:
                if verdict.kvm:
                    text = f"{self.name(group)} on {escape(verdict.host)}: {verdict.kvm}"
                    for line in self._wrap(text, "", "  "):
                        out.print(line)

    def _reasons(self) -> Iterator[str]:
        """Yield the findings by rule: each text once, and the pairs that it is about."""
        about: dict[str, dict[_Text, dict[str, dict[str, None]]]] = {}
        refs: dict[str, dict[str, None]] = {}
        for group in self.groups:
            for verdict in group.verdicts:
                for finding in verdict.findings:
                    if finding.severity != "note" or self.notes:
                        pairs = about.setdefault(finding.code, {}).setdefault(_Text(finding), {})
                        pairs.setdefault(verdict.host, {})[self.name(group)] = None
                        refs.setdefault(finding.code, {})[finding.ref] = None
        for code in (code for code in RULES if code in about):
            yield ""
            yield from self._wrap(f"{code}: {RULES[code].title}", "", "  ")
            told = list(_together(about[code]).items())
            least = len(told) if self.every_reason else REASONS
            for where, texts in told[:least]:
                for text in texts:
                    yield from self._wrap(text, "  ", "    ")
                for line in where.split("\n") if self.count > 1 or len(self.hosts) > 1 else []:
                    yield from self._wrap(line, "    in ", "      ")
            if told[least:]:
                rest = sum(len(texts) for _, texts in told[least:])
                yield f"  and {counted(rest, 'more reason')} of {code} (-v or --by rule: all)"
            for ref in refs[code]:
                yield from self._wrap(f"source: {ref}", "    ", "      ")
        yield from self._next()

    def _next(self) -> Iterator[str]:
        """Yield what to do next, each sentence once, and of one pair what the VMM will print."""
        verdicts = [verdict for group in self.groups for verdict in group.verdicts]
        if len(verdicts) == 1 and verdicts[0].failure:
            failure = verdicts[0].failure
            yield ""
            yield f"first to fail: {failure.call} ({failure.error}); what the VMM prints then:"
            for program, text in failure.texts(self.form(verdicts[0])).items():
                yield from self._wrap(f"{program}: {text}", "  ", "    ")
        about: dict[str, dict[str, int]] = {}
        for group in self.groups:
            verdicts = _worth_advice(group.verdicts)
            for step in dict.fromkeys(s for one in verdicts for s in next_steps(one)):
                about.setdefault(step, {})[self.name(group)] = group.count
        steps: dict[str, list[str]] = {}
        most_first = sorted(about.items(), key=lambda item: -sum(item[1].values()))
        for step, groups in most_first:
            steps.setdefault(self._for(groups), []).append(step)
        if steps:
            yield ""
        for names, some in list(steps.items())[:STEPS]:
            if names:
                yield from self._wrap(f"next: {names}: {' '.join(some)}", "", "  ")
            for step in some if not names else ():
                yield from self._wrap(f"next: {step}", "", "  ")
        if rest := sum(map(len, list(steps.values())[STEPS:])):
            text = f"next: {counted(rest, 'more sentence')}; xfast check SNAPSHOT --host HOST"
            yield from self._wrap(f"{text} gives those for one pair", "", "  ")

    def _for(self, groups: Mapping[str, int]) -> str:
        """Return for which snapshots a piece of advice is, where there are others as well."""
        if len(self.groups) == 1:
            return ""
        shown = ", ".join(list(groups)[:2])
        rest = sum(list(groups.values())[2:])
        return f"for {shown}" + (f" and {rest} more" if rest else "")

    def form(self, verdict: Verdict) -> str:
        """Return which VMM's format the snapshot has, where its producer tells."""
        asked = verdict.judgement.asked
        producers = {part.state.producer for part in asked[0].parts} if asked else set()
        return "qemu" if producers == {"qemu-kvm"} else ""


class _Text(tuple[str, str, str]):
    """What a finding says: its component, its weight and the sentence."""

    __slots__ = ()

    def __new__(cls, finding: Finding) -> _Text:
        fix = "" if finding.fix == "none" else f", {finding.fix} fix"
        return super().__new__(cls, (finding.component, finding.severity + fix, finding.why))


def _together(about: Mapping[_Text, Mapping[str, Mapping[str, None]]]) -> dict[str, list[str]]:
    """Return {pairs: texts}; texts that differ in nothing but the component become one."""
    names: dict[str, dict[tuple[str, str], list[str]]] = {}
    for (component, weight, why), hosts in about.items():
        template = why.replace(component, "\0", 1) if component else why
        alike = names.setdefault(_pairs(hosts), {}).setdefault((weight, template), [])
        alike.append(component)
    return {
        where: [
            escape(f"{weight}: {template.replace(chr(0), ', '.join(some))}")
            for (weight, template), some in texts.items()
        ]
        for where, texts in names.items()
    }


def _worth_advice(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Return those answers to one snapshot that advice can better.

    Where some host takes it, nobody is told to give data up for the others. A fix that loses
    nothing is always worth a word, and so is a missing fact while no host is known to take it.
    """
    words = {cell(verdict) for verdict in verdicts}
    best = next(word for word in ("ok", "risk", "fix", "?", "no") if word in words)
    wanted = {best, "fix"} | ({"?"} if best == "fix" else set())
    return [verdict for verdict in verdicts if cell(verdict) in wanted]


def _pairs(hosts: Mapping[str, Iterable[str]]) -> str:
    """Say which snapshots on which hosts, a line each; hosts with the same snapshots together."""
    together: dict[tuple[str, ...], list[str]] = {}
    for host, snapshots in hosts.items():
        together.setdefault(tuple(sorted(snapshots)), []).append(escape(host))
    lines = []
    for some, names in together.items():
        more = f" and {len(some) - NAMED} more" if some[NAMED:] else ""
        lines.append(f"{', '.join(some[:NAMED])}{more} on {', '.join(names)}")
    return "\n".join(lines)


def _labels(paths: Iterable[str]) -> dict[str, str]:
    """Return what to call each path: without the folder that all of them share."""
    names = list(dict.fromkeys(paths))
    parents = {os.path.dirname(name) for name in names}
    shared = os.path.commonpath(parents) if len(names) > 1 and "" not in parents else ""
    return {name: escape(os.path.relpath(name, shared) if shared else name) for name in names}
