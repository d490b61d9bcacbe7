"""JSON text in a file, or inside a string of another JSON text: where its values lie in the file.

Edits replace values where they stand, so that every other byte stays as it is.
"""

from __future__ import annotations

import re
from functools import lru_cache
from json.decoder import JSONDecoder
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xfast.engine import files
from xfast.errors import FormatError
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.model import Splice

STATE_LIMIT = 1 << 20
"""A vCPU takes some 15 KB (30 KB with AMX), four times that in arrays of bytes: 254, the most that
a machine has, 30 MB."""
TOKEN_LIMIT = 1 << 18
"""Brackets, braces and strings in a text: a vCPU has some 300 brackets and 1,500 strings, which
count in the vCPU's own text only."""
ESCAPE_LIMIT = 1 << 16
SHOWN = 40
"""Characters of a key that an error shows."""

ESCAPE = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|u....|.)")
STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
SCALAR = re.compile(r"[-+.\w]+")
SPACE = re.compile(r"[ \t\r\n]*")
BYTES = re.compile(r"\[[\d,\s]*\]")
DECODER = JSONDecoder()

Span = tuple[int, int]
"""Where a value lies in a text: its start and its end."""


class Text(NamedTuple):
    """JSON text within the file, and how to put a change of it into the file.

    `escaped` is, for a string, that as it stands in the file; `numbers`, for an array of bytes, is
    where each lies: start and end. Where a value ends is found without building it, and nothing is
    kept of each number but its place: a list costs ten times its text.
    """

    path: str
    text: str
    base: int = 0
    escaped: str = ""
    numbers: NDArray[np.int32] | None = None

    def at(self, offset: int) -> int:
        """Return where a character lies in the file (bytes)."""
        if self.numbers is not None:
            return self.base + int(self.numbers[offset][0])
        if not self.escaped:
            return self.base + offset
        starts, shifts = _escapes(self.escaped)
        passed = int(np.searchsorted(starts, offset, "right"))
        return self.base + offset + (int(shifts[passed - 1]) if passed else 0)

    def places(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where many characters lie in the file (bytes), of a text in a string."""
        starts, shifts = _escapes(self.escaped)
        passed = np.searchsorted(starts, offsets, "right")
        moved: NDArray[np.int64] = np.concatenate([[0], shifts])[passed] + self.base + offsets
        return moved

    def span(self, span: Span) -> Span:
        """Return offset and length in the file of what lies at `span`."""
        start = self.at(span[0])
        if self.numbers is not None:
            return start, self.base + int(self.numbers[span[1] - 1][1]) - start
        return start, self.at(span[1] - 1) + 1 - start

    def splice(self, source: Source, span: Span, new: str, field: str) -> Splice:
        """Return the edit that replaces what lies at `span`: digits by digits."""
        offset, length = self.span(span)
        data = new if self.numbers is None else ",".join(str(ord(c)) for c in new)
        return Splice(offset, source.read(offset, length), data.encode(), field)

    def error(self, offset: int, message: str) -> FormatError:
        """Return a FormatError that names the place in the file."""
        inside = 0 <= offset < len(self.text)
        return FormatError(self.path, self.at(offset) if inside else None, message)

    def value(self, start: int) -> tuple[Any, int]:
        """Return the value that starts at `start`, and its end."""
        try:
            return DECODER.raw_decode(self.text, start)
        except (ValueError, RecursionError) as problem:
            where = getattr(problem, "pos", start)
            reason = getattr(problem, "msg", problem)
            raise self.error(where, f"found damaged JSON: {reason}") from None

    def checked(self) -> Text:
        """Return this text, if it has no more tokens than what it should hold needs.

        Raises
        ------
        FormatError
            If it has more.
        """
        tokens = files.tokens(self.text)
        if tokens > TOKEN_LIMIT:
            raise self.error(
                0, f"expected at most {TOKEN_LIMIT} lists, objects and strings, got {tokens}"
            )
        return self

    def end(self, start: int) -> int:
        """Return where the value that starts at `start` ends."""
        first = self.text[start : start + 1]
        if first == '"':
            match = STRING.match(self.text, start)
        elif first not in ("[", "{"):
            match = SCALAR.match(self.text, start)
        else:
            return self._closed(start)
        if match is None:
            raise self.error(start, "expected a value, got damaged JSON")
        return match.end()

    def _closed(self, start: int) -> int:
        """Return where the list or object at `start` ends, over all that is in it."""
        end = files.closed(self.text, start)
        if end < 0 and self.text[~end] == '"':
            raise self.error(~end, "expected a value, got damaged JSON")
        if end < 0:
            raise self.error(start, "expected the end of a list or object, got damaged JSON")
        return end

    def members(self, start: int) -> dict[str, Span]:
        """Return where each member's value lies of the object at `start`."""
        simple = files.members(self.text, start)
        if simple is not None:
            return simple
        found: dict[str, Span] = {}
        position = self._skip(start)
        if self.text[position : position + 1] != "{":
            raise self.error(position, "expected an object {...}, got another value")
        position = self._skip(position + 1)
        while self.text[position : position + 1] == '"':
            key, position = self.value(position)
            position = self._skip(position)
            if self.text[position : position + 1] != ":":
                raise self.error(position, "found a key without a value")
            begin = self._skip(position + 1)
            position = self.end(begin)
            if key in found:
                raise self.error(begin, f"expected each key once, got {key[:SHOWN]!r} twice")
            found[key] = (begin, position)
            position = self._skip(position)
            if self.text[position : position + 1] == ",":
                position = self._skip(position + 1)
        if self.text[position : position + 1] != "}":
            raise self.error(position, "expected a key or }, got damaged JSON")
        return found

    def _skip(self, position: int) -> int:
        match = SPACE.match(self.text, position)
        return match.end() if match else position

    def inner(self, span: Span) -> Text:
        """Return the JSON text that the string, array of bytes or section at `span` holds."""
        for _ in range(4):
            if self.text[span[0]] != "{":
                break
            members = self.members(span[0])
            wanted = [members[k] for k in ("state", "snapshot") if k in members]
            span = next(iter(wanted or members.values()), (-1, -1))
            if span[0] < 0:
                break
        whole = self.text[slice(*span)]
        if whole.startswith('"'):
            return self._string(whole, span[0])
        if whole.startswith("["):
            return self._bytes(whole, span[0])
        raise self.error(span[0], "expected the state of a vCPU as JSON text, got none")

    def _string(self, whole: str, start: int) -> Text:
        """Return the text in the string at `start`."""
        escapes = whole.count("\\")
        if len(whole) > STATE_LIMIT or escapes > 2 * ESCAPE_LIMIT:
            raise self.error(
                start,
                f"expected a state of at most {STATE_LIMIT} bytes with {2 * ESCAPE_LIMIT} escapes, "
                f"got {len(whole)} with {escapes}",
            )
        text = files.unescaped(whole, 0, len(whole))
        if text is None:
            text, _ = self.value(start)
        return Text(self.path, text, start + 1, whole)

    def _bytes(self, whole: str, start: int) -> Text:
        """Return the text in the array of bytes at `start`."""
        if whole.count(",") >= STATE_LIMIT:
            raise self.error(
                start, f"expected an array of at most {STATE_LIMIT} bytes, got a longer one"
            )
        values = self.value(start)[0] if BYTES.fullmatch(whole) else []
        if not values or max(values) > 255:
            raise self.error(start, "expected an array of bytes, got another array")
        codes = np.frombuffer(whole.encode("latin-1"), np.uint8)
        digits = (codes >= 48) & (codes <= 57)
        edges = np.flatnonzero(np.diff(digits.astype(np.int8)))
        numbers = (edges.reshape(-1, 2) + 1).astype(np.int32)
        return Text(self.path, bytes(values).decode("latin-1"), start, numbers=numbers)


@lru_cache(maxsize=4)
def _escapes(whole: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the places behind each escape in a string's text, and how much further on they lie."""
    found = list(ESCAPE.finditer(whole, 1))
    shifts = np.cumsum(np.array([match.end() - match.start() - 1 for match in found], np.int64))
    return np.array([match.end() - 1 for match in found], np.int64) - shifts, shifts
