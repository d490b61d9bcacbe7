"""Write the man page and the shells' completions in share/, from the parser of the command line.

    python docs/make_manual.py

The wheel installs them. The completions are shtab's, the man page is drawn here: a section a verb.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from xfast.cli.main import VERBS, parser_for

ROOT = Path(__file__).resolve().parents[1]
MAN = "share/man/man1/xfast.1"
SHELLS = {
    "bash": "share/bash-completion/completions/xfast",
    "zsh": "share/zsh/site-functions/_xfast",
    "fish": "share/fish/vendor_completions.d/xfast.fish",
}
FILES = {"SNAPSHOT", "INPUT", "FILE", "FILE.svg", "OUT", "RESULTS", "RECORD", "A", "B"}
"""What stands for a file's name; a host may be one as well."""

ENVIRONMENT = {
    "NO_COLOR": "if set, nothing is coloured.",
    "XFAST_DEBUG": "if set, an unexpected failure prints its traceback.",
    "XFAST_ISA": "instruction set of the engine: plain, baseline, avx2 or avx512 (default: the "
    "widest that the CPU has).",
}


def sections(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield a parser and all that are below it, in their order."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from sections(sub)


def arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield a verb's own arguments, without --help and the verbs below."""
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction | argparse._HelpAction):
            yield action


def escaped(text: str) -> str:
    """Return text as roff has it."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^(['.])", r"\\&\1", text, flags=re.M)


def synopsis(parser: argparse.ArgumentParser) -> str:
    """Return a verb's usage on one line, options first."""
    words = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            words.append(f"\\fI{escaped(action.metavar or 'WHAT')}\\fR ...")
        elif not action.option_strings:
            name = f"\\fI{escaped(str(action.metavar))}\\fR"
            words.append({"+": f"{name} ...", "*": f"[{name} ...]"}.get(str(action.nargs), name))
    return f"\\fB{escaped(parser.prog)}\\fR [\\fIOPTION\\fR ...] {' '.join(words)}".rstrip()


def option(action: argparse.Action) -> str:
    """Return the paragraph of one argument."""
    if action.option_strings:
        head = ", ".join(f"\\fB{escaped(name)}\\fR" for name in action.option_strings)
        if action.nargs != 0:
            value = "|".join(map(str, action.choices)) if action.choices else action.metavar
            head += f" \\fI{escaped(str(value or action.dest.upper()))}\\fR"
            head += " ..." if action.nargs == "+" else ""
    else:
        head = f"\\fI{escaped(str(action.metavar))}\\fR"
    return f".TP\n{head}\n{escaped(str(action.help)[:1].upper() + str(action.help)[1:])}.\n"


def section(parser: argparse.ArgumentParser) -> str:
    """Return the section of one verb."""
    rows = [f".SH {escaped(parser.prog.upper())}\n{escaped(parser.description or '')}\n.PP\n"]
    rows.append(synopsis(parser) + "\n")
    rows += map(option, arguments(parser))
    epilog, _, codes = (parser.epilog or "").partition("exit codes:")
    examples, _, rest = epilog.partition("\n\n")
    if examples:
        lines = escaped(examples.removeprefix("examples:").strip("\n"))
        rows.append(f".PP\nExamples:\n.PP\n.nf\n{lines}\n.fi\n")
    if rest.strip():
        rows.append(f".PP\n{escaped(rest.strip())}\n")
    rows.append(f".PP\nExit codes:{escaped(codes.rstrip())}.\n")
    return "".join(rows)


def manual() -> str:
    """Return the man page."""
    whole = parser_for(*VERBS)
    verbs = "".join(
        f".TP\n\\fBxfast {name}\\fR\n{escaped(text[0].upper() + text[1:])}.\n"
        for name, text in VERBS.items()
    )
    environment = "".join(
        f".TP\n\\fB{name}\\fR\n{escaped(text[0].upper() + text[1:])}\n"
        for name, text in ENVIRONMENT.items()
    )
    general = "".join(map(option, arguments(whole)))
    codes = (whole.epilog or "").partition("exit codes:")[2]
    rest = "".join(section(one) for one in list(sections(whole))[1:])
    return (
        '.\\" Written by docs/make_manual.py from the parser of the command line.\n'
        '.TH XFAST 1 "" xfast "User Commands"\n'
        ".SH NAME\n"
        "xfast \\- which VM snapshots restore on which hosts, why not, and a safe repair\n"
        ".SH SYNOPSIS\n\\fBxfast\\fR [\\fIOPTION\\fR ...] \\fIVERB\\fR ...\n"
        ".SH DESCRIPTION\nReads, judges, repairs and converts the x86 XSAVE state in VM "
        "snapshots, core files and checkpoints of processes.\n"
        f"{verbs}.SH OPTIONS\n{general}{rest}"
        f".SH EXIT STATUS\n{escaped(codes.strip())}.\n"
        f".SH ENVIRONMENT\n{environment}"
    )


def completions(shell: str) -> str:
    """Return the completions of one shell."""
    import shtab

    whole = parser_for(*VERBS)
    for parser in sections(whole):
        for action in parser._actions:
            if str(action.metavar) in FILES or str(action.metavar).startswith("HOST"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return str(shtab.complete(whole, shell))


if __name__ == "__main__":
    for shell, path in {"": MAN, **SHELLS}.items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(completions(shell) if shell else manual())
