"""The model's rules that no recording through KVM covers, each with its source; and invariants."""

import contextlib
import errno

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xfast.hosts.model import Host
from xfast.kernels.behaviour import BEHAVIOURS, Behaviours, of_release, supervisor_kept
from xfast.kernels.guest import announced_problem
from xfast.kernels.uapi import (
    CR4_CET,
    CR4_OSXSAVE,
    CR4_PKE,
    CR4_SMEP,
    CR4_UMIP,
    KVM_FPU,
    MSR_IA32_XFD,
    MSR_IA32_XFD_ERR,
    MSR_IA32_XSS,
)
from xfast.kvm import VMMS, Kernel, KernelPanic, migrate, outcome
from xfast.kvm.fpu import (
    ARCH_GET_XCOMP_GUEST_PERM,
    ARCH_REQ_XCOMP_GUEST_PERM,
    ARCH_REQ_XCOMP_PERM,
    FPU_GUEST_PERM_LOCKED,
)
from xfast.xsave import area as engine
from xfast.xsave.features import PKRU, TILEDATA, XFEATURE_MASK_FPSSE, bits
from xfast.xsave.layout import preset

S_FORMS = frozenset({"xsave", "xsaveopt", "xsavec", "xgetbv1", "xsaves", "xfd"})
AMX = 0x60000
CET_U, CET_S, APX, PASID = 1 << 11, 1 << 12, 1 << 19, 1 << 10
RELEASES = ("5.15", "5.16.2", "5.17.5", "5.18.2", "6.0", "6.1.55", "6.6", "6.12.60", "6.18", "7.0")
TILECFG = np.frombuffer(
    b"\1" + bytes(15) + b"\x40\0" * 8 + bytes(16) + b"\x10" * 8 + bytes(8), np.uint8
)
"""Palette 1, eight tiles of 16 rows and 64 bytes a row; others are loaded as their init value."""

U_CET, PL3_SSP, PL0_SSP = 0x6A0, 0x6A7, 0x6A4


def intel(user=0x602E7, supervisor=0x1C00, xsave=S_FORMS, **facts):
    layout = preset("intel").restricted(user | supervisor)
    return Host(
        "intel",
        layout,
        xcr0=user,
        xss=supervisor,
        mxcsr_mask=0xFFFF,
        xsave=xsave,
        vendor="GenuineIntel",
        **facts,
    )


def leaf_d(mask, xss=0):
    return [(0xD, 0, 1, mask & 0xFFFFFFFF, 0, 0, mask >> 32), (0xD, 1, 1, 0xF, 0, xss, 0)]


def buffer(bv, fill=0x08, layout=None, mxcsr=0x1F80, size=16384):
    """Return an area in which every component of `bv` is live."""
    layout = layout or preset("intel")
    area = np.zeros(size, np.uint8)
    area[:2] = 0x7F, 2
    area[24:28].view("<u4")[0] = mxcsr
    if bv & 2:
        area[160:416] = fill
    for slot in layout.slots:
        if bv >> slot.nr & 1 and slot.offset:
            end = slot.offset + (4 if slot.nr == 9 else slot.size)
            area[slot.offset : end] = fill + slot.nr & 0xFF or 1
            if slot.nr == 17:
                area[slot.offset : end] = TILECFG
    area[512:520].view("<u8")[0] = bv
    return area


def bv_of(data):
    return int.from_bytes(bytes(data[512:520]), "little")


def refused(code, call, *arguments, **options):
    with pytest.raises(OSError, match=rf"\[Errno {code}\]"):
        call(*arguments, **options)


def amx_vcpu(release="6.18", **facts):
    kernel = Kernel(intel(**facts), release)
    kernel.arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM, 18)
    vcpu = kernel.create_vcpu()
    vcpu.set_cpuid2(leaf_d(0x602E7))
    return vcpu


# AMX, permissions and XFD. Source: Linux arch/x86/kernel/fpu/xstate.c, Documentation/arch/x86/
# xstate.rst; commits 980fe2fddcff, 5ab2f45bba48, be50b2065dfa, 820a6ee944e7, b45f72177594.


def test_amx_in_cpuid_needs_permission():
    vcpu = Kernel(intel(), "6.18").create_vcpu()
    refused(errno.EPERM, vcpu.set_cpuid2, leaf_d(0x602E7))
    assert vcpu.guest_supported_xcr0 == 0
    assert vcpu.cpuid.entries == ()


def test_the_first_vcpu_freezes_guest_permissions():
    kernel = Kernel(intel(), "6.18")
    kernel.create_vcpu()
    refused(errno.EBUSY, kernel.arch_prctl, ARCH_REQ_XCOMP_GUEST_PERM, 18)
    kernel.arch_prctl(ARCH_REQ_XCOMP_PERM, 18)  # the thread's own is not frozen
    assert not kernel.arch_prctl(ARCH_GET_XCOMP_GUEST_PERM) & TILEDATA


def test_an_old_grant_drops_the_supervisor_bits_and_the_lock():
    """Linux kernel commit d8414603b29f: __state_perm keeps non-user bits (in v6.16)."""
    for release, kept in (("6.12", 0), ("6.16", PASID)):
        kernel = Kernel(intel(), release)
        kernel.arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM, 18)
        assert kernel.fpu.guest_perm.state_perm & (PASID | FPU_GUEST_PERM_LOCKED) == kept


def test_amx_enlarges_the_area_of_its_vcpu_alone():
    kernel = Kernel(intel(), "6.18")
    assert kernel.xsave2_size == 4096
    assert kernel.permitted_xcr0 == 0x2E7  # TILECFG goes with TILEDATA
    kernel.arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM, 18)
    assert kernel.xsave2_size == 11008
    with_amx, without = kernel.create_vcpu(), kernel.create_vcpu()
    with_amx.set_cpuid2(leaf_d(0x602E7))
    without.set_cpuid2(leaf_d(0x2E7))
    refused(errno.EINVAL, with_amx.get_xsave)
    assert len(with_amx.get_xsave2()) == 11008
    assert len(without.get_xsave()) == len(without.get_xsave2()) == 4096


def test_what_was_loaded_before_amx_came_is_gone():
    """fpstate_realloc() copies nothing of an image that is not in the registers."""
    kernel = Kernel(intel(), "6.18")
    kernel.arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM, 18)
    vcpu = kernel.create_vcpu()
    vcpu.set_cpuid2(leaf_d(0x2E7))
    vcpu.set_xsave(buffer(7))
    assert bv_of(vcpu.get_xsave()) == 7
    vcpu.set_cpuid2(leaf_d(0x602E7))
    assert bv_of(vcpu.get_xsave2()) == 0
    assert vcpu.get_fpu() == bytes(KVM_FPU.size)


