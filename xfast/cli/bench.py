"""``xfast bench``: measure on this machine."""

from __future__ import annotations

import argparse
from importlib import import_module

BENCHES = {
    "swap": ("compare ways to switch between host and guest FPU state", "xfast.bench.swap"),
    "engine": ("hold the engine against this machine's own limits", "xfast.bench.engine"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    benches = parser.add_subparsers(dest="bench", metavar="WHAT", required=True)
    for name, (help_text, module) in BENCHES.items():
        import_module(module).add_arguments(benches.add_parser(name, help=help_text))


def run(args: argparse.Namespace) -> int:
    """Run the verb; return the exit code."""
    status: int = import_module(BENCHES[args.bench][1]).run(args)
    return status
