"""struct kvm_fpu: a second copy of x87 and SSE, which a restore applies after the XSAVE area.

*Source*: Linux arch/x86/include/uapi/asm/kvm.h struct kvm_fpu; arch/x86/kvm/x86.c
kvm_arch_vcpu_ioctl_set_fpu().
"""

from __future__ import annotations

import struct
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from xfast.engine import keys
from xfast.snapshots import infer
from xfast.xsave.features import AVX, FCW_INIT, MXCSR_INIT, SSE, X87, XFEATURE_MASK_FPSSE

FPU = {
    "fcw": (X87, 0, "<u2", 1, FCW_INIT),
    "fsw": (X87, 2, "<u2", 1, 0),
    "ftwx": (X87, 4, "u1", 1, 0),
    "last_opcode": (X87, 6, "<u2", 1, 0),
    "last_ip": (X87, 8, "<u8", 1, 0),
    "last_dp": (X87, 16, "<u8", 1, 0),
    "mxcsr": (SSE | AVX, 24, "<u4", 1, MXCSR_INIT),
    "fpr": (X87, 32, "u1", 128, 0),
    "xmm": (SSE, 160, "u1", 256, 0),
}
"""The fields of struct kvm_fpu: components (any of them), offset in the area, type, how many
numbers, and the value where none of the components is there."""

MIRRORED = (
    (0, 5, X87), (5, 6, 0), (6, 24, X87), (24, 28, SSE | AVX), (28, 32, 0), (32, 160, X87),
    (160, 416, SSE),
)  # fmt: skip
"""The same as stretches of the area: start, end, and components; what no field has is zeros."""
RUNS = b"".join(struct.pack("<2i", start, end) for start, end, some in MIRRORED if some)
"""Where an area with both components and an image of all fields have the same, if none differs."""
IMAGE = 416
"""Bytes of an image: fields where an area has them."""
INIT_IMAGE = struct.pack("<H22xI388x", FCW_INIT, MXCSR_INIT)


def value_of(area: NDArray[np.uint8], name: str) -> list[int]:
    """Return what a field must be for an XSAVE area."""
    components, offset, dtype, count, init = FPU[name]
    if not infer.header(area)[0] & components:
        return [init] * count
    values: list[int] = np.frombuffer(area.tobytes(), dtype, count, offset).tolist()
    return values


def span_of(name: str) -> tuple[int, int]:
    """Return where a field begins in an area, and how many bytes each of its numbers has."""
    return FPU[name][1], np.dtype(FPU[name][2]).itemsize


def differing(
    data: bytes, area: int, image_at: int, xstate_bv: int, names: Collection[str]
) -> tuple[str, ...]:
    """Return which fields of an image are not as an area has them.

    Parameters
    ----------
    data : bytes
    area, image_at : int
        Where in `data` they begin: the area with the components `xstate_bv`, and the image, which
        is zeros where it has no field.
    names : collection of str
        The fields that it has.
    """
    if not names:
        return ()
    both = xstate_bv & XFEATURE_MASK_FPSSE == XFEATURE_MASK_FPSSE and len(names) == len(FPU)
    if both and keys.alike(data, area, image_at, RUNS):
        return ()
    legacy, image = (data[at : at + IMAGE] for at in (area, image_at))
    parts = [
        legacy[start:end] if xstate_bv & components else INIT_IMAGE[start:end]
        for start, end, components in MIRRORED
    ]
    mirrored = b"".join(parts)
    found = []
    for name in names:
        start, width = span_of(name)
        end = start + width * FPU[name][3]
        if image[start:end] != mirrored[start:end]:
            found.append(name)
    return tuple(sorted(found))