def test_tiles_round_trip():
    vcpu = amx_vcpu()
    area = buffer(0x600E7)
    vcpu.set_xsave(area)
    vcpu.run()
    got = np.frombuffer(vcpu.get_xsave2(), np.uint8)
    assert not engine.diff(area[:11008], got, preset("intel")) & 0x600E7


def test_amx_is_refused_on_kernels_without_it():
    """KVM_SUPPORTED_XCR0 got XTILE with 86aff7a47992 (in v5.17)."""
    vcpu = Kernel(intel(), "5.16.2").create_vcpu()
    vcpu.set_cpuid2(leaf_d(0x602E7))  # no permission is asked for
    assert vcpu.guest_supported_xcr0 == 0x2E7
    refused(errno.EINVAL, vcpu.set_xsave, buffer(TILEDATA))
    refused(errno.EINVAL, vcpu.get_xsave2)
    refused(errno.EINVAL, vcpu.kernel.arch_prctl, ARCH_REQ_XCOMP_GUEST_PERM, 18)


def test_without_xfd_the_host_has_no_tiles():
    """fpu__init_system_xstate() drops USER_DYNAMIC where the CPU lacks XFD."""
    kernel = Kernel(intel(xsave=S_FORMS - {"xfd"}), "6.18")
    assert kernel.fpu.user_cfg.max_features == 0x202E7
    refused(errno.EOPNOTSUPP, kernel.arch_prctl, ARCH_REQ_XCOMP_GUEST_PERM, 18)


def test_xfd_is_limited_by_cpuid():
    vcpu = amx_vcpu()
    refused(errno.EINVAL, vcpu.set_msr, MSR_IA32_XFD, 1 << 17)
    vcpu.set_msr(MSR_IA32_XFD, TILEDATA)
    vcpu.set_msr(MSR_IA32_XFD_ERR, TILEDATA)
    assert vcpu.get_msr(MSR_IA32_XFD) == vcpu.get_msr(MSR_IA32_XFD_ERR) == TILEDATA
    plain = Kernel(intel(), "6.18").create_vcpu()
    refused(errno.EINVAL, plain.set_msr, MSR_IA32_XFD, TILEDATA)
    plain.set_msr(MSR_IA32_XFD, 0)


def test_a_disabled_tile_panics_the_host_without_the_fix():
    vcpu = amx_vcpu("6.12.60")
    kernel = vcpu.kernel
    vcpu.set_msr(MSR_IA32_XFD, TILEDATA)
    vcpu.set_xsave(buffer(0x60003))
    with pytest.raises(KernelPanic, match="b45f72177594"):
        vcpu.run()
    for call in (vcpu.run, vcpu.get_xcrs, vcpu.get_fpu, kernel.create_vcpu):
        with pytest.raises(KernelPanic, match="the host is down"):
            call()


def test_an_xfd_write_clears_nothing_while_the_thread_s_registers_are_live():
    """b45f72177594: only if test_thread_flag(TIF_NEED_FPU_LOAD)."""
    vcpu = amx_vcpu("6.12.67")
    vcpu.kernel.fpu.need_fpu_load = False
    vcpu.set_xsave(buffer(0x60003))
    vcpu.set_msr(MSR_IA32_XFD, TILEDATA)
    assert bv_of(vcpu.get_xsave2()) == 0x60003
    with pytest.raises(KernelPanic):
        vcpu.run()


@pytest.mark.parametrize("first", ["xfd", "xsave"])
def test_a_disabled_tile_is_cleared_with_the_fix(first):
    """At KVM_SET_XSAVE, and at the write of IA32_XFD while the registers are not live."""
    vcpu = amx_vcpu("6.12.67")
    steps = [lambda: vcpu.set_msr(MSR_IA32_XFD, TILEDATA), lambda: vcpu.set_xsave(buffer(0x60003))]
    for step in steps if first == "xfd" else reversed(steps):
        step()
    assert bv_of(vcpu.get_xsave2()) == 0x20003
    vcpu.run()


def test_saves_with_xfd_call_the_tile_init():
    """Intel SDM vol. 1 section 13.14: a disabled component is treated as initial."""
    vcpu = amx_vcpu()
    vcpu.set_xsave(buffer(0x60003))

    vcpu.run(lambda processor: vcpu.set_msr(MSR_IA32_XFD, TILEDATA))
    assert bv_of(vcpu.get_xsave2()) & ~PKRU == 0x20003


# APX. Source: Linux commits 50c5b071e283, ea68e39190cf, b02dc185ee86 (in v6.16).


def test_apx_is_a_host_component_that_kvm_offers_nobody():
    kernel = Kernel(intel(user=0x802E7), "6.16")
    assert kernel.fpu.user_cfg.max_features == 0x802E7
    assert kernel.supported_xcr0 == 0x2E7
    vcpu = kernel.create_vcpu()
    vcpu.set_cpuid2(leaf_d(0x802E7))
    refused(errno.EINVAL, vcpu.set_xsave, buffer(APX))
    refused(errno.EINVAL, vcpu.set_xcrs, [(0, 0x80007)])
    assert int.from_bytes(vcpu.get_xsave()[464:472], "little") == 0x802E7


def test_apx_is_unknown_before_6_16():
    kernel = Kernel(intel(user=0x802E7), "6.15")
    assert kernel.fpu.user_cfg.max_features == 0x2E7
    refused(errno.EINVAL, kernel.arch_prctl, ARCH_REQ_XCOMP_PERM, 19)
    refused(errno.EOPNOTSUPP, Kernel(intel(), "6.16").arch_prctl, ARCH_REQ_XCOMP_PERM, 19)


def test_apx_lies_behind_the_tiles_in_a_compacted_image_and_before_them_in_a_standard_one():
    kernel = Kernel(intel(user=0xE02E7), "6.16")
    layout = kernel.fpu.layout
    assert layout.slot(19).offset < layout.slot(17).offset
    packed = layout.compacted_offsets(kernel.fpu.kernel_cfg.max_features)
    assert packed[19] > packed[18]


def test_apx_and_mpx_together_turn_xsave_off():
    host = Host(
        "impossible",
        preset("intel").restricted(0x800FF),
        xcr0=0x800FF,
        xss=0,
        mxcsr_mask=0xFFFF,
        xsave=S_FORMS,
    )
    vcpu = Kernel(host, "6.16").create_vcpu()
    assert vcpu.get_xcrs() == []
    refused(errno.EINVAL, vcpu.set_xcrs, [(0, 1)])
    refused(errno.EINVAL, vcpu.set_xsave, buffer(7))
    vcpu.set_xsave(buffer(3))
    assert bv_of(vcpu.get_xsave()) == 3
    vcpu.run()
    assert vcpu.get_xsave()[160:416] == bytes([8]) * 256
    assert Kernel(host, "6.15").fpu.has_xsave


