"""``xfast undo``: put back what a change record says was changed."""

from __future__ import annotations

import argparse

from xfast.cli.arguments import EXIT_CODES, expand_limit_option
from xfast.errors import printable

EXAMPLES = f"""\
examples:
  xfast undo fixed/vm.save.xfast.json --dry-run
  xfast undo vm.save.xfast.json

{EXIT_CODES}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "record", metavar="RECORD", help="the change record that xfast fix wrote (OUT.xfast.json)"
    )
    parser.add_argument(
        "--file", metavar="FILE", help="the changed file, where it is not beside the record"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="verify the record and the file, and write nothing"
    )
    expand_limit_option(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb; return the exit code 0: all is (or can be) as it was before."""
    from xfast.store.undo import undo

    limit = {"expand_limit": args.expand_limit} if args.expand_limit else {}
    done = undo(args.record, file=args.file, dry_run=args.dry_run, **limit)
    told = done.record
    host = told["host"].get("name", "") if isinstance(told.get("host"), dict) else ""
    print(printable(f"xfast {told.get('xfast')} changed {told['output']} for {host}"))
    for change in told["changes"]:
        words = (change.get(name) for name in ("component", "field", "before", "after"))
        what = " ".join(filter(None, map(str, words)))
        print(printable(f"  vCPU {change.get('vcpu')}: {what}: {change.get('why')}"))
    for path, changed in done.files:
        word = "is what the record left" if args.dry_run else "was put back"
        print(printable(f"  {path} {word if changed else 'is as it was before the change'}"))
    return 0
