"""Build the extensions, one for each ``.pyx``; everything else is in pyproject.toml.

XFAST_SANITIZE=address,undefined builds them for ``make san`` (or thread); with CC=clang,
XFAST_SANITIZE=address,fuzzer-no-link for ``make fuzz-engine``.
"""

import os
import platform
import subprocess
import sysconfig
from pathlib import Path

import numpy
from Cython.Build import cythonize
from Cython.Compiler import Options
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64")
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
JOBS = min(4, CPUS)
SANITIZE = os.environ.get("XFAST_SANITIZE")
SANITIZED = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-O1"] if SANITIZE else []

# GCC would call memset for runs of a few lines, which costs more than to write them.
OF_GCC = "-fno-tree-loop-distribute-patterns"
LOOPS = ["-O3", OF_GCC]
FLAGS = {
    "_core": ["-O3"],
    "convert": ["-O3"],
    "peers": ["-O3"],
    "loops_plain": [*LOOPS, "-DXFAST_PLAIN"],
    "loops_baseline": LOOPS,
    "loops_avx2": [*LOOPS, "-mavx2", "-mbmi2"],
    "loops_avx512": [*LOOPS, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mbmi2"],
}
"""The same loops once for each instruction set; `_core` takes one when it is imported.

What is not here reads files or asks the machine: -O2 compiles it in two thirds of the time.
"""

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": False,
    "binding": False,
    "embedsignature": False,
    "freethreading_compatible": True,
}
"""What holds for every Cython file: indices are checked where they come in."""

PLACES = {
    os.getcwd(): ".",
    numpy.get_include(): "numpy",
    sysconfig.get_path("platinclude"): "python",
}
"""What debug information calls these folders, so that what is built is the same everywhere."""

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
        extra_compile_args=[
            "-Wno-unused-function",
            *(f"-ffile-prefix-map={path}={name}" for path, name in PLACES.items()),
            "-g1",  # functions and lines, for whoever has to look into a core of their own
            *FLAGS.get(path.stem, ["-O2"]),
            *SANITIZED,
        ],
        extra_link_args=SANITIZED,
        depends=[path.as_posix(), *INCLUDED],
    )
    for path in [Path("xfast/_core.pyx"), *sorted(ENGINE.glob("*.pyx"))]
    if X86 or not path.stem.startswith("loops_") or path.stem == "loops_plain"
]


Options.warning_errors = True  # above all a loop that has no slot in `Loops`


class build_in_parallel(build_ext):
    """Compile as many extensions at a time as there are CPUs, unless told how many."""

    def finalize_options(self) -> None:
        """Set the number of jobs."""
        super().finalize_options()
        self.parallel = self.parallel or JOBS

    def build_extensions(self) -> None:
        """Leave out what clang takes for an error."""
        told = subprocess.run(
            [*self.compiler.compiler, "--version"], capture_output=True, text=True
        )
        if "clang" in told.stdout:
            for extension in self.extensions:
                flags = extension.extra_compile_args
                extension.extra_compile_args = [flag for flag in flags if flag != OF_GCC]
        super().build_extensions()


setup(
    ext_modules=cythonize(EXTENSIONS, compiler_directives=DIRECTIVES, nthreads=JOBS),
    cmdclass={"build_ext": build_in_parallel},
)
