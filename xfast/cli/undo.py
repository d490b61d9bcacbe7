"""``xfast undo``: put back what a change record says was changed."""

from __future__ import annotations

import argparse

from xfast.cli.arguments import size_of
from xfast.errors import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("record", metavar="RECORD", help="change record (OUT.xfast.json)")
    parser.add_argument(
        "--file", metavar="FILE", help="the file it tells of, where it is not beside the record"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="verify the record and the file, write nothing"
    )
    parser.add_argument(
        "--expand-limit", type=size_of, metavar="BYTES", help="what compressed data may expand to"
    )


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
