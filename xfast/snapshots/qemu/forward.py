"""A QEMU stream from the front: over guest memory to the devices, and on to the stream's end.

`stream` finds the vCPUs from the end, at no cost, where the stream ends with its file. Where it
does not (a volume with zeros or old data behind the stream, a pipe) the way is this one. An old
stream's end behind a newer one would mislead who looks from behind, so volumes are always walked.

What comes out is a Source of the stream without its memory: the header, the devices, the
description. To every reader that is a stream like any other.

*Source*: QEMU migration/savevm.c qemu_savevm_state_complete_precopy_non_iterable().
"""

from __future__ import annotations

import json
import re
import struct
import tempfile
from bisect import bisect_right
from typing import Any, BinaryIO, NamedTuple

from xfast.engine.walk import Walker
from xfast.errors import FormatError
from xfast.snapshots.bytes.source import Source, View, Watch
from xfast.snapshots.model import Stamp
from xfast.snapshots.qemu.plans import Sections
from xfast.snapshots.qemu.search import (
    FOOTER,
    FULL,
    HEADER,
    SEARCH_LIMIT,
    SECTION_END,
    CpuSection,
    Found,
)
from xfast.snapshots.qemu.stream import (
    DESCRIPTION,
    MAGIC,
    checked,
    described_cpu,
    find_cpus,
    measure,
)

CHUNK = 1 << 18
PADDING = 4096
"""A file is longer than its stream where it ends with as many zeros (bytes)."""

HOLD_LIMIT = 256 << 20
"""No guest's devices are larger than this (bytes)."""

HOLD_IN_MEMORY = 8 << 20
"""Devices beyond this (bytes) wait in an anonymous temporary file."""

CANDIDATES_LIMIT = 64 << 20
"""How much of what only looks like a description is parsed before the search is given up."""

TRY_COST = 4096
"""What each of them counts at least."""

DEVICES_KEY = re.compile(r'"devices":\s*\[')
MARK = b"\0\x06\0"
"""EOF, the description's type, the first byte of its length: what a description begins with."""

BETWEEN = re.compile(r"[\s,]*")


class Extent(NamedTuple):
    """Where the parts of a stream lie in its file: offsets, and the bytes of its header."""

    start: int
    head: int
    devices: int
    end: int


class Kept(Source):
    """Pieces of a stream, each kept as it came by: what memory the guest has is not among them."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.file = tempfile.SpooledTemporaryFile(HOLD_IN_MEMORY)  # noqa: SIM115
        self.size = 0
        self.lifted = True  # nothing of a pipe lies on a disk
        self.container = ()
        self.starts: list[tuple[int, int]] = []

    def append(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Keep `data`, which lies at `offset` of the stream."""
        if not self.starts or offset - self.starts[-1][1] != self.size - self.starts[-1][0]:
            self.starts.append((self.size, offset))
        self.file.seek(self.size)
        self.file.write(data)
        self.size += len(data)

    def replace(self, offset: int, data: bytes) -> None:
        """Write other bytes at `offset` of what is kept."""
        self.file.seek(offset)
        self.file.write(data)

    @property
    def is_device(self) -> bool:
        """It is none."""
        return False

    @property
    def stamp(self) -> Stamp:
        """What went by can't be looked at again, nor can it change."""
        return 0, 0, self.size, 0

    def place_of(self, offset: int) -> int:
        """Return where what lies at `offset` of the stream, behind memory, is kept."""
        start, place = self.starts[-1]
        return start + offset - place

    def close(self) -> None:
        """Let go of what is kept."""
        self.file.close()

    def _fetch(self, offset: int, length: int) -> bytes:
        self.bytes_read += length
        self.file.seek(offset)
        return self.file.read(length)

    def runs(self, offset: int, length: int) -> list[tuple[int | None, int]]:
        """Return where bytes lie in the stream; see `Source.runs`."""
        self.read(offset, 0)
        found: list[tuple[int | None, int]] = []
        while length:
            index = bisect_right(self.starts, (offset, 1 << 63)) - 1
            start, place = self.starts[index]
            end = self.starts[index + 1][0] if index + 1 < len(self.starts) else self.size
            count = min(length, end - offset)
            found.append((place + offset - start, count))
            offset += count
            length -= count
        return found


