"""ELF cores of every class, and what a hostile one may not do."""

import os
import struct
import sys
import time
import tracemalloc

import numpy as np
import pytest
from effort import at_most
from hypothesis import given
from hypothesis import strategies as st

from xfast import snapshots
from xfast.errors import FormatError, PolicyError
from xfast.report import rows as report
from xfast.snapshots import elfcore
from xfast.snapshots.bytes.source import Source
from xfast.xsave.area import classify, headers
from xfast.xsave.layout import PRESETS
from xfast.xsave.registers import Registers

LEAKED = "lldb__test__API__functionalities__postmortem__elf-core__linux-x86_64.core"


def note(name: str, kind: int, desc: bytes) -> bytes:
    text = name.encode() + b"\0"
    head = struct.pack("<3I", len(text), len(desc), kind)
    return head + text + bytes(-len(text) % 4) + desc + bytes(-len(desc) % 4)


def prstatus(tid: int, at: int = 32, size: int = 336) -> bytes:
    return bytes(at) + struct.pack("<I", tid) + bytes(size - at - 4)


def area(mask: int, size: int, *, present: int | None = None, mxcsr_mask: int = 0) -> np.ndarray:
    image = np.zeros(size, np.uint8)
    image[0:2] = 0x7F, 3
    image[24:28] = 0x80, 0x1F, 0, 0
    image[28:32] = list(struct.pack("<I", mxcsr_mask))
    image[464:472] = list(struct.pack("<Q", mask))
    image[512:520] = list(struct.pack("<Q", mask if present is None else present))
    return image


def core(*notes: bytes, wide: bool = True, machine: int = 62, kind: int = 4, xnum=False) -> bytes:
    body = b"".join(notes)
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1, 1]) + bytes(9)
    count = 0xFFFF if xnum else 1
    if wide:
        start, sections = 64 + 56, 64 + 56 + len(body) if xnum else 0
        tail = struct.pack("<QQI6H", 64, sections, 0, 64, 56, count, 64, 0, 0)
        header = struct.pack("<2HIQ", kind, machine, 1, 0) + tail
        program = struct.pack("<2I6Q", 4, 4, start, 0, 0, len(body), 0, 4)
    else:
        start, sections = 52 + 32, 52 + 32 + len(body) if xnum else 0
        tail = struct.pack("<3I6H", 52, sections, 0, 52, 32, count, 40, 0, 0)
        header = struct.pack("<2H2I", kind, machine, 1, 0) + tail
        program = struct.pack("<8I", 4, start, 0, 0, len(body), 0, 4, 4)
    section = bytes(44 if wide else 28) + struct.pack("<I", 1) + bytes(16) if xnum else b""
    return ident + header + program + body + section


def read(path, *notes: bytes, **options):
    path.write_bytes(core(*notes, **options))
    (snapshot,) = snapshots.read(path)
    return snapshot


def thread(tid: int, image: np.ndarray) -> bytes:
    return note("CORE", 1, prstatus(tid)) + note("LINUX", 0x202, image.tobytes())


