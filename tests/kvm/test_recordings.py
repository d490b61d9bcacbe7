"""The model against recordings of real kernels: every ioctl, every byte, every errno.

`kvm.jsonl.xz` was recorded on Linux 6.18.44 on an AMD Zen 4 whose vendor module rewrites the
CPUID lists it is given; `kvm-pkru.jsonl.xz` on twelve kernels from 5.10 to 7.3, on two emulated
CPUs with PKRU.
"""

import base64
import collections
import json
import lzma
import zlib

import numpy as np

from xfast.hosts.model import Host
from xfast.kernels.uapi import KVM_EXIT_HLT
from xfast.kvm import Kernel
from xfast.kvm.instructions import xrstor
from xfast.kvm.processor import Cpu, Processor
from xfast.xsave.cpuid import Cpuid, Entry
from xfast.xsave.features import BY_NAME, PKRU
from xfast.xsave.layout import from_leaf_d

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


def records(path):
    with lzma.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def unpack(text):
    return zlib.decompress(base64.b64decode(text.removeprefix("z:")))


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


def zen4():
    layout, _ = from_leaf_d(ZEN4_LEAF_D)
    flags = frozenset({"xsave", "xsaveopt", "xsavec", "xgetbv1", "xsaves"})
    return Host(
        "zen4",
        layout,
        xcr0=0xE7,
        xss=0x1800,
        kvm_xcr0=0xE7,
        mxcsr_mask=0x2FFFF,
        xsave=flags,
        vendor="AuthenticAMD",
    )


def kernel_of(record, release):
    if "host_leaf_d" not in record:
        return Kernel(zen4(), release)
    layout, _ = from_leaf_d({row[0]: tuple(row[1:]) for row in record["host_leaf_d"]})
    host = Host(
        "emulated",
        layout,
        xcr0=record["xcr0_host"],
        kvm_xcr0=record["kvm_supported_xcr0"],
        mxcsr_mask=record["mxcsr_mask"],
        xsave=frozenset({"xsave", "xsaveopt", "xgetbv1"}),
        vendor="AuthenticAMD",
    )
    cpu = Cpu("tcg", layout, frozenset({"xsaveopt", "xgetbv1"}), record["mxcsr_mask"])
    exact = "-xi/" in record["id"]
    return Kernel(
        host, release, (ExactTcgProcessor if exact else TcgProcessor)(cpu, record["xcr0_host"])
    )


class Replay:
    """One sequence on one modelled kernel."""

    def __init__(self, record, release):
        self.record = record
        self.kernel = kernel_of(record, release)
        self.vcpu = self.kernel.create_vcpu()
        self.checked = collections.Counter()

    def run(self):
        for number, op in enumerate(self.record["ops"]):
            where = f"{self.record['id']} op {number} {op['op']}"
            try:
                got = getattr(self, op["op"].lower())(op)
                code = 0
            except OSError as refused:
                got, code = None, refused.errno
            assert code == op.get("errno", 0), where
            self.checked[op["op"]] += 1
            if got is not None:
                expected, got = got
                assert bytes(got) == bytes(expected), where + difference(expected, got)

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
            assert len(data) == op["size"]
        return (unpack(op["out"])[: len(data)], data) if "out" in op else None

    def set_xsave(self, op):
        self.vcpu.set_xsave(unpack(op["in"]) if "in" in op else bytes(self.limit(op)))

    def set_cpuid2(self, op):
        self.vcpu.set_cpuid2(op["in"])
        if "guest_supported_xcr0" in op:
            self.adopt(op)

    def adopt(self, op):
        """Check what the list became; long ones are recorded cut to leaf 0xD."""
        assert self.vcpu.guest_supported_xcr0 == op["guest_supported_xcr0"]
        if "effective" in op:
            leaf_d = op.get("leaf_d_only")
            kept = [e for e in self.vcpu.cpuid.entries if not leaf_d or e.function == 0xD]
            assert [list(e) for e in kept] == op["effective"], self.record["id"]
            self.checked["effective"] += 1

    def get_cpuid2(self, op):
        leaf_d = [list(e) for e in self.vcpu.get_cpuid2() if e.function == 0xD]
        assert leaf_d == op["leafD"], self.record["id"]

    def get_xcrs(self, op):
        assert self.vcpu.get_xcrs() == [tuple(x) for x in op["xcrs"]]

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
        assert self.kernel.arch_prctl(op["code"], op["arg"]) == op["value"]

    def run_hlt(self, op):
        return self.run_code({"what": "hlt", "cr4": 0, **op})

    def run_code(self, op):
        seen = {}

        def guest(processor):
            at = processor.offsets[9] if PKRU & processor.cpu.layout.mask else 0
            if op["what"] == "rdpkru":
                seen["rax"] = int(processor.values[at : at + 4].view("<u4")[0])
            elif op["what"] == "wrpkru":
                self.kernel.fpu.wrpkru(op["eax_in"])
            elif op["what"].startswith("xrstor"):
                image = np.zeros(4096, np.uint8)
                image[512:520].view("<u8")[0] = PKRU
                pkru = processor.cpu.layout.slot(9).offset
                image[pkru : pkru + 4].view("<u4")[0] = 0xDEADBEEF
                xrstor(processor, image, PKRU)

        self.vcpu.cr4 = op["cr4"]
        assert self.vcpu.run(guest) == op["exit_reason"] == KVM_EXIT_HLT
        if "rax" in seen:
            assert seen["rax"] == op["rax"]
        if "host_pkru" in op:
            assert self.kernel.fpu.rdpkru() == op["host_pkru"]


def difference(expected, got):
    if len(expected) != len(got):
        return f": {len(got)} bytes, recorded {len(expected)}"
    at = [i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b][:8]
    return "".join(f"\n  byte {i}: {got[i]:#x}, recorded {expected[i]:#x}" for i in at)


class RewritingReplay(Replay):
    """A sequence of the KVM whose vendor module rewrites CPUID lists (section 10's caveat)."""

    def adopt(self, op):
        effective = Cpuid(tuple(Entry(*entry) for entry in op["effective"]))
        self.checked["rewritten"] += effective != self.vcpu.cpuid
        self.vcpu.cpuid = effective
        self.vcpu.guest_supported_xcr0 = op["guest_supported_xcr0"]


def replay_all(path, replay):
    """Return how many sequences were replayed, and how many calls of each kind."""
    checked = collections.Counter()
    everything = records(path)
    for record in everything:
        for release in record.get("kernels", ["6.18.44"]):
            one = replay(record, release)
            one.run()
            checked += one.checked
            checked["replays"] += 1
    return len(everything), checked


def test_every_sequence_of_6_18_on_zen4(data):
    sequences, checked = replay_all(data / "kvm/kvm.jsonl.xz", RewritingReplay)
    assert sequences == checked["replays"] == 355
    assert checked["GET_XSAVE"] == 671
    assert checked["SET_XSAVE"] == 609
    assert checked["SET_CPUID2"] == 368
    # the lists that depend on the recording machine: its vendor module rewrote them
    assert checked["rewritten"] == 268


def test_every_sequence_of_twelve_kernels_with_pkru(data):
    sequences, checked = replay_all(data / "kvm/kvm-pkru.jsonl.xz", Replay)
    assert sequences == 2083
    assert checked["replays"] == 6609
    assert checked["GET_XSAVE"] == 13847
    assert checked["SET_XSAVE"] == 9717
    assert checked["effective"] == 7471
    assert checked["RUN_CODE"] == 529
