"""The command line. Each verb is a module of its own, imported when it runs.

Exit codes are grep's: 0 every pair restorable, or nothing to do; 1 a finding blocks; 2 a usage
error, or an input that could not be judged. Standard output carries only the answer.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from xfast.cli.arguments import TROUBLE, complain
from xfast.errors import XfastError

VERBS = {
    "show": "print what is in snapshots",
    "check": "judge which hosts can restore which snapshots",
    "explain": "explain a rule code, or an error message",
    "host": "show, dump and combine host descriptions",
    "fix": "write a snapshot that a host can restore",
    "undo": "put back what a change record says was changed",
    "convert": "write areas in another layout or format",
    "diff": "tell in which registers two snapshots differ",
    "bench": "measure on this machine",
}
"""Each verb is `xfast.cli.VERB`, with ``add_arguments(parser)`` and ``run(args)``."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str) -> Any:
        """Print `message` and end with exit code 2."""
        complain(f"{message}; see {self.prog} --help")
        raise SystemExit(TROUBLE)


def _version() -> str:
    from importlib.metadata import version

    return f"xfast {version('xfast')}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; `argv` defaults to the process's arguments. Returns the exit code."""
    if sys.stdout is None or sys.stderr is None:
        return TROUBLE  # nowhere to answer
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # file names are bytes
    words = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(
        prog="xfast",
        description="XSAVE state in VM snapshots: which restore on which hosts, and why not.",
    )
    parser.add_argument("--version", action="version", version=_version())
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    for name, help_text in VERBS.items():
        sub = verbs.add_parser(name, help=help_text, description=help_text.capitalize() + ".")
        if name in words[:1]:
            import_module(f"xfast.cli.{name}").add_arguments(sub)
    args = parser.parse_args(words)
    if args.verb is None:
        parser.print_help()
        return TROUBLE
    try:
        status: int = import_module(f"xfast.cli.{args.verb}").run(args)
        return status
    except XfastError as problem:
        complain(problem)
        return TROUBLE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return TROUBLE
    except OSError as problem:
        complain(problem)
        return TROUBLE
    except KeyboardInterrupt:
        complain("interrupted")
        return TROUBLE