class TestThreads:
    def test_kernel_core(self, data):
        (snapshot,) = snapshots.read(data / "elf" / "kernel618-regs64-3thr.core.xz")
        assert [vcpu.index for vcpu in snapshot.vcpus] == [12621, 12623, 12622]
        assert [headers(vcpu.area).xstate_bv for vcpu in snapshot.vcpus] == [0xE7, 3, 7]
        assert {vcpu.layout_source for vcpu in snapshot.vcpus} == {"note"}
        assert {vcpu.xcr0 for vcpu in snapshot.vcpus} == {0xE7}
        assert snapshot.vcpus[0].layout == PRESETS["amd-zen4"].restricted(0xE7)
        assert (snapshot.producer, snapshot.container) == ("kernel", ("xz",))
        assert snapshot.facts == {"abi": "x86-64", "os": "linux", "threads_without_state": 0}

    def test_i386_process_of_a_64_bit_kernel(self, data):
        (snapshot,) = snapshots.read(data / "elf" / "kernel618-regs32-3thr.core.xz")
        assert [vcpu.index for vcpu in snapshot.vcpus] == [12630, 12631, 12632]
        assert [headers(vcpu.area).xstate_bv for vcpu in snapshot.vcpus] == [0x67, 7, 3]
        assert snapshot.facts["abi"] == "i386"
        assert {vcpu.mode for vcpu in snapshot.vcpus} == {32}
        shown = report.vcpu_as_json(snapshot.vcpus[0], registers=True)["registers"]
        assert {"xmm7", "ymm7", "zmm7", "k7"} < shown.keys()
        assert not {"xmm8", "ymm8", "zmm8", "zmm31"} & shown.keys()

    @pytest.mark.parametrize("xnum", [False, True])
    @pytest.mark.parametrize(
        ("name", "wide", "machine", "at", "abi", "system"),
        [
            ("CORE", True, 62, 32, "x86-64", "linux"),
            ("CORE", False, 62, 24, "x32", "linux"),
            ("CORE", False, 3, 24, "i386", "linux"),
            ("FreeBSD", True, 62, 40, "x86-64", "freebsd"),
            ("FreeBSD", False, 3, 24, "i386", "freebsd"),
        ],
    )
    def test_every_class(self, tmp_path, name, wide, machine, at, abi, system, xnum):
        owner = "FreeBSD" if name == "FreeBSD" else "LINUX"
        notes = [
            note(name, 1, prstatus(tid, at)) + note(owner, 0x202, area(7, 832).tobytes())
            for tid in (1001, 1002)
        ]
        snapshot = read(tmp_path / "core", *notes, wide=wide, machine=machine, xnum=xnum)
        assert [vcpu.index for vcpu in snapshot.vcpus] == [1001, 1002]
        assert (snapshot.facts["abi"], snapshot.facts["os"]) == (abi, system)
        assert snapshot.producer == "kernel"

    def test_threads_without_extended_state_are_counted(self, tmp_path):
        notes = thread(1, area(7, 832)), note("CORE", 1, prstatus(2)), thread(3, area(7, 832))
        snapshot = read(tmp_path / "core", *notes)
        assert [vcpu.index for vcpu in snapshot.vcpus] == [1, 3]
        assert snapshot.facts["threads_without_state"] == 1

    def test_where_says_where(self, tmp_path):
        image = area(7, 832)
        image[160:176] = range(16)
        path = tmp_path / "core"
        (vcpu,) = read(path, thread(1, image)).vcpus
        offset, length = vcpu.where["area"]
        assert path.read_bytes()[offset : offset + length] == image.tobytes()


class TestLayout:
    @pytest.mark.parametrize(
        ("mask", "size", "mxcsr_mask", "layout"),
        [
            (7, 832, 0, "intel"),
            (0x1F, 1088, 0, "intel"),
            (0xE7, 2432, 0x2FFFF, "amd-zen4"),
            (0xE7, 2432, 0, "amd-zen4"),  # gdb 14 and later knows AMD's
            (0xE7, 2688, 0xFFFF, "intel"),
            (0x2E7, 2440, 0x2FFFF, "amd-zen4"),
            (0x2E7, 2696, 0xFFFF, "intel"),
            (0x207, 896, 0, "amd-zen2"),
            (0x207, 2440, 0, "amd-zen3"),
            (0x207, 2696, 0xFFFF, "intel"),
            (0x602E7, 11008, 0xFFFF, "intel"),
        ],
    )
    def test_mask_and_size_tell_the_layout(self, tmp_path, mask, size, mxcsr_mask, layout):
        image = area(mask, size, mxcsr_mask=mxcsr_mask)
        (vcpu,) = read(tmp_path / "core", thread(1, image)).vcpus
        assert vcpu.layout == PRESETS[layout].restricted(mask)
        assert vcpu.layout_source == "inferred"
        assert f"mask {mask:#x} and {size} bytes" in vcpu.layout_note

    @pytest.mark.parametrize(("mask", "size"), [(0xE7, 2688), (0x207, 2696), (0x2E7, 2696)])
    def test_gdb_13_may_have_put_intels_offsets_on_amds_data(self, tmp_path, mask, size):
        (vcpu,) = read(tmp_path / "core", thread(1, area(mask, size))).vcpus
        assert (vcpu.layout.mask, vcpu.layout_source) == (7, "inferred")
        assert "the layout is ambiguous: gdb before 14" in vcpu.layout_note

    def test_a_real_core_of_gdb_13_is_ambiguous(self, data):
        (snapshot,) = snapshots.read(data / "elf" / "gdb13-regs64-3thr.core.xz")
        assert snapshot.producer == "gdb"
        assert [vcpu.index for vcpu in snapshot.vcpus] == [12659, 12661, 12662]
        assert {vcpu.layout for vcpu in snapshot.vcpus} == {PRESETS["intel"].restricted(7)}
        assert {vcpu.layout_source for vcpu in snapshot.vcpus} == {"inferred"}

    def test_the_user_knows_better_than_the_note(self, data):
        path = data / "elf" / "kernel618-regs64-3thr.core.xz"
        (snapshot,) = snapshots.read(path, layout=PRESETS["intel"])
        assert snapshot.vcpus[0].layout is PRESETS["intel"]
        assert snapshot.vcpus[0].layout_source == "given"

    def test_a_size_of_no_known_machine_is_unknown(self, tmp_path):
        (vcpu,) = read(tmp_path / "core", thread(1, area(0xE7, 2500, mxcsr_mask=0xFFFF))).vcpus
        assert vcpu.layout is None
        assert "no known layout holds 0xe7" in vcpu.layout_note

    def test_the_layout_note_counts_for_all_threads(self, tmp_path):
        desc = struct.pack("<4I", 2, 256, 576, 0) + struct.pack("<4I", 9, 8, 2432, 0)
        notes = [thread(1, area(0x207, 2440)), thread(2, area(0x207, 2440))]
        snapshot = read(tmp_path / "core", *notes, note("LINUX", 0x205, desc))
        assert {vcpu.layout for vcpu in snapshot.vcpus} == {PRESETS["amd-zen3"].restricted(0x207)}


