"""A modelled vCPU and a real one that do the same, and a driver that looks for a difference.

Operations are plain data: (name, arguments). `python tests/helpers/kvm_pair.py -n 1000000` runs as
many on /dev/kvm and on the model, in sequences on fresh vCPUs; the first difference is shrunk and
printed. The tests run a few. All areas and CPUID lists are made of what this machine's KVM has, in
its own layout; at the end the driver says what was exercised, and fails if a component that this
KVM has was never accepted by a real KVM_SET_XSAVE.
"""

import argparse
import ctypes
import random
import struct
import sys
import time
from collections import Counter

from xfast.engine import hw
from xfast.hosts.this import this_host
from xfast.kernels.uapi import CR4_OSXSAVE, CR4_PKE, CR4_SMEP, KVM_EXIT_HLT, KVM_FPU
from xfast.kvm import Kernel, live
from xfast.kvm.fpu import ARCH_REQ_XCOMP_GUEST_PERM
from xfast.xsave.cpuid import Cpuid
from xfast.xsave.features import (
    AVX,
    BY_NAME,
    KVM_XSAVE_SIZE,
    PKRU,
    PKRU_DEFAULT,
    TILEDATA,
    X87,
    XFEATURE_MASK_AVX512,
    XFEATURE_MASK_FPSSE,
    XFEATURE_MASK_MPX,
    XFEATURE_MASK_USER_DYNAMIC,
    XFEATURE_MASK_XTILE,
    bits,
    name_of,
    names_of,
)

SIGNIFICANT = 1
X87_HEAD = struct.pack("<HHBBHQQ", 0x37F, 0x1800, 0xFF, 0, 0, 0, 0)
XSAVE_IN_LEAF_1, PKU_IN_LEAF_7 = 1 << 26, 1 << 3
LEAST_FOR_COVERAGE = 1000
"""Operations from which on every component must have been accepted."""


def leaf_d(mask):
    """Return a list whose leaf 0xD.0 has `mask`; a plain KVM takes it as it is."""
    return [(0xD, 0, SIGNIFICANT, mask & 0xFFFFFFFF, 0, 0, mask >> 32)]


def with_features(mask):
    """Return a list with XSAVE, PKU where `mask` has PKRU, and leaf 0xD."""
    pku = PKU_IN_LEAF_7 if mask & PKRU else 0
    first = (1, 0, 0, 7, 0, XSAVE_IN_LEAF_1, 0)
    return [first, (7, 0, SIGNIFICANT, 0, 0, pku, 0), *leaf_d(mask)]


def one_entry_for_all(mask=0):
    """Return a list in which one entry answers for sub-leaves 0 and 1.

    A KVM that rewrites leaf 0xD (kvm_pvm) ends up with XCR0 = 7 there, not the host's.
    """
    rows = [(0xD, i, SIGNIFICANT, 0, 0, 0, 0) for i in range(2, 64)]
    return [*rows, (0xD, 0, 0, mask, 0, 0, 0)]


def cpuid_lists(mask):
    """Return {name: CPUID list}, for a KVM that has the components of `mask`."""
    plain = mask & ~XFEATURE_MASK_XTILE
    return {
        "empty": [],
        "no leaf 0xD": [
            (0x40000000, 0, 0, 0x40000001, 1, 2, 3),
            (0x80000008, 0, 0, 0x3030, 0, 0, 0),
        ],
        "x87": leaf_d(X87),
        "avx": leaf_d(XFEATURE_MASK_FPSSE | AVX),
        "the host's": leaf_d(plain),
        "the host's, with features": with_features(plain),
        "no PKU": leaf_d(plain & ~PKRU),
        "no PKU, with features": with_features(plain & ~PKRU),
        "PKRU alone": leaf_d(X87 | PKRU),
        "no AVX-512": with_features(plain & ~XFEATURE_MASK_AVX512),
        "no MPX": with_features(plain & ~XFEATURE_MASK_MPX),
        "all": leaf_d(~XFEATURE_MASK_USER_DYNAMIC & (1 << 64) - 1),
        "one entry": one_entry_for_all(),
        "leaf 1": [(1, 0, 0, 7, 0, XSAVE_IN_LEAF_1, 0)],
        "AMX": leaf_d(plain | XFEATURE_MASK_XTILE),
        "57 bits": [(0x80000008, 0, 0, 0x3930, 0, 0, 0)],
        "47 bits": [(0x80000008, 0, 0, 0x2F30, 0, 0, 0)],
        "as KVM rewrites it": [(0xD, 0, SIGNIFICANT, plain, 0, 2688, 0)],
        "47 bits, index 5": [(0x80000008, 5, SIGNIFICANT, 0x2F30, 0, 0, 0)],
        "256": [(0x40000000 + i, 0, 0, 0, 0, 0, 0) for i in range(256)],
        "257": [(0x40000000 + i, 0, 0, 0, 0, 0, 0) for i in range(257)],
    }


