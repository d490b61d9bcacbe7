"""The model's interface on a real /dev/kvm: the same script, and the same test, runs on both.

Every buffer that a call passes ends right before a page that can't be accessed, so the kernel
sees exactly the bytes that the caller gave, and answers EFAULT where it wants more.

*Source*: Linux Documentation/virt/kvm/api.rst; include/uapi/linux/kvm.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Iterable
from functools import cached_property
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import numpy as np

from xfast.hosts.this import guest_supported
from xfast.kernels.uapi import (
    KVM_CAP_XSAVE2,
    KVM_CHECK_EXTENSION,
    KVM_CREATE_VCPU,
    KVM_CREATE_VM,
    KVM_FPU,
    KVM_GET_CPUID2,
    KVM_GET_FPU,
    KVM_GET_MSRS,
    KVM_GET_SREGS,
    KVM_GET_VCPU_MMAP_SIZE,
    KVM_GET_XCRS,
    KVM_GET_XSAVE,
    KVM_GET_XSAVE2,
    KVM_MAX_CPUID_ENTRIES,
    KVM_MAX_XCRS,
    KVM_RUN,
    KVM_SET_CPUID2,
    KVM_SET_FPU,
    KVM_SET_MSRS,
    KVM_SET_REGS,
    KVM_SET_SREGS,
    KVM_SET_USER_MEMORY_REGION,
    KVM_SET_XCRS,
    KVM_SET_XSAVE,
    SREGS_CR4,
)
from xfast.kvm.arguments import bytes_of, cpuid_of, unsigned, xcrs_of
from xfast.kvm.fpu import ARCH_REQ_XCOMP_GUEST_PERM, ARCH_REQ_XCOMP_PERM
from xfast.xsave import area
from xfast.xsave.cpuid import ENTRY, Cpuid, Entry
from xfast.xsave.features import KVM_XSAVE_SIZE, XFEATURE_MASK_USER_DYNAMIC
from xfast.xsave.layout import Layout

ARCH_PRCTL = 158
"""The system call's number."""

LARGEST_AREA = 1 << 16
"""Room for every buffer: no area has as many bytes."""

XCRS = struct.Struct("<II256x128x")
SREGS_SIZE = 312
CODE_AT = 0x1000
GUEST_MEMORY = 1 << 16
HLT = b"\xf4"

_libc = ctypes.CDLL(None, use_errno=True)


def _raise(what: str) -> NoReturn:
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code), what)


class _Window:
    """Memory whose last byte lies before a page that nobody may touch."""

    def __init__(self, room: int) -> None:
        self.room = -(-room // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, self.room + mmap.PAGESIZE)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        guard = ctypes.c_void_p(self.start + self.room)
        if _libc.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0):
            _raise("mprotect")

    def ioctl(self, fd: int, request: int, data: Any, what: str) -> int:
        """Make a call with `data` as its argument; what it writes is in `tail`."""
        at = self.room - len(data)
        self.memory[at : self.room] = data
        result: int = _libc.ioctl(fd, ctypes.c_ulong(request), ctypes.c_void_p(self.start + at))
        if result < 0:
            _raise(what)
        return result

    def tail(self, size: int) -> bytes:
        """Return the last `size` bytes."""
        return self.memory[self.room - size : self.room]


