"""The models against recordings of real kernels and CPUs: every ioctl, byte, errno and fault.

`kvm.jsonl.xz` was recorded on Linux 6.18.44 on an AMD Zen 4, `kvm-zen3.jsonl.xz` on one with a
Zen 3 and PKRU; both have a vendor module that rewrites the CPUID lists it is given.
`kvm-pkru.jsonl.xz` is of twelve kernels from 5.10 to 7.3, on two emulated CPUs with PKRU. The
instructions are of a Zen 4 (`hw`), a Zen 3 (`hw-zen3`), a Sapphire Rapids (`hw-intel`), an Emerald
Rapids with PKRU and both operand sizes (`hw-emerald`), and of emulated Intel CPUs (`emu`).
"""

import base64
import json
import lzma
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import replay

SCRIPT = Path(replay.__file__)


def replayed(path):
    """Return how many recordings of a file were played, and what was checked; nothing differs."""
    played, checked, taken = replay.play_all(replay.read(path))
    wrong = [f"{record['id']}: {texts}" for record, texts in played if texts]
    assert not wrong, "\n".join(wrong[:20])
    return len(played), checked, taken


@pytest.mark.parametrize(
    ("name", "count"),
    [("hw", 286), ("hw-zen3", 428), ("hw-intel", 800), ("hw-emerald", 400), ("emu", 1557)],
)
def test_every_instruction_is_reproduced(data, name, count):
    played, _, taken = replayed(data / "vectors" / f"{name}.jsonl.xz")
    assert played == count
    # these recordings name no model: they agree on Sapphire Rapids' width
    assert len(taken) == (name == "hw-intel")


def test_every_sequence_of_6_18_on_zen4(data):
    sequences, checked, _ = replayed(data / "kvm/kvm.jsonl.xz")
    assert sequences == checked["replays"] == 355
    assert checked["GET_XSAVE"] == 671
    assert checked["SET_XSAVE"] == 609
    assert checked["SET_CPUID2"] == 368
    # the lists that depend on the recording machine: its vendor module rewrote them
    assert checked["rewritten"] == 268


def test_every_sequence_of_6_18_on_zen3_with_pkru(data):
    sequences, checked, _ = replayed(data / "kvm/kvm-zen3.jsonl.xz")
    assert sequences == checked["replays"] == 118
    assert checked["GET_XSAVE"] == 394
    assert checked["SET_XSAVE"] == 203
    assert checked["VMM_WRPKRU"] == 56
    assert checked["RUN_IMMEDIATE_EXIT"] == 103


def test_every_sequence_of_twelve_kernels_with_pkru(data):
    sequences, checked, _ = replayed(data / "kvm/kvm-pkru.jsonl.xz")
    assert sequences == 2083
    assert checked["replays"] == 6609
    assert checked["GET_XSAVE"] == 13847
    assert checked["SET_XSAVE"] == 9717
    assert checked["effective"] == 7471
    assert checked["RUN_CODE"] == 529


@pytest.mark.parametrize(
    ("folder", "name"), [("vectors", "hw"), ("vectors", "hw-zen3"), ("vectors", "emu"),
                         ("kvm", "kvm-zen3")]
)  # fmt: skip
def test_the_copies_are_the_shared_recordings(shared, data, folder, name):
    original = replay.read(shared / "vectors" / f"{name}.jsonl")
    assert replay.read(data / folder / f"{name}.jsonl.xz") == original


# The script


def script(*paths):
    done = subprocess.run(
        [sys.executable, SCRIPT, *paths], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


def changed(record, key, at):
    """Return a recording with one bit of a buffer's byte `at` flipped."""
    buffer = bytearray(replay.unpack(record[key]))
    buffer[at] ^= 1
    return record | {key: "z:" + base64.b64encode(zlib.compress(bytes(buffer))).decode()}


@pytest.fixture
def zen3(data):
    return replay.read(data / "vectors/hw-zen3.jsonl.xz")


def written(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_script_tells_how_many_differ_and_which(data, zen3, tmp_path):
    saves = [record for record in zen3 if record["op"] == "XSAVE64"][:4]
    plain = written(tmp_path / "plain.jsonl", [*saves[:3], changed(saves[3], "out", 100)])
    code, lines, _ = script(plain)
    assert code == 1
    assert lines[0] == "4 recordings, 1 differ"
    assert saves[3]["id"] in lines[1]
    assert "the first at 100" in lines[1]


def test_the_script_takes_files_of_several_schemas(data, zen3, tmp_path):
    plain = written(tmp_path / "plain", zen3[:3])
    code, lines, _ = script(plain, data / "kvm/kvm-zen3.jsonl.xz", data / "vectors/hw.jsonl.xz")
    assert (code, lines) == (0, ["407 recordings, 0 differ"])


def test_a_sequence_that_differs_is_told_with_its_operation(data, tmp_path):
    with lzma.open(data / "kvm/kvm-zen3.jsonl.xz", "rt") as file:
        record = json.loads(file.readline())
    record["ops"] = [{"op": "GET_XCRS", "errno": 0, "nr": 1, "flags": 0, "xcrs": [[0, 7]]}]
    code, lines, _ = script(written(tmp_path / "one.jsonl", [record]))
    assert (code, lines[0]) == (1, "1 recordings, 1 differ")
    assert "op 0 GET_XCRS: XCRs [(0, 1)], recorded [(0, 7)]" in lines[1]


def test_of_a_machine_that_is_not_listed_the_width_is_what_its_recordings_have(zen3, tmp_path):
    records = [{k: v for k, v in r.items() if k not in ("family", "model")} for r in zen3]
    code, lines, told = script(written(tmp_path / "unknown.jsonl", records))
    assert (code, lines) == (0, ["428 recordings, 0 differ"])
    assert "'x87_pointer_bits': 48" in told
    assert "'pkru_always_modified': True" in told


def test_a_line_that_no_schema_has_is_one_that_differs(zen3, tmp_path):
    code, lines, _ = script(written(tmp_path / "odd.jsonl", [zen3[0], {"id": "odd", "op": "HLT"}]))
    assert (code, lines[0]) == (1, "2 recordings, 1 differ")
    assert "odd HLT: can't be played" in lines[1]