class Hold:
    """The devices of a stream as they arrive, and its end as soon as it can be told.

    A description lists the devices in their order, so that it and they prove each other: it is
    the stream's own if each device is where it says, from the first one on to the EOF record.

    Parameters
    ----------
    stream : Source
        What is there so far; it may grow.
    devices : int
        Where in `stream` the first device section begins.
    """

    def __init__(self, stream: Source, devices: int) -> None:
        self.stream = stream
        self.devices = devices
        self.candidates: list[tuple[int, int]] = []
        self.searched = devices
        self.tried = 0

    def _search(self) -> bool:
        """Look at the next piece for what may begin a description; return whether there is one."""
        size = min(CHUNK, self.stream.size - self.searched)
        if size < 8:
            return False
        window = self.stream.read(self.searched, size)
        at = window.find(MARK)
        while at >= 0:
            match = DESCRIPTION.match(window, at)
            if match:
                self.candidates.append((self.searched + at, int.from_bytes(match[1], "big")))
            at = window.find(MARK, at + 1)
        if len(self.candidates) > CHUNK >> 3:
            raise self._too_many()
        self.searched += size - 7
        return True

    def whole(self) -> tuple[int, Sections] | None:
        """Return where the stream ends and its vCPUs, or None while that can't be told.

        Raises
        ------
        FormatError
            If too much looks like a description and is none.
        """
        more = True
        while more:
            more = self._search()
            for eof, length in list(self.candidates):
                end = eof + 6 + length
                if end <= self.stream.size:
                    self.candidates.remove((eof, length))
                    found = self._follow(self._devices(eof, length), eof)
                    if found is not None and found[0] == eof:
                        return end, found[1]
        return None

    def early(self, missing: int) -> tuple[int, Sections, int] | None:
        """Return what `whole` will, as far as it can be told with `missing` bytes still to come.

        The third is where the EOF record lies.

        A description that is whole but for its end lists the devices that come first, the vCPUs
        among them. None while it can't be told that every vCPU is listed.
        """
        while self._search():
            pass
        for eof, length in self.candidates:
            if eof + 6 + length - missing > self.stream.size or eof + 8 > self.stream.size:
                continue
            devices = self._devices(eof, min(length, self.stream.size - eof - 6))
            found = self._follow(devices, eof)
            if found is None or not found[1].cpus:
                continue
            rest = self.stream.read(found[0], eof - found[0])
            if not HEADER.search(rest):
                return eof + 6 + length, found[1], eof
        return None

    def _devices(self, eof: int, length: int) -> list[dict[str, Any]]:
        """Return the devices in what may be a description, up to the first that is not whole."""
        self.tried += max(length, TRY_COST)
        if self.tried > CANDIDATES_LIMIT:
            raise self._too_many()
        text = self.stream.read(eof + 6, length).decode("utf-8", "replace")
        key = DEVICES_KEY.search(text)
        devices: list[dict[str, Any]] = []
        at = key.end() if key else len(text)
        decoder = json.JSONDecoder()
        while True:
            at = BETWEEN.match(text, at).end()  # type: ignore[union-attr]
            try:
                device, at = decoder.raw_decode(text, at)
            except (ValueError, RecursionError):
                return devices
            if not isinstance(device, dict) or not isinstance(device.get("name"), str):
                return devices
            devices.append(device)

    def _too_many(self) -> FormatError:
        offset, _ = self.stream.runs(self.devices, 1)[0]
        return FormatError(
            self.stream.path,
            offset,
            "can't be judged: expected a description that fits the devices before it, "
            f"got over {CANDIDATES_LIMIT} bytes of others",
        )

    def _follow(self, devices: list[dict[str, Any]], eof: int) -> tuple[int, Sections] | None:
        """Go over the devices from the first one on; return where that ends, and the vCPUs.

        None where one is not where its description puts it. Those that are listed first but are
        not there were saved before memory (early_setup).
        """
        at = self.devices
        cpus: list[CpuSection] = []
        kvmclock = False
        for device in devices:
            name = device["name"].encode(errors="replace")
            header = 14 + len(name)
            if at + header > eof:
                return None
            head = self.stream.read(at, header)
            if head[:1] + head[5:-8] != bytes([FULL, len(name) & 0xFF]) + name:
                if at == self.devices:
                    continue
                return None
            try:
                size = measure(self.stream, device, eof + 6)
                offset, at = at + header, at + header + size
                if at > eof:
                    return None
                if name == b"cpu":
                    found = (*struct.unpack(">II", head[-8:]), offset)
                    cpus.append(described_cpu(self.stream, device, eof + 6, found, size))
            except FormatError:
                return None
            kvmclock |= name == b"kvmclock"
            if at + 5 <= eof and self.stream.read(at, 5) == bytes([FOOTER]) + head[1:5]:
                at += 5
        return at, checked(Found(cpus, kvmclock=kvmclock, description="whole"), devices)


