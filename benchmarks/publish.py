"""Bring results.json into the docs: docs/engine.svg, and the tables of docs/performance.md."""

import json
from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).parent
LEFT, WIDTH = 390, 420
MOST = 3.0
COLUMNS = (("xfast[",), ("vectorised",), ("area_by_area", "struct"))
NAMES = {
    "copy": "streaming copy",
    "read": "reading all bytes",
    "read2": "reading both",
    "2 lines": "loading the two lines",
    "1 thread": "one thread",
}


COLOURS = ("#2a7f62", "#3b6ea5", "#b5651d", "#7d4e9e")


def label_of(machine):
    """A machine in a few words."""
    cpu = machine["cpu"].replace("(R)", "").replace(" Processor", "")
    return f"{cpu}, family {machine['family']} model {machine['model']}, {machine['isa']}"


def by_line(recordings):
    """Return {(operation, case, limit): a row or None for each recording}, in order."""
    lines = {}
    for i, recording in enumerate(recordings):
        for row in recording["engine"]:
            key = row["op"], row["case"], row["limit"]
            lines.setdefault(key, [None] * len(recordings))[i] = row
    return lines


def bar(y, row, colour, height):
    """One bar: ratio to the limit, the quartiles as a whisker, and the target as a tick."""

    def x(ratio):
        return LEFT + min(ratio, MOST) / MOST * WIDTH

    beyond = " ▸" if row["ratio"] > MOST else ""
    target = "none" if row["target"] is None else f"{row['target']:g}"
    tick = ""
    if row["target"] is not None:
        tick = f'<path d="M{x(row["target"]):.1f} {y}v{height}" stroke="#222" stroke-width="2"/>'
    return f"""<g>
<title>{row["ratio"]:.2f} (target: {target})</title>
<rect x="{LEFT}" y="{y}" width="{x(row["ratio"]) - LEFT:.1f}" height="{height}" fill="{colour}"/>
<path d="M{x(row["low"]):.1f} {y + height / 2}H{x(row["high"]):.1f}" stroke="#222"/>
{tick}
<text x="{LEFT + WIDTH + 8}" y="{y + height - 1}" font-size="10">{row["ratio"]:.2f}{beyond}</text>
</g>"""


def draw(recordings):
    """Return the plot: each operation against the limit of the machine, a bar a machine."""
    lines = by_line(recordings)
    high = 11
    step = high * len(recordings) + 7
    top = 44 + 16 * len(recordings)
    height = top + step * len(lines) + 16
    bars = []
    for i, (key, rows) in enumerate(lines.items()):
        y = top + 8 + step * i
        op, case, limit = key
        label = f"{op}, {case} ({NAMES.get(limit, limit)})"
        bars.append(f'<text x="{LEFT - 8}" y="{y + high}" text-anchor="end">{escape(label)}</text>')
        bars += [
            bar(y + high * j, row, COLOURS[j % len(COLOURS)], high - 1)
            for j, row in enumerate(rows)
            if row
        ]
    legend = [
        f'<rect x="10" y="{42 + 16 * j}" width="10" height="10" fill="{COLOURS[j % 4]}"/>'
        f'<text x="26" y="{51 + 16 * j}">{escape(label_of(recording["machine"]))}</text>'
        for j, recording in enumerate(recordings)
    ]
    one = LEFT + WIDTH / MOST
    drawn = "\n".join([*legend, *bars])
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="920" height="{height}"
 font-family="sans-serif" font-size="12">
<rect width="100%" height="100%" fill="white"/>
<text x="10" y="18" font-size="14" font-weight="bold">The engine against one core of each</text>
<text x="10" y="34">limit / measured, longer is better; tick: the target; line: quartiles</text>
<path d="M{one} {top}V{height - 12}" stroke="#999" stroke-dasharray="3 3"/>
{drawn}
</svg>
"""


def engine_table(recordings):
    """One line an operation; of each machine the ratio, its target and the nanoseconds."""
    heads = [label_of(recording["machine"]) for recording in recordings]
    yield f"| operation | areas | limit | {' | '.join(heads)} |"
    yield "|---|---|---" + "|---" * len(recordings) + "|"
    for (op, case, limit), rows in by_line(recordings).items():
        cells = [cell_of(row) for row in rows]
        yield f"| {op} | {case} | {NAMES.get(limit, limit)} | {' | '.join(cells)} |"


def cell_of(row):
    if row is None:
        return ""
    if row["target"] is None:
        return f"{row['ratio']:.2f}, {row['ns']:.0f} ns"
    below = ", below" if row["ratio"] < row["target"] else ""
    return f"{row['ratio']:.2f} (target {row['target']:g}{below}), {row['ns']:.0f} ns"


def machine_list(recordings):
    for recording in recordings:
        facts = recording["machine"]
        remark = f": {recording['remark']}" if recording["remark"] else ""
        yield (
            f"- {label_of(facts)}; {facts['cpus']} virtual CPUs, Linux {facts['kernel']}, "
            f"Python {facts['python']}, numpy {facts['numpy']}{remark}."
        )


def fastest(rows, *names):
    """The least nanoseconds of those whose name begins so; empty if there are none."""
    times = [row["ns"] for row in rows if row["who"].startswith(names)]
    return f"{min(times):.0f}" if times else ""


def baseline_table(recordings):
    """One line an operation and batch: xfast, vectorised numpy, and area by area."""
    yield "| operation, areas | machine | xfast | numpy, vectorised | numpy, struct, area by area |"
    yield "|---|---|---|---|---|"
    for op in ("get_uabi", "set_uabi", "compact", "audit", "xinuse", "keep", "diff"):
        for n in (1024, 16384):
            for recording in recordings:
                rows = [
                    row
                    for row in recording["baselines"]
                    if (row["op"], row.get("areas"), row.get("mix")) == (op, n, "mixed")
                ]
                if rows:
                    times = [fastest(rows, *names) for names in COLUMNS]
                    yield f"| {op}, {n} | {recording['machine']['cpu']} | {' | '.join(times)} |"


def fleet_table(fleet):
    """The lines of `xfast bench fleet`."""
    yield f"On {label_of(fleet['machine'])}, {fleet['machine']['cpus']} CPUs."
    yield ""
    yield "| | measured | target | against |"
    yield "|---|---|---|---|"
    for row in fleet["fleet"]:
        sign, unit = "≥" if row["more"] else "≤", row["unit"] or "x"
        missed = "" if row["reached"] else ", missed"
        value = f"{row['ratio']:.3g} {unit} ({row['low']:.3g} to {row['high']:.3g})"
        yield f"| {row['what']} | {value} | {sign} {row['target']:g}{missed} | {row['against']} |"


def main():
    recordings = json.loads((HERE / "results.json").read_text())
    docs = HERE.parent / "docs"
    (docs / "engine.svg").write_text(draw(recordings))
    page = (docs / "performance.md").read_text()
    for name, table in (
        ("machines", machine_list),
        ("engine", engine_table),
        ("baselines", baseline_table),
    ):
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, _, rest = page.partition(start)
        _, _, after = rest.partition(end)
        page = "\n".join([before + start, *table(recordings), end + after])
    start, end = "<!-- fleet -->", "<!-- end of fleet -->"
    before, _, rest = page.partition(start)
    _, _, after = rest.partition(end)
    fleet = json.loads((HERE / "fleet.json").read_text())
    page = "\n".join([before + start, *fleet_table(fleet), end + after])
    (docs / "performance.md").write_text(page)


if __name__ == "__main__":
    main()
