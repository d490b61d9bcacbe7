"""What CRIU itself would answer: its ``--cpu-cap`` levels fpu, ins and cpu, host by host.

The rules of `xfast.judge.findings` judge a thread's registers like any other area; this is CRIU's
own comparison of the dumping machine (cpuinfo.img) with the target, made once for all threads. CRIU
asks the CPU, not the kernel, and stops at the first difference; here all are told. It reads
cpuinfo.img where ``--cpu-cap`` is given, and restores without that question where it is not.

*Source*: CRIU criu/arch/x86/cpu.c, criu/arch/x86/crtools.c, compel/arch/x86/src/lib/cpu.c,
criu/config.c parse_cpu_cap().
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from xfast.hosts.model import Host
from xfast.judge.subject import Machine, Part, Subject
from xfast.judge.verdict import Finding, Policy
from xfast.xsave.cpuid import FEATURES, RUNTIME_FEATURES, Cpuid, Feature
from xfast.xsave.features import (
    AVX,
    BY_NAME,
    PKRU,
    SSE,
    TILEDATA,
    XFEATURE_MASK_AVX512,
    XFEATURE_MASK_FPSSE,
    XFEATURE_MASK_MPX,
    XFEATURE_MASK_XTILE,
    bits,
    name_of,
)

STORED = XFEATURE_MASK_FPSSE | AVX | XFEATURE_MASK_MPX | XFEATURE_MASK_AVX512 | PKRU
"""The components for which CRIU's images have fields."""

COMPARED = STORED & ~(SSE | BY_NAME["bndregs"].bit)
"""The components of CRIU's xfeatures_mask (0xe5 where XCR0 is 0xe7): CRIU's mask of supervisor
state has HDC's number there, 10, where its bit belongs, and so removes SSE and BNDREGS."""

SIZES = {"xsave_size": "xsave size", "xsave_size_max": "xsave max size"}
"""Fields of cpuinfo.img that level fpu compares, CPUID leaf 0xD's EBX and ECX, in CRIU's words."""

FPU = ("fpu", "fxsr", "osxsave", "xsaves")
"""The CPUID features that level fpu asks for."""

INS = frozenset({
    "fpu", "cx8", "sep", "cmov", "clflush", "mmx", "fxsr", "sse", "sse2", "syscall", "mmxext",
    "rdtscp", "3dnowext", "3dnow", "pni", "pclmulqdq", "ssse3", "cx16", "sse4_1", "sse4_2", "movbe",
    "popcnt", "aes", "xsave", "osxsave", "avx", "f16c", "rdrand", "abm", "sse4a", "misalignsse",
    "xop", "fma4", "tbm", "fsgsbase", "bmi1", "hle", "avx2", "bmi2", "rtm", "mpx", "avx512f",
    "avx512dq", "rdseed", "adx", "clflushopt", "avx512pf", "avx512er", "avx512cd", "sha_ni",
    "avx512bw", "avx512vl", "xsaveopt", "xsavec", "xgetbv1", "avx512vbmi", "avx512_vbmi2", "gfni",
    "vaes", "vpclmulqdq", "avx512_vnni", "avx512_bitalg", "avx512_vpopcntdq", "rdpid", "clzero",
    "avx512_4vnniw", "avx512_4fmaps",
})  # fmt: skip
"""The CPUID features that level ins asks for. FMA is none of them."""

INS_ONLY = (
    Feature("tsc", 1, 0, "edx", 4),
    Feature("monitor", 1, 0, "ecx", 3),
    Feature("3dnowprefetch", 0x80000001, 0, "ecx", 8),
    Feature("erms", 7, 0, "ebx", 9),
    Feature("tme", 7, 0, "ecx", 13),
)
"""Features that level ins asks for too, and no other rule: they concern speed or kernels.

Two more, rep_good and nopl, CRIU sets itself on every x86-64 CPU since 2007.
"""

CPU_LEAVES = {(1, 0), (7, 0), (0xD, 1), (0x80000001, 0), (0x80000008, 0)}
"""The CPUID leaves that level cpu compares, as far as their bits have names here."""

WORDS = 19
"""The words of CPUID in today's cpuinfo.img; CRIU fills up those of older ones from the target."""

VALIDATE = "CRIU criu/arch/x86/cpu.c cpu_validate_features()"
VALIDATE_INS = "CRIU criu/arch/x86/cpu.c cpu_validate_ins_features()"
VALID_FRAME = "CRIU criu/arch/x86/crtools.c valid_xsave_frame()"
FIELDS = "CRIU images/core-x86.proto user_x86_xsave_entry"


