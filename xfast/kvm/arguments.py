"""Check what goes into the ioctls of the model and of the real thing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from xfast.hosts.model import Host
from xfast.xsave.area import Areas, rows_of
from xfast.xsave.cpuid import Cpuid, Entry
from xfast.xsave.features import XFEATURE_MASK_FPSSE


def unsigned(value: int, width: int, name: str) -> int:
    """Return `value`, if it is a number that C's u32 or u64 can hold.

    Raises
    ------
    ValueError
        If it is not: the kernel never sees such a number.
    """
    if not 0 <= value < 1 << width:
        raise ValueError(f"{name}: expected {width} bits, unsigned, got {value:#x}")
    return value


def check_host(host: Host) -> None:
    """Raise ValueError if a mask of a host does not fit its register, or XCR0 lacks x87 or SSE.

    *Source*: Linux arch/x86/kernel/fpu/xstate.c fpu__init_system_xstate().
    """
    widths = {"xcr0": 64, "xss": 64, "kvm_xcr0": 64, "mxcsr_mask": 32}
    for name, width in widths.items():
        value = getattr(host, name)
        if value is not None:
            unsigned(value, width, f"host {host.name}: {name}")
    if host.xcr0 is not None and ~host.xcr0 & XFEATURE_MASK_FPSSE:
        raise ValueError(f"host {host.name}: xcr0: expected x87 and SSE in it, got {host.xcr0:#x}")


def one_area(buffer: Any) -> Areas:
    """Return the (size,) uint8 of a buffer; ValueError if it holds several areas, or no bytes."""
    rows, _ = rows_of(buffer, "buffer")
    if len(rows) != 1:
        raise ValueError(f"buffer: expected one area, got {len(rows)}")
    row: Areas = rows[0]
    return row


def bytes_of(buffer: Any) -> memoryview:
    """Return a view of a buffer's bytes; ValueError if they don't lie together."""
    try:
        return memoryview(buffer).cast("B")
    except TypeError as error:
        raise ValueError(f"buffer: expected bytes that lie together, got: {error}") from None


def cpuid_of(entries: Cpuid | Iterable[Iterable[int]]) -> Cpuid:
    """Return a CPUID list as a value; each field is a u32.

    Raises
    ------
    ValueError
        If a row has not seven numbers, or one of them is no u32.
    """
    if isinstance(entries, Cpuid):
        return entries
    rows = [tuple(unsigned(field, 32, "CPUID entry") for field in entry) for entry in entries]
    for row in rows:
        if len(row) != 7:
            raise ValueError(f"CPUID entry: expected 7 numbers, got {len(row)}")
    return Cpuid(tuple(Entry(*row) for row in rows))


def xcrs_of(
    xcrs: Iterable[tuple[int, int]], nr: int | None, flags: int
) -> tuple[list[tuple[int, int]], int, int]:
    """Return the rows, nr_xcrs and flags of a struct kvm_xcrs; ValueError if they don't fit."""
    rows = [(unsigned(n, 32, "xcr"), unsigned(value, 64, f"XCR{n}")) for n, value in xcrs]
    count = len(rows) if nr is None else unsigned(nr, 32, "nr")
    return rows, count, unsigned(flags, 32, "flags")
