"""What a worker does: read and judge one chunk of inputs, and answer with plain rows.

A pure function of its arguments and of the files. An input that can't be judged is a row with the
reason. The answers of all hosts to one snapshot are its *class*: a fleet has few, so each is sent
once a chunk, under a name made from its content.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from xfast.errors import XfastError, escape, printable
from xfast.fleet.inputs import is_url
from xfast.hosts.description import to_json
from xfast.hosts.model import Host
from xfast.judge.judgement import check
from xfast.judge.verdict import PerClass, Policy, Verdict, Verdicts
from xfast.report.rows import layout_name
from xfast.snapshots.bytes.source import EXPAND_LIMIT
from xfast.snapshots.model import Snapshot, Vcpu, classes_of
from xfast.snapshots.registry import read
from xfast.version import __version__
from xfast.xsave.area import classify, headers
from xfast.xsave.layout import Layout

if TYPE_CHECKING:
    from xfast.fleet.remote import Remote


class Question(NamedTuple):
    """What is asked of every input of a scan: the hosts, the policy, and how to read.

    `options` are keyword arguments of `xfast.read`: layout, size, expand_limit.
    """

    hosts: tuple[Host, ...]
    policy: Policy
    options: dict[str, Any]

    def packed(self) -> bytes:
        """Return the question as bytes, which go to every worker."""
        return pickle.dumps(self, protocol=5)

    def name(self) -> str:
        """Return a name that depends on what is asked, and on nothing else."""
        asked = {
            "tool": __version__,
            "columns": COLUMNS,
            "hosts": to_json(self.hosts),
            "level": self.policy.level,
            "ignore": sorted(self.policy.ignore),
            "options": {name: repr(value) for name, value in self.options.items()},
        }
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Result:
    """What one chunk has come to.

    Attributes
    ----------
    rows : list of tuple
        One a vCPU, or an input that could not be judged: the columns of `dataset.SNAPSHOTS`.
    classes : dict of str to tuple of Verdict
        The answers that occur, by their names; the verdicts' `snapshot` is empty.
    snapshots, failed : int
        How many snapshots were judged, and how many inputs were not.
    words : dict of str to int
        How many pairs have which verdict.
    """

    rows: list[tuple[Any, ...]] = field(default_factory=list)
    classes: dict[str, tuple[Verdict, ...]] = field(default_factory=dict)
    snapshots: int = 0
    failed: int = 0
    words: dict[str, int] = field(default_factory=dict)


@lru_cache(maxsize=4)
def _question(packed: bytes) -> Question:
    question: Question = pickle.loads(packed)
    return question


def judge(names: Sequence[str], packed: bytes) -> Result:
    """Read and judge the inputs of a chunk.

    Parameters
    ----------
    names : sequence of str
        As `inputs.expand` yields them.
    packed : bytes
        `Question.packed`.
    """
    question = _question(packed)
    result = Result()
    objects = _objects(names)
    limit = question.options.get("expand_limit") or EXPAND_LIMIT
    for name in names:
        try:
            source = next(objects).result().expanded(limit) if is_url(name) else name
            found = read(source, **question.options)
            if not found:
                fail(name, f"{name}: expected a snapshot, got none in it", result)
            for snapshot in found:
                _judge_snapshot(snapshot, question, result)
        except (XfastError, OSError) as problem:
            fail(name, str(problem), result)
        except Exception as problem:  # no input may cost the others their answers
            fail(name, f"failed unexpectedly: {type(problem).__name__}: {problem}", result)
    return result


def _objects(names: Sequence[str]) -> Iterator[Future[Remote]]:
    """Yield the URLs among the names, opened; see `xfast.fleet.remote.fetched`."""
    urls = [name for name in names if is_url(name)]
    if urls:
        from xfast.fleet.remote import fetched

        yield from fetched(urls)


def fail(name: str, message: str, result: Result) -> None:
    """Add an input that could not be judged to a result."""
    result.failed += 1
    text = printable(message).encode("utf-8", "backslashreplace").decode()
    result.rows.append((escape(name), *[None] * (len(COLUMNS) - 2), text))


def _judge_snapshot(snapshot: Snapshot, question: Question, result: Result) -> None:
    """Judge one snapshot, and add a row for each of its vCPUs, or each class of a stack's."""
    answers = _classes.of(check(snapshot, question.hosts, policy=question.policy))
    result.snapshots += 1
    result.classes.setdefault(answers.name, answers.verdicts)
    for word, count in answers.words.items():
        result.words[word] = result.words.get(word, 0) + count
    whole = (
        escape(snapshot.path),
        snapshot.part,
        snapshot.format,
        snapshot.kind,
        snapshot.producer,
        "/".join(snapshot.container),
    )
    for carried in _carried(snapshot):
        result.rows.append((*whole, *carried, answers.name, None))


