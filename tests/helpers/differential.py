"""Compare the instruction model with the CPU it runs on, on random images, to the first difference.

    python tests/helpers/differential.py IMAGES [SEED] [--amx] [--record FILE.jsonl.xz]

An image is one random register state, one random instruction and one random area. Each is played
on the model and by the real instruction; faults, XINUSE, memory and a read-back of every register
must agree to the bit. With --amx the process asks for AMX tile data first; without it, IA32_XFD
disables them, and the model must fault where the CPU does. --record appends the images and what
the CPU did, as tests/data/vectors/hw.jsonl.xz has them; the images are then of coarse patterns.

At the end it says what was exercised, and fails if a component that this CPU has never went from
memory to the registers and back.
"""

import argparse
import base64
import json
import lzma
import sys
import time
import zlib
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import replay

from xfast.engine import hw
from xfast.hosts.silicon import family_and_model
from xfast.hosts.this import probe_x87_pointer_bits
from xfast.kvm.fpu import NO_FCS_FDS
from xfast.kvm.instructions import INSTRUCTIONS, Fault, xgetbv, xrstor, xsave
from xfast.kvm.processor import Processor, cpu_by_model
from xfast.xsave import area
from xfast.xsave.features import (
    BY_NAME,
    COMPONENTS,
    FCW_INIT,
    MXCSR_INIT,
    PKRU,
    PKRU_NR,
    TILEDATA,
    XCOMP_BV_COMPACTED,
    XFEATURE_MASK_FPSSE,
    bits,
    name_of,
    names_of,
)
from xfast.xsave.layout import from_leaf_d

TILECFG_NR = BY_NAME["tilecfg"].nr
VECTOR_OF_SIGNAL = {0: None, 4: "#NM", 11: "#GP"}
UPPER_HALVES = BY_NAME["avx"].bit | BY_NAME["zmm_hi256"].bit
LEAST_FOR_COVERAGE = 1000
"""Images from which on every component must have been in use."""


def packed(memory):
    """Return a buffer as the recordings have it."""
    return "z:" + base64.b64encode(zlib.compress(memory.tobytes(), 9)).decode()


def put(memory, at, value, size):
    memory[at : at + size] = np.frombuffer(int(value).to_bytes(size, "little"), np.uint8)


