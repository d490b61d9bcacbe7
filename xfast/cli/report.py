"""``xfast report``: what a scan has found, as a page or for a ticket."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
from typing import Any

from xfast.cli.arguments import EXIT_CODES, OK
from xfast.fleet.html import page
from xfast.fleet.summary import WORDS, Summary, summarise
from xfast.report.rows import cell
from xfast.report.tally import counted
from xfast.store.staged import write_text

FORMATS = ("html", "md", "csv", "json")
EXAMPLES = f"""\
examples:
  xfast report results/ -o report.html
  xfast report results/ --format md | pbcopy

{EXIT_CODES}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.epilog = EXAMPLES
    parser.add_argument("results", metavar="RESULTS", help="the folder that xfast scan wrote")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="new file (default: standard output)"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="what to write (default: what FILE's name says, else html)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the verb; return the exit code."""
    end = os.path.splitext(args.output or "")[1].lstrip(".")
    form = args.format or (end if end in FORMATS else "html")
    summary = summarise(args.results)
    text = {"html": page, "md": markdown, "csv": table, "json": as_json}[form](summary)
    if args.output is None:
        sys.stdout.write(text)
        return OK
    write_text(args.output, text)
    return OK


def rows(summary: Summary) -> list[dict[str, Any]]:
    """Return a row for each group of snapshots with the same answers."""
    return [
        {
            "snapshots": group.count,
            "example": group.names[0] if group.names else "",
            "class": group.name,
            **dict(zip(summary.hosts, group.words, strict=True)),
        }
        for group in summary.groups
    ]


def markdown(summary: Summary) -> str:
    """Return the matrix and the reasons as Markdown, for a ticket."""
    found = rows(summary)
    heads = ["snapshots", "example", *summary.hosts]
    lines = [
        f"{counted(summary.count, 'snapshot')}, {counted(len(summary.hosts), 'host')}, "
        f"{counted(summary.failed_count, 'input')} not judged.",
        "",
        "| " + " | ".join(_escaped(head) for head in heads) + " |",
        "|" + "---|" * len(heads),
        *("| " + " | ".join(_escaped(row[head]) for head in heads) + " |" for row in found),
        "",
        *(
            f"- **{reason.code}** ({reason.severity}), {counted(reason.snapshots, 'snapshot')}: "
            f"{_escaped(reason.why)}"
            for reason in summary.reasons
        ),
    ]
    return "\n".join(lines) + "\n"


def _escaped(value: object) -> str:
    return "".join("\\" + c if c in "\\|*_`<[&" else c for c in str(value))


def table(summary: Summary) -> str:
    """Return the matrix as CSV."""
    out = io.StringIO()
    names = ["snapshots", "example", "class", *summary.hosts]
    writer = csv.writer(out)
    writer.writerow(map(cell, names))
    for row in rows(summary):
        writer.writerow(cell(row[name]) for name in names)
    return out.getvalue()


def as_json(summary: Summary) -> str:
    """Return all that the page shows as JSON."""
    answer = {
        "schema": "xfast/report/1",
        "snapshots": summary.count,
        "failed": summary.failed_count,
        "hosts": {
            host: {word: counts[word] for word in WORDS}
            for host, counts in summary.by_host().items()
        },
        "groups": rows(summary),
        "findings": [
            {
                "code": reason.code,
                "component": reason.component,
                "severity": reason.severity,
                "fix": reason.fix,
                "why": reason.why,
                "snapshots": reason.snapshots,
                "hosts": sorted(reason.hosts),
            }
            for reason in summary.reasons
        ],
    }
    return json.dumps(answer, indent=1) + "\n"
