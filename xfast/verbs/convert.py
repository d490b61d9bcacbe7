"""``xfast convert``: areas in another layout, format or wrapping."""

from __future__ import annotations

import argparse

import numpy as np

from xfast.cli import complain, layout_named, reading_options
from xfast.convert import as_core, as_npy, as_qemu, as_raw, relaid, rewritten
from xfast.errors import XfastError
from xfast.rewrite import Staged
from xfast.snapshots import read

WRAPPINGS = ("same", "raw", "npy", "qemu", "elfcore")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("snapshot", metavar="SNAPSHOT", help="file or directory")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="new file")
    parser.add_argument("--to", metavar="LAYOUT", help="a preset, or a host's name")
    parser.add_argument(
        "--as",
        dest="wrapping",
        default="same",
        choices=WRAPPINGS,
        help="same: the file with other areas (default); raw, npy: the areas; qemu: the fields of "
        "QEMU's cpu sections as JSON; elfcore: a core with a thread a vCPU",
    )
    parser.add_argument("--compacted", action="store_true", help="compacted format (raw, npy)")
    reading_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb; return the exit code 0."""
    if args.compacted and args.wrapping not in ("raw", "npy"):
        raise XfastError(f"convert: got --compacted, needed --as raw or npy, not {args.wrapping}")
    layout = layout_named(args.layout)
    found = read(args.snapshot, layout=layout, size=args.size, expand_limit=args.expand_limit)
    if len(found) != 1:
        raise XfastError(f"{args.snapshot}: found {len(found)} snapshots, needed one")
    (snapshot,) = found
    to = layout_named(args.to)
    with Staged(args.output) as staged:
        if args.wrapping == "same":
            if rewritten(snapshot, to, staged.file):
                complain(
                    f"{args.output}: the guest's CPUID in it tells the old layout; read it with "
                    f"--layout {args.to}"
                )
        elif args.wrapping == "qemu":
            staged.file.write(as_qemu(snapshot))
        elif args.wrapping == "elfcore":
            staged.file.write(as_core(snapshot, to))
        else:
            areas = np.ascontiguousarray(relaid(snapshot, to, compacted=args.compacted))
            staged.file.write(as_npy(areas) if args.wrapping == "npy" else as_raw(areas))
        staged.publish()
    return 0
