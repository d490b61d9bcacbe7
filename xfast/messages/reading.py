"""A pasted text as it was printed: its lines, and the CPU features that a line names."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

from xfast.messages.names import INSTRUCTION, sort_name

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
_WORD = re.compile(r"[a-z0-9][a-z0-9_.\-]{2,23}", re.IGNORECASE)
_PLAIN_WORDS = frozenset({
    "abm", "adx", "avx", "fpu", "fred", "fxsr", "hle", "lam", "sep", "sse", "syscall", "xop",
})  # fmt: skip
"""Names of instructions that also stand in texts that do not mean the feature."""


def lines_in(text: str) -> Iterator[str]:
    """Yield the lines of a text as they were printed, whatever wrapped them up since.

    Logs come as JSON, YAML, XML and HTML, in colours, and with the quotes of word processors.
    """
    for line in text.replace("\\n", "\n").splitlines():
        printed = line.strip()[: 2 * LINE_LIMIT].replace("\\u0027", "'").translate(_QUOTES)
        printed = _ESCAPES.sub("", html.unescape(printed)).replace("''", "'").strip()
        if printed:
            yield printed[:LINE_LIMIT]


def listed_names(line: str) -> list[str]:
    """Return the feature names that a line lists, or names in the words of a known program."""
    if named := ["".join(found) for found in _NAMED.findall(line)]:
        return named
    words: dict[str, None] = {}
    for rest in _BEFORE_LIST.split(line)[1:]:
        listed = (_QUOTED_LIST if rest[:1] in ("'", '"') else _BARE_LIST).match(rest)
        words |= dict.fromkeys(re.split(r"[\s,;'\"]+", listed[0] if listed else ""))
    return [word for word in words if word and word.lower() not in _NOT_NAMES]


def names_among(line: str) -> list[str]:
    """Return the words of an unknown text that are the names of instructions."""
    return [
        word
        for word in dict.fromkeys(_WORD.findall(line))
        if word.lower() not in _PLAIN_WORDS and sort_name(word).kind == INSTRUCTION
    ]
