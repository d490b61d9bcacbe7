"""The answer's values: Policy, Finding, Verdict. Their field names are stable.

A verdict is little more than two names and a Judgement, which all pairs of a kind share: a
scheduler that asks about a hundred hosts gets a hundred verdicts and a handful of judgements.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat
from typing import Any, Generic, NamedTuple, TypeVar, overload

from xfast.errors import PolicyError, escape
from xfast.judge.rules import RULES

T = TypeVar("T")

LEVELS = ("xstate", "fpu", "isa", "strict")
"""How much is asked: live state and XCR0; also every component that the guest was promised;
also its instructions; also state that is present but not live."""


@dataclass(frozen=True)
class Policy:
    """What to ask of a host.

    Parameters
    ----------
    level : str
        One of LEVELS.
    ignore : frozenset of str
        Rule codes whose findings are reported as notes.

    Raises
    ------
    PolicyError
        If the level or a code does not exist.
    """

    level: str = "xstate"
    ignore: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise PolicyError(f"level: expected one of: {', '.join(LEVELS)}, got {self.level!r}")
        unknown = self.ignore - RULES.keys()
        if unknown:
            import difflib

            near = difflib.get_close_matches(min(unknown), RULES, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise PolicyError(
                f"ignore: expected some of: {', '.join(RULES)}, got {', '.join(sorted(unknown))}"
                + hint
            )

    def asks(self, level: str) -> bool:
        """Return whether this policy asks at least what `level` asks."""
        return LEVELS.index(self.level) >= LEVELS.index(level)


@dataclass(frozen=True, slots=True)
class Finding:
    """One reason. The fields are those of the JSON answer, and stable.

    `vcpu` is the vCPU's number or the thread's id; `fix` is what ``xfast fix`` can do about it.
    `open` marks a finding that leaves the verdict unknown: a fact is missing. In a stack of
    areas, `vcpu` is the first that it is about, and `count` says how many there are. `call` is
    the call of KVM that fails for it.
    """

    code: str
    component: str
    vcpu: int
    severity: str
    snapshot_value: str
    host_value: str
    fix: str
    why: str
    ref: str
    open: bool = False
    count: int = 1
    call: str = ""

    def of(self, vcpu: int, count: int = 1) -> Finding:
        """Return the same finding about other vCPUs."""
        if (vcpu, count) == (self.vcpu, self.count):
            return self
        return replace(self, vcpu=vcpu, count=count)

    def as_json(self) -> dict[str, Any]:
        """Return the finding as the JSON answer has it: with `count` where there are several."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        del fields["open"], fields["call"]
        if self.count == 1:
            del fields["count"]
        return fields


class Failure(NamedTuple):
    """The first call of a VMM that fails, its error, and the guest's IA32_XSS."""

    call: str
    error: str
    xss: int = 0

    def texts(self, form: str = "") -> dict[str, str]:
        """Return {program: what it prints}, of those that load snapshots of a format (or all)."""
        from xfast.judge.vmm import texts

        return texts(self.call, form, self.xss)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a verdict says, whatever the snapshot and the host are called."""

    verdict: str
    fixable: str
    findings: tuple[Finding, ...]
    failure: Failure | None = None
    asked: Any = field(default=None, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave out what was asked: it is only needed to find other hosts."""
        return Judgement, (self.verdict, self.fixable, self.findings, self.failure)


class KvmAnswer(NamedTuple):
    """What a real KVM_SET_XSAVE answered for the vCPUs of a snapshot.

    Parameters
    ----------
    accepted : bool or None
        None where KVM could not be asked.
    foretold : bool
        Whether the findings say the same.
    error : str
        The error's name, or why KVM could not be asked.
    vcpu : int or None
        The first vCPU that was refused.
    """

    accepted: bool | None
    foretold: bool = True
    error: str = ""
    vcpu: int | None = None

    @property
    def doubtful(self) -> bool:
        """Whether nothing can be built on the verdict: no answer, or one that contradicts it."""
        return self.accepted is None or not self.foretold

    def __str__(self) -> str:
        if self.accepted is None:
            return f"KVM can't be asked: {self.error}"
        refused = f"KVM refuses ({self.error}, vCPU {self.vcpu})"
        said = "KVM accepts" if self.accepted else refused
        return said if self.foretold else f"{said}, contrary to the prediction"


