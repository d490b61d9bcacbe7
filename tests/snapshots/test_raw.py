"""Raw areas: plain files, .npy stacks, companions, and what an area tells of its layout."""

import gzip
import io
import shutil
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xfast import snapshots
from xfast.errors import FormatError, PolicyError
from xfast.hosts import resolve as named
from xfast.judge.judgement import check
from xfast.snapshots import infer, raw, sorts
from xfast.snapshots.bytes.source import Source
from xfast.xsave.area import relayout
from xfast.xsave.cpuid import Cpuid
from xfast.xsave.features import bits
from xfast.xsave.layout import PRESETS, Layout
from xfast.xsave.registers import Registers

SAMPLE = "kvm618-guestxcr0_e7-bve7.xsave"


@pytest.fixture
def sample(data):
    return (data / "raw" / SAMPLE).read_bytes()


def filled(layout: Layout, mask: int, size: int = 4096, value: int = 0x5A) -> np.ndarray:
    """Return an area as KVM writes it: components full, all else zero."""
    image = np.zeros(size, np.uint8)
    image[0:2] = 0x7F, 3
    image[24:28] = 0x80, 0x1F, 0, 0
    image[512:520] = list(struct.pack("<Q", mask))
    for slot in layout.slots:
        if mask >> slot.nr & 1 and slot.offset:
            image[slot.offset : slot.offset + slot.size] = value
    return image


def cpuid(vendor: bytes, rows: dict | None = None) -> Cpuid:
    ebx, edx, ecx = struct.unpack("<3I", vendor)
    return Cpuid.from_rows({(0, 0): (0xD, ebx, ecx, edx), **(rows or {})})


