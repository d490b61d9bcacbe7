"""What one would write without xfast: vectorised numpy, numpy area by area, struct and slices.

Standard-format areas of one layout, XSTATE_BV within `mask`; each gives the engine's answer.
"""

from struct import Struct

import numpy as np

from xfast.xsave.features import bits

MASK = 0x2E7
MXCSR_MASK = 0xFFFF
HOST = 0x2E7

HEADER = Struct("<QQ")
MXCSR = Struct("<I")


def spans_of(layout, nr):
    """The bytes of a component, without MXCSR."""
    if nr < 2:
        return ((160, 416),) if nr else ((0, 24), (32, 160))
    slot = layout.by_nr[nr]
    return ((slot.offset, slot.offset + slot.size),)


def init_row(size, mxcsr_mask, software):
    row = np.zeros(size, np.uint8)
    row[:2] = (0x7F, 0x03)
    row[24:32] = np.array([0x1F80, mxcsr_mask], "<u4").view(np.uint8)
    row[464:472] = np.array([software], "<u8").view(np.uint8)
    return row


def headers_of(areas):
    return areas[:, 512:520].copy().view("<u8")[:, 0]


def copy_vectorised(areas, out, layout, have, with_mxcsr):
    """Copy the components that each area has, and MXCSR where it has one of `with_mxcsr`."""
    for nr in bits(int(np.bitwise_or.reduce(have))):
        rows = np.flatnonzero(have >> np.uint64(nr) & np.uint64(1))
        for start, end in spans_of(layout, nr):
            out[rows, start:end] = areas[rows, start:end]
    rows = np.flatnonzero(have & np.uint64(with_mxcsr))
    out[rows, 24:32] = areas[rows, 24:32]


def copy_one(area, to, layout, have, with_mxcsr):
    """The same for one area."""
    for nr in bits(have):
        for start, end in spans_of(layout, nr):
            to[start:end] = area[start:end]
    if have & with_mxcsr:
        to[24:32] = area[24:32]


def get_uabi_vectorised(areas, out, layout, mask, mxcsr_mask, software):
    have = headers_of(areas) & np.uint64(mask)
    out[:] = init_row(out.shape[1], mxcsr_mask, software)
    copy_vectorised(areas, out, layout, have, 6)
    out[:, 512:520] = have[:, None].view(np.uint8)


def get_uabi_by_area(areas, out, layout, mask, mxcsr_mask, software):
    init = init_row(out.shape[1], mxcsr_mask, software)
    for area, to in zip(areas, out, strict=True):
        have = int(area[512:520].view("<u8")[0]) & mask
        to[:] = init
        copy_one(area, to, layout, have, 6)
        to[512:520] = np.array([have], "<u8").view(np.uint8)


def get_uabi_struct(areas, out, layout, mask, mxcsr_mask, software):
    init = init_row(out.shape[1], mxcsr_mask, software).tobytes()
    for i in range(len(areas)):
        area, to = memoryview(areas[i]), memoryview(out[i])
        have = HEADER.unpack_from(area, 512)[0] & mask
        to[:] = init
        for nr in bits(have):
            for start, end in spans_of(layout, nr):
                to[start:end] = area[start:end]
        if have & 6:
            to[24:32] = area[24:32]
        HEADER.pack_into(to, 512, have, 0)


def audit_vectorised(areas, mask, mxcsr_mask):
    words = areas[:, 512:576].copy().view("<u8")
    mxcsr = areas[:, 24:28].copy().view("<u4")[:, 0]
    bad_mxcsr = (words[:, 0] & np.uint64(7) != 0) & (mxcsr & ~np.uint32(mxcsr_mask) != 0)
    return (
        (words[:, 0] & ~np.uint64(mask) != 0).astype(np.uint8)
        | (words[:, 1] != 0).astype(np.uint8) << 1
        | words[:, 2:].any(axis=1).astype(np.uint8) << 2
        | bad_mxcsr.astype(np.uint8) << 3
    )


def audit_struct(areas, mask, mxcsr_mask):
    status = np.empty(len(areas), np.uint8)
    for i in range(len(areas)):
        area = memoryview(areas[i])
        bv, xcomp = HEADER.unpack_from(area, 512)
        bad_mxcsr = bv & 7 and MXCSR.unpack_from(area, 24)[0] & ~mxcsr_mask
        status[i] = (
            (bv & ~mask != 0) | (xcomp != 0) << 1 | any(area[528:576]) << 2 | bool(bad_mxcsr) << 3
        )
    return status


