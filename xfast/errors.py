"""What xfast raises: every error says what was found, what was needed, and where."""


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
        where = self.path if offset is None else f"{self.path}: offset {offset}"
        super().__init__(f"{where}: {message}")


def printable(text: str) -> str:
    """Return `text` fit for a terminal line: what is not printable comes out escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
