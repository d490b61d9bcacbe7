"""QEMU's `cpu` section as an XSAVE area, and an edited area as the section's bytes.

The stream stores registers, big-endian, and no area: QEMU builds one in the target's layout. So
does this module, in Intel's. One table says which bytes of the section are which bytes of the
area; it is read in both directions.

*Source*: QEMU target/i386/machine.c vmstate_x86_cpu, target/i386/xsave_helper.c.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from xfast.engine import files
from xfast.errors import PolicyError
from xfast.xsave import area as engine
from xfast.xsave.features import BY_NAME, HEADER_OFFSET, XFEATURE_MASK_FPSSE, names_of
from xfast.xsave.layout import preset

INTEL = preset("intel")
_X87, _SSE = BY_NAME["x87"].nr, BY_NAME["sse"].nr


Control: TypeAlias = "tuple[int, int, int, int | None, int | None]"
"""XCR0, XSTATE_BV as a section has it, CR4, IA32_XSS and IA32_XFD."""


class Form(NamedTuple):
    """Where the fixed part of a section has its fields (bytes); `registers` of XMM and YMM."""

    registers: int
    fcw: int
    cr4: int
    cr4_format: str
    mxcsr: int
    xcr0: int

    @property
    def zones(self) -> dict[str, tuple[int, int]]:
        """The fields that an edit may change: {name: (offset, bytes)}."""
        vectors = 16 * self.registers
        return {
            "fcw": (self.fcw, 2),
            "fsw": (self.fcw + 2, 2),
            "ftw": (self.fcw + 4, 2),
            "st": (self.fcw + 8, 80),
            "mxcsr": (self.mxcsr, 4),
            "xmm": (self.mxcsr + 4, vectors),
            "xcr0": (self.xcr0, 8),
            "xstate_bv": (self.xcr0 + 8, 8),
            "ymm_hi128": (self.xcr0 + 16, vectors),
        }


FORMS = {
    1817: Form(16, 148, 480, ">Q", 556, 1545),
    1313: Form(8, 44, 316, ">I", 356, 1169),
}
"""By the fixed part's size: x86_64 and i386."""


class Run(NamedTuple):
    """Bytes of one component: `length` at `zone` + `start`, words of `unit` bytes, big-endian."""

    nr: int
    zone: str
    start: int
    unit: int
    length: int
    target: int


def _runs(registers: int, top: int) -> Iterator[Run]:
    """Yield which bytes of which zone or subsection are which bytes of an Intel area."""
    yield Run(_X87, "fcw", 0, 2, 2, 0)
    yield Run(_X87, "fsw", 0, 2, 2, 2)
    yield Run(_X87, "ftw", 1, 1, 1, 4)
    for slot in range(8):
        target = 32 + 16 * ((slot - top) & 7)
        yield Run(_X87, "st", 10 * slot, 8, 8, target)
        yield Run(_X87, "st", 10 * slot + 8, 2, 2, target + 8)
    yield Run(_X87, "cpu/fpop_ip_dp", 0, 2, 2, 6)
    yield Run(_X87, "cpu/fpop_ip_dp", 2, 8, 16, 8)
    yield Run(_SSE, "mxcsr", 0, 4, 4, 24)
    yield Run(_SSE, "xmm", 0, 8, 16 * registers, BY_NAME["sse"].offset)
    for name, zone, start, unit, length in (
        ("avx", "ymm_hi128", 0, 8, 16 * registers),
        ("bndregs", "cpu/mpx", 0, 8, 64),
        ("bndcsr", "cpu/mpx", 64, 8, 16),
        ("opmask", "cpu/avx512", 0, 8, 64),
        ("zmm_hi256", "cpu/avx512", 64, 8, 32 * registers),
        ("hi16_zmm", "cpu/avx512", 576, 8, 1024 if registers == 16 else 0),
        ("pkru", "cpu/pkru", 0, 4, 4),
        ("tilecfg", "cpu/intel_amx_xtile", 0, 1, 64),
        ("tiledata", "cpu/intel_amx_xtile", 64, 1, 8192),
        ("apx", "cpu/apx", 0, 8, 128),
    ):
        if length:
            component = BY_NAME[name]
            yield Run(component.nr, zone, start, unit, length, component.offset)


