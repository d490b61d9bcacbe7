"""The running machine as a host: its CPUID and XCR0, and what its KVM says and does.

The kernel's release is only a first guess at its behaviour. Where /dev/kvm can be opened, a
scratch vCPU that never runs shows what KVM_SET_XSAVE accepts and what KVM_GET_XSAVE trims.

*Source*: Linux Documentation/virt/kvm/api.rst; include/uapi/linux/kvm.h; arch/x86/include/uapi/
asm/kvm.h (KVM_X86_XCOMP_GUEST_SUPP).
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from fcntl import ioctl
from typing import Any

from xfast.engine import hw
from xfast.errors import XfastError
from xfast.hosts.derive import from_cpuid, known_features
from xfast.hosts.dumps import read_cpuid2
from xfast.hosts.model import Host
from xfast.kernels.behaviour import of_release
from xfast.kernels.uapi import (
    KVM_CAP_SYS_ATTRIBUTES,
    KVM_CAP_XSAVE,
    KVM_CAP_XSAVE2,
    KVM_CHECK_EXTENSION,
    KVM_CREATE_VCPU,
    KVM_CREATE_VM,
    KVM_GET_DEVICE_ATTR,
    KVM_GET_SUPPORTED_CPUID,
    KVM_GET_XSAVE,
    KVM_GET_XSAVE2,
    KVM_MAX_CPUID_ENTRIES,
    KVM_SET_CPUID2,
    KVM_SET_XSAVE,
)
from xfast.xsave.area import empty
from xfast.xsave.cpuid import ENTRY, Cpuid
from xfast.xsave.features import (
    AVX,
    EXTENDED_OFFSET,
    FCW_INIT,
    HEADER_OFFSET,
    KVM_XSAVE_SIZE,
    TILEDATA,
    X87,
    XCOMP_BV_COMPACTED,
    XFEATURE_MASK_FPSSE,
)

MXCSR_MASK_OFFSET = 28

PROBED = frozenset(
    {"fpu-core-uabi", "user-xfeatures-guest", "user-xfeatures-fpsse", "get-trims", "xsave2"}
)
"""Behaviours that the probe settles; all others are assumed from the release."""


def this_host(name: str = "this") -> Host:
    """Return the running machine as a host.

    Raises
    ------
    XfastError
        If this is not an x86-64 machine.
    """
    if platform.machine() != "x86_64":
        raise XfastError(f"host this: expected an x86_64 machine, got {platform.machine()}")
    release = os.uname().release
    host = from_cpuid(read_cpuid(), name, "this machine").with_kernel(of_release(release))
    read_here = {fact: "probed" for fact, how in host.provenance.items() if how == "dump"}
    host = told_apart(host.replace(provenance=host.provenance | read_here), kernel_flags())
    if hw.available():
        host = _known(host, xcr0=hw.xgetbv(0))
        width = probe_x87_pointer_bits()
        if width is not None:
            host = _known(host, x87_pointer_bits=width)
    try:
        with ExitStack() as stack:
            return _ask_kvm(host, stack)
    except OSError as error:
        why = f"/dev/kvm can't be used ({error.strerror}): what it offers to guests is not known"
        return host.replace(notes=(*host.notes, why))


def kernel_flags() -> frozenset[str] | None:
    """Return the flags of /proc/cpuinfo: the CPU's features as far as the kernel uses them."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
            flags = next((line for line in lines if line.startswith("flags")), None)
    except OSError:
        return None
    return None if flags is None else frozenset(flags.partition(":")[2].split())


SWITCHED = frozenset(
    {"user_shstk", "la57", "pku", "fsgsbase", "umip", "smep", "smap", "pcid", "enqcmd"}
)
"""Features that work only if the kernel switches them on; /proc/cpuinfo shows them then.

Of others, a missing flag proves nothing: the kernel does not show all that it knows.
"""


