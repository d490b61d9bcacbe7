"""Internal snapshots of a qcow2 image: each one's VM state as a Source of its own.

*Source*: QEMU docs/interop/qcow2.txt; block/qcow2-snapshot.c.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from xfast.errors import FormatError
from xfast.snapshots.bytes.source import Locate, Source, View

MAGIC = b"QFI\xfb"
OFFSET_MASK = 0x00FFFFFFFFFFFE00
L1_LIMIT = 32 << 20
"""No L1 table is longer (bytes): QCOW_MAX_L1_SIZE."""
COMPRESSED = 1 << 62
ZERO = 1
ENTRY_SIZE = 40
SNAPSHOT_LIMIT = 1024
"""More internal snapshots than this are not read; QEMU itself stops at 65536."""
READ_LEAST, READ_RATIO = 40 << 20, 4
"""All VM states together are read for so many bytes, or so many times what the image takes on the
disk: tables may name the same clusters again and again, and VM states of any length."""


class Internal(NamedTuple):
    """One internal snapshot that holds a VM state of `size` bytes."""

    id: str
    name: str
    size: int
    stream: View


def is_qcow2(source: Source) -> bool:
    """Tell whether `source` is a qcow2 image."""
    return source.size >= 72 and source.read(0, 4) == MAGIC


def internals(source: Source) -> list[Internal]:
    """Return the internal snapshots that hold a VM state, in the image's order.

    Raises
    ------
    FormatError
        If the snapshot table or a cluster table lies outside the file, or makes no sense. That
        goes for the disk's own tables too: QEMU does not open an image without them.

    *Source*: QEMU block/qcow2.c qcow2_load_vmstate(), qcow2_vm_state_offset().
    """
    cluster_bits, disk_size = source.unpack(">IQ", 20)
    active_size, active = source.unpack(">IQ", 36)
    count, at = source.unpack(">IQ", 60)
    if not 9 <= cluster_bits <= 21:
        raise FormatError(
            source.path, 20, f"expected clusters of 2^9 to 2^21, got 2^{cluster_bits}"
        )
    if count > SNAPSHOT_LIMIT:
        raise FormatError(
            source.path, 60, f"expected at most {SNAPSHOT_LIMIT} snapshots, got {count}"
        )
    _check_tables(source, active, active_size, 1 << cluster_bits)
    found = []
    allowance = _Allowance(max(READ_LEAST, READ_RATIO * source.stored))
    for _ in range(count):
        l1_offset, l1_size, id_length, name_length = source.unpack(">QIHH", at)
        state_size, extra_length = source.unpack(">II", at + 32)
        if extra_length >= 8:
            (state_size,) = source.unpack(">Q", at + ENTRY_SIZE)
        names = source.read(at + ENTRY_SIZE + extra_length, id_length + name_length)
        clusters = _Clusters(source, cluster_bits, l1_offset, l1_size, disk_size)
        if state_size:
            found.append(
                Internal(
                    names[:id_length].decode("utf-8", "replace"),
                    names[id_length:].decode("utf-8", "replace"),
                    state_size,
                    _State(source, state_size, clusters.locate, allowance),
                )
            )
        at += (ENTRY_SIZE + extra_length + id_length + name_length + 7) & ~7
    return found


def _check_tables(source: Source, offset: int, count: int, cluster: int) -> None:
    """Require the disk's L1 table and every L2 table in it to lie in the file."""
    if 8 * count > L1_LIMIT:
        raise FormatError(
            source.path, 36, f"expected at most {L1_LIMIT // 8} L1 entries, got {count}"
        )
    entries = np.frombuffer(source.read(offset, 8 * count), ">u8") & np.uint64(OFFSET_MASK)
    end = int(entries.max(initial=0)) + cluster
    if entries.any() and end > source.size:
        raise FormatError(
            source.path, source.size, f"expected an L2 table up to offset {end}, got the end"
        )


class _Allowance:
    """How many bytes may still be read of an image's VM states."""

    def __init__(self, left: int) -> None:
        self.left = left


class _State(View):
    """A VM state; what is read of it is taken from the image's allowance."""

    def __init__(self, source: Source, size: int, locate: Locate, allowance: _Allowance) -> None:
        super().__init__(source, size, locate)
        self.allowance = allowance

    def _fetch(self, offset: int, length: int) -> bytes:
        self.allowance.left -= length
        if self.allowance.left < 0:
            raise FormatError(
                self.path,
                offset,
                "expected snapshots with clusters of their own, got tables that name the same "
                "ones again and again",
            )
        return super()._fetch(offset, length)


class _Clusters:
    """Where one snapshot's VM state lies: behind the disk, through the snapshot's own tables."""

    def __init__(
        self, source: Source, cluster_bits: int, l1_offset: int, l1_size: int, disk_size: int
    ) -> None:
        self.source = source
        self.bits = cluster_bits
        self.l1_offset = l1_offset
        self.l1_size = l1_size
        span = 1 << (2 * cluster_bits - 3)
        self.start = -(-disk_size // span) * span
        self.table_at, self.table = 0, b""

    def locate(self, offset: int) -> tuple[int | None, int]:
        """Return where a byte of the VM state lies, or None for zeros, and its cluster's rest."""
        guest = self.start + offset
        within = guest & ((1 << self.bits) - 1)
        left = (1 << self.bits) - within
        index = guest >> (2 * self.bits - 3)
        if index >= self.l1_size:
            raise FormatError(
                self.source.path,
                self.l1_offset,
                f"expected {index + 1} L1 entries, got {self.l1_size}",
            )
        table = self.source.unpack(">Q", self.l1_offset + 8 * index)[0] & OFFSET_MASK
        if not table:
            return None, left
        within_table = 8 * (guest >> self.bits & ((1 << (self.bits - 3)) - 1))
        place = table + within_table
        if table != self.table_at:
            length = max(0, min(1 << self.bits, self.source.size - table))
            self.table_at, self.table = table, self.source.read(table, length)
        if within_table + 8 > len(self.table):
            raise FormatError(self.source.path, place, "expected an L2 entry, got the end")
        entry = int.from_bytes(self.table[within_table : within_table + 8], "big")
        if entry & COMPRESSED:
            raise FormatError(
                self.source.path, place, "expected a plain VM state, got a compressed cluster"
            )
        if entry & ZERO or not entry & OFFSET_MASK:
            return None, left
        return (entry & OFFSET_MASK) + within, left
