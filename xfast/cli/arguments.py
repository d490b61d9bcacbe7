"""What the verbs share: exit codes, how they read snapshots and hosts, how they complain."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from xfast.errors import XfastError, printable

if TYPE_CHECKING:
    from xfast.hosts.model import Host
    from xfast.snapshots.model import Snapshot
    from xfast.xsave.layout import Layout

OK, FINDING, TROUBLE = 0, 1, 2


def complain(text: object) -> None:
    """Print one line to standard error."""
    print(f"xfast: {printable(str(text))}", file=sys.stderr)


def size_of(text: str) -> int:
    """Return a number of bytes from ``4096``, ``64K``, ``512M``, ``4G``."""
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper(), 1)
    digits = text[:-1] if factor > 1 else text
    if not digits.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, needed bytes such as 4096, 64K or 4G")
    return int(digits) * factor


def reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments by which a verb reads any number of snapshots."""
    parser.add_argument("snapshots", nargs="+", metavar="SNAPSHOT", help="file, directory or -")
    reading_options(parser)


def reading_options(parser: argparse.ArgumentParser) -> None:
    """Add the options by which every verb reads snapshots."""
    parser.add_argument("--layout", help="layout of bare areas: a preset, or a host's name")
    parser.add_argument("--size", type=size_of, help="bytes of a raw area (default 4096)")
    parser.add_argument(
        "--expand-limit", type=size_of, metavar="BYTES", help="what compressed data may expand to"
    )


def layout_named(text: str | None) -> Layout | None:
    """Return the layout called `text`: a preset's, else that of the host of this name."""
    if text is None:
        return None
    from xfast.hosts import resolve
    from xfast.xsave.layout import PRESETS

    if text in PRESETS:
        return PRESETS[text]
    layout = resolve(text).layout
    if layout is None:
        raise XfastError(f"layout: host {text} does not tell its layout")
    return layout


def snapshots_of(args: argparse.Namespace, failed: list[str]) -> Iterator[Snapshot]:
    """Yield every snapshot named; an input that can't be read costs one line and `failed`."""
    from xfast.snapshots import read, walk

    layout = layout_named(args.layout)
    for path in args.snapshots:
        if os.path.isdir(path) and next(walk([path]), None) is None:
            complain(f"{path}: found no file in it, needed snapshots")
            failed.append(path)
    for path in walk(args.snapshots):
        try:
            yield from read(path, layout=layout, size=args.size, expand_limit=args.expand_limit)
        except (XfastError, OSError) as problem:
            complain(problem)
            failed.append(path)


def hosts_of(specs: Sequence[str], failed: list[str]) -> list[Host]:
    """Return the hosts that `specs` name; a directory stands for the descriptions in it.

    One of them that can't be read costs one line and `failed`; a name of one's own raises.
    """
    from xfast.hosts import expand, resolve_all

    hosts: list[Host] = []
    for spec in specs:
        found = expand(spec)
        if found == [spec]:
            hosts += resolve_all(spec)
            continue
        for entry in found:
            try:
                hosts += resolve_all(entry)
            except (XfastError, OSError) as problem:
                complain(problem)
                failed.append(entry)
    return hosts
