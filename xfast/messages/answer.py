"""From a pasted text to an answer: which message it is, what its numbers say, which rules apply.

A text of several lines is a log. Its lines are looked at one by one, and those that matter are
answered: each message once, those about extended state before all others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
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
from xfast.messages.reading import lines_in, listed_names, names_among
from xfast.messages.table import ELSEWHERE, SCOPES, Message, message_of
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


def answers(text: str) -> list[Answer]:
    """Return the answers to a text: one for a line, those that matter for a log."""
    lines = list(lines_in(text))
    if len(lines) == 1:
        return [answer(lines[0])]
    found: dict[tuple[str, ...], Answer] = {}
    for line, after in pairwise([*lines, ""]):
        one = _whole(answer(line), after)
        if one.scope or one.codes:
            found.setdefault((one.text, *one.details), one)
    known = [one for one in found.values() if one.scope]
    about = [one for one in known if one.scope != ELSEWHERE]
    exact = [one for one in about if one.scope == ABOUT_STATE]
    return exact + [one for one in about if one not in exact] or known or list(found.values())


def _whole(one: Answer, after: str) -> Answer:
    """Return an answer whose line ran on into the next one, where that names what it lists."""
    if UNLISTED in one.text:
        whole, alone = answer(f"{one.line} {after}"), answer(after)
        if LISTED in whole.text and alone.text in ("", whole.text):
            return whole
    return one


def answer(line: str) -> Answer:
    """Return what one line means."""
    message = message_of(line)
    msrs = list(msrs_in(line))
    if msrs and (message is None or message.scope != ABOUT_STATE):
        return _about_msrs(line, msrs)
    if message is None:
        return _about_words(line)
    codes, scope, text = message.codes, message.scope, message.text
    groups = sort_names(cpuid_bits_in(line) or listed_names(line))
    if groups.keys() - {UNKNOWN}:
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
    for pattern, rules, sentence in HINTS:
        if re.search(pattern, line, re.IGNORECASE):
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
