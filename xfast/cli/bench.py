"""``xfast bench``: measure on this machine."""

from __future__ import annotations

import argparse
from importlib import import_module

from xfast.cli.arguments import epilog

BENCHES = {
    "swap": ("compare ways to switch between host and guest FPU state", "xfast.bench.swap"),
    "engine": ("hold the engine against this machine's own limits", "xfast.bench.engine"),
    "fleet": ("hold reading and judging against what no reader can leave out", "xfast.bench.fleet"),
    "filter": ("hold the filter in a pipe against cat in the same pipe", "xfast.bench.filter"),
}

EXAMPLES = {
    "swap": (
        "xfast bench swap --guest avx512 --samples 5",
        "xfast bench swap --plot swap.svg",
    ),
    "engine": (
        "xfast bench engine --only get_uabi",
        "xfast bench engine --memory 256 --samples 8 --json",
    ),
    "fleet": (
        "xfast bench fleet examples/snapshots/ch-state.json --streams 0",
        "xfast bench fleet examples/snapshots/q72-kvm-bv7-xcr7-smp1.qemustate --samples 5 --json",
    ),
    "filter": (
        "xfast bench filter examples/snapshots/q11-max-smp4-q35.qemustate --host qemu-tcg-max@6.1",
        "xfast bench filter vm.state --host this --memory 4000 --json",
    ),
}
"""Commands that work, for each help."""

EXIT_CODES = """\
exit codes: 0 all targets are reached; 1 one is missed (engine, fleet, filter); 2 usage error;
130 interrupted"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.epilog = epilog(*(lines[0] for lines in EXAMPLES.values()), codes=EXIT_CODES)
    benches = parser.add_subparsers(dest="bench", metavar="WHAT", required=True)
    for name, (help_text, module) in BENCHES.items():
        bench = benches.add_parser(
            name,
            help=help_text,
            description=help_text[0].upper() + help_text[1:] + ".",
            epilog=epilog(*EXAMPLES[name], codes=EXIT_CODES),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        import_module(module).add_arguments(bench)


def run(args: argparse.Namespace) -> int:
    """Run the verb; return the exit code."""
    status: int = import_module(BENCHES[args.bench][1]).run(args)
    return status
