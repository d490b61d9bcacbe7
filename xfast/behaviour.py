"""Kernel behaviours as data: what KVM_GET_XSAVE emits and KVM_SET_XSAVE accepts, and why.

A kernel is a set of named behaviours, each brought by a commit; distributions back-port, so a
version alone proves nothing. A release name picks a set that is marked ``assumed``; a probe of
a live /dev/kvm marks it ``probed``. The formulas below are the only place where the rules are
written: the model in `xfast.kvm` and the verdicts in `xfast.judge` both call them.

*Source*: Linux arch/x86/kvm/x86.c and arch/x86/kernel/fpu/, at the commits named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from xfast.features import XFEATURE_MASK_FPSSE

Version = tuple[int, int, int, int]
"""(major, minor, patch, rc); a release candidate has patch -1, a release rc 0."""


class Behaviour(NamedTuple):
    """One difference between kernels. `since` lists the first version of each series."""

    name: str
    commit: str
    subject: str
    since: tuple[str, ...]
    effect: str

    @property
    def ref(self) -> str:
        """The citation, in the kernel's form."""
        return f'Linux kernel commit {self.commit} ("{self.subject}") (in v{self.since[0]})'


_TABLE = (
    Behaviour(
        "fpu-core-uabi",
        "bf5d00470787",
        "x86/kvm: Convert FPU handling to a single swap buffer",
        ("5.16",),
        "GET and SET go through the FPU core: compacted and reserved header bytes are refused, "
        "and GET no longer trims to the guest",
    ),
    Behaviour(
        "user-xfeatures-guest",
        "ad856280ddea",
        "x86/kvm/fpu: Limit guest user_xfeatures to supported bits of XCR0",
        ("5.17-rc6", "5.16.12"),
        "KVM_SET_CPUID2 narrows the guest's user_xfeatures: GET trims, SET refuses all else",
    ),
    Behaviour(
        "user-xfeatures-fpsse",
        "a1020a25e697",
        "KVM: x86: Always enable legacy FP/SSE in allowed user XFEATURES",
        ("6.0-rc2", "5.19.12"),
        "x87 and SSE are always among the guest's user_xfeatures",
    ),
    Behaviour(
        "get-trims",
        "8647c52e9504",
        "KVM: x86: Constrain guest-supported xfeatures only at KVM_GET_XSAVE{2}",
        ("6.6-rc6", "6.5.8", "6.1.60"),
        "GET trims to the guest's CPUID; SET accepts all that the host supports",
    ),
    Behaviour(
        "xfd-clears-bv",
        "b45f72177594",
        "x86/fpu: Clear XSTATE_BV[i] in guest XSAVE state whenever XFD[i]=1",
        ("6.19-rc6", "6.12.67"),
        "XSTATE_BV bits that XFD disables are cleared at SET and at XFD writes",
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
            raise ValueError(f"behaviour: got {got}, needed some of: {known}")

    def __contains__(self, name: str) -> bool:
        return name in self.names


def parse_version(text: str) -> Version:
    """Return the version in `text` (``5.17-rc5``, ``6.1.60-1-amd64``, ``v6.6``).

    Raises
    ------
    ValueError
        If `text` does not start with a version.
    """
    match = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?(?:-rc(\d+))?", text)
    if not match:
        raise ValueError(f"kernel release: got {text!r}, needed something like 6.1.60 or 5.17-rc5")
    major, minor, patch, rc = match.groups()
    if rc:
        return int(major), int(minor), -1, int(rc)
    return int(major), int(minor), int(patch or 0), 0


def has_landed(behaviour: Behaviour, version: Version) -> bool:
    """Return whether `version`, as kernel.org released it, has the behaviour's commit."""
    mainline, *stable = (parse_version(text) for text in behaviour.since)
    return version >= mainline or any(v[:2] == version[:2] and version >= v for v in stable)


def of_release(text: str) -> Behaviours:
    """Return the behaviours of a kernel.org release, marked ``assumed``."""
    version = parse_version(text)
    names: Iterable[str] = (b.name for b in _TABLE if has_landed(b, version))
    return Behaviours(frozenset(names), text, "assumed")


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
