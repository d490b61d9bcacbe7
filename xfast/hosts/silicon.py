"""What CPUs do that CPUID does not tell, by family and model: today, the width of x87's pointers.

A CPU that is not listed is not known; nobody has looked.
"""

from __future__ import annotations

from typing import NamedTuple


class Generation(NamedTuple):
    """CPUs that share a core.

    `models` are the first and last model of each range. `x87_pointer_bits` are the bits that
    FIP has; the topmost is repeated up to bit 63.
    """

    name: str
    vendor: str
    family: int
    models: tuple[tuple[int, int], ...]
    x87_pointer_bits: int


def _only(*models: int) -> tuple[tuple[int, int], ...]:
    return tuple((model, model) for model in models)


GENERATIONS = (
    Generation("zen1-2", "AuthenticAMD", 23, ((0x00, 0xFF),), 48),
    Generation("dhyana", "HygonGenuine", 24, ((0x00, 0x0F),), 48),
    Generation("zen3", "AuthenticAMD", 25, ((0x00, 0x0F), (0x20, 0x5F)), 48),
    Generation("zen4", "AuthenticAMD", 25, ((0x10, 0x1F), (0xA0, 0xAF)), 57),
    Generation("haswell", "GenuineIntel", 6, _only(0x3C, 0x3F, 0x45, 0x46), 48),
    Generation("broadwell", "GenuineIntel", 6, _only(0x3D, 0x47, 0x4F, 0x56), 48),
    Generation("skylake", "GenuineIntel", 6, _only(0x4E, 0x55, 0x5E, 0x8E, 0x9E, 0xA5, 0xA6), 48),
    Generation("icelake-client", "GenuineIntel", 6, _only(0x7D, 0x7E), 48),
    Generation("tigerlake", "GenuineIntel", 6, _only(0x8C, 0x8D, 0xA7), 48),
    Generation("alderlake", "GenuineIntel", 6, _only(0x97, 0x9A, 0xB7, 0xBA, 0xBF), 48),
    Generation("icelake-server", "GenuineIntel", 6, _only(0x6A, 0x6C), 57),
    Generation("sapphire-rapids", "GenuineIntel", 6, _only(0x8F), 57),
    Generation("emerald-rapids", "GenuineIntel", 6, _only(0xCF), 57),
    Generation("granite-rapids", "GenuineIntel", 6, _only(0xAD, 0xAE), 57),
)
"""*Source*: measured on Zen 3 (25/1), Zen 4 (25/17), Sapphire Rapids (6/143) and Emerald Rapids
(6/207); of the others, whether the core was built with five levels of paging. Skylake's
0x55 is Cascade Lake and Cooper Lake too.
"""


def generation(vendor: str | None, family: int | None, model: int | None) -> Generation | None:
    """Return the generation that a CPU belongs to, or None where it is not known."""
    for one in GENERATIONS:
        if (
            (vendor, family) == (one.vendor, one.family)
            and model is not None
            and any(first <= model <= last for first, last in one.models)
        ):
            return one
    return None


def family_and_model(signature: int) -> tuple[int, int]:
    """Return the family and the model that CPUID leaf 1 EAX tells.

    *Source*: Intel SDM vol. 2 CPUID; AMD APM vol. 3 section E.3.2.
    """
    family, model = signature >> 8 & 0xF, signature >> 4 & 0xF
    if family in (6, 15):
        model |= signature >> 12 & 0xF0
    if family == 15:
        family += signature >> 20 & 0xFF
    return family, model
