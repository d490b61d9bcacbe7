"""What each reader costs at most: one table, which the tests walk with hostile files.

Work and memory are bounded by what a file truly holds: each reader is linear in the bytes that it
looks at, and looks at no more of them, and no more entries, than stands here. That is to make at
most 1 s and 256 MB for a file of up to 1 MiB, and at most 1 s a MiB beyond.
"""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple


class Bound(NamedTuple):
    """Where the limits of one format stand: names of constants, as ``module:NAME``.

    `size` bounds the bytes that are looked at, `entries` what is counted in them (sections, notes,
    fields, tokens), `depth` how deep they nest; empty where the format does not nest, or where the
    file's own size is the bound.
    """

    size: str
    entries: str
    depth: str = ""


BOUNDS = {
    "qemu": Bound(
        "qemu.search:SEARCH_LIMIT", "qemu.search:HEADER_LIMIT", "qemu.stream:DEPTH_LIMIT"
    ),
    "elfcore": Bound("elfcore:AREAS_LEAST", "elfcore:NOTE_LIMIT"),
    "minidump": Bound("minidump:AREA_LIMIT", "minidump:THREAD_LIMIT"),
    "criu": Bound("criu.reader:IMAGES_LEAST", "criu.wire:FIELD_LIMIT"),
    "cloud-hypervisor": Bound("cloud_hypervisor:SIZE_LIMIT", "bytes.json_text:TOKEN_LIMIT"),
    "raw": Bound("raw:AREA_LIMIT", "raw:CPUID_LIMIT"),
    "firecracker": Bound("firecracker:SIZE_LIMIT", "firecracker:SNIFF_LIMIT"),
    "crosvm": Bound("crosvm:SIZE_LIMIT", "crosvm:ITEM_LIMIT", "crosvm:DEPTH_LIMIT"),
    "xen": Bound("xen:BODY_LIMIT", "xen:RECORD_LIMIT"),
}


def value_of(name: str) -> int:
    """Return the limit that a name of the table stands for."""
    module, _, constant = name.partition(":")
    value: int = getattr(import_module(f"xfast.snapshots.{module}"), constant)
    return value
