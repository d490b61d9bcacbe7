"""``xfast convert``: areas in another layout, format or wrapping."""

from __future__ import annotations

import argparse
import os

from xfast.cli.arguments import (
    EXIT_CODES,
    complain,
    layout_named,
    reading_options,
    tell_end,
    watched,
)
from xfast.errors import XfastError
from xfast.repair.convert import convert
from xfast.snapshots.model import Snapshot
from xfast.snapshots.raw import is_npy

WRAPPINGS = ("same", "raw", "npy", "qemu", "elfcore")
EXAMPLES = f"""\
examples:
  xfast convert vm.xsave --layout intel --to amd-zen4 -o moved.xsave
  xfast convert vm.save --as npy -o areas.npy

{EXIT_CODES}"""

SUFFIXES = {".npy": "npy", ".xsave": "raw", ".raw": "raw"}
"""What the output's name says of its wrapping, where --as does not."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.epilog = EXAMPLES
    parser.add_argument("snapshot", metavar="SNAPSHOT", help="file or directory")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="new file")
    parser.add_argument(
        "--to", metavar="LAYOUT", help="the new layout: its name, or a host's (default: as it is)"
    )
    parser.add_argument(
        "--as",
        dest="wrapping",
        choices=WRAPPINGS,
        help="what to write: the same kind of file with other areas (same), the areas alone (raw, "
        "npy), the fields of QEMU's cpu sections as JSON (qemu), or a core file with a thread for "
        "each vCPU (elfcore); default: npy for OUT.npy, raw for OUT.xsave and OUT.raw, else same",
    )
    parser.add_argument(
        "--compacted",
        action="store_true",
        help="write areas in the compacted format (raw and npy only)",
    )
    reading_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb; return the exit code 0."""
    layout = layout_named(args.layout)
    found = watched(args.snapshot, layout=layout, size=args.size, expand_limit=args.expand_limit)
    if len(found) != 1:
        raise XfastError(f"{args.snapshot}: expected one snapshot, got {len(found)}")
    (snapshot,) = found
    tell_end(snapshot)
    wrapping = args.wrapping or _by_name(snapshot, args.output)
    if args.compacted and wrapping not in ("raw", "npy"):
        raise XfastError(f"convert: expected --as raw or npy with --compacted, got {wrapping}")
    how = {"wrapping": wrapping, "compacted": args.compacted}
    how |= {"expand_limit": args.expand_limit} if args.expand_limit else {}
    if convert(snapshot, args.output, layout_named(args.to), **how):
        complain(
            f"{args.output}: the guest's CPUID in it tells the old layout; read it with "
            f"--layout {args.to}"
        )
    return 0


def _by_name(snapshot: Snapshot, output: str) -> str:
    """Return the wrapping that the output's suffix asks for; "same" where the input is in it."""
    wanted = SUFFIXES.get(os.path.splitext(output)[1], "same")
    if snapshot.format != "raw" or snapshot.container:
        return wanted
    return "same" if wanted == ("npy" if is_npy(snapshot) else "raw") else wanted
