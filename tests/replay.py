"""Play recordings of real and emulated machines on the models, and tell what differs.

    python tests/replay.py FILE...

A file holds JSON lines, plain or as .xz. A line is a recording of one XSAVE instruction (what was
loaded, executed and read back) or of a sequence of KVM's ioctls (those have `ops`); the content
tells. Prints `N recordings, M differ` and the first differences; the exit code is 1 if any differ.

The CPU's description comes from the recording: leaf 0xD, vendor, family and model. What those
leave open (the width of x87's pointers, how PKRU is saved, on an unmeasured CPU more) is one value
for all recordings of a machine: the one that explains most of them. It is named on stderr.
"""

import argparse
import ast
import base64
import collections
import json
import lzma
import sys
import zlib
from dataclasses import replace

import numpy as np

from xfast.hosts.model import Host
from xfast.hosts.silicon import generation
from xfast.kernels.uapi import KVM_EXIT_HLT
from xfast.kvm import Kernel
from xfast.kvm.instructions import INSTRUCTIONS, Fault, xgetbv, xrstor, xsave, xsaves
from xfast.kvm.processor import BY_GENERATION, ZEN4, Cpu, Processor, cpu_by_model
from xfast.xsave.cpuid import Cpuid, Entry
from xfast.xsave.features import (
    BY_NAME,
    BY_NR,
    MXCSR_MASK_AMD,
    MXCSR_MASK_INTEL,
    PKRU,
    PKRU_NR,
    XCOMP_BV_COMPACTED,
    XFEATURE_MASK_FPSSE,
    bits,
)
from xfast.xsave.layout import PRESETS, Layout, from_leaf_d

ALL = (1 << 64) - 1
ROOM = 12288
SHOWN = 10

VECTORS = {6: "#UD", 7: "#NM", 13: "#GP"}
XSAVE_FAMILY = {0: "xsaveopt", 1: "xsavec", 2: "xgetbv1", 3: "xsaves"}
"""CPUID leaf 0xD.1 EAX: the instructions beyond XSAVE and XRSTOR."""

ZEN4_XCR0 = 0xE7
ZEN4_LEAF_D = {
    0: (0xE7, 0x980, 0x980, 0),
    1: (0xF, 0x9A8, 0x1800, 0),
    2: (0x100, 0x240, 0, 0),
    5: (0x40, 0x340, 0, 0),
    6: (0x200, 0x380, 0, 0),
    7: (0x400, 0x580, 0, 0),
    11: (0x10, 0, 1, 0),
    12: (0x18, 0, 1, 0),
}
"""The machine of the recordings that name none."""

OPEN = {
    "x87_pointer_bits": (48, 57),
    "pkru_always_modified": (False, True),
    "pkru_bytes": (4, 8),
    "finds_init": (False, True),
    "extends_fdp": (False, True),
    "saves_x87_pointers": (False, True),
    "keeps_x87_selectors": (False, True),
    "mxcsr_counts_as_sse": (False, True),
    "refuses_bv63": (False, True),
    "always_saves_mxcsr": (False, True),
}
"""Fields of `Cpu` that a recording may leave open, and what they can be.

Those of NULLABLE are open where they are None, the others on a CPU that nobody measured.
"""
NULLABLE = ("x87_pointer_bits", "pkru_always_modified", "pkru_bytes")

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

UNMASKING_FCW = 0x340

BNDCSR_UNSPECIFIED = (16, 64)
"""Bytes of BNDCSR that a save writes as 0 or leaves alone."""


def read(path):
    """Return the recordings of a file."""
    with (lzma.open if str(path).endswith(".xz") else open)(path, "rt") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def unpack(text):
    return zlib.decompress(base64.b64decode(text.removeprefix("z:")))


def memory(text, size):
    """Decode a recorded buffer into memory with room behind it."""
    data = b"\xcc" * size if text == "cc" else unpack(text)
    area = np.full(max(ROOM, len(data)), 0xCC, np.uint8)
    area[: len(data)] = np.frombuffer(data, np.uint8)
    return area, len(data)


