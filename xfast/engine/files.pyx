"""What reading files costs most: opening them, numbers in JSON, big-endian registers.

Offsets and lengths are checked here, against the buffers themselves. What does not look as simple
as it should is left to the caller's slow way (None or a negative number), which says what is wrong.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeLatin1
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp, memset, strlen

from xfast.engine.flat cimport flat
from xfast.engine.words cimport Number, Run, swap_words

cdef extern from "string.h" nogil:
    void* memmem(const void* data, size_t size, const void* piece, size_t length)

cdef extern from "Python.h":
    bint PyUnicode_IS_COMPACT_ASCII(object text)
    int PyUnicode_KIND(object text)
    void* PyUnicode_DATA(object text)
    Py_ssize_t PyUnicode_GET_LENGTH(object text)

cdef extern from "Python.h":
    bytes PyUnicode_EncodeFSDefault(str text)
    object PyErr_SetFromErrno(object kind)
    long long PyLong_AsLongLongAndOverflow(object number, int* overflow) except? -1

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <string.h>
    #include <sys/stat.h>
    #include <unistd.h>
    struct xfast_file {
        int fd;
        unsigned mode;
        uint64_t device, inode;
        int64_t size, modified;
        ssize_t got;
    };
    /* Tell the size of a regular file without a journal; -1 where it is anything else. */
    static int64_t xfast_size(int folder, const char *name, int nofollow, const char *journal)
    {
        struct stat status;
        if (fstatat(folder, name, &status, nofollow ? AT_SYMLINK_NOFOLLOW : 0)
            || !S_ISREG(status.st_mode)
            || !faccessat(AT_FDCWD, journal, F_OK, AT_SYMLINK_NOFOLLOW) || errno != ENOENT)
            return -1;
        return status.st_size;
    }
    /* Tell which of the names there is anything under; a NUL lies behind each: bit 0 the first. */
    static unsigned xfast_present(const char *name, const char *end)
    {
        unsigned found = 0;
        for (unsigned bit = 1; name < end; name += strlen(name) + 1, bit <<= 1)
            if (!faccessat(AT_FDCWD, name, F_OK, 0))
                found |= bit;
        return found;
    }
    /* Open a regular file and read its head; -1 where anything is not as it mostly is. */
    static int xfast_open(int folder, const char *name, int nofollow, void *head, size_t room,
                          struct xfast_file *file)
    {
        struct stat status;
        file->fd = openat(folder, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK
                                        | (nofollow ? O_NOFOLLOW : 0));
        if (file->fd < 0)
            return -1;
        if (fstat(file->fd, &status) || !S_ISREG(status.st_mode)
            || (file->got = pread(file->fd, head, room, 0)) < 0) {
            close(file->fd);
            return -1;
        }
        file->mode = status.st_mode;
        file->device = status.st_dev;
        file->inode = status.st_ino;
        file->size = status.st_size;
        file->modified = status.st_mtim.tv_sec * 1000000000LL + status.st_mtim.tv_nsec;
        return 0;
    }
    """
    struct xfast_file:
        int fd
        unsigned mode
        uint64_t device, inode
        long long size, modified
        Py_ssize_t got
    unsigned xfast_present(const char* names, const char* end)
    long long xfast_size(int folder, const char* name, int nofollow, const char* journal)
    int xfast_open(
        int folder, const char* name, int nofollow, void* head, size_t room, xfast_file* file
    )
    bint S_ISBLK(unsigned mode)
    long long lseek(int fd, long long offset, int whence)
    int close(int fd)
    enum:
        AT_FDCWD
        SEEK_END

cdef enum:
    WHOLE = 1 << 16  # files up to this size (bytes) are read when they are opened
    HEAD = 512  # of larger ones, all that most formats are told by

# Opening


cdef const char* _path(str text, list kept):
    """Return a path as the system takes it, NULL where it takes none; `kept` holds its bytes."""
    cdef const char* at = <const char*>PyUnicode_DATA(text)
    cdef Py_ssize_t n = PyUnicode_GET_LENGTH(text)
    cdef bytes encoded
    if not PyUnicode_IS_COMPACT_ASCII(text):
        try:
            encoded = PyUnicode_EncodeFSDefault(text)
        except UnicodeEncodeError:
            return NULL
        kept.append(encoded)
        at, n = encoded, PyBytes_GET_SIZE(encoded)
    return at if <Py_ssize_t>strlen(at) == n else NULL


