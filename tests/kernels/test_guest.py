"""What KVM announces to a guest, and what its control registers may become."""

import pytest

from xfast.kernels.behaviour import of_release
from xfast.kernels.guest import announced_problem, cr4_reserved, permitted_xcr0
from xfast.kernels.uapi import CR4_CET, CR4_OSXSAVE, CR4_PKE


@pytest.mark.parametrize(
    ("mask", "problem"),
    [
        (0, ""),
        (0x7, ""),
        (0x2E7, ""),
        (0x602E7, ""),
        (0x202E7, "AMX needs both of its components"),
        (0x67, "AVX-512 needs AVX and all three of its components"),
        (0x207, ""),
        (0x200, "x87 can't be off"),
    ],
)
def test_a_guest_that_enables_all_that_is_announced_is_spared_or_faults(mask, problem):
    assert announced_problem(mask) == problem


def test_a_host_without_amx_has_nothing_to_permit():
    for release in ("5.15", "6.3", "6.4"):
        assert permitted_xcr0(of_release(release), 0x2E7, 0) == 0x2E7


def test_cr4_bits_go_with_the_features_that_they_need():
    assert not cr4_reserved(frozenset({"xsave", "pku"})) & (CR4_OSXSAVE | CR4_PKE)
    assert cr4_reserved(frozenset({"xsave"})) & CR4_PKE
    for one in ("ibt", "user_shstk"):
        assert not cr4_reserved(frozenset({one})) & CR4_CET
    assert cr4_reserved(frozenset()) & CR4_CET
