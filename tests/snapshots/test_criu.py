"""CRIU's images in directories and archives, edited field by field."""

import gzip
import io
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import bombs
import numpy as np
import pytest
from effort import at_most
from hypothesis import given
from hypothesis import strategies as st

from xfast import snapshots
from xfast.engine import files as engine
from xfast.errors import FormatError, PolicyError, XfastError
from xfast.hosts.catalogue import catalogue
from xfast.judge.judgement import check
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.criu import reader as criu
from xfast.snapshots.criu import wire
from xfast.snapshots.criu.registers import FPREGS_FIELDS, area_of
from xfast.xsave.area import keep
from xfast.xsave.features import SSE, X87
from xfast.xsave.layout import PRESETS
from xfast.xsave.registers import Registers

SAMPLE = Path(__file__).parents[1] / "data" / "criu" / "criu42-regs64s-3thr"
CORE = SAMPLE / "core-23807.img"


def mask_of(area: np.ndarray) -> int:
    return int.from_bytes(area[512:520].tobytes(), "little")


def number(field: int, value: int) -> bytes:
    return wire.encoded(field << 3) + wire.encoded(value)


def message(field: int, data: bytes) -> bytes:
    return wire.encoded(field << 3 | 2) + wire.encoded(len(data)) + data


def nested(data: bytes, *path: int) -> bytes:
    """Return the message under the field numbers `path`."""
    for field in path:
        data = wire.inner(wire.fields(data), field)
    return data


def image(core: bytes, *, common: bool = True, magic: int = criu.CORE_MAGIC) -> bytes:
    head = struct.pack("<I", criu.IMG_COMMON_MAGIC) if common else b""
    return head + struct.pack("<2I", magic, len(core)) + core


def fpregs(*, xsave: bytes | None = None, mxcsr: int = 0x1FA0) -> bytes:
    data = b"".join(number(i, v) for i, v in enumerate((0x37F, 0, 0, 0, 0, 0, mxcsr, 0xFFFF), 1))
    data += b"".join(number(9, i) for i in range(32)) + b"".join(number(10, i) for i in range(64))
    return data if xsave is None else data + message(13, xsave)


def core(registers: bytes | None, machine: int = 1) -> bytes:
    info = number(1, 0x1234) + message(2, number(1, 5))
    info += b"" if registers is None else message(3, registers)
    return number(1, machine) + message(2, info) + message(3, b"")


def archive(files: dict[str, bytes], how: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=how) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def sample_files(prefix: str = "checkpoint/") -> dict[str, bytes]:
    return {prefix + path.name: path.read_bytes() for path in sorted(SAMPLE.iterdir())}


def read(path, data: bytes):
    path.write_bytes(data)
    (snapshot,) = snapshots.read(path)
    return snapshot


