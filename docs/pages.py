"""Run the code blocks of the documentation, in a copy of examples/, and compare what they print.

    python docs/pages.py            # report what differs
    python docs/pages.py --update   # write what the program prints now into the pages

A ``console`` block holds commands (``$ xfast ...``) and what they print, standard error included;
a line ``...`` stands for any number of lines. A ``python`` block runs after those above it on its
page, and prints what the ``text`` block right after it says, if there is one. A block that can't
run here follows a comment that says why: ``<!-- not run: needs a cluster -->``.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n+)?```(?P<kind>console|python)\n(?P<text>.*?)^```\n"
    r"(?:\n```text\n(?P<told>.*?)^```\n)?",
    re.S | re.M,
)
END = "\x01"
"""What the shell prints after each command."""


class Ran(NamedTuple):
    """A block that ran: what the page says from `start` on, and what it should say."""

    page: str
    told: str
    found: str
    start: int = 0

    @property
    def same(self) -> bool:
        """Tell whether the page says what was printed; its ``...`` stands for any lines."""
        parts = re.split(r"^ *\.\.\.\n", self.told, flags=re.M)
        return bool(re.fullmatch(r"(?:.*\n)*?".join(map(re.escape, parts)), self.found))


def pages() -> list[Path]:
    """Return the pages whose blocks are run."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def run_page(path: Path, folder: Path) -> Iterator[Ran]:
    """Run the blocks of a page in `folder`, which gets a copy of examples/."""
    shutil.copytree(ROOT / "examples", folder / "examples")
    bin_folder = folder / ".bin"
    bin_folder.mkdir()
    shim = bin_folder / "xfast"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m xfast "$@"\n')
    shim.chmod(0o755)
    names: dict[str, object] = {}
    for block in BLOCK.finditer(path.read_text()):
        if block["why"]:
            continue
        if block["kind"] == "console":
            found = _console(block["text"], folder)
            yield Ran(path.name, block["text"], found, block.start("text"))
        else:
            found = _python(path.name, block["text"], folder, names)
            if block["told"] is not None:
                yield Ran(path.name, block["told"], found, block.start("told"))


def _console(text: str, folder: Path) -> str:
    """Return a block as it should be: its commands, each followed by what it prints now."""
    commands = re.findall(r"^\$ ((?:.*\\\n)*.*)\n", text, re.M)
    script = "".join(f"{one}\n_rc=$?; printf '{END}'; (exit $_rc)\n" for one in commands)
    environment = {
        "PATH": f"{folder / '.bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "80",
        "LC_ALL": "C.UTF-8",
        "HOME": str(folder),
    }
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, text=True, timeout=120,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    printed = done.stdout.split(END)
    return "".join(f"$ {one}\n{out}" for one, out in zip(commands, printed, strict=False))


def _python(name: str, text: str, folder: Path, names: dict[str, object]) -> str:
    """Run Python in `folder`; return what it prints."""
    out = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out):
        exec(compile(text, name, "exec"), names)
    return out.getvalue()


def update(path: Path) -> list[str]:
    """Write what blocks print now into a page; return what could not be."""
    text = path.read_text()
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        for ran in reversed(list(run_page(path, Path(folder)))):
            if ran.same:
                continue
            if re.search(r"^ *\.\.\.$", ran.told, re.M):
                lines = difflib.unified_diff(
                    ran.told.splitlines(), ran.found.splitlines(), "page", "program", lineterm=""
                )
                problems.append(f"{path.name}:\n" + "\n".join(lines))
            else:
                text = text[: ran.start] + ran.found + text[ran.start + len(ran.told) :]
    path.write_text(text)
    return problems


def main() -> int:
    """Compare or update every page; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--update", action="store_true", help="write what is printed now")
    parser.add_argument("pages", nargs="*", type=Path)
    args = parser.parse_args()
    wrong = False
    for path in args.pages or pages():
        if args.update:
            for problem in update(path.resolve()):
                wrong = True
                print(problem)
            continue
        with tempfile.TemporaryDirectory() as folder:
            for ran in run_page(path.resolve(), Path(folder)):
                if not ran.same:
                    wrong = True
                    print(f"{ran.page}: expected\n{ran.told}\ngot\n{ran.found}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
