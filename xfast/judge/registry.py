"""Where a rule's function is registered, and how it builds a finding."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from xfast.judge.rules import RULES
from xfast.judge.subject import State
from xfast.judge.target import Target
from xfast.judge.verdict import Finding, Policy
from xfast.xsave.features import name_of

RuleFunction = Callable[[State, Target, Policy], Iterator[Finding]]

FUNCTIONS: dict[str, RuleFunction] = {}
"""{rule code: its function}, each there once: a rule without one can't be imported."""


def judges(code: str) -> Callable[[RuleFunction], RuleFunction]:
    """Register the function of a rule.

    Raises
    ------
    ImportError
        If there is no such rule, or it has a function already.
    """
    if code not in RULES or code in FUNCTIONS:
        problem = "has two functions" if code in RULES else "is not in the rule table"
        raise ImportError(f"rule {code} {problem}")

    def register(function: RuleFunction) -> RuleFunction:
        FUNCTIONS[code] = function
        return function

    return register


def finding_of(
    code: str,
    severity: str,
    why: str,
    *,
    snapshot: str,
    host: str,
    component: int | str = "",
    fix: str = "none",
    ref: str = "",
    open: bool = False,
    call: str | None = None,
) -> Finding:
    """Build a finding, of no vCPU yet.

    `component` is a name or a number, `snapshot` and `host` are both sides' values; `ref` is the
    rule's where it is empty, and `call` the rule's where the finding blocks, if not given.
    """
    name = name_of(component) if isinstance(component, int) else component
    rule = RULES[code]
    if call is None:
        call = rule.call if severity == "blocks" else ""
    ref = ref or rule.ref
    return Finding(code, name, 0, severity, snapshot, host, fix, why, ref, open, call=call)
