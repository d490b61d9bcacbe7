"""Windows minidumps: real ones with FXSAVE state, made ones with XSTATE, and hostile ones."""

import struct

import numpy as np
import pytest

from xfast import snapshots
from xfast.errors import FormatError, PolicyError
from xfast.snapshots.bytes.source import Source
from xfast.xsave.area import headers
from xfast.xsave.layout import PRESETS
from xfast.xsave.registers import Registers

FLOATS, XSTATE = 0x10000F, 0x40
SIZES = {9: (1232, 48, 256), 0: (716, 0, 204)}
CONFIG = {2: (576, 256), 5: (832, 64), 6: (896, 512), 7: (1408, 1024)}


def context(flags=FLOATS, xstate=b"", machine=9) -> bytes:
    size, flags_at, area_at = SIZES[machine]
    data = bytearray(size)
    struct.pack_into("<I", data, flags_at, flags | (XSTATE if xstate else 0))
    struct.pack_into("<H22xII", data, area_at, 0x27F, 0x1FA0, 0xFFFF)
    data[area_at + 160 : area_at + 176] = bytes(range(16))  # xmm0
    data[area_at + 416 : area_at + 512] = b"\xaa" * 96  # reserved: no state
    if not xstate:
        return bytes(data)
    begin = -(-(size + 24) // 64) * 64
    chunks = (-size, begin + len(xstate), -size, size, begin - size, len(xstate))
    return (bytes(data) + struct.pack("<iIiIiI", *chunks)).ljust(begin, b"\0") + xstate


def xstate(mask: int, xcomp: int = 0, size: int = 2432) -> bytes:
    area = bytearray(size)
    struct.pack_into("<2Q", area, 512, mask & ~3, xcomp)
    area[576 : 576 + 256] = b"\x5a" * 256
    return bytes(area[512:])


def dump(*contexts: bytes, config=None, machine=9, platform=2, extra=()) -> bytes:
    """Return a minidump of threads 100, 101 ... with these contexts."""
    info = bytearray(1364)
    if config:
        struct.pack_into("<2IQ", info, 832, 528, 0, 3 | sum(1 << nr for nr in config))
        for nr, place in config.items():
            struct.pack_into("<2I", info, 848 + 8 * nr, *place)
    system = struct.pack("<H18xI32x", machine, platform)
    streams = [(7, system), (15, bytes(info)), *extra]
    start = 32 + 12 * (len(streams) + 1)
    directory, body = b"", b""
    for kind, data in streams:
        directory += struct.pack("<3I", kind, len(data), start + len(body))
        body += data
    threads_at = start + len(body)
    at = threads_at + 4 + 48 * len(contexts)
    threads = struct.pack("<I", len(contexts))
    for i, data in enumerate(contexts):
        threads += struct.pack("<I36x2I", 100 + i, len(data), at)
        at += len(data)
    directory += struct.pack("<3I", 3, len(threads), threads_at)
    header = struct.pack("<4s3I2IQ", b"MDMP", 0x1234A793, len(streams) + 1, 32, 0, 0, 0)
    return header + directory + body + threads + b"".join(contexts)


def read(path, data: bytes, **options):
    path.write_bytes(data)
    (snapshot,) = snapshots.read(path, **options)
    return snapshot


class TestReal:
    @pytest.mark.parametrize(
        ("name", "writer", "system", "threads"),
        [
            ("calc.dmp", "windows", "windows", [3428, 2596, 2648, 924, 1628]),
            ("linux-mini.dmp", "breakpad", "linux", [1304]),
            ("simple-crashpad.dmp", "crashpad", "macos", [927532]),
            (
                "rm-invalid-parameter.dmp",
                "breakpad",
                "windows",
                [5896, 4944, 14112, 11744, 12044, 13188],
            ),
        ],
    )
    def test_x87_and_sse_of_every_thread(self, shared, name, writer, system, threads):
        path = shared / "samples/thirdparty/minidump" / name
        (snapshot,) = snapshots.read(path)
        assert (snapshot.format, snapshot.kind) == ("minidump", "process")
        assert (snapshot.producer, snapshot.facts["os"]) == (writer, system)
        assert [vcpu.index for vcpu in snapshot.vcpus] == threads
        data = path.read_bytes()
        for vcpu in snapshot.vcpus:
            assert headers(vcpu.area).xstate_bv == 3
            assert vcpu.area[:416].tobytes() in data
            assert not vcpu.area[416:512].any()
            assert int(Registers(vcpu.area, vcpu.layout)["mxcsr"]) & 0x1F80 == 0x1F80


class TestMade:
    def test_reserved_bytes_are_no_state(self, tmp_path):
        (vcpu,) = read(tmp_path / "x", dump(context())).vcpus
        assert not vcpu.area[416:512].any()
        assert Registers(vcpu.area, vcpu.layout)["xmm0"].tobytes() == bytes(range(16))
        assert (vcpu.mode, vcpu.layout_source, vcpu.xcr0) == (64, "format", None)

    def test_a_32_bit_process_has_it_in_extended_registers(self, tmp_path):
        data = dump(context(0x10020, machine=0), context(0x1001F, machine=0), machine=0)
        snapshot = read(tmp_path / "x", data)
        (vcpu,) = snapshot.vcpus
        assert (vcpu.mode, snapshot.facts["threads_without_state"]) == (32, 1)
        assert int(Registers(vcpu.area, vcpu.layout)["mxcsr"]) == 0x1FA0

    def test_xstate_lies_where_the_dump_says(self, tmp_path):
        data = dump(context(xstate=xstate(4)), context(), config=CONFIG)
        first, second = read(tmp_path / "x", data).vcpus
        assert headers(first.area).xstate_bv == 7
        assert (first.layout_source, first.xcr0) == ("note", 0xE7)
        assert first.layout == PRESETS["amd-zen4"].restricted(0xE7)
        registers = Registers(first.area, first.layout)
        assert registers["ymm0"].tobytes() == bytes(range(16)) + b"\x5a" * 16
        assert headers(second.area).xstate_bv == 3

    def test_compacted_xstate_is_read_by_its_header(self, tmp_path):
        data = dump(context(xstate=xstate(4, 1 << 63 | 4, 832)), config=CONFIG)
        (vcpu,) = read(tmp_path / "x", data).vcpus
        assert Registers(vcpu.area, vcpu.layout)["ymm15"].tobytes()[16:] == b"\x5a" * 16

    def test_without_the_dumps_word_the_layout_is_inferred_or_given(self, tmp_path):
        data = dump(context(xstate=xstate(4)))
        assert read(tmp_path / "x", data).vcpus[0].layout_source == "inferred"
        given = read(tmp_path / "x", data, layout=PRESETS["intel"]).vcpus[0]
        assert (given.layout_source, given.layout) == ("given", PRESETS["intel"])

    def test_it_is_read_only(self, tmp_path):
        snapshot = read(tmp_path / "x", dump(context()))
        with (
            Source.open(tmp_path / "x") as source,
            pytest.raises(PolicyError, match="nobody restores"),
        ):
            snapshots.splices(source, snapshot, {0: np.zeros(576, np.uint8)})


def edited(data: bytes, at: int, *values: int) -> bytes:
    out = bytearray(data)
    struct.pack_into(f"<{len(values)}I", out, at, *values)
    return bytes(out)


GOOD = dump(context(), context(xstate=xstate(4)), config=CONFIG)
THREADS = GOOD.index(struct.pack("<2I", 2, 100))


class TestHostile:
    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (GOOD[:20], "expected 16"),
            (edited(GOOD, 4, 0xA794), "expected minidump version 0xa793"),
            (edited(GOOD, 8, 1 << 31), "expected up to 4096 streams"),
            (edited(GOOD, 12, 1 << 31), "expected 36"),
            (edited(GOOD, 36, 1 << 30), "expected stream 7 to end at"),
            (edited(GOOD, 36, 8), "expected a stream 7 of 24 bytes or more, got 8"),
            (edited(GOOD, 44, 7), "expected one stream 7, got 2"),
            (edited(GOOD, 32, 99), "it has no stream SYSTEM_INFO"),
            (edited(GOOD, 56, 99), "it has no list of threads"),
            (edited(GOOD, THREADS, 1 << 30), "expected a list of up to 65536 threads"),
            (edited(GOOD, THREADS + 4 + 40, 1 << 31), "a CONTEXT of its own for each thread"),
            (edited(GOOD, THREADS + 4 + 44, 1 << 31), "expected"),
            (dump(context(0x100007)), "can't be judged: .* got 1 threads without"),
            (dump(context(0x8)), "can't be judged"),
            (dump(context()[:1000]), "can't be judged"),
            (dump(), "can't be judged"),
            (dump(context(), machine=12), "can't be judged: expected x86, got ARM64"),
            (dump(context(), machine=77), "got processor architecture 0x4d"),
            (dump(context(xstate=xstate(1 << 40))), "header with known components"),
            (dump(context(xstate=bytes(10))), "expected XSTATE inside a CONTEXT"),
            (dump(context(), config={2: (576, 256), 5: (600, 64)}), "overlap"),
            (dump(context(xstate=bytes(1 << 17))), "expected a CONTEXT of up to"),
        ],
    )
    def test_one_clear_line(self, tmp_path, data, words):
        with pytest.raises(FormatError, match=words) as caught:
            read(tmp_path / "x", data)
        assert "\n" not in str(caught.value)

    def test_every_cut_is_one_line(self, tmp_path):
        for end in range(4, len(GOOD), 97):
            with pytest.raises(FormatError):
                read(tmp_path / "x", GOOD[:end])

    def test_threads_that_share_one_context_can_not_multiply_it(self, tmp_path):
        """65,536 list entries at one CONTEXT of 64 KiB would have been 4 GiB of areas."""
        data = bytearray(dump(*[context()] * 500))
        at = data.index(struct.pack("<2I", 500, 100)) + 4
        for i in range(500):
            struct.pack_into("<2I", data, at + 48 * i + 40, 60_000, 2048)
        with pytest.raises(FormatError, match="of its own"):
            read(tmp_path / "x", bytes(data))