class TestFiles:
    def test_companions_of_the_variant_or_of_all(self, data, tmp_path):
        (snapshot,) = snapshots.read(data / "raw" / SAMPLE)
        (vcpu,) = snapshot.vcpus
        assert (vcpu.xcr0, vcpu.layout_source) == (0xE7, "cpuid")
        assert len(vcpu.cpuid.entries) == 75
        assert vcpu.layout.restricted(0xE7) == PRESETS["amd-zen4"].restricted(0xE7)
        shutil.copy(data / "raw" / SAMPLE, tmp_path)
        (alone,) = snapshots.read(tmp_path / SAMPLE)[0].vcpus
        assert (alone.xcr0, alone.cpuid, alone.layout_source) == (None, None, "inferred")
        own = bytearray((data / "raw" / "kvm618-guestxcr0_e7.xcrs").read_bytes())
        own[16] = 7
        (tmp_path / SAMPLE).with_suffix(".xcrs").write_bytes(own)
        (beside,) = snapshots.read(tmp_path / SAMPLE)[0].vcpus
        assert beside.xcr0 == 7

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            (".xcrs", bytes(100), r"expected struct kvm_xcrs \(392 bytes\), got 100"),
            (".xcrs", b"\xff" * 392, "expected at most 16 registers, got more"),
            (".cpuid2", b"\x01", r"expected struct kvm_cpuid2 \(8 bytes or more\), got 1$"),
            (".cpuid2", b"\xff" * 400, "at most 256 entries, got something else of 400 bytes"),
            (".cpuid2", struct.pack("<2I7I3I", 1, 0, 0xD, 0, 1, 4, 0, 0, 0, 0, 0, 0), None),
            (
                ".cpuid2",
                struct.pack("<2I7I3I", 2, 0, 0xD, 0, 1, 4, 0, 0, 0, 0, 0, 0)
                + struct.pack("<7I3I", 0xD, 2, 1, 1 << 30, 576, 0, 0, 0, 0, 0),
                "its .cpuid2: layout: expected a size of .* of component 2",
            ),
        ],
    )
    def test_damaged_companions(self, tmp_path, sample, name, content, words):
        path = tmp_path / "one.xsave"
        path.write_bytes(sample)
        path.with_suffix(name).write_bytes(content)
        if words is None:  # leaf 0xD announces AVX and does not place it: sought elsewhere
            assert snapshots.read(path)[0].vcpus[0].layout_source == "inferred"
            return
        with pytest.raises(FormatError, match=words) as caught:
            snapshots.read(path)
        assert caught.value.path.startswith(str(path.with_suffix("")))

    def test_plain_file_of_many_areas(self, tmp_path, sample):
        path = tmp_path / "areas"
        path.write_bytes(sample * 3)
        (snapshot,) = snapshots.read(path)
        assert [vcpu.index for vcpu in snapshot.vcpus] == [0, 1, 2]
        assert [vcpu.where["area"] for vcpu in snapshot.vcpus] == [
            (0, 4096),
            (4096, 4096),
            (8192, 4096),
        ]
        assert all(vcpu.area.tobytes() == sample for vcpu in snapshot.vcpus)

    def test_areas_of_a_given_size(self, tmp_path, sample):
        path = tmp_path / "areas.xsave"
        path.write_bytes(sample[:2432] * 2)
        with pytest.raises(FormatError, match="expected a multiple of 4096 bytes, got 4864"):
            snapshots.read(path)
        (snapshot,) = snapshots.read(path, size=2432)
        assert [vcpu.area.size for vcpu in snapshot.vcpus] == [2432, 2432]
        for size in (0, 575, 1 << 21):
            with pytest.raises(FormatError, match=f"areas of 576 bytes to 1 MiB, got {size}"):
                snapshots.read(path, size=size)

    @pytest.mark.parametrize("size", [11008, 12288])
    def test_an_area_with_amx_tiles_is_the_whole_file(self, tmp_path, size):
        """KVM_GET_XSAVE2's area is longer than 4096 bytes; VMMs round it up."""
        path = tmp_path / "amx.xsave"
        image = filled(PRESETS["intel"], 0x602E7, size)
        path.write_bytes(image.tobytes())
        (snapshot,) = snapshots.read(path)
        (vcpu,) = snapshot.vcpus
        assert np.array_equal(vcpu.area, image)
        assert vcpu.layout == PRESETS["intel"].restricted(0x602E7)

    @pytest.mark.parametrize("count", [1, 2, 3])
    @pytest.mark.parametrize(("size", "mask"), [(11008, 0xE7), (11008, 0x602E7), (12288, 0x602E7)])
    def test_areas_of_kvm_get_xsave2(self, tmp_path, count, size, mask):
        """Idle tiles leave the area as long as busy ones do."""
        image = filled(PRESETS["intel"], mask, size)
        path = tmp_path / "unnamed"
        path.write_bytes(image.tobytes() * count)
        (snapshot,) = snapshots.read(path)
        assert [vcpu.where["area"] for vcpu in snapshot.vcpus] == [
            (size * i, size) for i in range(count)
        ]
        assert all(np.array_equal(vcpu.area, image) for vcpu in snapshot.vcpus)

    def test_zeros_are_no_area(self, tmp_path, sample):
        """KVM_GET_XSAVE always writes FCW and MXCSR; zeros are a hole, or a wrong size."""
        path = tmp_path / "areas.xsave"
        path.write_bytes(sample * 3 + bytes(4096))
        with pytest.raises(FormatError, match=r"offset 12288: .* got no FCW, MXCSR nor XSTATE_BV"):
            snapshots.read(path)

    @pytest.mark.parametrize("packed", [False, True])
    def test_a_large_file_of_zeros_costs_no_memory(self, tmp_path, packed):
        path = tmp_path / ("bomb.xsave.gz" if packed else "bomb.xsave")
        with gzip.open(path, "wb", 1) if packed else open(path, "wb") as file:
            if packed:
                for _ in range(128):
                    file.write(bytes(1 << 20))
            else:
                file.truncate(3 << 30)
        tracemalloc.start()
        with pytest.raises(FormatError, match=r"offset 0: expected .* got no FCW"):
            snapshots.read(path, expand_limit=1 << 30)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 << 20

    @pytest.mark.parametrize(("at", "value"), [(520, 7), (519, 0x80), (517, 1), (524, 4)])
    def test_a_dirty_header_is_read_for_the_rules_to_name(self, tmp_path, data, at, value):
        image = bytearray((data / "raw/kvm618-guestxcr0_e7-bv07.xsave").read_bytes())
        image[at] = value
        path = tmp_path / "dirty.xsave"
        path.write_bytes(image)
        (vcpu,) = snapshots.read(path)[0].vcpus
        assert vcpu.area.tobytes() == bytes(image)
        path.rename(tmp_path / "unnamed")
        with pytest.raises(FormatError, match="not a snapshot format that xfast knows"):
            snapshots.read(tmp_path / "unnamed")
        assert snapshots.read(tmp_path / "unnamed", format="raw")

    @pytest.mark.parametrize("length", [0, 1, 575, 577, 1000, 4095, 4097])
    def test_truncated_files(self, tmp_path, sample, length):
        path = tmp_path / "one.xsave"
        path.write_bytes((sample * 2)[:length])
        with pytest.raises(FormatError, match=f"expected a multiple of 4096 bytes, got {length};"):
            snapshots.read(path)

    def test_a_stack_of_one_area_is_one_array_judged_once(self, tmp_path):
        one, other = filled(PRESETS["amd-zen4"], 0xE7), filled(PRESETS["intel"], 0x207)
        path = tmp_path / "areas.npy"
        np.save(path, np.stack([one, one, other, one]))
        first, second, third, fourth = snapshots.read(path)[0].vcpus
        assert first.layout_note is second.layout_note
        assert [v.layout for v in (second, fourth)] == [first.layout] * 2
        assert third.layout != first.layout
        assert first.area.base is second.area.base is fourth.area.base
        assert second.where == {"area": (128 + 4096, 4096)}
        assert first.facts is not second.facts

    def test_noise_in_an_area_is_named_with_its_offset(self, tmp_path, sample):
        path = tmp_path / "areas.xsave"
        path.write_bytes(sample + bytes([0xA5]) * 4096)
        with pytest.raises(FormatError, match=r"offset 4096: .* got no FCW, MXCSR and"):
            snapshots.read(path)

    def test_dirty_headers_are_read_for_the_rules_to_name(self, tmp_path, sample):
        image = bytearray(sample)
        image[530] = 1
        path = tmp_path / "dirty.xsave"
        path.write_bytes(image)
        assert snapshots.read(path)[0].vcpus[0].area[530] == 1

    def test_compacted_areas(self, tmp_path):
        intel = PRESETS["intel"]
        image = relayout(filled(intel, 0x207), intel, intel, xcomp_bv=0x207, size=4096)
        path = tmp_path / "compacted.xsave"
        path.write_bytes(image.tobytes())
        (vcpu,) = snapshots.read(path)[0].vcpus
        # PKRU has 8 bytes on every machine but Zen 2: the place is the same, the size is not
        assert (vcpu.layout, vcpu.layout_source) == (None, "unknown")
        path.write_bytes(relayout(filled(intel, 7), intel, intel, xcomp_bv=7, size=4096).tobytes())
        assert snapshots.read(path)[0].vcpus[0].layout_source == "inferred"