# CET. Source: Linux commits 8b05b3c98816, 7bc4ed75f24d (in v6.17), e140467bbdaf, c26675447faf
# (in v6.18).


SHSTK_AND_IBT = [(7, 0, 1, 0, 0, 1 << 7, 1 << 20)]


def cet_vcpu(release="6.18"):
    vcpu = Kernel(intel(), release).create_vcpu()
    vcpu.set_cpuid2([*leaf_d(0x2E7, CET_U | CET_S), *SHSTK_AND_IBT])
    return vcpu


def test_only_guest_fpus_hold_cet_s():
    fpu = Kernel(intel(), "6.17").fpu
    assert fpu.guest_cfg.default_features & CET_S
    assert not fpu.task.xfeatures & CET_S
    assert not Kernel(intel(), "6.16").fpu.guest_cfg.default_features & CET_S


def test_guest_default_features_leave_the_tiles_out():
    fpu = Kernel(intel(), "6.17").fpu
    assert fpu.guest_cfg.default_features == 0x202E7 | PASID | CET_U | CET_S
    assert fpu.kernel_cfg.default_features == 0x202E7 | PASID | CET_U


def test_cet_needs_both_components_and_6_18():
    vcpu = cet_vcpu()
    assert vcpu.guest_supported_xss == CET_U | CET_S
    vcpu.set_msr(MSR_IA32_XSS, CET_U | CET_S)
    refused(errno.EINVAL, vcpu.set_msr, MSR_IA32_XSS, PASID)
    refused(errno.EINVAL, cet_vcpu("6.17").set_msr, MSR_IA32_XSS, CET_U)
    one = Kernel(intel(supervisor=CET_U), "6.18").create_vcpu()
    one.set_cpuid2(leaf_d(7, CET_U | CET_S))
    assert one.guest_supported_xss == 0


def test_cet_msrs_live_in_the_image_and_survive_set_xsave():
    vcpu = cet_vcpu()
    for msr, value in ((U_CET, 1), (PL3_SSP, 0x1000), (PL0_SSP, 0x2000)):
        vcpu.set_msr(msr, value)
    vcpu.set_xsave(buffer(7))
    assert vcpu.guest_fpu.fpstate.xstate_bv & (CET_U | CET_S) == CET_U | CET_S
    assert [vcpu.get_msr(msr) for msr in (U_CET, PL3_SSP, PL0_SSP)] == [1, 0x1000, 0x2000]
    assert bv_of(vcpu.get_xsave()) & ~PKRU == 7  # GET and SET never carry supervisor components
    refused(errno.EINVAL, vcpu.set_xsave, buffer(7 | CET_U))


@pytest.mark.parametrize(
    ("ecx", "edx", "msr", "value", "taken"),
    [
        (1 << 7, 1 << 20, PL3_SSP, 1 << 63, False),
        (1 << 7, 1 << 20, PL3_SSP, 0x1002, False),
        (1 << 7, 1 << 20, PL3_SSP, (1 << 64) - 8, True),
        (1 << 7, 1 << 20, U_CET, 0x40, False),
        (1 << 7, 1 << 20, U_CET, 0xC00, False),
        (1 << 7, 1 << 20, U_CET, 0x1000, False),
        (1 << 7, 1 << 20, U_CET, 1 << 63, False),
        (1 << 7, 1 << 20, U_CET, 0x403F, True),
        (1 << 7, 0, U_CET, 0x4, False),
        (1 << 7, 0, U_CET, 0x3, True),
        (0, 1 << 20, U_CET, 0x1, False),
        (0, 1 << 20, U_CET, 0x4, True),
        (0, 1 << 20, PL3_SSP, 0, False),
        (0, 0, U_CET, 0, False),
    ],
)
def test_cet_msrs_are_checked(ecx, edx, msr, value, taken):
    """Linux arch/x86/kvm/x86.h kvm_is_valid_u_s_cet(), x86.c __kvm_set_msr()."""
    vcpu = Kernel(intel(), "6.18").create_vcpu()
    vcpu.set_cpuid2([*leaf_d(0x2E7, CET_U | CET_S), (7, 0, 1, 0, 0, ecx, edx)])
    if taken:
        vcpu.set_msr(msr, value)
        assert vcpu.get_msr(msr) == value
    else:
        refused(errno.EINVAL, vcpu.set_msr, msr, value)
    vcpu.run()
    assert not vcpu.guest_fpu.fpstate.in_use


def test_an_image_that_cannot_be_loaded_becomes_initial():
    """ex_handler_fprestore(): the host warns, initialises the registers and goes on."""
    vcpu = cet_vcpu()
    vcpu.set_xsave(buffer(7))
    vcpu.guest_fpu.fpstate.regs[24:28].view("<u4")[0] = 1 << 16
    vcpu.run()
    assert not vcpu.guest_fpu.fpstate.in_use
    assert not bv_of(vcpu.get_xsave()) & 7


@pytest.mark.parametrize(("release", "cet"), [("6.17", False), ("6.18", True)])
def test_init_zeroes_what_the_kernel_says(release, cet):
    host = intel(user=0xFF)
    vcpu = Kernel(host, release).create_vcpu()
    vcpu.set_cpuid2([*leaf_d(0xFF, CET_U | CET_S), *SHSTK_AND_IBT])
    if cet:
        vcpu.set_msr(PL3_SSP, 0x1000)
    vcpu.set_xsave(buffer(0x1F, layout=host.layout))
    vcpu.init()
    got = vcpu.get_xsave()
    assert bv_of(got) == 0x1F  # the bits stay
    assert got[960:1088] == bytes(128)
    assert got[576:832] == bytes([10]) * 256
    if cet:
        assert vcpu.get_msr(PL3_SSP) == 0


def test_cet_widens_the_size_that_leaf_d_1_tells():
    """Intel SDM vol. 2 CPUID leaf 0DH: EBX of sub-leaf 1 is for XCR0 | IA32_XSS."""
    vcpu = cet_vcpu()
    vcpu.set_xcrs([(0, 7)])
    before = vcpu.get_cpuid2()[1].ebx
    vcpu.set_msr(MSR_IA32_XSS, CET_U | CET_S)
    assert vcpu.get_cpuid2()[1].ebx == before + 16 + 24


# PKRU in compacted images. Source: Linux arch/x86/kernel/fpu/core.c fpu_swap_kvm_fpstate().


