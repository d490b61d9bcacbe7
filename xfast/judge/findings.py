"""The rules at work: one function a rule code, which looks at one vCPU and one host.

A function yields a Finding for each thing that speaks against the restore, or that the reader
should know. What kernels do comes from `xfast.kernels.behaviour`, by way of `xfast.judge.subject`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from xfast.hosts.model import Host
from xfast.judge.rules import RULES
from xfast.judge.subject import State, Target, kernels_of, leaked, refuses
from xfast.judge.verdict import Finding, Policy
from xfast.kernels.behaviour import BEHAVIOURS, loaded, needs_permission
from xfast.kernels.guest import announced_problem, xcr0_problem
from xfast.xsave.cpuid import RUNTIME_FEATURES
from xfast.xsave.features import (
    BY_NAME,
    KVM_XSAVE_SIZE,
    SUPERVISOR_MASK,
    TILEDATA,
    X87,
    XCOMP_BV_COMPACTED,
    XFEATURE_MASK_FPSSE,
    XFEATURE_MASK_MPX,
    bits,
    name_of,
    names_of,
)
from xfast.xsave.layout import Layout

RuleFunction = Callable[[State, Host, Target, Policy], Iterator[Finding]]

FUNCTIONS: dict[str, RuleFunction] = {}
"""{rule code: its function}, each there once: a rule without one can't be imported."""


def judges(code: str) -> Callable[[RuleFunction], RuleFunction]:
    """Register the function of a rule.

    Raises
    ------
    ImportError
        If there is no such rule, or it has a function already.
    """
    if code not in RULES or code in FUNCTIONS:
        problem = "has two functions" if code in RULES else "is not in the rule table"
        raise ImportError(f"rule {code} {problem}")

    def register(function: RuleFunction) -> RuleFunction:
        FUNCTIONS[code] = function
        return function

    return register


def finding_of(
    state: State,
    code: str,
    severity: str,
    values: tuple[str, str],
    why: str,
    *,
    component: int | str = "",
    fix: str = "none",
    ref: str = "",
    open: bool = False,
) -> Finding:
    """Build a finding; `component` is a name or a number, and `ref` the rule's where empty."""
    name = name_of(component) if isinstance(component, int) else component
    return Finding(
        code, name, state.vcpu.index, severity, *values, fix, why, ref or RULES[code].ref, open
    )


def _drop(state: State, nr: int) -> str:
    return "lossy" if state.live >> nr & 1 else "safe"


def _data(state: State, nr: int) -> str:
    """Say what a present component holds, in a word or two."""
    if nr == 9 and state.pkru is not None:
        return f"value {state.pkru:#x}"
    if state.unplaced >> nr & 1:
        return "value unknown"
    if state.unreadable >> nr & 1:
        return "data not in the area"
    return "live" if state.live >> nr & 1 else "init value"


@judges("LEAK")
def _leak(state: State, host: Host, target: Target, policy: Policy) -> Iterator[Finding]:
    for nr in bits(leaked(state)):
        bit = 1 << nr
        taken = "unknown" if target.host is None else f"{target.accepts & target.host:#x}"
        if state.may is None:
            whose = "bit 9 with value 0 is the signature of Linux 5.16's leak; "
        else:
            whose = f"the guest's {state.may_from} allows {state.may:#x} only; "
        if nr == 9 and state.pkru == 0 and state.may is not None:
            whose += "bit 9 with value 0, Linux 5.16's leak; "
        what = f"{name_of(nr)} ({_data(state, nr)}) is in XSTATE_BV, and {whose}"
        fix, ref, undecided = _drop(state, nr), "", False
        if target.refused & bit:
            severity = "blocks"
            here = target.host is not None and target.host & bit
            by = "kernels with ad856280ddea refuse it" if here else "the host lacks it"
            what += f"{by}: KVM_SET_XSAVE fails with EINVAL"
            if state.producer == "qemu-kvm":
                what += (
                    "; QEMU 7.2 reports the restore as done and loses x87, SSE, AVX and XCR0, "
                    "later QEMU exits"
                )
        elif target.doubtful & bit:
            severity, undecided = "risky", True
            what += (
                "kernels from ad856280ddea (5.17) until 8647c52e9504 (6.6) refuse it with EINVAL "
                "unless the guest's CPUID has it, others accept it: "
                + ("this host's kernel" if host.kernel is None else "the guest's CPUID")
                + " is not known"
            )
        elif target.kept & bit:
            severity, ref = "risky", BEHAVIOURS["fpu-core-uabi"].ref
            what += "this kernel accepts it and hands it on with the next KVM_GET_XSAVE"
        else:
            severity, ref = "note", BEHAVIOURS["get-trims"].ref
            what += "this kernel accepts it and drops it at the next KVM_GET_XSAVE"
            what += (
                "" if state.guest_cpuid_mask is not None else ", unless the guest's CPUID has it"
            )
        yield finding_of(
            state,
            "LEAK",
            severity,
            (f"{state.bv:#x}", taken),
            what,
            component=nr,
            fix=fix,
            ref=ref,
            open=undecided,
        )


