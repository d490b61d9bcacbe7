"""Registers by gdb's names, as numpy views over one XSAVE area or a whole batch.

A register can be read and written where its component is present; the bytes of a component
whose XSTATE_BV bit is clear are never handed out. A register that spans components (ymm0 is
SSE and AVX) needs the one of its highest part; clear lower parts read as their init value.

*Source*: Intel SDM vol. 1 sections 13.4.1 and 13.5; gdb's org.gnu.gdb.i386 target features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xfast.errors import XfastError
from xfast.xsave.area import classify, headers, rows_of
from xfast.xsave.features import XCOMP_BV_COMPACTED, name_of
from xfast.xsave.layout import Layout, layout_of


class Part(NamedTuple):
    """A run of bytes inside a component (of the area itself for x87 and SSE)."""

    component: int
    offset: int
    size: int


class Register(NamedTuple):
    """A register: its parts, lowest first, and the numpy type of a scalar (empty: bytes)."""

    name: str
    parts: tuple[Part, ...]
    dtype: str = ""

    @property
    def component(self) -> int:
        """The component that must be present: that of the highest part."""
        return self.parts[-1].component

    @property
    def size(self) -> int:
        """Bytes of the register."""
        return sum(part.size for part in self.parts)


def _scalar(name: str, component: int, offset: int, dtype: str) -> Register:
    return Register(name, (Part(component, offset, np.dtype(dtype).itemsize),), dtype)


def _bytes(name: str, component: int, offset: int, size: int) -> Register:
    return Register(name, (Part(component, offset, size),))


def _table() -> Iterator[Register]:
    for name, offset, dtype in (
        ("fctrl", 0, "<u2"),
        ("fstat", 2, "<u2"),
        ("ftw", 4, "u1"),  # the abridged tag byte as stored; gdb's ftag is made from it
        ("fop", 6, "<u2"),
        ("fioff", 8, "<u4"),
        ("fiseg", 12, "<u2"),
        ("fooff", 16, "<u4"),
        ("foseg", 20, "<u2"),
        ("fip", 8, "<u8"),
        ("fdp", 16, "<u8"),
    ):
        yield _scalar(name, 0, offset, dtype)
    for i in range(8):
        yield _bytes(f"st{i}", 0, 32 + 16 * i, 10)
    yield _scalar("mxcsr", 1, 24, "<u4")
    xmm = [Part(1, 160 + 16 * i, 16) for i in range(16)]
    upper = [Part(2, 16 * i, 16) for i in range(16)]
    for i in range(16):
        yield Register(f"xmm{i}", (xmm[i],))
    for i in range(16):
        yield Register(f"ymm{i}", (xmm[i], upper[i]))
    for i in range(16):
        yield Register(f"zmm{i}", (xmm[i], upper[i], Part(6, 32 * i, 32)))
    for i in range(16, 32):
        yield _bytes(f"zmm{i}", 7, 64 * (i - 16), 64)
    for i in range(16, 32):
        yield _bytes(f"ymm{i}", 7, 64 * (i - 16), 32)
        yield _bytes(f"xmm{i}", 7, 64 * (i - 16), 16)
    for i in range(8):
        yield _scalar(f"k{i}", 5, 8 * i, "<u8")
    for i in range(4):
        yield _bytes(f"bnd{i}", 3, 16 * i, 16)
    yield _scalar("bndcfgu", 4, 0, "<u8")
    yield _scalar("bndstatus", 4, 8, "<u8")
    yield _scalar("pkru", 9, 0, "<u4")
    yield _bytes("tilecfg", 17, 0, 64)
    for i in range(8):
        yield _bytes(f"tmm{i}", 18, 1024 * i, 1024)
    for i in range(16):
        yield _scalar(f"r{16 + i}", 19, 8 * i, "<u8")


REGISTERS: dict[str, Register] = {register.name: register for register in _table()}

NARROW = {f"{kind}{i}" for kind in ("xmm", "ymm") for i in range(16, 32)} | {"fip", "fdp"}
"""Registers that another, wider or gdb's own, shows too: left out of listings."""

LONG_MODE = {f"{kind}{i}" for kind in ("xmm", "ymm", "zmm") for i in range(8, 32)} | {
    f"r{i}" for i in range(16, 32)
}
"""Registers that only 64-bit mode reaches: the others' bytes in an area mean nothing there."""


