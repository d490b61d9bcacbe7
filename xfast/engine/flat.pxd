"""What a caller hands over through the buffer protocol: checked, and held until it is let go.

Typed memoryviews would do the same, and make each file that has one half a megabyte of C longer.
"""

from cpython.buffer cimport PyBuffer_IsContiguous
from cpython.memoryview cimport PyMemoryView_GET_BUFFER


cdef inline Py_buffer *flat(object view, int ndim, Py_ssize_t itemsize, bint writes) except NULL:
    """Return what `view`, a memoryview, holds for as long as it lives.

    Raises
    ------
    ValueError
        If it has other dimensions or items, has gaps, or can't be written to.
    """
    cdef Py_buffer *buffer = PyMemoryView_GET_BUFFER(view)
    if buffer.ndim != ndim or buffer.itemsize != itemsize:
        raise ValueError(
            f"expected {ndim} dimensions of {itemsize}-byte items, "
            f"got {buffer.ndim} of {buffer.itemsize}"
        )
    if not PyBuffer_IsContiguous(buffer, b"C"):
        raise ValueError("expected a contiguous buffer, got one with gaps")
    if writes and buffer.readonly:
        raise ValueError("expected a writable buffer, got a read-only one")
    return buffer
