"""The XSAVE family against recordings of real CPUs and of emulated ones, and rule by rule."""

import ast
import base64
import json
import lzma
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xfast.kvm.instructions import (
    FAULTS,
    INSTRUCTIONS,
    Fault,
    xgetbv,
    xrstor,
    xrstors,
    xsave,
    xsavec,
    xsaveopt,
    xsaves,
)
from xfast.kvm.processor import AMD_ZEN4, BY_VENDOR, INTEL, Cpu, Processor, sign_extend
from xfast.xsave.features import bits
from xfast.xsave.layout import PRESETS, Layout, from_leaf_d

ALL = (1 << 64) - 1
ROOM = 12288
COMPACTED = 1 << 63
TILECFG, TILEDATA, UINTR = 1 << 17, 1 << 18, 1 << 14
VECTORS = {6: "#UD", 7: "#NM", 13: "#GP"}
MSRS = {
    "U_CET": (11, 0),
    "PL3_SSP": (11, 8),
    "PL0_SSP": (12, 0),
    "PL1_SSP": (12, 8),
    "PL2_SSP": (12, 16),
    "UINTR_HANDLER": (14, 0),
    "UINTR_STACKADJUST": (14, 8),
    "UINTR_MISC": (14, 16),
    "UINTR_PD": (14, 24),
    "UINTR_RR": (14, 32),
    "UINTR_TT": (14, 40),
}
"""Where the supervisor components hold MSRs: component, and byte in it."""

UNSPECIFIED = {9: (4, 8), 4: (16, 64)}
"""Bytes of PKRU and BNDCSR that a save writes as 0 or leaves alone."""


def memory(text, size):
    """Decode a recorded buffer into memory with room behind it."""
    data = b"\xcc" * size if text == "cc" else zlib.decompress(base64.b64decode(text[2:]))
    area = np.full(ROOM, 0xCC, np.uint8)
    area[: len(data)] = np.frombuffer(data, np.uint8)
    return area, len(data)


def blank(fill=0):
    """Return memory with a zero header."""
    area = np.full(ROOM, fill, np.uint8)
    area[512:576] = 0
    return area


def put64(area, at, value):
    area[at : at + 8] = np.frombuffer(value.to_bytes(8, "little"), np.uint8)


def get64(area, at):
    return int.from_bytes(area[at : at + 8].tobytes(), "little")


def image(xstate_bv, xcomp_bv=0, **components):
    """Return an area with this header, MXCSR 0x1F80 and {name: (offset, bytes)}."""
    area = blank()
    area[:2] = 0x7F, 3
    area[24:26] = 0x80, 0x1F
    put64(area, 512, xstate_bv)
    put64(area, 520, xcomp_bv)
    for at, data in components.values():
        area[at : at + len(data)] = np.frombuffer(data, np.uint8)
    return area


def recordings(data, name):
    with lzma.open(data / "vectors" / f"{name}.jsonl.xz", "rt") as lines:
        return [json.loads(line) for line in lines]


def emulated_cpu(record):
    """Return the description of the CPU that a record of emu.jsonl comes from."""
    rows = {int(nr): tuple(row) for nr, row in ast.literal_eval(str(record["leaf_d"])).items()}
    layout, unplaced = from_leaf_d(rows)
    slots = layout.slots + PRESETS["intel"].restricted(unplaced).slots
    family = {0: "xsaveopt", 1: "xsavec", 2: "xgetbv1", 3: "xsaves"}
    return Cpu(
        record["emulator"],
        Layout(tuple(sorted(slots))),
        frozenset(name for bit, name in family.items() if rows[1][0] >> bit & 1)
        | {"xgetbv1"},  # Bochs 2.7 has it without saying so at reset
        extends_fdp=True,
        finds_init="qemu" not in record["emulator"],
        mxcsr_counts_as_sse=True,
        refuses_bv63=False,
        linear_bits=57 if "sapphire" in record["emulator"] else 48,
    )


