"""Kernel behaviours as data: what KVM_GET_XSAVE emits and KVM_SET_XSAVE accepts, and why.

A kernel is a set of named behaviours, each brought by a commit; distributions back-port, so a
version alone proves nothing. A release name picks a set that is marked ``assumed``; a probe of
a live /dev/kvm marks it ``probed``. The formulas below are the only place where the rules are
written: the model in `xfast.kvm` and the verdicts in `xfast.judge` both call them.

*Source*: Linux arch/x86/kvm/x86.c, cpuid.c and arch/x86/kernel/fpu/, at the commits named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

from xfast.xsave.features import (
    AVX,
    BY_NAME,
    PKRU,
    XFEATURE_MASK_AVX512,
    XFEATURE_MASK_FPSSE,
    XFEATURE_MASK_MPX,
    XFEATURE_MASK_USER_DYNAMIC,
    XFEATURE_MASK_XTILE,
)

Version = tuple[int, int, int, int]
"""(major, minor, patch, rc); a release candidate has patch -1, a release rc 0."""


@cache
def _citation(commit: str, subject: str, release: str) -> str:
    """Return the one text that all findings of a commit share."""
    return f'Linux kernel commit {commit} ("{subject}") (in v{release})'


class Behaviour(NamedTuple):
    """One difference between kernels.

    `since` lists the first version of each series that has it, mainline's first; series that
    were closed or branched off earlier, and are not listed, never got it. `note` says what of
    `since` is inferred, or what else came with the commit.
    """

    name: str
    commit: str
    subject: str
    since: tuple[str, ...]
    effect: str
    note: str = ""

    @property
    def ref(self) -> str:
        """The citation, in the kernel's form."""
        return _citation(self.commit, self.subject, self.since[0].partition("-")[0])


