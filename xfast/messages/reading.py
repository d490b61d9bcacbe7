"""A pasted text as it was printed: its lines, and the CPU features that a line names."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator
from functools import cache

from xfast.messages.names import INSTRUCTION, SPELLINGS, sort_name
from xfast.xsave.cpuid import FEATURES

LINE_LIMIT = 2000
"""Of a longer line only so many characters are looked at."""

_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|\\(?=[\"'])")
_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")

_BEFORE_LIST = re.compile(
    r"(?:features?(?:\(s\))?(?: of this cpu)?(?: are| is)?|requirements?|flags?)\s*[:=\[(]+\s*",
    re.IGNORECASE,
)
_BARE_LIST, _QUOTED_LIST = re.compile(r"[\w.,; +\-]*"), re.compile(r"[\w.,;'\" +\-]*")
_NAMED = re.compile(
    r"feature:? '?([\w.\-]+)'?\s+(?:required|is|not)"
    r"|cpuid\.(\w+)'? (?:was|is|has)|vmfeature\.cpuid\.(\w+)"
    r"|(?:cpu-feature|host-model-required-features)\.node\.kubevirt\.io/([\w.\-]+)"
    r"|X86_CPUID_\w*?FEATURE_E[ABCD]X_(\w+)|\bflag_(\w+)|[0-9a-f]{1,8},[0-9a-f]{1,8} = (\w+)"
    r"|this virtual machine requires (\w+) but",
    re.IGNORECASE,
)
"""How programs name one feature: libvirt, VMware, KubeVirt, VirtualBox, oVirt, CRaC."""

_NOT_NAMES = frozenset({"missing", "extra", "features", "feature", "and", "or", "have", "none"})
WORD = re.compile(r"[a-z0-9][a-z0-9_.\-]{2,23}", re.IGNORECASE)
_PLAINWORDS = frozenset({
    "abm", "adx", "avx", "fpu", "fred", "fxsr", "hle", "lam", "sep", "sse", "syscall", "xop",
})  # fmt: skip
"""Names of instructions that also stand in texts that do not mean the feature."""

_SEPARATORS = str.maketrans("", "", "-._")


def lines_in(text: str) -> Iterator[str]:
    """Yield the lines of a text as they were printed, whatever wrapped them up since.

    Logs come as JSON, YAML, XML and HTML, in colours, and with the quotes of word processors.
    """
    for line in _unwrap(text.replace("\\n", "\n")).splitlines():
        parts: Iterable[str] = (line,)
        if "&" in line:
            parts = _unwrap(html.unescape(line[: 2 * LINE_LIMIT])).splitlines()
        for part in parts:
            if printed := part.strip():
                yield printed[:LINE_LIMIT]


def _unwrap(text: str) -> str:
    return _ESCAPES.sub("", text.replace("\\u0027", "'").translate(_QUOTES)).replace("''", "'")


def in_parts(pattern: str) -> tuple[re.Pattern[str], ...]:
    """Return a pattern as the parts that its ``.*`` divide it into.

    A first word is searched before what is in front of it, which is many times as fast.
    """
    quick = re.sub(r"^\\b([a-z0-9_]+)(?![?*{])", r"\1(?<=\\b\1)", pattern)
    return tuple(map(re.compile, re.split(r"\.\*(?![^(]*\))", quick)))


def search(parts: Iterable[re.Pattern[str]], text: str, at: int = 0) -> list[re.Match[str]]:
    """Return the matches of several patterns, each searched behind the one before, or none."""
    found = []
    for part in parts:
        if not (match := part.search(text, at)):
            return []
        found.append(match)
        at = match.end()
    return found


def lines_with(parts: tuple[re.Pattern[str], ...], text: str) -> Iterator[tuple[int, int]]:
    """Yield where each line that has a pattern begins, and where its match does.

    The text is searched as a whole: most lines have no part of it.
    """
    at = 0
    while found := search(parts, text, at):
        first, last = found[0], found[-1]
        line = text.rfind("\n", 0, last.start()) + 1
        if first.start() < line:
            at = line
            continue
        yield line, first.start()
        at = text.find("\n", last.end())
        if at < 0:
            return


def listed_names(line: str) -> list[str]:
    """Return the feature names that a line lists, or names in the words of a known program."""
    if named := ["".join(found) for found in _NAMED.findall(line)]:
        return named
    words: dict[str, None] = {}
    for rest in _BEFORE_LIST.split(line)[1:]:
        listed = (_QUOTED_LIST if rest[:1] in ("'", '"') else _BARE_LIST).match(rest)
        words |= dict.fromkeys(re.split(r"[\s,;'\"]+", listed[0] if listed else ""))
    return [word for word in words if word and word.lower() not in _NOT_NAMES]


def names_instruction(word: str) -> bool:
    """Tell whether a word of an unknown text is the name of an instruction."""
    lower = word.lower()
    return (
        lower.translate(_SEPARATORS) in _instructions()
        and lower not in _PLAINWORDS
        and sort_name(lower).kind == INSTRUCTION
    )


@cache
def _instructions() -> frozenset[str]:
    """Return the names of instructions in all spellings, without what separates their parts."""
    return frozenset(
        name.translate(_SEPARATORS)
        for name in (*FEATURES, *SPELLINGS)
        if sort_name(name).kind == INSTRUCTION
    )


def names_among(line: str) -> list[str]:
    """Return the words of an unknown text that are the names of instructions."""
    return [word for word in dict.fromkeys(WORD.findall(line)) if names_instruction(word)]