def cpu_of(record):
    """Return the description of the CPU that a recording comes from."""
    if "emulator" in record:
        return emulated_cpu(record)
    if "leaf_d" in record:
        rows = {int(nr): tuple(row) for nr, row in record["leaf_d"].items()}
        return replace(BY_VENDOR[record["vendor"]], layout=from_leaf_d(rows)[0])
    return AMD_ZEN4


class Replay:
    """One recording, played on the model; `wrong` collects what differs."""

    def __init__(self, record):
        self.record = record
        self.wrong = []
        self.cpu = Processor(cpu_of(record), record.get("xcr0", 0xE7), record.get("xss", 0))
        self.cpu.xfd = record.get("xfd", 0)
        self.name = record["op"].removesuffix("_SAME")
        self.mode, _, self.name = self.name.rpartition("_")
        self.play()

    def play(self):
        record, cpu = self.record, self.cpu
        setup, _ = memory(record["setup"], 4096)
        setup_op = record.get("setup_op", "XRSTOR64").removesuffix("64").lower()
        cpu.cpl = 0
        INSTRUCTIONS[setup_op](cpu, setup, record.get("setup_rfbm", ALL), address=0)
        self.check_xinuse("setup_xinuse")
        self.check_msrs("setup")
        target, size = memory(record["target"], record.get("buflen", 4096))
        at = 4096 + record["misalign"]
        if record["op"].endswith("_SAME"):
            target[512:520] = setup[512:520]
            at = 0
            modify(cpu, record.get("modify"))
        self.execute(target, at)
        if "out" in record:
            standard = self.name.removesuffix("64") in ("XSAVE", "XSAVEOPT")
            self.compare("out", target, size, standard=standard)
        after = "post_after_fault" if "post_after_fault" in record else "post"
        if record.get("sdm") != "agree_partial_state_after_fault":
            self.check_msrs(after)
            if after in record:
                self.read_back(after)

    def execute(self, target, address):
        record, cpu = self.record, self.cpu
        cpu.cpl = 3 if self.mode == "CPL3" else 0
        cpu.long_mode = self.mode != "COMPAT"
        cpu.task_switched = bool(record.get("cr0_ts"))
        cpu.osxsave = not record.get("cr4_osxsave_0")
        vector = None
        try:
            INSTRUCTIONS[self.name.removesuffix("64").lower()](
                cpu,
                target,
                record["rfbm"],
                address=address,
                rex_w=self.name.endswith("64"),
                lock=self.mode == "LOCK",
            )
        except Fault as fault:
            vector = fault.rule.vector
            if "vendor" in record:
                cpu.tracked |= 3  # Linux's signal frame says so of x87 and SSE
        recorded = VECTORS.get(record["trapno"], vector) if record["sig"] else None
        if vector != recorded or bool(vector) != bool(record["sig"]):
            self.wrong.append(f"faulted with {vector}, recorded {recorded}")
        cpu.cpl, cpu.long_mode, cpu.task_switched, cpu.osxsave = 0, True, False, True

    def read_back(self, after):
        self.check_xinuse(f"{after}_xinuse")
        area = blank(0xCC)
        xsave(self.cpu, area, ALL)
        self.compare(after, area, ROOM)
        if f"{after}_xsaves" in self.record:
            area = blank(0xCC)
            self.cpu.xrstor_info = None
            xsaves(self.cpu, area, ALL)
            self.compare(f"{after}_xsaves", area, ROOM, standard=False)

    def check_xinuse(self, key):
        """Compare XGETBV(1); a CPU that does not find init values may report more."""
        cpu, recorded = self.cpu, self.record[key]
        if cpu.cpu.finds_init or "vendor" in self.record:
            wrong = xgetbv(cpu, 1) != recorded
        else:
            wrong = any(not recorded >> nr & 1 for nr in bits(cpu.tracked) if not cpu.is_init(nr))
            cpu.tracked = recorded
        if wrong:
            self.wrong.append(f"{key}: {xgetbv(cpu, 1):#x}, recorded {recorded:#x}")

    def check_msrs(self, when):
        """Compare the MSRs and PKRU behind the components, as far as they were read back."""
        values, at = self.cpu.values, self.cpu.offsets
        for name, recorded in self.record.get(f"{when}_msrs", {}).items():
            nr, offset = MSRS.get(name, (0, 0))
            if self.cpu.xss >> nr & 1:
                mine = get64(values, at[nr] + offset)
                if name == "UINTR_MISC":
                    mine &= (1 << 40) - 1  # UIF is no part of the MSR
                if mine != recorded:
                    self.wrong.append(f"{when}: {name} {mine:#x}, recorded {recorded:#x}")
        pkru = self.record.get(f"{when}_pkru")
        if self.cpu.xcr0 >> 9 & 1 and pkru is not None and get64(values, at[9]) != pkru:
            self.wrong.append(f"{when}: PKRU, recorded {pkru:#x}")

    def compare(self, key, area, size, standard=True):
        recorded, length = memory(self.record[key], size)
        layout = self.cpu.cpu.layout
        offsets = {slot.nr: slot.offset for slot in layout.slots if slot.offset}
        if not standard:
            offsets = layout.compacted_offsets(get64(recorded, 520) & ~COMPACTED & layout.mask)
        ignored = [(at, at + n) for at, n in self.record.get("dont_care") or []]
        ignored += [
            (offsets[nr] + a, offsets[nr] + b)
            for nr, (a, b) in UNSPECIFIED.items()
            if nr in offsets
        ]
        differs = area[:length] != recorded[:length]
        for start, end in ignored:
            differs[start:end] = False
        if differs.any():
            places = np.flatnonzero(differs)
            self.wrong.append(f"{key}: {len(places)} bytes differ, the first at {places[0]}")