def test_the_leak_is_the_same_bit_in_a_compacted_image():
    vcpu = Kernel(intel(user=0x2E7), "5.16.2").create_vcpu()
    vcpu.set_cpuid2(leaf_d(7))
    refused(errno.EINTR, vcpu.run, immediate_exit=True)
    got = vcpu.get_xsave()
    assert bv_of(got) & PKRU
    assert got[2688:2696] == bytes(8)  # the bit leaks, not the VMM's value


def test_mxcsr_of_an_idle_guest_survives_in_a_compacted_image():
    """SDM vol. 1 section 13.10: XSAVEC and XSAVES count SSE in use where MXCSR is not 0x1F80."""
    for flags, kept in ((S_FORMS, 0x1FA0), (frozenset({"xsave"}), 0x1F80)):
        vcpu = Kernel(intel(user=7, xsave=flags), "6.12").create_vcpu()
        vcpu.set_cpuid2(leaf_d(7))

        def guest(processor):
            processor.mxcsr = 0x1FA0

        vcpu.run(guest)
        assert int.from_bytes(vcpu.get_xsave()[24:28], "little") == kept


def test_pkru_of_the_guest_is_switched_apart():
    vcpu = Kernel(intel(user=0x2E7), "6.12").create_vcpu()
    vcpu.set_cpuid2(leaf_d(0x2E7))
    vcpu.set_xcrs([(0, 0x2E7)])
    fpu = vcpu.kernel.fpu
    vcpu.run(lambda processor: fpu.wrpkru(0xDEAD))
    assert fpu.rdpkru() == 0x55555554
    assert vcpu.pkru == 0xDEAD
    vcpu.set_xsave(buffer(7))  # bit 9 clear: the value stays
    assert vcpu.pkru == 0xDEAD
    vcpu.set_xsave(buffer(7 | PKRU))
    assert vcpu.pkru == 0x11111111
    seen = []
    vcpu.set_xcrs([(0, 7)])
    vcpu.run(lambda processor: seen.append(fpu.rdpkru()))
    vcpu.cr4 = CR4_PKE
    vcpu.run(lambda processor: seen.append(fpu.rdpkru()))
    assert seen == [0x55555554, 0x11111111]


# Others. Source: xfast/behaviour.py's table.


def test_cpuid_after_a_run():
    for release, same, other in (
        ("5.15", 0, 0),
        ("5.16", errno.EINVAL, errno.EINVAL),
        ("5.16.3", 0, errno.EINVAL),
    ):
        vcpu = Kernel(intel(user=0x2E7), release).create_vcpu()
        vcpu.set_cpuid2(leaf_d(7))
        vcpu.run()
        for entries, code in ((leaf_d(7), same), (leaf_d(3), other)):
            if code:
                refused(code, vcpu.set_cpuid2, entries)
            else:
                vcpu.set_cpuid2(entries)


def test_the_list_of_before_the_run_is_still_the_same_after_xcr0_and_cr4_changed():
    """Writes of XCR0 and CR4 refresh the stored list, with which the new one is compared."""
    vcpu = Kernel(intel(user=0x2E7), "6.12").create_vcpu()
    entries = [*leaf_d(7), (1, 0, 0, 0, 0, 1 << 26, 0), (7, 0, 1, 0, 0, 0, 0)]
    vcpu.set_cpuid2(entries)
    vcpu.set_xcrs([(0, 7)])
    vcpu.run()
    vcpu.cr4 = CR4_OSXSAVE | CR4_PKE
    vcpu.set_cpuid2(entries)
    refused(errno.EINVAL, vcpu.set_cpuid2, entries[:-1])


@pytest.mark.parametrize("release", ["5.19", "6.0"])
def test_a_leaf_without_sub_leaves_is_found_under_any_index(release):
    """KVM_CPUID_INDEX_NOT_SIGNIFICANT came with 277ad7d58611 (in v6.0)."""
    vcpu = Kernel(intel(user=0x2E7), release).create_vcpu()
    narrow, first = (0x80000008, 5, 1, 0x2F30, 0, 0, 0), (1, 3, 1, 0, 0, 0, 0)
    if release == "6.0":
        refused(errno.EINVAL, vcpu.set_cpuid2, [narrow])
    else:
        vcpu.set_cpuid2([narrow])
    vcpu.set_cpuid2([first])
    vcpu.cr4 = CR4_OSXSAVE
    (entry,) = vcpu.get_cpuid2()
    assert entry.ecx == (1 << 27 if release == "6.0" else 0)
    vcpu.cr4 = 0
    assert vcpu.get_cpuid2()[0].ecx == 0


GUEST_FEATURES = [(1, 0, 0, 7, 0, 1 << 26, 0), (7, 0, 1, 0, 0, 1 << 3, 0)]
"""XSAVE and PKU, of those that CR4 bits need."""


def test_cr4_has_what_the_guests_cpuid_has():
    features = frozenset({"xsave", "pku", "smep"})
    kernel = Kernel(intel(user=0x207, features=features), "6.12")
    vcpu = kernel.create_vcpu()
    refused(errno.EINVAL, vcpu.set_cr4, CR4_UMIP)  # the host lacks it
    vcpu.set_cr4(CR4_OSXSAVE | CR4_PKE | CR4_SMEP)  # there is no list yet: the host decides
    vcpu.set_cr4(0)
    vcpu.set_cpuid2(GUEST_FEATURES)
    refused(errno.EINVAL, vcpu.set_cr4, CR4_SMEP | CR4_PKE)
    assert vcpu.cr4 == 0
    vcpu.set_cr4(CR4_OSXSAVE | CR4_PKE)
    assert vcpu.cr4 == CR4_OSXSAVE | CR4_PKE
    other = kernel.create_vcpu()
    other.set_cpuid2(leaf_d(7))
    refused(errno.EINVAL, other.set_cr4, CR4_OSXSAVE)
    refused(errno.EINVAL, other.set_cr4, CR4_CET)


def test_cr4_cet_needs_a_kvm_that_has_it_and_one_of_its_features():
    features = frozenset({"xsave", "user_shstk", "ibt"})
    shstk = [*leaf_d(7, CET_U | CET_S), (7, 0, 1, 0, 0, 1 << 7, 0)]
    for release, taken in (("6.12", False), ("6.18", True)):
        vcpu = Kernel(intel(features=features), release).create_vcpu()
        vcpu.set_cpuid2(shstk)
        if taken:
            vcpu.set_cr4(CR4_CET)
        else:
            refused(errno.EINVAL, vcpu.set_cr4, CR4_CET)