def has_pku():
    """Return whether this thread can execute WRPKRU."""
    return bool(hw.xgetbv(0) & PKRU and hw.cpuid(7)[2] >> 4 & 1)


def wrpkru(value):
    """Set this thread's own PKRU, but for key 0, which its memory has."""
    libc = ctypes.CDLL(None)
    for key in range(1, 16):
        libc.pkey_set(key, value >> 2 * key & 3)


def wrpkru_guest(value):
    """Return a real-mode guest that executes WRPKRU and halts."""
    load = b"\x66\xb8" + value.to_bytes(4, "little")  # MOV EAX, value
    clear = b"\x66\x31\xc9\x66\x31\xd2"  # XOR ECX, ECX; XOR EDX, EDX
    return load + clear + b"\x0f\x01\xef\xf4"  # WRPKRU; HLT


def guests_run_wrpkru(cpuid):
    """Return whether a guest can execute WRPKRU; kvm_pvm emulates real mode, and lacks it."""
    with live.Kernel() as kernel:
        vcpu = kernel.create_vcpu()
        vcpu.set_cpuid2(cpuid)
        try:
            vcpu.set_cr4(CR4_PKE)
        except OSError:
            return False
        return vcpu.run(wrpkru_guest(PKRU_DEFAULT)) == KVM_EXIT_HLT


def checks_cr4(without_xsave):
    """Return whether this KVM refuses CR4 bits that the guest's CPUID lacks; kvm_pvm does not."""
    with live.Kernel() as kernel:
        vcpu = kernel.create_vcpu()
        vcpu.set_cpuid2(without_xsave)
        try:
            vcpu.set_cr4(CR4_OSXSAVE)
        except OSError:
            return True
        return False


class Difference(AssertionError):
    """The model and the kernel disagree."""


class Machine:
    """The running machine twice: as a kernel with /dev/kvm, and as a model of it."""

    VCPUS_OF_A_VM = 100

    def __init__(self, amx=False):
        self.amx = amx
        if amx:  # before the first vCPU of this process, the one that this_host() makes included
            with live.Kernel() as kernel:
                kernel.arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM, TILEDATA.bit_length() - 1)
        self.host = this_host()
        self.cpuids = cpuid_lists(self.host.kvm_xcr0)
        self.has_pku = has_pku()
        self.guests_run_wrpkru = self.has_pku and guests_run_wrpkru(
            self.cpuids["the host's, with features"]
        )
        self.checks_cr4 = checks_cr4(self.cpuids["no leaf 0xD"])
        self.live = None
        self.made = 0
        self.seen = Counter()

    def pair(self):
        """Return a fresh pair of vCPUs."""
        if self.live is None or self.made == self.VCPUS_OF_A_VM:
            self.close()
            self.live, self.made = live.Kernel(), 0
            self.model = Kernel(self.host)
            if self.amx:
                self.model.arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM, TILEDATA.bit_length() - 1)
        self.made += 1
        self.wrpkru(PKRU_DEFAULT)
        return Pair(self, self.model.create_vcpu(), self.live.create_vcpu())

    def wrpkru(self, value):
        """Set the PKRU of the thread that drives the vCPUs, on both."""
        if self.has_pku:
            wrpkru(value)
            self.model.fpu.wrpkru(value & ~3)

    def close(self):
        if self.live is not None:
            self.live.close()
            self.live = None
            if self.has_pku:
                wrpkru(PKRU_DEFAULT)


