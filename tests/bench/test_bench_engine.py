"""The engine's benchmark: that it runs every operation, and says what it should."""

import argparse
import json

import numpy as np
import pytest
import reference

from xfast.bench import engine, targets
from xfast.bench.engine import fill
from xfast.bench.targets import class_of, target_of
from xfast.engine import peers
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
    wanted = "get_uabi set_uabi compact audit xinuse diff keep relayout classify group"
    assert {row["op"].split()[0] for row in rows} == set(wanted.split())
    assert all(row["ratio"] > 0 and row["ns"] > 0 for row in rows)
    assert status == (0 if all(row["reached"] for row in rows) else 1)


def test_table(capsys):
    run("--memory", "16", "--samples", "2", "--only", "audit")
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["operation", "case", "limit", "ratio", "target", "ns"]
    assert [line.split()[0] for line in lines] == ["audit", "audit"]


def test_too_little_memory(capsys):
    assert run("--memory", "1") == 2
    assert "--memory: expected 16 or more, got 1" in capsys.readouterr().err


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


def test_each_cpu_has_its_targets():
    assert class_of("AuthenticAMD", 25, 17, "avx512") == targets.ZEN4
    assert class_of("AuthenticAMD", 26, 2, "avx512") == targets.ZEN4
    assert class_of("AuthenticAMD", 25, 1, "avx2") == targets.ZEN3
    assert class_of("AuthenticAMD", 25, 0x50, "avx2") == targets.ZEN3
    assert class_of("AuthenticAMD", 23, 49, "avx2") == targets.ZEN3
    assert class_of("GenuineIntel", 6, 143, "avx512") == targets.INTEL


def test_a_cpu_of_no_class_is_not_told_that_it_falls_short():
    for cpu in (
        ("GenuineIntel", 6, 154, "avx2"),
        ("AuthenticAMD", 25, 17, "avx2"),
        ("AuthenticAMD", 25, 1, "baseline"),
        ("None", 0, 0, "plain"),
    ):
        assert class_of(*cpu) is None
    assert target_of("audit", "mixed, 4096", "read", None) is None
    row = engine.Row("audit", "mixed, 4096", "read", None, 0.1, 0.1, 0.1, 1.0)
    assert row.reached


def test_each_target_belongs_to_a_line():
    lines = {
        (c.op, f"{c.mix}, {c.size}" + (f" -> {c.out_size}" if c.out_size else ""), c.limit)
        for c in engine.cold_cases()
    }
    assert set(targets.TARGETS) <= lines
    names = {
        (op, f"{mix}, 4096", name.split()[0])
        for mix in ("mixed", "full")
        for op, name in engine.PEERS
    }
    assert set(targets.ANY_CPU) == names


@pytest.mark.parametrize("name", peers.PEERS)
def test_peers_give_the_engines_answers(name):
    rows, images = area.empty(97, 4096), area.empty(97, 4096)
    for mix in ("full", "mixed", "64 keys"):
        fill(rows, engine.INTEL, mix)
        fill(images, engine.INTEL, "full", seed=3)
        run = {
            "Linux set": engine._set().merge,
            "Xen compress": engine._compact().convert,
        }.get(name, engine._get().convert)
        engine.check_peer(name, run, rows, images)
    with pytest.raises(AssertionError, match="differ"):
        engine.check_peer(name, lambda src, out: out.fill(0), rows, images)


def test_peers_refuse_what_they_would_trip_over():
    table = area.table_of(engine.INTEL)
    how = {"mask": 7, "software": 0, "mxcsr_mask": 0}
    rows, out = area.empty(2, 4096), area.empty(2, 4096)
    with pytest.raises(ValueError, match="name: expected one of Linux get"):
        peers.run("BSD", table, rows, out, **how)
    with pytest.raises(ValueError, match="expected 2 areas of 2752 bytes"):
        peers.run("QEMU", table, rows, out[:, :2696], **how)
    rows[1, 514] = 4
    with pytest.raises(ValueError, match=r"src\[1\]: expected components 0 to 9"):
        peers.run("Linux get", table, rows, out, **how)