class TestNpy:
    def stack(self, path, array, version=None) -> None:
        with open(path, "wb") as file:
            np.lib.format.write_array(file, array, version)

    @pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
    def test_stack(self, tmp_path, sample, version):
        path = tmp_path / "areas.npy"
        self.stack(path, np.frombuffer(sample * 5, np.uint8).reshape(5, 4096), version)
        (snapshot,) = snapshots.read(path)
        assert len(snapshot.vcpus) == 5
        offset, length = snapshot.vcpus[4].where["area"]
        assert path.read_bytes()[offset : offset + length] == sample

    def test_large_stacks_stay_where_they_are(self, tmp_path, sample, monkeypatch):
        monkeypatch.setattr(raw, "READ_UP_TO", 4096)
        path = tmp_path / "areas.npy"
        self.stack(path, np.frombuffer(sample * 300, np.uint8).reshape(300, 4096))
        (snapshot,) = snapshots.read(path)
        assert isinstance(snapshot.vcpus.areas, sorts.FileRows)
        assert snapshot.vcpus[299].area.tobytes() == sample
        assert [one.alike for one in snapshot.vcpus.classes] == [300]

    def test_one_area(self, tmp_path, sample):
        self.stack(tmp_path / "one.npy", np.frombuffer(sample, np.uint8)[:2432])
        (vcpu,) = snapshots.read(tmp_path / "one.npy")[0].vcpus
        assert vcpu.area.tobytes() == sample[:2432]

    @pytest.mark.parametrize(
        ("array", "words"),
        [
            (np.zeros((2, 4096), np.uint16), r"expected .* of uint8.* got .* of uint16$"),
            (np.zeros((2, 2, 4096), np.uint8), "expected \\(n, size\\)"),
            (np.zeros((4096, 2), np.uint8, order="F"), "by rows"),
            (np.zeros((2, 100), np.uint8), "expected rows of 576"),
            (np.zeros((0, 4096), np.uint8), "expected rows of 576"),
            (np.array([{}]), "expected .* got .* of object$"),
        ],
    )
    def test_other_arrays(self, tmp_path, array, words):
        self.stack(tmp_path / "areas.npy", array)
        with pytest.raises(FormatError, match=words):
            snapshots.read(tmp_path / "areas.npy")

    @pytest.mark.parametrize(
        "header",
        [
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (4294967296, 4096)}",
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (1, 4097)}",
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 4096)}",
            b"__import__('os').abort()",
            b"(" * 5000,
            b"{'descr': '|u1'}",
            b"{{'descr': '|u1'}",
            b"{'descr': '|u1\0'",
            b"\xff\xfe",
        ],
    )
    @pytest.mark.parametrize("version", [1, 2, 3, 9])
    def test_headers_that_lie(self, tmp_path, sample, header, version):
        length = struct.pack("<H" if version == 1 else "<I", len(header))
        path = tmp_path / "areas.npy"
        path.write_bytes(b"\x93NUMPY" + bytes([version, 0]) + length + header + sample)
        with pytest.raises(FormatError) as caught:
            snapshots.read(path)
        assert "\n" not in str(caught.value)


