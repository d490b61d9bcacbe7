"""What a scan's dataset says in sum: groups of snapshots, hosts, rules, populations.

Worked out in one pass over the snapshots' rows; what is kept grows with the classes, not with the
snapshots.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from xfast.errors import XfastError
from xfast.fleet.dataset import tables
from xfast.judge.rules import RULES

NAMED = 20
"""How many snapshots of a group, or inputs that were not judged, are named."""

WORDS = ("ok", "risk", "fix", "no", "?")
"""The words of a matrix, as `xfast check` has them."""


@dataclass
class Group:
    """The snapshots of a class: what the hosts answer, how many they are, and some names."""

    name: str
    answers: list[dict[str, Any]]
    count: int = 0
    names: list[str] = field(default_factory=list)

    @property
    def words(self) -> list[str]:
        """The word of the matrix for each host."""
        return [word_of(answer) for answer in self.answers]

    @property
    def nowhere(self) -> bool:
        """Whether no host takes these snapshots as they are, and none may."""
        return not set(self.words) & {"ok", "risk", "?"}


@dataclass
class Reason:
    """A finding's text: where it was found, and on how many snapshots."""

    code: str
    component: str
    severity: str
    fix: str
    why: str
    snapshots: int = 0
    hosts: set[str] = field(default_factory=set)
    example: str = ""


@dataclass
class Summary:
    """All that a report shows. Counts are of snapshots, populations of vCPUs."""

    manifest: dict[str, Any]
    groups: list[Group]
    reasons: list[Reason]
    failed: list[tuple[str, str]]
    failed_count: int
    xstate_bv: Counter[int]
    layouts: Counter[str]
    formats: Counter[str]

    @property
    def hosts(self) -> list[str]:
        """The hosts, in the order in which they were asked."""
        return list(self.manifest["hosts"])

    @property
    def count(self) -> int:
        """How many snapshots were judged."""
        return sum(group.count for group in self.groups)

    def by_host(self) -> dict[str, Counter[str]]:
        """Return, for each host, how many snapshots have which word."""
        found: dict[str, Counter[str]] = {host: Counter() for host in self.hosts}
        for group in self.groups:
            for host, word in zip(self.hosts, group.words, strict=True):
                found[host][word] += group.count
        return found


def word_of(answer: dict[str, Any]) -> str:
    """Return the word of the matrix for a row of ``verdicts``."""
    if answer["verdict"] == "unknown":
        return "?"
    if answer["verdict"] == "incompatible":
        return "fix" if answer["fixable"] == "safe" else "no"
    return "risk" if answer["risky"] else "ok"


def summarise(folder: str) -> Summary:
    """Sum up the results of a scan.

    Raises
    ------
    XfastError
        If the folder holds no finished scan.
    """
    verdicts, findings = tables(folder, "verdicts", "findings")
    manifest = read_manifest(folder)
    answers: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in verdicts.to_pylist():
        answers[row["class"]][row["host"]] = row
    groups = {
        name: Group(name, [rows[host] for host in manifest["hosts"] if host in rows])
        for name, rows in answers.items()
    }
    summary = Summary(manifest, [], [], [], 0, Counter(), Counter(), Counter())
    _count(folder, groups, summary)
    summary.groups = sorted(groups.values(), key=lambda group: (-group.count, group.name))
    summary.reasons = list(_reasons(findings.to_pylist(), groups))
    return summary


def read_manifest(folder: str) -> dict[str, Any]:
    """Return what a finished scan says of itself.

    Raises
    ------
    XfastError
        If the folder holds none.
    """
    try:
        with open(os.path.join(folder, "manifest.json"), "rb") as file:
            manifest: dict[str, Any] = json.loads(file.read())
        if not isinstance(manifest["hosts"], list):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise XfastError(f"{folder}: expected a finished scan (manifest.json), got none") from None
    return manifest


COUNTED = ("snapshot", "part", "class", "error", "xstate_bv", "layout", "format", "count")


def _count(folder: str, groups: dict[str, Group], summary: Summary) -> None:
    """Go through the snapshots' rows once; a snapshot's vCPUs lie one behind the other."""
    from pyarrow import dataset

    rows = dataset.dataset(os.path.join(folder, "snapshots"), format="parquet")
    last: tuple[Any, Any] = ("", "")
    for batch in rows.to_batches(columns=list(COUNTED)):
        columns = (batch.column(name).to_pylist() for name in COUNTED)
        for snapshot, part, group_name, error, xstate_bv, layout, form, alike in zip(
            *columns, strict=True
        ):
            if error is not None:
                summary.failed_count += 1
                if len(summary.failed) < NAMED:
                    summary.failed.append((snapshot, error))
                continue
            summary.xstate_bv[xstate_bv] += alike
            summary.layouts[layout] += alike
            if (snapshot, part) == last or group_name not in groups:
                continue
            last = snapshot, part
            summary.formats[form] += 1
            group = groups[group_name]
            group.count += 1
            if len(group.names) < NAMED:
                group.names.append(f"{snapshot}#{part}" if part else snapshot)


def _reasons(findings: list[dict[str, Any]], groups: dict[str, Group]) -> Iterator[Reason]:
    """Yield the findings that are no notes: by rule, those of most snapshots first."""
    found: dict[tuple[str, ...], Reason] = {}
    seen: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for row in findings:
        if row["severity"] == "note" or row["class"] not in groups:
            continue
        key = tuple(row[name] for name in ("code", "component", "severity", "fix", "why"))
        reason = found.setdefault(key, Reason(*key))
        reason.hosts.add(row["host"])
        group = groups[row["class"]]
        if group.name not in seen[key]:
            seen[key].add(group.name)
            reason.snapshots += group.count
            reason.example = reason.example or (group.names[0] if group.names else "")
    order = {code: i for i, code in enumerate(RULES)}
    yield from sorted(
        found.values(), key=lambda one: (order.get(one.code, 99), -one.snapshots, one.why)
    )
