"""What xfast raises: every error says what was expected, what came, and where.

And how names of files and hosts are written wherever they are shown.
"""

import re


class XfastError(ValueError):
    """The root of xfast's errors; a ValueError, so that callers need not know it."""


class LayoutError(XfastError):
    """A layout is impossible, or lacks a component that was asked for."""


class PolicyError(XfastError):
    """What was asked for would lose data or break a rule, and was not allowed explicitly."""


class FormatError(XfastError):
    """A file is not what it claims to be.

    Attributes
    ----------
    path : str
        The file.
    offset : int or None
        Where in the file (after decompression), in bytes.
    """

    def __init__(self, path: str, offset: int | None, message: str) -> None:
        self.path = str(path)
        self.offset = offset
        where = escape(self.path) if offset is None else f"{escape(self.path)}: offset {offset}"
        super().__init__(f"{where}: {message}")


class UnknownFormatError(FormatError):
    """A file is of no format that xfast knows."""


def printable(text: str) -> str:
    """Return `text` fit for a terminal line: what is not printable comes out as `escape` has it."""
    return "".join(c if c.isprintable() else _escape_character(c) for c in text)


def escape(name: str) -> str:
    r"""Return a file's or host's name as every output writes it: printable, UTF-8, reversible.

    Bytes that are not UTF-8 become ``\xNN``, characters that don't print ``\xNN``, ``\uNNNN`` or
    ``\UNNNNNNNN``, and a backslash ``\\``; `unescape` gives back the name itself.
    """
    if name.isprintable() and "\\" not in name:
        return name
    return "".join(map(_escape_character, name))


def _escape_character(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte of a name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if character == "\\":
        return "\\\\"
    if character.isprintable():
        return character
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def unescape(text: str) -> str:
    """Return the name that `escape` wrote as `text`."""
    return re.sub(r"\\(\\|x..|u....|U........)", _unescape_character, text)


def _unescape_character(match: re.Match[str]) -> str:
    what = match[1]
    if what == "\\":
        return what
    code = int(what[1:], 16)
    return chr(code + 0xDC00 if what[0] == "x" and code >= 0x80 else code)