class TestInference:
    @pytest.mark.parametrize("name", PRESETS)
    def test_bytes_tell_layouts_apart(self, name):
        """All of a layout's components full: no other layout explains where the bytes are."""
        layout = PRESETS[name].restricted(PRESETS[name].user_mask & ~(1 << 19))
        mask = layout.user_mask
        found = infer.place(filled(layout, mask, 11008))
        assert found.layout == layout
        assert found.source == "inferred"

    def test_mxcsr_mask_tells_the_vendor(self):
        image = filled(PRESETS["amd-zen4"], 0xE7, value=0)
        assert infer.place(image).layout == PRESETS["intel"].restricted(7)
        for mxcsr_mask, name in ((0xFFFF, "intel"), (0x2FFFF, "amd-zen4")):
            image[28:32] = list(struct.pack("<I", mxcsr_mask))
            found = infer.place(image)
            assert found.layout == PRESETS[name].restricted(0xE7)
            assert f"MXCSR_MASK {mxcsr_mask:#x}" in found.note

    @pytest.mark.parametrize("mxcsr_mask", [0, 0x2FFFF])
    def test_the_leak_with_value_zero_is_certain_without_a_layout(self, mxcsr_mask):
        """PKRU's bit with value 0 is the bug's own signature; AVX lies at one place everywhere."""
        image = filled(PRESETS["intel"], 0x207)
        image[2688:2696] = 0
        image[28:32] = list(struct.pack("<I", mxcsr_mask))
        found = infer.place(image, mask=7)
        names = "amd-zen2, amd-zen3" if mxcsr_mask else "intel, amd-zen2, amd-zen3"
        assert found.note == (f"mask 0x207 fits each of {names}; pkru is 0 wherever it may lie")
        assert found.source == "inferred"
        registers = Registers(image, found.layout)
        assert registers["pkru"] == 0
        assert registers["ymm0"].tobytes() == bytes(16) + b"\x5a" * 16

    def test_a_pkru_that_the_guest_may_have_is_not_placed_by_its_zeros(self):
        """Its place counts, for the host reads it there."""
        image = filled(PRESETS["intel"], 0x207)
        image[2688:2696] = 0
        found = infer.place(image, mask=0x207)
        assert (found.layout, found.source) == (PRESETS["intel"].restricted(7), "inferred")
        assert found.note == "mask 0x207 fits each of intel, amd-zen2, amd-zen3"

    def test_zeros_in_one_of_two_places_are_no_value(self):
        image = filled(PRESETS["intel"], 0x207)
        image[2432], image[2688] = 1, 1  # no layout explains both
        assert infer.place(image, mask=7).layout == PRESETS["intel"].restricted(7)
        assert infer.place(image[:896], mask=7).layout == PRESETS["intel"].restricted(7)

    def test_the_vendor_of_the_guests_cpuid_helps(self):
        image = filled(PRESETS["intel"], 0x207, value=0)
        found = infer.place(image, cpuid=cpuid(b"GenuineIntel"))
        assert found.layout == PRESETS["intel"].restricted(0x207)
        assert "CPUID's vendor" in found.note
        amd = infer.place(image, cpuid=cpuid(b"AuthenticAMD"), mask=0x207)  # Zen 2 or 3
        assert amd.layout == PRESETS["intel"].restricted(7)

    def test_a_component_that_the_guest_may_not_have_is_sought(self):
        """Guest CPUID without PKRU, area with it: the leak; CPUID places all but the leak."""
        rows = {(0xD, 0): (7, 832, 832, 0), (0xD, 2): (256, 576, 0, 0)}
        image = filled(PRESETS["amd-zen2"], 0x207)
        found = infer.place(image, cpuid=cpuid(b"AuthenticAMD", rows))
        assert found.layout == PRESETS["amd-zen2"].restricted(0x207)
        image[832:896] = 0
        zero = infer.place(image, cpuid=cpuid(b"AuthenticAMD", rows))
        assert (zero.source, zero.layout.mask) == ("cpuid", 0x207)
        assert zero.note.startswith("it has no place for pkru, and mask 0x207 fits each of")
        assert zero.note.endswith("; pkru is 0 wherever it may lie")
        image[832] = image[2432] = 1
        unsure = infer.place(image, cpuid=cpuid(b"AuthenticAMD", rows))
        assert (unsure.source, unsure.layout.mask) == ("cpuid", 7)

    def test_what_is_absent_need_not_be_placed(self):
        """A kernel that knows 0xe7 wrote 0x7: what is there has one place everywhere."""
        image = filled(PRESETS["intel"], 7)
        image[464:472] = list(struct.pack("<Q", 0xE7))
        found = infer.place(image)
        assert (found.layout, found.source) == (PRESETS["intel"].restricted(7), "inferred")
        assert "the same on every known machine" in found.note

    def test_given_wins(self):
        image = filled(PRESETS["amd-zen4"], 0xE7)
        assert infer.place(image, given=PRESETS["intel"]) == (PRESETS["intel"], "given", "")

    def test_unknown_components_are_of_no_known_layout(self):
        found = infer.place(filled(PRESETS["intel"], 7 | 1 << 40))
        assert found.layout == PRESETS["intel"].restricted(7)
        assert found.note == "no known layout holds 0x10000000007 (x87+sse+avx+bit40)"

    @settings(max_examples=200)
    @given(
        st.sampled_from(sorted(PRESETS)),
        st.integers(0, (1 << 20) - 1),
        st.sampled_from([0, 0xFFFF, 0x2FFFF]),
        st.randoms(use_true_random=False),
    )
    def test_an_answer_is_never_wrong(self, name, mask, mxcsr_mask, random):
        """Whatever a machine of one layout wrote: the answer puts it there, or there is none."""
        machine = PRESETS[name]
        mask &= machine.user_mask & ~(1 << 19)
        image = filled(machine, mask, 11008, value=0)
        vendor = 0xFFFF if name == "intel" else 0x2FFFF
        image[28:32] = list(struct.pack("<I", vendor if mxcsr_mask else 0))
        for nr in bits(mask & ~3):
            if random.random() < 0.5:
                slot = machine.slot(nr)
                image[slot.offset : slot.offset + slot.size] = random.randrange(256)
        found = infer.place(image)
        for slot in found.layout.slots if found.layout else ():
            there = machine.slot(slot.nr)
            if slot.nr == 9 and found.note.endswith("pkru is 0 wherever it may lie"):
                assert not image[there.offset : there.offset + there.size].any()
            else:
                assert slot == there