class Pair:
    """Two vCPUs that take the same operations."""

    def __init__(self, machine, model, real):
        self.machine, self.model, self.real = machine, model, real
        self.cpuid = []
        self.done = 0

    def apply(self, name, *arguments):
        """Do one operation on both, and compare what came of it."""
        self.done += 1
        if name == "vmm_wrpkru":
            self.machine.wrpkru(*arguments)
            return None
        if name == "set_cr4" and not self.machine.checks_cr4:
            answers = [self._answer(self.real, name, arguments)] * 2
            self.model.cr4 = arguments[0] if answers[0] is None else self.model.cr4
        else:
            answers = [self._answer(vcpu, name, arguments) for vcpu in (self.model, self.real)]
        if answers[0] != answers[1]:
            raise Difference(f"{name}: {describe(*answers)}")
        if name in ("set_cpuid2", "resend_cpuid2") and answers[0] is None:
            self.cpuid = self.machine.cpuids[arguments[0]] if arguments else self.cpuid
            self._adopt()
        self._count(name, arguments, answers[1])
        return answers[0]

    def _answer(self, vcpu, name, arguments):
        method, options = (
            ("run", {"immediate_exit": True}) if name == "immediate_exit" else (name, {})
        )
        if name == "set_cpuid2":
            arguments = (self.machine.cpuids[arguments[0]],)
        if name == "resend_cpuid2":
            method, arguments = "set_cpuid2", (self.cpuid,)
        if name == "set_same_cpuid2":
            method, arguments = "set_cpuid2", (vcpu.get_cpuid2(),)
        if name == "run_wrpkru":
            method, arguments = "run", (self._guest(vcpu, *arguments),)
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

    @property
    def runs_wrpkru(self):
        """Whether the guest can execute WRPKRU now."""
        return bool(self.machine.guests_run_wrpkru and self.model.cr4 & CR4_PKE)

    def _guest(self, vcpu, value):
        """Return a guest that executes WRPKRU, if CR4 lets it, and halts: real or modelled."""
        if not self.runs_wrpkru:
            return None
        if vcpu is self.model:
            return lambda processor: self.machine.model.fpu.wrpkru(value)
        return wrpkru_guest(value)

    def _adopt(self):
        """Let the model go on with the list as the kernel has it: some rewrite what they get."""
        entries = self.real.get_cpuid2()
        self.model.cpuid = Cpuid(entries)
        self.model.guest_supported_xcr0 = self.model.cpuid.xcr0 & self.model.kernel.supported_xcr0

    def _count(self, name, arguments, answer):
        seen, error = self.machine.seen, isinstance(answer, str)
        if name == "set_xsave" and len(arguments[0]) >= 520:
            xstate_bv = int.from_bytes(arguments[0][512:520], "little")
            own = self.machine.host.kvm_xcr0
            names = {name_of(nr) if own >> nr & 1 else "others" for nr in bits(xstate_bv)}
            seen.update(f"SET {'refused' if error else 'accepted'} {name}" for name in names)
        elif name == "set_cpuid2" and not error:
            guest = "with PKU" if self.model.guest_supported_xcr0 & PKRU else "without PKU"
            seen[f"guests {guest}"] += 1
        elif name == "set_cr4":
            pke = arguments[0] & CR4_PKE
            seen[f"CR4{' with PKE' if pke else ''} {'refused' if error else 'accepted'}"] += 1
        elif name == "run_wrpkru" and self.runs_wrpkru:
            seen["runs that execute WRPKRU"] += 1


def values(data):
    """Return an area without what two right answers may differ in after a run.

    A real run may sleep: the registers are then saved and loaded once more, and the CPU may
    call a component in use, or not, that holds its initial value (SDM vol. 1 section 13.6).
    MXCSR and its mask are written, or not, with SSE's bit.
    """
    return data[:24] + bytes(8) + data[32:512] + bytes(8) + data[520:]


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


