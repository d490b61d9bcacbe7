"""Build the extensions, one for each ``.pyx``; everything else is in pyproject.toml."""

import platform
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup

X86 = platform.machine().lower() in ("x86_64", "amd64")
# GCC would call memset for runs of a few lines, which costs more than to write them.
LOOPS = ["-O3", "-fno-tree-loop-distribute-patterns"]
FLAGS = {
    "loops_plain": [*LOOPS, "-DXFAST_PLAIN"],
    "loops_baseline": LOOPS,
    "loops_avx2": [*LOOPS, "-mavx2", "-mbmi2"],
    "loops_avx512": [*LOOPS, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mbmi2"],
}
"""The same loops once for each instruction set; `_core` takes one when it is imported."""

ENGINE = Path("xfast/engine")
INCLUDED = [path.as_posix() for end in ("h", "pxi") for path in sorted(ENGINE.glob(f"*.{end}"))]

EXTENSIONS = [
    Extension(
        ".".join(path.with_suffix("").parts),
        [path.as_posix()],
        include_dirs=[numpy.get_include(), ENGINE.as_posix()],
        define_macros=[
            ("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"),
            ("NPY_TARGET_VERSION", "NPY_1_22_API_VERSION"),
        ],
        extra_compile_args=FLAGS.get(path.stem, ["-O3"]),
        depends=[path.as_posix(), *INCLUDED],
    )
    for path in [Path("xfast/_core.pyx"), *sorted(ENGINE.glob("*.pyx"))]
    if X86 or not path.stem.startswith("loops_") or path.stem == "loops_plain"
]

setup(ext_modules=cythonize(EXTENSIONS, language_level=3))