def opened(str name not None, str journal not None, folder=None):
    """Open a regular file, unless a journal lies beside it, and read its head.

    Parameters
    ----------
    name : str
        In `folder` (a descriptor) if one is given; it is not followed there, should it be a link.
    journal : str
        The path of the journal.

    Returns
    -------
    tuple or None
        The descriptor, and what was found: the mode; device, inode, size and mtime (ns); the head,
        which is all of a file of up to 64 KiB, and 512 bytes of another. None where it can't be
        opened, is anything else, or the journal exists: the caller says so.
    """
    cdef list kept = []
    cdef bytes head
    cdef int directory = AT_FDCWD if folder is None else folder
    cdef int nofollow = folder is not None, failed
    cdef const char* name_at = _path(name, kept)
    cdef const char* journal_at = _path(journal, kept)
    cdef char* head_at
    cdef long long size
    cdef xfast_file file
    if name_at == NULL or journal_at == NULL:
        return None
    with nogil:
        size = xfast_size(directory, name_at, nofollow, journal_at)
    if size < 0:
        return None
    size = size if size <= WHOLE else HEAD
    head = PyBytes_FromStringAndSize(NULL, size)
    head_at = PyBytes_AS_STRING(head)
    with nogil:
        failed = xfast_open(directory, name_at, nofollow, head_at, size, &file)
    if failed:
        return None
    if file.got < size:
        head = head[:file.got]
    stamp = file.device, file.inode, file.size, file.modified
    return file.fd, (file.mode, stamp, head)


def present(str names not None) -> int:
    """Tell under which paths there is anything: a mask, bit 0 the first of up to 32.

    Parameters
    ----------
    names : str
        The paths, with a NUL behind each but the last one.
    """
    cdef bytes text
    cdef const char* at
    cdef Py_ssize_t n
    cdef unsigned found
    try:
        text = PyUnicode_EncodeFSDefault(names)
    except UnicodeEncodeError:
        return 0
    at, n = text, PyBytes_GET_SIZE(text)
    with nogil:
        found = xfast_present(at, at + n)
    return found


# Reading


cdef class Reader:
    """Bytes of which the first ones may be known already; a subclass fetches all others.

    Attributes
    ----------
    path, fd : str, int
        The name as the user gave it, and the descriptor: -1 where there is none.
    outer : Reader or None
        What was around the bytes.
    mode, stamp_here : int, tuple
        What kind of file it is; device, inode, size and mtime (ns).
    size : int
    head : bytes
        The first ones, as far as they are known.
    bytes_read : int
        How many were asked for until now.
    """

    cdef public object path, stamp_here, outer
    cdef public int fd
    cdef public unsigned mode
    cdef public long long size, bytes_read
    cdef public bytes head

    def __cinit__(self):
        self.fd, self.head = -1, b""

    def hold(self, path, int fd, tuple found not None):
        """Take over an open file, of which its mode, stamp and head are known (`opened`)."""
        self.path, self.fd = path, fd
        self.mode, self.stamp_here, self.head = found
        self.size = self.stamp_here[2]
        if S_ISBLK(self.mode):
            self.size = lseek(fd, 0, SEEK_END)  # fstat() tells no block device's

    def close(self):
        """Close the file, and what is around it; temporary ones vanish."""
        cdef int fd = self.fd, failed
        self.fd = -1
        if fd >= 0:
            with nogil:
                failed = close(fd)
            if failed:
                PyErr_SetFromErrno(OSError)
        if self.outer is not None:
            self.outer.close()

    def read(self, offset, length) -> bytes:
        """Return `length` bytes from `offset`; what is not all inside is left to `_refuse`."""
        cdef int far = 0, wide = 0
        cdef long long start = PyLong_AsLongLongAndOverflow(offset, &far)
        cdef long long n = PyLong_AsLongLongAndOverflow(length, &wide)
        if far or wide or start < 0 or n < 0 or start > self.size - n:
            return self._refuse(offset, length)
        if n > PyBytes_GET_SIZE(self.head) - start:
            return self._fetch(offset, length)
        self.bytes_read += n
        if n == PyBytes_GET_SIZE(self.head):
            return self.head
        return PyBytes_FromStringAndSize(PyBytes_AS_STRING(self.head) + start, n)


