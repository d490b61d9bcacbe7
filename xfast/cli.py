"""The command line. Each verb imports what it needs when it runs.

Exit codes are grep's: 0 every pair restorable, or nothing to do; 1 a finding blocks; 2 a usage
error, or an input that could not be judged. Standard output carries only the answer.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from xfast.errors import XfastError, printable
from xfast.rules import MESSAGES, RULES, Rule

if TYPE_CHECKING:
    from xfast.hosts.model import Host
    from xfast.layout import Layout
    from xfast.snapshots.model import Snapshot
    from xfast.verdict import Policy, Verdict

OK, FINDING, TROUBLE = 0, 1, 2
LEAK_STORY = ("bf5d00470787", "ad856280ddea", "a1020a25e697", "8647c52e9504")
"""The commits whose one story `explain` replays on the model."""


def complain(text: object) -> None:
    """Print one line to standard error."""
    print(f"xfast: {printable(str(text))}", file=sys.stderr)


def _size(text: str) -> int:
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
    parser.add_argument("--size", type=_size, help="bytes of an area in a raw file (default 4096)")
    parser.add_argument(
        "--expand-limit", type=_size, metavar="BYTES", help="what compressed data may expand to"
    )


def layout_named(text: str | None) -> Layout | None:
    """Return the layout called `text`: a preset's, else that of the host of this name."""
    if text is None:
        return None
    from xfast.hosts import resolve
    from xfast.layout import PRESETS

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
    from xfast.hosts import resolve_all

    hosts: list[Host] = []
    for spec in specs:
        if not os.path.isdir(spec):
            hosts += resolve_all(spec)
            continue
        for entry in sorted(os.scandir(spec), key=lambda entry: entry.name):
            try:
                hosts += resolve_all(entry.path)
            except (XfastError, OSError) as problem:
                complain(problem)
                failed.append(entry.path)
    return hosts


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    reading_arguments(parser)
    parser.add_argument("--registers", action="store_true", help="print the registers too")
    parser.add_argument("--json", action="store_true", help="print JSON, registers included")


def _show(args: argparse.Namespace) -> int:
    import json

    from xfast import report

    failed: list[str] = []
    answers = []
    out = report.console(sys.stdout)
    for snapshot in snapshots_of(args, failed):
        if args.json:
            answers.append(report.snapshot_as_json(snapshot))
        else:
            report.show_text(snapshot, out, registers=args.registers)
    if args.json:
        json.dump({"schema": report.SCHEMA, "snapshots": answers}, sys.stdout, indent=1)
        print()
    return TROUBLE if failed else OK


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    from xfast.report import FORMATS

    reading_arguments(parser)
    parser.add_argument(
        "--host",
        nargs="+",
        action="extend",
        metavar="HOST[@KERNEL]",
        help="catalogue name, description file or directory, or 'this'",
    )
    parser.add_argument(
        "--live", action="store_true", help="ask this machine's KVM as well (host 'this')"
    )
    parser.add_argument(
        "--level", default="xstate", help="what to ask: xstate (default), fpu, isa or strict"
    )
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="CODE", help="make a rule's findings notes"
    )
    parser.add_argument("--format", default="table", choices=FORMATS)
    parser.add_argument("--json", dest="format", action="store_const", const="json")
    parser.add_argument("-v", "--verbose", action="store_true", help="print notes as well")


def _verdicts(
    args: argparse.Namespace, hosts: list[Host], policy: Policy, failed: list[str]
) -> Iterator[Verdict]:
    """Yield a verdict for each pair, one snapshot after the other."""
    from xfast.judge import check

    for snapshot in snapshots_of(args, failed):
        for host, verdict in zip(hosts, check(snapshot, hosts, policy=policy), strict=True):
            if args.live and host.source == "this machine":
                from xfast.kvm.confirm import confirm

                verdict = confirm(snapshot, host, verdict)
            yield verdict


