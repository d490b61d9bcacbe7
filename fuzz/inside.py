"""Mutations inside of what has lengths and trees of its own: JSON, CBOR, protobuf, tar, folders.

Each function takes bytes and a source of chance, and returns bytes that are still of the kind, or
None where they are of another. An input that begins with `MARK` is a folder of several files.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import snapshot_files as files

from xfast.snapshots.criu import wire

BOUNDS = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 512, 576, 832, 4096, 0x7FF0, 0xFFFF, 1 << 20)
FAR = (*BOUNDS, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
LONG = 8
"""Of a longer list, three places are as good as all of them: they are numbers of one kind."""

Change = Callable[[bytearray], bytearray]
"""Changes what lies within, whatever it is."""


def _nodes(value: Any, rng: random.Random) -> Iterator[tuple[Any, Any]]:
    """Yield places in a tree: a parent and the key there."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    if isinstance(value, list) and len(keys) > LONG:
        keys = [0, rng.randrange(len(keys)), len(keys) - 1]
    for key in keys:
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _nodes(value[key], rng)


def _text(value: Any) -> bytes:
    """Return the text in a string, or in an array of bytes; nothing for anything else."""
    if isinstance(value, str):
        return value.encode()
    try:
        return bytes(value) if isinstance(value, list) else b""
    except (ValueError, TypeError):  # numbers beyond a byte, or none
        return b""


def _change_place(value: Any, rng: random.Random, depth: int = 0) -> None:
    """Change a place in a tree, or in the JSON inside a string or array of bytes of it."""
    places = list(_nodes(value, rng))
    parent, key = rng.choice(places)
    texts = [(parent, key) for parent, key in places if _text(parent[key])[:1] == b"{"]
    if texts and rng.random() < 0.8:
        parent, key = rng.choice(texts)
    old = parent[key]
    inner = tree(_text(old), rng, depth + 1) if depth < 3 else None
    if inner is not None and rng.random() < 0.9:
        parent[key] = inner.decode() if isinstance(old, str) else list(inner)
    elif rng.random() < 0.3:
        del parent[key]
    elif isinstance(parent, dict) and rng.random() < 0.2:
        parent[rng.choice(("Kvm", "Mshv", "state", "snapshot", "extra", "fpu", "7"))] = old
    elif isinstance(old, list) and old and rng.random() < 0.5:
        parent[key] = rng.choice((old[:-1], old + old[-1:], old * 2, [old[:1], old], old[::-1]))
    else:
        more = (-1, 1 << 64, 1.5, None, True, "x", [], {}, [old], [old] * 9, {"a": old})
        parent[key] = rng.choice((*FAR, *more))


def tree(data: bytes, rng: random.Random, depth: int = 0) -> bytes | None:
    """Change a place in JSON text; an array of bytes may be JSON text too, and is kept one."""
    if data[:1] not in (b"{", b"["):
        return None
    try:
        value = json.loads(data)
        _change_place(value, rng, depth)
        return json.dumps(value, separators=rng.choice(((",", ":"), (", ", ": ")))).encode()
    except (ValueError, RecursionError, IndexError):  # damaged, too deep, empty
        return None


def _decoded(data: bytes, at: int) -> tuple[Any, int]:
    """Return the CBOR value at a place, and its end; what serde writes of numbers, maps, texts."""
    major, number = data[at] >> 5, data[at] & 31
    at += 1
    if major == 7:
        return {20: False, 21: True, 22: None}[number], at
    if number >= 24:
        size = 1 << number - 24
        number, at = int.from_bytes(data[at : at + size], "big"), at + size
    if major == 0:
        return number, at
    if major == 3:
        return data[at : at + number].decode(), at + number
    if major not in (4, 5) or number > len(data):
        raise ValueError(major)
    items = []
    for _ in range(number * (major - 3)):
        item, at = _decoded(data, at)
        items.append(item)
    return (items if major == 4 else dict(zip(items[::2], items[1::2], strict=True))), at


def cbor(data: bytes, rng: random.Random) -> bytes | None:
    """Change a place in a CBOR map."""
    if data[:1] < b"\xa0" or data[:1] > b"\xbb":
        return None
    try:
        value, _ = _decoded(data, 0)
        _change_place(value, rng)
        return files.cbor(value)
    except Exception:  # damaged, or changed to what has no place in it
        return None


def message(data: bytes, rng: random.Random, depth: int = 0) -> bytes:
    """Change a field of a protobuf message, or of one inside it; lengths around it fit."""
    fields = [(field.number, field.value) for field in wire.fields(data)]
    found = [(number, 2 if isinstance(value, bytes) else 0, value) for number, value in fields]
    nested = [i for i, (_, kind, _) in enumerate(found) if kind]
    at = rng.choice(nested) if nested and rng.random() < 0.7 else rng.randrange(len(found))
    number, kind, value = found[at]
    if kind and value and depth < 6 and rng.random() < 0.85:
        try:
            found[at] = (number, kind, message(value, rng, depth + 1))
            return files.proto(*((number, value) for number, _, value in found))
        except ValueError:
            pass
    how = rng.randrange(6)
    if how == 0:
        del found[at]
    elif how == 1:
        found[at:at] = [found[at]] * rng.choice((1, 1, 9, 200))
    elif how == 2:
        found[at] = (rng.choice((1, 2, 3, 9, 13, 1 << 28)), kind, value)
    elif how == 3:
        found[at] = (number, 2, rng.choice((b"", b"\0", b"\x08\1", bytes(200))))
    elif how == 4:
        found.append(found.pop(at))
    else:
        found[at] = (number, 0, rng.choice(FAR))
    return files.proto(*((number, value) for number, _, value in found))


