"""The engine's writers: plans made and kept, and the calls that follow them over rows.

A Converter writes whole areas in another layout or format, a Merger copies what is present
into areas that are already there. Each keeps the plan for every header that it has met.

*Source*: Linux arch/x86/kernel/fpu/xstate.c __copy_xstate_to_uabi_buf(),
copy_uabi_to_xstate(); Intel SDM vol. 1 section 13.4.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc
from libc.string cimport memcpy, memset
from posix.stdlib cimport posix_memalign

cimport numpy as cnp

from xfast._core cimport (
    TRIAL_CONVERT, TRIAL_MERGE, Rows, Table, check_rows, check_vector, loops, overlap, rows_ahead,
    stream_above, trials,
)
from xfast.engine.area cimport (
    AVX, COMPONENTS, EXTENDED, FAULT_XCOMP_BV, FAULT_XSTATE_BV, FCW_INIT, FP, LEGACY, MXCSR_INIT,
    PAGE, SSE, Place, bit, has_mxcsr, is_compacted, place, take_lowest,
)
from xfast.engine.cache cimport Cache, clear, destroy
from xfast.engine.follow cimport BLEND, COPY, STEP_BLENDS, STEP_LINES, ZERO, blend_t, step_t
from xfast.engine.loops cimport Job
from xfast.engine.plan cimport DENSE, PACKED, Key, Plan, Range
from xfast.engine.simd cimport LINE, cpu_is_amd, pointer_exchange, pointer_exchange_gil
from xfast.engine.trial cimport SLICE, UNKNOWN, Trial, begin, end, next_way, note, now, untried

cnp.import_array()

cdef enum:
    LONG_ROW = 8192  # bytes; AMD's hardware fetches these ahead better than we do
    ROW_LIMIT = 1 << 30  # bytes; plans count in 32 bits
    SMALL = 1 << 16  # bytes below which letting go of the GIL costs more than it gives

include "planner.pxi"


# --- plans kept, and the calls that follow them ---------------------------------------------


cdef class Plans:
    """The plans of one kind of conversion. Any number of threads may use it at a time."""

    def __cinit__(self):
        self.idle = self.spare = NULL

    def __dealloc__(self):
        destroy(self.idle)
        destroy(self.spare)


cdef Cache *acquire(
    Plans plans, Py_ssize_t src_size, Py_ssize_t dst_size, bint gil
) noexcept nogil:
    """Take the plans for this call alone; a second thread starts with none.

    `gil`: the caller holds the GIL, and needs no atomic exchange, which would have to wait
    for all that was written before.
    """
    cdef Cache *cache = <Cache *>(
        pointer_exchange_gil(<void **>&plans.idle, NULL) if gil
        else pointer_exchange(<void **>&plans.spare, NULL)
    )
    if cache == NULL:
        cache = <Cache *>calloc(1, sizeof(Cache))
        if cache == NULL:
            return NULL
        cache.config = &plans.config
        cache.make = make_plan
    elif cache.src_size != src_size or cache.dst_size != dst_size:
        clear(cache)
    cache.src_size = src_size
    cache.dst_size = dst_size
    return cache


cdef void release(Plans plans, Cache *cache, bint gil) noexcept nogil:
    destroy(<Cache *>(
        pointer_exchange_gil(<void **>&plans.idle, cache) if gil
        else pointer_exchange(<void **>&plans.spare, cache)
    ))


cdef void fill_job(Job *job, const Rows *src, const Rows *dst) noexcept nogil:
    """Fill in every field; compilers clear a struct of this size with a slow string instruction."""
    job.src = src.data
    job.src_stride = src.stride
    job.dst = dst.data
    job.dst_stride = dst.stride
    job.n = src.n
    job.cache = NULL
    job.stream = job.no_memory = job.whole = False
    job.ahead = 0
    job.row_lines = 0
    job.dense = 0
    job.failed = 0
    job.lost = NULL
    job.pkru = job.status = NULL
    if src.n * (src.size + dst.size) > stream_above:
        job.stream = (<size_t>dst.data | <size_t>dst.stride) & (LINE - 1) == 0
        if src.size < LONG_ROW or not cpu_is_amd():
            job.ahead = rows_ahead
        if job.ahead and src.stride <= PAGE and src.size >= DENSE * LINE:
            job.row_lines = <uint32_t>max(src.stride // LINE, <Py_ssize_t>0)


cdef void start_at(Job *part, const Job *job, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    """Make `part` do `n` rows of a job, from `first` on."""
    part[0] = job[0]
    part.src += first * job.src_stride
    part.dst += first * job.dst_stride
    part.n = n
    part.dense = 0
    if part.lost:
        part.lost += first
    if part.pkru:
        part.pkru += first
    if part.status:
        part.status += first


cdef void run(Job *job, void (*loop)(Job *job) noexcept nogil, Trial *trial) noexcept nogil:
    """Run a loop over many rows; while the way to fetch them is open, its last slices try both."""
    cdef Job part
    cdef Py_ssize_t done = 0
    cdef double start
    if job.row_lines and begin(trial):
        done = untried(job.n)
        start_at(&part, job, 0, done)
        loop(&part)
        job.failed |= part.failed
        job.no_memory = part.no_memory
        while trial.choice == UNKNOWN and done + SLICE <= job.n and not job.no_memory:
            start_at(&part, job, done, SLICE)
            part.whole = next_way(trial)
            start = now()
            loop(&part)
            if 2 * part.dense > SLICE:
                note(trial, part.whole, now() - start)
            done += SLICE
            job.failed |= part.failed
            job.no_memory = part.no_memory
            if 2 * part.dense <= SLICE:
                break  # these rows do not tell
        end(trial)
    if job.no_memory or (done and done == job.n):
        return
    start_at(&part, job, done, job.n - done)
    part.whole = job.row_lines and trial.choice == 1
    loop(&part)
    job.failed |= part.failed
    job.no_memory = part.no_memory


cdef void convert_rows(Job *job) noexcept nogil:
    """Convert many rows, or one as fast as can be."""
    if job.ahead:
        run(job, loops.convert, &trials[TRIAL_CONVERT])
    elif (
        job.n != 1 or job.stream or job.lost or job.pkru
        or not loops.convert_one(job.cache, job.src, job.dst)
    ):
        loops.convert(job)


cdef void merge_rows(Job *job) noexcept nogil:
    """Merge many rows, or one as fast as can be."""
    if job.ahead:
        run(job, loops.merge, &trials[TRIAL_MERGE])
    elif (
        job.n != 1 or job.stream or job.lost or job.status
        or not loops.merge_one(job.cache, job.src, job.dst)
    ):
        loops.merge(job)


cdef int check_pair(const Rows *src, str src_name, const Rows *dst, str dst_name) except -1:
    if dst.n != src.n:
        raise ValueError(f"{dst_name}: expected {src.n} areas, as many as {src_name}, got {dst.n}")
    if max(src.size, dst.size) >= ROW_LIMIT:
        raise ValueError(
            f"{dst_name}: expected areas of less than {ROW_LIMIT} bytes, "
            f"got {max(src.size, dst.size)}"
        )
    if overlap(src, dst):
        raise ValueError(
            f"{dst_name}: expected memory of its own, got memory that {src_name} uses too"
        )
    return 0


cdef class Converter(Plans):
    """Write whole areas: the components in XSTATE_BV and `mask`, everything else init.

    Parameters
    ----------
    source, target : Table
    mask : int
    xcomp_bv : int
        Format of the result; 0: standard.
    ragged : bool
        Compacted results with XCOMP_BV = XSTATE_BV | 1 << 63, each written as far as it goes
        (up to the next multiple of 64 bytes).
    kernel : bool
        MXCSR comes from the area with SSE or AVX, whatever its format.
    foreign_pkru : bool
        Each call gives the values of PKRU.
    mxcsr_mask : int
        MXCSR_MASK where MXCSR is init.
    software : int
        u64 at byte 464.
    """

    def __init__(
        self, Table source not None, Table target not None, uint64_t mask, *, uint64_t xcomp_bv=0,
        bint ragged=False, bint kernel=False, bint foreign_pkru=False, uint32_t mxcsr_mask=0,
        uint64_t software=0,
    ):
        self.config.src = source.slots
        self.config.dst = target.slots
        self.config.mask = mask
        self.config.xcomp = xcomp_bv
        self.config.ragged = ragged
        self.config.kernel = kernel
        self.config.foreign_pkru = foreign_pkru
        self.config.mxcsr_mask = mxcsr_mask
        self.config.software = software
        if foreign_pkru and (xcomp_bv or ragged):
            raise ValueError(
                "foreign_pkru: expected results in the standard format, got compacted ones"
            )
        if foreign_pkru and target.slots.offset[9] % 8:
            raise ValueError(
                f"target: expected PKRU at a multiple of 8, got {target.slots.offset[9]}"
            )

    def convert(
        self, cnp.ndarray src, cnp.ndarray out, cnp.ndarray lost=None, cnp.ndarray pkru=None
    ):
        """Convert `src` into `out`, row by row.

        Returns
        -------
        int
            Components that `out` could not hold or `src` does not hold, of all rows; `lost`,
            (n,) uint64, receives them row by row.
        """
        cdef Rows r, w
        cdef Job job
        check_rows(&r, src, "src", False)
        check_rows(&w, out, "out", True)
        check_pair(&r, "src", &w, "out")
        fill_job(&job, &r, &w)
        if (
            job.ahead and not job.stream and not self.config.ragged and w.stride == w.size
            and (<size_t>w.data | <size_t>w.stride) & 7 == 0
        ):
            job.stream = True  # rows that share lines
        if lost is not None:
            job.lost = <uint64_t *>check_vector(lost, "lost", cnp.NPY_UINT64, r.n)
        if (pkru is not None) != self.config.foreign_pkru:
            raise ValueError("pkru: expected with foreign_pkru, and only then")
        if pkru is not None:
            job.pkru = <uint32_t *>check_vector(pkru, "pkru", cnp.NPY_UINT32, r.n)
        job.cache = acquire(self, r.size, w.size, True)
        if job.cache == NULL:
            raise MemoryError
        if r.n * r.size < SMALL:
            convert_rows(&job)
        else:
            with nogil:
                convert_rows(&job)
        release(self, job.cache, True)
        if job.no_memory:
            raise MemoryError
        return job.failed


cdef class Merger(Plans):
    """Copy the components in XSTATE_BV and `mask` into areas; all their other bytes stay.

    XSTATE_BV becomes (old & ~mask) | (source & mask); the targets' XCOMP_BV says where their
    components lie.

    Parameters
    ----------
    source, target : Table
    mask : int
    mxcsr : bool, optional
        Whether MXCSR comes over. Default: if x87, SSE or AVX does.
    user_xfeatures, mxcsr_mask : int, optional
        Validate the source as KVM_SET_XSAVE does: a row with a fault is left alone.
    """

    def __init__(
        self, Table source not None, Table target not None, uint64_t mask, *, mxcsr=None,
        user_xfeatures=None, uint32_t mxcsr_mask=0,
    ):
        self.config.merge = True
        self.config.src = source.slots
        self.config.dst = target.slots
        self.config.mask = mask
        self.config.mxcsr = -1 if mxcsr is None else bool(mxcsr)
        self.config.mxcsr_mask = mxcsr_mask
        self.config.validate = user_xfeatures is not None
        if self.config.validate:
            self.config.user_xfeatures = user_xfeatures

    def merge(self, cnp.ndarray src, cnp.ndarray into, cnp.ndarray status=None):
        """Merge `src` into `into`, row by row.

        Returns
        -------
        int
            `xfast.xsave.area.UabiFault` codes of all rows, combined by or; `status`, (n,) uint32,
            receives them row by row.
        """
        cdef Rows r, w
        cdef Job job
        check_rows(&r, src, "src", False)
        check_rows(&w, into, "into", True)
        check_pair(&r, "src", &w, "into")
        fill_job(&job, &r, &w)
        if status is not None:
            job.status = <uint32_t *>check_vector(status, "status", cnp.NPY_UINT32, r.n)
        job.cache = acquire(self, r.size, w.size, True)
        if job.cache == NULL:
            raise MemoryError
        if r.n * r.size < SMALL:
            merge_rows(&job)
        else:
            with nogil:
                merge_rows(&job)
        release(self, job.cache, True)
        if job.no_memory:
            raise MemoryError
        return job.failed


def swap(
    Merger save not None, Merger load not None, cnp.ndarray registers, cnp.ndarray leave,
    cnp.ndarray enter, cnp.ndarray lost,
):
    """Merge `registers` into `leave`, then `enter` into `registers`, row by row.

    A row in which a component has no place is left alone; `lost`, (n,) uint64, names it.
    Return the components lost of all rows.
    """
    cdef Rows live, old, new
    cdef Job out, into
    check_rows(&live, registers, "registers", True)
    check_rows(&old, leave, "leave", True)
    check_rows(&new, enter, "enter", False)
    check_pair(&live, "registers", &old, "leave")
    check_pair(&new, "enter", &live, "registers")
    check_pair(&new, "enter", &old, "leave")
    fill_job(&out, &live, &old)
    fill_job(&into, &new, &live)
    out.lost = <uint64_t *>check_vector(lost, "lost", cnp.NPY_UINT64, live.n)
    out.cache = acquire(save, live.size, old.size, True)
    into.cache = acquire(load, new.size, live.size, True)
    if out.cache == NULL or into.cache == NULL:
        out.no_memory = True
    else:
        with nogil:
            loops.swap(&out, &into)
    if out.cache:
        release(save, out.cache, True)
    if into.cache:
        release(load, into.cache, True)
    if out.no_memory:
        raise MemoryError
    return out.failed


cdef uint64_t convert_one(
    Converter how, const uint8_t *src, Py_ssize_t src_size, uint8_t *dst, Py_ssize_t dst_size
) noexcept nogil:
    """Write one whole area; not for a Converter with foreign PKRU."""
    cdef Rows r = Rows(<uint8_t *>src, 1, src_size, src_size)
    cdef Rows w = Rows(dst, 1, dst_size, dst_size)
    cdef Job job
    fill_job(&job, &r, &w)
    job.cache = acquire(how, src_size, dst_size, False)
    if job.cache == NULL:
        return bit(63)
    convert_rows(&job)
    release(how, job.cache, False)
    return bit(63) if job.no_memory else job.failed


cdef uint64_t merge_one(
    Merger how, const uint8_t *src, Py_ssize_t src_size, uint8_t *dst, Py_ssize_t dst_size
) noexcept nogil:
    """Copy what is present into one area; return the `xfast.xsave.area.UabiFault` code."""
    cdef Rows r = Rows(<uint8_t *>src, 1, src_size, src_size)
    cdef Rows w = Rows(dst, 1, dst_size, dst_size)
    cdef Job job
    fill_job(&job, &r, &w)
    job.cache = acquire(how, src_size, dst_size, False)
    if job.cache == NULL:
        return bit(63)
    merge_rows(&job)
    release(how, job.cache, False)
    return bit(63) if job.no_memory else job.failed