class TestEdits:
    def edited(self, path, areas, tmp_path) -> bytes:
        (snapshot,) = snapshots.read(path)
        out = tmp_path / "out"
        with Source.open(path) as source, open(out, "w+b") as file:
            source.rewrite(raw.splices(source, snapshot, areas), file)
        return out.read_bytes()

    def test_all_areas_may_change_their_size(self, tmp_path, sample):
        new = np.frombuffer(sample, np.uint8)[:2432]
        (tmp_path / "plain.xsave").write_bytes(sample * 2)
        plain = self.edited(tmp_path / "plain.xsave", {0: new, 1: new}, tmp_path)
        assert plain == sample[:2432] * 2
        np.save(tmp_path / "stack.npy", np.frombuffer(sample * 2, np.uint8).reshape(2, -1))
        stack = self.edited(tmp_path / "stack.npy", {0: new, 1: new}, tmp_path)
        assert np.array_equal(np.load(io.BytesIO(stack)), np.stack([new, new]))

    def test_one_area_alone_may_not(self, tmp_path, sample):
        path = tmp_path / "plain.xsave"
        path.write_bytes(sample * 2)
        new = np.frombuffer(sample, np.uint8)[:2432]
        with pytest.raises(PolicyError, match=r"expected .* one size, got \[2432, 4096\]"):
            self.edited(path, {1: new}, tmp_path)

    def test_edits_are_as_small_as_the_change(self, tmp_path, sample):
        path = tmp_path / "plain.xsave"
        path.write_bytes(sample)
        (snapshot,) = snapshots.read(path)
        new = snapshot.vcpus[0].area.copy()
        new[[512, 600, 610, 4095]] ^= 0xFF
        with Source.open(path) as source:
            edits = raw.splices(source, snapshot, {0: new})
        assert [(edit.offset, len(edit.old)) for edit in edits] == [(512, 1), (600, 11), (4095, 1)]
        assert self.edited(path, {0: new}, tmp_path) == new.tobytes()

    def test_a_written_stack_is_read_again(self, tmp_path, sample):
        areas = np.frombuffer(sample * 2, np.uint8).reshape(2, -1)
        (tmp_path / "areas.npy").write_bytes(raw.stacked(areas))
        (snapshot,) = snapshots.read(tmp_path / "areas.npy")
        assert np.array_equal(np.stack([vcpu.area for vcpu in snapshot.vcpus]), areas)