def stuck(path: str, walker: Walker) -> FormatError:
    """Return the error for a stream whose walk came to no device."""
    if walker.trouble:
        offset, found, expected = walker.trouble
        return FormatError(path, offset, f"can't be judged: expected {expected}, got {found}")
    return FormatError(
        path,
        walker.position,
        f"expected devices, got the end of the {'stream' if walker.ended else 'file'}",
    )


def walk(source: Source, start: int) -> tuple[int, int]:
    """Return the bytes of a stream's header, and where its first device section begins.

    Raises
    ------
    FormatError
        If the stream has something that is not known here, or is cut off.
    """
    walker = Walker(start)
    while not walker.stopped:
        if walker.skip > CHUNK:
            walker.jump()
        size = min(CHUNK, source.size - walker.position)
        if size <= 0 or not (walker.feed(source.read(walker.position, size)) or walker.stopped):
            missing = max(1, walker.position - source.size)
            raise FormatError(
                source.path, source.size, f"expected at least {missing} bytes more, got the end"
            )
    if walker.devices < 0:
        raise stuck(source.path, walker)
    return walker.head, walker.devices


def extent(source: Source, start: int, *, bare: bool = True) -> Extent:
    """Return where a stream's parts lie in a file in which something else may follow it.

    `bare`: it may lack the description.

    Raises
    ------
    FormatError
        If that can't be told.
    """
    head, devices = walk(source, start)
    limit = min(source.size, devices + HOLD_LIMIT)
    hold = Hold(source.view(0, limit), devices)
    found = hold.whole()
    if not found and not bare:
        raise FormatError(source.path, devices, "expected an end of the devices, got none")
    return Extent(start, head, devices, found[0] if found else bare_end(source, devices))


def bare_end(source: Source, devices: int) -> int:
    """Return where a stream without description ends: behind its EOF record.

    Each section's footer has to lead to the next section, and the last one to the EOF record,
    with nothing but zeros behind it.

    Raises
    ------
    FormatError
        If that can't be told.
    """
    end = min(source.size, data_end(source, devices) + 1)
    window = source.read(devices, min(SEARCH_LIMIT, end - devices))
    at = 0
    for match in SECTION_END.finditer(window):
        if match[1] == window[at + 1 : at + 5]:
            at = match.start() + 5
            if not window[at]:
                return devices + at + 1
    raise FormatError(
        source.path,
        devices + at,
        "can't be judged: expected the description that QEMU writes behind the devices, or "
        "sections with footers up to the end, got a section of unknown length",
    )


def data_end(source: Source, low: int) -> int:
    """Return where the zeros begin that a file ends with, found by bisection.

    In a stream no zeros are as long as a piece that is looked at: pages of zeros are not saved.
    """
    high = source.size
    while high - low > CHUNK:
        middle = (low + high) // 2
        piece = source.read(middle, min(CHUNK, high - middle))
        if piece.count(0) == len(piece):
            high = middle
        else:
            low = middle
    return low + len(source.read(low, high - low).rstrip(b"\0"))


def located(source: Source, start: int) -> tuple[Source, Sections, int]:
    """Find the vCPUs of a stream: from behind where it ends with its file, else from the front.

    Returns
    -------
    tuple of Source, Sections, int
        The stream, without memory if it was walked; the vCPUs in it; where it ends in the file.

    Raises
    ------
    FormatError
        If they are not to be found.
    """
    tail = None
    end = source.read(max(0, source.size - PADDING), min(PADDING, source.size))
    if any(end) and not source.is_device:
        try:
            return source, find_cpus(source), source.size
        except FormatError as problem:
            tail = problem
    try:
        place = extent(source, start, bare=tail is None)
        view = without_memory(source, place)
        return view, find_cpus(view), place.end
    except FormatError as problem:
        raise (tail or problem) from None


