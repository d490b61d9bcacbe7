"""Other Cython code may build upon the engine: a small outside module, compiled and run."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import xfast
from xfast.xsave import area
from xfast.xsave.layout import PRESETS

OUTSIDE = """
# cython: language_level=3, freethreading_compatible=True
from libc.stdint cimport uint8_t, uint64_t
from xfast.engine.convert cimport Converter, convert_one
from xfast._core cimport Table, audit_one, diff_one, keep_one, xinuse_one

def try_all(Table table, Converter how, uint8_t[::1] one, uint8_t[::1] two):
    cdef const uint8_t *src = &one[0]
    cdef uint8_t *dst = &two[0]
    cdef Py_ssize_t n = one.shape[0], m = two.shape[0]
    cdef uint64_t lost, used, differing, dropped
    cdef int faults
    with nogil:
        faults = audit_one(src, n, 0x7, 0xFFFF)
        used = xinuse_one(src, n, &table.slots, True)
        lost = convert_one(how, src, n, dst, m)
        differing = diff_one(src, n, &table.slots, dst, m, &table.slots)
        dropped = keep_one(dst, m, &table.slots, 0x3, True)
    return faults, used, lost, differing, dropped
"""

BUILD = """
import sys
import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
outside = Extension("outside", ["outside.pyx"], include_dirs=[numpy.get_include()])
setup(name="outside", ext_modules=cythonize([outside], include_path=[sys.argv.pop()]))
"""


def test_an_outside_module(tmp_path, monkeypatch):
    pytest.importorskip("Cython", reason="needs Cython to compile a module")
    (tmp_path / "outside.pyx").write_text(OUTSIDE)
    (tmp_path / "setup.py").write_text(BUILD)
    where = [str(Path(xfast.__file__).parents[1])]  # editable installs are not on the path
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace", *where],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-3000:]
    monkeypatch.syspath_prepend(str(tmp_path))
    import outside

    layout = PRESETS["intel"]
    one = np.full(2752, 0x11, np.uint8)
    one[24:32] = (0x80, 0x1F, 0, 0, 0xFF, 0xFF, 0, 0)
    one[512:576] = 0
    one[512:514] = (0x07, 0x02)
    two = np.empty(4096, np.uint8)
    how = area.converter(layout, layout)
    assert outside.try_all(area.table_of(layout), how, one, two) == (1, 0x207, 0, 0, 0x204)
    assert two[160:416].tobytes() == one[160:416].tobytes()
    assert not two[576:832].any()