class TestImages:
    def test_directory(self):
        (snapshot,) = snapshots.read(SAMPLE)
        assert snapshot.path == str(SAMPLE)
        assert [vcpu.index for vcpu in snapshot.vcpus] == [23807, 23809, 23810]
        assert [mask_of(vcpu.area) for vcpu in snapshot.vcpus] == [0xE7, 7, 3]
        for vcpu in snapshot.vcpus:
            assert vcpu.portable
            assert vcpu.layout.restricted(0x2FF) == PRESETS["intel"].restricted(0x2FF)
            assert vcpu.layout_source == "format"
            assert vcpu.facts["member"] == f"core-{vcpu.index}.img"
            assert vcpu.facts["cet"] == {"cet": 0, "ssp": 0}
            assert "opmask_reg" in vcpu.facts["fields"]
            assert "pkru" not in vcpu.facts["fields"]  # the dumping host had none

    def test_cpuinfo_and_its_quirk(self):
        (cpu,) = snapshots.read(SAMPLE)[0].facts["cpuinfo"]
        assert len(cpu.pop("capability")) == 19
        assert cpu == {
            "vendor_id": 2,
            "cpu_family": 25,
            "model": 17,
            "stepping": 1,
            "capability_ver": 2,
            "model_id": "AMD EPYC",
            "xfeatures_mask": 0xE5,  # of XCR0 0xe7
            "xsave_size": 2432,
            "xsave_size_max": 2432,
        }

    def test_cpuinfo_is_the_cpuid_of_every_thread(self):
        (snapshot,) = snapshots.read(SAMPLE)
        for vcpu in snapshot.vcpus:
            cpuid = vcpu.cpuid
            assert (cpuid.vendor, cpuid.signature, cpuid.xcr0) == ("AuthenticAMD", 0xA10F11, 0xE7)
            assert cpuid.find(0xD).ebx == 2432
            assert {"avx512f", "avx512_bf16", "xsave", "pni", "lm"} - cpuid.features == {
                "avx512_bf16"  # leaf 7.1 is none of CRIU's capability words
            }

    def test_a_larger_area_on_the_target_is_seen(self):
        """CRIU issue 3120: the process keeps buffers of the size that its first CPU reported."""
        (snapshot,) = snapshots.read(SAMPLE)
        (verdict,) = check(snapshot, catalogue()["amd-genoa"], policy="fpu")
        sizes = {
            (f.severity, f.snapshot_value, f.host_value)
            for f in verdict.findings
            if f.code == "SIZE"
        }
        assert sizes == {("risky", "2432", "2440"), ("blocks", "2432", "2440")}

    def test_cpuinfo_of_another_type(self, tmp_path):
        shutil.copytree(SAMPLE, tmp_path / "images")
        path = tmp_path / "images" / "cpuinfo.img"
        for entry in (message(1, b"abc"), message(6, b"abc"), number(7, 5), number(2, 1 << 63)):
            path.write_bytes(image(message(1, entry), magic=criu.CPUINFO_MAGIC))
            if entry[:1] == number(2, 0)[:1]:
                assert snapshots.read(tmp_path / "images")[0].facts["cpuinfo"]
                continue
            with pytest.raises(FormatError, match=r"expected a number for .*, got another type"):
                snapshots.read(tmp_path / "images")

    def test_more_threads_than_open_files(self, tmp_path):
        resource = pytest.importorskip("resource")
        folder = tmp_path / "images"
        folder.mkdir()
        for tid in range(1, 301):
            (folder / f"core-{tid}.img").write_bytes(CORE.read_bytes())
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        try:
            assert len(snapshots.read(folder)[0].vcpus) == 300
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    @pytest.mark.parametrize("common", [True, False])
    def test_one_image(self, tmp_path, common):
        xsave = number(1, 0x207) + b"".join(number(2, 7) for _ in range(64)) + number(8, 0x55555554)
        snapshot = read(tmp_path / "core-5.img", image(core(fpregs(xsave=xsave)), common=common))
        (vcpu,) = snapshot.vcpus
        registers = Registers(vcpu.area, vcpu.layout)
        assert (vcpu.index, registers["pkru"], registers["mxcsr"]) == (5, 0x55555554, 0x1FA0)

    def test_an_image_without_xsave_has_x87_and_sse(self, tmp_path):
        (vcpu,) = read(tmp_path / "core-5.img", image(core(fpregs()))).vcpus
        assert mask_of(vcpu.area) == X87 | SSE

    def test_tasks_without_registers_are_counted(self, tmp_path):
        shutil.copytree(SAMPLE, tmp_path / "images")
        (tmp_path / "images" / "core-9.img").write_bytes(image(core(None)))
        (snapshot,) = snapshots.read(tmp_path / "images")
        assert len(snapshot.vcpus) == 3
        assert snapshot.facts["threads_without_state"] == 1

    def test_amx_bits_have_no_registers_here(self, tmp_path):
        """CRIU's images cannot carry tiles: what XSTATE_BV says of them stays unknown."""
        xsave = number(1, 0x60207)
        (vcpu,) = read(tmp_path / "core-5.img", image(core(fpregs(xsave=xsave)))).vcpus
        assert mask_of(vcpu.area) == 0x60207
        assert not vcpu.layout.mask & 0x60000


