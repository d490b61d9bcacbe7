"""Measure what the worst files of each format cost, and print the table of docs/security.md.

``python fuzz/costs.py`` on a machine that does nothing else: CPU seconds and peak memory of a
process that reads one file, for files of 1 and 8 MiB as they are, and for what 8 MiB pack to.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests" / "helpers")]

from backports import zstd  # noqa: E402
from bombs import BOMBS  # noqa: E402

SIZES = {"1 MiB": (1 << 20) - 20_000, "8 MiB": (8 << 20) - 20_000, "8 MiB, packed": 8 << 20}
PACKED_LIMIT = 1 << 20

READ = """
import re, sys, time
sys.path.insert(0, sys.argv[2])
from xfast import snapshots
from xfast.errors import XfastError
for name in snapshots.FORMATS:
    snapshots.format_named(name)
begin = time.process_time()
try:
    snapshots.read(sys.argv[1])
except XfastError:
    pass
seconds = time.process_time() - begin
with open("/proc/self/status") as file:
    print(seconds, int(re.search(r"VmHWM:\\s+(\\d+) kB", file.read())[1]) / 1024)
"""


def cost(path: Path) -> tuple[float, float]:
    """Return the CPU seconds and the peak memory (MiB) that reading a file takes."""
    command = [sys.executable, "-c", READ, str(path), str(HERE.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, memory = map(float, done.stdout.split())
    return seconds, memory


def worst(bombs: tuple[Callable[[int], dict[str, bytes]], ...], size: str) -> Iterator[str]:
    """Yield what the costliest of these files takes: time with its name, and memory."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for bomb in bombs:
            ((name, data),) = bomb(SIZES[size]).items()
            if "packed" in size:
                data = zstd.compress(data)
                if len(data) > PACKED_LIMIT:
                    continue
            path = Path(folder, name)
            path.write_bytes(data)
            found.append((*cost(path), bomb.__name__))
    seconds, _, name = max(found)
    yield f"{seconds:.2f} ({name})"
    yield f"{max(memory for _, memory, _ in found):.0f}"


def main() -> None:
    """Print the table."""
    titles = [f"{size}: {what}" for size in SIZES for what in ("s", "MiB")]
    print("| format |", " | ".join(titles), "|")
    print("|---|" + "--:|" * len(titles))
    for name, bombs in BOMBS.items():
        row = [cell for size in SIZES for cell in worst(bombs, size)]
        print("|", " | ".join([name or "none", *row]), "|", flush=True)
    (model,) = set(re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()))
    print(f"\n{model}, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
