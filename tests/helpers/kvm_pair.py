"""A modelled vCPU and a real one that do the same, and a driver that looks for a difference.

Operations are plain data: (name, arguments). `python tests/helpers/kvm_pair.py -n 1000000` runs as
many on /dev/kvm and on the model, in sequences on fresh vCPUs; the first difference is shrunk and
printed. The tests run a few.
"""

import argparse
import random
import struct
import time
from collections import Counter

from xfast.hosts.this import this_host
from xfast.kernels.uapi import KVM_FPU
from xfast.kvm import Kernel, live
from xfast.kvm.fpu import ARCH_REQ_XCOMP_GUEST_PERM
from xfast.xsave.cpuid import Cpuid

SIGNIFICANT = 1
X87_HEAD = struct.pack("<HHBBHQQ", 0x37F, 0x1800, 0xFF, 0, 0, 0, 0)


def leaf_d(mask):
    """Return a list whose leaf 0xD.0 has `mask`; a plain KVM takes it as it is."""
    return [(0xD, 0, SIGNIFICANT, mask & 0xFFFFFFFF, 0, 0, mask >> 32)]


def one_entry_for_all(mask=0):
    """Return a list in which one entry answers for sub-leaves 0 and 1.

    A KVM that rewrites leaf 0xD (kvm_pvm) ends up with XCR0 = 7 there, not the host's.
    """
    rows = [(0xD, i, SIGNIFICANT, 0, 0, 0, 0) for i in range(2, 64)]
    return [*rows, (0xD, 0, 0, mask, 0, 0, 0)]


CPUIDS = {
    "empty": [],
    "no leaf 0xD": [(0x40000000, 0, 0, 0x40000001, 1, 2, 3), (0x80000008, 0, 0, 0x3030, 0, 0, 0)],
    "x87": leaf_d(1),
    "avx": leaf_d(7),
    "avx512": leaf_d(0xE7),
    "all": leaf_d(0xFFFFFFFFFFFBFFFF),
    "one entry": one_entry_for_all(),
    "leaf 1": [(1, 0, 0, 7, 0, 1 << 26, 0)],
    "AMX": leaf_d(0x602E7),
    "57 bits": [(0x80000008, 0, 0, 0x3930, 0, 0, 0)],
    "47 bits": [(0x80000008, 0, 0, 0x2F30, 0, 0, 0)],
    "as KVM rewrites it": [(0xD, 0, SIGNIFICANT, 0xE7, 0, 2688, 0)],
    "47 bits, index 5": [(0x80000008, 5, SIGNIFICANT, 0x2F30, 0, 0, 0)],
    "256": [(0x40000000 + i, 0, 0, 0, 0, 0, 0) for i in range(256)],
    "257": [(0x40000000 + i, 0, 0, 0, 0, 0, 0) for i in range(257)],
}


class Difference(AssertionError):
    """The model and the kernel disagree."""


class Machine:
    """The running machine twice: as a kernel with /dev/kvm, and as a model of it."""

    VCPUS_OF_A_VM = 100

    def __init__(self, amx=False):
        self.amx = amx
        if amx:  # before the first vCPU of this process, the one that this_host() makes included
            with live.Kernel() as kernel:
                kernel.arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM, 18)
        self.host = this_host()
        self.live = None
        self.made = 0

    def pair(self):
        """Return a fresh pair of vCPUs."""
        if self.live is None or self.made == self.VCPUS_OF_A_VM:
            self.close()
            self.live, self.made = live.Kernel(), 0
            self.model = Kernel(self.host)
            if self.amx:
                self.model.arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM, 18)
        self.made += 1
        return Pair(self.model.create_vcpu(), self.live.create_vcpu())

    def close(self):
        if self.live is not None:
            self.live.close()
            self.live = None