class TestOneArea:
    """Files whose size alone says that they are one area."""

    @pytest.mark.parametrize(
        ("preset", "mask", "size"),
        [
            ("intel", 3, 576),
            ("intel", 7, 832),
            ("intel", 0x1F, 1088),
            ("amd-zen2", 0x207, 896),
            ("amd-zen4", 0xE7, 2432),
            ("amd-zen4", 0x2E7, 2440),
            ("intel", 0xE7, 2688),
            ("intel", 0x2E7, 2696),
        ],
    )
    @pytest.mark.parametrize("name", ["unnamed", "x.xsave"])
    def test_ptraces_sizes(self, tmp_path, preset, mask, size, name):
        image = filled(PRESETS[preset], mask, size)
        (tmp_path / name).write_bytes(image.tobytes())
        (snapshot,) = snapshots.read(tmp_path / name)
        (vcpu,) = snapshot.vcpus
        assert (snapshot.kind, snapshot.producer) == ("process", "ptrace")
        assert np.array_equal(vcpu.area, image)
        assert vcpu.layout.restricted(mask) == PRESETS[preset].restricted(mask)

    def test_an_area_that_its_components_do_not_fit_into_is_for_a_rule_to_name(self, shared):
        (snapshot,) = snapshots.read(shared / "cases/areas/rr2342/i386.xsave")
        (vcpu,) = snapshot.vcpus
        assert (snapshot.kind, vcpu.area.size) == ("process", 576)
        (verdict,) = check(snapshot, [named("intel-broadwell@6.12")])
        assert verdict.verdict != "superset"
        assert "SIZE" in {finding.code for finding in verdict.findings}

    @pytest.mark.parametrize("pages", [2, 3])
    def test_zeros_up_to_three_pages_are_padding(self, tmp_path, sample, pages):
        path = tmp_path / "unnamed"
        path.write_bytes(sample.ljust(4096 * pages, b"\0"))
        (snapshot,) = snapshots.read(path)
        (vcpu,) = snapshot.vcpus
        assert (vcpu.area.tobytes(), snapshot.kind) == (sample, "vm")
        new = vcpu.area.copy()
        new[160] ^= 1
        with Source.open(path) as source:
            (splice,) = snapshots.splices(source, snapshot, {0: new})
        assert splice.offset == 160
        path.write_bytes(sample.ljust(4096 * pages - 1, b"\0") + b"\1")
        with pytest.raises(FormatError, match="got no FCW"):
            snapshots.read(path)

    @pytest.mark.parametrize("name", ["unnamed", "x.xsave"])
    def test_an_fxsave_area(self, tmp_path, sample, name):
        (tmp_path / name).write_bytes(sample[:512])
        (snapshot,) = snapshots.read(tmp_path / name)
        (vcpu,) = snapshot.vcpus
        assert vcpu.area[:416].tobytes() == sample[:416]
        assert (infer.header(vcpu.area), vcpu.layout_source) == ((3, 0), "format")
        new = vcpu.area.copy()
        new[512] = 1  # SSE becomes init
        with Source.open(tmp_path / name) as source:
            splices = snapshots.splices(source, snapshot, {0: new})
            with open(tmp_path / "out", "wb") as out:
                source.rewrite(splices, out)
        done = (tmp_path / "out").read_bytes()
        assert done == sample[:24] + b"\x80\x1f\0\0" + sample[28:160] + bytes(256) + sample[416:512]

    def test_512_bytes_that_are_no_area(self, tmp_path):
        (tmp_path / "x.xsave").write_bytes(b"\xff" * 512)
        with pytest.raises(FormatError, match="expected an FXSAVE area"):
            snapshots.read(tmp_path / "x.xsave")
        (tmp_path / "sector").write_bytes(b"\xeb\x3c\x90mkfs" * 73 + b"\x55")
        with pytest.raises(FormatError, match="not a snapshot format"):
            snapshots.read(tmp_path / "sector")


