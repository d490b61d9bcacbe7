"""Words that trip readers up stay out of the messages and docstrings of every room."""

import re
from pathlib import Path

import pytest

import xfast

PACKAGE = Path(xfast.__file__).parent
FILES = sorted(
    path for suffix in ("py", "pyx", "pxi", "pxd") for path in PACKAGE.rglob(f"*.{suffix}")
)

BACKWARDS = (
    r"\b(got|found) [^\"]*[,;] (needed|expected) ",
    r"[,;] needed:? (?!in )[\"'{a-z0-9]",
    r"\bexpected [^\"]*, found ",
)
"""What came stands before what was expected, or the two have other words than everywhere."""

BANNED = (
    "all the same:", "as foretold", "got no place", "told nowhere", "came about",
    "that a fork could break", "makes way", "1 inputs", "1 snapshots", "at a risk",
)  # fmt: skip
"""Phrases that reviewers stumbled over."""


def whole_messages(text):
    """Return source text with each string that goes on in the next line made one."""
    return re.sub(r"\"\s*\n\s*f?\"(?!\"\")", "", text)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_message_says_first_what_was_expected(path):
    text = whole_messages(path.read_text())
    for pattern in BACKWARDS:
        assert not re.search(pattern, text), re.search(pattern, text)[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_phrase_that_readers_stumble_over(path):
    text = " ".join(path.read_text().split())
    for phrase in BANNED:
        assert phrase not in text


@pytest.mark.parametrize(
    "source",
    [
        'f"areas: got {n} rows, needed {m}"',
        '"found the end, expected more"',
        '"not a regular file, needed a host description"',
        '"zstd: nothing here reads it; needed: pip install"',
        'f"found {n} bytes, "\n    f"needed {m}"',
        '"expected 2, found 3"',
    ],
)
def test_the_self_lint_sees_what_it_looks_for(source):
    assert any(re.search(pattern, whole_messages(source)) for pattern in BACKWARDS)


def test_the_self_lint_lets_a_good_message_pass():
    good = 'f"expected dtype uint8, "\n    "got int8"  # as long as needed: in a loop'
    assert not any(re.search(pattern, whole_messages(good)) for pattern in BACKWARDS)