class TestArchives:
    @pytest.mark.parametrize("how", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    @pytest.mark.parametrize("prefix", ["", "./", "checkpoint/", "d" * 99 + "/" + "é" * 70 + "/"])
    def test_tar(self, tmp_path, how, prefix):
        if how == tarfile.USTAR_FORMAT and len(prefix) > 100:
            pytest.skip("ustar has no names that long")
        snapshot = read(tmp_path / "checkpoint.tar", archive(sample_files(prefix), how))
        (folder,) = snapshots.read(SAMPLE)
        for one, two in zip(snapshot.vcpus, folder.vcpus, strict=True):
            assert one.index == two.index
            assert np.array_equal(one.area, two.area)
        assert snapshot.facts == folder.facts

    def test_gzip(self, tmp_path):
        snapshot = read(tmp_path / "checkpoint.tar.gz", gzip.compress(archive(sample_files())))
        assert (len(snapshot.vcpus), snapshot.container) == (3, ("gzip",))

    def test_names_are_compared_and_never_used(self, tmp_path, monkeypatch):
        """A member's name may point anywhere: nothing is written, opened or followed."""
        files = {f"../../{tmp_path}/evil/{name}": data for name, data in sample_files("").items()}
        path = tmp_path / "checkpoint.tar"
        path.write_bytes(archive(files))
        opened = []
        monkeypatch.setattr(os, "open", _noting(os.open, opened))
        monkeypatch.setattr(engine, "opened", _noting(engine.opened, opened))
        (snapshot,) = snapshots.read(path)
        new = snapshot.vcpus[0].area.copy()
        keep(new, snapshot.vcpus[0].layout, 3)
        with Source.open(path) as source:
            edits = snapshots.splices(source, snapshot, {0: new})
        assert len(edits) == 1
        assert edits[0].member == ""
        assert set(opened) == {str(path)}
        assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.tar"]

    def test_links_and_folders_are_no_images(self, tmp_path):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
                info = tarfile.TarInfo("core-1.img")
                info.type, info.linkname = kind, "/etc/passwd"
                tar.addfile(info)
        with pytest.raises(FormatError, match=r"expected a core-TID\.img .*, got none"):
            read(tmp_path / "checkpoint.tar", out.getvalue())

    def test_an_edited_archive_is_a_good_archive(self, tmp_path):
        files = sample_files()
        path = tmp_path / "checkpoint.tar.gz"
        snapshot = read(path, gzip.compress(archive(files)))
        areas = {}
        for i, vcpu in enumerate(snapshot.vcpus[:2]):
            areas[i] = vcpu.area.copy()
            keep(areas[i], vcpu.layout, 3)
        with Source.open(path) as source, open(tmp_path / "out", "w+b") as file:
            source.rewrite(snapshots.splices(source, snapshot, areas), file)
        with tarfile.open(tmp_path / "out") as tar:
            after = {info.name: tar.extractfile(info).read() for info in tar}
        assert list(after) == list(files)
        changed = {Path(name).name for name in files if after[name] != files[name]}
        assert changed == {"core-23807.img", "core-23809.img"}
        (again,) = snapshots.read(tmp_path / "out")
        assert [mask_of(vcpu.area) for vcpu in again.vcpus] == [3, 3, 3]
        assert np.array_equal(again.vcpus[0].area, areas[0])

    def test_an_archive_that_ends_with_its_last_member_is_edited_too(self, tmp_path):
        """Without padding and end: it was read, and an edit wanted what is not there."""
        files = sample_files()
        name = "checkpoint/core-23807.img"
        files[name] = files.pop(name)
        whole = archive(files)
        path = tmp_path / "checkpoint.tar"
        snapshot = read(path, whole[: whole.rindex(files[name]) + len(files[name])])
        vcpu = next(i for i, vcpu in enumerate(snapshot.vcpus) if vcpu.origin.member.name in name)
        new = snapshot.vcpus[vcpu].area.copy()
        keep(new, snapshot.vcpus[vcpu].layout, 3)
        with Source.open(path) as source, open(tmp_path / "out", "w+b") as file:
            source.rewrite(snapshots.splices(source, snapshot, {vcpu: new}), file)
        (again,) = snapshots.read(tmp_path / "out")
        assert np.array_equal(again.vcpus[vcpu].area, new)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({148: b"0000000\0"}, "wrong checksum"),
            ({124: b"9" * 11}, "expected octal digits"),
            ({124: b"\xff" * 12}, "expected a member of at most"),
            ({124: b"77777777777"}, "expected a member of at most .* got 8589934591"),
        ],
    )
    def test_headers_that_lie(self, tmp_path, change, words):
        data = bytearray(archive(sample_files("")))
        for offset, new in change.items():
            data[offset : offset + len(new)] = new
        if 148 not in change:
            data[148:156] = b" " * 8
            data[148:156] = b"%06o\0 " % sum(data[:512])
        with pytest.raises(FormatError, match=words):
            read(tmp_path / "checkpoint.tar", bytes(data))

    def test_truncated(self, tmp_path):
        data = archive(sample_files(""))
        for length in (600, 1000, 5000):
            with pytest.raises(FormatError, match="expected"):
                read(tmp_path / "checkpoint.tar", data[:length])

    def test_an_image_twice_is_refused(self, tmp_path):
        files = {**sample_files("a/"), **sample_files("b/")}
        with pytest.raises(FormatError, match=r"got core-23807\.img twice"):
            read(tmp_path / "checkpoint.tar", archive(files))


