"""A stream's memory from one pipe to another, as quickly as `cat` would do it.

The pipe that it comes through is made small before its writer can go on, and large again only
where guest memory is known to follow. What the writer may have put there unseen is then little.

*Source*: pipe(7), "Pipe capacity"; fcntl(2), F_SETPIPE_SZ: EBUSY if it holds more than it is to.
"""

from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memmove, strerror
from posix.unistd cimport read, write

from xfast.engine.flat cimport flat
from xfast.engine.walk cimport Walker

cdef extern from "fcntl.h" nogil:
    int fcntl(int fd, int command, ...)

cdef extern from "poll.h" nogil:
    enum:
        POLLIN
        POLLOUT
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long n, int timeout)

cdef enum:
    F_SETPIPE_SZ = 1031
    FRESH = 1 << 16
    LAST = 1 << 20

# The writer goes on to the devices right behind the last part of guest memory, which takes no
# longer through a small pipe than a few milliseconds. Behind another part it has to stop the
# guest first, so that the small pipe is there in time if that part is seen to end.


cdef int wait_for(int fd, short events, int problem) except -1:
    """Return when a call that failed may be made again.

    Raises
    ------
    OSError
        If it failed for good.
    """
    cdef pollfd one
    if problem == EAGAIN:
        one.fd, one.events = fd, events
        with nogil:
            poll(&one, 1, -1)
    elif problem != EINTR:
        raise OSError(problem, strerror(problem).decode())
    PyErr_CheckSignals()
    return 0


cdef Py_ssize_t read_some(
    int fd, uint8_t *into, Py_ssize_t size, int capacity, bint *narrow
) except -1:
    cdef Py_ssize_t count
    cdef int problem = 0, done = -1
    while True:
        with nogil:
            count = read(fd, into, size)
            if count < 0:
                problem = errno
            if capacity:
                done = fcntl(fd, F_SETPIPE_SZ, capacity)
        narrow[0] = done > 0
        if count >= 0:
            return count
        wait_for(fd, POLLIN, problem)


cdef int write_some(int fd, const uint8_t *data, Py_ssize_t size) except -1:
    cdef Py_ssize_t count
    cdef int problem = 0
    while size:
        with nogil:
            count = write(fd, data, size)
            if count < 0:
                problem = errno
        if count < 0:
            wait_for(fd, POLLOUT, problem)
            continue
        data += count
        size -= count
    return 0


def read_and_narrow(int fd, into, int capacity):
    """Read what a pipe holds and, before its writer can go on, let it hold less.

    Parameters
    ----------
    fd : int
    into : writable buffer
        Larger than what the pipe holds, so that it is left empty.
    capacity : int
        Bytes that it may hold from then on; 0 if it is no pipe.

    Returns
    -------
    tuple of int, bool
        How many bytes were read, and whether the pipe holds no more than `capacity` now: it does
        not where the writer was faster, or `fd` is no pipe.

    Raises
    ------
    OSError
        If it can't be read.
    """
    cdef bint narrow = False
    view = memoryview(into)
    cdef Py_buffer *room = flat(view, 1, 1, True)
    cdef Py_ssize_t count = read_some(fd, <uint8_t *>room.buf, room.len, capacity, &narrow)
    return count, narrow


def write_all(int fd, data):
    """Write all of `data`, also where `fd` does not wait by itself.

    Raises
    ------
    OSError
        If it can't be written: the reader went away.
    """
    view = memoryview(data)
    cdef Py_buffer *given = flat(view, 1, 1, False)
    write_some(fd, <const uint8_t *>given.buf, given.len)


def pass_memory(
    Walker walker not None, int source, int target, buffer, Py_ssize_t have, int small, int large,
    watch,
):
    """Pass a stream on up to its first device, or its end.

    Parameters
    ----------
    walker : Walker
        It has come to `buffer`'s beginning.
    source, target : int
    buffer : writable buffer
    have : int
        Bytes of `buffer` that were read already.
    small, large : int
        What the pipe may hold where devices may follow, and what it may hold else (bytes); 0 if
        `source` is no pipe. It is small when this begins.
    watch : callable or None
        Called before each read, with `source` and the bytes so far.

    Returns
    -------
    tuple of int, bool
        Bytes of `buffer` that were read and not passed on, and whether the pipe is small. Where
        the walker has not stopped the stream has ended.

    Raises
    ------
    OSError
        If it can't be read or written.
    """
    cdef Py_ssize_t count, done, size
    cdef uint64_t enough
    cdef bint narrow = small > 0
    view = memoryview(buffer)
    cdef Py_buffer *room = flat(view, 1, 1, True)
    cdef uint8_t *data = <uint8_t *>room.buf
    if not 0 <= have <= room.len:
        raise ValueError(f"have: expected 0 to {room.len} bytes, got {have}")
    while not walker.stopped:
        if watch is not None:
            watch(source, walker.position)
        size = room.len - have
        if narrow and size > small:
            size = small
        count = read_some(source, data + have, size, small, &narrow)
        if not count:
            break
        have += count
        done = walker.over(data, have)
        enough = LAST if walker.last else FRESH
        if narrow and walker.under_way() > enough:
            fcntl(source, F_SETPIPE_SZ, large)
            narrow = False
        write_some(target, data, done)
        have -= done
        memmove(data, data + done, have)
    return have, narrow
