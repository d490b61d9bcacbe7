"""``xfast fix``: plan, show the plan, write the repaired snapshot."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from itertools import groupby
from typing import Any, TextIO

from xfast.cli.arguments import (
    BLOCKED,
    OK,
    UNJUDGED,
    complain,
    fail,
    reading_arguments,
    snapshots_of,
)
from xfast.errors import XfastError, printable
from xfast.hosts import resolve
from xfast.report.tally import Tally
from xfast.snapshots import walk
from xfast.xsave.features import parse_component

EPILOG = """\
Only what loses nothing goes by itself: components that are absent, or hold their init value or
Linux's default (PKRU 0x55555554). A KVM_SET_XSAVE without the PKRU bit leaves the vCPU's PKRU as
it was; it does not reset it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.epilog = EPILOG
    reading_arguments(parser)
    parser.add_argument(
        "--host", required=True, metavar="HOST[@KERNEL]", help="the host that is to restore it"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("-o", "--output", metavar="OUT", help="new file, or a directory for it")
    where.add_argument("--in-place", action="store_true", help="replace the snapshot itself")
    where.add_argument("--dry-run", action="store_true", help="show the plan, write nothing")
    parser.add_argument("--backup", action="store_true", help="keep the old one as SNAPSHOT.orig")
    repair_arguments(parser)
    parser.add_argument("--record", metavar="FILE", help="change record (default OUT.xfast.json)")
    parser.add_argument("--json", action="store_true", help="print the plans as JSON")


def repair_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say what a repair may do."""
    parser.add_argument(
        "--drop",
        action="append",
        default=[],
        type=_component,
        metavar="COMPONENT",
        help="drop this one as well",
    )
    parser.add_argument(
        "--even-if-live", action="store_true", help="give up the data of --drop where live"
    )
    parser.add_argument("--level", default="xstate", help="what the host is asked for; see check")


def _component(word: str) -> str:
    try:
        parse_component(word)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None
    return word


def run(args: argparse.Namespace) -> int:
    """Run the verb; return the exit code."""
    if args.snapshots == ["-"] and args.output == "-":
        from xfast.cli.filter import pass_through

        return pass_through(args)
    _require_consistent(args)
    host = resolve(args.host)
    if args.in_place:
        from xfast.store.rewrite import recover

        for path in args.snapshots:
            if os.path.isfile(path) and recover(path):
                complain(f"{path}: undid an edit that was interrupted")
    tally = Tally()
    rows: list[dict[str, Any]] = []
    for path, snapshots in groupby(snapshots_of(args, tally), key=lambda one: one.path):
        try:
            rows += _fix(path, list(snapshots), host, args)
        except XfastError as problem:
            fail(tally, path, problem)
    if args.json:
        json.dump({"schema": "xfast/1", "plans": rows}, sys.stdout, indent=1)
        print()
    words = {row["after"] for row in rows}
    if "incompatible" in words:
        return BLOCKED
    return UNJUDGED if tally.problems or "unknown" in words else OK


def _require_consistent(args: argparse.Namespace) -> None:
    if not (args.output or args.in_place or args.dry_run):
        raise XfastError("fix: got no place for the result, needed -o OUT, --in-place or --dry-run")
    if args.backup and not args.in_place:
        raise XfastError("fix: got --backup, needed --in-place with it")
    if "-" in args.snapshots:
        raise XfastError("fix: got standard input, needed a file, or -o - with it (a filter)")
    if args.output == "-":
        raise XfastError("fix: got -o -, needed a file: the result is read back before it is named")
    paths = list(walk(args.snapshots))
    twice = [path for path, count in Counter(map(os.path.realpath, paths)).items() if count > 1]
    if twice:
        raise XfastError(f"fix: got {printable(twice[0])} more than once")
    if args.record and len(paths) > 1:
        raise XfastError(f"fix: got one --record for {len(paths)} snapshots, needed one snapshot")


def _fix(path: str, snapshots: list[Any], host: Any, args: argparse.Namespace) -> list[Any]:
    """Plan, show and apply the repair of one file; return its rows of the answer."""
    from xfast.repair.amend import apply
    from xfast.repair.plan import plan_fix

    plans = [
        plan_fix(one, host, drop=args.drop, even_if_live=args.even_if_live, policy=args.level)
        for one in snapshots
    ]
    blocked = any(plan.left for plan in plans)
    output = args.output
    if output and output.endswith("/") and not os.path.isdir(output) and not os.path.isdir(path):
        raise XfastError(f"{output}: no such folder; needed one that exists, or a file's name")
    if output and os.path.isdir(output):
        output = os.path.join(output, os.path.basename(path.rstrip("/")))
    if not args.json:
        for plan in plans:
            print_plan(plan, sys.stdout)
    written = ""
    if not blocked and not args.dry_run:
        limit = {"expand_limit": args.expand_limit} if args.expand_limit else {}
        how = {"in_place": args.in_place, "backup": args.backup, "record": args.record}
        record = apply(plans, output, **how, **limit)
        written = (output or path) if record else ""
        if not args.json and (written or output):
            print(f"  wrote {printable(written)}" if written else "  nothing was written")
    return [
        {
            "snapshot": path,
            "host": host.name,
            "before": plan.before.verdict,
            "after": plan.after.verdict,
            "changes": [change.as_json() for change in plan.changes],
            "left": [finding.as_json() for finding in plan.left],
            "notes": list(plan.notes),
            "written": written,
        }
        for plan in plans
    ]


def print_plan(plan: Any, out: TextIO) -> None:
    """Print a plan for people."""
    who = printable(f"{plan.snapshot.path} on {plan.host.name}")
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
        print(f"  note: {note}", file=out)
    for finding in plan.after.findings:
        if finding.open:
            where = f"vCPU {finding.vcpu}: {finding.code}"
            print(f"  stays unknown: {where}: {finding.why}", file=out)
    for finding in plan.left:
        lossy = f"; --drop {finding.component} --even-if-live gives the data up"
        print(
            f"  still blocks: vCPU {finding.vcpu}: {finding.code}: {finding.why}"
            + (lossy if finding.fix == "lossy" else ""),
            file=out,
        )