_TABLE = (
    Behaviour(
        "cpuid-frozen",
        "feb627e8d6f6",
        "KVM: x86: Forbid KVM_SET_CPUID{,2} after KVM_RUN",
        ("5.16-rc4",),
        "a vCPU that has entered the guest refuses KVM_SET_CPUID2",
        "rc4 is inferred from the date of the patch",
    ),
    Behaviour(
        "dynamic-features",
        "db8268df0983",
        "x86/arch_prctl: Add controls for dynamic XSTATE components",
        ("5.16-rc1",),
        "the host kernel enables AMX; tasks ask for it with ARCH_REQ_XCOMP_PERM",
    ),
    Behaviour(
        "fpu-core-uabi",
        "bf5d00470787",
        "x86/fpu: Replace KVMs home brewed FPU copy to user",
        ("5.16-rc1",),
        "GET and SET go through the FPU core: XCOMP_BV and reserved header bytes are refused, "
        "and GET no longer trims to the guest",
        "the other direction is ea4d6938d4c0, of the same release",
    ),
    Behaviour(
        "cpuid-frozen-equal",
        "c6617c61e8fe",
        "KVM: x86: Partially allow KVM_SET_CPUID{,2} after KVM_RUN",
        ("5.17-rc1", "5.16.3"),
        "it accepts the list that it already has",
    ),
    Behaviour(
        "guest-permission",
        "980fe2fddcff",
        "x86/fpu: Extend fpu_xstate_prctl() with guest permissions",
        ("5.17-rc1",),
        "ARCH_REQ_XCOMP_GUEST_PERM, frozen by the first vCPU of a process",
    ),
    Behaviour(
        "dynamic-at-cpuid",
        "5ab2f45bba48",
        "kvm: x86: Enable dynamic xfeatures at KVM_SET_CPUID2",
        ("5.17-rc1",),
        "XTILE_DATA in leaf 0xD needs permission and enlarges the guest's buffer",
    ),
    Behaviour(
        "kvm-xfd",
        "820a6ee944e7",
        "kvm: x86: Add emulation for IA32_XFD",
        ("5.17-rc1",),
        "guests may have IA32_XFD and IA32_XFD_ERR",
    ),
    Behaviour(
        "kvm-amx",
        "86aff7a47992",
        "kvm: x86: Add XCR0 support for Intel AMX",
        ("5.17-rc1",),
        "KVM lets guests have AMX",
    ),
    Behaviour(
        "xsave2",
        "be50b2065dfa",
        "kvm: x86: Add support for getting/setting expanded xstate buffer",
        ("5.17-rc1",),
        "KVM_GET_XSAVE2; a vCPU with a larger area refuses KVM_GET_XSAVE",
    ),
    Behaviour(
        "user-xfeatures-guest",
        "ad856280ddea",
        "x86/kvm/fpu: Limit guest user_xfeatures to supported bits of XCR0",
        ("5.17-rc6", "5.16.13"),
        "KVM_SET_CPUID2 narrows the guest's user_xfeatures: GET trims, SET refuses all else",
        "72f0eb735e83 is its back-port to 5.16.y; 5.16.13 is inferred from the date of its "
        "review: no announcement of a 5.16.y release with it was found",
    ),
    Behaviour(
        "xcr0-by-user-xfeatures",
        "988896bb6182",
        "x86/kvm/fpu: Remove kvm_vcpu_arch.guest_supported_xcr0",
        ("5.17-rc6", "5.16.13"),
        "XCR0 and XFD are limited by user_xfeatures: before KVM_SET_CPUID2, by the host alone",
        "5.16.13 is inferred, as for ad856280ddea: no announcement names it",
    ),
    Behaviour(
        "uabi-size-4096",
        "d187ba531230",
        "x86/fpu: KVM: Set the base guest FPU uABI size to sizeof(struct kvm_xsave)",
        ("5.19-rc1", "5.18.2", "5.17.13"),
        "SET_XSAVE and GET_XSAVE2 move at least 4096 bytes, not the host's default size",
    ),
    Behaviour(
        "kernel-xsavec",
        "8ad7e8f69695",
        "x86/fpu/xsave: Support XSAVEC in the kernel",
        ("5.19-rc1",),
        "kernel images are compacted where the CPU has XSAVEC but not XSAVES",
    ),
    Behaviour(
        "cpuid-index-ignored",
        "277ad7d58611",
        "KVM: x86: Add dedicated helper to get CPUID entry with significant index",
        ("6.0-rc1",),
        "KVM finds an entry of a CPUID leaf without sub-leaves whatever its index and flags are",
    ),
    Behaviour(
        "guest-supported-xcr0",
        "ee519b3a2ae3",
        "KVM: x86: Reinstate kvm_vcpu_arch.guest_supported_xcr0",
        ("6.0-rc7", "5.19.12"),
        "XCR0 and XFD are limited by the guest's CPUID again",
    ),
    Behaviour(
        "user-xfeatures-fpsse",
        "a1020a25e697",
        "KVM: x86: Always enable legacy FP/SSE in allowed user XFEATURES",
        ("6.0-rc7", "5.19.12"),
        "x87 and SSE are always among the guest's user_xfeatures",
    ),
    Behaviour(
        "copies-dynamic",
        "471f0aa7fa64",
        "x86/fpu: Fix copy_xstate_to_uabi() to copy init states correctly",
        ("6.1-rc2", "6.0.7"),
        "GET no longer reads dynamic components that init_fpstate lacks; the right answer's "
        "bytes are the same",
    ),
    Behaviour(
        "copies-header-bits",
        "b15888840207",
        "x86/fpu/xstate: Prevent false-positive warning in __copy_xstate_uabi_buf()",
        ("6.3-rc4", "6.2.9", "6.1.22"),
        "GET writes only what the header announces; before, PKRU's value always came with it",
    ),
    Behaviour(
        "xtilecfg-with-xtiledata",
        "55cd57b596e8",
        "KVM: x86: Filter out XTILE_CFG if XTILE_DATA isn't permitted",
        ("6.4-rc1",),
        "without permission for XTILE_DATA, KVM_GET_SUPPORTED_CPUID has neither of AMX's "
        "components; before, it has XTILE_CFG alone, and a guest that enables it faults",
    ),
    Behaviour(
        "get-cpuid2-count",
        "ab322c43cce9",
        "KVM: x86: Update number of entries for KVM_GET_CPUID2 on success, not failure",
        ("6.5-rc1",),
        "KVM_GET_CPUID2 returns how many entries there are",
    ),
    Behaviour(
        "host-cet-user",
        "e25e44338ec6",
        "x86/fpu/xstate: Introduce CET MSR and XSAVES supervisor states",
        ("6.6-rc1",),
        "the host kernel switches CET_U, a supervisor component",
    ),
    Behaviour(
        "get-trims",
        "8647c52e9504",
        "KVM: x86: Constrain guest-supported xfeatures only at KVM_GET_XSAVE{2}",
        ("6.6-rc6", "6.5.9", "6.1.60"),
        "GET trims to the guest's CPUID; SET accepts all that the host supports",
    ),
    Behaviour(
        "protected-state",
        "517987e3fb19",
        "KVM: x86: add fields to struct kvm_arch for CoCo features",
        ("6.10-rc1",),
        "in VMs of a type with protected state, GET and SET of a confidential vCPU's FPU answer "
        "EINVAL; before, they do nothing",
    ),
    Behaviour(
        "os-bits-always",
        "1f66590d7ff0",
        "KVM: x86: Update OS{XSAVE,PKE} bits in guest CPUID irrespective of host support",
        ("6.14-rc1",),
        "the guest's OSXSAVE and OSPKE follow its CR4 on every host; before, only where the host "
        "has XSAVE and PKU",
    ),
    Behaviour(
        "host-apx",
        "50c5b071e283",
        "x86/fpu/apx: Enable APX state support",
        ("6.16-rc1",),
        "the host kernel switches APX, in order of standard offsets; XSAVE is not used at all "
        "where a CPU has both APX and MPX",
    ),
    Behaviour(
        "perm-keeps-bits",
        "d8414603b29f",
        "x86/fpu/xstate: Always preserve non-user xfeatures/flags in __state_perm",
        ("6.16-rc1",),
        "a granted permission keeps supervisor bits and the lock; before, it dropped both",
    ),
    Behaviour(
        "guest-defaults",
        "7bc4ed75f24d",
        "x86/fpu/xstate: Differentiate default features for host and guest FPUs",
        ("6.17-rc1",),
        "guest FPUs have default components of their own",
    ),
    Behaviour(
        "guest-cet-kernel",
        "8b05b3c98816",
        "x86/fpu/xstate: Add CET supervisor xfeature support as a guest-only feature",
        ("6.17-rc1",),
        "guest FPUs hold CET_S",
    ),
    Behaviour(
        "kvm-cet",
        "e140467bbdaf",
        "KVM: x86: Enable CET virtualization for VMX and advertise to userspace",
        ("6.18-rc1",),
        "guests may have CET, and IA32_XSS bits for it",
    ),
    Behaviour(
        "init-by-features",
        "c26675447faf",
        "KVM: x86: Zero XSTATE components on INIT by iterating over supported features",
        ("6.18-rc1",),
        "INIT, and INIT only, zeroes MPX and CET; before, INIT and RESET zeroed MPX",
    ),
    Behaviour(
        "xfd-clears-bv",
        "b45f72177594",
        "x86/fpu: Clear XSTATE_BV[i] in guest XSAVE state whenever XFD[i]=1",
        ("6.19-rc6", "6.18.7", "6.12.67", "6.6.122", "6.1.162"),
        "XSTATE_BV bits that XFD disables are cleared at SET and at XFD writes; before, the "
        "next switch to that guest panics the host",
        "at XFD writes only while TIF_NEED_FPU_LOAD is set for the thread",
    ),
)