class Machine:
    """This CPU: its description, and what its user mode may touch."""

    def __init__(self, amx):
        rows = {nr: hw.cpuid(0xD, nr) for nr in range(64)}
        self.layout, _ = from_leaf_d(rows)
        self.vendor = np.array(hw.cpuid(0), np.uint32)[[1, 3, 2]].tobytes().decode()
        self.family, self.model = family_and_model(hw.cpuid(1)[0])
        self.xcr0 = hw.xgetbv(0)
        self.leaf_d = {nr: row for nr, row in rows.items() if any(row)}
        self.size = -(-rows[0][1] // 64) * 64 + 64
        names = enumerate(("xsaveopt", "xsavec", "xgetbv1"))
        self.cpu = replace(
            cpu_by_model(self.vendor, self.family, self.model),
            layout=self.layout,
            xsave=frozenset(name for bit, name in names if rows[1][0] >> bit & 1),
            x87_pointer_bits=probe_x87_pointer_bits(),
            keeps_x87_selectors=not hw.cpuid(7)[1] & NO_FCS_FDS,
            mxcsr_mask=self.mxcsr_mask(),
        )
        if self.xcr0 & PKRU:
            self.cpu = replace(self.cpu, pkru_bytes=self.pkru_bytes())
        allowed = amx and hw.request_permission(18)
        self.xfd = 0 if allowed else TILEDATA & self.xcr0
        self.ops = [op for op in hw.OPS[:8] if self.runs(op.removesuffix("64"))]
        self.changes = self.possible_changes()

    def runs(self, name):
        return name in self.cpu.xsave | {"xsave", "xrstor"}

    def mxcsr_mask(self):
        memory = area.empty(1, self.size)[0]
        hw.run([("xsave64", memory, XFEATURE_MASK_FPSSE)])
        return int(memory[28:32].view("<u4")[0])

    def pkru_bytes(self):
        """Return how many bytes of PKRU a save writes: the manuals leave 4 or 8 open."""
        memory = area.empty(1, self.size)[0]
        memory[576:] = 0xCC
        hw.run([("xsave64", memory, PKRU)])
        at = self.layout.slot(PKRU_NR).offset
        return 4 if (memory[at + 4 : at + 8] == 0xCC).all() else 8

    def possible_changes(self):
        """Return what may happen between setup and instruction: {name: replay's number for it}."""
        changes = {"set_xmm15": 1, "fldcw": 6}
        if not self.cpu.saves_x87_pointers:  # elsewhere a save tells where FLDZ was
            changes["fldz"] = 4
        if self.xcr0 & BY_NAME["avx"].bit:
            changes["set_ymm15"] = 2
        if self.xcr0 & BY_NAME["opmask"].bit:
            changes["set_k7"] = 3
        if self.xcr0 & PKRU and hw.cpuid(7)[2] >> 4 & 1:
            changes["set_pkru"] = 5
        return changes


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
        return self.one_of(xcr0, xcr0 & low, 1 << (low % 20), low)

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
            put(memory, 520, xcomp_bv | XCOMP_BV_COMPACTED, 8)
            offsets = layout.compacted_offsets(xcomp_bv)
        else:
            offsets = {slot.nr: slot.offset for slot in layout.slots if slot.offset}
        put(memory, 512, xstate_bv, 8)
        self.legacy(memory)
        for nr, at in offsets.items():
            self.component(memory[at : at + layout.slot(nr).size], nr)

    def legacy(self, memory):
        put(memory, 0, self.one_of(FCW_INIT, 0x27F, 0x340, self.word(2)), 2)
        put(memory, 2, self.one_of(0, self.word(2), self.word(2) & ~0x3F), 2)
        put(memory, 24, self.one_of(MXCSR_INIT, 0x1FA0, self.word(2)), 4)
        if self.once_in(2):
            memory[6:24] = 0
        if self.once_in(4):
            memory[0:24] = memory[32:160] = 0
            put(memory, 0, FCW_INIT, 2)
        if self.once_in(4):
            memory[160:416] = 0

    def component(self, value, nr):
        if self.once_in(4):
            value[:] = 0
        if self.once_in(8):
            value[self.rng.integers(len(value))] ^= 1
        if nr == PKRU_NR:
            value[0] &= 0xFC  # key 0 is the process's own memory
        if nr == TILECFG_NR and not self.once_in(4):
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


class Image:
    """What is to be done: the instruction, the setup before it and the read-back after it."""

    def __init__(self, images):
        machine = images.machine
        self.op = images.one_of(*machine.ops)
        self.mask = images.mask()
        self.setup_op = images.one_of("xrstor64", "xrstor")
        self.setup_mask = images.one_of(machine.xcr0, images.mask()) & ~machine.xfd
        self.change = images.one_of(None, None, None, *machine.changes)
        self.back_op = images.one_of("xsave64", "xsave64", "xsave")
        self.at = images.one_of(1, 4, 8, 16, 32) if images.once_in(40) else 0

    @property
    def restores(self):
        return self.op.startswith("xrstor")

    def __str__(self):
        return (
            f"{self.op} mask {self.mask:#x} offset {self.at} after {self.setup_op} with mask "
            f"{self.setup_mask:#x} and {self.change}, read back by {self.back_op}"
        )


class Differential:
    """Plays images on model and CPU; `counts` tells what they were."""

    def __init__(self, machine, seed, record):
        self.machine = machine
        self.images = Images(machine, seed, 128 if record else 1)
        self.record = record
        self.counts = Counter()
        self.loaded, self.saved = Counter(), Counter()
        self.start, self.setup, self.target, self.post = (
            area.empty(1, machine.size)[0] for _ in range(4)
        )
        put(self.start, 24, MXCSR_INIT, 4)
        self.unmask = np.frombuffer(replay.UNMASKING_FCW.to_bytes(2, "little"), np.uint8).copy()
        self.given, self.mine, self.mine_post = (self.target.copy() for _ in range(3))

    def play(self):
        """Play one image; return what differs, a list of texts."""
        images, image = self.images, Image(self.images)
        images.restorable(self.setup)
        if image.restores:
            images.restorable(self.target)
            images.damage(self.target)
        else:
            images.fill(self.target)
        self.given[:] = self.target
        fault, inuse, harmless = self.model(image)
        if not harmless:  # a damaged header made other bytes PKRU's, and they forbid key 0
            image.mask &= ~PKRU
            fault, inuse, _ = self.model(image)
        wrong = self.compare(image, fault, inuse)
        for _ in range(3):
            if not wrong:
                break
            # A context switch between two steps saves MXCSR with SSE's bit set, and restores
            # SSE as in use: what is a difference must be one again.
            self.counts["repeated"] += 1
            wrong = self.compare(image, fault, inuse)
        self.count(image, fault, inuse)
        if self.record:
            self.record.write(json.dumps(self.recording(image)) + "\n")
        return [f"{image}: {text}" for text in wrong]

    def count(self, image, fault, inuse):
        self.counts["faults"] += fault is not None
        self.counts["32-bit setups"] += image.setup_op == "xrstor"
        self.counts["32-bit read-backs"] += image.back_op == "xsave"
        self.counts[f"changed by {image.change}"] += 1
        if fault is None:
            moved = image.mask & (inuse[1] if image.restores else inuse[0])
            for nr in bits(moved & self.machine.xcr0):
                (self.loaded if image.restores else self.saved)[name_of(nr)] += 1

    def steps(self, image):
        change = [(image.change, None, 0x55555550)] if image.change else []
        if image.change == "fldcw":
            change = [("fldcw", self.unmask, 0)]
        return [
            ("xrstor64", self.start, self.machine.xcr0),
            (image.setup_op, self.setup, image.setup_mask),
            *change,
            (image.op, self.target[image.at :], image.mask),
            (image.back_op, self.post, self.machine.xcr0),
        ]

    def compare(self, image, fault, inuse):
        """Run the steps on the CPU; return what differs from the model's results."""
        machine = self.machine
        self.target[:] = self.given
        self.post[:] = 0xCC
        self.post[512:576] = 0
        real = hw.run(self.steps(image))
        self.real = start, setup, operation = real[0], real[1], real[-2]
        vector = fault.rule.vector if fault else None
        wrong = [f"setup faulted: {setup}"] if setup[0] or start[0] else []
        if VECTOR_OF_SIGNAL.get(operation[0], "?") != vector:
            wrong.append(f"model: {fault}; CPU: signal {operation[0]}, vector {operation[1]}")
        wrong += self.differing("memory", self.mine, self.target)
        # the SDM promises nothing then: other components may be loaded already
        self.unspecified = (
            fault is not None and fault.rule.name == "mxcsr" and self.target[527] & 0x80 != 0
        )
        if self.unspecified:
            return wrong
        wrong += self.differing("registers", self.mine_post, self.post)
        seen = [setup[2], operation[2]]
        if "xgetbv1" in machine.cpu.xsave and seen != inuse:
            wrong.append(f"XGETBV(1): model {[*map(hex, inuse)]}, CPU {[*map(hex, seen)]}")
        return wrong

    def recording(self, image):
        """Return the image and what the CPU did, in the form of hw.jsonl."""
        machine, (_, setup, operation) = self.machine, self.real
        faulted = operation[0] != 0
        size = machine.layout.standard_size()
        row = {
            "op": image.op.upper(),
            "vendor": machine.vendor,
            "family": machine.family,
            "model": machine.model,
            "xcr0": machine.xcr0,
            "xfd": machine.xfd,
            "leaf_d": machine.leaf_d,
            "rfbm": image.mask,
            "misalign": image.at,
            "setup": packed(self.setup[:size]),
            "setup_op": image.setup_op.upper(),
            "setup_rfbm": image.setup_mask,
            "setup_xinuse": setup[2],
            "target": packed(self.given[image.at :][:size]),
            "sig": operation[0],
            "trapno": {4: 7, 11: 13}.get(operation[0], 0),
            "post": packed(self.post[:size]),
            "post_op": image.back_op.upper(),
            "post_xinuse": operation[2],
        }
        if image.change:
            row["modify"] = machine.changes[image.change]
        if self.unspecified:
            row["sdm"] = "agree_partial_state_after_fault"
        if not image.restores and not faulted:
            row["out"] = packed(self.target[image.at :][:size])
        return row

    def model(self, image):
        """Play on the model; return the fault or None, XINUSE, and whether key 0 stays open.

        XINUSE is the one after the setup, and the one after the instruction.
        """
        machine, fault = self.machine, None
        self.mine[:] = self.given
        cpu = Processor(machine.cpu, machine.xcr0)
        cpu.xfd = machine.xfd
        xrstor(cpu, self.start, machine.xcr0, address=64)
        wide = image.setup_op == "xrstor64"
        xrstor(cpu, self.setup, image.setup_mask, address=128, rex_w=wide)
        observes = "xgetbv1" in machine.cpu.xsave
        inuse = [xgetbv(cpu, 1) if observes else 0]
        pending, masked = cpu.values[2] & 0x80, cpu.values[0] & 1
        if (image.change == "fldcw" and pending) or (
            image.change == "fldz" and (pending or not masked)
        ):
            image.change = None  # it would raise #MF, at once or when the stack overflows
        if image.change == "set_xmm15" and cpu.xinuse & UPPER_HALVES:
            image.change = None  # Zen 4 then calls AVX in use, which the manuals allow
        replay.modify(cpu, machine.changes.get(image.change))
        name, wide = image.op.removesuffix("64"), image.op.endswith("64")
        memory, address = self.mine[image.at :], 4096 + image.at
        try:
            INSTRUCTIONS[name](cpu, memory, image.mask, address=address, rex_w=wide)
        except Fault as caught:
            fault = caught
            replay.pass_through_a_signal(cpu)
        inuse.append(xgetbv(cpu, 1) if observes else 0)
        self.mine_post[:] = 0xCC
        self.mine_post[512:576] = 0
        xsave(cpu, self.mine_post, machine.xcr0, rex_w=image.back_op == "xsave64")
        has_pkru = machine.xcr0 & PKRU
        return fault, inuse, not has_pkru or not cpu.values[cpu.offsets[PKRU_NR]] & 3

    @staticmethod
    def differing(what, mine, real):
        places = np.flatnonzero(mine != real)
        if not len(places):
            return []
        some = ", ".join(f"{at}: {mine[at]:#04x} not {real[at]:#04x}" for at in places[:6])
        return [f"{what}: {len(places)} bytes differ (model not CPU): {some}"]

    def missing(self):
        """Return the components that this CPU has and that were never in use, in both ways."""
        own = self.machine.xcr0 & ~self.machine.xfd
        names = {name_of(nr) for nr in bits(own & sum(c.bit for c in COMPONENTS))}
        return sorted(names - (self.loaded.keys() & self.saved.keys()))


def report(differential, images, seconds):
    """Return the lines that say what was exercised."""
    machine, counts = differential.machine, differential.counts
    own = machine.xcr0 & ~machine.xfd
    changes = {k.removeprefix("changed by "): n for k, n in counts.items() if "changed by" in k}
    changes.pop("None", None)
    lines = [
        f"{images} images on {machine.vendor} family {machine.family} model {machine.model} (XCR0 "
        f"{machine.xcr0:#x}: {names_of(own)}): 0 differences, {counts['faults']} faults, "
        f"{counts['repeated']} repeated; {seconds:.1f} s",
        f"  {counts['32-bit setups']} setups and {counts['32-bit read-backs']} read-backs in the "
        f"32-bit form; changed between: {changes}",
        f"  loaded, in use: {dict(differential.loaded)}",
        f"  saved, in use: {dict(differential.saved)}",
    ]
    return "\n".join(lines)


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
    print(report(differential, args.images, time.monotonic() - began))
    if args.images >= LEAST_FOR_COVERAGE and differential.missing():
        print("never in use:", ", ".join(differential.missing()))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
