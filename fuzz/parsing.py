"""The target of the engine's parsers: JSON, streams, vmstate files, texts that are followed.

What a parser takes, json takes too, and says the same; no place that it tells lies outside. Under
``make fuzz-engine`` the C itself is covered, and watched by the address sanitizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import snapshot_files as files

from xfast.engine import files as texts
from xfast.engine.template import Template
from xfast.engine.vmstate import crc64, walk
from xfast.engine.walk import NEEDED, Walker
from xfast.kernels.uapi import SREGS_CR4
from xfast.snapshots.firecracker import TOLD_MSRS, XCRS

LOOKED_AT = 8
"""Lists, objects and strings of an input that are looked at: the rest would only repeat them."""


def parsers(data: bytes) -> None:
    """Give bytes to every parser of the engine."""
    for parse in (json_text, followed, stream, vmstate):
        parse(data)


def _said(text: str) -> Any:
    """Return what json says of a text; NotImplemented where it refuses."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return NotImplemented


def json_text(data: bytes) -> None:
    """Parse whatever looks like lists, objects and strings in bytes."""
    text = data.decode("latin-1")
    assert 0 <= texts.tokens(text) <= len(text)
    for place in islice(re.finditer(r"[\[{]", text), LOOKED_AT):
        start = place.start()
        closed = texts.closed(text, start)
        end = closed if closed > 0 else len(text)
        assert start < end <= len(text)
        said = _said(text[start:end])
        listed = texts.byte_list(text, start, end)
        assert listed is None or list(listed) == said, said
        rows = texts.records(text, start, end, ("index", "data"))
        assert rows is None or rows == [(row["index"], row["data"]) for row in said], said
        room = np.zeros(LOOKED_AT, np.uint64)
        assert texts.numbers(text, start, end, 1 << 32, room) <= LOOKED_AT
        members = texts.members(text, start)
        for key, (first, last) in (members or {}).items():
            assert start < first < last <= len(text), key
        if members is not None and said is not NotImplemented:
            assert members.keys() == said.keys()
    for found in islice(re.finditer(r'"(?:[^"\\]|\\.)*"', text, re.DOTALL), LOOKED_AT):
        plain = texts.unescaped(text, *found.span())
        assert plain is None or plain == _said(found[0]), found[0]


def followed(data: bytes) -> None:
    """Follow the second half of bytes by the first one, whose numbers may be others."""
    text, other = data[: len(data) // 2], data[len(data) // 2 :]
    places = [match.span() for match in re.finditer(rb"(?<!\d)(?:0|[1-9]\d{0,18})(?!\d)", text)]
    rows = [(*place, 8, 8 * i) for i, place in enumerate(places) if place[1] < len(text)]
    slots = np.array(rows, np.int32).reshape(-1, 4)
    template = Template(text, slots, 8 * len(places))
    assert template.follow(text) == template.values
    values = template.follow(other)
    assert values is None or len(values) == len(template.values)


def stream(data: bytes) -> None:
    """Walk a stream at once and in pieces: both end at the same place."""
    ends = []
    for size in (len(data), NEEDED + data[-1] if data else NEEDED):
        walker = Walker()
        position, given = 0, 0
        while given < len(data) and not walker.stopped:
            given = min(len(data), given + max(size, 1))
            position += walker.feed(data[position:given])
        ends.append((walker.position, walker.devices, walker.ended, walker.trouble))
    assert ends[0] == ends[1], ends


def vmstate(data: bytes) -> None:
    """Walk a vmstate file: its vCPUs lie one behind the other, within it."""
    assert crc64(data) == crc64(data, True)
    end = 0
    for row in walk(data, XCRS, SREGS_CR4, TOLD_MSRS):
        start, xcrs, area, extra, size, last = row[:6]
        assert end <= start <= xcrs < area < extra <= extra + size == last < len(data)
        end = last


def texts_and_files() -> Iterator[bytes]:
    """Yield what each parser starts from."""
    builders: tuple[Callable[..., Any], ...] = (files.qemu_stream, files.cloud_hypervisor_state)
    yield from (build() for build in builders)
    yield files.firecracker_state()
    yield b'[{"index": 1, "data": 2, "pad": 0}, {"data": 4, "index": 3}]'
    yield b'[1, 2, 255] {"a": "b\\"c", "d": [{"e": []}]}'
    yield b'{"a": 12, "b": [0, 7]} {"a": 13, "b": [4, 7]} '