def xinuse_vectorised(areas, layout, mask):
    have = headers_of(areas) & np.uint64(mask)
    used = np.zeros(len(areas), "u8")
    for nr in bits(mask):
        if nr == 0:
            x87 = areas[:, :160].copy()
            x87[:, :2] ^= np.array([0x7F, 0x03], np.uint8)
            x87[:, 5] = x87[:, 24:32] = 0
            x87[:, 32:].reshape(-1, 8, 16)[:, :, 10:] = 0
            live = x87.any(axis=1)
        else:
            ((start, end),) = spans_of(layout, nr)
            live = areas[:, start : end if nr != 9 else start + 4].any(axis=1)
        used |= live.astype("u8") << np.uint64(nr)
    return used & have


def xinuse_by_area(areas, layout, mask):
    used = np.zeros(len(areas), "u8")
    for i, area in enumerate(areas):
        have = int(area[512:520].view("<u8")[0]) & mask
        for nr in bits(have):
            if nr == 0:
                slots = area[32:160].reshape(8, 16)[:, :10]
                live = bytes(area[:5]) != b"\x7f\x03\0\0\0" or area[6:24].any() or slots.any()
            else:
                ((start, end),) = spans_of(layout, nr)
                live = area[start : end if nr != 9 else start + 4].any()
            used[i] |= np.uint64(bool(live) << nr)
    return used


def keep_vectorised(areas, layout, mask):
    had = headers_of(areas)
    drop = had & ~np.uint64(mask)
    areas[:, 512:520] = (had & np.uint64(mask))[:, None].view(np.uint8)
    for nr in bits(int(np.bitwise_or.reduce(drop))):
        rows = np.flatnonzero(drop >> np.uint64(nr) & np.uint64(1))
        for start, end in spans_of(layout, nr):
            areas[rows, start:end] = 0
    return drop


def keep_by_area(areas, layout, mask):
    dropped = np.zeros(len(areas), "u8")
    for i, area in enumerate(areas):
        header = area[512:520].view("<u8")
        drop = dropped[i] = int(header[0]) & ~mask
        header[0] &= np.uint64(mask)
        for nr in bits(int(drop)):
            for start, end in spans_of(layout, nr):
                area[start:end] = 0
    return dropped


def diff_vectorised(one, two, layout, mask):
    """Areas with the same XSTATE_BV each."""
    have = headers_of(one)
    out = np.zeros(len(one), "u8")
    for nr in bits(mask):
        differ = np.zeros(len(one), bool)
        for start, end in spans_of(layout, nr):
            end = start + 4 if nr == 9 else end
            differ |= (one[:, start:end] != two[:, start:end]).any(axis=1)
        out |= differ.astype("u8") << np.uint64(nr)
    return out & have


def diff_by_area(one, two, layout, mask):
    out = np.zeros(len(one), "u8")
    for i, (a, b) in enumerate(zip(one, two, strict=True)):
        for nr in bits(int(a[512:520].view("<u8")[0]) & mask):
            for start, end in spans_of(layout, nr):
                end = start + 4 if nr == 9 else end
                if not np.array_equal(a[start:end], b[start:end]):
                    out[i] |= np.uint64(1 << nr)
    return out


def set_uabi_vectorised(areas, images, layout, mask, mxcsr_mask):
    status = audit_vectorised(areas, mask, mxcsr_mask)
    had = headers_of(areas)
    had[status != 0] = 0
    copy_vectorised(areas, images, layout, had, 7)
    good = status == 0
    images[good, 512:520] = had[good][:, None].view(np.uint8)
    return status


def set_uabi_by_area(areas, images, layout, mask, mxcsr_mask):
    status = audit_struct(areas, mask, mxcsr_mask)
    for i in np.flatnonzero(status == 0):
        area, image = areas[i], images[i]
        copy_one(area, image, layout, int(area[512:520].view("<u8")[0]), 7)
        image[512:520] = area[512:520]
    return status


def compact_by_area(areas, out, layout):
    for area, to in zip(areas, out, strict=True):
        have = int(area[512:520].view("<u8")[0])
        xcomp = have | 1 << 63
        to[:576] = 0
        to[:2] = (0x7F, 0x03)
        to[24:28] = np.array([0x1F80], "<u4").view(np.uint8)
        where = layout.compacted_offsets(xcomp)
        for nr in bits(have):
            for start, end in spans_of(layout, nr):
                at = where.get(nr, start)
                to[at : at + end - start] = area[start:end]
        if have & 6:
            to[24:32] = area[24:32]
        to[512:528] = np.array([have, xcomp], "<u8").view(np.uint8)
