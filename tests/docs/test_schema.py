"""Every JSON that the program writes is as the published schema says, on all examples."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "docs/schema/xfast-1.json").read_text())
LEAK = "examples/snapshots/q72-kvm-pkru-leak-bv207.qemustate"
HOSTS = "--host examples/hosts amd-milan intel-sapphirerapids@6.12"


@pytest.fixture
def xfast(tmp_path):
    """Return a function that runs xfast in a copy of the examples, with a file that is none."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "bad.save").write_bytes(b"\x00\x01nothing")

    def run(words):
        done = subprocess.run(
            [sys.executable, "-m", "xfast", *words.split()], cwd=tmp_path, capture_output=True,
            text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
        )  # fmt: skip
        assert done.returncode in (0, 1, 3), done.stderr
        return done.stdout

    return run


def validate(name, answer):
    schema = {"$ref": f"#/$defs/{name}", "$defs": SCHEMA["$defs"]}
    jsonschema.Draft202012Validator(schema).validate(answer)


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    named = set(re.findall(r'"#/\$defs/(\w+)"', json.dumps(SCHEMA)))
    assert named <= SCHEMA["$defs"].keys()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("show", "show examples/snapshots bad.save --json"),
        ("check", f"check examples/snapshots bad.save {HOSTS} --json"),
        ("check", f"check examples/snapshots --level strict --json {HOSTS}"),
        ("fix", f"fix {LEAK} --host intel-broadwell@6.12 --dry-run --json"),
        ("fix", "fix examples/snapshots --host amd-milan@6.12 --dry-run --json"),
        ("diff", f"diff {LEAK} examples/snapshots/q72-kvm-bv7-xcr7-smp1.qemustate --json"),
        ("hosts", "host show --json"),
        ("hosts", "host show examples/hosts Skylake-Server EPYC-Milan@6.1 --json"),
        ("hosts", "host dump"),
        ("baseline", "host baseline amd-milan amd-genoa --json"),
        ("baseline", "host baseline examples/hosts --json"),
    ],
)
def test_an_answer_is_as_the_schema_says(xfast, name, words):
    if words == "host dump" and platform.machine() != "x86_64":
        pytest.skip("needs an x86 CPU to describe")
    validate(name, json.loads(xfast(words)))


def test_each_line_of_ndjson_is_as_the_schema_says(xfast):
    lines = xfast(f"check examples/snapshots bad.save {HOSTS} --format ndjson").splitlines()
    assert len(lines) == 7 * 5 + 1
    for line in lines:
        validate("check_line", json.loads(line))


def test_a_change_record_is_as_the_schema_says(xfast, tmp_path):
    xfast(f"fix {LEAK} --host intel-broadwell@6.12 -o fixed")
    validate("record", json.loads((tmp_path / "fixed.xfast.json").read_text()))


def test_a_scan_and_its_report_are_as_the_schema_says(xfast, tmp_path):
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    validate("scan", json.loads(xfast(f"scan examples/snapshots -o results --json -q {HOSTS}")))
    validate("scan", json.loads((tmp_path / "results/manifest.json").read_text()))
    validate("report", json.loads(xfast("report results --format json")))
    pool = json.loads(xfast("host baseline amd-milan examples/hosts --snapshots results --json"))
    validate("baseline", pool)
    assert pool["baseline"]["snapshots"]["obstacles"]


def test_what_the_schema_does_not_know_is_refused():
    with pytest.raises(jsonschema.ValidationError):
        validate("diff", {"schema": "xfast/1", "one": "a", "two": "b", "differences": [], "x": 1})
