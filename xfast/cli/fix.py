"""``xfast fix``: plan, show the plan, write the repaired snapshot."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from xfast.cli.arguments import (
    BLOCKED,
    EXIT_CODES,
    OK,
    UNJUDGED,
    aside,
    candidates,
    complain,
    fail,
    reading_arguments,
    snapshots_of,
)
from xfast.cli.plans import print_plan, repair_arguments
from xfast.errors import PolicyError, XfastError, printable
from xfast.hosts import resolve
from xfast.report.tally import Tally, counted

EXAMPLES = f"""\
examples:
  xfast fix vm.save --host intel-broadwell@6.12 --dry-run
  xfast fix snapshots/ --host amd-milan@6.12 -o fixed/
  xfast fix vm.save --host amd-milan@6.12 --in-place --backup

Only what loses nothing goes by itself: components that are absent, or hold their init value or
Linux's default (PKRU 0x55555554). A KVM_SET_XSAVE without the PKRU bit leaves the vCPU's PKRU as
it was; it does not reset it.

{EXIT_CODES}"""


class Written(NamedTuple):
    """What one repair wrote: the result, its record and the backups; empty for nothing."""

    output: str = ""
    record: str = ""
    backups: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    from xfast.store.volume import STATE

    parser.epilog = EXAMPLES
    reading_arguments(parser)
    parser.add_argument(
        "--host",
        required=True,
        metavar="HOST[@KERNEL]",
        help="the host that is to restore the snapshot",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help="write to this new file, or into this directory (DIR/ is made)",
    )
    where.add_argument("--in-place", action="store_true", help="replace the snapshot itself")
    where.add_argument("--dry-run", action="store_true", help="show the plan and write nothing")
    parser.add_argument(
        "--backup",
        nargs="?",
        const=True,
        default=False,
        metavar="FILE",
        help="keep the old snapshot as SNAPSHOT.orig; of a volume the pages that change, in FILE",
    )
    parser.add_argument(
        "--journal",
        metavar="DIR",
        help="with --in-place: keep journal and record in this private folder (0700), and patch "
        f"where the snapshot lies, as it is done with block devices (default for them: {STATE})",
    )
    repair_arguments(parser)
    parser.add_argument(
        "--record", metavar="FILE", help="name of the change record (default: OUT.xfast.json)"
    )
    parser.add_argument("--json", action="store_true", help="print the plans as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return the exit code."""
    if args.snapshots == ["-"] and args.output == "-":
        from xfast.cli.filter import pass_through

        return pass_through(args)
    _require_consistent(args)
    paths = candidates(args.snapshots)
    _require_places(args, paths)
    host = resolve(args.host)
    tally = Tally()
    if args.in_place:
        args.snapshots = [path for path in args.snapshots if _recover(path, args, tally)]
    rows: list[dict[str, Any]] = []
    done: Counter[str] = Counter()
    for path, snapshots in groupby(snapshots_of(args, tally), key=lambda one: one.path):
        try:
            rows += _fix(path, list(snapshots), host, args, done)
        except XfastError as problem:
            fail(tally, path, problem)
            done["refused"] += isinstance(problem, PolicyError)
    if args.json:
        json.dump({"schema": "xfast/1", "plans": rows}, sys.stdout, indent=1)
        print()
    if len(paths) > 1:
        aside(_summary(done, len(tally.problems), dry_run=args.dry_run))
    words = {row["after"] for row in rows}
    if "incompatible" in words:
        return BLOCKED
    return UNJUDGED if tally.problems or "unknown" in words else OK


def _recover(path: str, args: argparse.Namespace, tally: Tally) -> bool:
    """Undo an edit that a crash interrupted; tell whether the file can be read now."""
    from xfast.store.journal import recover
    from xfast.store.volume import Volume, is_volume

    try:
        done = os.path.isfile(path) and recover(path)
        if is_volume(path) or (args.journal and os.path.isfile(path)):
            with Volume(path, args.journal) as volume:
                done |= volume.recover()
        if done:
            complain(f"{path}: undid an edit that was interrupted")
    except (XfastError, OSError) as problem:
        fail(tally, path, problem)
        return False
    return True


def _require_consistent(args: argparse.Namespace) -> None:
    if not (args.output or args.in_place or args.dry_run):
        raise XfastError("fix: expected -o OUT, --in-place or --dry-run")
    for name in ("backup", "journal"):
        if getattr(args, name) and not args.in_place:
            raise XfastError(f"fix: expected --in-place with --{name}")
    if "-" in args.snapshots:
        raise XfastError("fix: expected a file, or -o - with it (a filter), got standard input")
    if args.output == "-":
        raise XfastError(
            "fix: expected a file, got -o -: the result is read back before it is named"
        )


