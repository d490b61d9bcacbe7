"""Firecracker's vmstate: both shapes, its checksum, and the releases that can't be read."""

import random
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xfast import snapshots
from xfast.engine import vmstate
from xfast.errors import FormatError, PolicyError
from xfast.snapshots import firecracker
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.firecracker import crc64
from xfast.xsave.layout import PRESETS

XCRS_SIZE = 8 + 392
SREGS_BEFORE_XCRS = 8 + 64 + 8 + 312
"""vcpu_events and sregs precede xcrs, each behind its length."""
SHAPES = ["fc-bincode1-v4.vmstate", "fc-bincode2-v8.vmstate"]


def slow_crc64(data: bytes) -> int:
    """Return CRC-64/Jones, bit by bit."""
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x95AC9329AC4BC9B5 if crc & 1 else 0)
    return crc


def sealed(data: bytes) -> bytes:
    return data + struct.pack("<Q", crc64(data))


def write(path, data: bytes):
    path.write_bytes(sealed(data))
    return path


@pytest.fixture(params=SHAPES)
def body(request, data) -> bytearray:
    """Return a sample without its checksum."""
    return bytearray((data / "vmm" / request.param).read_bytes()[:-8])


class TestChecksum:
    def test_check_value(self):
        """The check value of CRC-64/Redis, which is Jones's polynomial too."""
        assert crc64(b"123456789") == 0xE9C6D914C4B8D9CA

    @given(st.binary(max_size=200))
    def test_against_a_slow_one(self, data):
        assert crc64(data) == slow_crc64(data)
        assert crc64(sealed(data)) == 0

    @pytest.mark.parametrize("most", range(3))
    def test_by_tables_and_by_folding(self, most):
        """Of every length about those where another loop takes over."""
        rng = random.Random(most)
        for length in (*range(600), *range(760, 780), *range(1020, 1030), 5000):
            data = rng.randbytes(length)
            assert vmstate.crc64(data, most) == slow_crc64(data), length

    def test_of_the_samples(self, data):
        for name in SHAPES:
            assert crc64((data / "vmm" / name).read_bytes()) == 0

    def test_a_flipped_bit_anywhere_is_seen(self, tmp_path, body):
        path = tmp_path / "vmstate"
        for at in (40, 3000, len(body) - 1):
            image = bytearray(sealed(body))
            image[at] ^= 0x10
            path.write_bytes(image)
            with pytest.raises(FormatError, match=r"expected the CRC64 0x.*, got 0x"):
                snapshots.read(path)