@judges("HOST-MISSING")
def _host_missing(state: State, host: Host, target: Target, policy: Policy) -> Iterator[Finding]:
    if target.host is None:
        yield finding_of(
            state,
            "HOST-MISSING",
            "risky",
            (f"{state.bv:#x}", "unknown"),
            "which components this host can give is not known; describe it with its CPUID leaf 0xD",
            open=True,
        )
        return
    have, values = target.host, f"{target.host:#x}"
    for nr in bits(state.bv & ~have & ~leaked(state)):
        default = state.kind == "process" and not state.live >> nr & 1
        yield finding_of(
            state,
            "HOST-MISSING",
            "note" if default and not policy.asks("strict") else "blocks",
            (f"{state.bv:#x}", values),
            f"{name_of(nr)} ({_data(state, nr)}) in the area, and not on the host"
            + ("" if state.kind == "process" else ": KVM_SET_XSAVE fails with EINVAL"),
            component=nr,
            fix=_drop(state, nr),
        )
    promised = (state.guest_cpuid_mask or 0) & ~have & ~state.bv & ~(state.vcpu.xcr0 or 0)
    for nr in bits(promised):
        yield finding_of(
            state,
            "HOST-MISSING",
            "blocks" if policy.asks("fpu") else "note",
            (f"{state.guest_cpuid_mask:#x}", values),
            f"the guest's CPUID promises {name_of(nr)}, which the host lacks; it is not in use",
            component=nr,
        )


@judges("XCR0")
def _xcr0(state: State, host: Host, target: Target, policy: Policy) -> Iterator[Finding]:
    xcr0 = state.vcpu.xcr0
    if state.kind != "vm" or xcr0 is None or target.host is None:
        return
    known = state.guest_cpuid_mask
    for supported, whose in ((target.host, "the host"), (known, "the guest's CPUID")):
        fault = "" if supported is None else xcr0_problem(xcr0, supported)
        if fault and supported is not None:
            yield finding_of(
                state,
                "XCR0",
                "blocks",
                (f"{xcr0:#x}", f"{supported:#x}"),
                f"the guest's XCR0 is {xcr0:#x} and {whose} allows {supported:#x}: {fault}; "
                "KVM_SET_XCRS fails with EINVAL",
                component=names_of(xcr0 & ~supported & ~X87) if xcr0 & ~supported else "",
            )
            return
    fault = announced_problem(known or 0)
    if fault and known is not None:
        yield finding_of(
            state,
            "XCR0",
            "risky",
            (f"{known:#x}", f"{target.host or 0:#x}"),
            f"the guest's CPUID announces {known:#x}, and a guest that enables all of it gets #GP "
            f"at XSETBV: {fault}",
            ref=BEHAVIOURS["xtilecfg-with-xtiledata"].ref,
        )


@judges("SIZE")
def _size(state: State, host: Host, target: Target, policy: Policy) -> Iterator[Finding]:
    size = len(state.vcpu.area)
    known = state.vcpu.layout.mask if state.vcpu.layout else 0
    for nr in bits(state.unreadable & known):
        yield finding_of(
            state,
            "SIZE",
            "blocks",
            (f"{size}", "more"),
            f"XSTATE_BV names {name_of(nr)}, whose data would lie past the area's {size} bytes",
            component=nr,
            fix="lossy",
        )
    if state.kind == "process":
        yield from _user_buffers(state, host, policy)
        return
    layout = host.layout if state.vcpu.portable else state.vcpu.layout
    need = layout.standard_size(state.bv & layout.user_mask) if layout else 0
    if need <= KVM_XSAVE_SIZE:
        return
    have = host.xsave2_size
    if have is None and host.kernel is not None:
        have = KVM_XSAVE_SIZE if "xsave2" not in host.kernel else None
    trim = "safe" if not state.live & TILEDATA else "none"
    if have is None:
        yield finding_of(
            state,
            "SIZE",
            "note",
            (f"{need}", "unknown"),
            f"the area needs {need} bytes: KVM_CAP_XSAVE2 of the host must report at least that",
        )
    elif have < need:
        yield finding_of(
            state,
            "SIZE",
            "blocks",
            (f"{need}", f"{have}"),
            f"the area needs {need} bytes and the host's KVM_CAP_XSAVE2 reports {have}",
            component=18 if state.bv & TILEDATA else "",
            fix=trim,
        )


