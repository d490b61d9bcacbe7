"""Bring results.json into the docs: docs/engine.svg, and the tables of docs/performance.md."""

import json
from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).parent
LEFT, WIDTH, LINE = 290, 420, 22
MOST = 3.0
COLUMNS = (("xfast[",), ("vectorised",), ("area_by_area", "struct"))
NAMES = {
    "copy": "streaming copy",
    "read": "reading all bytes",
    "read2": "reading both",
    "2 lines": "loading the two lines",
    "1 thread": "one thread",
}


def bar(y, row):
    """One bar: ratio to the limit, the quartiles as a whisker, and the need as a tick."""

    def x(ratio):
        return LEFT + min(ratio, MOST) / MOST * WIDTH

    colour = "#2a7f62" if row["ratio"] >= row["target"] else "#b5651d"
    beyond = " ▸" if row["ratio"] > MOST else ""
    label = f"{row['op']}, {row['case']}"
    limit = NAMES.get(row["limit"], row["limit"])
    return f"""<g>
<title>{escape(label)}: {row["ratio"]:.2f} x {limit}; needed {row["target"]:g}</title>
<text x="{LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(label)}</text>
<rect x="{LEFT}" y="{y}" width="{x(row["ratio"]) - LEFT:.1f}" height="15" fill="{colour}"/>
<path d="M{x(row["low"]):.1f} {y + 7.5}H{x(row["high"]):.1f}" stroke="#222"/>
<path d="M{x(row["target"]):.1f} {y - 2}v19" stroke="#222" stroke-width="2"/>
<text x="{LEFT + WIDTH + 8}" y="{y + 12}">{row["ratio"]:.2f}{beyond}  ({limit})</text>
</g>"""


def draw(results):
    """Return the plot: each operation against the limit of the machine."""
    rows = results["engine"]
    height = 64 + LINE * len(rows)
    title = f"The engine against the limits of one core: {results['machine']['cpu']}"
    bars = "\n".join(bar(50 + LINE * i, row) for i, row in enumerate(rows))
    one = LEFT + WIDTH / MOST
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="920" height="{height}"
 font-family="sans-serif" font-size="12">
<rect width="100%" height="100%" fill="white"/>
<text x="10" y="18" font-size="14" font-weight="bold">{escape(title)}</text>
<text x="10" y="36">limit / measured, longer is better; tick: the target; line: quartiles</text>
<path d="M{one} 44V{height - 12}" stroke="#999" stroke-dasharray="3 3"/>
{bars}
</svg>
"""


def engine_table(results):
    yield "| operation | areas | limit | limit / measured | target | ns an area |"
    yield "|---|---|---|---|---|---|"
    for row in results["engine"]:
        limit = NAMES.get(row["limit"], row["limit"])
        mark = "" if row["ratio"] >= row["target"] else " (below)"
        yield (
            f"| {row['op']} | {row['case']} | {limit} | {row['ratio']:.2f}{mark} "
            f"| {row['target']:g} | {row['ns']:.0f} |"
        )


def fastest(rows, *names):
    """The least nanoseconds of those whose name begins so; empty if there are none."""
    times = [row["ns"] for row in rows if row["who"].startswith(names)]
    return f"{min(times):.0f}" if times else ""


def baseline_table(results):
    """One line an operation and batch: xfast, vectorised numpy, and area by area."""
    yield "| operation, areas | xfast | numpy, vectorised | numpy or struct, area by area |"
    yield "|---|---|---|---|"
    for op in ("get_uabi", "set_uabi", "compact", "audit", "xinuse", "keep", "diff"):
        for n in (1024, 16384):
            rows = [
                row
                for row in results["baselines"]
                if (row["op"], row.get("areas"), row.get("mix")) == (op, n, "mixed")
            ]
            times = [fastest(rows, *names) for names in COLUMNS]
            yield f"| {op}, {n} | {' | '.join(times)} |"


def main():
    results = json.loads((HERE / "results.json").read_text())
    docs = HERE.parent / "docs"
    (docs / "engine.svg").write_text(draw(results))
    page = (docs / "performance.md").read_text()
    for name, table in (("engine", engine_table), ("baselines", baseline_table)):
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, _, rest = page.partition(start)
        _, _, after = rest.partition(end)
        page = "\n".join([before + start, *table(results), end + after])
    (docs / "performance.md").write_text(page)


if __name__ == "__main__":
    main()