def told_apart(host: Host, flags: frozenset[str] | None) -> Host:
    """Return a host without the features that the kernel leaves off: a note names them.

    `flags` are the kernel's; None where they can't be read, and then nothing changes.
    """
    if host.features is None or flags is None:
        return host
    raw = host.features & SWITCHED - flags
    if not raw:
        return host
    why = f"CPUID has these, and the kernel does not use them: {' '.join(sorted(raw))}"
    return host.replace(features=host.features - raw, notes=(*host.notes, why))


def with_offer(host: Host, offered: frozenset[str] | None) -> Host:
    """Return a host with the features that its KVM offers to guests, and a note on the others.

    `offered` is None where KVM_GET_SUPPORTED_CPUID does not say, as under kvm_pvm. The features
    are then those that the kernel uses, and only assumed.
    """
    own = host.features
    if offered is None:
        why = (
            "KVM_GET_SUPPORTED_CPUID does not say which features guests may have; these are the "
            "ones that the kernel uses"
        )
        provenance = host.provenance | {"features": "assumed"}
        return host.replace(provenance=provenance, notes=(*host.notes, why))
    missing = (own or frozenset()) - offered
    if missing:
        why = f"this KVM does not offer these to guests: {' '.join(sorted(missing))}"
        host = host.replace(notes=(*host.notes, why))
    return _known(host, features=offered)


def _known(host: Host, **facts: Any) -> Host:
    return host.replace(**facts, provenance=host.provenance | dict.fromkeys(facts, "probed"))


def probe_x87_pointer_bits() -> int | None:
    """Return how many bits this CPU's x87 instruction pointer has, or None where it is unclear.

    The pointer 1 << 47 comes back extended where there are 48 bits, and as it is where there are
    more. Some CPUs keep pointers only while an exception is pending, so one is.
    """

    def returned(fip: int) -> int:
        memory = empty(1, max(hw.cpuid(0xD)[1], EXTENDED_OFFSET))[0]
        struct.pack_into("<HHxxxxQ", memory, 0, FCW_INIT & ~FCW_INVALID, FSW_INVALID, fip)
        memory[HEADER_OFFSET] = X87
        hw.run([("xrstor64", memory, X87), ("xsave64", memory, X87)])
        return int(memory[8:16].view("<u8")[0])

    for width in (48, 57):
        top = 1 << width - 1
        if returned(top) == (1 << 64) - top:
            return width
    return None


FCW_INVALID, FSW_INVALID = 1, 1
"""Invalid operation: its mask in FCW, its flag in FSW."""


def read_cpuid() -> Cpuid:
    """Return the CPUID rows of the CPU that this runs on: all leaves that features live in."""

    def rows() -> Iterator[tuple[int, int]]:
        for base in (0, 0x80000000):
            for leaf in range(base, min(hw.cpuid(base)[0], base + 0x3F) + 1):
                yield from ((leaf, subleaf) for subleaf in range(SUBLEAVES.get(leaf, 1)))

    with _on_one_cpu():
        return Cpuid.from_rows({row: hw.cpuid(*row) for row in rows()})