def _user_buffers(state: State, host: Host, policy: Policy) -> Iterator[Finding]:
    """A process keeps XSAVE buffers of the size its first CPU reported."""
    vcpu = state.vcpu
    told = vcpu.cpuid.find(0xD) if vcpu.cpuid else None
    here = told.ebx if told else 0
    known = vcpu.layout or Layout(())
    if not told and vcpu.xcr0 is not None and not vcpu.xcr0 & ~known.mask:
        here = known.standard_size(vcpu.xcr0)
    if not here or host.layout is None or host.xcr0 is None:
        return
    there = host.layout.standard_size(host.xcr0)
    if there > here:
        yield finding_of(
            state,
            "SIZE",
            "blocks" if policy.asks("strict") else "risky",
            (f"{here}", f"{there}"),
            f"the process was told of XSAVE areas of {here} bytes, the target writes {there}: "
            "buffers that it allocated are too small",
        )


@judges("LAYOUT")
def _layout(state: State, host: Host, target: Target, policy: Policy) -> Iterator[Finding]:
    vcpu = state.vcpu
    extended = state.bv & ~XFEATURE_MASK_FPSSE & ~leaked(state)
    if vcpu.portable or not extended:
        return
    if vcpu.layout is None or host.layout is None:
        whose = "area" if vcpu.layout is None else "host"
        why = vcpu.layout_note if vcpu.layout is None else "no CPUID leaf 0xD"
        yield finding_of(
            state,
            "LAYOUT",
            "risky",
            ("unknown" if vcpu.layout is None else vcpu.layout.name, "unknown"),
            f"the layout of the {whose} is not known ({why}); --layout names it",
            open=True,
        )
        return
    hidden = extended & (target.host or extended) & state.unplaced
    if hidden:
        yield finding_of(
            state,
            "LAYOUT",
            "risky",
            ("unknown", host.layout.name),
            f"where {names_of(hidden)} lies in the area is not known ({vcpu.layout_note}); "
            "--layout names it",
            component=names_of(hidden),
            open=True,
        )
    unplaced = extended & (target.host or 0) & ~host.layout.mask
    if unplaced and state.kind == "vm":
        yield finding_of(
            state,
            "LAYOUT",
            "risky",
            (vcpu.layout.name, "unknown"),
            f"the host's description does not say where {names_of(unplaced)} lies",
            component=names_of(unplaced),
            open=True,
        )
    moved = (
        0
        if state.kind == "process"
        else vcpu.layout.moved(host.layout, extended & (target.host or extended))
    )
    for nr in bits(moved):
        ours, theirs = vcpu.layout.slot(nr), host.layout.slot(nr)
        yield finding_of(
            state,
            "LAYOUT",
            "blocks",
            (f"{ours.offset}+{ours.size}", f"{theirs.offset}+{theirs.size}"),
            f"{name_of(nr)} ({_data(state, nr)}) lies at {ours.offset} and the target reads it at "
            f"{theirs.offset}: KVM_SET_XSAVE would take other bytes for it, without an error",
            component=nr,
            fix="none" if vcpu.layout_source == "cpuid" else "safe",  # the file would contradict it
        )


@judges("FORMAT")
def _format(state: State, host: Host, target: Target, policy: Policy) -> Iterator[Finding]:
    if state.kind != "vm" or state.vcpu.portable:
        return
    compacted = bool(state.xcomp & XCOMP_BV_COMPACTED)
    if state.xcomp:
        every, some = refuses(host, state, xcomp_bv=state.xcomp)
        yield finding_of(
            state,
            "FORMAT",
            "blocks" if every or compacted else "risky",
            (f"{state.xcomp:#x}", "0x0"),
            f"XCOMP_BV is {state.xcomp:#x}{' (compacted format)' if compacted else ''}; "
            "KVM_SET_XSAVE takes the standard format only, and kernels from 5.16 refuse others",
            fix="safe" if state.vcpu.layout is not None or not compacted else "none",
            open=some and not every,
        )
    if state.reserved:
        every, some = refuses(host, state, reserved=1)
        yield finding_of(
            state,
            "FORMAT",
            "blocks" if every else "risky" if some else "note",
            ("not zero", "zero"),
            "reserved bytes of the XSAVE header (528 to 575) are not zero; KVM_SET_XSAVE of "
            "kernels from 5.16 refuses that",
            fix="safe",
            open=some and not every,
        )


