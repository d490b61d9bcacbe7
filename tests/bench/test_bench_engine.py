"""The engine's benchmark: that it runs every operation, and says what it should."""

import argparse
import json

import numpy as np
import pytest
import reference

from xfast.bench import engine
from xfast.xsave import area
from xfast.xsave.layout import preset


def run(*words):
    parser = argparse.ArgumentParser()
    engine.add_arguments(parser)
    return engine.run(parser.parse_args(words))


def test_every_operation_runs(capsys):
    status = run("--json", "--memory", "16", "--samples", "2")
    answer = json.loads(capsys.readouterr().out)
    assert answer["schema"] == "xfast/1"
    assert answer["machine"]["isa"] in ("plain", "baseline", "avx2", "avx512")
    rows = answer["engine"]
    wanted = "get_uabi set_uabi compact audit xinuse diff keep relayout"
    assert {row["op"].split()[0] for row in rows} == set(wanted.split())
    assert all(row["ratio"] > 0 and row["ns"] > 0 for row in rows)
    assert status == (0 if all(row["reached"] for row in rows) else 1)


def test_table(capsys):
    run("--memory", "16", "--samples", "2", "--only", "audit")
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["operation", "case", "limit", "ratio", "needed", "ns"]
    assert [line.split()[0] for line in lines] == ["audit", "audit"]


def test_too_little_memory(capsys):
    assert run("--memory", "1") == 2
    assert "--memory: got 1, needed 16 or more" in capsys.readouterr().err


@pytest.mark.parametrize("mix", engine.MIXES)
def test_mixes_are_what_they_say(mix):
    assert sum(engine.MIXES[mix].values()) == pytest.approx(1)
    areas = area.empty(300, 11008)
    engine.fill(areas, engine.INTEL, mix)
    found = {reference.header(row.tobytes())[0] for row in areas}
    assert found <= set(engine.MIXES[mix])
    assert (area.xinuse(areas, preset("intel"), early=True) == area.headers(areas).xstate_bv).all()
    assert not area.audit(areas, engine.KVM_MASK, 0xFFFF).any()
    absent = ~areas[:, 576:832].any(axis=1) | (areas[:, 576] == 0xA5)
    assert (absent | (np.array([reference.header(r.tobytes())[0] for r in areas]) & 4 != 0)).all()
