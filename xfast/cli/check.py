"""``xfast check``: which hosts can restore which snapshots, and why not."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from xfast.cli.arguments import (
    FINDING,
    OK,
    TROUBLE,
    hosts_of,
    reading_arguments,
    snapshots_of,
)
from xfast.errors import XfastError
from xfast.hosts.model import Host
from xfast.judge.judgement import check
from xfast.judge.verdict import Policy, Verdict
from xfast.report import rows as report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    reading_arguments(parser)
    parser.add_argument(
        "--host",
        nargs="+",
        action="extend",
        metavar="HOST[@KERNEL]",
        help="catalogue name, description file or directory, or 'this'",
    )
    parser.add_argument(
        "--live", action="store_true", help="ask this machine's KVM as well (host 'this')"
    )
    parser.add_argument(
        "--level", default="xstate", help="what to ask: xstate (default), fpu, isa or strict"
    )
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="CODE", help="make a rule's findings notes"
    )
    parser.add_argument("--format", default="table", choices=report.FORMATS)
    parser.add_argument("--json", dest="format", action="store_const", const="json")
    parser.add_argument("-v", "--verbose", action="store_true", help="print notes as well")


def _verdicts(
    args: argparse.Namespace, hosts: list[Host], policy: Policy, failed: list[str]
) -> Iterator[Verdict]:
    """Yield a verdict for each pair, one snapshot after the other."""
    for snapshot in snapshots_of(args, failed):
        for host, verdict in zip(hosts, check(snapshot, hosts, policy=policy), strict=True):
            if args.live and host.source == "this machine":
                from xfast.judge.confirm import confirm

                verdict = confirm(snapshot, host, verdict)
            yield verdict


def run(args: argparse.Namespace) -> int:
    """Run the verb; return the exit code."""
    policy = Policy(args.level, frozenset(code.upper() for code in args.ignore))
    failed: list[str] = []
    hosts = hosts_of(args.host or (["this"] if args.live else []), failed)
    if not hosts:
        raise XfastError("check: got no host, needed --host NAME, FILE or 'this', or --live")
    if args.live and not any(host.source == "this machine" for host in hosts):
        raise XfastError("check: --live asks this machine's KVM: add --host this")
    tally = report.Tally()
    verdicts = tally.count(_verdicts(args, hosts, policy, failed))
    report.write_verdicts(verdicts, args.format, sys.stdout, notes=args.verbose)
    print(tally.closing_line(len(failed)), file=sys.stderr)
    if failed or tally.contradicted or tally.words["unknown"]:
        return TROUBLE
    return FINDING if tally.words["incompatible"] else OK