def modify(cpu, how):
    """Do what the recorder did between the restore and the XSAVEOPT."""
    values, at = cpu.values, cpu.offsets
    written = 0
    if how in (1, 2):  # PCMPEQD XMM15, XMM15; VPCMPEQD YMM15, YMM15, YMM15
        values[400:416] = 0xFF
        written = 2
    if how == 2:
        values[at[2] + 240 : at[2] + 256] = 0xFF
        values[at[6] + 480 : at[6] + 512] = 0
        written = 0x46
    if how == 3:  # KXNORW K7, K7, K7
        values[at[5] + 56 : at[5] + 64] = (0xFF, 0xFF, 0, 0, 0, 0, 0, 0)
        written = 0x20
    if how == 4:
        fldz(values)
        written = 1
    cpu.tracked |= written
    cpu.xmodified |= written


def fldz(values):
    """Push +0.0; onto a full register file, the indefinite value, as masked stack overflow."""
    fsw = int(values[2]) | int(values[3]) << 8
    top = (fsw >> 11) - 1 & 7
    full = values[4] >> top & 1
    fsw = fsw & ~0x3A00 | top << 11 | (0x241 if full else 0)
    values[2:4] = fsw & 0xFF, fsw >> 8
    values[4] |= 1 << top
    values[48:160] = values[32:144].copy()
    values[32:48] = 0
    if full:
        values[39:42] = 0xC0, 0xFF, 0xFF


@pytest.mark.parametrize(("name", "count"), [("hw", 286), ("hw-intel", 800), ("emu", 1557)])
def test_every_recording_is_reproduced(data, name, count):
    replays = [Replay(record) for record in recordings(data, name)]
    assert len(replays) == count
    wrong = [f"{r.record['id']} {r.record['op']}: {r.wrong}" for r in replays if r.wrong]
    assert not wrong, "\n".join(wrong[:20])