@judges("INUSE")
def _inuse(state: State, host: Host, target: Target, policy: Policy) -> Iterator[Finding]:
    mpx = state.stale & XFEATURE_MASK_MPX  # APX has the place of MPX: the bytes count once
    for nr in bits(state.stale & ~(BY_NAME["apx"].bit if mpx else 0)):
        legacy = 1 << nr & XFEATURE_MASK_FPSSE
        yield finding_of(
            state,
            "INUSE",
            "risky" if legacy else "note",
            (f"{state.bv:#x}", "init"),
            f"XSTATE_BV says that {name_of(nr)} has its init value, and other data lie there: "
            "whoever restores the area gives it the init value, and these bytes are lost",
            component=nr,
        )
    differs = state.vcpu.fpu_differs
    if differs:
        yield finding_of(
            state,
            "INUSE",
            "note",
            ("xsave", "fpu"),
            f"the file's fpu object and its XSAVE area differ in {', '.join(differs)}: a restore "
            "runs KVM_SET_FPU after KVM_SET_XSAVE, so fpu wins, but for MXCSR, which KVM_SET_FPU "
            "leaves as it is",
            ref="Cloud Hypervisor hypervisor/src/kvm/mod.rs KvmVcpu::set_state(); Linux "
            "arch/x86/kvm/x86.c kvm_arch_vcpu_ioctl_set_fpu()",
        )
    idle = state.bv & ~state.live & ~state.unreadable & ~leaked(state)
    for nr in bits(idle & ~XFEATURE_MASK_FPSSE):
        holds = f"Linux's default {state.pkru:#x}" if nr == 9 and state.pkru else "its init value"
        if state.vcpu.layout is not None and target.host is not None and target.host >> nr & 1:
            yield finding_of(
                state,
                "INUSE",
                "note",
                (f"{state.bv:#x}", f"{target.host:#x}"),
                f"{name_of(nr)} is in XSTATE_BV and holds {holds}: a host without it needs only "
                "the bit cleared",
                component=nr,
                fix="safe",
            )


@judges("XFD")
def _xfd(state: State, host: Host, target: Target, policy: Policy) -> Iterator[Finding]:
    xfd = state.vcpu.xfd or 0
    stays = [bool(loaded(kernel, xfd, xfd)) for kernel in kernels_of(host)]
    known = "unknown" if host.kernel is None else "unfixed" if any(stays) else "fixed"
    for nr in bits(state.bv & xfd):
        yield finding_of(
            state,
            "XFD",
            "blocks" if all(stays) else "risky" if any(stays) else "note",
            (f"{xfd:#x}", known),
            f"{name_of(nr)} ({_data(state, nr)}) is in XSTATE_BV while IA32_XFD disables it: "
            + (
                "the host's XRSTOR takes #NM, and a kernel without b45f72177594 panics"
                if any(stays)
                else "this kernel clears the bit"
            ),
            component=nr,
            fix=_drop(state, nr),
            open=any(stays) and not all(stays),
        )


@judges("XSS")
def _xss(state: State, host: Host, target: Target, policy: Policy) -> Iterator[Finding]:
    supervisor = state.bv & SUPERVISOR_MASK
    if supervisor and state.kind == "vm" and not state.xcomp & XCOMP_BV_COMPACTED:
        yield finding_of(
            state,
            "XSS",
            "blocks",
            (f"{state.bv:#x}", "0x0"),
            f"XSTATE_BV names supervisor state ({names_of(supervisor)}), which KVM_SET_XSAVE "
            "refuses",
            component=names_of(supervisor),
            fix="lossy",
        )
    xss = state.vcpu.xss
    missing = xss & ~host.xss if xss and host.xss is not None else 0
    if missing:
        yield finding_of(
            state,
            "XSS",
            "blocks",
            (f"{xss:#x}", f"{host.xss:#x}"),
            f"the guest's IA32_XSS has {names_of(missing)}, which the host can't give it",
            component=names_of(missing),
        )
    cpuid = state.vcpu.cpuid
    if cpuid is not None and cpuid.xss and xss is None and state.vcpu.msrs is not None:
        yield finding_of(
            state,
            "XSS",
            "risky",
            ("absent", f"{cpuid.xss:#x}"),
            f"the guest's CPUID has supervisor components ({names_of(cpuid.xss)}) and the file "
            "holds no IA32_XSS (MSR 0xda0): the guest's own XRSTORS may fault after the restore",
        )