def blank(fill=0):
    """Return memory with a zero header."""
    area = np.full(ROOM, fill, np.uint8)
    area[512:576] = 0
    return area


def get64(area, at):
    return int.from_bytes(area[at : at + 8].tobytes(), "little")


def leaf_rows(record):
    """Return {sub-leaf: (eax, ebx, ecx, edx)} of leaf 0xD as the recording has it, or None."""
    for key, value in record.items():
        if "leaf_d" in key and value and not isinstance(value, bool):
            value = ast.literal_eval(value) if isinstance(value, str) else value
            if isinstance(value, list):
                value = {row[0]: row[1:] for row in value}
            return {int(nr): tuple(row) for nr, row in value.items()}
    return None


def layout_of(record, rows):
    """Return leaf 0xD's layout; components that it does not place are where Intel has them."""
    layout, unplaced = from_leaf_d(rows)
    if "emulator" not in record:
        return layout
    slots = layout.slots + PRESETS["intel"].restricted(unplaced).slots
    return Layout(tuple(sorted(slots)))


def cpu_of(record):
    """Return the description of the CPU that a recording comes from."""
    rows = leaf_rows(record)
    if rows is None:
        return ZEN4
    layout = layout_of(record, rows)
    announced = rows.get(1, (0,))[0]
    family = frozenset(name for bit, name in XSAVE_FAMILY.items() if announced >> bit & 1)
    if "emulator" in record:
        return Cpu(
            record["emulator"],
            layout,
            family | {"xgetbv1"},  # Bochs 2.7 has it without saying so at reset
            extends_fdp=True,
            finds_init="qemu" not in record["emulator"],
            mxcsr_counts_as_sse=True,
            refuses_bv63=False,
            x87_pointer_bits=57 if "sapphire" in record["emulator"] else 48,
            linear_bits=57 if "sapphire" in record["emulator"] else 48,
        )
    cpu = cpu_by_model(record.get("vendor"), record.get("family"), record.get("model"))
    cpu = replace(cpu, layout=layout, xsave=family)
    if "mxcsr_mask" in record:
        cpu = replace(cpu, mxcsr_mask=record["mxcsr_mask"])
    return cpu