def test_the_copies_are_the_shared_recordings(shared, data):
    for name in ("hw", "emu"):
        lines = (shared / "vectors" / f"{name}.jsonl").read_text()
        assert recordings(data, name) == [json.loads(line) for line in lines.splitlines()]


def amx(xcr0=0x600E7, **changes):
    """Return an Intel CPU with AMX."""
    return Processor(
        replace(INTEL, layout=PRESETS["intel"].restricted(~(1 << 19)), **changes), xcr0
    )


def with_tiles(**changes):
    cpu = amx(**changes)
    config = bytes([1, 0]) + bytes(14) + b"\x40\x00" + bytes(30) + b"\x10" + bytes(15)
    area = image(0x60007, c=(2752, config), d=(2816, b"\x5a" * 8192), x=(160, b"\x11" * 256))
    xrstor(cpu, area, ALL)
    return cpu


# Intel SDM vol. 1 section 13.14: XFD. What the saves and a refused restore do was also measured
# on Sapphire Rapids, in a process without permission for tile data.


@pytest.mark.parametrize("instruction", [xsave, xsaveopt, xsavec, xsaves])
def test_xfd_makes_a_save_see_the_initial_value(instruction):
    cpu = with_tiles()
    cpu.cpl, cpu.xfd = 0, TILEDATA
    area = blank(0xCC)
    instruction(cpu, area, 0x60000)
    assert get64(area, 512) == TILECFG
    start = 2816 if instruction in (xsave, xsaveopt) else 640
    written = 0 if instruction is xsave else 0xCC
    assert (area[start : start + 8192] == written).all()
    cpu.xfd = 0
    instruction(cpu, area, 0x60000)
    assert get64(area, 512) == TILECFG | TILEDATA
    assert (area[start : start + 8192] == 0x5A).all()


@pytest.mark.parametrize("instruction", [xrstor, xrstors])
def test_xfd_refuses_to_load_a_disabled_component(instruction):
    cpu = with_tiles()
    before = cpu.values.copy()
    cpu.cpl, cpu.xfd = 0, TILEDATA
    with pytest.raises(Fault, match=r"#NM \(xfd\).*tiledata") as caught:
        instruction(cpu, image(0x40003, 0x60007 | COMPACTED), ALL)
    assert caught.value.rule.vector == "#NM"
    assert cpu.xfd_err == TILEDATA
    assert (cpu.values == before).all()


@pytest.mark.parametrize(("rfbm", "xstate_bv"), [(0x60007, 3), (7, 0x40003)])
def test_xfd_allows_to_initialise_and_to_leave_alone(rfbm, xstate_bv):
    cpu = with_tiles()
    cpu.xfd = TILEDATA
    xrstor(cpu, image(xstate_bv), rfbm)
    assert cpu.xfd_err == 0
    assert cpu.is_init(18) == bool(rfbm & TILEDATA)


# Intel SDM vol. 2 LDTILECFG, CPUID leaf 1DH; what XRSTOR does was measured on Sapphire Rapids.


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, True),
        ({1: 200}, True),
        ({0: 0}, False),
        ({0: 2}, False),
        ({5: 1}, False),
        ({16: 65}, False),
        ({48: 17}, False),
        ({48: 0}, False),
        ({16: 0}, False),
        ({32: 1}, False),
        ({57: 1}, False),
    ],
)
def test_a_tile_configuration_that_is_not_supported_is_loaded_as_initial(change, kept):
    config = bytearray(64)
    config[0], config[16], config[48] = 1, 64, 16
    for at, value in change.items():
        config[at] = value
    cpu = amx()
    xrstor(cpu, image(TILECFG, c=(2752, config)), ALL)
    assert xgetbv(cpu, 1) == (TILECFG if kept else 0)
    area = blank(0xCC)
    xsave(cpu, area, TILECFG)
    assert area[2752:2816].tobytes() == (bytes(config) if kept else bytes(64))