class Operations:
    """Random operations for a host: its components, in its layout. A seed repeats them."""

    def __init__(self, machine, rng):
        host = machine.host
        self.rng = rng
        self.names = tuple(machine.cpuids)
        self.supported = host.kvm_xcr0
        self.mask = host.kvm_xcr0 & ~XFEATURE_MASK_XTILE
        slots = [slot for slot in host.layout.slots if self.mask >> slot.nr & 1 and slot.offset]
        self.places = [(160, 256), *((slot.offset, slot.size) for slot in slots)]
        self.end = host.layout.standard_size(self.mask)
        self.size = max(host.layout.standard_size(self.supported), KVM_XSAVE_SIZE)

    def area(self, wild):
        """Return a random buffer for KVM_SET_XSAVE; `wild` ones may hold anything for x87."""
        rng = self.rng
        data = bytearray(rng.randbytes(self.end) + bytes(self.size - self.end))
        if not wild:
            data[:160] = bytes(160)
            canonical_x87(rng, data)
        mxcsr = rng.choice((0x1F80, 0x1F80, 0x1FA0, 0x9FC0))
        data[24:28] = mxcsr.to_bytes(4, "little")
        data[28:32] = rng.choice((bytes(4), b"\xff\xff\0\0", rng.randbytes(4)))
        header = bytearray(64)
        xstate_bv = rng.choice((self.mask, rng.getrandbits(64) & self.mask))
        header[:8] = xstate_bv.to_bytes(8, "little")
        fault = rng.randrange(24)
        if fault == 0:
            header[:8] = (1 << rng.randrange(64) | xstate_bv).to_bytes(8, "little")
        elif fault == 1:
            header[8:16] = rng.choice((1 << 63, 1 << rng.randrange(64))).to_bytes(8, "little")
        elif fault == 2:
            header[rng.randrange(16, 64)] = 1 << rng.randrange(8)
        elif fault == 3:
            data[24:28] = (mxcsr | 1 << rng.randrange(32)).to_bytes(4, "little")
        data[512:576] = header
        for at, size in self.places:
            if not rng.randrange(5):
                data[at : at + size] = bytes(size)
        if fault == 4:
            return bytes(data[: rng.choice((0, 1, 576, self.end, self.size - 1))])
        return bytes(data) + bytes(rng.choice((0, 0, 1, 4096, 8192)))

    def everything(self):
        """Return an area whose loading leaves nothing open."""
        fixed = Operations.__new__(Operations)
        fixed.__dict__ = {**self.__dict__, "rng": random.Random(1)}
        data = bytearray(fixed.area(wild=False)[: self.size].ljust(4 * KVM_XSAVE_SIZE, b"\0"))
        data[24:28] = b"\x80\x1f\0\0"
        data[512:576] = self.mask.to_bytes(8, "little").ljust(64, b"\0")
        return bytes(data)

    def xcrs(self):
        """Return arguments for KVM_SET_XCRS."""
        rng = self.rng
        legal = rng.getrandbits(64) & self.supported | X87
        choices = (
            *(X87, XFEATURE_MASK_FPSSE, XFEATURE_MASK_FPSSE | AVX, self.mask, self.supported),
            *(X87 | AVX, 0, self.mask | XFEATURE_MASK_MPX, self.mask ^ PKRU),
            *(self.mask & ~BY_NAME["zmm_hi256"].bit, self.mask | XFEATURE_MASK_XTILE),
            *(rng.randrange(1 << 20), legal),
        )
        rows = [
            (rng.choice((0, 0, 0, 1, 7)), rng.choice(choices)) for _ in range(rng.choice((1, 1, 2)))
        ]
        nr = rng.choice((None, None, None, 0, 1, 16, 17, 0xFFFFFFFF))
        return rows, nr, rng.choice((0, 0, 0, 0, 1))

    def kvm_fpu(self):
        """Return a struct kvm_fpu that every CPU saves as it was loaded."""
        data = bytearray(160)
        canonical_x87(self.rng, data)
        fcw, fsw, ftw = struct.unpack_from("<HHB", data)
        xmm = self.rng.randbytes(256)
        return KVM_FPU.pack(bytes(data[32:160]), fcw, fsw, ftw, 0, 0, 0, xmm, 0x1FA0)

    def pkru(self):
        return self.rng.choice((PKRU_DEFAULT, 0, self.rng.getrandbits(32)))

    def sequence(self, length):
        """Return a list of operations; a sequence either runs the guest or has wild x87 state."""
        wild = self.rng.random() < 0.5
        return [op for _ in range(length) for op in self.some(wild)]

    def some(self, wild):
        """Return one operation, and those that must follow it."""
        rng = self.rng
        name = rng.choices(
            ("set_xsave", "get_xsave", "get_xsave2", "set_cpuid2", "set_xcrs", "get_xcrs",
             "set_fpu", "get_fpu", "immediate_exit", "run", "run_wrpkru", "set_same_cpuid2",
             "get_cpuid2", "resend_cpuid2", "set_cr4", "vmm_wrpkru"),
            (26, 22, 6, 5, 8, 4, 4, 6, 10, 0.3, 0.3, 2, 2, 2, 3, 2),
        )[0]  # fmt: skip
        arguments = {
            "set_xsave": lambda: (self.area(wild),),
            "set_cpuid2": lambda: (rng.choice(self.names),),
            "set_xcrs": self.xcrs,
            "set_fpu": lambda: (self.kvm_fpu(),),
            "set_cr4": lambda: (
                rng.choice((0, CR4_OSXSAVE, CR4_PKE, CR4_OSXSAVE | CR4_PKE, CR4_SMEP)),
            ),
            "vmm_wrpkru": lambda: (self.pkru(),),
            "run_wrpkru": lambda: (self.pkru(),),
            "get_cpuid2": lambda: rng.choice(((), (), (rng.randrange(8),))),
        }
        if name in ("get_xsave", "get_xsave2") and rng.random() < 0.1:
            return [(name, rng.choice((0, 576, 4095, 4096, 5000)))]
        if wild and name in ("immediate_exit", "run", "run_wrpkru"):
            return [("get_fpu",)]
        one = (name, *arguments.get(name, tuple)())
        if name in ("run", "run_wrpkru"):
            return [one, ("get_values",), ("set_xsave", self.everything())]
        return [one]


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
    runs = any(name.startswith("run") or name == "immediate_exit" for name, *_ in operations)
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
    """Run `operations` operations; return how many of each kind, and what they exercised.

    Sequences that the machine disturbed are counted apart, and their operations not at all.

    Raises
    ------
    Difference
        Shrunk, if there is one.
    AssertionError
        If a component that this KVM has was never accepted.
    """
    machine = Machine(amx)
    choices = Operations(machine, random.Random(seed))
    done = Counter()
    try:
        while done.total() < operations:
            one = choices.sequence(length)
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
    missing = never_accepted(machine)
    assert operations < LEAST_FOR_COVERAGE or not missing, f"never accepted: {names_of(missing)}"
    return done, machine