BEHAVIOURS: dict[str, Behaviour] = {b.name: b for b in _TABLE}


@dataclass(frozen=True)
class Behaviours:
    """The behaviours of one kernel.

    Parameters
    ----------
    names : frozenset of str
        Keys of BEHAVIOURS.
    release : str
        The release they were taken from, or empty.
    provenance : str
        ``probed``, ``assumed`` or ``given``.
    """

    names: frozenset[str]
    release: str = ""
    provenance: str = "given"

    def __post_init__(self) -> None:
        unknown = self.names - BEHAVIOURS.keys()
        if unknown:
            got, known = ", ".join(sorted(unknown)), ", ".join(BEHAVIOURS)
            raise ValueError(f"behaviour: expected some of {known}, got {got}")

    def __contains__(self, name: str) -> bool:
        return BEHAVIOURS[name].name in self.names


@lru_cache(maxsize=1024)
def parse_version(text: str) -> Version:
    """Return the version in `text` (``5.17-rc5``, ``6.1.60-1-amd64``, ``v6.6``).

    Raises
    ------
    ValueError
        If `text` does not start with a version.
    """
    match = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?(?:-rc(\d+))?", text)
    if not match:
        raise ValueError(f"kernel release: expected one such as 6.1.60 or 5.17-rc5, got {text!r}")
    major, minor, patch, rc = match.groups()
    if rc:
        return int(major), int(minor), -1, int(rc)
    return int(major), int(minor), int(patch or 0), 0


