"""From a pasted text to an answer: which message it is, what its numbers say, which rules apply.

A text of several lines is a log. Its lines are looked at one by one, and those that matter are
answered: each message once, those about extended state before all others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from xfast.messages.names import INSTRUCTION, STATE, UNKNOWN, Sorted, describe, sort_names
from xfast.messages.table import ELSEWHERE, SCOPES, Message, message_of
from xfast.messages.table import STATE as ABOUT_STATE
from xfast.messages.values import (
    cpuid_bits_in,
    describe_components,
    describe_masks,
    describe_offsets,
    describe_sizes,
    msrs_in,
    register_in,
)

LINE_LIMIT = 2000
"""Of a longer line only so many characters are looked at."""

NOTHING_KNOWN = "There is no message known here that this text matches."

HINTS = (
    (r"kvm_set_\w+|os error 22|\beinval\b|error\(22\)", "LEAK HOST-MISSING XCR0 KERNEL MXCSR",
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
    (r"mxcsr", "MXCSR", "MXCSR bits that MXCSR_MASK does not allow are refused."),
)  # fmt: skip
"""What words in an unknown text hint at: pattern, rules (the likeliest first), a sentence."""

_LIST = re.compile(r"features?\s*[:=]\s*\[?([\w.,;'\" +\-\n]+)", re.IGNORECASE)
_QUOTED = re.compile(r"feature:? '?([\w.\-]+)'?\s+(?:required|is|not)", re.IGNORECASE)


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
    lines = [line.strip()[:LINE_LIMIT] for line in text.splitlines() if line.strip()]
    if len(lines) == 1:
        return [answer(lines[0])]
    found: dict[tuple[str, ...], Answer] = {}
    for line in lines:
        one = answer(line)
        if one.scope or one.codes:
            found.setdefault((one.text, *one.details), one)
    known = [one for one in found.values() if one.scope]
    about = [one for one in known if one.scope != ELSEWHERE]
    exact = [one for one in about if one.scope == ABOUT_STATE]
    return exact + [one for one in about if one not in exact] or known or list(found.values())


def answer(line: str) -> Answer:
    """Return what one line means."""
    message = message_of(line)
    msrs = list(msrs_in(line))
    if msrs and (message is None or message.scope != ABOUT_STATE):
        return _about_msrs(line, msrs)
    if message is None:
        return _about_words(line)
    names = cpuid_bits_in(line) or _listed(line)
    codes, scope = message.codes, message.scope
    groups = sort_names(names)
    if groups.keys() - {UNKNOWN}:
        codes = _codes_of(groups)
        scope = scope if codes else ELSEWHERE
        details = describe(groups)
    else:
        details = [
            *describe_masks(line),
            *describe_components(line),
            *describe_offsets(line),
            *(describe_sizes(line) if "SIZE" in codes else ()),
            *filter(None, [register_in(line)] if "ISA" in codes else ()),
        ]
    return Answer(line, scope, codes, *_words(message), tuple(details))


def _words(message: Message) -> tuple[str, str, str]:
    return message.text, message.next, f"{message.program}: {message.source}"


def _listed(line: str) -> list[str]:
    """Return the feature names that a line lists."""
    quoted = _QUOTED.findall(line)
    if quoted:
        return quoted
    listed = _LIST.search(line)
    return [word for word in re.split(r"[\s,;'\"]+", listed[1]) if word] if listed else []


def _codes_of(groups: dict[str, list[Sorted]]) -> tuple[str, ...]:
    """Return the rules that a list of features touches: none where it is of speed alone."""
    state = ("HOST-MISSING", "XCR0") if STATE in groups else ()
    return state + (("ISA",) if INSTRUCTION in groups else ())


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