def test_tile_data_is_kept_whatever_the_configuration():
    cpu = amx()
    xrstor(cpu, image(TILEDATA, d=(2816, b"\x09" * 8192)), ALL)
    assert xgetbv(cpu, 1) == TILEDATA
    area = blank()
    xsavec(cpu, area, 0x60000)
    assert (area[640 : 640 + 8192] == 9).all()


# Intel APX Architecture Specification, section on XSAVE: component 19 takes MPX's place in the
# standard format, and follows tile data in the compacted one.


def apx_cpu():
    return Processor(replace(INTEL, layout=PRESETS["intel"].restricted(0xE02E7)), 0xE02E7)


def test_apx_takes_mpx_place_in_the_standard_format():
    cpu = apx_cpu()
    registers = bytes(range(128))
    xrstor(cpu, image(1 << 19, r=(960, registers)), ALL)
    area = blank(0xCC)
    xsave(cpu, area, 1 << 19)
    assert area[960:1088].tobytes() == registers
    assert (area[1088:] == 0xCC).all()


def test_apx_comes_last_in_the_compacted_format():
    cpu = apx_cpu()
    registers = bytes(range(128))
    xrstor(cpu, image(1 << 19, r=(960, registers)), ALL)
    area = blank(0xCC)
    xsavec(cpu, area, 0xE0007)
    assert get64(area, 512) == 1 << 19
    assert area[9088:9216].tobytes() == registers
    assert (area[576:9088] == 0xCC).all()
    other = apx_cpu()
    xrstor(other, area, ALL)
    assert (other.values == cpu.values).all()


# Intel SDM vol. 1 sections 13.9 and 13.11: the modified optimisation.


def restored(instruction, area, address=0, **state):
    cpu = Processor(replace(INTEL, layout=PRESETS["intel"].restricted(0x1AE7)), 0xE7, 0x1800)
    cpu.cpl = 0
    for name, value in state.items():
        setattr(cpu, name, value)
    instruction(cpu, area, ALL, address=address)
    return cpu


LIVE = image(7, 0, x=(160, b"\x22" * 256), y=(576, b"\x33" * 256))
PACKED = image(7, 7 | COMPACTED, x=(160, b"\x22" * 256), y=(576, b"\x33" * 256))


def test_xsaveopt_leaves_out_what_was_not_modified():
    cpu = restored(xrstor, LIVE)
    cpu.xmodified |= 2
    area = blank(0xCC)
    xsaveopt(cpu, area, ALL)
    assert (area[160:416] == 0x22).all()
    assert (area[576:832] == 0xCC).all()
    assert get64(area, 512) == 7


@pytest.mark.parametrize(
    ("restore", "source", "address", "change"),
    [
        (xrstor, LIVE, 64, {}),
        (xrstor, PACKED, 0, {}),
        (xrstor, LIVE, 0, {"cpl": 3}),
        (xrstor, LIVE, 0, {"guest": True}),
    ],
)
def test_xsaveopt_writes_everything_after_another_restore(restore, source, address, change):
    cpu = restored(restore, source, address)
    for name, value in change.items():
        setattr(cpu, name, value)
    area = blank(0xCC)
    xsaveopt(cpu, area, ALL)
    assert (area[576:832] == 0x33).all()


def test_xsaves_leaves_out_only_under_the_same_xcomp_bv():
    area = blank(0xCC)
    cpu = restored(xrstors, PACKED)
    xsaves(cpu, area, 7)
    assert (area[576:832] == 0xCC).all()
    assert (area[24:32] == 0xCC).all()
    xsaves(cpu, area, ALL)
    assert (area[576:832] == 0x33).all()


