"""From a pasted text to an answer: which message it is, what its numbers say, which rules apply.

A text of several lines is a log. Its lines are looked at one by one, and those that matter are
answered: each message once, those about extended state before all others.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple

from xfast.messages.names import (
    CET,
    INSTRUCTION,
    STATE,
    UNKNOWN,
    Sorted,
    describe,
    sort_names,
)
from xfast.messages.reading import (
    LINE_LIMIT,
    WORD,
    lines_in,
    lines_with,
    listed_names,
    names_among,
    names_instruction,
)
from xfast.messages.table import ELSEWHERE, SCOPES, Message, message_of, messages_in
from xfast.messages.table import STATE as ABOUT_STATE
from xfast.messages.values import (
    cpuid_bits_in,
    describe_components,
    describe_masks,
    describe_offsets,
    describe_sizes,
    is_elsewhere,
    msrs_in,
    register_in,
)

NOTHING_KNOWN = "There is no message known here that this text matches."

HINTS = (
    (r"kvm_set_(?!msr)\w+|os error 22|\beinval\b|error\(22\)",
     "LEAK HOST-MISSING XCR0 KERNEL MXCSR",
     "A KVM call answered EINVAL. KVM_SET_XSAVE stands for LEAK, HOST-MISSING, KERNEL, FORMAT or "
     "MXCSR, KVM_SET_XCRS for XCR0, KVM_SET_SREGS for CR4.PKE on a host without PKU, and "
     "KVM_SET_MSRS is not extended state. The VMM's log or strace tells which call it was."),
    (r"\bxcr0\b|xsetbv", "XCR0 HOST-MISSING",
     "XCR0 holds the components that the guest has enabled; the target has to offer all of them."),
    (r"xsave|xrstor|xstate|xfeature|(?:leaf|cpuid).{0,8}\b0?x?d\b",
     "LEAK HOST-MISSING XCR0 SIZE LAYOUT FORMAT",
     "The XSAVE area is what xfast reads: XSTATE_BV says what is in it."),
    (r"\bpku\b|pkru|ospke|protection.?key", "LEAK HOST-MISSING XCR0",
     "PKRU is component 9; Linux 5.16 leaked its bit into guests that have none."),
    (r"avx.?512|zmm|opmask|\bavx\b|\bymm", "HOST-MISSING XCR0 ISA",
     "AVX is component 2, AVX-512 components 5 to 7."),
    (r"\bamx\b|tile.?(?:data|cfg)", "PERM SIZE HOST-MISSING", "AMX is components 17 and 18."),
    (r"\bmpx\b|bndregs|bndcsr|bndcfg", "HOST-MISSING XCR0", "MPX is components 3 and 4."),
    (r"\bcet\b|shstk|shadow.?stack|\bxss\b", "XSS",
     "CET is supervisor state, enabled by IA32_XSS."),
    (r"^(?=.*(?:restor|snapshot|migrat))(?=.*\bintel\b)(?=.*\bamd\b)", "LAYOUT ISA",
     "Intel and AMD place AVX-512 and PKRU at different offsets of the standard format."),
    (r"mxcsr", "MXCSR", "MXCSR bits that MXCSR_MASK does not allow are refused."),
)  # fmt: skip
"""What words in an unknown text hint at: pattern, rules (the likeliest first), a sentence."""

OTHER_MARKS = (re.compile("msr"), re.compile(r"offset\s"))
"""What lines have that are about extended state without any message."""

HINT_MARKS = tuple(
    re.compile(pattern, re.MULTILINE) for pattern in (*(row[0] for row in HINTS), r"e[abcd]x")
)
"""What lines have whose words hint at something, beside names of instructions."""

LINES_ANSWERED = 1024
CHARACTERS_A_LINE = 1024
"""Of a log so many lines that may matter are looked at, or one for so many of its characters."""

_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)

Place = tuple[int, Message | None]
"""Where what marks a line begins, and which message that is."""

LISTED = "Each feature below says what its absence means."
UNLISTED = "This line names no feature; the hypervisor's own log on the target does."


class Answer(NamedTuple):
    """What one line means.

    Parameters
    ----------
    line : str
        The line, as it was pasted.
    scope : str
        A key of SCOPES, or empty where nothing is known.
    codes : tuple of str
        The rules behind it, the likeliest first.
    text, next, source : str
        As in `Message`; empty where they do not apply.
    details : tuple of str
        What the numbers and names in the line say, a sentence each.
    """

    line: str
    scope: str
    codes: tuple[str, ...]
    text: str
    next: str
    source: str
    details: tuple[str, ...]


class Answers(list[Answer]):
    """The answers to a text; `left_out`: how many lines that may matter were too many."""

    left_out = 0


def answers(text: str) -> Answers:
    """Return the answers to a text: one for a line, those that matter for a log."""
    lines = list(lines_in(text))
    if len(lines) < 2:
        return Answers(map(answer, lines))
    log = "\n".join([*lines, ""])
    lower = log.translate(_LOWER)
    known = messages_in(lower)
    found = _answers_to(log, _places(lower, OTHER_MARKS) | known)
    if not any(one.scope for one in found):
        found = _answers_to(log, _hints(lower, lines) | known)
    about = [one for one in found if one.scope not in ("", ELSEWHERE)]
    about.sort(key=lambda one: one.scope != ABOUT_STATE)
    best = Answers(about or [one for one in found if one.scope] or found)
    best.left_out = found.left_out
    return best


def _places(lower: str, marks: Iterable[re.Pattern[str]]) -> dict[int, Place]:
    """Return where lines with one of these marks lie: {line: (mark, no message)}."""
    places = (place for mark in marks for place in lines_with((mark,), lower))
    return {line: (at, None) for line, at in places}


def _hints(lower: str, lines: list[str]) -> dict[int, Place]:
    """Return the lines whose words hint at something; all, where these are few."""
    if len(lines) <= LINES_ANSWERED:
        starts = accumulate((len(line) + 1 for line in lines[:-1]), initial=0)
        return {start: (start, None) for start in starts}
    named: dict[int, Place] = {}
    end = 0
    for match in WORD.finditer(lower):
        if match.start() >= end and names_instruction(match[0]):
            named[lower.rfind("\n", 0, match.start()) + 1] = match.start(), None
            end = lower.find("\n", match.end())
    return named | _places(lower, HINT_MARKS)


def _answers_to(log: str, places: dict[int, Place]) -> Answers:
    """Return the answers to some lines of a log, each once."""
    found: dict[tuple[str, ...], Answer] = {}
    chosen, left_out = _chosen(log, places)
    for start in chosen:
        line, after, *_ = log[start : start + 2 * LINE_LIMIT + 2].split("\n", 2)
        one = _answer(line, places[start][1])
        if UNLISTED in one.text:
            one = _whole(one, after)
        if one.scope or one.codes:
            found.setdefault((one.text, *one.details), one)
    answers = Answers(found.values())
    answers.left_out = left_out
    return answers


def _chosen(log: str, places: dict[int, Place]) -> tuple[list[int], int]:
    """Return the lines that are looked at, and how many were too many.

    All are looked at, or as many as a log of this size may have. Then those go first that repeat
    nothing from their mark on: what lies before it is the time and the name of a machine.
    """
    lines = sorted(places)
    most = max(LINES_ANSWERED, len(log) // CHARACTERS_A_LINE)
    if len(lines) <= most:
        return lines, 0
    said: dict[str, int] = {}
    for line in lines:
        at, _ = places[line]
        said.setdefault(log[at : log.find("\n", at)], line)
    firsts = list(said.values())
    return sorted(firsts[:most]), max(0, len(firsts) - most)


def _whole(one: Answer, after: str) -> Answer:
    """Return an answer whose line ran on into the next one, where that names what it lists."""
    line = f"{one.line} {after}"
    if _known_names(line):
        whole, alone = answer(line), answer(after)
        if LISTED in whole.text and alone.text in ("", whole.text):
            return whole
    return one


def answer(line: str) -> Answer:
    """Return what one line means."""
    return _answer(line, message_of(line))


def _answer(line: str, message: Message | None) -> Answer:
    """Return what a line with this message, or none, means."""
    msrs = list(msrs_in(line))
    if msrs and (message is None or message.scope != ABOUT_STATE):
        return _about_msrs(line, msrs)
    if message is None:
        return _about_words(line)
    codes, scope, text = message.codes, message.scope, message.text
    if groups := _known_names(line):
        codes = _codes_of(groups)
        scope = scope if codes else ELSEWHERE
        details = describe(groups)
        text += f" {LISTED}" * message.lists
    elif message.lists and is_elsewhere(line):
        codes, scope, details = (), ELSEWHERE, [register_in(line)]
    else:
        text += f" {UNLISTED}" * (message.lists and not register_in(line))
        details = [
            *describe_masks(line),
            *describe_components(line),
            *describe_offsets(line),
            *(describe_sizes(line) if "SIZE" in codes else ()),
            *filter(None, [register_in(line)] if "ISA" in codes else ()),
        ]
    return Answer(line, scope, codes, text, message.next, _source(message), tuple(details))


def _known_names(line: str) -> dict[str, list[Sorted]]:
    """Return the features that a line lists, sorted; nothing if none of them is known."""
    groups = sort_names(cpuid_bits_in(line) or listed_names(line))
    return groups if groups.keys() - {UNKNOWN} else {}


def _source(message: Message) -> str:
    """Say what an answer rests on, with the program's name where it does not tell that."""
    if message.source.startswith(message.program.split(",")[0]):
        return message.source
    return f"{message.program}: {message.source}"