THREADS = {
    "gcore__linux-i386.core": [5586, 5588, 5589],
    "elf-core__linux-i386.core": [32306],
    "thread_crash__linux-i386.core": [5195, 5193, 5194],
    "module-end__test.core": [5864],
    "x86-32-freebsd-multithread.core": [100761, 100744, 100762, 100763],
    "x86-32-freebsd.core": [100654],
    "x86-32-linux.core": [180355],
    "x86-64-freebsd.core": [100654],
    "x86-64-linux-multithread.core": [329384, 329385, 329386, 329383],
}
"""Threads of the cores in LLDB's tests."""


class TestThirdParty:
    @pytest.mark.parametrize("name", THREADS)
    def test_cores_of_others(self, shared, name):
        found = sorted((shared / "samples" / "thirdparty" / "llvm").glob(f"*{name}"))
        if not found:
            pytest.skip(f"{name} is not here")
        for path in found:
            (snapshot,) = snapshots.read(path)
            if [vcpu.index for vcpu in snapshot.vcpus] == THREADS[name]:
                break
        else:
            pytest.fail(f"{name}: no such threads")
        for vcpu in snapshot.vcpus:
            assert (vcpu.xcr0, vcpu.area.size, vcpu.layout_source) == (7, 832, "inferred")
            if headers(vcpu.area).xstate_bv & 2:
                assert Registers(vcpu.area, vcpu.layout)["mxcsr"] == 0x1F80

    def test_leaked_memory_is_no_state(self, shared):
        """LLDB's core has an audit record's text where no register is: CVE-2020-10732's like."""
        path = shared / "samples" / "thirdparty" / "llvm" / LEAKED
        if not path.exists():
            pytest.skip("LLDB's core is not here")
        ((vcpu,),) = ([snapshot.vcpus for snapshot in snapshots.read(path)],)[0]
        assert b"audit" in vcpu.area.tobytes()
        assert headers(vcpu.area).xstate_bv == 0
        assert classify(vcpu.area, vcpu.layout).live == 0
        assert list(Registers(vcpu.area, vcpu.layout)) == []
        assert vcpu.layout == PRESETS["intel"].restricted(0x1F)
        assert "audit" not in repr((vcpu.facts, vcpu.layout_note, vcpu.where))

    @pytest.mark.parametrize("name", ["x86-64-netbsd-multithread.core", "i386-biarch-core.core"])
    def test_cores_without_extended_state_say_so(self, shared, name):
        found = list((shared / "samples" / "thirdparty").rglob(f"*{name}"))
        if not found:
            pytest.skip(f"{name} is not here")
        with pytest.raises(
            FormatError,
            match=r"offset \d+: expected NT_.*, got no extended state \(notes: .*CORE",
        ):
            snapshots.read(found[0])