class _Process(NamedTuple):
    """A checkpoint's threads, and the one dumping machine that all of them ran on."""

    threads: tuple[Part, ...]
    machine: Machine

    def finding(
        self,
        code: str,
        severity: str,
        why: str,
        *,
        image: str,
        host: str,
        ref: str = VALIDATE,
        component: str = "",
        open: bool = False,
    ) -> Finding:
        """Build a finding; `image` and `host` are both sides' values."""
        thread = self.threads[0].vcpu
        return Finding(code, component, thread, severity, image, host, "none", why, ref, open)

    def use(self, mask: int) -> str:
        """Say which threads have state of these components that is not their init value."""
        threads = [str(thread.vcpu) for thread in self.threads if thread.state.live & mask]
        more = f" and {len(threads) - 4} more" if threads[4:] else ""
        return f"live in thread {', '.join(threads[:4])}{more}" if threads else "live in no thread"


def criu_findings(subject: Subject, host: Host, policy: Policy) -> Iterator[Finding]:
    """Yield what CRIU's checks have to say of a checkpoint on one host.

    Parameters
    ----------
    subject : Subject
        For snapshots of other producers there is nothing to say.
    host : Host
    policy : Policy
        CRIU compares when it is asked to (--cpu-cap). What its level fpu refuses is risky, and
        blocks if the policy asks ``fpu``; what only ins or cpu refuses is a note, and blocks if
        the policy asks ``isa`` or ``strict``.

    *Source*: CRIU criu/arch/x86/cpu.c cpu_validate_features().
    """
    if subject.machine is None or not subject.parts:
        return
    process = _Process(subject.parts, subject.machine)
    yield from _tiles(process, host)
    if host.features is not None and "xsave" not in host.features:
        yield from _no_xsave(process)
        return
    if process.machine.cpuid is not None:
        for check in CHECKS:
            yield from check(process, host, policy)


def _no_xsave(process: _Process) -> Iterator[Finding]:
    if process.machine.has_area:
        yield process.finding(
            "HOST-MISSING",
            "blocks",
            "criu --cpu-cap=fpu, its default, refuses: the image has an XSAVE area, and the host "
            "has no XSAVE",
            image="xsave",
            host="absent",
            ref=VALID_FRAME,
        )


def _missing(process: _Process, names: Iterable[str], host: Host) -> list[str]:
    """Return those of `names` that the dumping CPU had and the host lacks."""
    assert process.machine.cpuid is not None
    assert host.features is not None
    # A kernel sets CR4.OSXSAVE where the CPU has XSAVE; hosts don't tell of such bits.
    there = host.features | {"osxsave"}
    return sorted(process.machine.cpuid.features & frozenset(names) - there)


def _fpu_features(process: _Process, host: Host, policy: Policy) -> Iterator[Finding]:
    if host.features is not None:
        for name in _missing(process, FPU, host):
            yield process.finding(
                "HOST-MISSING",
                "blocks" if policy.asks("fpu") else "risky",
                f"criu --cpu-cap=fpu refuses: the dumping CPU has {name}, the host has not",
                image="present",
                host="absent",
                component=name,
            )
    elif process.machine.cpuid is not None and "xsaves" in process.machine.cpuid.features:
        yield process.finding(
            "HOST-MISSING",
            "risky",
            "criu --cpu-cap=fpu may refuse: it asks for xsaves, which the dumping CPU has, and "
            "whether the host has it is not known",
            image="present",
            host="unknown",
            component="xsaves",
            open=policy.asks("fpu"),
        )


def _fpu_mask(process: _Process, host: Host, policy: Policy) -> Iterator[Finding]:
    mask = process.machine.cpuinfo.xfeatures_mask
    if mask is None or host.layout is None:
        return
    there = host.layout.user_mask & COMPARED
    for nr in bits(mask & COMPARED & ~there):
        yield process.finding(
            "HOST-MISSING",
            "blocks" if policy.asks("fpu") else "risky",
            f"criu --cpu-cap=fpu refuses: {name_of(nr)} ({process.use(1 << nr)}) is in the image's "
            f"xfeatures_mask {mask:#x}, and not on the host ({there:#x})",
            image=f"{mask:#x}",
            host=f"{there:#x}",
            component=name_of(nr),
        )


