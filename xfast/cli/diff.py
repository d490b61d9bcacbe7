"""``xfast diff``: which components and registers differ between two snapshots."""

from __future__ import annotations

import argparse
import itertools
import json
import sys

from xfast.cli.arguments import layout_named, reading_options, tell_end, watched
from xfast.errors import XfastError

EXAMPLES = """\
examples:
  xfast diff before.save after.save
  xfast diff vm.save vm.save.orig --json

exit codes: 0 no difference; 1 a difference; 2 usage error, or a file that can't be read;
130 interrupted"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.epilog = EXAMPLES
    parser.add_argument("one", metavar="A", help="file or directory")
    parser.add_argument("two", metavar="B", help="file or directory")
    reading_options(parser)
    parser.add_argument(
        "--values-only",
        action="store_true",
        help="take an absent component for one that holds its init value, as a restore does",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return the exit code: 0 the same, 1 different."""
    from xfast.snapshots.difference import compare

    if args.one == args.two == "-":
        raise XfastError("diff: expected - (standard input) once, got it twice")
    layout = layout_named(args.layout)
    how = {"layout": layout, "size": args.size, "expand_limit": args.expand_limit}
    sides = [watched(path, **how) for path in (args.one, args.two)]
    for snapshot in itertools.chain(*sides):
        tell_end(snapshot)
    found = compare(*sides, values_only=args.values_only)
    if args.json:
        rows = [one.as_json() for one in found]
        answer = {"schema": "xfast/1", "one": args.one, "two": args.two, "differences": rows}
        json.dump(answer, sys.stdout, indent=1)
        print()
    else:
        for row in found:
            name = " ".join(filter(None, (row.component, row.register)))
            print(f"vCPU {row.vcpu}: {name}: {row.one} -> {row.two}")
    return 1 if found else 0
