"""Draw docs/check.svg: the matrix of ``xfast check`` on the examples, as the program prints it.

python docs/make_picture.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "check examples/snapshots --host examples/hosts intel-icelake-server@6.12"
COLOURS = {"ok": "#3fb950", "risk": "#d29922", "fix": "#58a6ff", "no": "#f85149", "?": "#bc8cff"}
"""Of each word of the matrix, readable on the dark ground."""
CHAR, LINE, EDGE = 8.4, 19, 16


def answer() -> list[str]:
    """Return the lines of the summary, the matrix and the legend as they are printed now."""
    done = subprocess.run(
        [sys.executable, "-m", "xfast", *COMMAND.split()], cwd=ROOT, text=True, check=False,
        capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"},
    )  # fmt: skip
    return done.stdout.split("\n\nLEAK")[0].splitlines()


def draw(lines: list[str]) -> str:
    """Return the picture of a terminal with these lines."""
    lines = [f"$ xfast {COMMAND}", *lines]
    width = round(max(map(len, lines)) * CHAR + 2 * EDGE)
    height = len(lines) * LINE + 2 * EDGE
    rows = []
    for number, line in enumerate(lines):
        marked = re.search(r"^(.*?)((?:  +(?:ok|risk|fix|no|\?))+)$", line)
        legend = re.match(r"(ok|risk|fix|no|\?) {2,}", line)
        if marked:
            text = escape(marked[1]) + re.sub(r"ok|risk|fix|no|\?", _coloured, marked[2])
        elif legend:
            text = _coloured(legend) + escape(line[len(legend[1]) :])
        else:
            text = escape(line)
        weight = ' font-weight="bold"' if number == 0 else ""
        y = EDGE + (number + 0.75) * LINE
        rows.append(f'<text x="{EDGE}" y="{y:g}" xml:space="preserve"{weight}>{text}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="xfast check: snapshots by hosts">\n'
        f'<rect width="{width}" height="{height}" rx="8" fill="#0d1117"/>\n'
        '<g font-family="ui-monospace,SFMono-Regular,Menlo,Consolas,monospace" font-size="14" '
        'fill="#e6edf3">\n' + "\n".join(rows) + "\n</g>\n</svg>\n"
    )


def _coloured(word: re.Match[str]) -> str:
    name = word[1] if word.re.groups else word[0]
    return f'<tspan fill="{COLOURS[name]}">{name}</tspan>'


if __name__ == "__main__":
    (ROOT / "docs" / "check.svg").write_text(draw(answer()))