@pytest.mark.parametrize(
    ("always", "mxcsr", "written"),
    [(False, 0x1F80, False), (False, 0x1FA0, True), (True, 0x1F80, True)],
)
def test_xsaves_of_an_unmodified_mxcsr(always, mxcsr, written):
    # Seen under KVM: Sapphire Rapids leaves out 0x1F80 only, Zen 4 nothing.
    area = PACKED.copy()
    area[24:26].view("<u2")[:] = mxcsr
    cpu = restored(xrstors, area)
    cpu.cpu = replace(cpu.cpu, always_saves_mxcsr=always)
    area[24:32] = area[160:416] = 0xCC
    xsaves(cpu, area, 7)
    assert (area[160:416] == 0xCC).all()
    assert area[24:32].tobytes() == (
        mxcsr.to_bytes(4, "little") + b"\xff\xff\0\0" if written else b"\xcc" * 8
    )


def test_a_restore_leaves_components_it_was_not_asked_for_modified():
    cpu = restored(xrstor, LIVE)
    xrstor(cpu, LIVE, 2)
    area = blank(0xCC)
    xsaveopt(cpu, area, 7)
    assert (area[160:416] == 0xCC).all()
    assert (area[576:832] == 0x33).all()


# Every row of FAULTS, on the recorded rules' own terms.


def faulty(**state):
    return restored(lambda *a, **k: None, None, **state)


