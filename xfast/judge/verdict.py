"""The answer's values: Policy, Finding, Verdict. Their field names are stable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    `open` marks a finding that leaves the verdict unknown: a fact is missing.
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

    def as_json(self) -> dict[str, Any]:
        """Return the finding as the JSON answer has it."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        del fields["open"]
        return fields


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer for one snapshot and one host.

    `verdict` is ``identical``, ``superset``, ``incompatible`` or ``unknown``; `fixable` is what
    ``xfast fix`` can make of it: ``safe``, ``lossy`` or ``none``; `live` what a real
    KVM_SET_XSAVE answered, where one was asked.
    """

    snapshot: str
    host: str
    verdict: str
    fixable: str
    findings: tuple[Finding, ...]
    live: str = ""

    @property
    def settable(self) -> bool:
        """Whether no finding says that KVM_SET_XSAVE itself would refuse the area."""
        return not any(f.severity == "blocks" and RULES[f.code].refuses_set for f in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Return the verdict as the JSON answer has it."""
        answer = {
            "snapshot": escape(self.snapshot),
            "host": escape(self.host),
            "verdict": self.verdict,
            "fixable": self.fixable,
            "findings": [finding.as_json() for finding in self.findings],
        }
        if self.live:
            answer["live"] = self.live
        return answer
