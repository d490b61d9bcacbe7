"""What a run has come to: verdicts by kind, inputs that could not be judged, files passed over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from xfast.judge.verdict import PerClass, Verdict

VERDICTS = ("identical", "superset", "incompatible", "unknown")


class Problem(NamedTuple):
    """An input that could not be judged: its name, and the one line that says why."""

    path: str
    message: str


class Tally:
    """Counts verdicts and problems as they pass, for the closing line and the exit code."""

    def __init__(self) -> None:
        self.words: Counter[str] = Counter()
        self.fixable = 0
        self.risky = 0
        self.contradicted = False
        self.skipped = 0
        self.problems: list[Problem] = []
        self._alike: PerClass[Tally] | None = None

    def count(self, verdict: Verdict) -> None:
        """Count a verdict."""
        self.words[verdict.verdict] += 1
        self.fixable += verdict.verdict == "incompatible" and verdict.fixable == "safe"
        self.risky += verdict.risky
        self.contradicted |= verdict.kvm is not None and verdict.kvm.doubtful

    def count_all(self, verdicts: Sequence[Verdict]) -> None:
        """Count the verdicts of all hosts for a snapshot."""
        from xfast.judge.verdict import PerClass, Verdicts  # which not every verb needs

        if self._alike is None:
            self._alike = PerClass(_of_class)
        alike = self._alike.of(verdicts) if isinstance(verdicts, Verdicts) else _of_class(verdicts)
        self.words.update(alike.words)
        self.fixable += alike.fixable
        self.risky += alike.risky
        self.contradicted |= alike.contradicted

    def closing_line(self) -> str:
        """Say how many pairs of each kind there were, and what was not judged."""
        parts = [f"{self.words[word]} {word}" for word in VERDICTS if self.words[word]]
        total = self.words.total()
        text = f"{counted(total, 'pair')}: " + (", ".join(parts) or "none judged")
        text += f"; {self.fixable} can be fixed without loss" if self.fixable else ""
        text += f"; {self.risky} with a risk" if self.risky else ""
        if self.problems:
            text += f"; {counted(len(self.problems), 'input')} not judged"
        if self.skipped:
            text += f"; {counted(self.skipped, 'other file')} skipped"
        return text


def counted(number: int, noun: str) -> str:
    """Return a number and its noun: ``1 snapshot``, ``3,000 snapshots``."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _of_class(verdicts: Sequence[Verdict]) -> Tally:
    """Return what one snapshot of a class adds."""
    tally = Tally()
    for verdict in verdicts:
        tally.count(verdict)
    return tally