class TestFxsave:
    """Threads without NT_X86_XSTATE: x87 and SSE, the most portable state there is."""

    IMAGE = area(0, 576)[:512].tobytes()

    def test_a_real_core_with_nt_prfpreg_only(self, shared):
        path = shared / "samples/thirdparty/elfutils/test-core.core.bz2"
        (snapshot,) = snapshots.read(path)
        (vcpu,) = snapshot.vcpus
        assert (snapshot.container, snapshot.producer) == (("bzip2",), "kernel")
        assert (headers(vcpu.area).xstate_bv, vcpu.layout_source, vcpu.xcr0) == (3, "format", None)
        registers = Registers(vcpu.area, vcpu.layout)
        assert int(registers["mxcsr"]) == 0x1F80
        assert registers["xmm1"].tobytes() == b"/" * 16
        assert snapshot.facts["threads_without_state"] == 0

    @pytest.mark.parametrize(
        ("name", "kind", "wide", "machine", "at"),
        [
            ("CORE", 2, True, 62, 32),
            ("CORE", 2, False, 62, 24),
            ("FreeBSD", 2, True, 62, 40),
            ("LINUX", 0x46E62B7F, False, 3, 24),
        ],
    )
    def test_every_note_that_is_an_fxsave_area(self, tmp_path, name, kind, wide, machine, at):
        owner = "FreeBSD" if name == "FreeBSD" else "CORE"
        notes = note(owner, 1, prstatus(7, at)), note(name, kind, self.IMAGE)
        (vcpu,) = read(tmp_path / "core", *notes, wide=wide, machine=machine).vcpus
        assert (vcpu.index, vcpu.mode) == (7, 32 if machine == 3 else 64)
        assert vcpu.area[:416].tobytes() == self.IMAGE[:416]
        assert not vcpu.area[416:512].any()

    def test_nt_x86_xstate_is_preferred_and_fsave_is_none(self, tmp_path):
        both = note("CORE", 1, prstatus(1)), note("CORE", 2, self.IMAGE)
        xstate = note("LINUX", 0x202, area(7, 832).tobytes())
        old = note("CORE", 1, prstatus(2)), note("CORE", 2, bytes(108))
        snapshot = read(
            tmp_path / "core", *both, xstate, *old, note("CORE", 1, prstatus(3)), both[1]
        )
        assert [(v.index, v.area.size) for v in snapshot.vcpus] == [(1, 832), (3, 576)]
        assert snapshot.facts["threads_without_state"] == 1

    def test_edits_put_registers_into_it_and_nothing_else(self, tmp_path):
        image = self.IMAGE[:416] + b"\xee" * 96
        path = tmp_path / "core"
        snapshot = read(path, note("CORE", 1, prstatus(1)), note("CORE", 2, image))
        new = snapshot.vcpus[0].area.copy()
        new[160:176], new[512] = 0x77, 2  # xmm0; x87 becomes init
        new[32:48] = 0x99  # stale, under a clear bit
        with Source.open(path) as source:
            splices = snapshots.splices(source, snapshot, {0: new})
            with open(tmp_path / "out", "wb") as out:
                source.rewrite(splices, out)
            wide = np.zeros(832, np.uint8)
            wide[512] = 7
            with pytest.raises(PolicyError, match=r"x87 and SSE only, .* got avx"):
                snapshots.splices(source, snapshot, {0: wide})
        old, done = path.read_bytes(), (tmp_path / "out").read_bytes()
        at = old.index(image)
        assert (done[:at], done[at + 512 :]) == (old[:at], old[at + 512 :])
        assert done[at + 160 : at + 176] == b"\x77" * 16
        assert not any(done[at + 32 : at + 160])
        assert done[at + 416 : at + 512] == b"\xee" * 96


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({4: b"\x03"}, "expected ELF class 1 or 2 .*, got 3 and 1"),
            ({5: b"\x02"}, "expected ELF class .*, got 2 and 2"),
            ({16: b"\x02\0"}, "ELF type 2"),
            ({18: b"\xb7\0"}, "machine 183"),
            ({32: b"\xff" * 8}, "expected"),
            ({54: b"\x01\0"}, "expected program headers of 56 bytes, got 1"),
            ({56: b"\xfe\xff"}, "expected 3669904"),
            ({56: b"\0\0"}, "offset 0: expected .*, got no extended state"),
            ({64 + 8: b"\xff" * 8}, "expected notes up to offset"),
            ({64 + 32: b"\xff\xff\xff\xff"}, "expected notes up to offset .* got 42949"),
            ({120: b"\xff\xff\xff\x7f"}, "expected a note of at most"),
            ({124: b"\xff\xff\xff\x7f"}, "expected a note of at most"),
        ],
    )
    def test_lies_about_lengths(self, tmp_path, change, words):
        image = bytearray(core(thread(1, area(7, 832))))
        for offset, new in change.items():
            image[offset : offset + len(new)] = new
        path = tmp_path / "core"
        path.write_bytes(image)
        with pytest.raises(FormatError, match=words) as caught:
            snapshots.read(path)
        assert "\n" not in str(caught.value)

    def test_four_billion_segments_cost_nothing(self, tmp_path):
        image = bytearray(core(thread(1, area(7, 832)), xnum=True))
        image[-20:-16] = b"\xff\xff\xff\xff"
        (tmp_path / "core").write_bytes(image)
        with pytest.raises(FormatError, match="got 4294967295"):
            snapshots.read(tmp_path / "core")

    def test_notes_that_overlap_are_not_read_again_and_again(self, tmp_path):
        body = thread(1, area(7, 832))
        count = 60000
        head = bytearray(core(body))[:64]
        head[56:58] = struct.pack("<H", count)
        program = struct.pack("<2I6Q", 4, 4, 64 + 56 * count, 0, 0, len(body) * 50, 0, 4)
        (tmp_path / "core").write_bytes(head + program * count + body * 50)
        with at_most(2), pytest.raises(FormatError, match="got some that overlap"):
            snapshots.read(tmp_path / "core")

    def test_a_million_empty_notes_are_too_many(self, tmp_path):
        (tmp_path / "core").write_bytes(core(struct.pack("<3I", 0, 0, 7) * ((1 << 20) + 1)))
        with pytest.raises(FormatError, match="expected at most 262144 notes"):
            snapshots.read(tmp_path / "core")

    def test_an_area_too_small_or_too_large(self, tmp_path):
        for size in (0, 575):
            with pytest.raises(FormatError, match=f"expected NT_X86_XSTATE of .*, got {size}$"):
                read(tmp_path / "core", note("LINUX", 0x202, bytes(size)))
        with pytest.raises(FormatError, match=r"expected NT_X86_XSTATE of .*, got 1048577$"):
            read(tmp_path / "core", note("LINUX", 0x202, bytes((1 << 20) + 1)))

    def test_a_note_shorter_than_its_components(self, tmp_path):
        """The state that lies past the end is unknown, not zero."""
        (vcpu,) = read(
            tmp_path / "core",
            thread(1, area(7, 600)),
            note("LINUX", 0x205, struct.pack("<4I", 2, 256, 576, 0)),
        ).vcpus
        assert classify(vcpu.area, vcpu.layout).unreadable == 4

    def test_a_header_of_noise(self, tmp_path):
        image = area(7, 832)
        image[512:528] = 0xAA
        with pytest.raises(FormatError, match="header with unknown components"):
            read(tmp_path / "core", thread(1, image))

    def test_layout_notes_that_lie(self, tmp_path):
        for desc, words in (
            (bytes(15), "multiple of 16"),
            (struct.pack("<4I", 2, 1 << 30, 576, 0), "got size 1073741824"),
            (struct.pack("<4I", 2, 256, 100, 0), "got offset 100"),
            (struct.pack("<4I", 2, 256, 576, 0) * 2, "each once"),
        ):
            with pytest.raises(FormatError, match=words):
                read(tmp_path / "core", thread(1, area(7, 832)), note("LINUX", 0x205, desc))

    def test_a_program_is_no_core(self):
        with pytest.raises(FormatError, match="expected an x86 core"):
            snapshots.read(os.path.realpath(sys.executable))

    @given(st.binary(max_size=600))
    def test_any_notes(self, body):
        from tempfile import NamedTemporaryFile

        with NamedTemporaryFile() as file:
            file.write(core(body))
            file.flush()
            with pytest.raises(FormatError):
                snapshots.read(file.name)


