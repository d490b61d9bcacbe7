"""Check what a wheel holds: python wheel_contents.py WHEEL. Ends with a line for what is wrong."""

import re
import sys
import zipfile

NEEDED = (
    r"xfast/_core\.[\w.\-]+\.so",
    r"xfast/_core\.pxd",
    r"xfast/_core\.pyi",
    r"xfast/py\.typed",
    r"xfast/engine/loops_plain\.[\w.\-]+\.so",
    r"xfast/engine/simd\.h",
    r"xfast/hosts/catalogue\.toml",
    r"xfast/messages/messages\.toml",
    r"xfast/fleet/report\.css",
    r"xfast-[\w.]+\.dist-info/licenses/LICENSE",
    r"xfast-[\w.]+\.dist-info/entry_points\.txt",
)
FOREIGN = r"(^|/)(tests|benchmarks|fuzz|docs)/|\.(c|pyx|pxi|o)$|__pycache__"

PRIVATE = rb"/(?:home|root|tmp|Users)/[\w./-]*"
"""Where a program was built is nobody's business, and differs from build to build."""


def problems(wheel):
    """Yield a line for each thing that is missing or should not be there."""
    names = wheel.namelist()
    for pattern in NEEDED:
        if not any(re.fullmatch(pattern, name) for name in names):
            yield f"missing: {pattern}"
    for name in names:
        if re.search(FOREIGN, name):
            yield f"not to be in a wheel: {name}"
        if name.endswith(".so") and (path := re.search(PRIVATE, wheel.read(name))):
            yield f"{name}: expected no path of the machine it was built on, got {path[0].decode()}"


if __name__ == "__main__":
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        found = list(problems(wheel))
    sys.exit("\n".join(found) or 0)