def has_landed(behaviour: Behaviour, version: Version) -> bool:
    """Return whether `version`, as kernel.org released it, has the behaviour's commit."""
    mainline, *stable = (parse_version(text) for text in behaviour.since)
    return version >= mainline or any(v[:2] == version[:2] and version >= v for v in stable)


@lru_cache(maxsize=256)
def of_release(text: str) -> Behaviours:
    """Return the behaviours of a kernel.org release, marked ``assumed``."""
    version = parse_version(text)
    names: Iterable[str] = (b.name for b in _TABLE if has_landed(b, version))
    return Behaviours(frozenset(names), text, "assumed")


APX, PASID, CET_U, CET_S, PT, LBR = (
    BY_NAME[name].bit for name in ("apx", "pasid", "cet_u", "cet_s", "pt", "lbr")
)

OLDEST_USER = XFEATURE_MASK_FPSSE | AVX | XFEATURE_MASK_MPX | XFEATURE_MASK_AVX512 | PKRU
"""The user components that every kernel here knows, and its KVM (mask)."""


def user_supported(kernel: Behaviours) -> int:
    """Return the user components that the host kernel can enable (its USER_SUPPORTED; mask)."""
    mask = OLDEST_USER
    if "dynamic-features" in kernel:
        mask |= XFEATURE_MASK_XTILE
    if "host-apx" in kernel:
        mask |= APX
    return mask


def uses_xsave(kernel: Behaviours, user: int) -> bool:
    """Return whether a kernel uses XSAVE on a CPU that has it, and the components `user` (mask).

    *Source*: Linux arch/x86/kernel/fpu/xstate.c fpu__init_system_xstate(), at 50c5b071e283.
    """
    return not ("host-apx" in kernel and user & APX and user & XFEATURE_MASK_MPX)


def without_xfd(user: int) -> int:
    """Return the components that kernels enable where the CPU lacks XFD (masks).

    *Source*: Linux arch/x86/kernel/fpu/xstate.c fpu__init_system_xstate().
    """
    return user & ~XFEATURE_MASK_USER_DYNAMIC


def enabled_for_guest(user: int, guest_cpuid: int) -> int:
    """Return which of a host's components `user` a guest's image has (masks).

    Dynamic ones are there only if the guest's CPUID, leaf 0xD, has them.

    *Source*: Linux arch/x86/kvm/cpuid.c kvm_check_cpuid() at 5ab2f45bba48.
    """
    return user & ~(XFEATURE_MASK_USER_DYNAMIC & ~guest_cpuid)


def needs_permission(kernel: Behaviours, guest_cpuid: int) -> int:
    """Return what KVM_SET_CPUID2 must have permission for, or it answers EPERM (masks).

    *Source*: as `enabled_for_guest`.
    """
    return guest_cpuid & XFEATURE_MASK_USER_DYNAMIC if "dynamic-at-cpuid" in kernel else 0


def supervisor_supported(kernel: Behaviours) -> int:
    """Return the supervisor components that it can enable (its SUPERVISOR_SUPPORTED; mask)."""
    mask = PASID
    if "host-cet-user" in kernel:
        mask |= CET_U
    if "guest-cet-kernel" in kernel:
        mask |= CET_S
    return mask


def supervisor_kept(kernel: Behaviours) -> int:
    """Return the XSTATE_BV bits that KVM_SET_XSAVE leaves alone (its SUPERVISOR_ALL; mask)."""
    if "fpu-core-uabi" not in kernel:
        return 0
    kept = PT | PASID | LBR
    return kept | CET_U | CET_S if "host-cet-user" in kernel else kept


def kvm_supported_xcr0(kernel: Behaviours, host_xcr0: int, vendor: str | None = None) -> int:
    """Return KVM's supported_xcr0, for a host that enables `host_xcr0` (masks).

    KVM on AMD offers no MPX; on Intel it does where the CPU has it.

    *Source*: Linux arch/x86/kvm/x86.c KVM_SUPPORTED_XCR0, svm.c svm_set_cpu_caps().
    """
    mask = OLDEST_USER | (XFEATURE_MASK_XTILE if "kvm-amx" in kernel else 0)
    if vendor in ("AuthenticAMD", "HygonGenuine"):
        mask &= ~XFEATURE_MASK_MPX
    return host_xcr0 & mask


