"""Record results.json: the engine against the limits of this machine, and the baselines.

python benchmarks/record.py [--samples N]; takes some minutes on an otherwise idle machine.
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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=32)
    args = parser.parse_args()
    rows = []
    for row in engine.run_all(samples=args.samples):
        print(row, file=sys.stderr)
        rows.append(rounded(asdict(row)))
    found = {
        "machine": engine.machine(),
        "engine": rows,
        "baselines": list(map(rounded, baselines())),
    }
    lines = [json.dumps(found["machine"])]
    for name in ("engine", "baselines"):
        lines.append("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in found[name]) + "\n ]")
    (HERE / "results.json").write_text(
        '{{\n "machine": {},\n "engine": {},\n "baselines": {}\n}}\n'.format(*lines)
    )


if __name__ == "__main__":
    main()