class TestEdits:
    def test_a_longer_area_does_not_fit_the_note(self, tmp_path):
        path = tmp_path / "core"
        snapshot = read(path, thread(1, area(0xE7, 2432)))
        with Source.open(path) as source:
            with pytest.raises(PolicyError, match="area of at most 2432 bytes, got 2688"):
                elfcore.splices(source, snapshot, {0: area(0xE7, 2688)})
            shorter = elfcore.splices(source, snapshot, {0: area(7, 832)})
        assert [len(splice.old) for splice in shorter] == [len(splice.new) for splice in shorter]
        assert {splice.new for splice in shorter} == {b"\x07"}

    def test_a_written_note_is_read_again(self, tmp_path):
        image = area(7, 832)
        image[160:416] = 0x5A
        written = elfcore.note(elfcore.NT_X86_XSTATE, b"LINUX", image.tobytes())
        assert written == note("LINUX", 0x202, image.tobytes())
        assert elfcore.note(1, b"GDB", b"12345") == note("GDB", 1, b"12345")
        (vcpu,) = read(tmp_path / "core", note("CORE", 1, prstatus(5)), written).vcpus
        assert np.array_equal(vcpu.area, image)

    def test_an_edit_in_place_touches_its_own_bytes(self, tmp_path):
        path = tmp_path / "core"
        snapshot = read(path, thread(1, area(7, 832)), thread(2, area(7, 832)))
        new = snapshot.vcpus[1].area.copy()
        new[512] = 3
        before = path.read_bytes()
        with Source.open(path) as source, open(path, "r+b") as file:
            edits = elfcore.splices(source, snapshot, {1: new})
            source.patch(edits, file.fileno())
        assert len(edits) == 1
        after = path.read_bytes()
        assert [i for i in range(len(after)) if after[i] != before[i]] == [edits[0].offset]
        assert edits[0].offset == snapshot.vcpus[1].where["area"][0] + 512