class Shape:
    """What all sections have in common that are as long and have the same subsections.

    Parameters
    ----------
    fixed : int
        Bytes of the fixed part.
    subsections : tuple
        (name, (offset, bytes)) of each.

    Attributes
    ----------
    zones : dict
        {name: (offset, bytes)} of the fields, and of the subsections' data.
    held : int
        The components that there are bytes for.
    optional : list of (int, int, int)
        Component bit, start and end of those that come in subsections.
    overlaps : bool
        Whether there are MPX and APX, which share a place.
    controls : (5, 2) int32
        Where XCR0, XSTATE_BV, CR4, IA32_XSS and IA32_XFD lie; -1 for one that is not there.
    """

    def __init__(self, fixed: int, subsections: tuple[tuple[str, tuple[int, int]], ...]) -> None:
        self.form = FORMS[fixed]
        self.zones = self.form.zones | dict(subsections)
        self.subsections = sorted(name for name, _ in subsections)
        runs = self.runs(0)
        self.held = sum({1 << run.nr for run in runs})
        self.optional = []
        for run in runs:
            if run.zone.startswith("cpu/"):
                place = self.place_of(run)
                self.optional.append((1 << run.nr, place.start, place.stop))
        self.always = sum({1 << run.nr for run in runs if not run.zone.startswith("cpu/")})
        self._sizes: dict[int, int] = {}
        self._swaps: dict[int, NDArray[np.int32]] = {}
        self.overlaps = {"cpu/mpx", "cpu/apx"} <= self.zones.keys()
        xss, xfd = (self.zones.get(name, (-1, 0)) for name in ("cpu/xss", "cpu/msr_xfd"))
        self.controls = np.array(
            [
                self.zones["xcr0"],
                self.zones["xstate_bv"],
                (self.form.cr4, struct.calcsize(self.form.cr4_format)),
                *((start, 8) if length >= 8 else (-1, 0) for start, length in (xss, xfd)),
            ],
            np.int32,
        )

    def runs(self, top: int) -> list[Run]:
        """Return what sections of this shape have of the table."""
        return [
            run
            for run in _runs(self.form.registers, top)
            if run.start + run.length <= self.zones.get(run.zone, (0, 0))[1]
        ]

    def place_of(self, run: Run) -> slice:
        """Return where in a section a run lies."""
        start = self.zones[run.zone][0] + run.start
        return slice(start, start + run.length)

    def area_size(self, xstate_bv: int) -> int:
        """Return the bytes of the area of a section."""
        mask = self.held | xstate_bv
        if mask not in self._sizes:
            self._sizes = {mask: INTEL.standard_size(mask)}
        return self._sizes[mask]

    def swaps(self, top: int) -> NDArray[np.int32]:
        """Return the runs as `files.swap_runs` takes them, with the x87 slots rotated by `top`."""
        found = self._swaps.get(top)
        if found is None:
            rows = [
                (self.place_of(run).start, run.length, run.unit, run.target)
                for run in self.runs(top)
            ]
            found = self._swaps[top] = np.array(rows, np.int32)
        return found


@lru_cache(maxsize=64)
def shape_of(fixed: int, subsections: tuple[tuple[str, tuple[int, int]], ...]) -> Shape:
    """Return the Shape of sections."""
    return Shape(fixed, subsections)


