"""How others do it: the algorithms of Linux, Xen and QEMU, to time beside the engine.

Written anew from what each does, not from its code: a loop over components with one memcpy each
for Linux and Xen, field by field through registers of its own for QEMU. All of them look up the
place of a component as the original does (Linux walks all lower components of a compacted area for
each, Xen fills a table for each area). Compiled with the same compiler and for the same CPUs as
the rest; memcpy is the C library's.

*Source*: Linux arch/x86/kernel/fpu/xstate.c __copy_xstate_to_uabi_buf(), copy_uabi_to_xstate();
Xen xen/arch/x86/xstate.c expand_xsave_states(), compress_xsave_states(); QEMU
target/i386/xsave_helper.c x86_cpu_xrstor_all_areas(), x86_cpu_xsave_all_areas().
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

cimport numpy as cnp

from xfast._core cimport Rows, Table, check_rows
from xfast.engine.area cimport (
    AVX, COMPONENTS, EXTENDED, FCW_INIT, FP, LEGACY, MXCSR_INIT, SSE, Slots, bit, is_compacted,
    load32, load64, store32, store64,
)
from xfast.engine.trial cimport now

cnp.import_array()

cdef enum:
    ROW = 2752  # bytes that hold components up to PKRU in each layout known

cdef struct Task:
    const Slots *slots
    uint64_t mask
    uint64_t software
    uint32_t mxcsr_mask
    Py_ssize_t size  # of a target row

ctypedef void (*peer_t)(const Task *task, const uint8_t *src, uint8_t *dst) noexcept nogil


# --- Linux ----------------------------------------------------------------------------------


cdef uint32_t find_place(const Slots *slots, uint64_t xcomp, int nr) noexcept nogil:
    """Where a component lies; of a compacted area, the components below it are summed up."""
    cdef uint32_t at = EXTENDED
    cdef int i
    if not is_compacted(xcomp):
        return slots.offset[nr]
    for i in range(2, nr + 1):
        if xcomp >> i & 1:
            if slots.align64 & bit(i):
                at = (at + 63) & ~<uint32_t>63
            if i < nr:
                at += slots.size[i]
    return at


cdef inline void copy_or_zero(
    bint present, uint8_t *dst, const uint8_t *src, size_t n
) noexcept nogil:
    if present:
        memcpy(dst, src, n)
    else:
        memset(dst, 0, n)


cdef void linux_get(const Task *task, const uint8_t *src, uint8_t *dst) noexcept nogil:
    """One copy a component, and zeros for the gaps between those that are there."""
    cdef const Slots *slots = task.slots
    cdef uint64_t bv = load64(src + LEGACY) & task.mask, xcomp = load64(src + LEGACY + 8)
    cdef uint32_t done = EXTENDED
    cdef int i
    copy_or_zero(bv & FP != 0, dst, src, 24)
    if not bv & FP:
        store32(dst, FCW_INIT)
    if bv & (SSE | AVX):
        memcpy(dst + 24, src + 24, 8)
    else:
        store64(dst + 24, MXCSR_INIT | <uint64_t>task.mxcsr_mask << 32)
    copy_or_zero(bv & FP != 0, dst + 32, src + 32, 128)
    copy_or_zero(bv & SSE != 0, dst + 160, src + 160, 256)
    memset(dst + 416, 0, 48)
    memset(dst + 464, 0, 48)
    store64(dst + 464, task.software)
    memset(dst + LEGACY, 0, 64)
    store64(dst + LEGACY, bv)
    for i in range(2, COMPONENTS - 1):
        if not bv >> i & 1:
            continue
        if done < slots.offset[i]:
            memset(dst + done, 0, slots.offset[i] - done)
        memcpy(dst + slots.offset[i], src + find_place(slots, xcomp, i), slots.size[i])
        done = slots.offset[i] + slots.size[i]
    memset(dst + done, 0, task.size - done)


cdef void linux_set(const Task *task, const uint8_t *src, uint8_t *dst) noexcept nogil:
    """Validate header and MXCSR, then one copy a component that is there."""
    cdef const Slots *slots = task.slots
    cdef uint64_t bv = load64(src + LEGACY), xcomp = load64(dst + LEGACY + 8)
    cdef int i
    if bv & ~task.mask or load64(src + LEGACY + 8):
        return
    for i in range(16, 64, 8):
        if load64(src + LEGACY + i):
            return
    if bv & (FP | SSE | AVX):
        if load32(src + 24) & ~task.mxcsr_mask:
            return
        memcpy(dst + 24, src + 24, 8)
    if bv & FP:
        memcpy(dst, src, 24)
        memcpy(dst + 32, src + 32, 128)
    if bv & SSE:
        memcpy(dst + 160, src + 160, 256)
    for i in range(2, COMPONENTS - 1):
        if bv >> i & 1:
            memcpy(dst + find_place(slots, xcomp, i), src + slots.offset[i], slots.size[i])
    store64(dst + LEGACY, bv)


# --- Xen ------------------------------------------------------------------------------------


cdef void fill_places(const Slots *slots, uint64_t xcomp, uint32_t *places) noexcept nogil:
    """The places of all components of one area, as each call works them out."""
    cdef uint32_t at = EXTENDED
    cdef int i
    for i in range(2, COMPONENTS - 1):
        places[i] = 0
        if not is_compacted(xcomp):
            places[i] = slots.offset[i]
        elif xcomp >> i & 1:
            if slots.align64 & bit(i):
                at = (at + 63) & ~<uint32_t>63
            places[i] = at
            at += slots.size[i]


cdef void xen_expand(const Task *task, const uint8_t *src, uint8_t *dst) noexcept nogil:
    """The legacy region and header at once, zeros for the rest, and one copy a component."""
    cdef uint64_t bv = load64(src + LEGACY)
    cdef uint32_t places[COMPONENTS]
    cdef int i
    fill_places(task.slots, load64(src + LEGACY + 8), places)
    memcpy(dst, src, EXTENDED)
    store64(dst + LEGACY + 8, 0)
    memset(dst + EXTENDED, 0, task.size - EXTENDED)
    for i in range(2, COMPONENTS - 1):
        if bv >> i & 1:
            memcpy(dst + task.slots.offset[i], src + places[i], task.slots.size[i])


cdef void xen_compress(const Task *task, const uint8_t *src, uint8_t *dst) noexcept nogil:
    cdef uint64_t bv = load64(src + LEGACY)
    cdef uint32_t places[COMPONENTS]
    cdef int i
    fill_places(task.slots, bv | bit(63), places)
    memcpy(dst, src, EXTENDED)
    store64(dst + LEGACY + 8, bv | bit(63))
    for i in range(2, COMPONENTS - 1):
        if bv >> i & 1:
            memcpy(dst + places[i], src + task.slots.offset[i], task.slots.size[i])


# --- QEMU -----------------------------------------------------------------------------------


cdef struct Env:
    uint32_t fpuc, fpus, fpop, mxcsr
    uint8_t fptags[8]
    uint64_t fpip, fpdp, xstate_bv
    uint64_t fpregs[8][2]
    uint64_t zmm[32][8]
    uint64_t bnd[4][2]
    uint64_t bndcs[2]
    uint64_t opmask[8]
    uint32_t pkru


cdef void load_env(Env *env, const Slots *at, const uint8_t *buf) noexcept nogil:
    """Read a standard-format area into registers, one field after the other."""
    cdef int i, j
    env.fpuc = load32(buf) & 0xFFFF
    env.fpus = load32(buf) >> 16
    for i in range(8):
        env.fptags[i] = not (buf[4] >> i & 1)
    env.fpop = load32(buf + 4) >> 16
    env.fpip = load64(buf + 8)
    env.fpdp = load64(buf + 16)
    env.mxcsr = load32(buf + 24)
    for i in range(8):
        env.fpregs[i][0] = load64(buf + 32 + 16 * i)
        env.fpregs[i][1] = load64(buf + 40 + 16 * i)
    env.xstate_bv = load64(buf + LEGACY)
    for i in range(16):
        env.zmm[i][0] = load64(buf + 160 + 16 * i)
        env.zmm[i][1] = load64(buf + 168 + 16 * i)
    for i in range(16):
        env.zmm[i][2] = load64(buf + at.offset[2] + 16 * i)
        env.zmm[i][3] = load64(buf + at.offset[2] + 16 * i + 8)
    memcpy(env.bnd, buf + at.offset[3], sizeof(env.bnd))
    memcpy(env.bndcs, buf + at.offset[4], sizeof(env.bndcs))
    memcpy(env.opmask, buf + at.offset[5], sizeof(env.opmask))
    for i in range(16):
        for j in range(4):
            env.zmm[i][4 + j] = load64(buf + at.offset[6] + 32 * i + 8 * j)
    memcpy(env.zmm[16], buf + at.offset[7], 16 * 64)
    env.pkru = load32(buf + at.offset[9])


cdef void save_env(
    const Env *env, const Slots *at, uint8_t *buf, Py_ssize_t size
) noexcept nogil:
    """Write the registers into an area of zeros, one field after the other."""
    cdef uint32_t tags = 0
    cdef int i, j
    memset(buf, 0, size)
    for i in range(8):
        tags |= <uint32_t>(not env.fptags[i]) << i
    store32(buf, env.fpuc | env.fpus << 16)
    store32(buf + 4, tags | env.fpop << 16)
    store64(buf + 8, env.fpip)
    store64(buf + 16, env.fpdp)
    store32(buf + 24, env.mxcsr)
    store32(buf + 28, 0xFFFF)
    for i in range(8):
        store64(buf + 32 + 16 * i, env.fpregs[i][0])
        store64(buf + 40 + 16 * i, env.fpregs[i][1])
    store64(buf + LEGACY, env.xstate_bv)
    for i in range(16):
        store64(buf + 160 + 16 * i, env.zmm[i][0])
        store64(buf + 168 + 16 * i, env.zmm[i][1])
    for i in range(16):
        store64(buf + at.offset[2] + 16 * i, env.zmm[i][2])
        store64(buf + at.offset[2] + 16 * i + 8, env.zmm[i][3])
    memcpy(buf + at.offset[3], env.bnd, sizeof(env.bnd))
    memcpy(buf + at.offset[4], env.bndcs, sizeof(env.bndcs))
    memcpy(buf + at.offset[5], env.opmask, sizeof(env.opmask))
    for i in range(16):
        for j in range(4):
            store64(buf + at.offset[6] + 32 * i + 8 * j, env.zmm[i][4 + j])
    memcpy(buf + at.offset[7], env.zmm[16], 16 * 64)
    store32(buf + at.offset[9], env.pkru)


cdef void qemu_both_ways(const Task *task, const uint8_t *src, uint8_t *dst) noexcept nogil:
    cdef Env env
    load_env(&env, task.slots, src)
    save_env(&env, task.slots, dst, task.size)


# --- all of them ----------------------------------------------------------------------------


cdef void copy_row(const Task *task, const uint8_t *src, uint8_t *dst) noexcept nogil:
    memcpy(dst, src, task.size)


cdef peer_t find_peer(str name) except *:
    if name == "Linux get":
        return linux_get
    if name == "Linux set":
        return linux_set
    if name == "Xen expand":
        return xen_expand
    if name == "Xen compress":
        return xen_compress
    if name == "QEMU":
        return qemu_both_ways
    if name == "memcpy":
        return copy_row
    raise ValueError(f"name: expected one of {', '.join(PEERS)}, got {name!r}")


PEERS = ("Linux get", "Linux set", "Xen expand", "Xen compress", "QEMU", "memcpy")


def run(
    str name, Table table not None, cnp.ndarray src, cnp.ndarray out, *, uint64_t mask,
    uint64_t software, uint32_t mxcsr_mask, Py_ssize_t times=1,
):
    """Do to every row what `name` does; return the seconds that it took.

    The peers trust what they are given, as the originals do after checks of their own. So rows have
    to be of 2752 bytes or more, and hold components up to PKRU, which all lie within.
    """
    cdef Rows r, w
    cdef Task task
    cdef Py_ssize_t _i, i
    cdef uint64_t header
    cdef double start
    cdef peer_t peer = find_peer(name)
    check_rows(&r, src, "src", False)
    check_rows(&w, out, "out", True)
    task = Task(&table.slots, mask, software, mxcsr_mask, w.size)
    if w.n != r.n or min(r.size, w.size) < ROW:
        raise ValueError(f"out: expected {r.n} areas of {ROW} bytes or more, as in src")
    for i in range(2, 10):
        if table.slots.offset[i] + table.slots.size[i] > ROW:
            raise ValueError(f"table: expected component {i} within {ROW} bytes")
    for i in range(r.n):
        header = load64(r.data + i * r.stride + LEGACY)
        header |= load64(r.data + i * r.stride + LEGACY + 8) & ~bit(63)
        header |= load64(w.data + i * w.stride + LEGACY + 8) & ~bit(63)
        if header & ~<uint64_t>0x2FF:
            raise ValueError(f"src[{i}]: expected components 0 to 9 in both headers")
    with nogil:
        start = now()
        for _i in range(times):
            for i in range(r.n):
                peer(&task, r.data + i * r.stride, w.data + i * w.stride)
        start = now() - start
    return start