def _components(register: Register) -> int:
    """Return the mask of the components that a register's parts are in."""
    mask = 0
    for part in register.parts:
        mask |= 1 << part.component
    return mask


_LISTED = [(name, register, _components(register)) for name, register in REGISTERS.items()]


class Registers:
    """The registers of one area or a batch.

    Parameters
    ----------
    areas : (n, size) or (size,) uint8, or a buffer
        In the standard format, or compacted with the same XCOMP_BV in every row.
    layout : Layout

    Raises
    ------
    ValueError
        If the rows have different XCOMP_BV, so that no one view fits them all.
    """

    def __init__(self, areas: Any, layout: Layout | str) -> None:
        self._rows, self._single = rows_of(areas)
        layout = self._layout = layout_of(layout)
        head = headers(self._rows)
        self._unreadable = head.xstate_bv & classify(self._rows, layout).unreadable
        self._bv = head.xstate_bv & ~self._unreadable
        formats = np.unique(head.xcomp_bv)
        if len(formats) > 1:
            raise ValueError(
                f"areas: expected the same XCOMP_BV in every row, got {len(formats)} different ones"
            )
        self._offsets = {slot.nr: slot.offset for slot in layout.slots}
        self._mxcsr = 6
        if len(formats) and int(formats[0]) & XCOMP_BV_COMPACTED:
            self._offsets = layout.compacted_offsets(int(formats[0]) & layout.mask)
            self._mxcsr = 2

    def _present(self, register: Register) -> NDArray[np.bool_]:
        mask = self._mxcsr if register.name == "mxcsr" else 1 << register.component
        placed = self._unreadable & np.uint64(_components(register)) == 0
        present: NDArray[np.bool_] = (self._bv & np.uint64(mask) != 0) & placed
        return present

    def unreadable(self) -> list[str]:
        """Return the names of the registers that a row holds and that have no known place in it."""
        unreadable = int(np.bitwise_or.reduce(self._unreadable))
        seen = int(np.bitwise_or.reduce(self._bv)) | unreadable
        return [
            name
            for name, register, components in _LISTED
            if seen >> register.component & 1 and unreadable & components
        ]

    def __contains__(self, name: str) -> bool:
        """Return whether every row holds the register."""
        register = REGISTERS.get(name)
        return register is not None and bool(self._present(register).all())

    def __iter__(self) -> Iterator[str]:
        """Yield the names of the registers that every row holds."""
        return (name for name in REGISTERS if name in self)

    def _require(self, name: str) -> Register:
        try:
            register = REGISTERS[name]
        except KeyError:
            raise XfastError(
                f"register: expected one of gdb's names ({', '.join(REGISTERS)}), got {name!r}"
            ) from None
        present = self._present(register)
        if not present.all():
            row = int(np.argmin(present))
            nr = register.component
            raise XfastError(
                f"{name}: component {nr} ({name_of(nr)}) is absent in areas[{row}]: "
                f"XSTATE_BV {int(self._bv[row]):#x}"
            )
        return register

    def _view(self, part: Part) -> NDArray[np.uint8]:
        start = part.offset + (self._offsets[part.component] if part.component > 1 else 0)
        return self._rows[:, start : start + part.size]

    def __getitem__(self, name: str) -> Any:
        """Return the register: a view, or for one that spans components a read-only copy.

        Returns
        -------
        (n,) of the register's integer type, or (n, bytes) uint8; without n for a single area

        Raises
        ------
        XfastError
            If there is no such register, or a row lacks its component; names both.
        """
        register = self._require(name)
        if register.dtype:
            value = self._view(register.parts[0]).view(register.dtype)[:, 0]
            return value[0:1].reshape(()) if self._single else value
        if len(register.parts) == 1:
            view = self._view(register.parts[0])
            return view[0] if self._single else view
        pieces = []
        for part in register.parts:
            clear = self._bv & np.uint64(1 << part.component) == 0
            if clear.all():
                pieces.append(np.zeros((len(self._rows), part.size), np.uint8))
            else:
                pieces.append(np.where(clear[:, np.newaxis], np.uint8(0), self._view(part)))
        whole = np.concatenate(pieces, axis=1)
        whole.flags.writeable = False
        return whole[0] if self._single else whole

    def values(self) -> dict[str, int]:
        """Return the numbers in all registers that a single area holds, clear lower parts as 0."""
        (row,), (present,), (unreadable,) = self._rows, self._bv, self._unreadable
        data, present, unreadable = row.tobytes(), int(present), int(unreadable)
        found = {}
        for name, register, components in _LISTED:
            needed = self._mxcsr if name == "mxcsr" else 1 << register.component
            if not present & needed or unreadable & components:
                continue
            value = shift = 0
            for component, offset, size in register.parts:
                if present >> component & 1 or len(register.parts) == 1:
                    start = offset + (self._offsets[component] if component > 1 else 0)
                    value |= int.from_bytes(data[start : start + size], "little") << shift
                shift += 8 * size
            found[name] = value
        return found

    def __setitem__(self, name: str, value: Any) -> None:
        """Write the register: an integer, or an array that broadcasts to what reading gives.

        Raises
        ------
        XfastError
            If a row lacks one of the register's components, lower ones included.
        ValueError
            If an integer does not fit the register.
        """
        register = self._require(name)
        for part in register.parts:
            if not (self._bv & np.uint64(1 << part.component)).all() and name != "mxcsr":
                raise XfastError(
                    f"{name}: component {part.component} ({name_of(part.component)}) is absent, "
                    "and what is written to it would be lost"
                )
        if register.dtype:
            self._view(register.parts[0]).view(register.dtype)[:, 0] = value
            return
        if isinstance(value, int):
            try:
                value = np.frombuffer(value.to_bytes(register.size, "little"), np.uint8)
            except OverflowError:
                raise ValueError(
                    f"{name}: expected 0 to 2**{8 * register.size} - 1, got {value:#x}"
                ) from None
        source = np.broadcast_to(np.asarray(value, np.uint8), (len(self._rows), register.size))
        start = 0
        for part in register.parts:
            self._view(part)[...] = source[:, start : start + part.size]
            start += part.size


