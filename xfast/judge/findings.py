"""The rules at work: one function a rule code, which looks at one State and one Target.

A function yields a Finding for each thing that speaks against the restore, or that the reader
should know. It sees no vCPU, no file and no host, so its answer holds for all of a kind. What
it says is in `xfast.judge.words`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from xfast.judge.registry import FUNCTIONS, finding_of, judges
from xfast.judge.rules import RULES
from xfast.judge.subject import State, Subject
from xfast.judge.target import Target
from xfast.judge.verdict import Finding, Policy
from xfast.judge.words import say
from xfast.kernels.behaviour import BEHAVIOURS
from xfast.kernels.guest import xcr0_problem
from xfast.xsave.features import (
    APX,
    MISALIGNED_SSE,
    PKRU_NR,
    SSE_NR,
    SUPERVISOR_MASK,
    TILEDATA,
    TILEDATA_NR,
    X87,
    XFEATURE_MASK_FPSSE,
    XFEATURE_MASK_MPX,
    XFEATURE_MASK_XTILE,
    bits,
    name_of,
    names_of,
)


def _drop(state: State, nr: int) -> str:
    """Say what dropping a component would lose."""
    return "lossy" if state.live >> nr & 1 else "safe"


def _what(state: State, nr: int) -> str:
    """Name a present component, and say in a word or two what it holds."""
    if nr == PKRU_NR and state.pkru is not None:
        holds = f"value {state.pkru:#x}"
    elif state.unplaced >> nr & 1:
        holds = "value unknown"
    elif state.unreadable >> nr & 1:
        holds = "data not in the area"
    else:
        holds = "live" if state.live >> nr & 1 else "init value"
    return f"{name_of(nr)} ({holds})"


@judges("LEAK")
def _leak(state: State, target: Target, policy: Policy) -> Iterator[Finding]:
    for nr in bits(state.leaked):
        bit, leak = 1 << nr, _leak_in(state, nr)
        ref, undecided = "", False
        if target.refused & bit:
            severity = "blocks"
            here = target.host is not None and target.host & bit
            why = say("leak, kernel refuses" if here else "leak, host lacks it", leak=leak)
            if state.producer == "qemu-kvm":
                why += say("leak, qemu")
        elif target.doubtful & bit:
            severity, undecided = "risky", True
            missing = "this host's kernel" if target.release is None else "the guest's CPUID"
            why = say("leak, doubtful", leak=leak, missing=missing)
        elif target.kept & bit:
            severity, ref = "risky", BEHAVIOURS["fpu-core-uabi"].ref
            why = say("leak, kept", leak=leak)
        else:
            severity, ref = "note", BEHAVIOURS["get-trims"].ref
            sure = state.guest_cpuid_mask is not None
            unless = "" if sure else ", unless the guest's CPUID has it"
            why = say("leak, trimmed", leak=leak, unless=unless)
        yield finding_of(
            "LEAK",
            severity,
            why,
            component=nr,
            snapshot=f"{state.bv:#x}",
            host="unknown" if target.host is None else f"{target.accepts:#x}",
            fix=_drop(state, nr),
            ref=ref,
            open=undecided,
        )


def _leak_in(state: State, nr: int) -> str:
    """Say what leaked, and how that is known."""
    if state.may is None:
        return say("leak, unknown guest", what=_what(state, nr))
    leak = say("leak", what=_what(state, nr), source=state.may_from, may=state.may)
    return leak + (say("leak, signature") if nr == PKRU_NR and state.pkru == 0 else "")


@judges("HOST-MISSING")
def _host_missing(state: State, target: Target, policy: Policy) -> Iterator[Finding]:
    have = target.host
    if have is None:
        yield finding_of(
            "HOST-MISSING",
            "risky",
            say("host unknown"),
            snapshot=f"{state.bv:#x}",
            host="unknown",
            open=True,
        )
        return
    process = state.kind == "process"
    for nr in bits(state.bv & ~have & ~state.leaked):
        if not process:
            severity, sentence = "blocks", "host lacks it"
        elif state.live >> nr & 1:
            severity, sentence = "blocks", "process, host lacks it"
        else:
            severity = "blocks" if policy.asks("strict") else "note"
            sentence = "process, host lacks init"
        yield finding_of(
            "HOST-MISSING",
            severity,
            say(sentence, what=_what(state, nr)),
            component=nr,
            snapshot=f"{state.bv:#x}",
            host=f"{have:#x}",
            fix=_drop(state, nr),
            call="" if process else None,
        )
    yield from (_told_process if process else _promised)(state, have, policy)


def _promised(state: State, have: int, policy: Policy) -> Iterator[Finding]:
    """Find what a guest's CPUID has, the host lacks, and the guest doesn't use."""
    for nr in bits((state.guest_cpuid_mask or 0) & ~have & ~state.bv & ~(state.xcr0 or 0)):
        yield finding_of(
            "HOST-MISSING",
            "blocks" if policy.asks("fpu") else "note",
            say("promised", name=name_of(nr)),
            component=nr,
            snapshot=f"{state.guest_cpuid_mask:#x}",
            host=f"{have:#x}",
            call="",
        )


def _told_process(state: State, have: int, policy: Policy) -> Iterator[Finding]:
    """Find what a process was told of by its first CPU and kernel, and the host lacks.

    CRIU's own comparison of the machines says it for its checkpoints (`xfast.judge.criu`).
    """
    told = (state.guest_cpuid_mask or 0) | (state.xcr0 or 0)
    usual = "note" if state.producer == "criu" else "risky"
    for nr in bits(told & ~have & ~(state.bv & state.live)):
        yield finding_of(
            "HOST-MISSING",
            "blocks" if policy.asks("fpu") else usual,
            say("process was told", name=name_of(nr)),
            component=nr,
            snapshot=f"{told:#x}",
            host=f"{have:#x}",
            call="",
        )


@judges("XCR0")
def _xcr0(state: State, target: Target, policy: Policy) -> Iterator[Finding]:
    if state.kind != "vm":
        return
    announced = (state.guest_cpuid_mask or 0) & XFEATURE_MASK_XTILE
    if announced not in (0, XFEATURE_MASK_XTILE):
        lacks = names_of(XFEATURE_MASK_XTILE & ~announced)
        yield finding_of(
            "XCR0",
            "risky",
            say("half of AMX", has=names_of(announced), lacks=lacks),
            component=names_of(announced),
            snapshot=f"{state.guest_cpuid_mask:#x}",
            host="both or none",
            ref=HALF_OF_AMX,
        )
    if target.refuses_cr4:
        bit, lacks = ("PKE", "PKU") if state.pkru_enabled else ("OSXSAVE", "XSAVE")
        yield finding_of(
            "XCR0",
            "blocks",
            say("cr4", bit=bit, lacks=lacks),
            component="pkru" if state.pkru_enabled else "",
            snapshot=f"CR4.{bit}",
            host=f"no {lacks}",
            ref="Linux arch/x86/kvm/x86.c kvm_is_valid_sregs(), __cr4_reserved_bits()",
            call="KVM_SET_SREGS",
        )
    xcr0 = state.xcr0
    if xcr0 is None or target.host is None:
        return
    known = state.guest_cpuid_mask
    for allowed, whose in ((target.host, "the host"), (known, "the guest's CPUID")):
        fault = "" if allowed is None else xcr0_problem(xcr0, allowed)
        if fault and allowed is not None:
            yield finding_of(
                "XCR0",
                "blocks",
                say("xcr0", xcr0=xcr0, whose=whose, allowed=allowed, fault=fault),
                component=names_of(xcr0 & ~allowed & ~X87) if xcr0 & ~allowed else "",
                snapshot=f"{xcr0:#x}",
                host=f"{allowed:#x}",
            )
            return


HALF_OF_AMX = (
    "Linux kernel commit 55cd57b596e8 (\"KVM: x86: Filter out XTILE_CFG if XTILE_DATA isn't "
    'permitted") (in v6.4)'
)


@judges("SIZE")
def _size(state: State, target: Target, policy: Policy) -> Iterator[Finding]:
    known = state.layout.mask if state.layout else 0
    for nr in bits(state.unreadable & known):
        yield finding_of(
            "SIZE",
            "blocks",
            say("cut", name=name_of(nr), size=state.size),
            component=nr,
            snapshot=f"{state.size}",
            host="more",
            fix="lossy",
        )
    if state.kind == "process":
        yield from _user_buffers(state, target, policy)
    elif target.need and target.room is None:
        yield finding_of(
            "SIZE",
            "note",
            say("room unknown", need=target.need),
            snapshot=f"{target.need}",
            host="unknown",
        )
    elif target.room is not None and target.room < target.need:
        yield finding_of(
            "SIZE",
            "blocks",
            say("no room", need=target.need, room=target.room),
            component=TILEDATA_NR if state.bv & TILEDATA else "",
            snapshot=f"{target.need}",
            host=f"{target.room}",
            fix="none" if state.live & TILEDATA else "safe",
        )


def _user_buffers(state: State, target: Target, policy: Policy) -> Iterator[Finding]:
    """A process keeps XSAVE buffers of the size its first CPU reported."""
    here = state.guest.size if state.guest else 0
    layout = state.layout
    if not here and layout is not None and state.xcr0 is not None:
        here = 0 if state.xcr0 & ~layout.mask else layout.standard_size(state.xcr0)
    if here and target.buffer is not None and target.buffer > here:
        yield finding_of(
            "SIZE",
            "blocks" if policy.asks("strict") else "risky",
            say("buffers", here=here, there=target.buffer),
            snapshot=f"{here}",
            host=f"{target.buffer}",
        )


@judges("LAYOUT")
def _layout(state: State, target: Target, policy: Policy) -> Iterator[Finding]:
    if not state.extended:
        return
    here, there = state.layout, target.layout
    if here is None or there is None:
        whose, note = ("area", state.layout_note) if here is None else ("host", "no CPUID leaf 0xD")
        yield finding_of(
            "LAYOUT",
            "risky",
            say("layout unknown", whose=whose, note=note),
            snapshot="unknown" if here is None else state.layout_name,
            host="unknown",
            open=True,
        )
        return
    wanted = state.extended & (target.host or state.extended)
    hidden = wanted & state.unplaced
    if hidden:
        yield finding_of(
            "LAYOUT",
            "risky",
            say("place unknown", names=names_of(hidden), note=state.layout_note),
            component=names_of(hidden),
            snapshot="unknown",
            host=target.layout_name,
            open=True,
        )
    if state.kind == "process":
        return
    unplaced = state.extended & (target.host or 0) & ~there.mask
    if unplaced:
        yield finding_of(
            "LAYOUT",
            "risky",
            say("place unknown on the host", names=names_of(unplaced)),
            component=names_of(unplaced),
            snapshot=state.layout_name,
            host="unknown",
            open=True,
        )
    for nr in bits(here.moved(there, wanted)):
        ours, theirs = here.slot(nr), there.slot(nr)
        places = {"here": ours.offset, "there": theirs.offset}
        yield finding_of(
            "LAYOUT",
            "blocks",
            say("moved", what=_what(state, nr), **places),
            component=nr,
            snapshot=f"{ours.offset}+{ours.size}",
            host=f"{theirs.offset}+{theirs.size}",
            # The file's own CPUID would contradict an area that was moved.
            fix="none" if state.layout_source == "cpuid" else "safe",
        )


@judges("FORMAT")
def _format(state: State, target: Target, policy: Policy) -> Iterator[Finding]:
    if state.kind != "vm" or state.portable:
        return
    if state.xcomp:
        every, some = target.xcomp
        sentence = "xcomp" if every else "xcomp, doubtful"
        if not some:
            sentence = "xcomp, misread" if state.compacted else "xcomp, ignored"
        compacted = " (compacted format)" if state.compacted else ""
        yield finding_of(
            "FORMAT",
            "blocks" if every or state.compacted else "risky",
            say(sentence, xcomp=state.xcomp, compacted=compacted),
            snapshot=f"{state.xcomp:#x}",
            host="0x0",
            fix="safe" if state.layout is not None or not state.compacted else "none",
            open=some and not every,
            call=None if every else "",
        )
    if state.reserved:
        every, some = target.reserved
        severity, sentence = (
            ("blocks", "reserved")
            if every
            else ("risky", "reserved, doubtful")
            if some
            else ("note", "reserved, ignored")
        )
        yield finding_of(
            "FORMAT",
            severity,
            say(sentence),
            snapshot="not zero",
            host="zero",
            fix="safe",
            open=some and not every,
        )


@judges("INUSE")
def _inuse(state: State, target: Target, policy: Policy) -> Iterator[Finding]:
    mpx = state.stale & XFEATURE_MASK_MPX  # APX has the place of MPX: the bytes count once
    for nr in bits(state.stale & ~(APX if mpx else 0)):
        yield finding_of(
            "INUSE",
            "risky" if 1 << nr & XFEATURE_MASK_FPSSE else "note",
            say("stale", name=name_of(nr)),
            component=nr,
            snapshot=f"{state.bv:#x}",
            host="init",
        )
    if state.fpu_differs:
        yield finding_of(
            "INUSE",
            "note",
            say("two copies", fields=", ".join(state.fpu_differs)),
            snapshot="xsave",
            host="fpu",
            ref="Cloud Hypervisor hypervisor/src/kvm/mod.rs KvmVcpu::set_state(); Linux "
            "arch/x86/kvm/x86.c kvm_arch_vcpu_ioctl_set_fpu()",
        )
    if state.layout is None:
        return
    idle = state.bv & ~state.live & ~state.unreadable & ~state.leaked & ~XFEATURE_MASK_FPSSE
    for nr in bits(idle & (target.host or 0)):
        default = nr == PKRU_NR and state.pkru
        holds = f"Linux's default {state.pkru:#x}" if default else "its init value"
        yield finding_of(
            "INUSE",
            "note",
            say("idle", name=name_of(nr), holds=holds),
            component=nr,
            snapshot=f"{state.bv:#x}",
            host=f"{target.host:#x}",
            fix="safe",
        )


@judges("XFD")
def _xfd(state: State, target: Target, policy: Policy) -> Iterator[Finding]:
    every, some = target.xfd
    severity, sentence, kernel = (
        ("blocks", "xfd panics", "unfixed")
        if every
        else ("risky", "xfd, doubtful", "unfixed")
        if some
        else ("note", "xfd cleared", "fixed")
    )
    for nr in bits(state.bv & state.xfd):
        yield finding_of(
            "XFD",
            severity,
            say(sentence, what=_what(state, nr)),
            component=nr,
            snapshot=f"{state.xfd:#x}",
            host="unknown" if target.release is None else kernel,
            fix=_drop(state, nr),
            open=some and not every,
        )


@judges("XSS")
def _xss(state: State, target: Target, policy: Policy) -> Iterator[Finding]:
    supervisor = state.bv & SUPERVISOR_MASK
    if supervisor and state.kind == "vm" and not state.compacted:
        yield finding_of(
            "XSS",
            "blocks",
            say("supervisor", names=names_of(supervisor)),
            component=names_of(supervisor),
            snapshot=f"{state.bv:#x}",
            host="0x0",
            fix="lossy",
        )
    missing = state.xss & ~target.xss if state.xss and target.xss is not None else 0
    if missing:
        yield finding_of(
            "XSS",
            "blocks",
            say("xss", names=names_of(missing)),
            component=names_of(missing),
            snapshot=f"{state.xss:#x}",
            host=f"{target.xss:#x}",
            call="KVM_SET_MSRS" if state.kind == "vm" else "",
        )
    if state.guest is not None and state.guest.xss and state.xss is None and state.has_msrs:
        yield finding_of(
            "XSS",
            "risky",
            say("xss absent", names=names_of(state.guest.xss)),
            snapshot="absent",
            host=f"{state.guest.xss:#x}",
        )


@judges("PERM")
def _perm(state: State, target: Target, policy: Policy) -> Iterator[Finding]:
    if not target.asks:
        return
    granted = target.granted is None or target.granted & TILEDATA
    yield finding_of(
        "PERM",
        "note" if granted else "blocks",
        say("ask for tiles" if granted else "no tiles"),
        component=TILEDATA_NR,
        snapshot=f"{target.asks:#x}",
        host="unknown" if target.granted is None else f"{target.granted:#x}",
    )


@judges("KERNEL")
def _kernel(state: State, target: Target, policy: Policy) -> Iterator[Finding]:
    if state.kind != "vm" or target.host is None:
        return
    others = ~state.leaked & target.host & ~SUPERVISOR_MASK
    for nr in bits(target.refused & others):
        yield finding_of(
            "KERNEL",
            "blocks",
            say("kernel refuses", what=_what(state, nr)),
            component=nr,
            snapshot=f"{state.bv:#x}",
            host=f"{state.bv & ~target.refused:#x}",
            fix=_drop(state, nr),
            ref=BEHAVIOURS["user-xfeatures-guest"].ref,
        )
    for nr in bits(target.doubtful & others):
        legacy = 1 << nr & XFEATURE_MASK_FPSSE
        until = "a1020a25e697 (6.0)" if legacy else "8647c52e9504 (6.6)"
        yield finding_of(
            "KERNEL",
            "note" if target.release is None else "risky",
            say("kernel may refuse", name=name_of(nr), until=until),
            component=nr,
            snapshot=f"{state.bv:#x}",
            host="unknown" if target.release is None else target.release,
            fix=_drop(state, nr),
            ref=BEHAVIOURS["user-xfeatures-guest"].ref,
            open=True,
        )


@judges("MXCSR")
def _mxcsr(state: State, target: Target, policy: Policy) -> Iterator[Finding]:
    every, some = target.mxcsr
    if state.kind != "vm" or not some or target.mxcsr_mask is None:
        return
    foreign = state.mxcsr & ~target.mxcsr_mask
    mode = " (AMD's misaligned SSE mode)" if foreign == MISALIGNED_SSE else ""
    yield finding_of(
        "MXCSR",
        "blocks" if every else "risky",
        say("mxcsr" if every else "mxcsr, doubtful", mxcsr=state.mxcsr, foreign=foreign, mode=mode),
        component=SSE_NR,
        snapshot=f"{state.mxcsr:#x}",
        host=f"{target.mxcsr_mask:#x}",
    )


@judges("ISA")
def _isa(state: State, target: Target, policy: Policy) -> Iterator[Finding]:
    missing = target.missing
    if missing:
        more = f" and {len(missing) - 8} more" if missing[8:] else ""
        sentence = "process instructions" if state.kind == "process" else "instructions"
        yield finding_of(
            "ISA",
            "blocks" if policy.asks("isa") else "note",
            say(sentence, names=", ".join(missing[:8]) + more),
            component=" ".join(missing),
            snapshot=f"{len(missing)} features",
            host="absent",
        )


def _partial(subject: Subject) -> Iterator[Finding]:
    for doubt in subject.doubts:
        yield finding_of(
            "PARTIAL",
            "risky",
            say("partial", doubt=doubt),
            snapshot="unknown",
            host="any",
            open=True,
        )


WHOLE: dict[str, Callable[[Subject], Iterator[Finding]]] = {"PARTIAL": _partial}
"""{rule code: its function}, of rules that look at the snapshot as a whole."""


def require_all() -> None:
    """Raise ImportError if a rule has no function."""
    if missing := RULES.keys() - FUNCTIONS.keys() - WHOLE.keys():
        raise ImportError(f"rules without a function: {', '.join(sorted(missing))}")


require_all()