@contextmanager
def _on_one_cpu() -> Iterator[None]:
    """Run this thread on the first of its CPUs: each tells an APIC ID of its own."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    with suppress(OSError):  # a sandbox may forbid it: then the APIC ID is any of them
        os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setaffinity(0, allowed)


SUBLEAVES = {7: 3, 0xD: 63, 0x1E: 2}
"""How many sub-leaves to read, where more than one matters."""


def _ask_kvm(host: Host, stack: ExitStack) -> Host:
    """Return `host` with what /dev/kvm tells. Raises OSError where it refuses."""

    def opened(descriptor: int) -> int:
        stack.callback(os.close, descriptor)
        return descriptor

    system = opened(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    supported = supported_cpuid(system)
    host = _known(with_offer(host, known_features(supported)), kvm_xcr0=supported.xcr0)
    if ioctl(system, KVM_CHECK_EXTENSION, KVM_CAP_SYS_ATTRIBUTES):
        kvm_xcr0 = guest_supported(system)
        host = _known(host, kvm_xcr0=kvm_xcr0, guest_permission=kvm_xcr0 & TILEDATA)
    size = ioctl(system, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2)
    if size:
        host = _known(host, xsave2_size=size)
    if not ioctl(system, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE):
        return host
    vcpu = opened(ioctl(opened(ioctl(system, KVM_CREATE_VM, 0)), KVM_CREATE_VCPU, 0))
    area = bytearray(max(size, KVM_XSAVE_SIZE))
    ioctl(vcpu, KVM_GET_XSAVE2 if size else KVM_GET_XSAVE, area)
    (mxcsr_mask,) = struct.unpack_from("<I", area, MXCSR_MASK_OFFSET)
    if mxcsr_mask:
        host = _known(host, mxcsr_mask=mxcsr_mask)
    if host.kernel is None or not (host.kvm_xcr0 or 0) & AVX:
        return host
    names = (host.kernel.names - PROBED) | probe(vcpu, len(area)) | ({"xsave2"} if size else set())
    return _known(host, kernel=replace(host.kernel, names=names, provenance="probed"))


def supported_cpuid(system: int) -> Cpuid:
    """Return what KVM_GET_SUPPORTED_CPUID lists."""
    buffer = bytearray(8 + ENTRY.size * KVM_MAX_CPUID_ENTRIES)
    struct.pack_into("<I", buffer, 0, KVM_MAX_CPUID_ENTRIES)
    ioctl(system, KVM_GET_SUPPORTED_CPUID, buffer)
    (nent,) = struct.unpack_from("<I", buffer)
    return read_cpuid2(bytes(buffer[: 8 + ENTRY.size * nent]))


def guest_supported(system: int) -> int:
    """Return KVM_X86_XCOMP_GUEST_SUPP: kvm_caps.supported_xcr0 (mask)."""
    value = ctypes.c_uint64()
    attribute = bytearray(struct.pack("<IIQQ", 0, 0, 0, ctypes.addressof(value)))
    ioctl(system, KVM_GET_DEVICE_ATTR, attribute)
    return value.value


def probe(vcpu: int, size: int) -> frozenset[str]:
    """Return which of the PROBED behaviours of SET and GET a fresh vCPU shows.

    The vCPU gets a CPUID without leaf 0xD: its guest may have no component at all. Whether AVX
    is then refused, kept from GET, or reported, tells the generations apart.

    Parameters
    ----------
    vcpu : int
        File descriptor of a vCPU that has had no KVM_SET_CPUID2, on a host with AVX.
    size : int
        Bytes of its XSAVE area.
    """

    def accepts(xstate_bv: int, xcomp_bv: int = 0) -> bool:
        area = bytearray(size)
        struct.pack_into("<HxxxxxxxxxxxxxxxxxxxxxxI", area, 0, 0x37F, 0x1F80)
        struct.pack_into("<QQ", area, 512, xstate_bv, xcomp_bv)
        try:
            ioctl(vcpu, KVM_SET_XSAVE, area)
        except OSError:
            return False
        return True

    ioctl(vcpu, KVM_SET_CPUID2, struct.pack("<II", 1, 0) + ENTRY.pack(0, 0, 0, 0, 0, 0, 0))
    if accepts(XFEATURE_MASK_FPSSE, XCOMP_BV_COMPACTED):
        return frozenset()
    if not accepts(XFEATURE_MASK_FPSSE):
        return frozenset({"fpu-core-uabi", "user-xfeatures-guest"})
    if not accepts(XFEATURE_MASK_FPSSE | AVX):
        return frozenset({"fpu-core-uabi", "user-xfeatures-guest", "user-xfeatures-fpsse"})
    area = bytearray(size)
    ioctl(vcpu, KVM_GET_XSAVE2 if size > KVM_XSAVE_SIZE else KVM_GET_XSAVE, area)
    trims = not struct.unpack_from("<Q", area, 512)[0] & AVX
    return PROBED - {"xsave2"} if trims else frozenset({"fpu-core-uabi"})