def kvm_supported_xss(kernel: Behaviours, host_xss: int) -> int:
    """Return KVM's supported_xss: both CET components, or none (mask)."""
    cet = CET_U | CET_S
    return cet if "kvm-cet" in kernel and host_xss & cet == cet else 0


def user_xfeatures(kernel: Behaviours, host_user: int, guest_supported_xcr0: int | None) -> int:
    """Return the guest fpstate's user_xfeatures (mask).

    Parameters
    ----------
    host_user : int
        The host's default user components, and the dynamic ones enabled for this vCPU.
    guest_supported_xcr0 : int or None
        KVM's, after KVM_SET_CPUID2; None before it.

    *Source*: Linux arch/x86/kvm/cpuid.c kvm_vcpu_after_set_cpuid() at ad856280ddea, a1020a25e697.
    """
    if (
        "user-xfeatures-guest" not in kernel
        or "get-trims" in kernel
        or guest_supported_xcr0 is None
    ):
        return host_user
    return guest_supported_xcr0 | (XFEATURE_MASK_FPSSE if "user-xfeatures-fpsse" in kernel else 0)


def reported(kernel: Behaviours, user: int, guest_supported_xcr0: int) -> int:
    """Return the components that KVM_GET_XSAVE can report; `user` is user_xfeatures() (masks)."""
    if "fpu-core-uabi" not in kernel:
        return guest_supported_xcr0 | XFEATURE_MASK_FPSSE
    if "get-trims" in kernel:
        return user & (guest_supported_xcr0 | XFEATURE_MASK_FPSSE)
    return user


def accepted(kernel: Behaviours, user: int, kvm_xcr0: int) -> int:
    """Return the XSTATE_BV bits that KVM_SET_XSAVE accepts; `user` is user_xfeatures() (masks)."""
    return kvm_xcr0 & user if "fpu-core-uabi" in kernel else kvm_xcr0


class Refusal(NamedTuple):
    """Why KVM_SET_XSAVE answers -EINVAL.

    `rule` is ``xstate_bv``, ``xcomp_bv``, ``reserved`` or ``mxcsr``; `bits` are the offending
    bits of XSTATE_BV, XCOMP_BV or MXCSR (0 for ``reserved``).
    """

    rule: str
    bits: int


def loaded(kernel: Behaviours, xstate_bv: int, xfd: int) -> int:
    """Return the XSTATE_BV that KVM_SET_XSAVE goes on with; `xfd` is the guest's (masks)."""
    return xstate_bv & ~xfd if "xfd-clears-bv" in kernel else xstate_bv


def refusal(
    kernel: Behaviours,
    *,
    xstate_bv: int,
    xcomp_bv: int,
    reserved: bool,
    mxcsr: int,
    user: int,
    kvm_xcr0: int,
    mxcsr_mask: int,
    xsave: bool = True,
) -> Refusal | None:
    """Return the first rule of KVM_SET_XSAVE that an area breaks, or None.

    Parameters
    ----------
    xstate_bv, xcomp_bv, reserved, mxcsr
        As `xfast.xsave.area.headers` reads them; XSTATE_BV after `loaded`.
    user : int
        user_xfeatures() (mask).
    kvm_xcr0 : int
        KVM's supported_xcr0 (mask).
    mxcsr_mask : int
        Bits that MXCSR may have on this CPU.
    xsave : bool
        Whether the host has XSAVE at all.

    *Source*: Linux arch/x86/kvm/x86.c kvm_vcpu_ioctl_x86_set_xsave(),
    arch/x86/kernel/fpu/core.c fpu_copy_uabi_to_guest_fpstate(),
    xstate.c validate_user_xstate_header().
    """
    core = xsave and "fpu-core-uabi" in kernel
    allowed = accepted(kernel, user, kvm_xcr0) if xsave else XFEATURE_MASK_FPSSE
    if xstate_bv & ~allowed:
        return Refusal("xstate_bv", xstate_bv & ~allowed)
    if core and xcomp_bv:
        return Refusal("xcomp_bv", xcomp_bv)
    if core and reserved:
        return Refusal("reserved", 0)
    if mxcsr & ~mxcsr_mask and (not core or xstate_bv & (XFEATURE_MASK_FPSSE | AVX)):
        return Refusal("mxcsr", mxcsr & ~mxcsr_mask)
    return None
