"""Rows between pages that may not be touched: a byte outside of them ends the process."""

import ctypes
import mmap

import numpy as np

PAGE = mmap.PAGESIZE

libc = ctypes.CDLL(None, use_errno=True)


def between_guards(n, size, at_end):
    """`n` packed rows that end, or begin, at a page that may not be touched."""
    pages = -(-n * size // PAGE)
    block = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(block))
    for guard in (start, start + (pages + 1) * PAGE):
        assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), 0) == 0
    first = PAGE + (pages * PAGE - n * size if at_end else 0)
    return np.frombuffer(block, np.uint8)[first : first + n * size].reshape(n, size)
