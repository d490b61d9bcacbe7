"""Plans of state.json files: a text of a fleet, and which of its numbers may be others.

The files of a fleet have the same keys, and differ in numbers. The first one is read, and where its
numbers lie is kept; one that differs in nothing else is compared and not parsed. What a vCPU's
CPUID, XCR0, MSRs' indices and so on are is then known, for these numbers are not among them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from xfast.engine.template import Template
from xfast.kernels.uapi import MSR_IA32_XFD, MSR_IA32_XSS, SREGS_CR4
from xfast.snapshots.bytes.json_text import Span, Text
from xfast.snapshots.kvm_fpu import IMAGE
from xfast.snapshots.model import Vcpu, misnumbered
from xfast.xsave.cpuid import Cpuid

PLANS_LIMIT, KEPT_LIMIT = 16, 2 << 20
"""How many texts are kept, and their bytes: where the numbers lie takes several times as many."""

TEXT_LIMIT = 256 << 10
"""The longest text that is kept: to learn one takes about a microsecond a byte."""

MOST = (1 << 64) - 1
"""A plan has no number that is as large, or larger."""
DIGITS = r"(?<!\d)(?:0|[1-9]\d{0,19})(?!\d)"
NUMBER = re.compile(DIGITS)
TOKEN = re.compile(rf'"(?:[^"\\]|\\.)*+"(?P<key>\s*+:)?|{DIGITS}', re.DOTALL)
"""A string, which may be a key, or a number that is in none."""
MSR = re.compile(r'\{"index":(\d++),"data":(\d++)\}')
FIXED = "cpuid", "xcrs", "msrs", "sregs", "xsave", "fpu"
"""Members of a vCPU's state of which a number counts; of others none is read."""
PKE_BYTE = SREGS_CR4 + 2
"""Which byte of struct kvm_sregs has CR4.PKE."""

Slot = tuple[int, int, int, int]
"""A number, as `xfast.engine.template.Template` takes it."""


class Part(NamedTuple):
    """A vCPU that was read, its text, where in that the members of its state lie, and its `fpu`."""

    vcpu: Vcpu
    text: Text
    state: Mapping[str, Span]
    fpu: tuple[str, ...]


Counting = Callable[[Part], Iterable[tuple[Span, int, bool, int]]]
"""Returns the numbers that make up the area (False) and the fpu object's image (True).

Of each: where it lies in the text, how many bytes it has, and where it goes.
"""


class Known(NamedTuple):
    """What is the same of a vCPU in all texts of a plan; `fpu` are the fields of that object."""

    nr: int
    cpuid: Cpuid | None
    xcr0: int | None
    fpu: tuple[str, ...]


class Plan(NamedTuple):
    """A text that was read, the vCPUs in it and doubts about them; no other has its number.

    The template's values are the areas, `size` bytes each, and behind them as many images of the
    ``fpu`` objects, `IMAGE` bytes each.
    """

    number: int
    template: Template
    vcpus: tuple[Known, ...]
    size: int
    doubts: tuple[str, ...]


_plans: list[Plan] = []
_numbers = itertools.count()
_missed = 0


def forget() -> None:
    """Empty the cache: for those who measure, or compare."""
    global _missed
    _plans.clear()
    _missed = 0


def follow(data: bytes) -> tuple[Plan, bytes] | None:
    """Return the plan of a text and its values; None where it differs from all in more."""
    global _missed
    if len(data) > TEXT_LIMIT:
        return None
    for place, plan in enumerate(_plans):
        values = plan.template.follow(data)
        if values is not None:
            if place:
                _plans[:] = [plan, *(one for one in _plans if one is not plan)]
            _missed = 0
            return plan, values
    _missed += 1
    return None


def remember(data: bytes, parts: Sequence[Part], counting: Counting) -> None:
    """Keep the plan of a text that was read.

    After many texts in a row that followed no plan, few are kept: the 1st, the 2nd, the 4th ...
    """
    sizes = {part.vcpu.area.size for part in parts}
    if len(data) > TEXT_LIMIT or _missed & (_missed - 1) or len(sizes) != 1:
        return
    (size,) = sizes
    if any(part.text.numbers is not None for part in parts):
        return
    slots: list[Slot] = []
    for row, part in enumerate(parts):
        starts = row * size, len(parts) * size + row * IMAGE
        slots += _slots_of(
            part, [(*span, n, starts[which] + at) for span, n, which, at in counting(part)]
        )
    slots += _around(data.decode("latin-1"), {part.text.base - 1 for part in parts})
    total = len(parts) * (size + IMAGE)
    try:
        slots = [slot for slot in slots if slot[3] >= 0 or int(data[slot[0] : slot[1]]) < MOST]
        template = Template(data, np.array(sorted(slots), np.int32).reshape(-1, 4), total)
    except ValueError:  # digits that are written as escapes
        return
    vcpus = tuple(map(_known, parts))
    doubts = misnumbered(vcpu.nr for vcpu in vcpus)
    _plans.insert(0, Plan(next(_numbers), template, vcpus, size, doubts))
    while len(_plans) > PLANS_LIMIT or sum(len(one.template.text) for one in _plans) > KEPT_LIMIT:
        _plans.pop()


def _known(part: Part) -> Known:
    vcpu = part.vcpu
    return Known(vcpu.index, vcpu.cpuid, vcpu.xcr0, part.fpu)


def _around(text: str, states: set[int]) -> Iterable[Slot]:
    """Yield the numbers that nobody reads: all but those in keys and in the vCPUs' own texts."""
    for token in TOKEN.finditer(text):
        start, end = token.span()
        if text[start] != '"':
            yield start, end, 8, -1
        elif not token["key"] and start not in states and "\\u" not in token[0]:
            yield from ((*one.span(), 8, -1) for one in NUMBER.finditer(text, start, end))


def _slots_of(part: Part, found: list[Slot]) -> Iterable[Slot]:
    """Return the numbers of a vCPU that may be others: those `found`, and which nobody reads."""
    text, state = part.text.text, part.state
    for name, span in state.items():
        if name not in FIXED:
            found += [(*token.span(), 8, -1) for token in _bare(text, span)]
    if "sregs" in state and text[state["sregs"][0]] == "[":
        bytes_of = [(*token.span(), 1, -1) for token in NUMBER.finditer(text, *state["sregs"])]
        del bytes_of[PKE_BYTE : PKE_BYTE + 1]
        found += bytes_of
    if "msrs" in state:
        rows = list(MSR.finditer(text, *state["msrs"]))
        if len(rows) == text.count("{", *state["msrs"]):
            kept = MSR_IA32_XSS, MSR_IA32_XFD
            found += [(*row.span(2), 8, -1) for row in rows if int(row[1]) not in kept]
    ends = part.text.places(np.array([slot[1] for slot in found]) - 1) + 1
    starts = part.text.places(np.array([slot[0] for slot in found]))
    rest = [slot[2:] for slot in found]
    return [(a, b, *more) for a, b, more in zip(starts.tolist(), ends.tolist(), rest, strict=True)]


def _bare(text: str, span: Span) -> Iterable[re.Match[str]]:
    """Return the numbers at `span` that are in no string."""
    return (token for token in TOKEN.finditer(text, *span) if token[0][0] != '"')