def _codes_of(groups: dict[str, list[Sorted]]) -> tuple[str, ...]:
    """Return the rules that a list of features touches: none where it is of speed alone."""
    state = groups.get(STATE, [])
    codes: dict[str, None] = {}
    if any(one.components & ~CET or not one.components for one in state):
        codes |= dict.fromkeys(("HOST-MISSING", "XCR0"))
    if any(one.components & CET for one in state):
        codes |= dict.fromkeys(("XSS", "HOST-MISSING"))
    if INSTRUCTION in groups:
        codes["ISA"] = None
    return tuple(codes)


def _about_msrs(line: str, msrs: list[tuple[int, bool, str]]) -> Answer:
    """Return the answer to a line that names MSRs."""
    details = tuple(f"MSR {number:#x} is {what}." for number, _, what in msrs)
    numbers = [number for number, state, _ in msrs if state]
    if not numbers:
        return Answer(line, ELSEWHERE, (), "", "", "", details)
    xfd = any(number in (0x1C4, 0x1C5) for number in numbers)
    return Answer(
        line,
        ABOUT_STATE,
        ("XFD", "PERM") if xfd else ("XSS",),
        "The MSR is part of the extended state. It was refused or lost because the target's CPU, "
        "kernel or guest CPUID does not have the feature, or because the VMM does not save it.",
        "xfast check FILE --host HOST compares it with the guest's CPUID. KVM offers CET to guests "
        "from Linux 6.18 on.",
        "Linux arch/x86/kvm/x86.c kvm_set_msr_common()",
        details,
    )


