"""FXSAVE areas: x87 and SSE in 512 bytes without an XSAVE header, as every x86-64 CPU has them.

An FXSAVE area becomes an XSAVE area of 576 bytes, the header of which says that x87 and SSE are
there: whoever judges or converts it needs no rule of its own.

*Source*: Intel SDM vol. 1 section 10.5 (FXSAVE), section 13.4.1 (legacy region of XSAVE).
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from xfast.errors import PolicyError
from xfast.xsave.features import (
    AVX,
    EXTENDED_OFFSET,
    FCW_INIT,
    MXCSR_INIT,
    MXCSR_MASK_AMD,
    SSE,
    X87,
    XFEATURE_MASK_FPSSE,
    names_of,
)
from xfast.xsave.layout import Layout

SIZE = 512
RESERVED_OFFSET = 416
"""From here on the bytes are reserved or software's own: they are no state."""
XMM_OFFSET, ST_OFFSET, MXCSR_OFFSET = 160, 32, 24
HEADER_OFFSET = 512

LAYOUT = Layout((), "fxsave")
"""x87 and SSE lie where they lie on every machine."""


def plausible(data: bytes) -> bool:
    """Tell whether 512 bytes have FCW, MXCSR and MXCSR_MASK as a CPU can have written them.

    *Source*: Intel SDM vol. 1 section 8.1.5 (FCW bit 6 is always set), section 11.6.6.
    """
    fcw, mxcsr, mask = struct.unpack_from("<H22x2I", data)
    return fcw & 0xE0C0 == 0x40 and not (mxcsr | mask) & ~MXCSR_MASK_AMD


def as_area(data: bytes) -> NDArray[np.uint8]:
    """Return an FXSAVE area as an XSAVE area with x87 and SSE present.

    Parameters
    ----------
    data : bytes
        512 bytes.

    Returns
    -------
    (576,) uint8
    """
    area = np.zeros(EXTENDED_OFFSET, np.uint8)
    area[:RESERVED_OFFSET] = np.frombuffer(data, np.uint8, RESERVED_OFFSET)
    area[HEADER_OFFSET] = XFEATURE_MASK_FPSSE
    return area


def renewed(old: bytes, area: NDArray[np.uint8], where: str) -> bytes:
    """Return the FXSAVE area `old` with the registers of `area`; absent ones get their init value.

    Parameters
    ----------
    old : bytes
        512 bytes, of which the reserved ones stay.
    area : (size,) uint8
        An XSAVE area.
    where : str
        What an error says first.

    Raises
    ------
    PolicyError
        If it holds components that FXSAVE has no place for.
    """
    (present,) = struct.unpack_from("<Q", area.data, HEADER_OFFSET)
    if present & ~XFEATURE_MASK_FPSSE:
        raise PolicyError(
            f"{where}: expected x87 and SSE only, for FXSAVE has no other components; got "
            f"{names_of(present & ~XFEATURE_MASK_FPSSE)}"
        )
    new = bytearray(area[:RESERVED_OFFSET].tobytes())
    if not present & X87:
        new[:MXCSR_OFFSET] = struct.pack("<H", FCW_INIT).ljust(MXCSR_OFFSET, b"\0")
        new[ST_OFFSET:XMM_OFFSET] = bytes(XMM_OFFSET - ST_OFFSET)
    if not present & SSE:
        new[XMM_OFFSET:RESERVED_OFFSET] = bytes(RESERVED_OFFSET - XMM_OFFSET)
    if not present & (SSE | AVX):
        struct.pack_into("<I", new, MXCSR_OFFSET, MXCSR_INIT)
    return bytes(new) + old[RESERVED_OFFSET:]