@pytest.mark.parametrize("cut", ["read", "judged"])
def test_a_large_file_that_shrinks_is_an_error(tmp_path, sample, cut):
    """SIGBUS ended the run, whose other files lost their answers."""
    script = (
        "import os, sys; from xfast import snapshots; from xfast.errors import FormatError\n"
        "from xfast.snapshots import sorts\n"
        "path, cut = sys.argv[1:]\n"
        "class Cut(sorts._Sorts):\n"
        "    def find(self, areas, first):\n"
        "        if cut == 'read' and first > 12000: os.truncate(path, 4096 * 8000)\n"
        "        return super().find(areas, first)\n"
        "sorts._Sorts = Cut\n"
        "try:\n"
        "    (snapshot,) = snapshots.read(path)\n"
        "    os.truncate(path, 4096 * 5)\n"
        "    print(len(snapshot.vcpus), snapshot.vcpus.classes[0].alike)\n"
        "    print(sum(int(vcpu.area[1]) for vcpu in snapshot.vcpus))\n"
        "except FormatError as problem:\n"
        "    print(problem)"
    )
    path = tmp_path / "many.xsave"
    count = raw.READ_UP_TO // 4096 + 8
    path.write_bytes(sample * count)
    done = subprocess.run(
        [sys.executable, "-c", script, path, cut], capture_output=True, text=True, timeout=120
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[:-1] == ([f"{count} {count}"] if cut == "judged" else [])
    assert str(path) in lines[-1]
    assert ": expected " in lines[-1]
    assert ", got " in lines[-1]


def test_no_row_is_of_another_sort_than_alone(tmp_path, data):
    """Rows are sorted by what they tell; where bytes decide, by which stretches are filled."""
    rng = np.random.default_rng(5)
    shapes = [np.frombuffer(p.read_bytes(), np.uint8) for p in (data / "raw").glob("*.xsave")]
    shapes = [shape for shape in shapes if len(shape) == 4096]
    rows = np.array([shapes[i] for i in rng.integers(0, len(shapes), 600)])
    for row in rows[::2]:
        row[512] |= 3
        row[513] |= rng.integers(0, 4)  # AVX-512's last component, PKRU
        row[28:32] = [0, 0, 0, 0] if rng.integers(2) else [255, 255, 0, 0]
        row[576:][rng.integers(0, 3520, 3)] = rng.integers(0, 2, 3)
    np.save(tmp_path / "stack.npy", rows)
    (stack,) = snapshots.read(tmp_path / "stack.npy")
    assert len(stack.vcpus.kinds) > 4
    for row, vcpu in zip(rows, stack.vcpus, strict=True):
        alone = raw._place(None, 0, row, None, raw.Beside(None, None))
        assert (vcpu.layout, vcpu.layout_source, vcpu.layout_note) == alone
        assert (vcpu.layout and vcpu.layout.name) == (alone.layout and alone.layout.name)


@pytest.mark.parametrize("named", [{"layout": PRESETS["amd-zen4"]}, {"size": 4096}])
def test_who_names_a_layout_or_a_size_says_that_the_file_is_raw(data, tmp_path, named):
    area = bytearray((data / "raw" / "kvm618-guestxcr0_e7-bve7.xsave").read_bytes())
    area[528:540] = range(1, 13)  # reserved, to be zero
    path = tmp_path / "dirty"
    path.write_bytes(area)
    with pytest.raises(FormatError, match="it is binary data"):
        snapshots.read(path)
    (found,) = snapshots.read(path, **named)
    assert found.format == "raw"
    assert found.vcpus[0].area.tobytes() == area
    path.write_text("no area" * 1024)
    with pytest.raises(FormatError, match=r"expected a multiple of|expected known components"):
        snapshots.read(path, **named)
