"""What stands between the snapshots of a scan and a pool of hosts that should take them all.

A snapshot fits a pool when every host takes it as it is. Of the others, a repair clears those that
are `fix` wherever they are refused. What is left are *obstacles*: the guests that have to be
retired, or the hosts that have to leave, before the pool is one.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from xfast.errors import XfastError
from xfast.fleet.dataset import tables
from xfast.fleet.summary import read_manifest, word_of

REMEDIES = {"fix": "fix", "no": "retire", "?": "unknown"}
"""What a word of the matrix asks for; the later one of a class counts."""


@dataclass
class Obstacle:
    """Snapshots that the same things keep from the same hosts.

    Attributes
    ----------
    causes : tuple of str
        Components, or rule codes where no component is to blame.
    hosts : tuple of str
        The hosts of the pool that refuse them, or about which nobody knows.
    remedy : str
        ``fix``, ``retire`` or ``unknown``.
    names : list of str
        The snapshots.
    """

    causes: tuple[str, ...]
    hosts: tuple[str, ...]
    remedy: str
    names: list[str] = field(default_factory=list)


@dataclass
class Pool:
    """How many snapshots a pool takes, and what keeps the others out.

    Attributes
    ----------
    count, fit, failed : int
        Snapshots that were judged, that every host takes as they are, and inputs not judged.
    obstacles : list of Obstacle
        Those of most snapshots first.
    without : dict of str to int
        How many snapshots would fit, as they are or repaired, if this host left the pool.
    """

    hosts: list[str]
    count: int
    fit: int
    failed: int
    obstacles: list[Obstacle]
    without: dict[str, int]

    def held_by(self, remedy: str) -> int:
        """Return how many snapshots have this remedy."""
        return sum(len(one.names) for one in self.obstacles if one.remedy == remedy)

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "count": self.count,
            "fit": self.fit,
            "fix": self.held_by("fix"),
            "retire": self.held_by("retire"),
            "unknown": self.held_by("unknown"),
            "failed": self.failed,
            "obstacles": [
                {
                    "causes": list(one.causes),
                    "hosts": list(one.hosts),
                    "remedy": one.remedy,
                    "count": len(one.names),
                    "snapshots": one.names,
                }
                for one in self.obstacles
            ],
            "without": self.without,
        }


def hold_against(folder: str, hosts: Sequence[str]) -> Pool:
    """Hold the snapshots of a scan against a pool of hosts.

    Raises
    ------
    XfastError
        If the folder holds no finished scan, or the scan did not ask one of these hosts.
    """
    asked = read_manifest(folder)["hosts"]
    strange = [host for host in hosts if host not in asked]
    if strange:
        raise XfastError(
            f"{folder}: expected a scan that asked {strange[0]}, got one that asked "
            f"{', '.join(asked)}"
        )
    verdicts, findings = tables(folder, "verdicts", "findings")
    words: dict[str, dict[str, str]] = defaultdict(dict)
    for row in verdicts.to_pylist():
        if row["host"] in hosts:
            words[row["class"]][row["host"]] = word_of(row)
    causes: dict[tuple[str, str, bool], set[str]] = defaultdict(set)
    for row in findings.to_pylist():
        if row["severity"] == "blocks":
            blamed = row["component"].split("+") if row["component"] else [row["code"]]
            causes[row["class"], row["host"], row["fix"] == "safe"].update(blamed)
    pool = Pool(list(hosts), 0, 0, 0, [], dict.fromkeys(hosts, 0))
    found: dict[tuple[Any, ...], Obstacle] = {}
    for name, group in _snapshots(folder):
        if group is None:
            pool.failed += 1
            continue
        answers = words[group]
        pool.count += 1
        for host in hosts:
            others = [word for other, word in answers.items() if other != host]
            pool.without[host] += _worst(others) in (None, "fix")
        remedy = _worst(answers.values())
        if remedy is None:
            pool.fit += 1
            continue
        refused = tuple(h for h in hosts if REMEDIES.get(answers[h]) == remedy)
        blamed = set().union(*(causes[group, host, remedy == "fix"] for host in refused))
        key = (tuple(sorted(blamed)), refused, remedy)
        found.setdefault(key, Obstacle(*key)).names.append(name)
    pool.obstacles = sorted(found.values(), key=lambda one: (-len(one.names), one.causes))
    return pool


def _worst(words: Iterable[str]) -> str | None:
    """Return the remedy that a snapshot with these answers needs; None if it fits."""
    needed = {REMEDIES[word] for word in words if word in REMEDIES}
    return next((one for one in ("retire", "unknown", "fix") if one in needed), None)


def _snapshots(folder: str) -> Iterator[tuple[str, str | None]]:
    """Yield each snapshot's name and class; no class if it was not judged."""
    from pyarrow import dataset

    rows = dataset.dataset(os.path.join(folder, "snapshots"), format="parquet")
    last: tuple[Any, Any] | None = None
    for batch in rows.to_batches(columns=["snapshot", "part", "class", "error"]):
        columns = (batch.column(i).to_pylist() for i in range(4))
        for snapshot, part, group, error in zip(*columns, strict=True):
            if error is None and (snapshot, part) == last:
                continue
            last = snapshot, part
            yield (f"{snapshot}#{part}" if part else snapshot), None if error else group