class Pair:
    """Two vCPUs that take the same operations."""

    def __init__(self, model, real):
        self.model, self.real = model, real
        self.cpuid = []
        self.done = 0

    def apply(self, name, *arguments):
        """Do one operation on both, and compare what came of it."""
        self.done += 1
        answers = [self._answer(vcpu, name, arguments) for vcpu in (self.model, self.real)]
        if answers[0] != answers[1]:
            raise Difference(f"{name}: {describe(*answers)}")
        if name in ("set_cpuid2", "resend_cpuid2") and answers[0] is None:
            self.cpuid = CPUIDS[arguments[0]] if arguments else self.cpuid
            self._adopt()
        return answers[0]

    def _answer(self, vcpu, name, arguments):
        method, options = (
            ("run", {"immediate_exit": True}) if name == "immediate_exit" else (name, {})
        )
        if name == "set_cpuid2":
            arguments = (CPUIDS[arguments[0]],)
        if name == "resend_cpuid2":
            method, arguments = "set_cpuid2", (self.cpuid,)
        if name == "set_same_cpuid2":
            method, arguments = "set_cpuid2", (vcpu.get_cpuid2(),)
        if name == "set_xcrs":
            xcrs, options["nr"], options["flags"] = arguments
            arguments = (xcrs,)
        if name in ("get_xsave", "get_xsave2") and arguments:
            arguments = (bytearray(arguments[0]),)
        if name == "get_values":
            method = "get_xsave2"
        try:
            answer = getattr(vcpu, method)(*arguments, **options)
        except OSError as refused:
            return f"errno {refused.errno}"
        return values(answer) if name == "get_values" else answer

    def _adopt(self):
        """Let the model go on with the list as the kernel has it: some rewrite what they get."""
        entries = self.real.get_cpuid2()
        self.model.cpuid = Cpuid(entries)
        self.model.guest_supported_xcr0 = self.model.cpuid.xcr0 & self.model.kernel.supported_xcr0


def values(data):
    """Return an area without what two right answers may differ in after a run.

    A real run may sleep: the registers are then saved and loaded once more, and the CPU may
    call a component in use, or not, that holds its initial value (SDM vol. 1 section 13.6).
    MXCSR and its mask are written, or not, with SSE's bit.
    """
    return data[:24] + bytes(8) + data[32:512] + bytes(8) + data[520:]


def everything():
    """Return an area whose loading leaves nothing open."""
    data = bytearray(area(random.Random(1), wild=False)[:4096].ljust(16384, b"\0"))
    data[24:28], data[512:576] = b"\x80\x1f\0\0", b"\xe7".ljust(64, b"\0")
    return bytes(data)


def describe(model, real):
    if not (isinstance(model, bytes) and isinstance(real, bytes) and len(model) == len(real)):
        return f"model {model!r:.200}, kernel {real!r:.200}"
    at = [i for i in range(len(model)) if model[i] != real[i]]
    return ", ".join(f"byte {i}: model {model[i]:#x}, kernel {real[i]:#x}" for i in at[:8])


def canonical_x87(rng, data):
    """Put x87 state into `data` that every CPU saves as it was loaded."""
    data[:24] = X87_HEAD
    data[2:4] = (rng.randrange(8) << 11).to_bytes(2, "little")
    data[4] = rng.randrange(256)
    for i in range(8):
        data[32 + 16 * i : 42 + 16 * i] = rng.randbytes(8) + b"\xff\x3f"
        data[39 + 16 * i] |= 0x80


def area(rng, wild):
    """Return a random buffer for KVM_SET_XSAVE; `wild` ones may hold anything for x87."""
    data = bytearray(rng.randbytes(2816) + bytes(4096 - 2816))
    if not wild:
        data[:160] = bytes(160)
        canonical_x87(rng, data)
    mxcsr = rng.choice((0x1F80, 0x1F80, 0x1FA0, 0x9FC0))
    data[24:28] = mxcsr.to_bytes(4, "little")
    data[28:32] = rng.choice((bytes(4), b"\xff\xff\0\0", rng.randbytes(4)))
    header = bytearray(64)
    header[:8] = (rng.choice((0xE7, rng.randrange(256))) & 0xE7).to_bytes(8, "little")
    fault = rng.randrange(24)
    if fault == 0:
        header[:8] = (1 << rng.randrange(64) | header[0]).to_bytes(8, "little")
    elif fault == 1:
        header[8:16] = rng.choice((1 << 63, 1 << rng.randrange(64))).to_bytes(8, "little")
    elif fault == 2:
        header[rng.randrange(16, 64)] = 1 << rng.randrange(8)
    elif fault == 3:
        data[24:28] = (mxcsr | 1 << rng.randrange(32)).to_bytes(4, "little")
    data[512:576] = header
    for at, size in ((576, 256), (1088, 64), (1152, 512), (1664, 1024), (160, 256)):
        if not rng.randrange(5):
            data[at : at + size] = bytes(size)
    if fault == 4:
        return bytes(data[: rng.choice((0, 1, 576, 2816, 4095))])
    return bytes(data) + bytes(rng.choice((0, 0, 1, 4096, 8192)))