def test_get_cpuid2_needs_room_for_all_entries():
    vcpu = Kernel(intel(user=0x207), "6.12").create_vcpu()
    vcpu.set_cpuid2(GUEST_FEATURES)
    refused(errno.E2BIG, vcpu.get_cpuid2, 1)
    assert len(vcpu.get_cpuid2(2)) == 2
    assert len(vcpu.get_cpuid2()) == 2


@pytest.mark.parametrize(("release", "cleared"), [("6.13", False), ("6.14", True)])
def test_ospke_of_a_host_without_pku_follows_cr4_since_1f66590d7ff0(release, cleared):
    vcpu = Kernel(intel(user=7), release).create_vcpu()
    vcpu.set_cpuid2([(7, 0, 1, 0, 0, 1 << 4, 0)])
    assert vcpu.get_cpuid2()[0].ecx == (0 if cleared else 1 << 4)


def test_what_a_guest_writes_is_in_use_when_it_leaves():
    kernel = Kernel(intel(user=7), "6.12")
    vcpu = kernel.create_vcpu()
    vcpu.set_cpuid2(leaf_d(7))
    vcpu.run(lambda processor: processor.write(2, 0, b"\x55" * 256))
    data = vcpu.get_xsave()
    assert bv_of(data) & 4
    assert data[576:832] == b"\x55" * 256


@pytest.mark.parametrize(("la57", "taken"), [(False, False), (True, True)])
def test_cet_pointers_are_canonical_by_la57_whatever_x87_does(la57, taken):
    features = frozenset({"xsave", "la57"} if la57 else {"xsave"})
    kernel = Kernel(intel(features=features, x87_pointer_bits=57), "6.18")
    assert kernel.linear_bits == (57 if la57 else 48)
    assert kernel.fpu.processor.cpu.x87_pointer_bits == 57
    vcpu = kernel.create_vcpu()
    vcpu.set_cpuid2([*leaf_d(0x2E7, CET_U | CET_S), (7, 0, 1, 0, 0, 1 << 7, 1 << 20)])
    if taken:
        vcpu.set_msr(PL3_SSP, 1 << 50)
    else:
        refused(errno.EINVAL, vcpu.set_msr, PL3_SSP, 1 << 50)


@pytest.mark.parametrize(
    ("release", "permitted"), [("5.17", 0x202E7), ("6.3.13", 0x202E7), ("6.4", 0x2E7)]
)
def test_without_permission_tilecfg_goes_with_tiledata_since_55cd57b596e8(release, permitted):
    kernel = Kernel(intel(), release)
    assert kernel.permitted_xcr0 == permitted
    assert bool(announced_problem(permitted)) == (permitted == 0x202E7)
    kernel.arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM, 18)
    assert kernel.permitted_xcr0 == 0x602E7


def test_ospke_follows_cr4():
    vcpu = Kernel(intel(user=0x2E7), "6.12").create_vcpu()
    vcpu.set_cpuid2([(7, 0, 1, 0, 0, 0, 0)])
    vcpu.cr4 = CR4_PKE
    assert vcpu.get_cpuid2()[0].ecx == 1 << 4
    vcpu.cr4 = 0
    assert vcpu.get_cpuid2()[0].ecx == 0


def test_confidential_guests_tell_and_take_nothing():
    vcpu = Kernel(intel(user=0x2E7), "6.12").create_vcpu(confidential=True)
    vcpu.set_xsave(buffer(1 << 61))
    assert vcpu.get_xsave() == bytes(4096)
    vcpu.set_fpu(bytes([1]) * 416)
    assert vcpu.get_fpu() == bytes(416)
    vcpu.run()
    assert vcpu.guest_fpu.fpstate.xstate_bv == 0


def test_protected_vms_refuse_since_6_10():
    """Linux kernel commit 517987e3fb19 (in v6.10)."""
    for release, code in (("6.9", 0), ("6.10", errno.EINVAL)):
        kernel = Kernel(intel(user=0x2E7), release)
        vcpu = kernel.create_vcpu(confidential=True, protected_vm=True)
        calls = [(vcpu.get_xsave,), (vcpu.set_xsave, bytes(4096)), (vcpu.get_fpu,)]
        for call, *arguments in [*calls, (vcpu.set_fpu, bytes(416))]:
            if code:
                refused(code, call, *arguments)
            else:
                call(*arguments)
        plain = kernel.create_vcpu(protected_vm=True)
        plain.set_xsave(buffer(7))


def test_init_leaves_what_is_not_in_the_image_alone():
    """kvm_xstate_reset() asks get_xsave_addr(), which is NULL for a clear XSTATE_BV bit."""
    vcpu = Kernel(intel(user=0xFF), "6.18").create_vcpu()
    vcpu.set_xsave(buffer(0x1F))
    vcpu.set_xsave(buffer(7))
    before = vcpu.guest_fpu.fpstate.regs.tobytes()
    vcpu.init()
    assert vcpu.guest_fpu.fpstate.regs.tobytes() == before


def test_xfd_is_switched_with_the_registers():
    """__fpstate_reset(): 0 for guests, the host's default for tasks."""
    vcpu = amx_vcpu()
    fpu = vcpu.kernel.fpu
    seen = []

    def guest(processor):
        seen.append(processor.xfd)
        processor.xfd = TILEDATA  # WRMSR that KVM does not intercept

    assert fpu.processor.xfd == TILEDATA
    vcpu.run(guest)
    vcpu.run(guest)
    assert seen == [0, TILEDATA]
    assert vcpu.get_msr(MSR_IA32_XFD) == TILEDATA
    assert fpu.processor.xfd == TILEDATA


@pytest.mark.parametrize(("guest", "accepted"), [(0x602E7, True), (0x2E7, False), (None, False)])
def test_tiles_are_taken_only_from_a_guest_with_amx(guest, accepted):
    host = intel()
    vcpu = vcpu_for(host, of_release("6.18"), guest)
    area = buffer(0x60007)
    told = outcome(area, host, guest, kernel=of_release("6.18"))
    assert (told.refused is None) == accepted
    if accepted:
        vcpu.set_xsave(area)
    else:
        assert told.refused.bits == TILEDATA
        refused(errno.EINVAL, vcpu.set_xsave, area)


def test_outcome_tells_of_xfd():
    host = intel()
    old, new = (
        outcome(buffer(0x60007), host, 0x602E7, kernel=of_release(r), xfd=TILEDATA)
        for r in ("6.12.66", "6.12.67")
    )
    assert (old.cleared, old.panics, old.loaded) == (0, TILEDATA, 0x60007)
    assert (new.cleared, new.panics, new.loaded) == (TILEDATA, 0, 0x20007)
    with pytest.raises(ValueError, match="mxcsr_mask"):
        outcome(buffer(7), Host("unknown"), 7)


