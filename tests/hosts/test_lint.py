"""Warnings about CPUID lists and boot logs that contradict themselves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xfast.hosts import Host, load, parse
from xfast.hosts.lint import LINTS, masks_of_size, parts_of, warnings
from xfast.xsave.cpuid import Cpuid
from xfast.xsave.layout import PRESETS

FULL = {
    (0, 0): (0xD, 0x756E6547, 0x6C65746E, 0x49656E69),
    (1, 0): (0x000806F8, 0, 1 << 26 | 1 << 28, 1 | 1 << 24 | 1 << 25 | 1 << 26),
    (7, 0): (1, 1 << 16, 1 << 3, 1 << 24),
    (0xD, 0): (0x602E7, 11008, 11008, 0),
    (0xD, 1): (0x1F, 10752, 0x1800, 0),
    (0xD, 2): (256, 576, 0, 0),
    (0xD, 5): (64, 1088, 0, 0),
    (0xD, 6): (512, 1152, 0, 0),
    (0xD, 7): (1024, 1664, 0, 0),
    (0xD, 9): (8, 2688, 0, 0),
    (0xD, 11): (16, 0, 1, 0),
    (0xD, 12): (24, 0, 1, 0),
    (0xD, 17): (64, 2752, 2, 0),
    (0xD, 18): (8192, 2816, 6, 0),
}
"""Leaf 0xD of a CPU with AMX and CET, sound throughout."""


def warned(changes: dict, without: tuple = ()) -> list[str]:
    rows = {key: row for key, row in (FULL | changes).items() if key not in without}
    names = ("eax", "ebx", "ecx", "edx")
    text = ""
    for (leaf, sub), row in rows.items():
        told = " ".join(f"{name}={value:#010x}" for name, value in zip(names, row, strict=True))
        text += f"   {leaf:#010x} {sub:#04x}: {told}\n"
    (host,) = parse(text.encode())
    return [warning.partition(":")[0] for warning in warnings(host)]


def test_sound_list_has_no_warning():
    assert warned({}) == []
    assert warnings(Host("x")) == []


@pytest.mark.parametrize(
    ("changes", "without", "expected"),
    [
        ({(0xD, 0): (0x202E7, 2816, 2816, 0)}, ((0xD, 18),),
         ["xcr0", "compacted-size", "feature-alone"]),
        ({(0xD, 0): (0x602A7, 11008, 11008, 0)}, (), ["xcr0", "compacted-size", "feature-alone"]),
        ({(0xD, 0): (0x602E7, 11008, 11000, 0)}, (), ["size"]),
        ({(0xD, 0): (0x602E7, 2700, 11008, 0)}, (), ["size"]),
        ({(0xD, 1): (0x1F, 10704, 0x1800, 0)}, (), ["compacted-size"]),
        ({(0xD, 9): (0, 0, 0, 0)}, (), ["unplaced"]),
        ({(7, 0): (1, 1 << 16, 0, 1 << 24)}, (), ["component-alone"]),
        ({(0xD, 0): (0x600E7, 11008, 11008, 0), (0xD, 1): (0x1F, 10752, 0x1800, 0)}, (),
         ["feature-alone"]),
    ],
)  # fmt: skip
def test_each_contradiction_is_named(changes, without, expected):
    assert warned(changes, without) == expected


def test_list_for_a_guest_is_at_reset(data):
    """What a VMM hands to a guest must not count what IA32_XSS, 0 at reset, does not have."""
    (host,) = load(data / "raw/kvm618-guestxcr0_e7.cpuid2")
    assert host.cpuid is not None
    rows = {(e.function, e.subleaf): e[3:7] for e in host.cpuid.entries}
    rows[0xD, 1] = (0xF, 2472, 0x1800, 0)
    rows[0xD, 11], rows[0xD, 12] = (16, 0, 1, 0), (24, 0, 1, 0)
    cpuid = Cpuid.from_rows(rows)
    layout = cpuid.layout
    told = Host("g", layout, 0xE7, cpuid=cpuid, provenance={"kvm_xcr0": "dump"})
    assert any("IA32_XSS 0" in warning for warning in warnings(told))
    bare = told.replace(provenance={"kvm_xcr0": "derived"})
    assert not any("IA32_XSS 0" in warning for warning in warnings(bare))


def test_size_that_nothing_makes_names_both(shared):
    (host,) = load(shared / "cases/hosts/openvmm708-leaves.txt")
    text = "\n".join(warnings(host))
    assert "10704, which no set of its components makes: 10752 is 0x600e7 | 0x1800" in text


def test_tilecfg_alone_names_the_commit(shared):
    (host,) = load(shared / "cases/hosts/fc5065-guest-cpuid-r.txt")
    assert any("55cd57b596e8" in warning for warning in warnings(host))


@given(st.integers(0, 0xFFFFF), st.integers(0, 0x1FFFF))
def test_sizes_lead_back_to_components(user, supervisor):
    layout = PRESETS["intel"]
    user &= 0xE02FF
    supervisor &= 0x1C00
    mask = (sum(parts_of(user)) | supervisor) & layout.mask
    size = layout.compacted_size(mask & ~3)
    found = masks_of_size(layout, size, user, supervisor)
    assert found is not None
    assert layout.compacted_size(found & ~3) == size
    assert not found & ~(user | supervisor | 3)


def test_rules_have_names_of_their_own():
    assert len({rule.name for rule in LINTS}) == len(LINTS)
    assert all(rule.meaning for rule in LINTS)


def test_real_dumps_are_quiet(shared):
    """Of 46 dumps, only those that stop early, and one of a CPU with PKU off, have a warning."""
    folder = shared / "samples/cpuid"
    odd = {}
    for path in sorted(folder.rglob("*")):
        if path.name.startswith(("x86_64-cpuid", "fingerprint")) or "CPUID" in path.name:
            for host in load(path):
                if found := warnings(host):
                    odd[path.name] = [warning.partition(":")[0] for warning in found]
    assert odd == {
        "GenuineIntel00306C3_HaswellXeon_CPUID.txt": ["unplaced"],
        "GenuineIntel0050657_CascadeLakeXeon_CPUID.txt": ["unplaced"],
        "x86_64-cpuid-EPYC-7502-32-Core.xml": ["component-alone"],
    }
