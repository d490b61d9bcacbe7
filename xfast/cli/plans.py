"""What fix and filter share: the options of a repair, and its plan for people."""

from __future__ import annotations

import argparse
from typing import Any, TextIO

from xfast.errors import printable
from xfast.xsave.features import parse_component


def repair_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say what a repair may do."""
    parser.add_argument(
        "--drop",
        action="append",
        default=[],
        type=_component,
        metavar="COMPONENT",
        help="drop this component as well, where no data are lost; may be repeated",
    )
    parser.add_argument(
        "--even-if-live",
        action="store_true",
        help="let --drop give up live data; the change record keeps them",
    )
    parser.add_argument(
        "--level", default="xstate", help="how much to ask of the host, as in xfast check"
    )


def _component(word: str) -> str:
    try:
        parse_component(word)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None
    return word


def print_plan(plan: Any, out: TextIO) -> None:
    """Print a plan for people."""
    who = printable(f"{plan.snapshot.name} on {plan.host.name}")
    print(f"{who}: {plan.before.verdict}, then {plan.after.verdict}", file=out)
    for change in plan.changes:
        what = f"{change.component} " if change.component else ""
        held = f" ({change.state})" if change.state else ""
        print(
            f"  vCPU {change.vcpu}: {what}{change.field} {change.before} -> {change.after}{held}"
            f"\n    {change.rule or '--drop'}: {change.why}",
            file=out,
        )
    if not plan.changes:
        print("  nothing to change", file=out)
    for note in plan.notes:
        print(printable(f"  note: {note}"), file=out)
    for finding in plan.after.findings:
        if finding.open:
            where = f"vCPU {finding.vcpu}: {finding.code}"
            print(printable(f"  stays unknown: {where}: {finding.why}"), file=out)
    for finding in plan.left:
        where = f"vCPU {finding.vcpu}: {finding.code}"
        print(printable(f"  still blocks: {where}: {finding.why}"), file=out)
    if plan.ransom:
        words = " ".join(f"--drop {name}" for name in plan.ransom)
        print(f"  {words} --even-if-live gives the data up; the host takes the rest", file=out)