def test_odd_buffers():
    vcpu = Kernel(intel(user=0x2E7), "6.12").create_vcpu()
    refused(errno.EFAULT, vcpu.set_xsave, bytes(4095))
    refused(errno.EFAULT, vcpu.set_fpu, bytes(415))
    refused(errno.EFAULT, vcpu.get_xsave, bytearray(4095))
    refused(errno.EFAULT, vcpu.get_xsave, bytes(4096))
    room = bytearray(5000)
    assert vcpu.get_xsave(room) == bytes(room[:4096])
    odd = np.zeros(4097, np.uint8)[1:]  # unaligned: copy_from_user() does not mind
    vcpu.set_xsave(odd)
    with pytest.raises(ValueError, match="buffer"):
        vcpu.set_xsave("text")
    refused(errno.EINVAL, vcpu.set_xcrs, [(7, 0)], nr=2)  # what is not given reads as XCR0 = 0
    refused(errno.E2BIG, vcpu.set_cpuid2, [(i, 0, 0, 0, 0, 0, 0) for i in range(257)])


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("set_xcrs", [[(0, -1)]]),
        ("set_xcrs", [[(0, 1 << 64)]]),
        ("set_xcrs", [[(-1, 1)]]),
        ("set_cpuid2", [[(0xD, 0, 1, 1 << 32, 0, 0, 0)]]),
        ("set_cpuid2", [[(0xD, 0, 1)]]),
        ("set_cpuid2", [[(0xD, 0, -1, 0, 0, 0, 0)]]),
        ("set_msr", [PL3_SSP, -1]),
        ("set_msr", [MSR_IA32_XFD, 1 << 64]),
        ("xsetbv", [0, -1]),
    ],
)
def test_numbers_that_c_could_not_pass_are_python_s_to_refuse(call, arguments):
    vcpu = cet_vcpu()
    before = state_of(vcpu)
    with pytest.raises(ValueError, match="expected"):
        getattr(vcpu, call)(*arguments)
    assert state_of(vcpu) == before


@pytest.mark.parametrize(
    "facts",
    [
        {"xcr0": -1},
        {"xcr0": 1 << 70 | 7},
        {"xcr0": 4},
        {"xss": -1},
        {"kvm_xcr0": 1 << 64},
        {"mxcsr_mask": -1},
        {"mxcsr_mask": 1 << 32},
    ],
)
def test_a_host_that_cannot_be_is_refused(facts):
    host = intel(user=0x2E7).replace(**facts)
    with pytest.raises(ValueError, match="expected"):
        Kernel(host, "6.12")
    with pytest.raises(ValueError, match="expected"):
        outcome(buffer(7), host, 7, kernel=of_release("6.12"))


@pytest.mark.parametrize(
    ("features", "flags", "user", "has"),
    [
        (frozenset({"xsave"}), frozenset(), 7, True),
        (frozenset(), S_FORMS, 7, False),
        (None, frozenset(), 7, True),
        (None, frozenset(), 3, False),
        (None, S_FORMS, 3, True),
    ],
)
def test_whether_a_host_has_xsave_is_decided_once(features, flags, user, has):
    host = intel(user=user, supervisor=0, xsave=flags, features=features)
    vcpu = Kernel(host, "6.12").create_vcpu()
    assert host.has_xsave == vcpu.kernel.fpu.has_xsave == bool(vcpu.get_xcrs()) == has
    told = outcome(buffer(user & ~1), host, user, kernel=of_release("6.12"))
    assert (told.refused is None) == (has or user == 3)


def test_buffers_and_masks_that_cannot_be():
    host, kernel = intel(user=7, supervisor=0), of_release("6.12")
    vcpu = Kernel(host, "6.12").create_vcpu()
    scattered = np.zeros((4096, 2), np.uint8)[:, 0]
    for call, argument in (
        (vcpu.set_xsave, np.zeros((2, 4096), np.uint8)),
        (vcpu.set_fpu, scattered),
        (vcpu.get_xsave, scattered),
        (vcpu.get_xsave2, scattered),
        (vcpu.kernel.fpu.wrpkru, 0),
    ):
        with pytest.raises(ValueError, match=r"expected|has none"):
            call(argument)
    for masks in ({"guest_xcr0": -1}, {"guest_xcr0": 1 << 64}, {"guest_xcr0": 7, "xfd": -1}):
        with pytest.raises(ValueError, match="expected 64 bits"):
            outcome(buffer(7), host, kernel=kernel, **masks)


def test_the_area_of_a_vcpu_before_and_since_it_has_4096_bytes_at_least():
    for release, size in (("5.16.2", 4096), ("5.17.5", 2696), ("5.17.13", 4096)):
        vcpu = Kernel(intel(user=0x2E7), release).create_vcpu()
        assert vcpu.guest_fpu.uabi_size == size


def test_permissions_tell_user_components_only():
    """fpu_xstate_prctl() masks with XFEATURE_MASK_USER_SUPPORTED: no lock, no supervisor bits."""
    kernel = Kernel(intel(), "6.18")
    kernel.create_vcpu()
    assert kernel.fpu.guest_perm.state_perm & (FPU_GUEST_PERM_LOCKED | PASID)
    for code in (ARCH_GET_XCOMP_GUEST_PERM, ARCH_REQ_XCOMP_GUEST_PERM - 3):
        assert kernel.arch_prctl(code) == 0x202E7


def test_a_larger_image_is_as_confidential_as_the_old_one():
    kernel = Kernel(intel(), "6.18")
    kernel.arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM, 18)
    vcpu = kernel.create_vcpu(confidential=True)
    vcpu.set_cpuid2(leaf_d(0x602E7))
    assert len(vcpu.get_xsave2()) == 11008
    vcpu.set_xsave(buffer(7))
    assert not any(vcpu.get_xsave2())


def test_supervisor_components_need_the_guest_s_cpuid():
    vcpu = Kernel(intel(), "6.18").create_vcpu()
    vcpu.set_cpuid2(leaf_d(0x2E7, CET_U))
    assert vcpu.guest_supported_xss == CET_U
    refused(errno.EINVAL, vcpu.set_msr, MSR_IA32_XSS, CET_S)


def test_sizes_leave_unknown_components_out():
    kernel = Kernel(intel(), "6.18")
    for compacted in (False, True):
        plain = kernel.xstate_required_size(7, compacted)
        assert kernel.xstate_required_size(7 | 1 << 40, compacted) == plain == 832


