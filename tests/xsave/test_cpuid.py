"""CPUID values: lookups as KVM's, and feature names against the kernel's own list."""

from __future__ import annotations

import pytest

from xfast.hosts import load
from xfast.xsave.cpuid import (
    ENTRY,
    FEATURES,
    PSABI_LEVELS,
    RUNTIME_FEATURES,
    XSAVE_FEATURES,
    Cpuid,
    Entry,
    psabi_level,
)
from xfast.xsave.layout import LayoutError


def test_no_two_features_share_a_bit():
    places = {feature[1:5] for feature in FEATURES.values()}
    assert len(places) == len(FEATURES)
    assert all(0 <= f.bit < 32 and f.register in Entry._fields for f in FEATURES.values())
    assert FEATURES.keys() >= XSAVE_FEATURES | RUNTIME_FEATURES


def test_each_bit_alone_gives_its_feature():
    for feature in FEATURES.values():
        registers = [0, 0, 0, 0]
        registers[["eax", "ebx", "ecx", "edx"].index(feature.register)] = 1 << feature.bit
        cpuid = Cpuid.from_rows({(feature.leaf, feature.subleaf): registers})
        assert cpuid.features == {feature.name}


def test_names_are_those_of_proc_cpuinfo(shared):
    """The same machine by `cpuid -r` and by its own kernel: each flag that both know agrees."""
    folder = shared / "samples/cpuid/other"
    (host,) = load(folder / "thishost-cpuid-r-k.txt")
    text = (folder / "thishost-proc-cpuinfo.txt").read_text()
    flags = next(line for line in text.splitlines() if line.startswith("flags")).split()[2:]
    kernel_hides = {"osxsave", "ospke", "user_shstk", "movdiri", "movdir64b"}
    assert host.features is not None
    assert host.features - kernel_hides <= set(flags)
    assert set(flags) & FEATURES.keys() <= host.features


def test_find_takes_an_insignificant_row_for_any_subleaf():
    rows = (Entry(0xD, 0, 1, 7, 0, 0, 0), Entry(0xD, 9, 0, 99, 0, 0, 0))
    cpuid = Cpuid(rows)
    assert cpuid.find(0xD, 0) == rows[0]
    assert cpuid.find(0xD, 2) == rows[1]
    assert cpuid.find(0xE) is None
    assert cpuid.xcr0 == 7


def test_masks_have_64_bits():
    rows = {(0xD, 0): (7, 0, 0, 1 << 30), (0xD, 1): (0xF, 0, 0x1800, 1)}
    cpuid = Cpuid.from_rows(rows)
    assert cpuid.xcr0 == 1 << 62 | 7
    assert cpuid.xss == 1 << 32 | 0x1800


def test_nothing_is_known_of_an_empty_list():
    empty = Cpuid(())
    assert (empty.xcr0, empty.xss, empty.features) == (0, 0, frozenset())
    assert empty.vendor is None
    assert empty.signature is None


def test_vendor_and_signature():
    rows = {(0, 0): (13, 0x756E6547, 0x6C65746E, 0x49656E69), (1, 0): (0x606A6, 0, 0, 0)}
    cpuid = Cpuid.from_rows(rows)
    assert cpuid.vendor == "GenuineIntel"
    assert cpuid.signature == 0x606A6


def test_impossible_leaf_d_raises():
    cpuid = Cpuid.from_rows({(0xD, 0): (7, 0, 0, 0), (0xD, 2): (256, 16, 0, 0)})
    with pytest.raises(LayoutError):
        _ = cpuid.layout


def test_entry_is_struct_kvm_cpuid_entry2():
    assert ENTRY.size == 40


def test_psabi_levels_build_on_each_other():
    features: set[str] = set()
    assert psabi_level(features) is None
    for level, more in PSABI_LEVELS.items():
        features |= more
        assert psabi_level(features) == level
        assert all(name in FEATURES for name in more)
    assert psabi_level(features - {"cx16"}) == "x86-64"
    assert psabi_level(features - {"movbe"}) == "x86-64-v2"