def _about_words(line: str) -> Answer:
    """Return what the words of an unknown text hint at."""
    details = [*describe_masks(line), *describe_offsets(line), *describe_components(line)]
    if describe_offsets(line):
        return Answer(
            line,
            ABOUT_STATE,
            ("LAYOUT",),
            "Two layouts put the same component at different offsets.",
            "xfast host layout XCR0 --host HOST shows both; xfast convert moves the components.",
            "Intel SDM vol. 1 section 13.4.3; AMD APM vol. 2 section 11.5.2",
            tuple(details),
        )
    codes: dict[str, None] = {}
    lower = line.lower()
    for mark, (_, rules, sentence) in zip(HINT_MARKS, HINTS, strict=False):
        if mark.search(lower):
            codes.update(dict.fromkeys(rules.split()))
            details.append(sentence)
    if names := cpuid_bits_in(line) or names_among(line):
        groups = sort_names(names)
        codes |= dict.fromkeys(_codes_of(groups))
        details += describe(groups)
    if "SIZE" in codes:
        details += describe_sizes(line)
    return Answer(line, "", tuple(codes), "", "", "", tuple(details))


def lines_of(one: Answer) -> Iterator[str]:
    """Yield an answer as paragraphs for people, without the rules' own pages."""
    if not one.scope:
        yield NOTHING_KNOWN
        if one.codes or one.details:
            yield "What its words hint at:"
    elif SCOPES[one.scope]:
        yield SCOPES[one.scope]
    if one.text:
        yield one.text
    yield from (f"- {detail}" for detail in one.details)
    if one.next:
        yield f"Next: {one.next}"
    if one.source:
        yield f"Source: {one.source}"