def _noting(function, calls):
    def noting(path, *args, **kwargs):
        calls.append(os.fspath(path))
        return function(path, *args, **kwargs)

    return noting


class TestEdits:
    def test_only_the_registers_change(self):
        """Every field of the message but those that were edited is what it was."""
        (snapshot,) = snapshots.read(SAMPLE)
        new = snapshot.vcpus[0].area.copy()
        keep(new, snapshot.vcpus[0].layout, 7)
        (edit,) = snapshots.splices(None, snapshot, {0: new})
        assert edit.member == "core-23807.img"
        old, changed = edit.old[4:], edit.new[4:]
        assert len(changed) < len(old)
        assert [f.raw for f in wire.fields(old) if f.number != 2] == [
            f.raw for f in wire.fields(changed) if f.number != 2
        ]
        for path in ((2,), (2, 3), (2, 3, 13)):
            one, two = (
                [(f.number, f.raw) for f in wire.fields(nested(data, *path))]
                for data in (old, changed)
            )
            assert [nr for nr, _ in one] == [nr for nr, _ in two]
            differing = {nr for (nr, a), (_, b) in zip(one, two, strict=True) if a != b}
            assert differing == {(2,): {3}, (2, 3): {13}, (2, 3, 13): {1, 5, 6, 7}}[path]

    def test_a_register_without_a_field_is_refused(self):
        (snapshot,) = snapshots.read(SAMPLE)
        new = snapshot.vcpus[0].area.copy()
        new[2688] = 4
        with pytest.raises(PolicyError, match="no field for"):
            snapshots.splices(None, snapshot, {0: new})
        with pytest.raises(PolicyError, match="expected an area of at most 2696"):
            snapshots.splices(None, snapshot, {0: np.zeros(4096, np.uint8)})

    @given(st.integers(0, (1 << 64) - 1))
    def test_varints(self, value):
        assert wire.varint(wire.encoded(value), 0) == (value, len(wire.encoded(value)))

    @given(st.data())
    def test_any_registers_round_trip(self, data):
        """Whatever 64 bits a register gets, the image gives them back."""
        (snapshot,) = snapshots.read(SAMPLE)
        new = snapshot.vcpus[0].area.copy()
        places = [(o, np.dtype(t).itemsize, n) for _, o, t, n in FPREGS_FIELDS.values()]
        places += [(1088, 8, 8), (1152, 8, 64), (1664, 8, 128), (576, 4, 64)]
        for offset, item, count in data.draw(st.lists(st.sampled_from(places), max_size=6)):
            at = offset + item * data.draw(st.integers(0, count - 1))
            new[at : at + item] = list(data.draw(st.binary(min_size=item, max_size=item)))
        for edit in snapshots.splices(None, snapshot, {0: new}):
            assert edit.new[:4] == struct.pack("<I", len(edit.new) - 4)
            assert np.array_equal(area_of(edit.new[4:]).area, new)

    def test_crit_decodes_an_edited_image(self, tmp_path):
        if not shutil.which("crit"):
            pytest.skip("no crit here")
        (snapshot,) = snapshots.read(SAMPLE)
        new = snapshot.vcpus[0].area.copy()
        keep(new, snapshot.vcpus[0].layout, 3)
        (edit,) = snapshots.splices(None, snapshot, {0: new})
        with Source.open(CORE) as source, open(tmp_path / "core.img", "w+b") as file:
            source.rewrite([edit._replace(member="")], file)
        answer = subprocess.run(
            ["crit", "show", tmp_path / "core.img"], capture_output=True, text=True, check=True
        )
        assert '"xstate_bv": 3' in answer.stdout


