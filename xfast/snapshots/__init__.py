"""Readers of every snapshot format, and the registry that finds the right one by content.

A format is a module (or any object) with three functions:

- ``sniff(source)``: tell cheaply whether the bytes are of this format;
- ``read(source, *, layout=None, size=None)``: return the Snapshots that they hold;
- ``splices(source, snapshot, areas)``: return the edits that put new areas into them.

A package adds a format of its own through the entry point group ``xfast.formats``.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from xfast.errors import FormatError, XfastError
from xfast.snapshots.bytes.source import EXPAND_LIMIT, Source
from xfast.snapshots.model import Snapshot, Splice, Vcpu
from xfast.xsave.layout import Layout

FORMATS = {
    "elfcore": "xfast.snapshots.elfcore",
    "minidump": "xfast.snapshots.minidump",
    "xen": "xfast.snapshots.xen",
    "qemu": "xfast.snapshots.qemu.reader",
    "criu": "xfast.snapshots.criu",
    "cloud-hypervisor": "xfast.snapshots.cloud_hypervisor",
    "raw": "xfast.snapshots.raw",
    "firecracker": "xfast.snapshots.firecracker",
}
"""The formats in the order in which they are tried: what costs most to tell comes last."""

COMPANIONS = (".xcrs", ".cpuid2")
"""Files beside raw areas, which a walk through a directory passes over."""

CH_STATE = "state.json"
CH_MEMORY = "memory-ranges"


class Format(Protocol):
    """What a module has to offer to be a format."""

    def sniff(self, source: Source) -> bool:
        """Tell whether the source is of this format."""

    def read(
        self, source: Source, *, layout: Layout | None = None, size: int | None = None
    ) -> list[Snapshot]:
        """Return what the source holds."""

    def splices(
        self, source: Source, snapshot: Snapshot, areas: Mapping[int, NDArray[np.uint8]]
    ) -> list[Splice]:
        """Return the edits that put areas into it."""


@cache
def _others() -> dict[str, Any]:
    """Return the entry points by which other packages offer formats."""
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group="xfast.formats")}


@cache
def format_named(name: str) -> Format:
    """Return the format called `name`.

    Raises
    ------
    XfastError
        If there is none.
    """
    if name in FORMATS:
        return cast(Format, importlib.import_module(FORMATS[name]))
    if name in _others():
        return cast(Format, _others()[name].load())
    raise XfastError(f"format: got {name!r}, needed one of: {', '.join([*FORMATS, *_others()])}")


def recognise(source: Source, default: str = "") -> str:
    """Return the name of the format that the bytes are of, else `default`.

    Raises
    ------
    FormatError
        If they are of none, and there is no default.
    """
    for name in FORMATS:
        if format_named(name).sniff(source):
            return name
    for name in _others():
        if format_named(name).sniff(source):
            return name
    if default:
        return default
    from xfast.snapshots import signatures

    raise FormatError(source.path, None, signatures.found_in(source))


def read(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    layout: Layout | None = None,
    size: int | None = None,
    expand_limit: int | None = None,
) -> list[Snapshot]:
    """Read the extended state in one file, or in one CRIU or Cloud Hypervisor directory.

    Parameters
    ----------
    path : str or path
        ``-`` is standard input. Compressed files are read through.
    format : str, optional
        A name of `FORMATS`; default: recognised by content.
    layout : Layout, optional
        The layout of the areas, where the format itself does not fix it.
    size : int, optional
        Bytes of an area in a raw file; default 4096. Who gives it, or `layout`, says that a file
        of no other format is raw.
    expand_limit : int, optional
        What compressed data may expand to (bytes); default 4 GiB.

    Returns
    -------
    list of Snapshot
        One, but for a disk image with several internal snapshots.

    Raises
    ------
    FormatError
        If it is no snapshot, or damaged.
    XfastError
        If it can't be opened.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        if _is_criu(name):
            from xfast.snapshots import criu

            return criu.read_folder(name)
        if not os.path.exists(os.path.join(name, CH_STATE)):
            raise FormatError(
                name, None, "found a directory, needed a snapshot (core-*.img, state.json) in it"
            )
        name = os.path.join(name, CH_STATE)
    with Source.open(name, expand_limit=expand_limit or EXPAND_LIMIT) as source:
        status = os.fstat(source.base.fd)
        stamp = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
        reader = format_named(format or recognise(source, "raw" if layout or size else ""))
        found = reader.read(source, layout=layout, size=size)
    for snapshot in found:
        snapshot.stamp = stamp
    return found


def splices(
    source: Source, snapshot: Snapshot, areas: Mapping[int, NDArray[np.uint8]]
) -> list[Splice]:
    """Return the edits that put new areas into the file that a snapshot was read from.

    Parameters
    ----------
    source : Source
        That file, open.
    areas : mapping of int to (size,) uint8
        New areas by position in ``snapshot.vcpus``. What is unchanged yields no edit.

    Returns
    -------
    list of Splice
        In the file's bytes after decompression.

    Raises
    ------
    PolicyError
        If an area does not fit into the format.
    """
    return format_named(snapshot.format).splices(source, snapshot, areas)


def _is_criu(folder: str) -> bool:
    """Tell whether a directory holds CRIU's images; they are one snapshot together."""
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    return any(name.startswith("core-") and name.endswith(".img") for name in names)


def walk(paths: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    """Yield the paths to read: files as they are, directories expanded recursively.

    A directory of CRIU's images is one snapshot and yielded itself. In others `COMPANIONS` are
    passed over, and so are .json files that hold no vCPUs, and guest memory beside a
    state.json; every other file is yielded, so that one which is no snapshot gets its error.
    Symbolic links to directories are not followed.
    """
    for path in (os.fspath(path) for path in paths):
        if not os.path.isdir(path):
            yield path
            continue
        unreadable: list[OSError] = []
        for folder, subfolders, names in os.walk(path, onerror=unreadable.append):
            subfolders.sort()
            if _is_criu(folder):
                yield folder
                subfolders.clear()
                continue
            for name in sorted(names):
                if not _is_companion(folder, name, names):
                    yield os.path.join(folder, name)
        yield from (str(problem.filename) for problem in unreadable)


def _is_companion(folder: str, name: str, names: list[str]) -> bool:
    """Tell whether a file only goes with a snapshot."""
    if name.endswith(".json"):
        try:
            with Source.open(os.path.join(folder, name)) as source:
                return not format_named("cloud-hypervisor").sniff(source)
        except XfastError:
            return False
    return name.endswith(COMPANIONS) or (name == CH_MEMORY and CH_STATE in names)


__all__ = [
    "FORMATS",
    "Format",
    "Snapshot",
    "Splice",
    "Vcpu",
    "format_named",
    "read",
    "recognise",
    "splices",
    "walk",
]
