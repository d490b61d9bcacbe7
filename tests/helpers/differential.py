"""Compare the instruction model with the CPU it runs on, on random images, to the first difference.

    python tests/helpers/differential.py IMAGES [SEED] [--amx] [--record FILE.jsonl.xz]

An image is one random register state, one random instruction and one random area. Each is played
on the model and by the real instruction; faults, XINUSE, memory and a read-back of every register
must agree to the bit. With --amx the process asks for AMX tile data first; without it, IA32_XFD
disables them, and the model must fault where the CPU does. --record appends the images and what
the CPU did, as tests/data/vectors/hw.jsonl.xz has them; the images are then of coarse patterns.
"""

import argparse
import base64
import json
import lzma
import sys
import time
import zlib
from contextlib import nullcontext
from dataclasses import replace

import numpy as np

from xfast.engine import hw
from xfast.kvm.instructions import INSTRUCTIONS, Fault, xgetbv, xrstor, xsave
from xfast.kvm.processor import BY_VENDOR, INTEL, Processor
from xfast.xsave import area
from xfast.xsave.features import bits
from xfast.xsave.layout import from_leaf_d

PKRU, TILEDATA = 1 << 9, 1 << 18
COMPACTED = 1 << 63
FCW, MXCSR = 0x37F, 0x1F80
FPSSE = 3
VECTOR_OF_SIGNAL = {0: None, 4: "#NM", 11: "#GP"}


def packed(memory):
    """Return a buffer as the recordings have it."""
    return "z:" + base64.b64encode(zlib.compress(memory.tobytes(), 9)).decode()


def put(memory, at, value, size):
    memory[at : at + size] = np.frombuffer(int(value).to_bytes(size, "little"), np.uint8)


