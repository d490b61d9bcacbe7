"""The command line as people and scripts meet it: answers, exit codes, and one line a fault."""

import csv
import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from xfast.cli.main import main

EXAMPLES = Path(__file__).parents[2] / "examples"
LEAK = EXAMPLES / "snapshots" / "q72-kvm-pkru-leak-bv207.qemustate"
CLEAN = EXAMPLES / "snapshots" / "q72-kvm-bv7-xcr7-smp1.qemustate"
BLOB = EXAMPLES / "snapshots" / "linux517rc5-pkru-leak.xsave"
NO_PKU = "intel-broadwell@6.12"


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)

    def call(*words):
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


def test_the_leak_is_found_named_and_explained(run):
    status, out, err = run("check", LEAK, CLEAN, "--host", NO_PKU)
    assert status == 1
    assert "LEAK: state that the guest may not have" in out
    assert "pkru (value 0x0)" in out
    assert "QEMU 7.2 reports the restore as done" in out
    assert "ad856280ddea" in out
    assert "2 pairs: 1 identical, 1 incompatible; 1 can be fixed without loss" in err


def test_check_json_has_the_fields_of_the_contract(run):
    status, out, _ = run("check", BLOB, "--host", "amd-milan@5.18", "--json")
    answer = json.loads(out)
    assert status == 1
    assert answer["schema"] == "xfast/1"
    (verdict,) = answer["verdicts"]
    assert verdict["snapshot"] == str(BLOB)
    assert verdict["host"] == "amd-milan@5.18"
    assert verdict["verdict"] == "incompatible"
    assert verdict["fixable"] == "safe"
    finding = next(f for f in verdict["findings"] if f["component"] == "pkru")
    assert list(finding) == [
        "code", "component", "vcpu", "severity",
        "snapshot_value", "host_value", "fix", "why", "ref",
    ]  # fmt: skip
    assert finding["code"] == "LEAK"
    assert finding["snapshot_value"] == "0x217"


@pytest.mark.parametrize(
    ("snapshot", "host", "status"),
    [(CLEAN, NO_PKU, 0), (LEAK, NO_PKU, 1), (LEAK, "amd-milan", 3), (LEAK, "amd-milan@6.12", 0)],
)
def test_exit_codes(run, snapshot, host, status):
    assert run("check", snapshot, "--host", host)[0] == status


def test_show_json_has_the_fields_of_the_contract(run):
    status, out, _ = run("show", EXAMPLES / "snapshots" / "q11-max-smp4-q35.qemustate", "--json")
    assert status == 0
    (snapshot,) = json.loads(out)["snapshots"]
    assert snapshot["format"] == "qemu"
    assert [vcpu["vcpu"] for vcpu in snapshot["vcpus"]] == [0, 1, 2, 3]
    third = snapshot["vcpus"][3]
    assert third["xcr0"] == "0x21f"
    assert {"nr": 2, "name": "avx", "state": "live"} in third["components"]
    registers = third["registers"]
    assert registers["mxcsr"] == "0x1fa0"
    assert registers["pkru"] == "0x1234567c"
    assert registers["xmm0"] == "0xa50301000100f00da50301000000f00d"
    assert registers["ymm0"] == "0xa50302000300f00da50302000200f00da50301000100f00da50301000000f00d"
    assert registers["st0"] == "0x4002a50300000000f00d"


def test_show_text_prints_registers_when_asked(run):
    _, plain, _ = run("show", CLEAN)
    _, more, _ = run("show", CLEAN, "--registers")
    assert "avx        live" in plain
    assert "0x55556666777788881111222233334444" not in plain
    assert "0x55556666777788881111222233334444" in more