# JSON: text of one byte a character

cdef const uint8_t* _text(str text, Py_ssize_t* n) except? NULL:
    """Return the characters of a text, or NULL where one is wider than a byte."""
    if PyUnicode_KIND(text) != 1:
        return NULL
    n[0] = PyUnicode_GET_LENGTH(text)
    return <const uint8_t*>PyUnicode_DATA(text)


ctypedef fused char_t:
    uint8_t
    uint16_t
    uint32_t


cdef inline bint _is_space(uint8_t c) noexcept nogil:
    return c == 32 or c == 9 or c == 10 or c == 13


cdef inline bint _is_scalar(uint8_t c) noexcept nogil:
    return (
        48 <= c <= 57 or 97 <= c <= 122 or 65 <= c <= 90
        or c == 95 or c == 45 or c == 43 or c == 46
    )


cdef Py_ssize_t _string_end(const char_t* at, Py_ssize_t i, Py_ssize_t n) noexcept nogil:
    """Return where the string at `i` ends, or -1."""
    i += 1
    while i < n:
        if at[i] == 34:
            return i + 1
        i += 2 if at[i] == 92 else 1
    return -1


cdef Py_ssize_t _closed(const char_t* at, Py_ssize_t i, Py_ssize_t n) noexcept nogil:
    """Return where the list or object at `i` ends; negative as `closed` does."""
    cdef Py_ssize_t start = i, depth = 0, end
    cdef char_t c
    while i < n:
        c = at[i]
        if c == 34:
            end = _string_end(at, i, n)
            if end < 0:
                return ~i
            i = end
            continue
        if c == 91 or c == 123:
            depth += 1
        elif c == 93 or c == 125:
            depth -= 1
            if not depth:
                return i + 1
        i += 1
    return ~start