class Kernel:
    """The running kernel's KVM.

    A context manager, or `close` it: it holds /dev/kvm, a VM and its vCPUs.

    Raises
    ------
    OSError
        If /dev/kvm is not there or not ours to open.
    """

    def __init__(self) -> None:
        self._files = contextlib.ExitStack()
        self.system = self._opened(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        self._vcpus = 0

    def _opened(self, fd: int) -> int:
        self._files.callback(os.close, fd)
        return fd

    def __enter__(self) -> Kernel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every file."""
        self._files.close()

    def _number(self, fd: int, request: int, arg: int, what: str) -> int:
        result: int = _libc.ioctl(fd, ctypes.c_ulong(request), ctypes.c_ulong(arg))
        if result < 0:
            _raise(what)
        return result

    @property
    def supported_xcr0(self) -> int:
        """KVM's supported_xcr0 (mask)."""
        return guest_supported(self.system)

    @property
    def xsave2_size(self) -> int:
        """What KVM_CHECK_EXTENSION(KVM_CAP_XSAVE2) returns, in bytes."""
        return self._number(self.system, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2, "KVM_CAP_XSAVE2")

    def arch_prctl(self, code: int, arg: int = 0) -> int:
        """Ask for, or about, dynamic components; return the mask that a GET stores."""
        stored = ctypes.c_uint64()
        request = code in (ARCH_REQ_XCOMP_PERM, ARCH_REQ_XCOMP_GUEST_PERM)
        last = ctypes.c_ulong(arg) if request else ctypes.byref(stored)
        if _libc.syscall(ctypes.c_long(ARCH_PRCTL), ctypes.c_ulong(code), last):
            _raise(f"arch_prctl {code:#x}")
        return stored.value

    @cached_property
    def _vm(self) -> int:
        return self._opened(self._number(self.system, KVM_CREATE_VM, 0, "KVM_CREATE_VM"))

    @cached_property
    def guest_memory(self) -> mmap.mmap:
        """The VM's memory: 64 KiB from address 0 on."""
        memory = mmap.mmap(-1, GUEST_MEMORY)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        region = struct.pack("<IIQQQ", 0, 0, 0, len(memory), start)
        window = _Window(len(region))
        window.ioctl(self._vm, KVM_SET_USER_MEMORY_REGION, region, "KVM_SET_USER_MEMORY_REGION")
        return memory

    def create_vcpu(self) -> Vcpu:
        """Create a vCPU, in this object's one VM."""
        vcpu = self._number(self._vm, KVM_CREATE_VCPU, self._vcpus, "KVM_CREATE_VCPU")
        self._vcpus += 1
        return Vcpu(self, self._opened(vcpu))


class Vcpu:
    """A vCPU of the running kernel; methods as those of `xfast.kvm.vcpu.Vcpu`."""

    def __init__(self, kernel: Kernel, fd: int) -> None:
        self.kernel = kernel
        self.fd = fd
        self._window = _Window(LARGEST_AREA)
        size = kernel._number(kernel.system, KVM_GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE")
        self._run = mmap.mmap(fd, size)

    def _ioctl(self, request: int, data: Any, what: str) -> int:
        return self._window.ioctl(self.fd, request, data, what)

    @property
    def guest_supported_xcr0(self) -> int:
        """What XCR0 may become, by the CPUID list as KVM now has it (mask)."""
        return Cpuid(self.get_cpuid2()).xcr0 & self.kernel.supported_xcr0

    def set_cpuid2(self, entries: Cpuid | Iterable[Iterable[int]]) -> None:
        """KVM_SET_CPUID2."""
        rows = cpuid_of(entries).entries
        data = struct.pack("<II", len(rows), 0) + b"".join(ENTRY.pack(*row) for row in rows)
        self._ioctl(KVM_SET_CPUID2, data, "KVM_SET_CPUID2")

    def get_cpuid2(self, nent: int = KVM_MAX_CPUID_ENTRIES) -> tuple[Entry, ...]:
        """KVM_GET_CPUID2, with room for `nent` entries."""
        size = 8 + ENTRY.size * nent
        blank = struct.pack("<II", nent, 0) + bytes(size - 8)
        self._ioctl(KVM_GET_CPUID2, blank, "KVM_GET_CPUID2")
        data = self._window.tail(size)
        (count,) = struct.unpack_from("<I", data)
        return tuple(Entry(*ENTRY.unpack_from(data, 8 + ENTRY.size * i)) for i in range(count))

    def get_xsave(self, out: Any = None) -> bytes:
        """KVM_GET_XSAVE."""
        return self._get_xsave(KVM_GET_XSAVE, KVM_XSAVE_SIZE, out)

    def get_xsave2(self, out: Any = None) -> bytes:
        """KVM_GET_XSAVE2: as many bytes as KVM wrote."""
        return self._get_xsave(KVM_GET_XSAVE2, LARGEST_AREA, out)

    def _get_xsave(self, request: int, size: int, out: Any) -> bytes:
        view = None if out is None else bytes_of(out)
        room = size if view is None else 0 if view.readonly else min(size, len(view))
        # KVM does not say how much it wrote: what two fillings have in common, it did
        zeros, ones = (self._fill(request, filling * room) for filling in (b"\0", b"\xff"))
        untouched = np.flatnonzero(np.frombuffer(zeros, "u1") != np.frombuffer(ones, "u1"))
        data = zeros[: int(untouched[0])] if len(untouched) else zeros
        if view is not None:
            view[: len(data)] = data
        return data

    def _fill(self, request: int, blank: bytes) -> bytes:
        self._ioctl(request, blank, "KVM_GET_XSAVE")
        return self._window.tail(len(blank))

    def set_xsave(self, buffer: Any) -> None:
        """KVM_SET_XSAVE."""
        self._ioctl(KVM_SET_XSAVE, bytes_of(buffer), "KVM_SET_XSAVE")

    def get_xcrs(self) -> list[tuple[int, int]]:
        """KVM_GET_XCRS."""
        self._ioctl(KVM_GET_XCRS, bytes(XCRS.size), "KVM_GET_XCRS")
        data = self._window.tail(XCRS.size)
        (count, _) = struct.unpack_from("<II", data)
        found = [struct.unpack_from("<I4xQ", data, 8 + 16 * i) for i in range(count)]
        return [(number, value) for number, value in found]

    def set_xcrs(
        self, xcrs: Iterable[tuple[int, int]], *, nr: int | None = None, flags: int = 0
    ) -> None:
        """KVM_SET_XCRS."""
        rows, nr, flags = xcrs_of(xcrs, nr, flags)
        data = bytearray(XCRS.size)
        struct.pack_into("<II", data, 0, nr, flags)
        for i, (number, value) in enumerate(rows[:KVM_MAX_XCRS]):
            struct.pack_into("<I4xQ", data, 8 + 16 * i, number, value)
        self._ioctl(KVM_SET_XCRS, data, "KVM_SET_XCRS")

    def get_fpu(self) -> bytes:
        """KVM_GET_FPU: struct kvm_fpu."""
        self._ioctl(KVM_GET_FPU, bytes(KVM_FPU.size), "KVM_GET_FPU")
        return self._window.tail(KVM_FPU.size)

    def set_fpu(self, buffer: Any) -> None:
        """KVM_SET_FPU."""
        self._ioctl(KVM_SET_FPU, bytes_of(buffer), "KVM_SET_FPU")

    def get_msr(self, index: int) -> int:
        """KVM_GET_MSRS of one MSR; EINVAL where KVM does not have it."""
        one = struct.pack("<IIIIQ", 1, 0, index, 0, 0)
        if not self._ioctl(KVM_GET_MSRS, one, "KVM_GET_MSRS"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), f"MSR {index:#x}")
        (value,) = struct.unpack_from("<Q", self._window.tail(8))
        return int(value)

    def set_msr(self, index: int, value: int) -> None:
        """KVM_SET_MSRS of one MSR; EINVAL where KVM does not take it."""
        unsigned(value, 64, f"MSR {index:#x}")
        one = struct.pack("<IIIIQ", 1, 0, index, 0, value)
        if not self._ioctl(KVM_SET_MSRS, one, "KVM_SET_MSRS"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), f"MSR {index:#x}")

    def set_cr4(self, value: int) -> None:
        """Set CR4 by KVM_SET_SREGS, all other registers as they are."""
        unsigned(value, 64, "CR4")
        sregs = self._sregs()
        struct.pack_into("<Q", sregs, SREGS_CR4, value)
        self._ioctl(KVM_SET_SREGS, sregs, "KVM_SET_SREGS")

    def _sregs(self) -> bytearray:
        self._ioctl(KVM_GET_SREGS, bytes(SREGS_SIZE), "KVM_GET_SREGS")
        return bytearray(self._window.tail(SREGS_SIZE))

    def run(self, guest: bytes | None = None, *, immediate_exit: bool = False) -> int:
        """KVM_RUN, in real mode.

        Parameters
        ----------
        guest : bytes, optional
            16-bit machine code that ends in HLT; default: HLT at once.

        Returns
        -------
        int
            kvm_run.exit_reason.
        """
        self._run[1] = immediate_exit
        if not immediate_exit:
            self._load(guest or HLT)
        if _libc.ioctl(self.fd, ctypes.c_ulong(KVM_RUN), ctypes.c_ulong(0)) < 0:
            _raise("KVM_RUN")
        return int(struct.unpack_from("<I", self._run, 8)[0])

    def _load(self, code: bytes) -> None:
        """Put code at guest address 0x1000 and point CS:IP there."""
        memory = self.kernel.guest_memory
        memory[CODE_AT : CODE_AT + len(code)] = code
        sregs = self._sregs()
        struct.pack_into("<Q", sregs, 0, 0)  # CS.base
        struct.pack_into("<H", sregs, 12, 0)  # CS.selector
        self._ioctl(KVM_SET_SREGS, sregs, "KVM_SET_SREGS")
        regs = struct.pack("<18Q", *[0] * 16, CODE_AT, 2)
        self._ioctl(KVM_SET_REGS, regs, "KVM_SET_REGS")


