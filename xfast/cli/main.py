"""The command line. Each verb is a module of its own, imported when it runs.

Standard output carries only the answer; complaints and summaries go to standard error. The exit
codes are those of `xfast.cli.arguments`.
"""

from __future__ import annotations

import argparse
import difflib
import io
import os
import platform
import sys
import sysconfig
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from xfast.cli.arguments import EXIT_CODES, INTERRUPTED, UNJUDGED, USAGE, complain, epilog
from xfast.errors import XfastError
from xfast.version import __version__

VERBS = {
    "show": "print what is in snapshots",
    "check": "judge which hosts can restore which snapshots",
    "scan": "judge a fleet of any size into a dataset",
    "report": "draw what a scan has found",
    "explain": "explain a rule, an error message, a log or a commit",
    "host": "show, dump and combine host descriptions",
    "fix": "write a snapshot that a host can restore",
    "filter": "make a QEMU migration safe for its host while it passes through a pipe",
    "undo": "put back what a change record says was changed",
    "convert": "write areas in another layout or format",
    "diff": "tell in which registers two snapshots differ",
    "bench": "measure on this machine",
}
"""Each verb is `xfast.cli.VERB`, with ``add_arguments(parser)`` and ``run(args)``."""


class _Version(argparse.Action):
    """Print the version and end."""

    def __call__(self, *_: object) -> None:
        print(_version())
        raise SystemExit(0)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, and which knows near misses."""

    def error(self, message: str) -> Any:
        """Print `message` and end with exit code 2."""
        if message.endswith("required: SNAPSHOT"):
            message += " (write snapshots before --host, which takes all names after it)"
        complain(f"{message}; see {self.prog} --help")
        raise SystemExit(USAGE)


def _version() -> str:
    """Return the version, and what it runs on; numpy is not needed for this."""
    try:
        from xfast.engine.isa import chosen

        engine = f"instruction set {chosen()}"
    except ImportError:
        engine = "engine not built"
    return (
        f"xfast {__version__} ({engine}, Python "
        f"{platform.python_version()}, {platform.system()} {platform.machine()}, "
        f"{sysconfig.get_config_var('SOABI') or platform.python_implementation()})"
    )


def parser_for(*complete: str) -> Parser:
    """Return the parser, complete for some verbs; the others are only named."""
    parser = Parser(
        prog="xfast",
        description="XSAVE state in VM snapshots: which restore on which hosts, and why not.",
        epilog=epilog(
            "xfast check snapshots/ --host amd-milan@6.12 intel-broadwell@6.12",
            'xfast explain "KVM_SET_XSAVE failed: Invalid argument"',
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="colour on a terminal only (auto), always or never; NO_COLOR works too",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    for name, help_text in VERBS.items():
        sub = verbs.add_parser(
            name,
            help=help_text,
            description=help_text[0].upper() + help_text[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in complete:
            import_module(f"xfast.cli.{name}").add_arguments(sub)
            sub.epilog = sub.epilog or EXIT_CODES
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; `argv` defaults to the process's arguments. Returns the exit code."""
    if sys.stdout is None or sys.stderr is None:
        return UNJUDGED  # nowhere to answer
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # file names are bytes
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    verb = next((word for word in words if not word.startswith("-")), "")
    if verb in ("auto", "always", "never"):
        verb = next((word for word in words[words.index(verb) + 1 :] if word in VERBS), "")
    near = difflib.get_close_matches(verb, VERBS, 1)
    if verb and verb not in VERBS:
        hint = f"did you mean {near[0]}?" if near else f"expected one of: {', '.join(VERBS)}"
        complain(f"no verb {verb!r}; {hint}")
        return USAGE
    try:
        parser = parser_for(verb)
    except ImportError as problem:
        complain(f"{problem}; `pip install .` in the source tree gets all that is needed")
        return UNJUDGED
    args = parser.parse_args(words)
    if args.verb is None:
        parser.print_help()
        return USAGE
    _set_colour(args.color)
    return _run(args)


def _set_colour(choice: str) -> None:
    """Tell rich, by its own variables, whether to colour the output."""
    if choice == "never":
        os.environ["NO_COLOR"] = "1"
    elif choice == "always":
        os.environ.pop("NO_COLOR", None)
        os.environ["FORCE_COLOR"] = "1"


def _run(args: argparse.Namespace) -> int:
    """Run a verb; whatever goes wrong in it is one line and an exit code."""
    try:
        status: int = import_module(f"xfast.cli.{args.verb}").run(args)
        return status
    except XfastError as problem:
        complain(problem)
        return USAGE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNJUDGED
    except OSError as problem:
        complain(problem)
        return UNJUDGED
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except Exception as problem:
        if os.environ.get("XFAST_DEBUG"):
            raise
        complain(
            f"{args.verb}: failed unexpectedly ({type(problem).__name__}: {problem}); "
            "XFAST_DEBUG=1 shows where"
        )
        return UNJUDGED
