"""Write `docs/skips.md`: what the suite leaves out on which machine, from the runs themselves.

    python -m pytest > run.log
    python docs/make_skips.py --add "NAME of the machine" run.log

The page holds one column a machine; a run with a name that is there takes its place. What a run
says is taken from pytest's summary: the counts, and a line for each reason to skip.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

PAGE = Path(__file__).with_name("skips.md")

SKIPPED = re.compile(r"^SKIPPED \[(\d+)\] (tests/\S+?\.py)(?::\d+)?: (.*)$", re.MULTILINE)
FAILED = re.compile(r"\d+ (failed|error)")

HEAD = """# What the suite skips, and where

Written by `docs/make_skips.py` from runs of the suite; a number is how many tests a reason skips
on a machine. A green run proves what it did not skip: what has a number in every column is proved
nowhere.

"""

Skips = Counter[tuple[str, str]]


def parse_run(text: str) -> Skips:
    """Return {(file, reason): tests skipped} of one run's output.

    Raises
    ------
    ValueError
        If the text is not of a run that finished, or a test failed in it.
    """
    last = next((line for line in reversed(text.splitlines()) if " passed" in line), "")
    if not last or FAILED.search(last):
        raise ValueError(f"expected a run without failures, got {last!r:.80}")
    skips: Skips = Counter()
    for number, path, reason in SKIPPED.findall(text):
        skips[path.removeprefix("tests/"), reason.replace("|", "/")] += int(number)
    return skips


def parse_page(text: str) -> dict[str, Skips]:
    """Return {machine: skips} of a page that was written before."""
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith("|") and not line.startswith("|-")
    ]
    machines = rows[0][2:] if rows else []
    runs: dict[str, Skips] = {name: Counter() for name in machines}
    for path, reason, *cells in rows[1:]:
        for name, cell in zip(machines, cells, strict=True):
            if cell:
                runs[name][path, reason] = int(cell)
    return runs


def render(runs: dict[str, Skips]) -> str:
    """Return the page for {machine: skips}."""
    lines = ["| file | reason | " + " | ".join(runs) + " |", "|---|---|" + "---:|" * len(runs)]
    for path, reason in sorted(set().union(*runs.values())):
        cells = (str(skips[path, reason] or "") for skips in runs.values())
        lines.append(f"| {path} | {reason} | " + " | ".join(cells) + " |")
    return HEAD + "\n".join(lines) + "\n"


def main(name: str, log: Path) -> None:
    """Add a machine's run to the page."""
    runs = parse_page(PAGE.read_text("utf-8")) if PAGE.exists() else {}
    runs[name] = parse_run(log.read_text("utf-8", "replace"))
    PAGE.write_text(render(runs), "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--add", metavar="NAME", required=True, help="the machine of the run")
    parser.add_argument("log", type=Path, help="what pytest printed")
    arguments = parser.parse_args()
    try:
        main(arguments.add, arguments.log)
    except ValueError as error:
        sys.exit(f"{arguments.log}: {error}")