class Instruction:
    """A recording of one instruction, played on the model; `wrong` collects what differs."""

    def __init__(self, record, cpu):
        self.record = record
        self.wrong = []
        self.cpu = Processor(cpu, record.get("xcr0", ZEN4_XCR0), record.get("xss", 0))
        self.cpu.xfd = record.get("xfd", 0)
        self.name = record["op"].removesuffix("_SAME")
        self.mode, _, self.name = self.name.rpartition("_")
        self.emulated = "emulator" in record
        self.play()

    def play(self):
        record, cpu = self.record, self.cpu
        setup, _ = memory(record["setup"], 4096)
        setup_op = record.get("setup_op", "XRSTOR64")
        cpu.cpl = 0
        INSTRUCTIONS[setup_op.removesuffix("64").lower()](
            cpu,
            setup,
            record.get("setup_rfbm", ALL),
            address=0,
            rex_w=setup_op.endswith("64"),
        )
        self.check_xinuse("setup_xinuse")
        self.check_msrs("setup")
        modify(cpu, record.get("modify"))
        target, size = memory(record["target"], record.get("buflen", 4096))
        at = 4096 + record.get("misalign", 0)
        if record["op"].endswith("_SAME"):
            target[512:520] = setup[512:520]
            at = 0
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
            if not self.emulated:
                pass_through_a_signal(cpu)
        trap = record.get("trapno")
        recorded = VECTORS.get(trap, vector) if record["sig"] else None
        if vector != recorded or bool(vector) != bool(record["sig"]):
            self.wrong.append(f"faulted with {vector}, recorded {recorded}")
        cpu.cpl, cpu.long_mode, cpu.task_switched, cpu.osxsave = 0, True, False, True

    def read_back(self, after):
        if f"{after}_xinuse" in self.record:
            self.check_xinuse(f"{after}_xinuse")
        area = blank(0xCC)
        wide = self.record.get(f"{after}_op", "XSAVE64").endswith("64")
        xsave(self.cpu, area, ALL, rex_w=wide)
        self.compare(after, area, ROOM)
        if f"{after}_xsaves" in self.record:
            area = blank(0xCC)
            self.cpu.xrstor_info = None
            xsaves(self.cpu, area, ALL)
            self.compare(f"{after}_xsaves", area, ROOM, standard=False)

    def check_xinuse(self, key):
        """Compare XGETBV(1); an emulator that does not find init values may report more."""
        cpu, recorded = self.cpu, self.record.get(key)
        if recorded is None:
            return
        if cpu.cpu.finds_init or not self.emulated:
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
        if self.cpu.xcr0 & PKRU and pkru is not None and get64(values, at[PKRU_NR]) != pkru:
            self.wrong.append(f"{when}: PKRU, recorded {pkru:#x}")

    def compare(self, key, area, size, standard=True):
        recorded, length = memory(self.record[key], size)
        layout = self.cpu.cpu.layout
        offsets = {slot.nr: slot.offset for slot in layout.slots if slot.offset}
        if not standard:
            mask = get64(recorded, 520) & ~XCOMP_BV_COMPACTED & layout.mask
            offsets = layout.compacted_offsets(mask)
        ignored = [(at, at + n) for at, n in self.record.get("dont_care") or []]
        ignored += self.unspecified(offsets)
        differs = area[:length] != recorded[:length]
        for start, end in ignored:
            differs[start:end] = False
        if differs.any():
            at = int(np.flatnonzero(differs)[0])
            self.wrong.append(
                f"{key}: {np.count_nonzero(differs)} bytes differ, the first at {at}: "
                f"{area[at]:#04x}, recorded {recorded[at]:#04x}"
            )

    def unspecified(self, offsets):
        """Yield the bytes (start, end) of which nobody knows whether a save writes them."""
        bndcsr = BY_NAME["bndcsr"].nr
        if bndcsr in offsets:
            yield tuple(offsets[bndcsr] + byte for byte in BNDCSR_UNSPECIFIED)
        if PKRU_NR in offsets and self.cpu.cpu.pkru_bytes is None:
            yield offsets[PKRU_NR] + 4, offsets[PKRU_NR] + BY_NR[PKRU_NR].size


def pass_through_a_signal(cpu):
    """Do to the registers what Linux does when a fault becomes a signal.

    The frame is saved and restored by 64-bit forms, and says that x87 and SSE are in use; PKRU
    is written on its own.
    """
    cpu.fcs = cpu.fds = 0
    if not cpu.cpu.finds_init:
        cpu.tracked |= XFEATURE_MASK_FPSSE | cpu.xcr0 & PKRU


def modify(cpu, how):
    """Do what the recorder did between the setup and the instruction."""
    values, at = cpu.values, cpu.offsets
    written = 0
    if how in (1, 2):  # PCMPEQD XMM15, XMM15; VPCMPEQD YMM15, YMM15, YMM15
        values[400:416] = 0xFF
        written = BY_NAME["sse"].bit
    if how == 2:
        values[at[2] + 240 : at[2] + 256] = 0xFF
        written |= BY_NAME["avx"].bit
        if cpu.xinuse & BY_NAME["zmm_hi256"].bit:  # what is not in use stays so
            values[at[6] + 480 : at[6] + 512] = 0
            written |= BY_NAME["zmm_hi256"].bit
    if how == 3:  # KXNORW K7, K7, K7
        values[at[5] + 56 : at[5] + 64] = (0xFF, 0xFF, 0, 0, 0, 0, 0, 0)
        written = BY_NAME["opmask"].bit
    if how == 4:
        fldz(values)
        written = BY_NAME["x87"].bit
    if how == 6:  # FLDCW, which unmasks every exception
        values[:2].view("<u2")[0] = UNMASKING_FCW
        fcw, fsw = (int(word) for word in values[:4].view("<u2"))
        values[2:4].view("<u2")[0] = cpu.status_word(fcw, fsw)
        written = BY_NAME["x87"].bit
    if how == 5:
        values[at[PKRU_NR] : at[PKRU_NR] + 4].view("<u4")[0] = 0x55555550
        written = PKRU
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