COLUMNS = (
    "snapshot", "part", "format", "kind", "producer", "container",
    "vcpu", "layout", "layout_source", "size", "xcr0", "xstate_bv", "xcomp_bv", "live", "default",
    "mxcsr", "count", "class", "error",
)  # fmt: skip
"""The columns of a row of `Result`; `count` is how many areas of a stack the row stands for."""


_rows: dict[tuple[Hashable, ...], list[tuple[Any, ...]]] = {}
"""What the vCPUs of snapshots carry that nobody looked into, by `Snapshot.key`."""


def _carried(snapshot: Snapshot) -> list[tuple[Any, ...]]:
    """Return what each vCPU carries, or each class of a stack's: from `vcpu` to `count`."""
    key = snapshot.key
    found = None if key is None else _rows.get(key)
    if found is None:
        found = [(*_row_of(vcpu), count) for vcpu, count in classes_of(snapshot.vcpus)]
        if key is not None:
            if len(_rows) >= PerClass.LIMIT:
                _rows.clear()
            _rows[key] = found
    return found


def _row_of(vcpu: Vcpu) -> tuple[Any, ...]:
    """Return what a vCPU carries: the columns from `vcpu` to `mxcsr`."""
    head = headers(vcpu.area)
    found = classify(vcpu.area, vcpu.layout or Layout(()))
    return (
        vcpu.index,
        layout_name(vcpu),
        vcpu.layout_source,
        len(vcpu.area),
        vcpu.xcr0,
        head.xstate_bv,
        head.xcomp_bv,
        found.live,
        found.default,
        head.mxcsr,
    )


class _Answers(NamedTuple):
    """The answers of all hosts, their name, and how many of them are which word."""

    name: str
    verdicts: tuple[Verdict, ...]
    words: Counter[str]


def _answers_of(verdicts: Verdicts) -> _Answers:
    found = tuple(Verdicts("", verdicts.hosts, verdicts.judgements))
    words = Counter(verdict.verdict for verdict in found)
    return _Answers(_content_name(found), found, words)


_classes = PerClass(_answers_of)


def _content_name(verdicts: Sequence[Verdict]) -> str:
    """Return a name that depends on what the answers say, and on nothing else."""
    answers = [verdict.as_json() for verdict in verdicts]
    text = json.dumps(answers, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def verdict_rows(name: str, verdicts: Sequence[Verdict]) -> Iterator[tuple[Any, ...]]:
    """Yield a class's verdicts: class, host, verdict, fixable, risky, codes."""
    for verdict in verdicts:
        blocking = [f.code for f in verdict.findings if f.severity == "blocks" or f.open]
        yield (
            name,
            escape(verdict.host),
            verdict.verdict,
            verdict.fixable,
            verdict.risky,
            list(dict.fromkeys(blocking)),
        )


def finding_rows(name: str, verdicts: Sequence[Verdict]) -> Iterator[tuple[Any, ...]]:
    """Yield a class's findings: class, host, and the fields of a finding."""
    for verdict in verdicts:
        for finding in verdict.as_json()["findings"]:
            yield name, escape(verdict.host), *(finding.get(field) for field in FINDING)


FINDING = (
    "code", "component", "vcpu", "severity", "snapshot_value", "host_value", "fix", "why", "ref",
)  # fmt: skip
