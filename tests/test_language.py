"""Words that trip readers up stay out of the messages and docstrings of finished rooms."""

import re
from pathlib import Path

import pytest

import xfast

PACKAGE = Path(xfast.__file__).parent
ROOMS = ("arrow.py", "bench", "cli", "fleet", "hosts", "kernels", "messages", "report", "xsave")
"""Where every message says "expected X, got Y". The other rooms still have "got Y, needed X"."""

FILES = [
    path
    for room in ROOMS
    for path in (
        [PACKAGE / room] if room.endswith(".py") else sorted((PACKAGE / room).rglob("*.py"))
    )
]

BACKWARDS = (
    r"(got|found) [^\"]*, needed ",
    r"\b(got|found) [^\"]*, expected ",
    r", needed (?!in )[{a-z0-9]",
)
"""What came stands before what was expected."""

BANNED = (
    "all the same:", "as foretold", "got no place", "told nowhere", "came about",
    "that a fork could break", "makes way", "1 inputs", "1 snapshots",
)  # fmt: skip
"""Phrases that reviewers stumbled over."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_message_says_first_what_was_expected(path):
    text = path.read_text()
    for pattern in BACKWARDS:
        assert not re.search(pattern, text), re.search(pattern, text)[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_phrase_that_readers_stumble_over(path):
    text = " ".join(path.read_text().split())
    for phrase in BANNED:
        assert phrase not in text


def test_the_self_lint_sees_what_it_looks_for():
    assert re.search(BACKWARDS[0], 'f"areas: got {n} rows, needed {m}"')
    assert re.search(BACKWARDS[1], '"found the end, expected more"')
    assert re.search(BACKWARDS[2], '"not a regular file, needed a host description"')
    assert not any(re.search(one, '"expected uint8, got int8"') for one in BACKWARDS)
