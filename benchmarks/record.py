"""Record results.json: the engine against the limits of this machine, and the baselines.

python benchmarks/record.py [--samples N] [--without-baselines] [--remark TEXT]; takes some minutes
on an otherwise idle machine. The file holds one recording for each CPU (vendor, family, model and
instruction set); this one takes the place of an earlier one of the same CPU.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from xfast.bench import engine

HERE = Path(__file__).parent


def baselines():
    """Run the benchmarks of this folder; return {operation, who, areas, mix, ns}."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", str(HERE), f"--benchmark-json={report}",
             "--benchmark-max-time=0.2", "--benchmark-min-rounds=3"],
            check=True,
            stdout=sys.stderr,
        )  # fmt: skip
        results = json.loads(report.read_text())["benchmarks"]
    return [
        {
            "op": Path(result["fullname"]).name.partition(".py")[0].removeprefix("test_"),
            "who": result["name"].removeprefix("test_"),
            **result["extra_info"],
            "ns": result["stats"]["median"] / result["extra_info"].get("areas", 1) * 1e9,
        }
        for result in results
    ]


def rounded(row):
    return {key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()}


def key_of(recording):
    return [recording["machine"].get(name) for name in ("vendor", "family", "model", "isa")]


def as_text(recordings):
    """Return the JSON, a line a result, so that changes can be read."""

    def lines(rows):
        return "[\n" + ",\n".join(f"   {json.dumps(row)}" for row in rows) + "\n  ]"

    return (
        "[\n"
        + ",\n".join(
            "\n".join(
                (
                    " {",
                    f'  "machine": {json.dumps(recording["machine"])},',
                    f'  "remark": {json.dumps(recording["remark"])},',
                    f'  "engine": {lines(recording["engine"])},',
                    f'  "baselines": {lines(recording["baselines"])}',
                    " }",
                )
            )
            for recording in recordings
        )
        + "\n]\n"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--memory", type=int, default=1024, help="MiB of each buffer")
    parser.add_argument("--without-baselines", action="store_true")
    parser.add_argument("--remark", default="", help="what else the machine was doing")
    args = parser.parse_args()
    rows = []
    for row in engine.run_all(args.memory << 20, args.samples):
        print(row, file=sys.stderr)
        rows.append(rounded(asdict(row)))
    found = {
        "machine": engine.machine(),
        "remark": args.remark,
        "engine": rows,
        "baselines": [] if args.without_baselines else list(map(rounded, baselines())),
    }
    path = HERE / "results.json"
    others = [other for other in json.loads(path.read_text()) if key_of(other) != key_of(found)]
    path.write_text(as_text([*others, found]))


if __name__ == "__main__":
    main()
