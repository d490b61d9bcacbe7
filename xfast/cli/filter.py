"""``xfast filter``: stand in a pipe, and make a migration safe for its host while it passes."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from xfast.cli.arguments import BLOCKED, EXIT_CODES, OK, UNJUDGED, complain
from xfast.errors import FormatError, PolicyError, XfastError

EXAMPLES = f"""\
examples:
  virsh qemu-monitor-command VM --hmp \
    'migrate "exec:xfast filter --host amd-milan@6.12 | ssh TARGET socat - UNIX:/run/vm.in"'
  xfast filter --host amd-milan@6.12 --check-only < vm.stream > copy.stream


Guest memory passes as it comes. Where the state can't be made safe for HOST, the filter ends with
exit code 1 before the last byte: the migration fails, and the VM goes on running at the source.
docs/migrate.md has more.

{EXIT_CODES}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    from xfast.cli.plans import repair_arguments

    parser.epilog = EXAMPLES
    parser.add_argument(
        "--host",
        required=True,
        metavar="HOST[@KERNEL]",
        help="the host that is to restore the state",
    )
    repair_arguments(parser)
    parser.add_argument(
        "--check-only",
        action="store_true",
        help="judge the state and pass everything on unchanged",
    )
    parser.add_argument(
        "--refuse",
        action="store_true",
        help="with --check-only: fail the migration if HOST would refuse the state",
    )


def run(args: argparse.Namespace) -> int:
    """Run the verb; return the exit code."""
    if args.refuse and not args.check_only:
        raise XfastError("filter: expected --check-only with --refuse")
    return pass_through(args, check_only=args.check_only, refuse=args.refuse or not args.check_only)


def pass_through(args: argparse.Namespace, *, check_only: bool = False, refuse: bool = True) -> int:
    """Pass standard input on to standard output; return the exit code."""
    from xfast.hosts import resolve
    from xfast.repair.filter import Filter, Wanted
    from xfast.report.progress import Stream

    for fd, name in ((0, "input"), (1, "output")):
        if os.isatty(fd):
            raise XfastError(f"filter: expected a pipe as standard {name}, got a terminal")
    wanted = Wanted(
        resolve(args.host), args.drop, args.even_if_live, args.level, not check_only, refuse
    )
    watch = Stream("passed")
    try:
        try:
            plan = Filter(0, 1, wanted, watch if watch.shown else None).run()
        finally:
            watch.clear()
    except PolicyError as problem:
        complain(problem)
        return BLOCKED
    except FormatError as problem:
        complain(problem)
        return UNJUDGED
    except BrokenPipeError:
        complain("-: the reader of standard output went away before the end of the stream")
        return UNJUDGED
    return report(plan, check_only=check_only)


def report(plan: Any, *, check_only: bool) -> int:
    """Say on standard error what was changed, or found; return the exit code."""
    from xfast.cli.plans import print_plan

    print_plan(plan, sys.stderr)
    verdict = plan.before if check_only else plan.after
    if verdict.verdict == "incompatible":
        return BLOCKED
    return UNJUDGED if verdict.verdict == "unknown" else OK