@judges("PERM")
def _perm(state: State, host: Host, target: Target, policy: Policy) -> Iterator[Finding]:
    wants = (state.bv | (state.vcpu.xcr0 or 0) | (state.guest_cpuid_mask or 0)) & TILEDATA
    if state.kind != "vm" or not wants or target.host is None or not target.host & TILEDATA:
        return
    if host.kernel is not None and not needs_permission(host.kernel, wants):
        return  # such a kernel takes the CPUID as it is, and gives no guest the component
    granted = host.guest_permission
    if granted is None and host.kernel is not None and "guest-permission" not in host.kernel:
        granted = 0
    if granted is None or granted & TILEDATA:
        yield finding_of(
            state,
            "PERM",
            "note",
            (f"{wants:#x}", "unknown" if granted is None else f"{granted:#x}"),
            "the VMM must ask for AMX tile data with ARCH_REQ_XCOMP_GUEST_PERM first",
            component=18,
        )
    else:
        yield finding_of(
            state,
            "PERM",
            "blocks",
            (f"{wants:#x}", f"{granted:#x}"),
            "the guest has AMX tile data and the host's kernel can't grant them to guests: "
            "KVM_SET_CPUID2 fails with EPERM",
            component=18,
        )


@judges("KERNEL")
def _kernel(state: State, host: Host, target: Target, policy: Policy) -> Iterator[Finding]:
    if state.kind != "vm" or target.host is None:
        return
    others = ~leaked(state) & target.host & ~SUPERVISOR_MASK
    for nr in bits(target.refused & others):
        yield finding_of(
            state,
            "KERNEL",
            "blocks",
            (f"{state.bv:#x}", f"{state.bv & ~target.refused:#x}"),
            f"{name_of(nr)} ({_data(state, nr)}) is in the area, and this kernel's KVM_SET_XSAVE "
            "refuses what the guest's CPUID does not have",
            component=nr,
            fix=_drop(state, nr),
            ref=BEHAVIOURS["user-xfeatures-guest"].ref,
        )
    for nr in bits(target.doubtful & others):
        until = "a1020a25e697 (6.0)" if nr < 2 else "8647c52e9504 (6.6)"
        yield finding_of(
            state,
            "KERNEL",
            "note" if host.kernel is None else "risky",
            (f"{state.bv:#x}", host.kernel.release if host.kernel else "unknown"),
            f"{name_of(nr)}: kernels from ad856280ddea (5.17) until {until} refuse it where the "
            "guest's CPUID lacks it",
            component=nr,
            fix=_drop(state, nr),
            ref=BEHAVIOURS["user-xfeatures-guest"].ref,
            open=True,
        )


@judges("MXCSR")
def _mxcsr(state: State, host: Host, target: Target, policy: Policy) -> Iterator[Finding]:
    if state.kind != "vm" or host.mxcsr_mask is None or not state.mxcsr & ~host.mxcsr_mask:
        return
    every, some = refuses(host, state, mxcsr=state.mxcsr)
    foreign = state.mxcsr & ~host.mxcsr_mask
    if some:
        yield finding_of(
            state,
            "MXCSR",
            "blocks" if every else "risky",
            (f"{state.mxcsr:#x}", f"{host.mxcsr_mask:#x}"),
            f"MXCSR {state.mxcsr:#x} has bits {foreign:#x} outside the host's MXCSR_MASK"
            + (" (AMD's misaligned SSE mode)" if foreign == 1 << 17 else "")
            + ": KVM_SET_XSAVE fails with EINVAL",
            component=1,
        )


@judges("ISA")
def _isa(state: State, host: Host, target: Target, policy: Policy) -> Iterator[Finding]:
    if state.vcpu.cpuid is None or host.features is None:
        return
    missing = sorted(state.vcpu.cpuid.features - RUNTIME_FEATURES - host.features)
    if missing:
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if missing[8:] else "")
        yield finding_of(
            state,
            "ISA",
            "blocks" if policy.asks("isa") else "note",
            (f"{len(missing)} features", "absent"),
            f"the guest's CPUID has instructions that the host lacks: {shown}",
            component=" ".join(missing),
        )


def require_all() -> None:
    """Raise ImportError if a rule has no function."""
    if missing := RULES.keys() - FUNCTIONS.keys():
        raise ImportError(f"rules without a function: {', '.join(sorted(missing))}")


require_all()
