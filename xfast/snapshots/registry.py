"""The registry of formats: which one an input is of, told by content.

What a format is, and how to add one: ``contract.py``. A directory is an input like a file: where a
format claims it, it is one snapshot.
"""

from __future__ import annotations

import importlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import IO, TYPE_CHECKING, Any, BinaryIO, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from xfast.engine import files
from xfast.errors import FormatError, UnknownFormatError, XfastError
from xfast.snapshots.bytes.entry import found, opened_folder
from xfast.snapshots.bytes.folder import Folder
from xfast.snapshots.bytes.opening import DirectoryError
from xfast.snapshots.bytes.source import EXPAND_LIMIT, Source, Watch
from xfast.snapshots.contract import Accompanied, Format, Whole
from xfast.snapshots.model import Snapshot, Splice
from xfast.xsave.layout import Layout, layout_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

    Input: TypeAlias = str | os.PathLike[str] | Buffer | NDArray[np.uint8] | IO[bytes] | Source

FORMATS = {
    "elfcore": "xfast.snapshots.elfcore",
    "minidump": "xfast.snapshots.minidump",
    "xen": "xfast.snapshots.xen",
    "qemu": "xfast.snapshots.qemu.reader",
    "criu": "xfast.snapshots.criu.reader",
    "cloud-hypervisor": "xfast.snapshots.cloud_hypervisor",
    "crosvm": "xfast.snapshots.crosvm",
    "raw": "xfast.snapshots.raw",
    "firecracker": "xfast.snapshots.firecracker",
}
"""The formats in the order in which they are tried: what costs most to tell comes last."""


PLUGINS = "XFAST_PLUGINS"
"""The environment's word (1) that formats of other packages may be loaded by root."""


MAGICS = {
    b"\x7fELF": "elfcore",
    b"MDMP": "minidump",
    b"QEVM": "qemu",
    b"\x00\x00\x64\x86\x84\x19\x10\x07": "firecracker",
}
"""The first 4 or 8 bytes of files that are of one format for certain: no other is asked."""

JSON_FIRST = "cloud-hypervisor", "crosvm", *FORMATS
"""The formats in the order in which they are asked of a file that begins with a brace."""

SIGNS = re.compile(
    rb"\x7fELF|MDMP|Xen saved domain|libvirt-xml|LibxlFmt|\xff{8}XENF|QEVM|QFI\xfb|LibvirtQemud|"
    rb"\x19CVT|G8\x05U|.{257}ustar|\s*\{|[\xa5-\xb7\xbf]gvcpu_id",
    re.DOTALL,
)
STREAM = b"QEVM\0\0\0\3\7"
"""What a file of any format but `UNSIGNED` begins with; only QEMU's may also lie further on."""

UNSIGNED = "raw", "firecracker"


@cache
def _others() -> dict[str, Any]:
    """Return the entry points by which other packages offer formats.

    Root loads none unless `PLUGINS` says so: what can be imported may be somebody else's.
    """
    if os.geteuid() == 0 and os.environ.get(PLUGINS) != "1":
        return {}
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
    raise XfastError(f"format: expected one of: {', '.join([*FORMATS, *_others()])}, got {name!r}")


def _names() -> list[str]:
    """Return the names of all formats, in the order in which they are tried."""
    return [*FORMATS, *_others()]


def _possible(source: Source) -> tuple[str, ...]:
    """Return which of `FORMATS` a file may be of, in the order in which they are tried."""
    head = source.head
    if head.startswith(b"{"):
        return JSON_FIRST
    whole = len(head) == source.size and source.outer is None
    if whole and not SIGNS.match(head) and not files.holds(head, STREAM, 0, len(head)):
        return UNSIGNED
    return tuple(FORMATS)


def open_input(
    path: Any, expand_limit: int = EXPAND_LIMIT, watch: Watch | None = None
) -> Source | Folder:
    """Open a file, standard input (``-``), what is a snapshot in a directory, or bytes.

    `watch` is called before each read of standard input.

    Raises
    ------
    FormatError
        If it is a directory without a snapshot.
    XfastError
        If it can't be opened.
    """
    if isinstance(path, Source):
        return path
    if not isinstance(path, (str, os.PathLike)):
        return Source.of(path, expand_limit=expand_limit)
    name = os.fspath(path)
    if name == "-" and not stat.S_ISREG(os.fstat(0).st_mode):
        from xfast.snapshots.qemu.forward import from_pipe

        with open(os.dup(0), "rb", buffering=0) as pipe:
            return from_pipe(name, cast(BinaryIO, pipe), expand_limit, watch)
    try:
        return Source.open(name, expand_limit=expand_limit)
    except DirectoryError:
        folder = Folder.open(name, expand_limit=expand_limit)
    _, file = _claimed(folder)
    return folder.file(file) if file else folder


