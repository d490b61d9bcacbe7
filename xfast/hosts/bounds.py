"""What a description may cost: bounds that are checked before JSON and TOML are parsed.

The parsers are others', and pay for what they are given: a key of 20,000 dotted parts costs
tomllib 1.5 GB. So the text is scanned first, in one pass; what no honest description has is
refused, and what remains is parsed in time and memory linear in its size.
"""

from __future__ import annotations

import re

from xfast.errors import FormatError

SIZE_LIMIT = 16 << 20
"""No text that describes a host is larger than this (bytes): a boot log, a dump of many CPUs."""

TOML_LIMIT = 256 << 10
"""TOML is written by people (bytes); tools write JSON."""

HOSTS_LIMIT = 16_384
"""Hosts in one description, at most: kinds of machine, of which no fleet has so many."""

DEPTH_LIMIT = 32
"""Brackets in each other; descriptions have 5, a reply of QMP 6."""

DOTS_LIMIT = 8
"""Dots in one key of TOML."""

DIGITS_LIMIT = 64
"""Characters of one number: a mask of 64 bits has 66 in binary, 18 in hexadecimal."""

_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]|[0-9]{65,}', re.DOTALL)
_TOML_TOKEN = re.compile(
    r'"""(?:[^\\]|\\.)*?(?:"""|\Z)|' + r"'''.*?(?:'''|\Z)|"
    r'"(?:[^"\\\n]|\\[^\n])*"?|' + r"'[^'\n]*'?|#[^\n]*",
    re.DOTALL,
)
_BLANKS = str.maketrans("", "", " \t")
_TOML_BRACKET = re.compile(r"[\[\]{}\n]")


def check_json(text: str, path: str) -> None:
    """Refuse JSON whose parse or values would cost more than its size.

    Raises
    ------
    FormatError
        If brackets lie too deep in each other, or a number has too many digits.
    """
    depth = 0
    for match in _JSON_TOKEN.finditer(text):
        token = match[0]
        if token in "[{":
            depth += 1
            if depth > DEPTH_LIMIT:
                raise _too_much(path, match.start(), f"{DEPTH_LIMIT} brackets in each other")
        elif token in "]}":
            depth -= 1
        elif token[0] != '"':
            raise _too_much(path, match.start(), f"{DIGITS_LIMIT} digits in a number")


def check_toml(text: str, path: str) -> None:
    """Refuse TOML whose parse or values would cost more than its size.

    Raises
    ------
    FormatError
        If the text is too long, a key has too many parts, brackets lie too deep in each other,
        or a number has too many digits.
    """
    if len(text) > TOML_LIMIT:
        raise _too_much(path, TOML_LIMIT, f"{TOML_LIMIT} characters of TOML")
    bare = _TOML_TOKEN.sub(lambda match: "" if match[0][0] == "#" else "S", text)
    for word in re.findall(r"[\w.+-]+", bare.translate(_BLANKS)):
        if word.count(".") > DOTS_LIMIT:
            raise _too_much(path, None, f"{DOTS_LIMIT} dots in a key")
        if len(word) > DIGITS_LIMIT and word[0] in "+-0123456789":
            raise _too_much(path, None, f"{DIGITS_LIMIT} characters in a number")
    depth = 0
    for match in _TOML_BRACKET.finditer(bare):
        depth += {"[": 1, "{": 1, "\n": 0}.get(match[0], -1)
        if depth > DEPTH_LIMIT:
            raise _too_much(path, None, f"{DEPTH_LIMIT} brackets in each other")


def _too_much(path: str, offset: int | None, limit: str) -> FormatError:
    return FormatError(path, offset, f"expected at most {limit}, got more")