def _check(args: argparse.Namespace) -> int:
    from xfast import report
    from xfast.verdict import Policy

    policy = Policy(args.level, frozenset(code.upper() for code in args.ignore))
    failed: list[str] = []
    hosts = hosts_of(args.host or (["this"] if args.live else []), failed)
    if not hosts:
        raise XfastError("check: got no host, needed --host NAME, FILE or 'this', or --live")
    if args.live and not any(host.source == "this machine" for host in hosts):
        raise XfastError("check: --live asks this machine's KVM: add --host this")
    tally = report.Tally()
    verdicts = tally.count(_verdicts(args, hosts, policy, failed))
    report.write_verdicts(verdicts, args.format, sys.stdout, notes=args.verbose)
    print(tally.closing_line(len(failed)), file=sys.stderr)
    if failed or tally.contradicted or tally.words["unknown"]:
        return TROUBLE
    return FINDING if tally.words["incompatible"] else OK


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "subject", nargs="*", help="a rule code, an error message, or a commit; none: all codes"
    )


def _page(rule: Rule) -> str:
    return f"{rule.code}: {rule.title}\n\n{rule.text}\n\n{rule.next}\n\nSource: {rule.ref}"


def _explain(args: argparse.Namespace) -> int:
    subject = " ".join(args.subject)
    if not subject:
        for rule in RULES.values():
            print(f"{rule.code:<13} {rule.title}")
        return OK
    if subject.upper() in RULES:
        print(_page(RULES[subject.upper()]))
        return OK
    if any(len(subject) >= 7 and subject.lower().startswith(c[:7]) for c in LEAK_STORY):
        from xfast.kvm import render, story

        print(render(story()))
        return OK
    for message in MESSAGES:
        if message.pattern.search(subject):
            print(message.text)
            for code in message.codes:
                print(f"\n{_page(RULES[code])}")
            return OK
    complain(f"explain: got {subject!r}, needed a known error message or: {', '.join(RULES)}")
    return TROUBLE


def _lazily(module: str) -> tuple[Callable[[argparse.ArgumentParser], None], Callable[[Any], int]]:
    """Return the two functions of a verb that lives in its own module."""

    def arguments(parser: argparse.ArgumentParser) -> None:
        import_module(module).add_arguments(parser)

    def run(args: argparse.Namespace) -> int:
        status: int = import_module(module).run(args)
        return status

    return arguments, run


BENCHES = {
    "swap": ("compare ways to switch between host and guest FPU state", "xfast.bench.swap"),
    "engine": ("hold the engine against this machine's own limits", "xfast.bench.engine"),
}


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(dest="bench", metavar="WHAT", required=True)
    for name, (help_text, module) in BENCHES.items():
        import_module(module).add_arguments(benches.add_parser(name, help=help_text))


def _bench(args: argparse.Namespace) -> int:
    status: int = import_module(BENCHES[args.bench][1]).run(args)
    return status


VERBS: dict[
    str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]
] = {
    "show": ("print what is in snapshots", _show_arguments, _show),
    "check": ("judge which hosts can restore which snapshots", _check_arguments, _check),
    "explain": ("explain a rule code, or an error message", _explain_arguments, _explain),
    "host": ("show, dump and combine host descriptions", *_lazily("xfast.hosts.verbs")),
    "fix": ("write a snapshot that a host can restore", *_lazily("xfast.verbs.fix")),
    "convert": ("write areas in another layout or format", *_lazily("xfast.verbs.convert")),
    "diff": ("tell in which registers two snapshots differ", *_lazily("xfast.verbs.diff")),
    "bench": ("measure on this machine", _bench_arguments, _bench),
}


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
    for name, (help_text, add_arguments, _) in VERBS.items():
        sub = verbs.add_parser(name, help=help_text, description=help_text.capitalize() + ".")
        if name in words[:1]:
            add_arguments(sub)
    args = parser.parse_args(words)
    if args.verb is None:
        parser.print_help()
        return TROUBLE
    try:
        return VERBS[args.verb][2](args)
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