class TestVcpus:
    @pytest.mark.parametrize(
        ("name", "version", "release"),
        [(SHAPES[0], "4.0.0", "1.10.1"), (SHAPES[1], "8.0.0", "1.13 or 1.14")],
    )
    def test_context(self, data, name, version, release):
        (snapshot,) = snapshots.read(data / "vmm" / name)
        assert snapshot.facts == {"version": version, "release": release}
        for vcpu in snapshot.vcpus:
            assert (vcpu.xcr0, vcpu.xss, vcpu.xfd, vcpu.pkru_enabled) == (0xE7, None, None, False)
            assert vcpu.msrs == (0x10, 0x174)
            assert (len(vcpu.cpuid.entries), vcpu.cpuid.xcr0) == (75, 0xE7)
            assert vcpu.layout_source == "cpuid"
            assert vcpu.layout.restricted(0xE7) == PRESETS["amd-zen4"].restricted(0xE7)

    def test_msrs_and_cr4(self, tmp_path, body):
        """IA32_XSS, IA32_XFD and CR4.PKE, where the file has them."""
        first = body.find(firecracker.XCRS)
        sregs = first - SREGS_BEFORE_XCRS
        assert body[sregs : sregs + 8] == struct.pack("<Q", 312)
        body[sregs + 8 + 248 : sregs + 8 + 256] = struct.pack("<Q", 1 << 22)
        rows = ((0xDA0, 0, 0x1800), (0x1C4, 0, 1 << 18))
        msrs = struct.pack("<QIIQ", 8, 2, 0, 2)
        msrs += b"".join(struct.pack("<QIIQ", 16, *row) for row in rows)
        at = sregs - 8 - 144
        (snapshot,) = snapshots.read(write(tmp_path / "vmstate", body[:at] + msrs + body[at:]))
        one, two = snapshot.vcpus
        assert (one.xss, one.xfd, one.pkru_enabled) == (0x1800, 1 << 18, True)
        assert one.msrs == (0x10, 0x174, 0x1C4, 0xDA0)
        assert (two.xss, two.xfd, two.pkru_enabled) == (None, None, False)

    def test_an_area_with_amx_tiles(self, tmp_path, data):
        """Firecracker 1.12 and later keep what is beyond 4096 bytes behind its own length."""
        body = (data / "vmm" / SHAPES[1]).read_bytes()[:-8]
        area = body.find(firecracker.XCRS) + XCRS_SIZE + 16
        tail = bytes(range(256)) * 27
        words = struct.pack("<Q", len(tail) // 4)
        image = body[: area - 8] + words + body[area : area + 4096] + words + tail
        path = write(tmp_path / "vmstate", image + body[area + 4096 + 8 :])
        (snapshot,) = snapshots.read(path)
        assert [vcpu.area.size for vcpu in snapshot.vcpus] == [4096 + len(tail), 4096]
        assert snapshot.vcpus[0].area[4096:].tobytes() == tail
        new = snapshot.vcpus[0].area.copy()
        new[[513, 5000]] ^= 1
        with Source.open(path) as source, open(tmp_path / "out", "w+b") as file:
            source.rewrite(firecracker.splices(source, snapshot, {0: new}), file)
        (again,) = snapshots.read(tmp_path / "out")
        assert np.array_equal(again.vcpus[0].area, new)

    def test_an_edit_renews_the_checksum_and_keeps_the_length(self, data, tmp_path):
        path = data / "vmm" / SHAPES[0]
        (snapshot,) = snapshots.read(path)
        shorter = snapshot.vcpus[0].area[:2432].copy()
        shorter[512] = 7
        with Source.open(path) as source:
            edits = firecracker.splices(source, snapshot, {0: shorter})
            with pytest.raises(PolicyError, match="area of at most 4096 bytes, got 4160"):
                firecracker.splices(source, snapshot, {0: np.zeros(4160, np.uint8)})
        assert [(edit.field, len(edit.new)) for edit in edits] == [("vcpu 0 area", 1), ("crc64", 8)]


class TestOthers:
    def test_releases_are_named(self, tmp_path, body):
        path = tmp_path / "vmstate"
        for major, words in ((1, "1.0.0"), (7, "7.0.0"), (9, "9.0.0")):
            image = body[:16] + str(major).encode() + body[17:]
            with pytest.raises(
                FormatError, match=f"expected snapshot version 2.x.* got {words}.*can't be judged"
            ):
                snapshots.read(write(path, image))
        image = struct.pack("<QH", firecracker.MAGIC | 1, 5) + bytes(100)
        with pytest.raises(FormatError, match=r"versionize snapshot .Firecracker 1\.6 or before"):
            snapshots.read(write(path, image))
        with pytest.raises(FormatError, match="expected a snapshot of x86_64, got one of aarch64"):
            snapshots.read(write(path, struct.pack("<Q", firecracker.MAGIC_ARM) + bytes(100)))

    def test_bitcode_is_known_by_its_checksum(self, tmp_path):
        """1.15 and later have no magic, but the whole file's CRC64 is still 0."""
        path = write(tmp_path / "vmstate", bytes(range(1, 200)))
        with pytest.raises(FormatError, match=r"bitcode snapshot \(Firecracker 1.15 or later\)"):
            snapshots.read(path)
        path.write_bytes(bytes(400))
        with pytest.raises(FormatError, match="not a snapshot format that xfast knows"):
            snapshots.read(path)
        with pytest.raises(FormatError, match=r"expected Firecracker 1\.8 to 1\.14, got no magic"):
            snapshots.read(path, format="firecracker")

    @pytest.mark.parametrize(
        ("offset", "new"), [(8, b"\xff" * 8), (8, struct.pack("<Q", 64)), (16, b"\xff\xfe\xfd")]
    )
    def test_versions_that_are_none(self, tmp_path, body, offset, new):
        body[offset : offset + len(new)] = new
        with pytest.raises(FormatError, match=r"expected the version as MAJOR.MINOR.PATCH"):
            snapshots.read(write(tmp_path / "vmstate", body))

    def test_a_file_without_vcpus(self, tmp_path, body):
        path = write(tmp_path / "vmstate", body[:3000])
        with pytest.raises(FormatError, match=r"expected at least one vCPU .*, got none"):
            snapshots.read(path)
        path.write_bytes(body[:12])
        with pytest.raises(FormatError, match="expected"):
            snapshots.read(path, format="firecracker")

    @given(st.data())
    def test_damage_under_a_right_checksum(self, data):
        """Whoever makes a file can seal it: lengths inside are checked all the same."""
        from pathlib import Path
        from tempfile import NamedTemporaryFile

        name = data.draw(st.sampled_from(SHAPES))
        body = bytearray((Path(__file__).parents[1] / "data" / "vmm" / name).read_bytes()[:-8])
        for _ in range(data.draw(st.integers(1, 6))):
            at = data.draw(st.integers(16, len(body)))
            new = data.draw(
                st.sampled_from([b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 4104), b"\x07"])
            )
            body[at : at + len(new)] = new
        del body[data.draw(st.integers(len(body) // 2, len(body))) :]
        with NamedTemporaryFile() as file:
            file.write(sealed(body))
            file.flush()
            try:
                (snapshot,) = snapshots.read(file.name)
                held = sum(vcpu.area.size for vcpu in snapshot.vcpus)
            except FormatError:
                held = 0
        assert held <= len(body)