FAULTY = {
    "lock": (xsave, {}, LIVE, {"lock": True}),
    "osxsave": (xsave, {"osxsave": False}, LIVE, {}),
    "unsupported": (xsavec, {"cpu": replace(INTEL, xsave=frozenset())}, LIVE, {}),
    "task-switched": (xrstor, {"task_switched": True}, LIVE, {}),
    "cpl": (xsaves, {"cpl": 3}, LIVE, {}),
    "alignment": (xrstor, {}, LIVE, {"address": 32}),
    "bv-xcr0": (xrstor, {}, image(0x207), {}),
    "header-8-23": (xrstor, {}, image(7, 1), {}),
    "standard": (xrstors, {}, LIVE, {}),
    "xcomp": (xrstor, {}, image(7, 0x807 | COMPACTED), {}),
    "bv-xcomp": (xrstor, {}, image(0x27, 7 | COMPACTED), {}),
    "header-16-63": (xrstors, {}, image(7, 7 | COMPACTED, r=(575, b"\1")), {}),
    "mxcsr": (xrstor, {}, image(0, m=(26, b"\2")), {}),
    "cet": (xrstors, {}, image(0x800, 0x800 | COMPACTED, u=(576, b"\x40")), {}),
    "xfd": (xrstor, {"xfd": 4}, LIVE, {}),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_names_its_rule_and_changes_nothing(name):
    instruction, state, area, how = FAULTY[name]
    cpu = faulty(**state)
    before = cpu.values.copy(), cpu.tracked, area.copy()
    with pytest.raises(Fault) as caught:
        instruction(cpu, area, ALL, **how)
    assert caught.value.rule is FAULTS[name]
    assert str(caught.value).startswith(f"{FAULTS[name].vector} ({name})")
    assert (cpu.values == before[0]).all()
    assert cpu.tracked == before[1]
    assert (area == before[2]).all()


def test_uintr_is_not_loaded_while_its_vector_is_set_and_xsaves_clears_it():
    cpu = Processor(INTEL, 7, UINTR)
    cpu.cpl = 0
    state = bytes(20) + b"\x20" + bytes(27)
    xrstors(cpu, image(UINTR, UINTR | COMPACTED, u=(576, state)), ALL)
    with pytest.raises(Fault, match=r"#GP \(uintr\)"):
        xrstors(cpu, image(UINTR, UINTR | COMPACTED), ALL)
    area = blank()
    xsaves(cpu, area, UINTR, address=64)
    assert area[596] == 0x20
    xrstors(cpu, image(UINTR, UINTR | COMPACTED), ALL)


@pytest.mark.parametrize(("index", "cpu"), [(2, INTEL), (1, replace(INTEL, xsave=frozenset()))])
def test_xgetbv_of_a_register_that_is_not_there(index, cpu):
    with pytest.raises(Fault, match=r"#GP \(xcr\)"):
        xgetbv(Processor(cpu, 7), index)


def test_every_fault_has_a_test():
    assert FAULTY.keys() | {"uintr", "xcr"} == FAULTS.keys()


def test_without_xsavec_a_compacted_area_breaks_the_standard_format():
    # Intel SDM vol. 1 section 13.8: the compacted form exists only where CPUID has XSAVEC.
    cpu = Processor(replace(INTEL, xsave=frozenset({"xsaveopt"})), 7)
    with pytest.raises(Fault, match="header-8-23"):
        xrstor(cpu, PACKED, ALL)


def test_pkru_has_32_bits():
    # Intel SDM vol. 1 section 13.5.7: bytes 7:4 of the component are not used.
    cpu = Processor(INTEL, 0x203)
    xrstor(cpu, image(0x200, k=(2688, b"\x55" * 8)), ALL)
    area = blank()
    xsave(cpu, area, 0x200)
    assert area[2688:2696].tobytes() == b"\x55" * 4 + bytes(4)


def test_bv63_in_a_compacted_area_is_a_matter_of_the_cpu():
    area = image(7 | COMPACTED, 7 | COMPACTED)
    with pytest.raises(Fault, match="bv-xcomp"):
        xrstor(Processor(AMD_ZEN4, 7), area, ALL)
    xrstor(Processor(replace(INTEL, refuses_bv63=False), 7), area, ALL)


def test_init_data_that_was_loaded_counts_as_in_use_on_intel_and_not_on_amd():
    assert xgetbv(restored(xrstor, image(4)), 1) == 4
    cpu = Processor(AMD_ZEN4, 0xE7)
    xrstor(cpu, image(4), ALL)
    assert xgetbv(cpu, 1) == 0


def test_an_area_that_is_too_short_is_refused_before_anything_is_written():
    cpu = amx()
    area = np.full(2816, 0xCC, np.uint8)
    with pytest.raises(ValueError, match="area: got 2816 bytes, needed 11008"):
        xsave(cpu, area, ALL)
    assert (area == 0xCC).all()
    with pytest.raises(ValueError, match="area: got 575 bytes, needed 576"):
        xrstor(cpu, area[:575], ALL)


def test_xcr0_beyond_the_layout_is_refused():
    with pytest.raises(ValueError, match="xcr0: got 0x60007, needed components of amd-zen4"):
        Processor(AMD_ZEN4, 0x60007)
    with pytest.raises(ValueError, match="xss: got 0x4, needed components of intel"):
        Processor(INTEL, 7, 4)


@given(st.integers(0, ALL), st.integers(1, 64))
def test_sign_extension_keeps_the_low_bits_and_repeats_the_top_one(pointer, width):
    low = pointer & (1 << width) - 1
    signed = low - (1 << width) if low >> (width - 1) else low
    assert sign_extend(pointer, width) == signed & ALL


@given(
    st.integers(0, 0xE7),
    st.integers(0, 2**32),
    st.sampled_from([(xsave, xrstor), (xsaveopt, xrstor), (xsavec, xrstor), (xsaves, xrstors)]),
    st.sampled_from([AMD_ZEN4, replace(INTEL, layout=PRESETS["intel"].restricted(0xE7))]),
)
def test_what_is_saved_is_restored(xstate_bv, seed, pair, description):
    save, restore = pair
    source = np.random.default_rng(seed).integers(0, 256, ROOM, np.uint8)
    source[24:28] = 0x80, 0x1F, 0, 0
    source[512:576] = 0
    put64(source, 512, xstate_bv & 0xE7)
    one, two = Processor(description, 0xE7), Processor(description, 0xE7)
    one.cpl = two.cpl = 0
    xrstor(one, source, ALL, address=64)
    area = blank(0xCC)
    save(one, area, ALL)
    restore(two, area, ALL)
    assert (one.values == two.values).all()
    assert one.xinuse == two.xinuse