def test_xsetbv_of_the_guest():
    vcpu = cet_vcpu()
    seen = []

    def guest(processor):
        seen.extend([vcpu.xsetbv(0, 7), processor.xcr0, vcpu.xsetbv(0, 5), vcpu.xsetbv(1, 1)])
        seen.append(vcpu.xsetbv(0, 3, cpl=3))

    vcpu.cr4 = CR4_OSXSAVE
    vcpu.run(guest)
    assert seen == [True, 7, False, False, False]
    assert vcpu.xcr0 == 7
    assert vcpu.kernel.fpu.processor.xcr0 == 0x602E7


def test_msrs_can_be_reached_while_the_guest_runs():
    vcpu = cet_vcpu()

    def guest(processor):
        vcpu.set_msr(PL3_SSP, 0x3000)

    vcpu.run(guest)
    assert vcpu.get_msr(PL3_SSP) == 0x3000


def test_a_kernel_needs_to_know_its_host():
    with pytest.raises(ValueError, match="behaviours"):
        Kernel(intel())
    with pytest.raises(ValueError, match="layout"):
        Kernel(Host("unknown"), "6.1")


# Migration


def test_migration_within_a_kernel_keeps_everything():
    for vmm in VMMS:
        vcpu = Kernel(intel(user=0x2E7), "6.6").create_vcpu()
        vcpu.set_cpuid2(leaf_d(0x2E7))
        vcpu.set_xcrs([(0, 0x2E7)])
        vcpu.set_xsave(buffer(0x2E7))
        done = migrate(vcpu, intel(user=0x2E7), vmm, kernel="6.12")
        assert str(done) == "done"
        assert done.vcpu.get_xsave() == vcpu.get_xsave()
        assert done.vcpu.get_xcrs() == vcpu.get_xcrs()


def test_bytes_of_another_layout_are_lost_on_those_who_pass_them_on():
    zen = Host(
        "zen4",
        preset("amd-zen4").restricted(0xE7),
        xcr0=0xE7,
        xss=0,
        mxcsr_mask=0x2FFFF,
        xsave=S_FORMS,
        vendor="AuthenticAMD",
    )
    vcpu = Kernel(zen, "6.6").create_vcpu()
    vcpu.set_cpuid2(leaf_d(0xE7))
    vcpu.set_xsave(buffer(0xE7, layout=zen.layout))
    assert not migrate(vcpu, intel(user=0xE7), "qemu", kernel="6.6").lost
    raw = migrate(vcpu, intel(user=0xE7), "firecracker", kernel="6.6")
    assert raw.silent
    assert raw.lost == 0xE0


@pytest.mark.parametrize("vmm", VMMS)
def test_amx_migrates_where_the_target_can_permit_it(vmm):
    vcpu = amx_vcpu()
    vcpu.set_xcrs([(0, 0x602E7)])
    vcpu.set_xsave(buffer(0x602E7))
    assert str(migrate(vcpu, intel(), vmm, kernel="6.18")) == "done"
    refusal = migrate(vcpu, intel(user=0x2E7), vmm, kernel="6.18")
    assert refusal.failed.startswith("KVM_SET_CPUID2: Operation not permitted")
    assert refusal.silent == (vmm == "qemu-7.2")
    assert refusal.lost == 0x602E7


def test_a_guest_that_reads_less_than_it_had_is_told_apart():
    """b1 kernels drop x87 and SSE of a guest without XSAVE; nothing fails, and all is lost."""
    vcpu = Kernel(intel(user=7), "5.18.2").create_vcpu()
    vcpu.set_xsave(buffer(3))
    vcpu.set_cpuid2([(1, 0, 0, 0, 0, 0, 0)])
    moved = migrate(vcpu, intel(user=7), "firecracker", kernel="6.6")
    assert (moved.failed, moved.xstate_bv, moved.lost, moved.silent) == ("", 0, 3, True)


def test_mxcsr_alone_is_lost_where_the_source_has_no_xsavec():
    """Section 13.7: XSAVE leaves BV[1] clear; what KVM_GET_XSAVE then reports is 0x1F80."""

    def guest(processor):
        processor.mxcsr = 0x1FA0

    for flags, lost in ((S_FORMS, ()), (frozenset({"xsave"}), ("MXCSR",))):
        host = intel(user=7, xsave=flags)
        vcpu = Kernel(host, "6.12").create_vcpu()
        vcpu.set_cpuid2(leaf_d(7))
        vcpu.run(guest)
        moved = migrate(vcpu, host, kernel="6.12")
        assert (moved.lost, moved.registers_lost, moved.silent) == (0, lost, bool(lost))
        assert ("lost MXCSR" in str(moved)) == bool(lost)


@pytest.mark.parametrize("vmm", VMMS)
def test_msrs_of_the_fpu_go_with_the_guest(vmm):
    vcpu = amx_vcpu()
    vcpu.set_msr(MSR_IA32_XFD, TILEDATA)
    vcpu.set_msr(MSR_IA32_XFD_ERR, TILEDATA)
    moved = migrate(vcpu, intel(), vmm, kernel="6.18")
    assert str(moved) == "done"
    assert moved.vcpu.get_msr(MSR_IA32_XFD) == TILEDATA
    vcpu = cet_vcpu()
    vcpu.set_msr(MSR_IA32_XSS, CET_U)
    moved = migrate(vcpu, intel(), vmm, kernel="6.17")
    assert "KVM_SET_MSRS" in moved.failed
    assert moved.registers_lost == ("IA32_XSS",)
    assert moved.silent == (vmm == "qemu-7.2")


def test_cet_state_that_nobody_moves_is_reported():
    vcpu = cet_vcpu()
    vcpu.set_msr(PL3_SSP, 0x1000)
    moved = migrate(vcpu, intel(), kernel="6.18")
    assert (moved.failed, moved.lost, moved.silent) == ("", CET_U, True)


def test_an_unknown_vmm_is_named():
    vcpu = Kernel(intel(user=7), "6.6").create_vcpu()
    with pytest.raises(ValueError, match="bochs"):
        migrate(vcpu, intel(), "bochs")


# Invariants, for every behaviour and host

masks = st.sampled_from((0x7, 0xE7, 0x2E7, 0x602E7, 0x2FF, 0xFF))
xsaves = st.sampled_from(
    (S_FORMS, S_FORMS - {"xsaves"}, frozenset({"xsave", "xsaveopt"}), frozenset({"xsave"}))
)
guests = st.sampled_from((None, 0, 1, 3, 7, 0xE7, 0x2E7, 0x40, 0x207, 0x602E7))
behaviour_sets = st.one_of(
    st.sampled_from(RELEASES).map(of_release),
    st.sets(st.sampled_from(sorted(BEHAVIOURS))).map(lambda names: possible(names)),
)


