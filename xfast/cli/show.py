"""``xfast show``: what is in snapshots."""

from __future__ import annotations

import argparse
import json
import sys

from xfast.cli.arguments import OK, TROUBLE, reading_arguments, snapshots_of
from xfast.report import rows as report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    reading_arguments(parser)
    parser.add_argument("--registers", action="store_true", help="print the registers too")
    parser.add_argument("--json", action="store_true", help="print JSON, registers included")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return the exit code."""
    failed: list[str] = []
    answers = []
    out = report.console(sys.stdout)
    for snapshot in snapshots_of(args, failed):
        if args.json:
            answers.append(report.snapshot_as_json(snapshot))
        else:
            report.show_text(snapshot, out, registers=args.registers)
    if args.json:
        json.dump({"schema": report.SCHEMA, "snapshots": answers}, sys.stdout, indent=1)
        print()
    return TROUBLE if failed else OK
