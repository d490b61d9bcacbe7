"""``xfast check``: which hosts can restore which snapshots, and why not."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Sequence

from xfast.cli.arguments import (
    BLOCKED,
    EXIT_CODES,
    OK,
    UNJUDGED,
    aside,
    complain,
    hosts_of,
    reading_arguments,
    snapshots_of,
)
from xfast.errors import XfastError
from xfast.fleet.inputs import count
from xfast.hosts.model import Host
from xfast.hosts.snapshot import CORE_NOTE, GUEST_NOTE
from xfast.judge.judgement import check
from xfast.judge.verdict import Policy, Verdict
from xfast.report import rows as report
from xfast.report.matrix import UNBROKEN, Answer, Fleet, cell
from xfast.report.progress import Bar
from xfast.report.tally import Tally
from xfast.snapshots.model import Snapshot

ONLY = {
    "restorable": ("ok", "risk"),
    "risky": ("risk",),
    "fixable": ("fix",),
    "incompatible": ("fix", "no"),
    "unknown": ("?",),
}
"""What --only keeps: words of the matrix."""

EXAMPLES = f"""\
examples:
  xfast check snapshots/ --host amd-milan@6.12 intel-broadwell@6.12
  xfast check vm.save --host fleet.toml --only incompatible --by host

{EXIT_CODES}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.epilog = EXAMPLES
    reading_arguments(parser)
    parser.add_argument(
        "--host",
        nargs="+",
        action="extend",
        metavar="HOST[@KERNEL]",
        help="hosts to judge for: a name, a description file, a directory of them, or 'this' "
        "machine; @KERNEL adds the kernel's release (see xfast host show)",
    )
    parser.add_argument(
        "--live",
        action="store_true",
        help="restore into this machine's KVM as well, and compare (host 'this')",
    )
    parser.add_argument(
        "--level",
        default="xstate",
        help="how much to ask of a host: xstate (default), fpu, isa or strict",
    )
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="CODE",
        help="count the findings of this rule as notes; may be repeated",
    )
    parser.add_argument(
        "--format",
        default="table",
        choices=report.FORMATS,
        help="table for people (default), or one of the others for programs",
    )
    parser.add_argument(
        "--json", dest="format", action="store_const", const="json", help="same as --format json"
    )
    parser.add_argument("--only", choices=ONLY, help="show only snapshots with such an answer")
    parser.add_argument(
        "--by",
        default="snapshot",
        choices=("snapshot", "host", "rule"),
        help="arrange the table by snapshot (default), by host or by rule",
    )
    parser.add_argument(
        "--fail-on",
        action="append",
        default=[],
        choices=("risky", "unknown"),
        help="end with exit code 1 for such answers too; may be repeated",
    )
    parser.add_argument("--all", action="store_true", help="name every snapshot of a group")
    parser.add_argument("-v", "--verbose", action="store_true", help="print notes as well")
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="print nothing; only end with the exit code"
    )


def run(args: argparse.Namespace) -> int:
    """Run the verb; return the exit code."""
    policy = Policy(args.level, frozenset(code.upper() for code in args.ignore))
    tally = Tally()
    hosts = hosts_of(args.host or (["this"] if args.live else []), tally)
    if not hosts:
        raise XfastError("check: expected --host NAME, FILE or 'this', or --live, got no host")
    if args.live and not any(host.source == "this machine" for host in hosts):
        raise XfastError("check: --live asks this machine's KVM: add --host this")
    for host in hosts:
        if {GUEST_NOTE, CORE_NOTE} & set(host.notes) and not args.quiet:
            complain(
                f"{host.source}: a snapshot, taken for the host that wrote it; a snapshot that is "
                "to be judged stands before --host"
            )
    answers = _answers(args, hosts, policy, tally)
    if args.quiet:
        for _ in answers:
            pass
    elif args.format == "table":
        _print_table(args, answers)
    else:
        verdicts = (verdict for row in answers for verdict in row)
        report.write_verdicts(verdicts, args.format, sys.stdout, tally)
    if not args.quiet:
        for host in hosts:
            if host.caveat:
                complain(f"{host.name}: {host.caveat}")
        aside(tally.closing_line())
    return _exit_code(args, tally)


def _answers(
    args: argparse.Namespace, hosts: Sequence[Host], policy: Policy, tally: Tally
) -> Iterator[Sequence[Verdict]]:
    """Yield the verdicts of all hosts for one snapshot after the other, as far as asked for."""
    streaming = args.format in ("json", "ndjson", "csv") and sys.stdout.isatty()
    total: int | None = None
    with Bar("check", quiet=args.quiet or streaming) as bar:
        for done, snapshot in enumerate(snapshots_of(args, tally), 1):
            verdicts: Sequence[Verdict] = check(snapshot, hosts, policy=policy)
            if args.live:
                verdicts = _confirmed(snapshot, hosts, verdicts)
            tally.count_all(verdicts)
            if bar.due:
                total = total or count(args.snapshots)
                incompatible = tally.words["incompatible"]
                failed = len(tally.problems)
                text = f"{incompatible:,} incompatible, {failed:,} not judged"
                bar.show(done + failed + tally.skipped, total, text)
            if not args.only or any(cell(verdict) in ONLY[args.only] for verdict in verdicts):
                yield verdicts


def _confirmed(
    snapshot: Snapshot, hosts: Sequence[Host], verdicts: Sequence[Verdict]
) -> list[Verdict]:
    """Return verdicts with what this machine's KVM says to those about itself."""
    from xfast.judge.confirm import confirm

    pairs = zip(hosts, verdicts, strict=True)
    return [
        confirm(snapshot, host, verdict) if host.source == "this machine" else verdict
        for host, verdict in pairs
    ]


def _print_table(args: argparse.Namespace, answers: Iterator[Sequence[Verdict]]) -> None:
    """Print the answer for people."""
    fleet = Fleet(every_name=args.all)
    for verdicts in answers:
        fleet.add(verdicts)
    out = report.console(sys.stdout)
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    width = shutil.get_terminal_size().columns if known else UNBROKEN
    Answer(fleet, width, notes=args.verbose).print(out, args.by)
    if args.only and not fleet.groups:
        complain(f"no snapshot has an answer that is {args.only}")


def _exit_code(args: argparse.Namespace, tally: Tally) -> int:
    """Return the exit code: what blocks counts for more than what could not be judged."""
    unknown = tally.words["unknown"]
    asked = {"risky": tally.risky, "unknown": unknown + len(tally.problems)}
    if tally.words["incompatible"] or any(asked[word] for word in args.fail_on):
        return BLOCKED
    return UNJUDGED if tally.problems or tally.contradicted or unknown else OK