def possible(names):
    """Return a set of behaviours; AMX for guests came as a whole, on top of the core's copying."""
    amx = {"fpu-core-uabi", "dynamic-features", "guest-permission", "dynamic-at-cpuid", "xsave2"}
    return Behaviours(frozenset(names | amx if "kvm-amx" in names else names))


@st.composite
def areas(draw):
    bv = draw(st.one_of(st.integers(0, 0x3FF), st.sampled_from((0x600E7, 0xE02E7, 1 << 61))))
    area = buffer(
        bv, draw(st.integers(1, 255)), mxcsr=draw(st.sampled_from((0x1F80, 0x1FA0, 1 << 16)))
    )
    if draw(st.integers(0, 9)) == 0:
        area[520 + draw(st.integers(0, 55))] = 1
    return area


def vcpu_for(host, behaviours, guest):
    kernel = Kernel(host, behaviours)
    with contextlib.suppress(OSError):
        kernel.arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM, 18)
    vcpu = kernel.create_vcpu()
    if guest is not None:
        try:
            vcpu.set_cpuid2(leaf_d(guest))
        except OSError:
            return None
    return vcpu


def state_of(vcpu):
    image = vcpu.guest_fpu.fpstate.regs.tobytes()
    guest, fpstate = vcpu.guest_fpu, vcpu.guest_fpu.fpstate
    return (
        (image, vcpu.pkru, vcpu.xcr0, vcpu.xss, vcpu.cr4, vcpu.cpuid, vcpu.has_run),
        (vcpu.guest_supported_xcr0, vcpu.guest_supported_xss, guest.uabi_size, guest.xfd_err),
        (fpstate.xfeatures, fpstate.user_xfeatures, fpstate.xfd, fpstate.size, fpstate.user_size),
        (fpstate.in_use, fpstate.is_confidential),
    )


def supervisor_state(vcpu):
    """Return the supervisor components in a vCPU's image, {number: bytes}."""
    fpu, fpstate = vcpu.kernel.fpu, vcpu.guest_fpu.fpstate
    mask = fpstate.xstate_bv & fpstate.xfeatures & (PASID | CET_U | CET_S)
    at = fpu.layout.compacted_offsets(fpstate.xfeatures) if mask else {}
    return {
        nr: fpstate.regs[at[nr] : at[nr] + fpu.layout.slot(nr).size].tobytes() for nr in bits(mask)
    }


def give_supervisor_state(vcpu):
    """Let a guest have used every supervisor component that its image has."""
    fpu, fpstate = vcpu.kernel.fpu, vcpu.guest_fpu.fpstate
    mask = fpstate.xfeatures & (PASID | CET_U | CET_S)
    at = fpu.layout.compacted_offsets(fpstate.xfeatures) if mask else {}
    for nr in bits(mask):
        end = at[nr] + fpu.layout.slot(nr).size
        fpstate.regs[at[nr] : end].view("<u8")[:] = 0x1000 * nr << 2
    fpstate.xstate_bv |= mask


def calls_that_fail(vcpu):
    """Return calls that every kernel refuses, with their arguments."""
    return (
        (vcpu.set_xsave, bytes(100)),
        (vcpu.set_xsave, buffer(1 << 61)),
        (vcpu.set_fpu, bytes(415)),
        (vcpu.set_cpuid2, [(i, 0, 0, 0, 0, 0, 0) for i in range(257)]),
        (vcpu.set_cpuid2, [*leaf_d(7), (0x80000008, 0, 0, 0x2F30, 0, 0, 0)]),
        (vcpu.set_xcrs, [(0, 0)]),
        (vcpu.set_xcrs, [(0, 7), (0, 1)] * 9),
        (vcpu.set_msr, MSR_IA32_XFD, 1 << 5),
        (vcpu.set_msr, MSR_IA32_XSS, 1 << 8),
        (vcpu.set_msr, PL3_SSP, 1),
        (vcpu.get_xsave, bytearray(100)),
    )


def get(vcpu):
    return vcpu.get_xsave2() if vcpu.kernel.xsave2_size else vcpu.get_xsave()


@settings(max_examples=150)
@given(masks, xsaves, behaviour_sets, guests, areas(), st.booleans())
def test_invariants(mask, xsave, behaviours, guest, area, runs):
    host = intel(user=mask, xsave=xsave)
    vcpu = vcpu_for(host, behaviours, guest)
    if vcpu is None:
        return
    fpstate = vcpu.guest_fpu.fpstate
    give_supervisor_state(vcpu)
    supervisor = supervisor_state(vcpu)
    assert bool(supervisor) == bool(fpstate.xfeatures & (PASID | CET_U | CET_S))
    before = state_of(vcpu)
    for call, *arguments in calls_that_fail(vcpu):
        with pytest.raises(OSError, match="Errno"):
            call(*arguments)
        assert state_of(vcpu) == before, call
    told = outcome(area, host, guest, kernel=behaviours)
    if told.refused:
        refused(errno.EINVAL, vcpu.set_xsave, area)
        assert state_of(vcpu) == before  # a failed call changes nothing
        return
    vcpu.set_xsave(area)
    assert fpstate.xstate_bv & vcpu.kernel.fpu.user_cfg.max_features == told.loaded
    allowed = vcpu.guest_supported_xcr0 | XFEATURE_MASK_FPSSE
    trims = "get-trims" in behaviours or "fpu-core-uabi" not in behaviours
    first = get(vcpu)
    if "fpu-core-uabi" in behaviours:
        assert told.trimmed == bv_of(area) & ~bv_of(first)
    if runs:
        vcpu.run()
    got = get(vcpu)
    if trims:  # a guest never sees a component outside its mask
        assert not bv_of(got) & ~allowed
    same = engine.diff(area, np.frombuffer(got, np.uint8), host.layout) & bv_of(got) & bv_of(area)
    assert not same & ~1 & ~PKRU  # SET, then GET, is the identity inside the mask
    kept = supervisor_kept(behaviours)
    assert supervisor_state(vcpu) == {nr: d for nr, d in supervisor.items() if kept >> nr & 1}


@settings(max_examples=60)
@given(masks, xsaves, st.sampled_from(RELEASES), guests, areas())
def test_a_second_get_of_what_was_got_is_the_same(mask, xsave, release, guest, area):
    vcpu = vcpu_for(intel(user=mask, xsave=xsave), of_release(release), guest)
    if vcpu is None:
        return
    try:
        vcpu.set_xsave(area)
    except OSError:
        return
    got = get(vcpu)
    padded = got + bytes(max(0, vcpu.guest_fpu.uabi_size - len(got)))
    try:
        vcpu.set_xsave(padded)
    except OSError:  # only a kernel that reports more than it takes
        assert "get-trims" not in vcpu.kernel.behaviours
        return
    assert get(vcpu) == got