class ExactTcgProcessor(Processor):
    """QEMU's emulated CPU, patched to track XINUSE: its x87 has no pointers and checks nothing.

    It has no modified optimisation: nothing is remembered of the last restore.
    """

    xrstor_info = property(lambda self: None, lambda self, value: None)

    def load(self, area, nr, at, *, rex_w=True):
        if nr:
            return super().load(area, nr, at, rex_w=rex_w)
        self.values[:5] = area[:5]
        self.values[3] = area[3] & 0x7F | area[2] & 0x80  # FSW.B follows FSW.ES
        self.values[32:160].reshape(8, 16)[:, :10] = area[32:160].reshape(8, 16)[:, :10]
        self.tracked |= 1
        return None

    def store(self, area, nr, at, *, init, rex_w):
        if nr:
            return super().store(area, nr, at, init=init, rex_w=rex_w)
        area[:5], area[5], area[8:24] = self.values[:5], 0, 0
        area[32:160].reshape(8, 16)[:, :10] = self.values[32:160].reshape(8, 16)[:, :10]
        return None


class TcgProcessor(ExactTcgProcessor):
    """QEMU's emulated CPU: it calls every component in use, but BNDREGS."""

    @property
    def xinuse(self):
        return self.cpu.layout.user_mask & ~BY_NAME["bndregs"].bit


def kernel_of(record, release, cpu):
    """Return the kernel that a sequence was recorded on, as a model."""
    rows = leaf_rows(record) or ZEN4_LEAF_D
    emulated = record.get("emulated_cpu")
    layout, _ = from_leaf_d(rows)
    vendor = record.get("vendor", "AuthenticAMD")
    amd = vendor in ("AuthenticAMD", "HygonGenuine")
    xcr0 = record.get("xcr0_host", ZEN4_XCR0)
    host = Host(
        "recorded",
        layout,
        xcr0=xcr0,
        xss=0 if emulated else rows[1][2],
        kvm_xcr0=record.get("kvm_supported_xcr0", xcr0),
        mxcsr_mask=record.get("mxcsr_mask", MXCSR_MASK_AMD if amd else MXCSR_MASK_INTEL),
        xsave=frozenset(
            {"xsave", *(name for bit, name in XSAVE_FAMILY.items() if rows[1][0] >> bit & 1)}
            | ({"xfd"} if rows[1][0] >> 4 & 1 else set())
        ),
        vendor=vendor,
    )
    if emulated:
        flags = frozenset({"xsaveopt", "xgetbv1"})
        host = host.replace(xsave=flags | {"xsave"})
        exact = "exact XINUSE" in emulated or "-xi/" in record["id"]
        tcg = Cpu("tcg", layout, flags, host.mxcsr_mask)
        return Kernel(host, release, (ExactTcgProcessor if exact else TcgProcessor)(tcg, xcr0))
    kernel = Kernel(host, release)
    own = kernel.fpu.processor
    own.cpu = replace(cpu, layout=layout, xsave=own.cpu.xsave, mxcsr_mask=own.cpu.mxcsr_mask)
    return kernel


