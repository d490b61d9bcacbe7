"""Draw docs/engine.svg from results.json: each operation against the limit of the machine."""

import json
from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).parent
LEFT, WIDTH, LINE = 290, 420, 22
MOST = 3.0
SHOWN = ("copy", "read", "read2", "2 lines", "1 thread")
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
    return f"""<g>
<title>{escape(label)}: {row["ratio"]:.2f} x {NAMES[row["limit"]]}; needed {row["target"]:g}</title>
<text x="{LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(label)}</text>
<rect x="{LEFT}" y="{y}" width="{x(row["ratio"]) - LEFT:.1f}" height="15" fill="{colour}"/>
<path d="M{x(row["low"]):.1f} {y + 7.5}H{x(row["high"]):.1f}" stroke="#222"/>
<path d="M{x(row["target"]):.1f} {y - 2}v19" stroke="#222" stroke-width="2"/>
<text x="{LEFT + WIDTH + 8}" y="{y + 12}">{row["ratio"]:.2f}{beyond}  ({NAMES[row["limit"]]})</text>
</g>"""


def main():
    results = json.loads((HERE / "results.json").read_text())
    rows = [row for row in results["engine"] if row["limit"] in SHOWN]
    height = 64 + LINE * len(rows)
    facts = results["machine"]
    title = f"Cold areas against the limits of one core: {facts.get('cpu', 'unknown CPU')}"
    bars = "\n".join(bar(50 + LINE * i, row) for i, row in enumerate(rows))
    one = LEFT + WIDTH / MOST
    svg = f"""<svg xmlns="http://www.w3.org/2000/svg" width="920" height="{height}"
 font-family="sans-serif" font-size="12">
<rect width="100%" height="100%" fill="white"/>
<text x="10" y="18" font-size="14" font-weight="bold">{escape(title)}</text>
<text x="10" y="36">limit / measured, longer is better; tick: the target; line: quartiles</text>
<line x1="{one}" x2="{one}" y1="44" y2="{height - 12}" stroke="#999" stroke-dasharray="3 3"/>
{bars}
</svg>
"""
    (HERE.parent / "docs/engine.svg").write_text(svg)


if __name__ == "__main__":
    main()