def ftag(ftw: int, fstat: int, st: list[bytes]) -> int:
    """Return the full x87 tag word (gdb's ftag): two bits for each physical register.

    Parameters
    ----------
    ftw : int
        The abridged tag byte, a bit for each physical register that is not empty.
    fstat : int
        The status word, for TOP.
    st : list of bytes
        ST0 to ST7, 10 bytes each.

    *Source*: Intel SDM vol. 2, FXSAVE, "Recreating FSAVE format".
    """
    top = fstat >> 11 & 7
    word = 0
    for physical in range(8):
        tag = 3
        if ftw >> physical & 1:
            value = st[(physical - top) & 7]
            significand = int.from_bytes(value[:8], "little")
            exponent = int.from_bytes(value[8:], "little") & 0x7FFF
            if exponent == 0 and significand == 0:
                tag = 1
            else:
                tag = 0 if 0 < exponent < 0x7FFF and significand >> 63 else 2
        word |= tag << 2 * physical
    return word


def as_integers(area: Any, layout: Layout, mode: int = 64) -> dict[str, tuple[int, int]]:
    """Return {register: (value, bytes)} of all registers that one area holds, ftag included.

    Parameters
    ----------
    mode : int
        32 leaves out what only 64-bit mode reaches.

    *Source*: Intel SDM vol. 1 sections 10.2.2 and 14.1.1.
    """
    values = Registers(area, layout).values()
    if "ftw" in values:
        st = [values[f"st{i}"].to_bytes(10, "little") for i in range(8)]
        values["ftag"] = ftag(values["ftw"], values["fstat"], st)
    return {
        name: (value, REGISTERS[name].size if name in REGISTERS else 2)
        for name, value in values.items()
        if name not in NARROW and (mode == 64 or name not in LONG_MODE)
    }


def without_place(area: Any, layout: Layout, mode: int = 64) -> list[str]:
    """Return the names of the registers that one area holds at no known place.

    Parameters
    ----------
    mode : int
        32 leaves out what only 64-bit mode reaches.
    """
    names = Registers(area, layout).unreadable()
    return [n for n in names if n not in NARROW and (mode == 64 or n not in LONG_MODE)]
