"""Firecracker's vmstate files: their CRC64, and their vCPUs in one walk.

Every offset and length is compared with the file's end before it is used.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy


cdef extern from "crc64.h" nogil:
    void crc64_fill()
    int crc64_folding()
    uint64_t crc64_by_tables(uint64_t crc, const uint8_t* at, size_t n)
    uint64_t crc64_by_folding(const uint8_t* at, size_t n)
    uint64_t crc64_by_wide(const uint8_t* at, size_t n)

cdef enum:
    XCRS_SIZE = 8 + 392  # struct kvm_xcrs behind its length
    XSAVE_SIZE = 4096  # struct kvm_xsave
    SREGS_SIZE = 312  # struct kvm_sregs; a length and 72 bytes of events lie behind it
    ENTRY_SIZE = 40  # struct kvm_cpuid_entry2
    MSR_SIZE = 16  # struct kvm_msr_entry
    TABLE_LIMIT = 256  # KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES: KVM takes no longer list
    KEPT_LIMIT = 1024

crc64_fill()
cdef int FOLDS = crc64_folding()
cdef list _kept = []
cdef Py_ssize_t _last = 0


def crc64(bytes data not None, int most=2) -> int:
    """Return the CRC-64/Jones of `data`.

    `most`: what is used of the CPU, 0 no more than tables, 1 PCLMULQDQ, 2 VPCLMULQDQ.
    """
    cdef const uint8_t* at = <const uint8_t*>PyBytes_AS_STRING(data)
    cdef Py_ssize_t n = PyBytes_GET_SIZE(data)
    most = min(most, FOLDS)
    if most == 2:
        return crc64_by_wide(at, n)
    return crc64_by_folding(at, n) if most == 1 else crc64_by_tables(0, at, n)


cdef inline bint _word(const uint8_t* at, Py_ssize_t n, Py_ssize_t offset, uint64_t* word) noexcept:
    """Read the u64 at `offset`; False past the end."""
    if offset < 0 or offset > n - 8:
        return False
    memcpy(word, at + offset, 8)
    return True


cdef bint _table(
    const uint8_t* at, Py_ssize_t end, uint64_t size, Py_ssize_t* begin, Py_ssize_t* stop
) noexcept:
    """Find the next list of structures of `size` bytes, from `stop` on.

    A list is u64 8, u32 count, u32 0, u64 count, then each structure behind its size (u64). `begin`
    is where its rows begin, `stop` where they end.
    """
    cdef Py_ssize_t i = stop[0], row, past, step = 8 + <Py_ssize_t>size
    cdef const uint8_t* found
    cdef uint64_t word, again
    cdef uint32_t count
    while i <= end - 24:
        found = <const uint8_t*>memchr(at + i, 8, end - 23 - i)
        if found == NULL:
            return False
        i = found - at
        memcpy(&word, found, 8)
        memcpy(&count, found + 8, 4)
        if word == 8 and 0 < count <= TABLE_LIMIT:
            memcpy(&word, found + 8, 8)
            memcpy(&again, found + 16, 8)
            past = i + 24 + count * step
            if word == again and past <= end:
                row = i + 24
                while row < past:
                    memcpy(&word, at + row, 8)
                    if word != size:
                        break
                    row += step
                if row == past:
                    begin[0], stop[0] = i + 24, past
                    return True
        i += 1
    return False


cdef bytes _same(const uint8_t* at, Py_ssize_t length):
    """Return these bytes: one object for all that are equal, which is hashed but once."""
    global _last
    cdef Py_ssize_t i, n = len(_kept)
    cdef bytes known
    for i in range(n):
        known = <bytes>_kept[(_last + 1 + i) % n]
        if PyBytes_GET_SIZE(known) == length and not memcmp(PyBytes_AS_STRING(known), at, length):
            _last = (_last + 1 + i) % n
            return known
    known = PyBytes_FromStringAndSize(<const char*>at, length)
    if n >= KEPT_LIMIT:
        _kept.clear()
    _kept.append(known)
    return known


cdef bytes _msrs(const uint8_t* at, Py_ssize_t start, Py_ssize_t end, uint64_t[2] told):
    """Return the rows of all lists of MSRs, with the values of those that are `told` alone."""
    cdef Py_ssize_t begin = 0, stop = start, row, filled = 0
    cdef bytearray rows = bytearray()
    cdef uint32_t index
    cdef char* to
    while _table(at, end, MSR_SIZE, &begin, &stop):
        rows += bytes((stop - begin) // (8 + MSR_SIZE) * MSR_SIZE)
        to = <char*>rows
        for row in range(begin, stop, 8 + MSR_SIZE):
            memcpy(&index, at + row + 8, 4)
            memcpy(to + filled, &index, 4)
            if index == told[0] or index == told[1]:
                memcpy(to + filled + 8, at + row + 16, 8)
            filled += MSR_SIZE
    return _same(<const uint8_t*><char*>rows, filled)


cdef bint _is_vcpu(const uint8_t* at, Py_ssize_t n, Py_ssize_t xcrs, Py_ssize_t[4] place) noexcept:
    """Tell whether kvm_xsave and tsc_khz follow the kvm_xcrs at `xcrs`.

    `place` is the area's offset, that of what AMX adds to it, the bytes of that, and the end.
    """
    cdef Py_ssize_t size_at = xcrs + XCRS_SIZE
    cdef uint64_t size = 0, words = 0, again = 0
    if not _word(at, n, size_at, &size):
        return False
    if size == XSAVE_SIZE:
        place[0] = size_at + 8
        place[1] = place[0] + XSAVE_SIZE
    elif size == 8 + XSAVE_SIZE:
        place[0] = size_at + 16
        place[1] = place[0] + XSAVE_SIZE + 8
        if not _word(at, n, place[1] - 8, &words) or not _word(at, n, size_at + 8, &again):
            return False
        if words != again or words > <uint64_t>(n - place[1]) // 4:
            return False
    else:
        return False
    place[2] = 4 * <Py_ssize_t>words
    place[3] = place[1] + place[2]
    return place[3] < n and at[place[3]] <= 1


def walk(bytes data not None, bytes xcrs not None, Py_ssize_t cr4, tuple msrs not None) -> list:
    """Find the vCPUs: a kvm_xcrs that holds XCR0 alone, and kvm_xsave behind it.

    Parameters
    ----------
    data : bytes
        The file.
    xcrs : bytes
        What a blob of struct kvm_xcrs begins with: its length, and that there is one register.
    cr4 : int
        Where struct kvm_sregs has CR4.
    msrs : tuple of int, int
        Whose values are told.

    Returns
    -------
    list of tuple
        Of each vCPU: where its data begin, its kvm_xcrs, the area's first 4096 bytes and what AMX
        adds to them; the bytes of that; where they end; where its CPUID's rows begin (0: it has
        none); these rows; its MSRs, as an array of struct kvm_msr_entry; XCR0 and CR4, or None.
    """
    cdef const uint8_t* at = <const uint8_t*>PyBytes_AS_STRING(data)
    cdef const uint8_t* head = <const uint8_t*>PyBytes_AS_STRING(xcrs)
    cdef const uint8_t* found
    cdef Py_ssize_t n = PyBytes_GET_SIZE(data), length = PyBytes_GET_SIZE(xcrs)
    cdef Py_ssize_t start = 0, i = 0, begin, stop
    cdef Py_ssize_t[4] place
    cdef uint64_t[2] told
    cdef uint64_t size, xcr0 = 0, cr4_word = 0
    cdef uint32_t register = 0
    cdef list vcpus = []
    cdef object has_cr4
    told[0], told[1] = msrs
    if not 0 <= cr4 <= SREGS_SIZE - 8 or length < 8:
        raise ValueError("walk: expected CR4 in struct kvm_sregs, and the beginning of kvm_xcrs")
    while i <= n - length:
        found = <const uint8_t*>memchr(at + i, head[0], n - length + 1 - i)
        if found == NULL:
            break
        i = found - at
        if memcmp(found, head, length) or not _is_vcpu(at, n, i, place):
            i += 1
            continue
        begin, stop = 0, start
        if not _table(at, i, ENTRY_SIZE, &begin, &stop):
            begin = stop = 0
        memcpy(&register, at + i + 16, 4)
        memcpy(&xcr0, at + i + 24, 8)
        size = 0
        has_cr4 = None
        if _word(at, n, i - SREGS_SIZE - 80, &size) and size == SREGS_SIZE:
            memcpy(&cr4_word, at + i - SREGS_SIZE - 72 + cr4, 8)
            has_cr4 = cr4_word
        vcpus.append((
            start, i, place[0], place[1], place[2], place[3], begin,
            _same(at + begin, stop - begin), _msrs(at, start, i, told),
            xcr0 if register == 0 else None, has_cr4,
        ))
        i = start = place[3]
    return vcpus