class TestBadInput:
    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (b"", "it is empty"),
            (
                struct.pack("<2I", criu.IMG_COMMON_MAGIC, 1),
                "with the magic .*, got 0x1",
            ),
            (image(b"")[:-4], "expected 4 bytes"),
            (image(core(fpregs()))[:-9], "expected an entry of at most"),
            (image(b"\x80" * 11), "expected the end of the number"),
            (image(b"\x0b\x00"), "expected a field .*, got one of type 3"),
            (image(b"\x12\x7f"), "expected a field within the data"),
            (image(core(fpregs(), machine=3)), "expected machine type .*, got 3"),
            (image(b""), "expected machine type .*, got None"),
            (image(core(None)), "expected a core-TID.img with registers for each thread, got none"),
            (image(core(fpregs(mxcsr=1 << 32))), r"mxcsr\[0\] out of range"),
            (image(core(fpregs() + number(1, 1))), r"cwd\[1\] out of range"),
            (image(core(fpregs() + message(9, b"\1\2"))), r"st_space\[32\] out of range"),
            (image(core(fpregs()), magic=criu.CPUINFO_MAGIC), "expected an image with the magic"),
        ],
    )
    def test_one_clear_line(self, tmp_path, data, words):
        with pytest.raises(FormatError, match=words) as caught:
            read(tmp_path / "core-5.img", data)
        assert "\n" not in str(caught.value)

    def test_a_directory_with_a_broken_image_names_it(self, tmp_path):
        shutil.copytree(SAMPLE, tmp_path / "images")
        (tmp_path / "images" / "core-23809.img").write_bytes(image(b"\x12\x7f"))
        with pytest.raises(FormatError, match=r"images/core-23809\.img"):
            snapshots.read(tmp_path / "images")

    def test_nesting_is_not_followed(self, tmp_path):
        """Messages nested a million deep: only three levels are ever looked at."""
        data = b""
        for _ in range(2000):
            data = message(2, data)
        with at_most(2), pytest.raises(XfastError):
            read(tmp_path / "core-5.img", image(data))
        assert sys.getrecursionlimit() < 10000


class TestCost:
    """At most a second for a mebibyte, however it is cut up."""

    def test_four_mebibytes_of_tiny_fields_are_refused_at_once(self, tmp_path):
        """Two bytes a field, two million of them: it took 12.9 s."""
        start = time.process_time()
        for data in (core(b"\x78\x00" * (1 << 20)), b"\x78\x00" * (1 << 20)):
            with pytest.raises(FormatError, match="expected at most 4096 fields in a message"):
                read(tmp_path / "core-5.img", image(data))
        assert time.process_time() - start < 1

    def test_a_pax_header_of_digits_takes_no_quadratic_time(self, tmp_path):
        """18 s for 67 KB: the pattern was tried from each digit on, to the end of them."""
        header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
        header[156:157] = b"x"
        header[124:136] = b"%011o\0" % 65536
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        start = time.process_time()
        with pytest.raises(FormatError, match=r"expected a core-TID\.img .*, got none"):
            read(tmp_path / "x.tar", bytes(header) + b"1" * 65536 + bytes(1024))
        assert time.process_time() - start < 1

    def test_the_hostile_archive(self, shared):
        start = time.process_time()
        with pytest.raises(FormatError, match=r"expected a core-TID\.img .*, got none"):
            snapshots.read(shared / "cases/hostile/pax-digits.tar")
        assert time.process_time() - start < 1


def test_a_task_without_registers_whose_state_is_damaged_is_one_line(tmp_path):
    """The fuzzer's: whether a task is dead was asked where damage was not expected."""
    damaged = number(1, 1) + message(2, number(1, 5)) + message(3, b"\x0f")
    with pytest.raises(FormatError, match=r"core-5\.img: expected a field .*, got one of type 7"):
        read(tmp_path / "core-5.img", image(damaged))


def test_a_message_that_is_there_twice_is_refused(tmp_path):
    """The fuzzer's: the last one was read, and the first, which was damaged, met when editing."""
    info = message(2, number(1, 0) + message(3, b"\x0b"))
    with pytest.raises(FormatError, match=r"expected one message in field 2, got another"):
        read(tmp_path / "core-5.img", image(number(1, 1) + info + info))


def test_an_archive_of_nothing_but_cores_is_read_whatever_it_takes(tmp_path):
    """Packed it is no archive of a process with its memory, until somebody says that it is."""
    ((_, data),) = bombs.criu_threads(3 << 20).items()
    path = tmp_path / "c.tar"
    path.write_bytes(data)
    (whole,) = snapshots.read(path)
    path.write_bytes(gzip.compress(data, 1))
    with pytest.raises(FormatError, match=r"areas that are stored, got .*; see --expand-limit"):
        snapshots.read(path)
    (lifted,) = snapshots.read(path, expand_limit=8 << 20)
    assert len(lifted.vcpus) == len(whole.vcpus) > 2000


def test_two_hundred_threads_without_their_memory_are_read_packed(data, tmp_path):
    """An incremental checkpoint has little memory: cores of equal registers pack to nothing."""
    (core,) = (data / "criu" / "criu42-regs64s-3thr").glob("core-23807.img")
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as archive:
        for tid in range(200):
            archive.add(core, f"checkpoint/core-{tid}.img")
    (found,) = snapshots.read(tmp_path / "c.tar.gz")
    assert len(found.vcpus) == 200
