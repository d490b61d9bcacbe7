"""What the verbs share: exit codes, how they read snapshots and hosts, how they complain."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from xfast.errors import UnknownFormatError, XfastError, printable
from xfast.report.tally import Problem, Tally, counted

if TYPE_CHECKING:
    from xfast.hosts.model import Host
    from xfast.snapshots.model import Snapshot
    from xfast.xsave.layout import Layout

OK, BLOCKED, USAGE, UNJUDGED, INTERRUPTED = 0, 1, 2, 3, 130
EXIT_CODES = """\
exit codes: 0 all can be restored, or nothing to do; 1 something blocks; 2 usage error;
3 nothing blocks, but something could not be judged; 130 interrupted"""
"""The exit codes of every verb; what blocks counts for more than what could not be judged."""


def epilog(*examples: str, codes: str = EXIT_CODES, kinds: str = "") -> str:
    """Return what ends a help: examples, a line each, the kinds of input, and the exit codes."""
    parts = ["\n  ".join(("examples:", *examples)), *filter(None, [kinds]), codes]
    return "\n\n".join(parts)


NOFOLLOW = os.O_NOFOLLOW | os.O_NONBLOCK

OURS = (".orig", ".xfast.json", ".xfast-journal")
"""How files end that xfast itself put beside a snapshot."""


def aside(line: str) -> None:
    """Print a line to standard error; on a terminal it is broken between words only."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        line = textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False)
    print(line, file=sys.stderr)


def complain(text: object) -> None:
    """Print one line to standard error, as xfast's."""
    aside(f"xfast: {printable(_words(text))}")


def _words(problem: object) -> str:
    """Return what an error says; the system's without its number."""
    if isinstance(problem, OSError) and problem.strerror:
        name = problem.filename if isinstance(problem.filename, str) else ""
        return ": ".join(filter(None, (name, problem.strerror)))
    return str(problem)


def size_of(text: str) -> int:
    """Return a number of bytes from ``4096``, ``64K``, ``512M``, ``4G``."""
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper(), 1)
    digits = text[:-1] if factor > 1 else text
    if not digits.isdecimal():
        raise argparse.ArgumentTypeError(f"expected bytes such as 4096, 64K or 4G, got {text!r}")
    return int(digits) * factor


def reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments by which a verb reads any number of snapshots."""
    parser.add_argument(
        "snapshots",
        nargs="+",
        metavar="SNAPSHOT",
        help="file, directory (every snapshot in it) or - (standard input)",
    )
    reading_options(parser)


class _Plugins(argparse.Action):
    """Say, to this process and those that it starts, that root may load plugins."""

    def __call__(self, *_: object) -> None:
        """Set the environment's word."""
        os.environ["XFAST_PLUGINS"] = "1"


def reading_options(parser: argparse.ArgumentParser) -> None:
    """Add the options by which every verb reads snapshots."""
    parser.add_argument(
        "--layout",
        help="where components lie in areas that do not tell: a layout's name such as intel or "
        "amd-zen4, or a host's",
    )
    parser.add_argument(
        "--size", type=size_of, metavar="BYTES", help="size of each raw area (default: 4096)"
    )
    expand_limit_option(parser)
    parser.add_argument(
        "--plugins",
        action=_Plugins,
        nargs=0,
        help="load formats from other packages even when running as root",
    )


def expand_limit_option(parser: argparse.ArgumentParser) -> None:
    """Add --expand-limit."""
    parser.add_argument(
        "--expand-limit",
        type=size_of,
        metavar="BYTES",
        help="refuse compressed data that expand to more (default: 64 times their size, from "
        "64M to 4G)",
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


def snapshots_of(args: argparse.Namespace, tally: Tally) -> Iterator[Snapshot]:
    """Yield every snapshot named.

    An input that can't be judged costs one line and a problem in `tally`. In a directory, hidden
    files, those that xfast put there, and texts that are no snapshot (README, .xml) are counted
    only: a snapshot whose beginning is damaged is none of these.
    """
    from xfast.snapshots import walk

    how = {
        "layout": layout_named(args.layout),
        "size": args.size,
        "expand_limit": args.expand_limit,
    }
    for named in args.snapshots:
        walked = os.path.isdir(named)
        before = tally.skipped
        links: list[str] = []
        paths = list(walk([named], links)) if walked else [named]
        if links:
            complain(f"{named}: {counted(len(links), 'symbolic link')} in it: none is followed")
        for path in paths:
            if path != named and _is_passed_over(path):
                tally.skipped += 1
                continue
            try:
                for snapshot in watched(path, **how):
                    if not getattr(args, "quiet", False):
                        tell_end(snapshot)
                    yield snapshot
            except UnknownFormatError as problem:
                if path != named and _is_text(path):
                    tally.skipped += 1
                else:
                    fail(tally, path, problem)
            except (XfastError, OSError) as problem:
                fail(tally, path, problem)
        if walked and tally.skipped - before == len(paths):
            fail(tally, named, f"{named}: expected snapshots in it, got no file that could be one")


def watched(path: str, **how: Any) -> list[Snapshot]:
    """Read what `path` is; on a terminal tell how far a pipe is, and whether it stalls."""
    from xfast.snapshots import read

    if path != "-" or not sys.stderr.isatty():
        return read(path, **how)
    from xfast.report.progress import Stream

    stream = Stream("read")
    try:
        return read(path, watch=stream, **how)
    finally:
        stream.clear()


def tell_end(snapshot: Snapshot) -> None:
    """Say where a stream ends that something else follows, in its file or on its volume."""
    end = snapshot.facts.get("stream_end")
    if end is not None:
        complain(f"{snapshot.name}: the stream ends at offset {end}; what follows is no part of it")


def candidates(named: Sequence[str]) -> list[str]:
    """Return the paths that `snapshots_of` goes through, without what it passes over."""
    from xfast.snapshots import walk

    return [
        path
        for name in named
        for path in walk([name])
        if path == name or not (_is_passed_over(path) or _is_text(path))
    ]


def fail(tally: Tally, path: str, problem: object) -> None:
    """Complain of an input that can't be judged, and count it."""
    complain(problem)
    tally.problems.append(Problem(path, _words(problem)))


def _is_text(path: str) -> bool:
    """Tell whether a file begins like a text: words in UTF-8, without control characters."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | NOFOLLOW)) as file:
            start = file.read(4096)
        text = start.decode("utf-8", "strict" if len(start) < 4096 else "ignore")
    except (OSError, UnicodeDecodeError):
        return False
    return len(text.split()) > 1 and not re.search(r"[\x00-\x08\x0e-\x1f]", text)


def _is_passed_over(path: str) -> bool:
    """Tell whether a file in a directory is hidden, or one that xfast put there."""
    name = os.path.basename(path)
    return name.startswith(".") or name.endswith(OURS)


def hosts_of(specs: Sequence[str], tally: Tally) -> list[Host]:
    """Return the hosts that `specs` name; a directory stands for the descriptions in it.

    One of them that can't be read costs one line and a problem; a name of one's own raises.
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
                fail(tally, entry, problem)
    return hosts
