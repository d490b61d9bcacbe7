"""XML without surprises: the elements of a document in order; no DTD, no entities, no depth."""

from __future__ import annotations

from xml.parsers import expat

from xfast.errors import FormatError

DEPTH_LIMIT = 32
"""How many elements may lie in each other: libvirt's documents have ten."""

COUNT_LIMIT = 100_000
"""How many elements there may be: capabilities list the CPUs of each NUMA node."""

Element = tuple[tuple[str, ...], dict[str, str]]
"""The tags from the root to an element, and its attributes."""


def elements(text: str, path: str, texts: list[str] | None = None) -> list[Element]:
    """Return the elements of an XML document, in the order in which they begin.

    Parameters
    ----------
    text, path : str
        The document, and its file for messages.
    texts : list of str, optional
        Is filled with the text directly in each element, blanks at both ends left out.

    Raises
    ------
    FormatError
        If it is no XML, nests more than 32 elements, has too many, or has a DOCTYPE.
    """
    found: list[Element] = []
    pieces: list[list[str]] = []
    open_tags: list[tuple[str, int]] = []

    def start(tag: str, attributes: dict[str, str]) -> None:
        if len(open_tags) == DEPTH_LIMIT:
            raise ValueError(f"expected at most {DEPTH_LIMIT} elements in each other, got more")
        if len(found) == COUNT_LIMIT:
            raise ValueError(f"expected at most {COUNT_LIMIT} elements, got more")
        open_tags.append((tag, len(found)))
        found.append((tuple(tag for tag, _ in open_tags), attributes))
        pieces.append([])

    def end(_: str) -> None:
        open_tags.pop()

    def data(piece: str) -> None:
        pieces[open_tags[-1][1]].append(piece)

    def doctype(*_: object) -> None:
        raise ValueError("expected no DOCTYPE, got one")

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = data
    parser.StartDoctypeDeclHandler = doctype
    try:
        parser.Parse(text, True)
    except (expat.ExpatError, ValueError) as error:
        raise FormatError(path, None, f"XML: {error}") from None
    if texts is not None:
        texts += ["".join(parts).strip() for parts in pieces]
    return found
