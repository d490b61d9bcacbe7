"""The benchmark of the fleet path runs, checks its answers and says what was missed."""

import json
from pathlib import Path

import pytest

from xfast.bench import fleet
from xfast.cli.main import main

EXAMPLES = Path(__file__).parents[2] / "examples" / "snapshots"
STREAM = EXAMPLES / "q72-kvm-pkru-leak-bv207.qemustate"
BLOB = EXAMPLES / "linux517rc5-pkru-leak.xsave"


def test_every_line_is_measured(capsys):
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    words = ["bench", "fleet", str(STREAM), str(BLOB), "--samples", "3", "--json"]
    status = main([*words, "--areas", "600", "--streams", "40"])
    answer = json.loads(capsys.readouterr().out)
    rows = answer["fleet"]
    assert [row["what"].split(",")[0].split(" of ")[0] for row in rows] == [
        "QEMU stream", "QEMU stream", "raw area", "raw area and its companions", "stack", "stack",
        "stack", "stack", "memory for a stack", "xfast.check", "xfast.check", "scan", "memory",
    ]  # fmt: skip
    assert all(row["ratio"] > 0 and row["low"] <= row["ratio"] for row in rows[:12])
    assert status == (0 if all(row["reached"] for row in rows) else 1)


def test_a_reader_that_answers_otherwise_is_not_timed(monkeypatch):
    answers = iter(range(100))
    monkeypatch.setattr(fleet, "_answers", lambda *_: next(answers))
    with pytest.raises(AssertionError, match="expected the first answer, got another"):
        next(fleet.run_all({"raw area": BLOB.read_bytes()}, 3, 600, 0))


def test_more_and_less():
    assert fleet.Row("", "", 3, 2.9, 0, 0, 0).reached
    assert not fleet.Row("", "", 3, 3.1, 0, 0, 0).reached
    assert fleet.Row("", "", 1.8, 1.9, 0, 0, 0, more=True).reached