class Confirmation(NamedTuple):
    """What a real KVM_SET_XSAVE did with an area.

    `errno` is 0 where it was accepted; `reported` the XSTATE_BV that KVM_GET_XSAVE then has,
    `changed` the components that no longer read as they were given (masks).
    """

    errno: int
    reported: int
    changed: int

    @property
    def accepted(self) -> bool:
        """Whether the kernel took it."""
        return self.errno == 0


def confirm(
    buffer: Any, layout: Layout, cpuid: Cpuid | Iterable[Iterable[int]] | None = None
) -> Confirmation:
    """Set an area on a scratch vCPU of the running kernel, and read it back.

    Parameters
    ----------
    buffer : (size,) uint8, or buffer
        One area, as a VMM would pass it: its bytes are not moved.
    layout : Layout
        What the bytes mean; used to name the components that changed.
    cpuid : Cpuid or entries, optional
        The guest's CPUID, set first. Default: none.

    Raises
    ------
    OSError
        If /dev/kvm can't be used, or refuses the CPUID list.

    *Source*: Linux Documentation/virt/kvm/api.rst, KVM_SET_XSAVE.
    """
    (row,), _ = area.rows_of(buffer, "buffer")
    with Kernel() as kernel:
        if area.headers(row).xstate_bv & XFEATURE_MASK_USER_DYNAMIC:
            with contextlib.suppress(OSError):
                kernel.arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM, 18)
        vcpu = kernel.create_vcpu()
        if cpuid is not None:
            vcpu.set_cpuid2(cpuid)
        given = np.zeros(max(len(row), kernel.xsave2_size, KVM_XSAVE_SIZE), np.uint8)
        given[: len(row)] = row
        try:
            vcpu.set_xsave(given)
        except OSError as refused:
            return Confirmation(refused.errno or errno.EINVAL, 0, 0)
        after = np.frombuffer(vcpu.get_xsave2() if kernel.xsave2_size else vcpu.get_xsave(), "u1")
        return Confirmation(0, area.headers(after).xstate_bv, area.diff(given, after, layout))


__all__ = ["Confirmation", "Kernel", "Vcpu", "confirm"]