class Sequence:
    """A sequence of ioctls on one modelled kernel.

    Some vendor modules rewrite the CPUID lists that they are given (kernel-fpu.md section 10).
    Where the recording is of one kernel alone, the model goes on with the list as it became, and
    `checked` counts those that it would not have made so.
    """

    def __init__(self, record, release, cpu):
        self.record = record
        self.kernel = kernel_of(record, release, cpu)
        self.vcpu = self.kernel.create_vcpu()
        self.checked = collections.Counter()
        self.wrong = []
        for number, op in enumerate(record["ops"]):
            self.where = f"on {release}, op {number} {op['op']}"
            self.do(op)
            if self.wrong:  # what follows would only follow from it
                break

    def do(self, op):
        try:
            got = getattr(self, op["op"].lower())(op)
            code = 0
        except OSError as refused:
            got, code = None, refused.errno
        self.checked[op["op"]] += 1
        self.expect("errno", code, op.get("errno", 0))
        if got is not None and not self.wrong:
            expected, got = (bytes(part) for part in got)
            if got != expected:
                self.wrong.append(f"{self.where}: {difference(expected, got)}")

    def expect(self, what, got, recorded):
        if got != recorded:
            self.wrong.append(f"{self.where}: {what} {got!r:.200}, recorded {recorded!r:.200}")

    def limit(self, op):
        return op.get("readable_or_writable_bytes")

    def get_xsave(self, op):
        room = self.limit(op)
        data = self.vcpu.get_xsave(None if room is None else bytearray(room))
        return (unpack(op["out"]), data) if "out" in op else None

    def get_xsave2(self, op):
        room = self.limit(op)
        data = self.vcpu.get_xsave2(None if room is None else bytearray(room))
        if "size" in op:
            self.expect("size", len(data), op["size"])
        return (unpack(op["out"])[: len(data)], data) if "out" in op else None

    def set_xsave(self, op):
        self.vcpu.set_xsave(unpack(op["in"]) if "in" in op else bytes(self.limit(op)))

    def set_cpuid2(self, op):
        self.vcpu.set_cpuid2(op["in"])
        if "guest_supported_xcr0" not in op:
            return
        if "kernels" in self.record:
            self.check_list(op)
        else:
            self.adopt_list(op)

    def check_list(self, op):
        """Check what the list became; long ones are recorded cut to leaf 0xD."""
        supported = self.vcpu.guest_supported_xcr0
        self.expect("guest_supported_xcr0", supported, op["guest_supported_xcr0"])
        if "effective" in op:
            leaf_d = op.get("leaf_d_only")
            kept = [e for e in self.vcpu.cpuid.entries if not leaf_d or e.function == 0xD]
            self.expect("list", [list(e) for e in kept], op["effective"])
            self.checked["effective"] += 1

    def adopt_list(self, op):
        if "effective" in op:
            effective = Cpuid(tuple(Entry(*entry) for entry in op["effective"]))
            self.checked["rewritten"] += effective != self.vcpu.cpuid
            self.vcpu.cpuid = effective
        self.vcpu.guest_supported_xcr0 = op["guest_supported_xcr0"]

    def get_cpuid2(self, op):
        leaf_d = [list(e) for e in self.vcpu.get_cpuid2() if e.function == 0xD]
        self.expect("leaf 0xD", leaf_d, op["leafD"])

    def get_xcrs(self, op):
        self.expect("XCRs", self.vcpu.get_xcrs(), [tuple(x) for x in op["xcrs"]])

    def set_xcrs(self, op):
        self.vcpu.set_xcrs([tuple(x) for x in op["xcrs"]], nr=op["nr"], flags=op["flags"])

    def get_fpu(self, op):
        return unpack(op["out"]), self.vcpu.get_fpu()

    def set_fpu(self, op):
        self.vcpu.set_fpu(unpack(op["in"]))

    def run_immediate_exit(self, op):
        self.vcpu.run(immediate_exit=True)

    def vmm_wrpkru(self, op):
        self.kernel.fpu.wrpkru(op["value"])

    def arch_prctl(self, op):
        self.expect("value", self.kernel.arch_prctl(op["code"], op["arg"]), op["value"])

    def run_hlt(self, op):
        return self.run_code({"what": "hlt", "cr4": 0, **op})

    def run_code(self, op):
        seen = {}

        def guest(processor):
            at = processor.offsets[PKRU_NR] if PKRU & processor.cpu.layout.mask else 0
            if op["what"] == "rdpkru":
                seen["rax"] = int(processor.values[at : at + 4].view("<u4")[0])
            elif op["what"] == "wrpkru":
                self.kernel.fpu.wrpkru(op["eax_in"])
            elif op["what"].startswith("xrstor"):
                image = np.zeros(4096, np.uint8)
                image[512:520].view("<u8")[0] = PKRU
                pkru = processor.cpu.layout.slot(PKRU_NR).offset
                image[pkru : pkru + 4].view("<u4")[0] = 0xDEADBEEF
                xrstor(processor, image, PKRU)

        self.vcpu.cr4 = op["cr4"]
        reason = self.vcpu.run(guest)
        self.expect("exit reason", reason, op.get("exit_reason", KVM_EXIT_HLT))
        if "rax" in seen:
            self.expect("RAX", seen["rax"], op["rax"])
        if "host_pkru" in op:
            self.expect("the host's PKRU", self.kernel.fpu.rdpkru(), op["host_pkru"])


