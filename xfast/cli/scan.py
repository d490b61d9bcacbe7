"""``xfast scan``: judge a fleet of any size into a dataset."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from xfast.cli.arguments import (
    BLOCKED,
    EXIT_CODES,
    OK,
    UNJUDGED,
    aside,
    hosts_of,
    layout_named,
    reading_options,
)
from xfast.errors import XfastError
from xfast.fleet.run import CHUNK, Progress, scan
from xfast.judge.verdict import Policy
from xfast.report.progress import Bar
from xfast.report.tally import Tally, counted

EXAMPLES = f"""\
examples:
  xfast scan /var/lib/snapshots --host fleet.toml -o results/
  xfast scan s3://snapshots/2026/ --host amd-milan@6.12 -o results/ -j 16
Killed at any moment and started again, it finishes the rest. Once it is complete, the next scan
looks at every input anew. `xfast report results/` draws it.

{EXIT_CODES}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="file, directory or URL (s3://bucket/prefix/)"
    )
    parser.add_argument(
        "--host", nargs="+", action="extend", required=True, metavar="HOST[@KERNEL]",
        help="hosts to judge for, as in xfast check",
    )  # fmt: skip
    parser.add_argument("-o", "--output", required=True, metavar="RESULTS", help="dataset's folder")
    parser.add_argument(
        "-j", "--jobs", type=int, metavar="N", help="worker processes (default: one per usable CPU)"
    )
    parser.add_argument(
        "--executor", metavar="URL", help="run on the workers of a dask cluster: dask://HOST:PORT"
    )
    parser.add_argument(
        "--chunk",
        type=int,
        default=CHUNK,
        metavar="N",
        help=f"inputs in each piece of work (default: {CHUNK})",
    )
    parser.add_argument(
        "--level", default="xstate", help="how much to ask of a host, as in xfast check"
    )
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="CODE",
        help="count a rule's findings as notes",
    )
    reading_options(parser)
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return the exit code."""
    if (args.jobs is not None and args.jobs < 1) or args.chunk < 1:
        raise XfastError("scan: expected -j and --chunk of at least 1")
    tally = Tally()
    hosts = hosts_of(args.host, tally)
    policy = Policy(args.level, frozenset(code.upper() for code in args.ignore))
    executor = _executor(args.executor)
    with Bar("scan", quiet=args.quiet) as bar:

        def show(progress: Progress) -> None:
            incompatible = progress.words.get("incompatible", 0)
            bar.show(
                progress.inputs,
                progress.total,
                f"{incompatible:,} incompatible, {progress.failed:,} not judged",
            )

        try:
            manifest = scan(
                args.inputs, hosts, args.output, policy=policy, jobs=args.jobs,
                executor=executor, chunk=args.chunk, on_progress=show,
                layout=layout_named(args.layout), size=args.size, expand_limit=args.expand_limit,
            )  # fmt: skip
        finally:
            if executor is not None:
                executor.shutdown(wait=False)
    return _close(args, manifest, tally)


def _close(args: argparse.Namespace, manifest: dict[str, Any], tally: Tally) -> int:
    """Print what has come of a scan; return the exit code."""
    words = manifest["verdicts"]
    if args.json:
        json.dump(manifest, sys.stdout, indent=1)
        print()
    elif not args.quiet:
        pairs = ", ".join(f"{number:,} {word}" for word, number in words.items()) or "no pairs"
        judged, failed = counted(manifest["snapshots"], "snapshot"), manifest["failed"]
        not_judged = f", {counted(failed, 'input')} not judged" * bool(failed)
        aside(f"{judged} judged ({pairs}){not_judged}; the dataset is in {args.output}")
    if words.get("incompatible"):
        return BLOCKED
    return UNJUDGED if manifest["failed"] or words.get("unknown") or tally.problems else OK


def _executor(url: str | None) -> Any:
    """Return the executor that a URL names, or None without one."""
    if url is None:
        return None
    if not url.startswith("dask://"):
        raise XfastError(f"--executor: expected dask://HOST:PORT, got {url!r}")
    try:
        from distributed import Client
    except ImportError:
        raise XfastError("--executor needs distributed: pip install 'xfast[cluster]'") from None
    try:
        client: Any = Client(f"tcp://{url.removeprefix('dask://')}", timeout=10)  # type: ignore[no-untyped-call]
    except (OSError, TimeoutError) as problem:
        raise XfastError(f"{url}: can't be reached: {problem}") from None
    return client.get_executor()