class Verdict(NamedTuple):
    """The answer for one snapshot and one host.

    Parameters
    ----------
    snapshot, host : str
        Their names.
    judgement : Judgement
        Shared by all pairs of the same kind.
    kvm : KvmAnswer or None
        What this machine's KVM answered, where it was asked.
    """

    snapshot: str
    host: str
    judgement: Judgement
    kvm: KvmAnswer | None = None

    @property
    def verdict(self) -> str:
        """``identical``, ``superset``, ``incompatible`` or ``unknown``."""
        return self.judgement.verdict

    @property
    def fixable(self) -> str:
        """What ``xfast fix`` can make of it: ``safe``, ``lossy`` or ``none``."""
        return self.judgement.fixable

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The reasons, those that block first."""
        return self.judgement.findings

    @property
    def risky(self) -> bool:
        """Whether a finding is risky, whatever the verdict."""
        return any(finding.severity == "risky" for finding in self.findings)

    @property
    def settable(self) -> bool:
        """Whether no finding says that KVM_SET_XSAVE itself would refuse the area."""
        return not any(f.call == "KVM_SET_XSAVE" for f in self.findings)

    @property
    def failure(self) -> Failure | None:
        """The call of the VMM that fails first, and what it prints; None where none does."""
        return self.judgement.failure

    def __str__(self) -> str:
        return f"{self.snapshot} on {self.host}: {self.verdict}"

    def _repr_html_(self) -> str:
        return _table([self])

    def as_json(self) -> dict[str, Any]:
        """Return the verdict as the JSON answer has it."""
        answer = {
            "snapshot": escape(self.snapshot),
            "host": escape(self.host),
            "verdict": self.verdict,
            "fixable": self.fixable,
            "findings": [finding.as_json() for finding in self.findings],
        }
        if self.kvm is not None:
            answer["live"] = str(self.kvm)
        return answer


_verdict = partial(tuple.__new__, Verdict)
"""Verdict._make without its checks."""


class Verdicts(Sequence[Verdict]):
    """The answers to one snapshot, host by host; prints as a table, and draws one in a notebook.

    They are made when somebody asks for one: where a fleet asks about a hundred hosts, what the
    answers share is most often all that counts.

    Parameters
    ----------
    snapshot : str
        Its name.
    hosts : tuple of str
        Their names.
    judgements : tuple of Judgement
        One for each host. Snapshots of one class share the tuple itself.
    """

    __slots__ = ("_made", "hosts", "judgements", "snapshot")

    def __init__(
        self, snapshot: str, hosts: tuple[str, ...], judgements: tuple[Judgement, ...]
    ) -> None:
        self.snapshot = snapshot
        self.hosts = hosts
        self.judgements = judgements
        self._made: list[Verdict] | None = None

    def _verdicts(self) -> list[Verdict]:
        if self._made is None:
            rows = zip(repeat(self.snapshot), self.hosts, self.judgements, repeat(None))
            self._made = list(map(_verdict, rows))
        return self._made

    def __len__(self) -> int:
        return len(self.judgements)

    @overload
    def __getitem__(self, index: int) -> Verdict: ...
    @overload
    def __getitem__(self, index: slice) -> list[Verdict]: ...
    def __getitem__(self, index: int | slice) -> Verdict | list[Verdict]:
        return self._verdicts()[index]

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self._verdicts())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return self._verdicts() == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._verdicts())

    def __str__(self) -> str:
        width = max((len(verdict.host) for verdict in self), default=0)
        return "\n".join(f"{escape(v.host):<{width}}  {v.verdict}" for v in self)

    def _repr_html_(self) -> str:
        return _table(self)


def _table(verdicts: Iterable[Verdict]) -> str:
    """Return verdicts as a table for notebooks."""
    rows = "".join(
        f"<tr><td>{_html(v.snapshot)}</td><td>{_html(v.host)}</td><td>{v.verdict}</td>"
        f"<td>{v.fixable}</td><td>{'<br>'.join(_html(f.why) for f in v.findings)}</td></tr>"
        for v in verdicts
    )
    heads = "".join(f"<th>{name}</th>" for name in ("snapshot", "host", "verdict", "fix", "why"))
    return f"<table><tr>{heads}</tr>{rows}</table>"


class PerClass(Generic[T]):
    """What is worked out once for all snapshots of a class, which share their judgements.

    Parameters
    ----------
    make : callable
        Works it out from the first snapshot's verdicts.
    """

    LIMIT = 10_000
    """How many are kept; a table that is full begins anew."""

    def __init__(self, make: Callable[[Verdicts], T]) -> None:
        self._make = make
        self._found: dict[int, tuple[T, object]] = {}

    def of(self, verdicts: Verdicts) -> T:
        """Return it for the class of these verdicts."""
        key = id(verdicts.judgements)
        found = self._found.get(key)
        if found is None:
            if len(self._found) >= self.LIMIT:
                self._found.clear()
            # The judgements are kept, so that no others can take their place in memory.
            found = self._found[key] = self._make(verdicts), verdicts.judgements
        return found[0]


def _html(text: str) -> str:
    return html.escape(escape(text))