def never_accepted(machine):
    """Return the components that this KVM has and no real KVM_SET_XSAVE accepted (mask).

    AMX is left out: its areas are larger than those here.
    """
    own = machine.host.kvm_xcr0 & ~XFEATURE_MASK_XTILE
    return sum(1 << nr for nr in bits(own) if not machine.seen[f"SET accepted {name_of(nr)}"])


def report(done, machine, seconds):
    """Return the lines that say what was exercised."""
    host, seen = machine.host, machine.seen
    lines = [
        f"{done.total()} operations on {host.vendor}, KVM's XCR0 {host.kvm_xcr0:#x} "
        f"({names_of(host.kvm_xcr0)}), without a difference in {seconds:.0f} s",
    ]
    for what in ("SET accepted", "SET refused"):
        counts = {
            k.removeprefix(what)[1:]: n for k, n in sorted(seen.items()) if k.startswith(what)
        }
        lines.append(f"  {what}, by component: {counts}")
    rest = {k: n for k, n in sorted(seen.items()) if not k.startswith("SET ")}
    lines.append(f"  {rest}; the VMM's WRPKRU {done['vmm_wrpkru'] if machine.has_pku else 0}")
    if not machine.checks_cr4:
        lines.append("  this KVM takes CR4 bits that CPUID lacks: the model took what it took")
    if machine.has_pku and not machine.guests_run_wrpkru:
        lines.append("  guests can't execute WRPKRU here: this KVM emulates real mode")
    lines.append(f"  by kind: {dict(sorted(done.items()))}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=100_000, help="operations")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--amx", action="store_true", help="with permission to give guests AMX")
    arguments = parser.parse_args()
    start = time.perf_counter()
    try:
        done, machine = search(arguments.n, arguments.seed, amx=arguments.amx)
    except AssertionError as error:
        print(error)
        return 1
    print(report(done, machine, time.perf_counter() - start))
    return 0


if __name__ == "__main__":
    sys.exit(main())
