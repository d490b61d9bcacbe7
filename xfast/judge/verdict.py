"""The answer's values: Policy, Finding, Verdict. Their field names are stable.

A verdict is little more than two names and a Judgement, which all pairs of a kind share: a
scheduler that asks about a hundred hosts gets a hundred verdicts and a handful of judgements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from xfast.errors import PolicyError, escape
from xfast.judge.rules import RULES

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
            raise PolicyError(f"level: got {self.level!r}, needed one of: {', '.join(LEVELS)}")
        unknown = self.ignore - RULES.keys()
        if unknown:
            raise PolicyError(
                f"ignore: got {', '.join(sorted(unknown))}, needed some of: {', '.join(RULES)}"
            )

    def asks(self, level: str) -> bool:
        """Return whether this policy asks at least what `level` asks."""
        return LEVELS.index(self.level) >= LEVELS.index(level)


@dataclass(frozen=True, slots=True)
class Finding:
    """One reason. The fields are those of the JSON answer, and stable.

    `vcpu` is the vCPU's number or the thread's id; `fix` is what ``xfast fix`` can do about it.
    `open` marks a finding that leaves the verdict unknown: a fact is missing. In a stack of
    areas, `vcpu` is the first that it is about, and `count` says how many there are.
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

    def of(self, vcpu: int, count: int = 1) -> Finding:
        """Return the same finding about other vCPUs."""
        if (vcpu, count) == (self.vcpu, self.count):
            return self
        return replace(self, vcpu=vcpu, count=count)

    def as_json(self) -> dict[str, Any]:
        """Return the finding as the JSON answer has it: with `count` where there are several."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        del fields["open"]
        if self.count == 1:
            del fields["count"]
        return fields


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a verdict says, whatever the snapshot and the host are called."""

    verdict: str
    fixable: str
    findings: tuple[Finding, ...]


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
        return said if self.foretold else f"{said}, not as foretold"


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
        return not any(f.severity == "blocks" and RULES[f.code].refuses_set for f in self.findings)

    def __str__(self) -> str:
        return f"{self.snapshot} on {self.host}: {self.verdict}"

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
