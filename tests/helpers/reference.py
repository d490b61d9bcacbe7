"""The engine's operations again: slow, obvious, on bytes, and without a line shared with it.

Every function takes one area as bytes and returns bytes, a mask or a number.
"""

from struct import pack_into, unpack_from

FP, SSE, AVX, PKRU = 1, 2, 4, 0x200
COMPACTED = 1 << 63


def u16(area, at):
    return unpack_from("<H", area, at)[0]


def u32(area, at):
    return unpack_from("<I", area, at)[0]


def u64(area, at):
    return unpack_from("<Q", area, at)[0]


def header(area):
    return u64(area, 512), u64(area, 520)


def offsets(layout, xcomp, size):
    """{component: offset} of what the format gives a place inside `size` bytes."""
    found = {}
    if not xcomp & COMPACTED:
        for slot in layout.slots:
            if slot.offset and slot.offset + slot.size <= size:
                found[slot.nr] = slot.offset
        return found
    position = 576
    for nr in range(2, 63):
        if not xcomp >> nr & 1:
            continue
        if nr not in layout.by_nr:
            break
        slot = layout.by_nr[nr]
        if slot.align64:
            position = -(-position // 64) * 64
        if position + slot.size <= size:
            found[nr] = position
        position += slot.size
    return found


def has_mxcsr(bv, xcomp):
    return bool(bv & (SSE if xcomp & COMPACTED else SSE | AVX))


def movable(area, layout, to, mask, xcomp, size):
    """The components that come over, and those that have no place in source or target."""
    bv, source_xcomp = header(area)
    here = offsets(layout, source_xcomp, len(area))
    there = offsets(to, xcomp, size)
    want = bv & mask
    come = 0
    for nr in range(63):
        if not want >> nr & 1:
            continue
        if nr >= 2 and (nr not in here or nr not in there):
            continue
        if xcomp & COMPACTED and not xcomp >> nr & 1:
            continue
        come |= 1 << nr
    if not xcomp & COMPACTED and come & 0x18:
        come &= ~(1 << 19) if 19 in there and clash(to, come) else -1
    return come, want & ~come


def clash(layout, mask):
    """Whether APX shares its standard-format bytes with MPX components of `mask`."""
    apx = layout.by_nr[19]
    return any(
        mask >> nr & 1
        and layout.by_nr[nr].offset < apx.offset + apx.size
        and apx.offset < layout.by_nr[nr].offset + layout.by_nr[nr].size
        for nr in (3, 4)
        if nr in layout.by_nr
    )


def copy_components(area, layout, out, to, xcomp, come, pkru=None):
    here = offsets(layout, header(area)[1], len(area))
    there = offsets(to, xcomp, len(out))
    if come & FP:
        out[0:24] = area[0:24]
        out[32:160] = area[32:160]
    if come & SSE:
        out[160:416] = area[160:416]
    for nr in range(2, 63):
        if come >> nr & 1:
            n = min(layout.by_nr[nr].size, to.by_nr[nr].size)
            if nr == 9 and pkru is not None:
                pack_into("<Q", out, there[9], pkru)
            else:
                out[there[nr] : there[nr] + n] = area[here[nr] : here[nr] + n]


def relayout(
    area, layout, to, size, *, mask=-1, xcomp=0, mxcsr_mask=0, software=0, kernel=False, pkru=None
):
    """Return the new area, and the components lost."""
    bv, source_xcomp = header(area)
    come, lost = movable(area, layout, to, mask, xcomp, size)
    out = bytearray(size)
    pack_into("<H", out, 0, 0x37F)
    pack_into("<II", out, 24, 0x1F80, mxcsr_mask)
    copy_components(area, layout, out, to, xcomp, come, pkru)
    if come & (SSE | AVX) and (kernel or has_mxcsr(bv, source_xcomp)):
        out[24:32] = area[24:32]
    pack_into("<Q", out, 464, software)
    pack_into("<QQ", out, 512, come, xcomp)
    return bytes(out), lost


def merge(area, layout, into, to, mask, mxcsr):
    """Return the area that `into` becomes, and the components lost (then it is as it was)."""
    old, xcomp = header(into)
    come, lost = movable(area, layout, to, mask, xcomp, len(into))
    if lost:
        return bytes(into), lost
    out = bytearray(into)
    copy_components(area, layout, out, to, xcomp, come)
    if mxcsr:
        out[24:32] = area[24:32]
    pack_into("<Q", out, 512, old & ~mask | come)
    return bytes(out), 0


def set_uabi(area, layout, into, to, user_xfeatures, mxcsr_mask, supervisor):
    """Return the fault code and what `into` becomes."""
    bv, xcomp = header(area)
    if bv & ~user_xfeatures:
        return 1, bytes(into)
    if xcomp:
        return 2, bytes(into)
    if any(area[528:576]):
        return 3, bytes(into)
    if bv & 7 and u32(area, 24) & ~mxcsr_mask:
        return 4, bytes(into)
    out, lost = merge(area, layout, into, to, (1 << 63) - 1 & ~supervisor, bool(bv & 7))
    return (5, bytes(into)) if lost else (0, out)


def audit(area, mask, mxcsr_mask):
    bv, xcomp = header(area)
    return (
        bool(bv & ~mask)
        | bool(xcomp) << 1
        | any(area[528:576]) << 2
        | bool(bv & 7 and u32(area, 24) & ~mxcsr_mask) << 3
    )


def x87_in_use(area, clear):
    fcw = u16(area, 0)
    tops = [any(area[32 + 16 * i : 42 + 16 * i]) for i in range(8)]
    return (
        any(area[2:5]) or any(area[6:24]) or any(tops) or not (fcw == 0x37F or (clear and fcw == 0))
    )


def xinuse(area, layout, early=False):
    bv, xcomp = header(area)
    look = bv if early else -1
    used = 0
    if look & FP and x87_in_use(area, not bv & FP):
        used |= FP
    if look & SSE and any(area[160:416]):
        used |= SSE
    for nr, at in offsets(layout, xcomp, len(area)).items():
        n = 4 if nr == 9 else layout.by_nr[nr].size
        if not look >> nr & 1 or not any(area[at : at + n]):
            continue
        shared = not xcomp & COMPACTED and any(
            other != nr
            and bv >> other & 1
            and slot.offset
            and slot.offset < at + layout.by_nr[nr].size
            and at < slot.offset + slot.size
            for other, slot in layout.by_nr.items()
        )
        if bv >> nr & 1 or not shared:
            used |= 1 << nr
    return used


def classify(area, layout):
    """Return (in use, default, stale, unreadable)."""
    bv, xcomp = header(area)
    data = xinuse(area, layout)
    here = offsets(layout, xcomp, len(area))
    mxcsr = u32(area, 24)
    if mxcsr != 0x1F80 and (mxcsr or has_mxcsr(bv, xcomp)):
        data |= AVX if has_mxcsr(bv, xcomp) and not bv & SSE else SSE
    inuse = data & bv
    default = PKRU if inuse & PKRU and u32(area, here[9]) == 0x55555554 else 0
    found = 3 | sum(1 << nr for nr in here)
    return inuse, default, data & ~bv, bv & ~found


def value(area, layout, nr):
    """The bytes of one component that count, init where its bit is clear; None: unreadable."""
    bv, xcomp = header(area)
    present = bv >> nr & 1
    if nr == 0:
        return area[0:24] + area[32:160] if present else None
    if nr == 1:
        return area[160:416] if present else bytes(256)
    here = offsets(layout, xcomp, len(area))
    size = 4 if nr == 9 else layout.by_nr[nr].size if nr in layout.by_nr else 0
    return area[here[nr] : here[nr] + size] if present else bytes(size)


def diff(one, layout, two, two_layout):
    bits = [header(one)[0], header(two)[0]]
    found = [
        3 | sum(1 << nr for nr in offsets(lay, header(area)[1], len(area)))
        for area, lay in ((one, layout), (two, two_layout))
    ]
    differing = (bits[0] & ~found[0]) | (bits[1] & ~found[1])
    for nr in range(63):
        have = [bv >> nr & 1 for bv in bits]
        if differing >> nr & 1 or not any(have):
            continue
        if nr == 0 and all(have):
            same = value(one, layout, 0) == value(two, two_layout, 0)
        elif nr == 0:
            same = not x87_in_use(one if have[0] else two, False)
        else:
            a, b = value(one, layout, nr), value(two, two_layout, nr)
            n = min(len(a), len(b)) if all(have) else max(len(a), len(b))
            same = a[:n].ljust(n, b"\0") == b[:n].ljust(n, b"\0")
        differing |= 0 if same else 1 << nr
    mxcsr = [u32(area, 24) if has_mxcsr(*header(area)) else 0x1F80 for area in (one, two)]
    return differing | (SSE if mxcsr[0] != mxcsr[1] else 0)


def keep(area, layout, mask, scrub):
    """Return the trimmed area and the bits dropped."""
    bv, xcomp = header(area)
    out = bytearray(area)
    drop, kept = bv & ~mask, bv & mask
    pack_into("<Q", out, 512, kept)
    if not scrub:
        return bytes(out), drop
    if drop & FP:
        out[0:24] = bytes(24)
        out[32:160] = bytes(128)
        pack_into("<H", out, 0, 0x37F)
    if drop & SSE:
        out[160:416] = bytes(256)
    if drop & (SSE | AVX) and not has_mxcsr(kept, xcomp):
        pack_into("<I", out, 24, 0x1F80)
    here = offsets(layout, xcomp, len(area))
    for nr, at in here.items():
        n = layout.by_nr[nr].size
        shared = not xcomp & COMPACTED and any(
            other != nr and kept >> other & 1 and at < there + layout.by_nr[other].size
            and there < at + n
            for other, there in here.items()
        )  # fmt: skip
        if drop >> nr & 1 and not shared:
            out[at : at + n] = bytes(n)
    return bytes(out), drop
