"""The component table: its own consistency, and the kernel's masks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xfast.xsave import features
from xfast.xsave.cpuid import FEATURES
from xfast.xsave.features import (
    BY_NAME,
    BY_NR,
    COMPONENTS,
    bits,
    name_of,
    names_of,
    parse_component,
)


def test_masks_are_the_kernels():
    assert (
        sum(BY_NAME[name].bit for name in ("opmask", "zmm_hi256", "hi16_zmm"))
        == features.XFEATURE_MASK_AVX512
    )
    assert BY_NAME["bndregs"].bit | BY_NAME["bndcsr"].bit == features.XFEATURE_MASK_MPX
    assert BY_NAME["tilecfg"].bit | BY_NAME["tiledata"].bit == features.XFEATURE_MASK_XTILE
    assert sum(c.bit for c in COMPONENTS if c.xfd) == features.XFEATURE_MASK_USER_DYNAMIC
    assert features.SUPERVISOR_MASK == 0x1FD00


def test_table_is_ascending_and_names_are_unique():
    assert [c.nr for c in COMPONENTS] == sorted(BY_NR)
    assert len(BY_NAME) == len(COMPONENTS) == 21


def test_user_components_have_a_place_and_supervisor_ones_none():
    for c in COMPONENTS[2:]:
        assert bool(c.offset) != c.supervisor, c.name


def test_every_flag_is_a_cpuid_feature_that_needs_the_component():
    for c in COMPONENTS:
        if c.flag:
            assert FEATURES[c.flag].components & c.bit, c.name


@given(st.integers(0, (1 << 64) - 1))
def test_bits_sum_to_the_mask_and_ascend(mask):
    numbers = list(bits(mask))
    assert sum(1 << nr for nr in numbers) == mask
    assert numbers == sorted(numbers)


def test_names():
    assert names_of(0x207) == "x87+sse+avx+pkru"
    assert names_of(0) == "none"
    assert name_of(40) == "bit40"


@pytest.mark.parametrize("nr", [*BY_NR, 20, 40, 61, 63])
def test_component_parses_from_what_it_is_printed_as(nr):
    assert parse_component(name_of(nr)) == nr
    assert parse_component(f" {nr} ") == nr


@pytest.mark.parametrize("text", ["", "64", "bit64", "-1", "avx1024", "bit", "1e1"])
def test_no_component_is_refused_with_the_names_known(text):
    with pytest.raises(ValueError, match="pkru"):
        parse_component(text)
