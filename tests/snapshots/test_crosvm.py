"""crosvm's vCPUs, made here after crosvm's source: no real file was to be had."""

import json
import time

import numpy as np
import pytest
from snapshot_files import area, cbor, crosvm_vcpu

from xfast import snapshots
from xfast.errors import FormatError

AREA = area(1, 4096)
CBOR, JSON = cbor, lambda value: json.dumps(value).encode()


def read(path, data: bytes):
    path.write_bytes(data)
    (snapshot,) = snapshots.read(path)
    return snapshot


@pytest.mark.parametrize("pack", [CBOR, JSON], ids=["cbor", "json"])
def test_a_vcpu(tmp_path, pack):
    more = {"sregs": {"cr4": 0x440000}, "msrs": {0xDA0: 0x800, 0x1C4: 0x40000}}
    snapshot = read(tmp_path / "vcpu3", pack(crosvm_vcpu(3, AREA, **more)))
    (vcpu,) = snapshot.vcpus
    assert (snapshot.format, snapshot.kind, vcpu.index) == ("crosvm", "vm", 3)
    assert (vcpu.xcr0, vcpu.xss, vcpu.xfd, vcpu.pkru_enabled) == (7, 0x800, 0x40000, True)
    assert vcpu.area.tobytes() == AREA
    assert vcpu.layout_source == "inferred"


def test_a_length_that_is_no_multiple_of_a_word_cuts_the_last(tmp_path):
    state = crosvm_vcpu(0, AREA)
    state["xsave"]["len"] = 4095
    assert read(tmp_path / "vcpu0", cbor(state)).vcpus[0].area.tobytes() == AREA[:4095]


def test_a_vcpu_that_is_missing_is_told(tmp_path):
    folder = tmp_path / "vcpu"
    folder.mkdir()
    for i in (0, 2):
        (folder / f"vcpu{i}").write_bytes(cbor(crosvm_vcpu(i, AREA)))
    with pytest.raises(FormatError, match=r"expected vCPUs 0 to 1, got \[0, 2\]"):
        snapshots.read(folder)


GOOD = cbor(crosvm_vcpu(0, AREA))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (GOOD[:200], "got the end|within the data"),
        (cbor(crosvm_vcpu(0, AREA, xsave=None)), "expected xsave.data"),
        (cbor(crosvm_vcpu(0, AREA, xsave={"data": ["x"], "len": 576})), "expected xsave.data"),
        (cbor(crosvm_vcpu(0, AREA, xsave={"data": [1 << 32], "len": 576})), "32-bit"),
        (cbor(crosvm_vcpu(0, AREA, xsave={"data": [0] * 1024, "len": 4097})), "expected xsave.len"),
        (cbor(crosvm_vcpu(0, AREA, msrs={"x": 1})), "numbers of registers"),
        (cbor(crosvm_vcpu(0, AREA, msrs={1: "x"})), "64-bit values"),
        (cbor(crosvm_vcpu(0, area(1, 4096, 1 << 40))), "known components"),
        (JSON(crosvm_vcpu(0, AREA))[:100], "found damage"),
        (cbor({"vcpu_id": 0, **{str(i): 0 for i in range(5)}}), "expected xsave.data"),
        (b"\xa9\x67vcpu_id" + b"\x81" * 100, "16 deep"),
        (b"\xa9\x67vcpu_id\x9b" + b"\xff" * 8, "within the data"),
        (b"\xa9\x67vcpu_id\x9f", "a known length"),
        (b"\xa9\x67vcpu_id\xf8\x20", "got simple 24"),
        (b'{"vcpu_id":' + b"[" * 100_000, "found damage"),
    ],
)
def test_one_clear_line(tmp_path, data, words):
    with pytest.raises(FormatError, match=words) as caught:
        read(tmp_path / "vcpu0", data)
    assert "\n" not in str(caught.value)


def test_a_megabyte_of_items_is_refused_at_once(tmp_path):
    start = time.process_time()
    with pytest.raises(FormatError, match="expected up to 131072 items"):
        read(tmp_path / "vcpu0", b"\xa9\x67vcpu_id\x9a\x00\x0f\x00\x00" + bytes(0xF0000))
    assert time.process_time() - start < 2


@pytest.mark.parametrize("value", [0, 23, 24, 255, 256, 1 << 16, 1 << 32, (1 << 64) - 1])
def test_numbers_of_every_width(tmp_path, value):
    state = crosvm_vcpu(0, AREA, msrs={0xDA0: value})
    assert read(tmp_path / "vcpu0", cbor(state)).vcpus[0].xss == value
    assert np.array_equal(read(tmp_path / "vcpu0", cbor(state)).vcpus[0].area[:4], [0x7F, 3, 0, 0])