def recognise(source: Source | Folder, default: str = "") -> str:
    """Return the name of the format that an input is of, else (for a file) `default`.

    Raises
    ------
    FormatError
        If it is of none, and there is no default.
    """
    if isinstance(source, Folder):
        return _claimed(source)[0]
    start = source.read(0, min(8, source.size))
    name = MAGICS.get(start[:4]) or MAGICS.get(start)
    if name:
        return name
    for names in (_possible(source), _others()):
        for name in names:
            if format_named(name).sniff(source):
                return name
    if default:
        return default
    from xfast.snapshots import signatures

    raise UnknownFormatError(source.path, None, signatures.found_in(source))


def _claimed(folder: Folder) -> tuple[str, str]:
    """Return the format that claims a directory, and which file in it ("": the whole of it).

    Raises
    ------
    FormatError
        If none does.
    """
    for name in _names():
        form = format_named(name)
        file = form.claims(folder.names) if isinstance(form, Whole) else None
        if file is not None:
            return name, file
    raise FormatError(
        folder.path,
        None,
        "expected a snapshot (core-*.img, state.json, vcpu0) in it, got a directory",
    )


def read(
    path: Input,
    *,
    format: str | None = None,
    layout: Layout | str | None = None,
    size: int | None = None,
    expand_limit: int | None = None,
    watch: Watch | None = None,
) -> list[Snapshot]:
    """Read the extended state in one file, or in one CRIU or Cloud Hypervisor directory.

    Parameters
    ----------
    path : str, path, bytes, buffer, ndarray, binary file or Source
        A file or directory, ``-`` for standard input, or the bytes themselves. Compressed files
        are read through. A Source is closed.
    format : str, optional
        A name of `FORMATS`; default: recognised by content.
    layout : Layout, optional
        The layout of the areas, where the format itself does not fix it.
    size : int, optional
        Bytes of an area in a raw file; default 4096. Who gives it, or `layout`, says that a file
        of no other format is raw.
    expand_limit : int, optional
        What compressed data may expand to (bytes); default 4 GiB.
    watch : callable, optional
        Called before each read of standard input where that is a pipe, with its descriptor and
        the bytes so far.

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
    source: Any = open_input(path, expand_limit or EXPAND_LIMIT, watch)
    try:
        reader = format_named(format or recognise(source, "raw" if layout or size else ""))
        known = layout_of(layout) if layout is not None else None
        found = reader.read(source, layout=known, size=size)
        for snapshot in found:
            snapshot.stamp = snapshot.stamp or source.stamp
    finally:
        source.close()
    return found


def splices(
    source: Source | Folder, snapshot: Snapshot, areas: Mapping[int, NDArray[np.uint8]]
) -> list[Splice]:
    """Return the edits that put new areas into the input that a snapshot was read from.

    Parameters
    ----------
    source : Source or Folder
        That input, open.
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
    return format_named(snapshot.format).splices(cast(Source, source), snapshot, areas)


def walk(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    links: list[str] | None = None,
) -> Iterator[str]:
    """Yield the paths to read: files as they are, directories expanded recursively.

    A directory of CRIU's images is one snapshot and yielded itself. In others what only goes
    with a snapshot is passed over (`Accompanied`); every other file is yielded, so that one
    which is no snapshot gets its error.

    Parameters
    ----------
    paths : str, path, or iterable of them
        What is named here is followed if it is a symbolic link.
    links : list of str, optional
        Gets the symbolic links found in directories: they are passed over. What is yielded of a
        directory is an `Entry`, which is opened through no link, should it become one.
    """
    named = [paths] if isinstance(paths, str | os.PathLike) else paths
    for path in (os.fspath(path) for path in named):
        if not os.path.isdir(path):
            yield path
            continue
        unreadable: list[str] = []
        for place, subfolders, names in _folders(path, unreadable, [] if links is None else links):
            folder = Folder(place, tuple(names))
            if _is_whole(folder):
                yield place
                subfolders.clear()
                continue
            for name in folder.names:
                if not _is_companion(folder, name):
                    yield found(place, name)
        yield from unreadable


def _folders(
    top: str, unreadable: list[str], links: list[str]
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield a directory and all below it, as os.walk does, however deep they lie.

    Before Python 3.12 that one calls itself for every level.
    """
    waiting = [top]
    while waiting:
        place = waiting.pop()
        subfolders: list[str] = []
        names: list[str] = []
        try:
            with opened_folder(place) as fd, os.scandir(fd) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        links.append(os.path.join(place, entry.name))
                    else:
                        (subfolders if entry.is_dir() else names).append(entry.name)
        except OSError:
            unreadable.append(place)
            continue
        subfolders.sort()
        yield place, subfolders, sorted(names)
        waiting += [found(place, name) for name in reversed(subfolders)]


def _is_whole(folder: Folder) -> bool:
    """Tell whether a directory is one snapshot itself."""
    try:
        return not _claimed(folder)[1]
    except FormatError:
        return False


def _is_companion(folder: Folder, name: str) -> bool:
    """Tell whether a file only goes with a snapshot."""
    return any(form.companion(folder, name) for form in _accompanied())


@cache
def _accompanied() -> tuple[Accompanied, ...]:
    """Return the formats with files that only go with a snapshot."""
    forms = [format_named(name) for name in _names()]
    return tuple([form for form in forms if isinstance(form, Accompanied)])
