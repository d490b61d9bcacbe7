"""``xfast explain``: a rule, the meaning of an error message, or the leak's story replayed."""

from __future__ import annotations

import argparse
import difflib
import shutil
import sys
import textwrap
from collections.abc import Iterator

from xfast.cli.arguments import EXIT_CODES, OK, complain
from xfast.errors import XfastError, printable
from xfast.judge.rules import RULES, Rule
from xfast.kernels.behaviour import BEHAVIOURS, Behaviour
from xfast.messages.answer import Answer, answers, lines_of

EXAMPLES = f"""\
examples:
  xfast explain LEAK
  xfast explain "KVM_SET_XSAVE failed: Invalid argument"
  xfast explain ad856280ddea
  journalctl -u libvirtd | xfast explain -

{EXIT_CODES}"""

LEAK_STORY = ("bf5d00470787", "ad856280ddea", "a1020a25e697", "8647c52e9504")
"""The commits whose one story is replayed on the model."""

NAME_LIMIT = 80
"""How much of a text can be meant as the code of a rule (characters)."""

INPUT_LIMIT = 64 << 20
"""How much of standard input is read (characters)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "subject",
        nargs="*",
        metavar="SUBJECT",
        help="a rule's code, an error message, a kernel commit, or - for a log on standard input; "
        "without any, all rules are listed",
    )


def run(args: argparse.Namespace) -> int:
    """Run the verb; return the exit code."""
    subject = " ".join(args.subject)
    if not subject:
        for rule in RULES.values():
            print(f"{rule.code:<13} {rule.title}")
    elif subject.upper() in RULES:
        print(_page(RULES[subject.upper()]))
    elif commits := list(_commits(subject)):
        _tell_commits(subject.lower(), commits)
    else:
        _tell_text(sys.stdin.read(INPUT_LIMIT) if subject == "-" else subject)
    return OK


def _commits(subject: str) -> Iterator[Behaviour]:
    """Yield the behaviours whose commit a text of seven or more hexadecimal digits names."""
    if len(subject) >= 7 and " " not in subject:
        for behaviour in BEHAVIOURS.values():
            if behaviour.commit.startswith(subject.lower()[:12]):
                yield behaviour


def _tell_commits(subject: str, commits: list[Behaviour]) -> None:
    """Print what commits changed, and the leak's story for those that belong to it."""
    for behaviour in commits:
        note = f" ({behaviour.note})" if behaviour.note else ""
        print(_wrap(behaviour.ref))
        print(_wrap(f"{behaviour.name}: {behaviour.effect}{note}", "  "))
    if any(subject.startswith(commit[:7]) for commit in LEAK_STORY):
        from xfast.kvm import render, story

        print()
        print(render(story()))


def _tell_text(text: str) -> None:
    """Print the answers to a message or to a log."""
    if not text.strip():
        raise XfastError("explain: expected a message or a log, got nothing")
    found = answers(text)
    if not found:
        complain("explain: no line of this text is a message known here")
    if found.left_out:
        complain(f"explain: {found.left_out} more lines that may matter were not looked at")
    near = difflib.get_close_matches(text.strip()[:NAME_LIMIT].upper(), RULES, 1)
    if near and not (found and found[0].scope):
        print(f"Did you mean the rule {near[0]}? xfast explain {near[0]} tells of it.")
    quoted = "\n" in text.strip()
    print("\n\n".join(_answer(one, quoted) for one in found))


def _wrap(text: str, indent: str = "") -> str:
    """Return a paragraph as wide as the terminal, a hundred columns at most."""
    return textwrap.fill(
        text,
        min(shutil.get_terminal_size((100, 24)).columns, 100),
        initial_indent=indent,
        subsequent_indent=indent + "  " * text.startswith("- "),
        break_on_hyphens=False,
        break_long_words=False,
    )


def _page(rule: Rule) -> str:
    paragraphs = (rule.text, rule.next, f"Source: {rule.ref}")
    return f"{rule.code}: {rule.title}\n\n" + "\n\n".join(map(_wrap, paragraphs))


def _answer(one: Answer, quoted: bool) -> str:
    """Return an answer as text; `quoted`: under the line that it is about."""
    parts = [f"> {printable(one.line)}"] if quoted else []
    parts += [_wrap(line) for line in lines_of(one)]
    if one.codes:
        parts.append("Rules, the likeliest first (xfast explain CODE tells more):")
        parts += [f"  {code:<13} {RULES[code].title}" for code in one.codes]
    return "\n".join(parts)