def difference(expected, got):
    if len(expected) != len(got):
        return f"{len(got)} bytes, recorded {len(expected)}"
    at = [i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b]
    shown = (f"byte {i}: {got[i]:#04x}, recorded {expected[i]:#04x}" for i in at[:4])
    return f"{len(at)} bytes differ, " + "; ".join(shown)


def play(record, cpu):
    """Return what differs in one recording, a list of texts, and a count of what was checked."""
    try:
        return play_or_fail(record, cpu)
    except Exception as error:  # one bad line leaves the others to be played
        return [f"can't be played: {error!r:.200}"], collections.Counter()


def play_or_fail(record, cpu):
    if "ops" not in record:
        return Instruction(record, cpu).wrong, collections.Counter(replays=1)
    wrong, checked = [], collections.Counter()
    for release in record.get("kernels") or [record.get("kernel", "6.18.44")]:
        sequence = Sequence(record, release, cpu)
        wrong += sequence.wrong
        checked += sequence.checked
        checked["replays"] += 1
    return wrong, checked


def machine_of(record):
    """Return what tells one machine's recordings from another's."""
    names = ("vendor", "family", "model", "emulator", "emulated_cpu")
    return str([record.get(name) for name in names] + [leaf_rows(record)])


def open_fields(record, cpu):
    """Return the fields of OPEN that a recording's CPU leaves open."""
    if "emulator" in record or "emulated_cpu" in record:
        return []
    known = generation(record.get("vendor"), record.get("family"), record.get("model"))
    measured = leaf_rows(record) is None or (known is not None and known.name in BY_GENERATION)
    has_pkru = record.get("xcr0", record.get("xcr0_host", ZEN4_XCR0)) & PKRU
    return [
        name
        for name in OPEN
        if (has_pkru or not name.startswith("pkru"))
        and (getattr(cpu, name) is None or (not measured and name not in NULLABLE))
    ]


def play_machine(records):
    """Play all recordings of one machine; return their results, and what was taken of OPEN.

    One field after the other is given the value with the fewest differences.
    """
    cpu = cpu_of(records[0])
    names, taken = open_fields(records[0], cpu), {}
    results = [play(record, cpu) for record in records]
    for name in names:
        for value in OPEN[name]:
            wrong = sum(bool(texts) for texts, _ in results)
            if not wrong:
                return results, taken
            other = [play(record, replace(cpu, **{name: value})) for record in records]
            if sum(bool(texts) for texts, _ in other) < wrong:
                results, cpu, taken[name] = other, replace(cpu, **{name: value}), value
    return results, taken


def play_all(records):
    """Play recordings; return [(record, what differs)], what was checked, and what was taken."""
    machines = {}
    for record in records:
        machines.setdefault(machine_of(record), []).append(record)
    played, checked, taken = [], collections.Counter(), []
    for of_one in machines.values():
        results, fields = play_machine(of_one)
        for record, (wrong, counts) in zip(of_one, results, strict=True):
            played.append((record, wrong))
            checked += counts
        if fields:
            taken.append(f"{len(of_one)} recordings of {cpu_of(of_one[0]).name}: {fields}")
    return played, checked, taken


def main(paths):
    records = [record for path in paths for record in read(path)]
    played, _, taken = play_all(records)
    wrong = [(record, texts) for record, texts in played if texts]
    print(f"{len(played)} recordings, {len(wrong)} differ")
    for record, texts in wrong[:SHOWN]:
        what = " ".join(str(record[key]) for key in ("id", "cat", "op") if key in record)
        print(f"  {what}: {'; '.join(texts)}")
    for line in taken:
        print(f"taken as the recordings have it: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="FILE")
    sys.exit(main(parser.parse_args().files))