def _require_places(args: argparse.Namespace, paths: Sequence[str]) -> None:
    """Raise XfastError, before anything is written, unless each result has a place of its own."""
    twice = _first_twice(map(os.path.realpath, paths))
    if twice:
        raise XfastError(f"fix: expected each snapshot once, got {printable(twice)} more than once")
    for name in ("record", "backup"):
        if isinstance(getattr(args, name), str) and len(paths) > 1:
            words = "--record" if name == "record" else "--backup FILE"
            raise XfastError(f"fix: expected one snapshot with {words}, got {len(paths)}")
    if not args.output:
        return
    if not _is_folder(args.output):
        if len(paths) > 1:
            raise XfastError(
                f"fix: expected a directory for {len(paths)} snapshots (-o {args.output}/ makes "
                f"one), got {args.output}"
            )
        return
    twice = _first_twice(os.path.basename(path.rstrip("/")) for path in paths)
    if twice:
        raise XfastError(
            f"fix: expected snapshots of different names for one directory, got {printable(twice)} "
            "more than once"
        )


def _first_twice(words: Any) -> str:
    """Return a word that comes more than once, or ""."""
    return next((word for word, count in Counter(words).items() if count > 1), "")


def _is_folder(output: str) -> bool:
    return output.endswith("/") or os.path.isdir(output)


def _fix(
    path: str, snapshots: list[Any], host: Any, args: argparse.Namespace, done: Counter[str]
) -> list[Any]:
    """Plan, show and apply the repair of one file; return its rows of the answer."""
    from xfast.repair.plan import plan_fix

    plans = [
        plan_fix(one, host, drop=args.drop, even_if_live=args.even_if_live, policy=args.level)
        for one in snapshots
    ]
    if not args.json:
        for plan in plans:
            print_plan(plan, sys.stdout)
    written = Written()
    blocked = any(plan.left for plan in plans)
    if not blocked and not args.dry_run:
        written = _apply(path, plans, args)
        if not args.json and (written.output or args.output):
            _print_written(written)
    changed = any(plan.areas for plan in plans)
    done["blocked" if blocked else "fixed" if changed else "unchanged"] += 1
    return [
        {
            "snapshot": plan.snapshot.name,
            "host": host.name,
            "before": plan.before.verdict,
            "after": plan.after.verdict,
            "changes": [change.as_json() for change in plan.changes],
            "left": [finding.as_json() for finding in plan.left],
            "notes": list(plan.notes),
            "written": written.output,
            "record": written.record,
            "backups": list(written.backups),
        }
        for plan in plans
    ]


def _apply(path: str, plans: list[Any], args: argparse.Namespace) -> Written:
    """Write the repaired snapshot."""
    from xfast.repair.apply import apply
    from xfast.snapshots.bytes.source import JOURNAL
    from xfast.store.names import BACKUP, SUFFIX, make_folder

    output = args.output
    if output and _is_folder(output):
        make_folder(output)
        output = os.path.join(output, os.path.basename(path.rstrip("/")))
    limit = {"expand_limit": args.expand_limit} if args.expand_limit else {}
    how = {"in_place": args.in_place, "backup": args.backup, "record": args.record}
    how |= {"journal": args.journal} if args.journal else {}
    record = apply(plans, output, **how, **limit)
    if record is None:
        return Written()
    target = (output or path).rstrip("/")
    kept = [target]
    if os.path.isdir(target):
        kept = [os.path.join(target, row["name"]) for row in record["files"]]
    backups = tuple(name + BACKUP for name in kept if args.backup)
    if isinstance(args.backup, str):
        backups = (args.backup,)
    beside = target + SUFFIX
    if "journal" in record["files"][0]:
        beside = record["files"][0]["journal"].removesuffix(JOURNAL) + SUFFIX
    return Written(target, args.record or beside, backups)


def _print_written(written: Written) -> None:
    if not written.output:
        print("  nothing was written")
        return
    print(printable(f"  wrote {written.output}"))
    print(printable(f"  record {written.record}"))
    for backup in written.backups:
        print(printable(f"  backup {backup}"))


def _summary(done: Counter[str], failed: int, *, dry_run: bool) -> str:
    """Return the closing line of a run over several snapshots."""
    broken = failed - done["refused"]
    words = [
        f"{done['fixed']} {'to fix' if dry_run else 'fixed'}",
        f"{done['unchanged']} unchanged",
        f"{done['blocked'] + done['refused']} can't be fixed",
    ]
    words += [f"{broken} failed"] * bool(broken)
    return f"{counted(done.total() + broken, 'snapshot')}: {', '.join(words)}"
