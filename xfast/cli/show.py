"""``xfast show``: what is in snapshots."""

from __future__ import annotations

import argparse
import json
import sys

from xfast.cli.arguments import EXIT_CODES, OK, UNJUDGED, reading_arguments, snapshots_of
from xfast.report import rows as report
from xfast.report.tally import Tally

EXAMPLES = f"""\
examples:
  xfast show vm.save
  xfast show snapshots/ --registers
  xfast show vm.save --json | jq '.snapshots[].vcpus[].xstate_bv'

{EXIT_CODES}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.epilog = EXAMPLES
    reading_arguments(parser)
    parser.add_argument("--registers", action="store_true", help="print every register as well")
    parser.add_argument("--json", action="store_true", help="print JSON, with the registers")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return the exit code."""
    tally = Tally()
    answers = []
    out = report.console(sys.stdout)
    for snapshot in snapshots_of(args, tally):
        if args.json:
            answers.append(report.snapshot_as_json(snapshot))
        else:
            report.show_text(snapshot, out, registers=args.registers)
    if args.json:
        problems = [report.problem_as_json(problem) for problem in tally.problems]
        answer = {"schema": report.SCHEMA, "snapshots": answers, "errors": problems}
        json.dump(answer, sys.stdout, indent=1)
        print()
    return UNJUDGED if tally.problems else OK