def test_a_thousand_good_files_and_three_bad_ones(run, tmp_path):
    row = np.fromfile(BLOB, np.uint8)
    for i in range(1000):
        row[160:168].view("<u8")[0] = i + 1
        row.tofile(tmp_path / f"{i:04}.xsave")
    (tmp_path / "empty.xsave").touch()
    (tmp_path / "cut.xsave").write_bytes(row[:1000].tobytes())
    (tmp_path / "noise.qemustate").write_bytes(random.Random(5).randbytes(5000))
    status, out, err = run(
        "check", tmp_path, "--host", "amd-milan@6.12", "--json", "--layout", "intel"
    )
    assert status == 1, "what blocks counts for more than what could not be judged"
    answer = json.loads(out)
    assert len(answer["verdicts"]) == 1000
    assert sorted(error["snapshot"] for error in answer["errors"]) == [
        str(tmp_path / name) for name in ("cut.xsave", "empty.xsave", "noise.qemustate")
    ]
    lines = [line for line in err.splitlines() if ": expected " in line]
    assert len(lines) == 3
    for name, line in zip(("cut", "empty", "noise"), sorted(lines), strict=True):
        assert line.startswith(f"xfast: {tmp_path / name}")
        assert ", got " in line


def test_other_formats(run, tmp_path):
    _, out, _ = run("check", LEAK, CLEAN, "--host", NO_PKU, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert {row["verdict"] for row in rows} == {"identical", "incompatible"}
    _, out, _ = run("check", LEAK, CLEAN, "--host", NO_PKU, "--format", "ndjson")
    assert [json.loads(line)["schema"] for line in out.splitlines()] == ["xfast/1"] * 2


def test_parquet_is_read_back_or_asks_for_its_extra(tmp_path):
    command = [
        sys.executable,
        "-m",
        "xfast",
        "check",
        LEAK,
        "--host",
        NO_PKU,
        "--format",
        "parquet",
    ]
    done = subprocess.run(command, capture_output=True, check=False)
    try:
        from pyarrow import parquet
    except ImportError:
        assert done.returncode == 2
        assert b"xfast[arrow]" in done.stderr
    else:
        table = parquet.read_table(io.BytesIO(done.stdout))
        assert "LEAK" in table["code"].to_pylist()


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["check", LEAK], "--host"),
        (["check", LEAK, "--host", "no-such-host"], "intel-broadwell"),
        (["check", LEAK, "--host", "amd-milan@four"], "6.1.60"),
        (["check", LEAK, "--host", NO_PKU, "--level", "high"], "strict"),
        (["check", LEAK, "--host", NO_PKU, "--ignore", "NOPE"], "HOST-MISSING"),
        (["check", LEAK, "--host", NO_PKU, "--format", "xml"], "ndjson"),
        (["show", BLOB, "--layout", "vax"], "intel"),
        (["show", BLOB, "--size", "many"], "4096"),
        (["frobnicate"], "show"),
        (["check", LEAK, "--host", NO_PKU, "--live"], "--host this"),
    ],
)
def test_wrong_words_cost_one_line_and_exit_code_2(run, words, hint):
    status, _, err = run(*words)
    assert status == 2
    lines = [line for line in err.splitlines() if "pairs" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("xfast: ")
    assert hint in lines[0]


@pytest.mark.parametrize("size", [0, 1, 100, 575, 4095, 50_000])
def test_truncated_streams_are_one_line(run, tmp_path, size):
    cut = tmp_path / "cut.qemustate"
    cut.write_bytes(LEAK.read_bytes()[:size])
    status, _, err = run("show", cut)
    assert status == 3
    assert len(err.splitlines()) == 1
    assert str(cut) in err


def test_standard_input(tmp_path):
    command = [sys.executable, "-m", "xfast", "show", "-", "--json"]
    with LEAK.open("rb") as file:
        done = subprocess.run(command, stdin=file, capture_output=True, check=True)
    assert json.loads(done.stdout)["snapshots"][0]["vcpus"][0]["xstate_bv"] == "0x207"


def test_a_closed_pipe_is_no_traceback():
    command = f"'{sys.executable}' -m xfast show --json '{EXAMPLES / 'snapshots'}' | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
    assert b"Traceback" not in done.stderr


def test_host_directories_and_several_hosts(run, tmp_path):
    shutil.copy(EXAMPLES / "hosts" / "fleet.toml", tmp_path)
    _, out, _ = run("check", CLEAN, "--host", tmp_path, NO_PKU, "--json")
    assert len(json.loads(out)["verdicts"]) == 4


def test_levels_and_ignored_rules(run):
    snapshot = EXAMPLES / "snapshots" / "ch-state.json"
    host = "amd-milan@6.12"
    assert run("check", snapshot, "--host", host)[0] == 1
    ignored = [word for code in ("HOST-MISSING", "XCR0", "LAYOUT") for word in ("--ignore", code)]
    assert run("check", snapshot, "--host", host, *ignored)[0] == 0


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm is not here")
def test_a_real_kvm_confirms_the_verdicts(run):
    _, out, _ = run("check", EXAMPLES / "snapshots", "--live", "--json")
    answers = {Path(v["snapshot"]).name: v.get("live", "") for v in json.loads(out)["verdicts"]}
    assert answers[CLEAN.name] == "KVM accepts"
    assert answers["kernel618-regs64-3thr.core.xz"] == ""
    assert not [answer for answer in answers.values() if "contrary to the prediction" in answer]


@pytest.mark.parametrize("commit", ["ad856280ddea", "8647c52e9504daeb3f6cc1c2e6", "a1020a2"])
def test_the_story_of_the_leak_is_replayed(run, commit):
    status, out, _ = run("explain", commit)
    assert status == 0
    assert "XSTATE_BV 0x207 x87+sse+avx+pkru: the leak" in out
    assert "reported as done, lost x87+sse+avx" in out


def test_an_empty_directory_passes_no_gate(run, tmp_path):
    status, _, err = run("check", tmp_path, "--host", NO_PKU)
    assert status == 3
    assert "got no file that could be one" in err


def test_a_bad_file_among_hosts_costs_one_line(run, tmp_path):
    shutil.copy(EXAMPLES / "hosts" / "fleet.toml", tmp_path)
    (tmp_path / "broken.xml").write_text("<capabilities>")
    os.mkfifo(tmp_path / "pipe")
    status, out, err = run("check", CLEAN, "--host", tmp_path, "--json")
    assert status == 3
    assert len(json.loads(out)["verdicts"]) == 3
    assert len([line for line in err.splitlines() if str(tmp_path) in line]) == 2


def test_a_fifo_is_no_host(run, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert run("check", CLEAN, "--host", tmp_path / "pipe")[0] == 2


@pytest.mark.parametrize("words", ["show", "show --registers", "show --json", "check --host this"])
def test_a_reader_that_leaves_early_is_no_finding(words):
    command = f"'{sys.executable}' -m xfast {words} -- '{CLEAN}' >&-"
    if "--host" in words:
        command = f"'{sys.executable}' -m xfast check '{CLEAN}' --host {NO_PKU} >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
    assert done.returncode == 3
    assert b"Traceback" not in done.stderr
    many = " ".join([f"'{CLEAN}'"] * 200)
    command = (
        f"'{sys.executable}' -m xfast show --registers {many} | head -1; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
    assert done.returncode == 3
    assert b"Traceback" not in done.stderr


def test_file_names_are_bytes_and_never_reach_the_terminal_raw(run, tmp_path):
    for name in (b"a\x1b[31mred.qemustate", b"new\nline.qemustate", b"no-\xff-utf8.qemustate"):
        shutil.copy(CLEAN, os.path.join(os.fsencode(tmp_path), name))
    (tmp_path / "bad\x1b[0m.qemustate").write_bytes(b"QEVM")
    command = [sys.executable, "-m", "xfast", "check", tmp_path, "--host", NO_PKU]
    for form in ("table", "json", "csv"):
        done = subprocess.run([*command, "--format", form], capture_output=True, check=False)
        assert b"Traceback" not in done.stderr
        assert b"\x1b" not in done.stderr
        assert done.returncode == 3
        if form == "table":
            assert b"\x1b" not in done.stdout
            assert rb"a\x1b[31mred.qemustate and 2 more like it" in done.stdout