def _fpu_sizes(process: _Process, host: Host, policy: Policy) -> Iterator[Finding]:
    there: dict[str, int | None] = dict.fromkeys(SIZES)
    if host.layout is not None and host.xcr0 is not None and not host.xcr0 & ~host.layout.mask:
        there["xsave_size"] = host.layout.standard_size(host.xcr0)
        there["xsave_size_max"] = host.layout.standard_size()
    for name, words in SIZES.items():
        size, size_there = getattr(process.machine.cpuinfo, name), there[name]
        if size is not None and size_there is None:
            yield process.finding(
                "SIZE",
                "risky",
                f"criu --cpu-cap=fpu may refuse: it asks for the same {words}, {size} on the "
                "image, and not known of the host",
                image=f"{size}",
                host="unknown",
                open=policy.asks("fpu"),
            )
        elif size is not None and size != size_there:
            yield process.finding(
                "SIZE",
                "blocks" if policy.asks("fpu") else "risky",
                f"criu --cpu-cap=fpu refuses: {words} {size} on the image, {size_there} on the "
                "host (CRIU asks for equal)",
                image=f"{size}",
                host=f"{size_there}",
            )


def _ins(process: _Process, host: Host, policy: Policy) -> Iterator[Finding]:
    if host.features is None:
        return
    only = _ins_only(process, host)
    missing = _missing(process, INS, host) + [name for name in only if only[name] == (True, False)]
    unknown = [name for name in only if only[name] == (True, None)]
    needs = 0
    for name in missing:
        needs |= FEATURES[name].components & ~XFEATURE_MASK_FPSSE if name in FEATURES else 0
    if missing:
        used = f", whose state is {process.use(needs)}" if needs else ""
        yield process.finding(
            "ISA",
            "blocks" if policy.asks("isa") else "note",
            f"criu --cpu-cap=ins refuses: the host lacks {', '.join(missing)}{used}",
            image=f"{len(missing)} features",
            host="absent",
            ref=VALIDATE_INS,
            component=" ".join(missing),
        )
    elif unknown:
        yield process.finding(
            "ISA",
            "note",
            f"criu --cpu-cap=ins may refuse: it asks for {', '.join(unknown)} too, of which the "
            "host's description does not tell",
            image=", ".join(unknown),
            host="unknown",
            ref=VALIDATE_INS,
        )


def _ins_only(process: _Process, host: Host) -> dict[str, tuple[bool | None, bool | None]]:
    """Return whether the dumping CPU and the host have each of INS_ONLY; None is unknown."""
    return {f.name: (_has(process.machine.cpuid, f), _has(host.cpuid, f)) for f in INS_ONLY}


def _has(cpuid: Cpuid | None, feature: Feature) -> bool | None:
    row = cpuid.find(feature.leaf, feature.subleaf) if cpuid is not None else None
    return None if row is None else bool(getattr(row, feature.register) >> feature.bit & 1)


def _cpu(process: _Process, host: Host, policy: Policy) -> Iterator[Finding]:
    machine = process.machine
    if host.features is None or machine.cpuid is None or len(machine.cpuinfo.capability) < WORDS:
        return
    compared = {f.name for f in FEATURES.values() if (f.leaf, f.subleaf) in CPU_LEAVES}
    compared -= RUNTIME_FEATURES
    only = _ins_only(process, host)
    more = sorted((machine.cpuid.features - host.features) & compared)
    more += [name for name in only if only[name] == (True, False)]
    fewer = sorted((host.features - machine.cpuid.features) & compared)
    fewer += [name for name in only if only[name] == (False, True)]
    if more or fewer:
        yield process.finding(
            "ISA",
            "blocks" if policy.asks("strict") else "note",
            "criu --cpu-cap=cpu refuses: only the image has "
            f"{', '.join(more) or 'nothing'}, and only the host has "
            f"{', '.join(fewer) or 'nothing'} (CRIU asks for equal)",
            image=" ".join(more) or "none",
            host=" ".join(fewer) or "none",
        )


def _tiles(process: _Process, host: Host) -> Iterator[Finding]:
    """AMX: no field of an image can hold tiles, and so nothing tells whether there were any."""
    seen = [thread for thread in process.threads if thread.state.bv & XFEATURE_MASK_XTILE]
    if seen:
        yield process.finding(
            "SIZE",
            "risky",
            f"Tile state of thread {seen[0].vcpu} is lost: CRIU's images have no field for it",
            image=f"{seen[0].state.bv:#x}",
            host="none",
            ref=FIELDS,
            component="tiledata",
        )
        return
    had = host.xcr0 is not None and host.xcr0 & TILEDATA
    whose = "the host"
    if process.machine.cpuid is not None:
        had, whose = "amx_tile" in process.machine.cpuid.features, "the dumping CPU"
    if had:
        yield process.finding(
            "SIZE",
            "note",
            f"State of AMX tiles would be lost: {whose} has AMX, and CRIU's images have no field "
            "for tiles",
            image="no field",
            host="amx_tile",
            ref=FIELDS,
            component="tiledata",
        )


CHECKS: tuple[Callable[[_Process, Host, Policy], Iterator[Finding]], ...] = (
    _fpu_features,
    _fpu_mask,
    _fpu_sizes,
    _ins,
    _cpu,
)
