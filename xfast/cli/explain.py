"""``xfast explain``: a rule, the meaning of an error message, or the leak's story replayed."""

from __future__ import annotations

import argparse

from xfast.cli.arguments import OK, TROUBLE, complain
from xfast.judge.rules import MESSAGES, RULES, Rule

LEAK_STORY = ("bf5d00470787", "ad856280ddea", "a1020a25e697", "8647c52e9504")
"""The commits whose one story `explain` replays on the model."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "subject", nargs="*", help="a rule code, an error message, or a commit; none: all codes"
    )


def _page(rule: Rule) -> str:
    return f"{rule.code}: {rule.title}\n\n{rule.text}\n\n{rule.next}\n\nSource: {rule.ref}"


def run(args: argparse.Namespace) -> int:
    """Run the verb; return the exit code."""
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