def without_memory(source: Source, place: Extent) -> View:
    """Return a stream as a Source without the guest's memory."""
    start, head, devices, end = place
    size = head + end - devices

    def locate(at: int) -> tuple[int | None, int]:
        return (start + at, head - at) if at < head else (devices + at - head, size - at)

    return View(source, size, locate)


class Flow:
    """A stream that comes in pieces and can't be read again: a pipe.

    Attributes
    ----------
    walker : Walker
    kept : Kept
        The header, and all that came behind memory.
    hold : Hold or None
        Where the devices are gathered, once the first of them is there.
    """

    def __init__(self, path: str) -> None:
        self.walker = Walker()
        self.kept = Kept(path)
        self.hold: Hold | None = None
        self._front = bytearray()

    def push(self, data: memoryview) -> int:
        """Take what comes next; return how many bytes of it are memory, and done with.

        What is left has to come again in front of the next piece or, once there is a `hold`, is
        to be kept.

        Raises
        ------
        FormatError
            If it is no stream, or has something that is not known here.
        """
        done = self.walker.feed(data)
        if not self.kept.size:
            self._front += data[:done]
            if self.walker.head:
                self.kept.append(self._front[: self.walker.head], 0)
                self._front.clear()
        if self.walker.devices >= 0:
            self.hold = Hold(self.kept, self.kept.size)
        elif self.walker.stopped:
            raise stuck(self.kept.path, self.walker)
        return done

    def keep(self, data: memoryview) -> None:
        """Take what comes behind memory.

        Raises
        ------
        FormatError
            If it is more than any guest's devices.
        """
        kept = self.kept
        place = self.walker.devices + kept.size - self.walker.head
        if kept.size + len(data) > HOLD_LIMIT:
            raise FormatError(
                kept.path,
                place,
                f"expected the end of the devices within {HOLD_LIMIT} bytes, got more",
            )
        kept.append(data, place)


def from_pipe(path: str, file: BinaryIO, expand_limit: int, watch: Watch | None = None) -> Source:
    """Return what comes through a pipe: of a QEMU stream all but memory, else the whole of it.

    Parameters
    ----------
    path : str
        What to call it.
    file : binary file
        Not buffered; it is read to the stream's end.
    expand_limit : int
        What anything else may take, and expand to (bytes). A stream may be of any size.
    watch : callable, optional
        Called before each read, with the descriptor and the bytes so far; it may wait.

    Raises
    ------
    FormatError
        If it is a stream that is cut off or has something that is not known here.
    """
    view = memoryview(bytearray(CHUNK))
    have = 0
    seen = 0

    def more(into: memoryview) -> int:
        nonlocal seen
        if watch is not None:
            watch(file.fileno(), seen)
        count: int = file.readinto(into)  # type: ignore[attr-defined]
        seen += count
        return count

    while have < len(MAGIC):
        count = more(view[have:])
        if not count:
            break
        have += count
    if view[: len(MAGIC)] != MAGIC:
        again = _Again(bytes(view[:have]), file, watch)
        return Source.of(again, path, expand_limit=expand_limit)
    flow = Flow(path)
    try:
        while True:
            if flow.hold is None:
                done = flow.push(view[:have])
                have -= done
                view[:have] = bytes(view[done : done + have])
            if flow.hold is not None:
                flow.keep(view[:have])
                have = 0
                found = flow.hold.whole()
                if found:
                    flow.kept.size = found[0]
                    return flow.kept
            count = more(view[have:])
            if not count:
                break
            have += count
        if flow.hold is None:
            place = flow.walker.position + have
            raise FormatError(path, place, "expected devices, got the end of the stream")
        return flow.kept
    except BaseException:
        flow.kept.close()
        raise


class _Again:
    """A file whose first bytes were read already."""

    def __init__(self, start: bytes, file: BinaryIO, watch: Watch | None) -> None:
        self.start = start
        self.file = file
        self.watch = watch
        self.seen = len(start)

    def read(self, size: int) -> bytes:
        """Return the next bytes."""
        start, self.start = self.start, b""
        if start:
            return start
        if self.watch is not None:
            self.watch(self.file.fileno(), self.seen)
        data = self.file.read(size)
        self.seen += len(data)
        return data