def xcrs(rng):
    """Return arguments for KVM_SET_XCRS."""
    values = (1, 3, 7, 0xE7, 5, 0, 0x27, 0x18 | 7, 0x600E7, 0x207, rng.randrange(1 << 20))
    rows = [(rng.choice((0, 0, 0, 1, 7)), rng.choice(values)) for _ in range(rng.choice((1, 1, 2)))]
    nr = rng.choice((None, None, None, 0, 1, 16, 17, 0xFFFFFFFF))
    return rows, nr, rng.choice((0, 0, 0, 0, 1))


def kvm_fpu(rng):
    """Return a struct kvm_fpu that every CPU saves as it was loaded."""
    data = bytearray(160)
    canonical_x87(rng, data)
    fcw, fsw, ftw = struct.unpack_from("<HHB", data)
    return KVM_FPU.pack(bytes(data[32:160]), fcw, fsw, ftw, 0, 0, 0, rng.randbytes(256), 0x1FA0)


def sequence(rng, length):
    """Return a list of operations; a sequence either runs the guest or has wild x87 state."""
    wild = rng.random() < 0.5
    operations = []
    for _ in range(length):
        name = rng.choices(
            ("set_xsave", "get_xsave", "get_xsave2", "set_cpuid2", "set_xcrs", "get_xcrs",
             "set_fpu", "get_fpu", "immediate_exit", "run", "set_same_cpuid2", "get_cpuid2",
             "resend_cpuid2"),
            (26, 22, 6, 5, 8, 4, 4, 6, 10, 0.3, 2, 2, 2),
        )[0]  # fmt: skip
        if name == "set_xsave":
            operations.append((name, area(rng, wild)))
        elif name in ("get_xsave", "get_xsave2") and rng.random() < 0.1:
            operations.append((name, rng.choice((0, 576, 4095, 4096, 5000))))
        elif name == "set_cpuid2":
            operations.append((name, rng.choice(tuple(CPUIDS))))
        elif name == "set_xcrs":
            operations.append((name, *xcrs(rng)))
        elif name == "set_fpu":
            operations.append((name, kvm_fpu(rng)))
        elif wild and name in ("immediate_exit", "run"):
            operations.append(("get_fpu",))
        elif name == "run":
            operations += [(name,), ("get_values",), ("set_xsave", everything())]
        else:
            operations.append((name,))
    return operations


def play(machine, operations):
    """Do a sequence on a fresh pair; return how many operations were done."""
    pair = machine.pair()
    for operation in operations:
        pair.apply(*operation)
    return pair.done


def differs(machine, operations):
    try:
        play(machine, operations)
    except Difference as difference:
        return str(difference)
    return ""


def disturbed(machine, operations):
    """Return whether a difference was the machine's, not the model's.

    An interrupt amid an immediate exit has the effect that `values` tells of, once in 10,000. The
    model's own differences come every time.
    """
    runs = any(name in ("run", "immediate_exit") for name, *_ in operations)
    return runs and not all(differs(machine, operations) for _ in range(3))


def shrink(machine, operations):
    """Leave out every operation without which the difference stays."""
    kept = list(operations)
    for at in reversed(range(len(operations))):
        fewer = kept[:at] + kept[at + 1 :]
        if differs(machine, fewer):
            kept = fewer
    return kept


def search(operations, seed, length=40, amx=False):
    """Run `operations` operations; return how many of each kind. Raises Difference, shrunk.

    Sequences that the machine disturbed are counted apart, and their operations not at all.
    """
    rng = random.Random(seed)
    machine = Machine(amx)
    done = Counter()
    try:
        while done.total() < operations:
            one = sequence(rng, length)
            found = differs(machine, one)
            if found and disturbed(machine, one):
                done["disturbed sequences"] += 1
                continue
            if found:
                least = shrink(machine, one)
                shown = [(name, *(repr(a)[:80] for a in rest)) for name, *rest in least]
                raise Difference(f"seed {seed}: {found}; {differs(machine, least)}\n{shown}")
            done.update(name for name, *_ in one)
    finally:
        machine.close()
    return done


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=100_000, help="operations")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--amx", action="store_true", help="with permission to give guests AMX")
    arguments = parser.parse_args()
    start = time.perf_counter()
    done = search(arguments.n, arguments.seed, amx=arguments.amx)
    seconds = time.perf_counter() - start
    print(f"{done.total()} operations without a difference in {seconds:.0f} s: {dict(done)}")


if __name__ == "__main__":
    main()