cdef Py_ssize_t _tokens(const char_t* at, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i, opened = 0, quotes = 0, escaped = 0
    for i in range(n):
        opened += (at[i] == 91) + (at[i] == 123)
        quotes += at[i] == 34
    for i in range(1, n):
        escaped += (at[i] == 34) & (at[i - 1] == 92)
    quotes -= escaped
    return opened + quotes // 2


def tokens(str text not None) -> int:
    """Return how many lists, objects and strings a JSON text has, if it is one."""
    cdef Py_ssize_t n = PyUnicode_GET_LENGTH(text)
    cdef void* at = PyUnicode_DATA(text)
    cdef int kind = PyUnicode_KIND(text)
    if kind == 1:
        return _tokens(<const uint8_t*>at, n)
    if kind == 2:
        return _tokens(<const uint16_t*>at, n)
    return _tokens(<const uint32_t*>at, n)


def closed(str text not None, Py_ssize_t start) -> int:
    """Return where the list or object at `start` ends, over all that is in it.

    ``~place`` where it has no end: `place` is that of a string without end, or `start`.
    """
    cdef Py_ssize_t n = PyUnicode_GET_LENGTH(text)
    cdef void* at = PyUnicode_DATA(text)
    cdef int kind = PyUnicode_KIND(text)
    if start < 0:
        raise IndexError(f"start: expected an offset, got {start}")
    if kind == 1:
        return _closed(<const uint8_t*>at, start, n)
    if kind == 2:
        return _closed(<const uint16_t*>at, start, n)
    return _closed(<const uint32_t*>at, start, n)


def members(str text not None, Py_ssize_t start):
    """Return {key: (start, end)} of the values of the object at `start`; None if not simple."""
    cdef Py_ssize_t n = 0, i = start, begin, end
    cdef const uint8_t* at = _text(text, &n)
    cdef dict found = {}
    cdef str key
    if at == NULL or start < 0:
        return None
    while i < n and _is_space(at[i]):
        i += 1
    if i >= n or at[i] != 123:
        return None
    i += 1
    while True:
        while i < n and _is_space(at[i]):
            i += 1
        if i >= n:
            return None
        if at[i] == 125:
            return found
        if at[i] != 34:
            return None
        begin = i + 1
        i = begin
        while i < n and at[i] != 34:
            if at[i] < 32 or at[i] == 92:
                return None
            i += 1
        if i >= n:
            return None
        key = PyUnicode_DecodeLatin1(<const char*>at + begin, i - begin, NULL)
        i += 1
        while i < n and _is_space(at[i]):
            i += 1
        if i >= n or at[i] != 58:
            return None
        i += 1
        while i < n and _is_space(at[i]):
            i += 1
        if i >= n:
            return None
        if at[i] == 34:
            end = _string_end(at, i, n)
        elif at[i] == 91 or at[i] == 123:
            end = _closed(at, i, n)
        else:
            end = i
            while end < n and _is_scalar(at[end]):
                end += 1
            if end == i or end < n and at[end] >= 128:
                return None
        if end < 0 or key in found:
            return None
        found[key] = (i, end)
        i = end
        while i < n and _is_space(at[i]):
            i += 1
        if i < n and at[i] == 44:
            i += 1


def unescaped(str text not None, Py_ssize_t start, Py_ssize_t end):
    r"""Return what the string at `start` up to `end` says; None if not simple.

    Simple are the escapes ``\"``, ``\\`` and ``\/``, and no control characters.
    """
    cdef Py_ssize_t n = 0, i, k = 0
    cdef const uint8_t* at = _text(text, &n)
    cdef bytearray out
    cdef uint8_t* to
    cdef uint8_t c
    if at == NULL or not 0 <= start < end - 1 or end > n or at[start] != 34 or at[end - 1] != 34:
        return None
    out = bytearray(end - start)
    to = <uint8_t*><char*>out
    i = start + 1
    while i < end - 1:
        c = at[i]
        if c == 92:
            i += 1
            c = at[i]
            if c != 34 and c != 92 and c != 47 or i == end - 1:
                return None
        elif c < 32 or c == 34:
            return None
        to[k] = c
        k += 1
        i += 1
    return PyUnicode_DecodeLatin1(<const char*>to, k, NULL)


def numbers(str text not None, Py_ssize_t start, Py_ssize_t end, uint64_t limit, out):
    """Put the numbers below `limit` between two places into `out`, and return how many there are.

    -1 where `out` has no room for them, or for as many as there are commas, one is not below
    `limit`, or something else stands there than digits, brackets, commas and spaces.
    """
    view = memoryview(out)
    cdef Py_buffer* given = flat(view, 1, sizeof(uint64_t), True)
    cdef uint64_t* to = <uint64_t*>given.buf
    cdef Py_ssize_t n = 0, count = 0, commas = 0, room = given.shape[0]
    cdef const uint8_t* at = _text(text, &n)
    cdef uint64_t value
    cdef uint8_t c
    cdef int digits
    if at == NULL or start < 0 or end > n:
        return -1
    while start < end:
        c = at[start]
        if 48 <= c <= 57:
            value = 0
            digits = 0
            while start < end and 48 <= at[start] <= 57:
                value = 10 * value + (at[start] - 48)
                digits += 1
                start += 1
                if digits > 19:
                    return -1
            if value >= limit or count >= room:
                return -1
            to[count] = value
            count += 1
        elif c == 44:
            commas += 1
            start += 1
            if commas >= room:
                return -1
        elif c == 91 or c == 93 or _is_space(c):
            start += 1
        else:
            return -1
    return count


cdef Py_ssize_t _number(
    const uint8_t* at, Py_ssize_t i, Py_ssize_t end, uint64_t* value
) noexcept nogil:
    """Read a JSON number from 0 to 10^19 - 1; return where it ends, -1 where there is none."""
    cdef Py_ssize_t first = i
    value[0] = 0
    while i < end and 48 <= at[i] <= 57:
        value[0] = 10 * value[0] + (at[i] - 48)
        i += 1
        if i - first > 19:
            return -1
    if i == first or i > first + 1 and at[first] == 48:
        return -1
    return i


cdef inline Py_ssize_t _skip(const uint8_t* at, Py_ssize_t i, Py_ssize_t end) noexcept nogil:
    while i < end and _is_space(at[i]):
        i += 1
    return i


def byte_list(str text not None, Py_ssize_t start, Py_ssize_t end):
    """Return the bytes that a JSON list of numbers lists; None if it is anything else."""
    cdef Py_ssize_t n = 0, i, k = 0
    cdef const uint8_t* at = _text(text, &n)
    cdef uint64_t value = 0
    cdef bytearray out
    if at == NULL or not 0 <= start < end or end > n or at[start] != 91:
        return None
    out = bytearray((end - start) // 2)
    i = start
    while True:
        i = _number(at, _skip(at, i + 1, end), end, &value)
        if i < 0 or value > 255:
            return None
        out[k] = value
        k += 1
        i = _skip(at, i, end)
        if i == end - 1 and at[i] == 93:
            return bytes(out[:k])
        if i >= end or at[i] != 44:
            return None


def records(str text not None, Py_ssize_t start, Py_ssize_t end, tuple fields not None):
    """Return a list of the rows of a JSON list of objects with nothing but numbers: of `fields`.

    None if it is anything else, or a row lacks a field.
    """
    cdef Py_ssize_t n = 0, i, begin, k, wanted = len(fields)
    cdef const uint8_t* at = _text(text, &n)
    cdef uint64_t value = 0
    cdef list rows = [], row
    cdef str key
    if at == NULL or not 0 <= start < end or end > n or at[start] != 91:
        return None
    i = start
    while True:
        i = _skip(at, i + 1, end)
        if i >= end or at[i] != 123:
            return None
        row = [None] * wanted
        while True:
            i = _skip(at, i + 1, end)
            if i >= end or at[i] != 34:
                return None
            begin = i + 1
            i = begin
            while i < end and at[i] != 34:
                if at[i] < 32 or at[i] == 92:
                    return None
                i += 1
            if i >= end:
                return None
            key = PyUnicode_DecodeLatin1(<const char*>at + begin, i - begin, NULL)
            i = _skip(at, i + 1, end)
            if i >= end or at[i] != 58:
                return None
            i = _number(at, _skip(at, i + 1, end), end, &value)
            if i < 0:
                return None
            for k in range(wanted):
                if fields[k] == key:
                    row[k] = value
            i = _skip(at, i, end)
            if i >= end or at[i] != 125 and at[i] != 44:
                return None
            if at[i] == 125:
                break
        if None in row:
            return None
        rows.append(tuple(row))
        i = _skip(at, i + 1, end)
        if i == end - 1 and at[i] == 93:
            return rows
        if i >= end or at[i] != 44:
            return None


# Registers, big-endian

def swap_runs(data, runs, out):
    """Copy words of `data` into `out`, their bytes in reverse order, and zero the rest of `out`.

    Each run is where it begins in `data`, its bytes, those of a word (1, 2, 4 or 8), and where it
    goes in `out`.

    Raises
    ------
    ValueError
        If a run is not inside.
    """
    views = memoryview(data), memoryview(runs), memoryview(out)
    cdef Py_buffer* source = flat(views[0], 1, 1, False)
    cdef Py_buffer* given = flat(views[1], 2, sizeof(int32_t), False)
    cdef Py_buffer* room = flat(views[2], 1, 1, True)
    cdef Py_ssize_t i
    cdef Run run
    if given.shape[1] != 4:
        raise ValueError(f"runs: expected 4 columns, got {given.shape[1]}")
    memset(room.buf, 0, room.len)
    for i in range(given.shape[0]):
        run = (<const Run*>given.buf)[i]
        if (
            min(run.start, run.target) < 0 or run.length <= 0
            or run.start > source.len - run.length or run.target > room.len - run.length
        ):
            raise ValueError(
                f"runs: expected them in {source.len} and {room.len} bytes, got run {i} outside"
            )
        if run.unit not in (1, 2, 4, 8) or run.length % run.unit:
            raise ValueError(f"runs: expected whole words of 1, 2, 4 or 8 bytes, got run {i}")
        swap_words(
            <const uint8_t*>source.buf + run.start, <uint8_t*>room.buf + run.target, run.length,
            run.unit,
        )


def big_endian(data, places) -> tuple:
    """Return the numbers at places in `data`: an offset and the bytes, up to 8, of each.

    None for one that has a negative offset, or is not inside.
    """
    views = memoryview(data), memoryview(places)
    cdef Py_buffer* source = flat(views[0], 1, 1, False)
    cdef Py_buffer* given = flat(views[1], 2, sizeof(int32_t), False)
    cdef const uint8_t* at = <const uint8_t*>source.buf
    cdef Py_ssize_t i, k
    cdef uint64_t value
    cdef Number place
    cdef list found = []
    if given.shape[1] != 2:
        raise ValueError(f"places: expected 2 columns, got {given.shape[1]}")
    for i in range(given.shape[0]):
        place = (<const Number*>given.buf)[i]
        if (
            place.start < 0 or not 0 < place.length <= 8
            or place.start > source.len - place.length
        ):
            found.append(None)
            continue
        value = 0
        for k in range(place.length):
            value = value << 8 | at[place.start + k]
        found.append(value)
    return tuple(found)


# What is known of bytes already

def holds(bytes data not None, bytes piece not None, Py_ssize_t start, Py_ssize_t end) -> bool:
    """Tell whether `piece` lies in ``data[start:end]``."""
    cdef const char* sought = PyBytes_AS_STRING(piece)
    cdef Py_ssize_t n = PyBytes_GET_SIZE(piece)
    cdef const char* at
    cdef const char* stop
    start, end = max(start, 0), min(end, PyBytes_GET_SIZE(data))
    if start > end:
        return False
    at, stop = PyBytes_AS_STRING(data) + start, PyBytes_AS_STRING(data) + end
    for _ in range(16):  # where its first byte is rare, this takes a tenth of the time
        if n == 0 or stop - at < n:
            return n == 0
        at = <const char*>memchr(at, sought[0], stop - at - n + 1)
        if at == NULL:
            return False
        if memcmp(at, sought, n) == 0:
            return True
        at += 1
    return memmem(at, stop - at, sought, n) != NULL


cdef class Marks:
    """Bytes that must lie at certain places, and pairs of places that must hold the same.

    Parameters
    ----------
    places, fixed : (n,) int64, bytes
    ones, others : (m,) int64
    """

    cdef object views  # which hold what the pointers are into
    cdef const int64_t* place
    cdef const int64_t* one
    cdef const int64_t* other
    cdef Py_ssize_t places, pairs
    cdef bytes fixed
    cdef Py_ssize_t reach

    def __init__(self, places, bytes fixed not None, ones, others):
        self.views = memoryview(places), memoryview(ones), memoryview(others)
        self.place = <const int64_t*>flat(self.views[0], 1, sizeof(int64_t), False).buf
        self.one = <const int64_t*>flat(self.views[1], 1, sizeof(int64_t), False).buf
        self.other = <const int64_t*>flat(self.views[2], 1, sizeof(int64_t), False).buf
        self.places, self.pairs, self.fixed = len(places), len(ones), fixed
        if len(fixed) != len(places) or len(ones) != len(others):
            raise ValueError("marks: expected as many places as bytes, in pairs")
        both = [int(i) for column in (places, ones, others) for i in column]
        if both and min(both) < 0:
            raise ValueError(f"marks: expected places from 0 on, got {min(both)}")
        self.reach = max(both, default=-1) + 1

    def hold(self, bytes data not None, Py_ssize_t start) -> bool:
        """Tell whether they lie in `data`, places counted from `start`."""
        cdef Py_ssize_t i
        cdef const uint8_t* at
        cdef const uint8_t* fixed = <const uint8_t*>PyBytes_AS_STRING(self.fixed)
        if start < 0 or start > PyBytes_GET_SIZE(data) - self.reach:
            return False
        at = <const uint8_t*>PyBytes_AS_STRING(data) + start
        for i in range(self.places):
            if at[self.place[i]] != fixed[i]:
                return False
        for i in range(self.pairs):
            if at[self.one[i]] != at[self.other[i]]:
                return False
        return True