def test_the_names_of_notes_are_told_only_if_they_are_known(tmp_path):
    """The fuzzer put a line break into one, and the error was of two lines."""
    notes = note("CORE", 1, prstatus(1)), note("a\nb", 9, b""), note("\x1b[31m" * 9, 9, b"")
    with pytest.raises(FormatError, match=r"\(notes: CORE, others\)") as caught:
        read(tmp_path / "core", *notes)
    assert str(caught.value).isprintable()


class TestHoles:
    """A sparse file costs nothing to make: what its holes seem to hold must cost nothing either."""

    def test_program_headers_of_64_kib_over_a_hole(self, tmp_path):
        """e_phentsize 65535 with 2**20 headers was one read of 64 GiB."""
        image = bytearray(core(thread(1, area(7, 832)), xnum=True))
        image[54:56] = b"\xff\xff"
        struct.pack_into("<I", image, len(image) - 20, 1 << 20)
        path = tmp_path / "core"
        path.write_bytes(image)
        os.truncate(path, 70 << 30)
        with pytest.raises(FormatError, match="expected program headers of 56 bytes, got 65535"):
            snapshots.read(path)

    def test_a_million_program_headers_over_a_hole_are_quick(self, tmp_path):
        image = bytearray(core(thread(1, area(7, 832)), xnum=True))
        struct.pack_into("<I", image, len(image) - 20, 1 << 20)
        path = tmp_path / "core"
        path.write_bytes(image)
        os.truncate(path, 100 << 20)
        tracemalloc.start()
        start = time.process_time()
        (vcpu,) = snapshots.read(path)[0].vcpus
        assert (vcpu.index, time.process_time() - start < 2) == (1, True)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
        tracemalloc.stop()

    def test_areas_in_holes_are_refused(self, tmp_path):
        """8 MB on the disk with 2 GB of holes took 2.1 GB of memory."""
        path = tmp_path / "core"
        head = struct.pack("<3I", 6, 1 << 20, 0x202) + b"LINUX\0\0\0" + area(3, 576).tobytes()
        count = 64
        whole = count * ((1 << 20) + 20)
        image = bytearray(core())
        struct.pack_into("<Q", image, 64 + 32, whole)
        with open(path, "wb") as file:
            file.write(image)
            for i in range(count):
                file.seek(len(image) + i * ((1 << 20) + 20))
                file.write(head)
            file.truncate(len(image) + whole)
        if path.stat().st_blocks * 512 > 4 << 20:
            pytest.skip("this file system stores holes")
        with pytest.raises(FormatError, match=r"areas that are stored, got .* on the disk"):
            snapshots.read(path)

    def test_notes_of_zeros_over_a_hole_end(self, tmp_path):
        image = bytearray(core(thread(1, area(7, 832))))
        struct.pack_into("<Q", image, 64 + 32, 1 << 30)
        path = tmp_path / "core"
        path.write_bytes(image)
        os.truncate(path, 2 << 30)
        start = time.process_time()
        (vcpu,) = snapshots.read(path)[0].vcpus
        assert (vcpu.index, time.process_time() - start < 2) == (1, True)