class Machine:
    """This CPU: its description, and what its user mode may touch."""

    def __init__(self, amx):
        rows = {nr: hw.cpuid(0xD, nr) for nr in range(64)}
        layout, _ = from_leaf_d(rows)
        vendor = np.array(hw.cpuid(0), np.uint32)[[1, 3, 2]].tobytes().decode()
        self.vendor = vendor
        self.xcr0 = hw.xgetbv(0)
        self.layout = layout
        self.leaf_d = {nr: row for nr, row in rows.items() if any(row)}
        names = enumerate(("xsaveopt", "xsavec", "xgetbv1"))
        self.cpu = replace(
            BY_VENDOR.get(vendor, INTEL),
            layout=layout,
            xsave=frozenset(name for bit, name in names if rows[1][0] >> bit & 1),
        )
        allowed = amx and hw.request_permission(18)
        self.xfd = 0 if allowed else TILEDATA & self.xcr0
        self.size = -(-rows[0][1] // 64) * 64 + 64
        self.ops = [op for op in hw.OPS[:8] if self.runs(op.removesuffix("64"))]

    def runs(self, name):
        return name in self.cpu.xsave | {"xsave", "xrstor"}


class Images:
    """Random images; every choice comes from one seed."""

    def __init__(self, machine, seed, grain):
        self.rng = np.random.default_rng(seed)
        self.machine = machine
        self.grain = grain

    def one_of(self, *choices):
        return choices[self.rng.integers(len(choices))]

    def once_in(self, n):
        return self.rng.integers(n) == 0

    def word(self, width):
        return int.from_bytes(self.rng.bytes(width), "little")

    def mask(self):
        xcr0 = self.machine.xcr0
        low = self.word(8)
        return self.one_of(xcr0, xcr0 & low, 1 << (low % 20), low) & ~PKRU

    def fill(self, memory):
        """Fill memory with runs of `grain` random bytes, or with 0xCC."""
        runs = self.rng.integers(0, 256, -(-len(memory) // self.grain), np.uint8)
        memory[:] = 0xCC if self.once_in(4) else np.repeat(runs, self.grain)[: len(memory)]

    def restorable(self, memory):
        """Make a valid area of random components, standard or compacted."""
        self.fill(memory)
        memory[512:576] = 0
        layout = self.machine.layout
        xstate_bv = self.mask() & self.machine.xcr0
        if "xsavec" in self.machine.cpu.xsave and self.once_in(2):
            xcomp_bv = self.mask() & self.machine.xcr0
            xstate_bv &= xcomp_bv
            put(memory, 520, xcomp_bv | COMPACTED, 8)
            offsets = layout.compacted_offsets(xcomp_bv)
        else:
            offsets = {slot.nr: slot.offset for slot in layout.slots if slot.offset}
        put(memory, 512, xstate_bv, 8)
        self.legacy(memory)
        for nr, at in offsets.items():
            self.component(memory[at : at + layout.slot(nr).size], nr)

    def legacy(self, memory):
        put(memory, 0, self.one_of(FCW, 0x27F, 0x340, self.word(2)), 2)
        put(memory, 2, self.one_of(0, self.word(2), self.word(2) & ~0x3F), 2)
        put(memory, 24, self.one_of(MXCSR, 0x1FA0, self.word(2)), 4)
        if self.once_in(2):
            memory[6:24] = 0
        if self.once_in(4):
            memory[0:24] = memory[32:160] = 0
            put(memory, 0, FCW, 2)
        if self.once_in(4):
            memory[160:416] = 0

    def component(self, value, nr):
        if self.once_in(4):
            value[:] = 0
        if self.once_in(8):
            value[self.rng.integers(len(value))] ^= 1
        if nr == 17 and not self.once_in(4):
            value[:] = 0
            value[0], value[1] = 1, self.one_of(0, self.word(1))
            for tile in range(8):
                if not self.once_in(3):
                    value[48 + tile] = self.rng.integers(1, 17)
                    put(value, 16 + 2 * tile, self.rng.integers(1, 65), 2)
            if self.once_in(4):
                value[self.rng.integers(64)] ^= 1 << self.rng.integers(8)

    def damage(self, memory):
        """Break a rule, once in a while."""
        at = int(self.one_of(512, 513, 519, 520, 527, 528, 24, 26, self.rng.integers(512, 576)))
        if self.once_in(3):
            memory[at] ^= 1 << self.rng.integers(8)


class Differential:
    """Plays images on model and CPU; `faults` counts those that faulted on both, `repeated`
    those that were played again."""

    def __init__(self, machine, seed, record):
        self.machine = machine
        self.images = Images(machine, seed, 128 if record else 1)
        self.record = record
        self.faults = self.repeated = 0
        self.start, self.setup, self.target, self.post = (
            area.empty(1, machine.size)[0] for _ in range(4)
        )
        put(self.start, 24, MXCSR, 4)
        self.given, self.mine, self.mine_post = (self.target.copy() for _ in range(3))

    def play(self):
        """Play one image; return what differs, a list of texts."""
        machine, images = self.machine, self.images
        op, mask, at = images.one_of(*machine.ops), images.mask(), 0
        setup_mask = images.one_of(machine.xcr0, images.mask()) & ~machine.xfd & ~PKRU
        images.restorable(self.setup)
        if op.startswith("xrstor"):
            images.restorable(self.target)
            images.damage(self.target)
        else:
            images.fill(self.target)
        if images.once_in(40):
            at = images.one_of(1, 4, 8, 16, 32)
        self.mine[:] = self.target
        steps = [
            ("xrstor64", self.start, machine.xcr0),
            ("xrstor64", self.setup, setup_mask),
            (op, self.target[at:], mask),
            ("xsave64", self.post, machine.xcr0 & ~PKRU),
        ]
        self.given[:] = self.target
        model = self.model(op, mask, at, setup_mask)
        wrong = self.compare(steps, *model)
        for _ in range(3):
            if not wrong:
                break
            # A context switch between two steps saves MXCSR with SSE's bit set, and restores
            # SSE as in use: what is a difference must be one again.
            self.repeated += 1
            wrong = self.compare(steps, *model)
        self.faults += model[0] is not None
        if self.record:
            self.record.write(json.dumps(self.recording(op, mask, at, setup_mask)) + "\n")
        story = f"{op} mask {mask:#x} offset {at} after a setup with mask {setup_mask:#x}: "
        return [story + text for text in wrong]

    def compare(self, steps, fault, inuse):
        """Run the steps on the CPU; return what differs from the model's results."""
        machine = self.machine
        self.target[:] = self.given
        self.post[:] = 0xCC
        self.post[512:576] = 0
        real = self.real = hw.run(steps)
        vector = fault.rule.vector if fault else None
        wrong = [f"setup faulted: {real[1]}"] if real[1][0] else []
        if VECTOR_OF_SIGNAL.get(real[2][0], "?") != vector:
            wrong.append(f"model: {fault}; CPU: signal {real[2][0]}, vector {real[2][1]}")
        wrong += self.differing("memory", self.mine, self.target)
        # the SDM promises nothing then: other components may be loaded already
        self.unspecified = (
            fault is not None and fault.rule.name == "mxcsr" and self.target[527] & 0x80 != 0
        )
        if self.unspecified:
            return wrong
        wrong += self.differing("registers", self.mine_post, self.post)
        seen = [real[i][2] & ~PKRU for i in (1, 2)]  # PKRU is the process's own
        if "xgetbv1" in machine.cpu.xsave and seen != inuse:
            wrong.append(f"XGETBV(1): model {[*map(hex, inuse)]}, CPU {[*map(hex, seen)]}")
        return wrong

    def recording(self, op, mask, at, setup_mask):
        """Return the image and what the CPU did, in the form of hw.jsonl."""
        machine, real = self.machine, self.real
        saves, faulted = not op.startswith("xrstor"), real[2][0] != 0
        size = machine.layout.standard_size()
        row = {
            "op": op.upper(),
            "xcr0": machine.xcr0,
            "xfd": machine.xfd,
            "leaf_d": machine.leaf_d,
            "vendor": machine.vendor,
            "rfbm": mask,
            "misalign": at,
            "setup": packed(self.setup[:size]),
            "setup_rfbm": setup_mask,
            "setup_xinuse": real[1][2],
            "target": packed(self.given[at:][:size]),
            "sig": real[2][0],
            "trapno": {4: 7, 11: 13}.get(real[2][0], 0),
            "post": packed(self.post[:size]),
            "post_xinuse": real[2][2],
        }
        if self.unspecified:
            row["sdm"] = "agree_partial_state_after_fault"
        if saves and not faulted:
            row["out"] = packed(self.target[at:][:size])
        return row

    def model(self, op, mask, at, setup_mask):
        """Play on the model; return the fault or None, and XINUSE after setup and instruction."""
        machine, fault = self.machine, None
        cpu = Processor(machine.cpu, machine.xcr0)
        cpu.xfd = machine.xfd
        xrstor(cpu, self.start, machine.xcr0, address=64)
        xrstor(cpu, self.setup, setup_mask, address=128)
        observes = "xgetbv1" in machine.cpu.xsave
        inuse = [xgetbv(cpu, 1) if observes else 0]
        name, wide = op.removesuffix("64"), op.endswith("64")
        try:
            INSTRUCTIONS[name](cpu, self.mine[at:], mask, address=4096 + at, rex_w=wide)
        except Fault as caught:
            fault = caught
            if not cpu.cpu.finds_init:  # the kernel's signal frame sets both bits
                cpu.tracked |= FPSSE
        inuse.append(xgetbv(cpu, 1) if observes else 0)
        self.mine_post[:] = 0xCC
        self.mine_post[512:576] = 0
        xsave(cpu, self.mine_post, machine.xcr0 & ~PKRU)
        return fault, inuse

    @staticmethod
    def differing(what, mine, real):
        places = np.flatnonzero(mine != real)
        if not len(places):
            return []
        some = ", ".join(f"{at}: {mine[at]:#04x} not {real[at]:#04x}" for at in places[:6])
        return [f"{what}: {len(places)} bytes differ (model not CPU): {some}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=int)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--amx", action="store_true")
    parser.add_argument("--record", metavar="FILE.jsonl.xz")
    args = parser.parse_args()
    machine = Machine(args.amx)
    began = time.monotonic()
    with lzma.open(args.record, "at") if args.record else nullcontext() as record:
        differential = Differential(machine, args.seed, record)
        for image in range(args.images):
            wrong = differential.play()
            if wrong:
                print(f"image {image} of seed {args.seed} differs:", *wrong, sep="\n  ")
                print("  header of the area:", differential.mine[512:576].tobytes().hex())
                return 1
    seconds = time.monotonic() - began
    components = ", ".join(str(nr) for nr in bits(machine.xcr0 & ~machine.xfd))
    print(
        f"{args.images} images on {machine.vendor} (XCR0 {machine.xcr0:#x}; components "
        f"{components}): 0 differences, {differential.faults} faults, "
        f"{differential.repeated} repeated; {seconds:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