class Section:
    """The bytes of one vCPU's section, in memory.

    Parameters
    ----------
    data : bytes
        All of it, subsections included.
    shape : Shape
    kvm : bool
        Who wrote it: KVM's slots are ST(i) and its XSTATE_BV is real; TCG's are physical
        registers, and its XSTATE_BV is always 0.

    *Source*: QEMU target/i386/xsave_helper.c x86_cpu_xrstor_all_areas(); target/i386/machine.c
    cpu_pre_save().
    """

    def __init__(self, data: bytes, shape: Shape, kvm: bool) -> None:
        self.data = data
        self.shape = shape
        self.kvm = kvm
        self.form = shape.form
        self.zones = shape.zones

    def runs(self, fsw: int) -> list[Run]:
        """Return what this section has of the table, with the x87 slots in `fsw`'s order."""
        return self.shape.runs(self.top(fsw))

    def top(self, fsw: int) -> int:
        """Return by how much the x87 slots are rotated."""
        return 0 if self.kvm else fsw >> 11 & 7

    def place_of(self, run: Run) -> slice:
        """Return where in `data` a run lies."""
        return self.shape.place_of(run)

    def unpack(self, fmt: str, zone: str) -> int:
        """Return the number that a zone begins with."""
        value: int = struct.unpack_from(fmt, self.data, self.zones[zone][0])[0]
        return value

    def control(self) -> Control:
        """Return XCR0, XSTATE_BV as the section has it, CR4, IA32_XSS and IA32_XFD."""
        return cast(Control, files.big_endian(self.data, self.shape.controls))

    @property
    def xcr0(self) -> int:
        """The guest's XCR0."""
        return self.unpack(">Q", "xcr0")

    @property
    def stream_xstate_bv(self) -> int:
        """XSTATE_BV as the section has it."""
        return self.unpack(">Q", "xstate_bv")

    @property
    def xstate_bv(self) -> int:
        """XSTATE_BV of the area: KVM's own, or for TCG what XCR0 enables and the section holds.

        QEMU leaves subsections out where they are all zeros, the init value; such as are here
        and all zeros count as left out.
        """
        if self.kvm:
            return self.stream_xstate_bv
        held = self.shape.always
        for bit, start, end in self.shape.optional:
            if self.data[start:end].strip(b"\0"):
                held |= bit
        return (self.xcr0 | XFEATURE_MASK_FPSSE) & held

    def area(self) -> NDArray[np.uint8]:
        """Return the vCPU's area: standard format, Intel's layout, as long as what is in it."""
        xstate_bv = self.xstate_bv
        top = self.top(self.unpack(">H", "fsw"))
        image = np.empty(self.shape.area_size(xstate_bv), np.uint8)
        files.swap_runs(self.data, self.shape.swaps(top), image)
        struct.pack_into("<Q", image.data, HEADER_OFFSET, xstate_bv)
        return image

    def edited(self, image: NDArray[np.uint8]) -> Section:
        """Return the section with another area's values; lengths and everything else stay.

        What the new area drops (a bit clear in XSTATE_BV that was set) becomes the init value.

        Raises
        ------
        PolicyError
            If the area holds something that this section has no place for.
        """
        size = self.shape.area_size(self.xstate_bv)
        if image.shape != (size,):
            raise ValueError(f"area: expected shape {(size,)}, got {image.shape}")
        image = image.copy()
        header = image[HEADER_OFFSET : HEADER_OFFSET + 8].view("<u8")
        xstate_bv = int(header[0])
        dropped = self.xstate_bv & ~xstate_bv
        header[0] |= dropped
        engine.keep(image, INTEL, engine.ALL & ~dropped)
        data = bytearray(self.data)
        for run in self.runs(int(image[2:4].view("<u2")[0])):
            words = image[run.target : run.target + run.length].reshape(-1, run.unit)
            data[self.place_of(run)] = words[:, ::-1].tobytes()
        if self.kvm:
            start, _ = self.zones["xstate_bv"]
            data[start : start + 8] = struct.pack(">Q", xstate_bv)
        result = Section(bytes(data), self.shape, self.kvm)
        lost = engine.diff(result.area(), image, INTEL) & INTEL.user_mask
        if lost:
            raise PolicyError(
                f"the stream has no place for {names_of(lost)}: expected an area that has "
                "only what the stream already holds"
            )
        return result


def fields(image: NDArray[np.uint8], xcr0: int) -> dict[str, bytes]:
    """Return what a section of QEMU for x86_64 under KVM holds of an area's registers.

    Parameters
    ----------
    image : (size,) uint8
        Standard format, Intel's layout; every component that is clear has its init bytes.
    xcr0 : int

    Returns
    -------
    dict of str to bytes
        By zone or subsection, as in `Section.zones`; subsections that are all zeros, which QEMU
        leaves out, are left out.
    """
    whole = np.zeros(INTEL.standard_size(), np.uint8)
    whole[: image.size] = image
    form = FORMS[1817]
    zones = {name: bytearray(length) for name, (_, length) in form.zones.items()}
    for run in _runs(form.registers, 0):
        zone = zones.setdefault(run.zone, bytearray())
        zone.extend(bytes(max(0, run.start + run.length - len(zone))))
        words = whole[run.target : run.target + run.length].reshape(-1, run.unit)
        zone[run.start : run.start + run.length] = words[:, ::-1].tobytes()
    zones["xcr0"][:] = struct.pack(">Q", xcr0)
    zones["xstate_bv"][:] = whole[HEADER_OFFSET : HEADER_OFFSET + 8].tobytes()[::-1]
    return {
        name: bytes(zone)
        for name, zone in zones.items()
        if any(zone) or not name.startswith("cpu/")
    }