def image(data: bytes, rng: random.Random) -> bytes | None:
    """Change an entry of a CRIU image."""
    if len(data) < 8 or data[:4] != files.criu_image(0)[:4]:
        return None
    entries, at = [], 8
    while at + 4 <= len(data):
        (size,) = struct.unpack_from("<I", data, at)
        entries.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    try:
        at = rng.randrange(len(entries))
        if rng.random() < 0.1:
            entries[at:at] = entries[at : at + 1] * rng.choice((1, 9))
        else:
            entries[at] = message(entries[at], rng)
    except ValueError:  # no entry, or none of fields
        return None
    return files.criu_image(struct.unpack_from("<I", data, 4)[0], *entries)


def archive(data: bytes, rng: random.Random, change: Change) -> bytes | None:
    """Change a member of a tar archive, or its header, whose checksum is made to fit."""
    if data[257:262] != b"ustar":
        return None
    found, at = [], 0
    while at + 512 <= len(data) and any(data[at : at + 512]):
        size = int(data[at + 124 : at + 135].strip(b" \0") or b"0", 8)
        found.append((bytearray(data[at : at + 512]), data[at + 512 : at + 512 + size]))
        at += 512 + -(-size // 512) * 512
    at = rng.randrange(len(found))
    how = rng.randrange(8)
    if how == 0:
        del found[at]
    elif how == 1:
        found.append(found[at])
    elif how == 2:
        kinds = b"05xLg\0"
        found[at][0][156] = rng.choice(kinds)
    elif how == 3:
        found[at][0][rng.randrange(512)] ^= 1 << rng.randrange(8)
    else:
        new = bytes(change(bytearray(found[at][1])))
        found[at][0][124:136] = b"%011o\0" % len(new)
        found[at] = found[at][0], new
    out = bytearray()
    for header, body in found:
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        out += header + body + bytes(-len(body) % 512)
    return bytes(out) + bytes(1024)


MARK = b"\0FILE"
NAMES = (
    *("vm", "state.json", "config.json", "memory-ranges", "core-1.img", "core-2.img", "pstree.img"),
    *("cpuinfo.img", "vcpu0", "vcpu1", "vm.xsave", "vm.xcrs", "vm.cpuid2", "core-x.img", "notes"),
)
"""What the files of a folder are called: the byte behind their mark tells."""


def folder(found: Mapping[str, bytes]) -> bytes:
    """Return the input that stands for a folder of these files."""
    return b"".join(MARK + bytes([NAMES.index(name)]) + data for name, data in found.items())


def several(data: bytes, rng: random.Random, change: Change) -> bytes | None:
    """Change a file of a folder, or which files there are."""
    if not data.startswith(MARK):
        return None
    pieces = data.split(MARK)[1:]
    at = rng.randrange(len(pieces))
    how = rng.randrange(8)
    if how == 0 and len(pieces) > 1:
        del pieces[at]
    elif how == 1:
        pieces.append(bytes([rng.randrange(len(NAMES))]) + pieces[at][1:])
    elif how == 2:
        pieces[at] = bytes([rng.randrange(len(NAMES))]) + pieces[at][1:]
    else:
        pieces[at] = pieces[at][:1] + bytes(change(bytearray(pieces[at][1:])))
    return b"".join(MARK + piece for piece in pieces)


def written(data: bytes, path: Path) -> None:
    """Write an input as the file that it is, or as the folder that it stands for."""
    if not data.startswith(MARK):
        path.write_bytes(data)
        return
    path.mkdir()
    for piece in data.split(MARK)[1:]:
        if piece:
            (path / NAMES[piece[0] % len(NAMES)]).write_bytes(piece[1:])


REAL = {"core-1.img": "core-23809.img", "cpuinfo.img": "cpuinfo.img"}
"""Images of a real checkpoint, and what they are called there."""


def folders() -> Iterable[bytes]:
    """Yield folders of the formats that are several files."""
    cores = files.criu_files(1, 2)
    yield folder(cores)
    real = Path(__file__).parents[1] / "tests/data/criu/criu42-regs64s-3thr"
    yield folder({name: (real / file).read_bytes() for name, file in REAL.items()})
    yield folder(files.BUILDERS["crosvm"]())
    config = json.dumps({"cpus": {"boot_vcpus": 2, "max_vcpus": 4}}).encode()
    yield folder(
        {
            "state.json": files.cloud_hypervisor_state(),
            "config.json": config,
            "memory-ranges": bytes(64),
        }
    )
    entry = struct.pack("<10I", 13, 0, 1, 0x207, 2696, 2696, 0, 0, 0, 0)
    area = files.area(1, 4096, 0x207)
    cpuid = struct.pack("<2I", 1, 0) + entry
    yield folder({"vm.xsave": area, "vm.xcrs": files.xcrs(), "vm.cpuid2": cpuid})
