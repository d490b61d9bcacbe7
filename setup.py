"""Build the extensions, one for each ``xfast/*.pyx``; everything else is in pyproject.toml."""

from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup

EXTENSIONS = [
    Extension(
        f"xfast.{path.stem}",
        [path.as_posix()],
        include_dirs=[numpy.get_include(), "xfast"],
        define_macros=[
            ("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"),
            ("NPY_TARGET_VERSION", "NPY_1_22_API_VERSION"),
        ],
        extra_compile_args=["-O3"],
    )
    for path in sorted(Path("xfast").glob("*.pyx"))
]

setup(ext_modules=cythonize(EXTENSIONS, language_level=3))
