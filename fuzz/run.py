"""Fuzz the targets, coverage-guided (atheris), and print what came of it, a line a target.

``python fuzz/run.py --seconds 600 [TARGET...]``; the package is the one beside this folder, or what
XFAST_BUILT has, whose C may be built for coverage too (``make fuzz-engine``). Each target runs in a
process of its own. New inputs go to the corpus's working folder; the small corpus in
``fuzz/corpus`` is read, and replayed by ``--replay``, which measures the lines and branches that it
covers (coverage.py).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
BUILT = os.environ.get("XFAST_BUILT", str(HERE.parent))
sys.path[:0] = [str(HERE), BUILT, str(HERE.parent / "tests" / "helpers")]
INPUT_LIMIT = 1 << 16
SECONDS_AN_INPUT = 10
MEMORY_LIMIT = 2048


def fuzz_one(name: str, work: Path, seconds: int) -> None:
    """Fuzz a target in this process until the time is up, or something is found."""
    import atheris

    with atheris.instrument_imports(include=["xfast"]):
        import mutators
        import targets
    target = targets.TARGETS[name]
    for data in target.seeds():
        digest = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        (work / f"seed-{digest[:12]}").write_bytes(data[:INPUT_LIMIT])
    corpus = HERE / "corpus" / name
    folders = [str(work), *([str(corpus)] if corpus.is_dir() else [])]
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={INPUT_LIMIT}",
        f"-timeout={12 * SECONDS_AN_INPUT}",  # on the clock, whoever else has the CPU
        f"-rss_limit_mb={MEMORY_LIMIT}",
        f"-artifact_prefix={work.parent}/{name}-",
        "-print_final_stats=1",
    ]

    def run(data: bytes) -> None:
        begin = time.process_time()
        target.run(data)
        assert time.process_time() - begin < SECONDS_AN_INPUT

    mutate = mutators.mutator(name)
    atheris.Setup([sys.argv[0], *options, *folders], run, custom_mutator=mutate)
    atheris.Fuzz()


def replay(name: str, work: Path) -> str:
    """Return how much of the target's modules the inputs of both corpora cover."""
    import coverage

    measured = coverage.Coverage(branch=True, source=["xfast"], data_file=None)
    measured.start()  # before the import: definitions are lines too
    import targets

    target = targets.TARGETS[name]
    files = [*work.glob("*"), *(HERE / "corpus" / name).glob("*")]
    for data in [*target.seeds(), *(path.read_bytes() for path in files)]:
        target.run(data)
    measured.stop()
    rows = []
    for module in sorted(measured.get_data().measured_files()):
        numbers = measured._analyze(module).numbers
        dotted = ".".join(Path(module).with_suffix("").parts)
        if numbers.n_executed and any(f"{wanted}." in f"{dotted}." for wanted in target.modules):
            rows.append(f"{Path(module).stem} {numbers.pc_covered:.0f} %")
    return f"{len(files)} inputs: {', '.join(rows)}"


def summary(name: str, log: str, seconds: float, status: int) -> str:
    """Return a line of figures from libFuzzer's log."""
    runs = re.findall(r"stat::number_of_executed_units:\s+(\d+)", log) or re.findall(r"#(\d+)", log)
    edges = re.findall(r"cov: (\d+)", log)
    found = "nothing" if status == 0 else f"exit {status}, see the log"
    return (
        f"{name}: {seconds:.0f} s, {runs[-1] if runs else 0} inputs, "
        f"{edges[-1] if edges else 0} edges, found {found}"
    )


def main() -> int:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="TARGET")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--work", type=Path, default=Path("/tmp/xfast-fuzz"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--replay", action="store_true", help="measure coverage, fuzz nothing")
    args = parser.parse_args()
    if args.one and args.replay:
        print(f"{args.one}: {replay(args.one, args.work / args.one)}")
        return 0
    if args.one:
        fuzz_one(args.one, args.work / args.one, args.seconds)
        return 0
    import targets

    worst = 0
    for name in args.names or targets.TARGETS:
        work = args.work / name
        work.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, "--one", name, "--work", args.work]
        if args.replay:
            worst = max(worst, subprocess.run([*command, "--replay"]).returncode)
            continue
        begin = time.monotonic()
        with open(args.work / f"{name}.log", "w+") as log:
            done = subprocess.run(
                [*command, "--seconds", str(args.seconds)], stdout=log, stderr=log
            )
            log.seek(0)
            print(summary(name, log.read(), time.monotonic() - begin, done.returncode), flush=True)
        worst = max(worst, done.returncode)
    return 1 if worst else 0


if __name__ == "__main__":
    sys.exit(main())
