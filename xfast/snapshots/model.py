"""What every reader returns: a Snapshot of vCPUs (or threads), each with its XSAVE area.

A format neither judges nor prints; it finds the areas and says what it knows of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from xfast.xsave.cpuid import Cpuid
from xfast.xsave.layout import Layout

Stamp = tuple[int, int, int, int]
"""What tells that a file is the same one, unchanged: device, inode, size, mtime (ns)."""

Span = tuple[int, int]
"""Offset and length in a file, after decompression (bytes)."""


class Origin(Protocol):
    """Where a format found a vCPU: what it parsed, kept for its own `splices` alone."""

    def places(self) -> dict[str, Span]:
        """Return where in the file the fields lie that an edit of the state may change."""


@dataclass(frozen=True)
class CpuInfo:
    """A CPU of the machine that made a CRIU dump. The fields are cpuinfo.img's; None: not told.

    CRIU leaves SSE out of `xfeatures_mask` (0xe5 where XCR0 is 0xe7).

    *Source*: CRIU images/cpuinfo.proto (cpuinfo_x86_entry).
    """

    capability: tuple[int, ...] = ()
    vendor_id: int | None = None
    cpu_family: int | None = None
    model: int | None = None
    stepping: int | None = None
    capability_ver: int | None = None
    model_id: str | None = None
    xfeatures_mask: int | None = None
    xsave_size: int | None = None
    xsave_size_max: int | None = None


@dataclass(eq=False)
class Vcpu:
    """The extended state of one vCPU or thread. What a file does not tell is None.

    Parameters
    ----------
    index : int
        The vCPU's number, or the thread's id.
    area : (size,) uint8
        One XSAVE area, as the file holds it (standard or compacted format).
    layout : Layout or None
        Where the components lie in `area`; None where it can't be known.
    layout_source : str
        How the layout is known: ``given``, ``cpuid``, ``note``, ``format`` (the file's format
        fixes it), ``inferred`` or ``unknown``.
    layout_note : str
        For ``inferred`` and ``unknown``: from what, or why not (one clause).
    portable : bool
        The file stores registers, not an area of the source's layout: whoever restores it
        builds the area in the target's layout (QEMU, CRIU).
    xcr0, xss, xfd : int or None
        XCR0, IA32_XSS and IA32_XFD.
    cpuid : Cpuid or None
        The guest's CPUID.
    guest_mask : int or None
        The user components that the guest may have, where something better or other than
        `cpuid` tells (libvirt's cookie, CR4.PKE and XCR0 of a QEMU stream).
    pkru_enabled : bool or None
        CR4.PKE: whether the guest can reach PKRU by RDPKRU.
    mode : int
        32 where the file is of a thread or a machine in 32-bit mode, which has no more than
        eight vector registers, else 64.
    msrs : tuple of int or None
        The numbers of the MSRs that were saved with the vCPU.
    fpu_differs : tuple of str
        The fields in which a second copy of x87 and SSE, which a restore applies after the
        area, differs from it (Cloud Hypervisor's ``fpu``).
    cpuinfo : CpuInfo or None
        The CPU that a checkpoint was made on, in CRIU's own terms; `cpuid` tells the same.
    has_xsave : bool
        Whether the file has XSAVE state; False where it has no more than x87 and SSE (FXSAVE).
    origin : Origin or None
        Where in the file it was found. No one but the format looks into it; see `where`.
    facts : dict
        What else the file tells, to be shown (stable keys, plain values); nothing depends on it.
    """

    index: int
    area: NDArray[np.uint8]
    layout: Layout | None = None
    layout_source: str = "unknown"
    layout_note: str = ""
    portable: bool = False
    xcr0: int | None = None
    xss: int | None = None
    xfd: int | None = None
    cpuid: Cpuid | None = None
    guest_mask: int | None = None
    pkru_enabled: bool | None = None
    mode: int = 64
    msrs: tuple[int, ...] | None = None
    fpu_differs: tuple[str, ...] = ()
    cpuinfo: CpuInfo | None = None
    has_xsave: bool = True
    origin: Origin | None = field(default=None, repr=False, compare=False)
    facts: dict[str, Any] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vcpu):
            return NotImplemented
        compared = [f.name for f in fields(self) if f.compare and f.name != "area"]
        return np.array_equal(self.area, other.area) and all(
            getattr(self, name) == getattr(other, name) for name in compared
        )

    @property
    def where(self) -> dict[str, Span]:
        """Where the file has it: ``area`` if it holds one, else the fields that an edit changes."""
        return self.origin.places() if self.origin else {}


@dataclass
class Snapshot:
    """One file (or directory) with the extended state of its vCPUs or threads.

    Parameters
    ----------
    path : str
        The file's name as the user gave it.
    format : str
        ``qemu``, ``raw``, ``elfcore``, ``cloud-hypervisor``, ``firecracker`` or ``criu``.
    kind : str
        ``vm`` or ``process``: who consumes the state, and so whose rules apply.
    producer : str
        Who wrote it, as far as the file tells: ``qemu-kvm``, ``qemu-tcg``, ``kvm``, ``kernel``,
        ``gdb``, ...; empty where it does not.
    vcpus : sequence of Vcpu
        A list; of a file with very many areas, a `xfast.snapshots.model.Stack`; where a format
        could tell cheaply what is in them, an `Unseen`.
    container : tuple of str
        What was wrapped around it, outermost first: ``gzip``, ``libvirt-save``, ``mapped-ram`` ...
    facts : dict
        What else the file tells, to be shown (machine type, domain name, ...).
    doubts : tuple of str
        Why vCPUs or threads may be missing: what the file says of their number, or their
        numbering, does not agree with those that were read (one clause each). The verdict is
        then ``unknown``, and no fix is planned.
    part : str
        Which snapshot it is, in a file with several.
    stamp : Stamp or None
        What the file was when it was read, where it is one that can change.
    origin : object or None
        What the format keeps of the file as a whole; no one else looks into it.
    """

    path: str
    format: str
    kind: str
    producer: str
    vcpus: Sequence[Vcpu]
    container: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    part: str = ""
    doubts: tuple[str, ...] = ()
    stamp: Stamp | None = field(default=None, repr=False, compare=False)
    origin: object = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """What to call it: its path, and which of several snapshots in that file it is."""
        return f"{self.path}#{self.part}" if self.part else self.path

    @property
    def key(self) -> tuple[Hashable, ...] | None:
        """What stands for all that a judge looks at, besides names; see `Unseen`.

        None where no format gave one, or somebody has looked at the vCPUs.
        """
        key = key_of(self.vcpus)
        return None if key is None else (self.kind, self.producer, self.doubts, key)


def misnumbered(indices: Iterable[int]) -> tuple[str, ...]:
    """Return the doubts that the numbers of a machine's vCPUs raise: they go from 0 up.

    Parameters
    ----------
    indices : iterable of int
        Of the vCPUs that were read.
    """
    found = sorted(indices)
    if found == list(range(len(found))):
        return ()
    shown = ", ".join(map(str, found[:8])) + (", ..." if found[8:] else "")
    return (f"expected vCPUs 0 to {len(found) - 1}, got {shown}",)


Kept = TypeVar("Kept")


def kept(holder: Vcpu | Snapshot, kind: type[Kept]) -> Kept:
    """Return the origin that a format gave a vCPU or snapshot.

    Raises
    ------
    ValueError
        If it has none of this format: it was not read from a file, or by another format.
    """
    if not isinstance(holder.origin, kind):
        found = type(holder.origin).__module__ if holder.origin else "nowhere"
        raise ValueError(f"origin: expected what {kind.__module__} keeps, got {found}")
    return holder.origin


class Areas(Protocol):
    """Areas of one size: an array, or a file's, which are read when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """How many there are, and the bytes of each."""

    def __getitem__(self, row: int, /) -> NDArray[np.uint8]:
        """Return one area."""


class Class(NamedTuple):
    """The rows of a stack that no judgement can tell apart.

    `kind` is an index into the stack's kinds, `first` the row that showed the class first,
    `alike` how many rows there are. `facts` are those of `xfast.xsave.area.FACTS`.
    """

    kind: int
    first: int
    alike: int
    facts: tuple[int, ...]


class Stack(Sequence[Vcpu]):
    """The vCPUs of very many areas, each made when it is asked for.

    Parameters
    ----------
    areas : Areas
    kinds : sequence of Vcpu
        One for each sort of row: what the file tells of such a vCPU besides its area.
    classes : sequence of Class
        What is in the areas, in the order in which it first occurs.
    sort_of : (n,) uint32
        Each row's index into `kinds`.
    make : callable
        Returns the vCPU of a row from its kind, number and area.
    """

    def __init__(
        self,
        areas: Areas,
        kinds: Sequence[Vcpu],
        classes: Sequence[Class],
        sort_of: NDArray[np.uint32],
        make: Callable[[Vcpu, int, NDArray[np.uint8]], Vcpu],
    ) -> None:
        self.areas = areas
        self.kinds = tuple(kinds)
        self.classes = tuple(classes)
        self.sort_of = sort_of
        self._make = make

    def __len__(self) -> int:
        return self.areas.shape[0]

    @property
    def size(self) -> int:
        """Bytes of an area."""
        return self.areas.shape[1]

    @overload
    def __getitem__(self, index: int) -> Vcpu: ...
    @overload
    def __getitem__(self, index: slice) -> list[Vcpu]: ...
    def __getitem__(self, index: int | slice) -> Vcpu | list[Vcpu]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        return self._make(self.kinds[self.sort_of[row]], row, self.areas[row])

    def __iter__(self) -> Iterator[Vcpu]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(other) != len(self):
            return NotImplemented
        return all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class Unseen(Sequence[Vcpu]):
    """The vCPUs of one file, made when somebody looks; until then a small value stands for them.

    A fleet's files hold the same few things again and again. A format that finds cheaply what is
    in a file says so in `key`, and whoever worked something out of such vCPUs before (a judge, a
    scan's rows) keeps the answer under the key, and does not look.

    Parameters
    ----------
    key : hashable
        All that these vCPUs tell, besides the bytes of their areas, `origin` and `facts`: each
        one's number, the other fields of `Vcpu`, the size of its area, and the area's
        `xfast.xsave.area.FACTS` by its layout. Vcpus with equal keys may differ in nothing of
        that; `tests/helpers/keys.py` holds every format to it.
    count : int
        How many vCPUs there are.
    make : callable
        Returns them, as a list. It can't fail, and needs no open file.
    """

    __slots__ = ("_count", "_key", "_made", "_make")

    def __init__(self, key: Hashable, count: int, make: Callable[[], list[Vcpu]]) -> None:
        self._key = key
        self._count = count
        self._make = make
        self._made: list[Vcpu] | None = None

    @property
    def key(self) -> Hashable | None:
        """The key; None once somebody looked, who may have changed a vCPU since."""
        return self._key if self._made is None else None

    def _vcpus(self) -> list[Vcpu]:
        if self._made is None:
            self._made = self._make()
        return self._made

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Vcpu: ...
    @overload
    def __getitem__(self, index: slice) -> list[Vcpu]: ...
    def __getitem__(self, index: int | slice) -> Vcpu | list[Vcpu]:
        return self._vcpus()[index]

    def __iter__(self) -> Iterator[Vcpu]:
        return iter(self._vcpus())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return self._vcpus() == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._vcpus())

    def __reduce__(self) -> tuple[type[list[Vcpu]], tuple[list[Vcpu]]]:
        """Copies, and what goes to another process, are lists."""
        return list, (self._vcpus(),)


def key_of(vcpus: Sequence[Vcpu]) -> Hashable | None:
    """Return the value that stands for vCPUs that nobody has looked at; None where none does."""
    return vcpus.key if isinstance(vcpus, Unseen) else None


def classes_of(vcpus: Sequence[Vcpu]) -> Iterator[tuple[Vcpu, int]]:
    """Yield a vCPU of each class of a stack and how many are like it; otherwise each vCPU, 1."""
    if isinstance(vcpus, Stack):
        yield from ((vcpus[one.first], one.alike) for one in vcpus.classes)
    else:
        yield from ((vcpu, 1) for vcpu in vcpus)


class Splice(NamedTuple):
    """One edit of a file's bytes, after decompression: `old` at `offset` becomes `new`.

    `new` may be longer or shorter than `old`. Where the snapshot is a directory, `member` is the
    name of the file in it.
    """

    offset: int
    old: bytes
    new: bytes
    field: str = ""
    member: str = ""
