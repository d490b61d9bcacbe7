"""The slow judge: every vCPU on every host by itself, nothing shared, nothing remembered."""

from collections import Counter

from xfast.judge.criu import criu_findings
from xfast.judge.findings import FUNCTIONS, WHOLE
from xfast.judge.rules import FIXES, SEVERITIES
from xfast.judge.subject import State, subject_of
from xfast.judge.target import Facts, target_of
from xfast.judge.verdict import Policy
from xfast.xsave.area import ALL, classify, headers
from xfast.xsave.cpuid import RUNTIME_FEATURES
from xfast.xsave.features import PKRU
from xfast.xsave.layout import Layout


def state_by_hand(vcpu, kind, producer) -> State:
    """Work a State out from the answers of `headers` and `classify`."""
    layout = vcpu.layout or Layout(())
    head, found = headers(vcpu.area), classify(vcpu.area, layout)
    pkru = None
    if head.xstate_bv & layout.mask & PKRU & ~found.unreadable:
        place = layout.by_nr[9].offset
        if head.xcomp_bv >> 63:
            place = layout.compacted_offsets(head.xcomp_bv & layout.mask)[9]
        pkru = int.from_bytes(vcpu.area[place : place + 4].tobytes(), "little")
    guest = None
    if vcpu.cpuid is not None:
        row = vcpu.cpuid.find(0xD)
        features = vcpu.cpuid.features - RUNTIME_FEATURES
        guest = (vcpu.cpuid.xcr0, vcpu.cpuid.xss, row.ebx if row else 0, features)
    return State(
        kind=kind,
        producer=producer,
        layout=vcpu.layout,
        layout_name=layout.name,
        layout_source=vcpu.layout_source,
        layout_note=vcpu.layout_note,
        portable=vcpu.portable,
        xcr0=vcpu.xcr0,
        xss=vcpu.xss,
        xfd=vcpu.xfd or 0,
        guest=guest,
        guest_mask=vcpu.guest_mask,
        pkru_enabled=vcpu.pkru_enabled,
        has_msrs=vcpu.msrs is not None,
        fpu_differs=vcpu.fpu_differs,
        size=len(vcpu.area),
        bv=head.xstate_bv,
        xcomp=head.xcomp_bv,
        reserved=head.reserved,
        mxcsr=head.mxcsr,
        live=found.live | head.xstate_bv & ALL & ~layout.mask,
        stale=found.stale,
        unreadable=found.unreadable & ALL,
        pkru=pkru,
    )


def judge_one_by_one(snapshot, host, level="xstate"):
    """Return the verdict, what can be fixed, and the findings, a vCPU after the other."""
    from xfast.judge.subject import state_of

    policy = Policy(level)
    findings, same = [], True
    for vcpu in snapshot.vcpus:
        state = state_of(vcpu, snapshot.kind, snapshot.producer)
        assert state == state_by_hand(vcpu, snapshot.kind, snapshot.producer)
        target = target_of(state, Facts(host))
        same &= target.same
        for rule in FUNCTIONS.values():
            findings += [f.of(vcpu.index) for f in rule(state, target, policy)]
    subject = subject_of(snapshot)
    findings += criu_findings(subject, host, policy)
    findings += [f for rule in WHOLE.values() for f in rule(subject)]
    findings.sort(key=lambda f: -SEVERITIES.index(f.severity))
    blocking = [f for f in findings if f.severity == "blocks"]
    word = "identical" if same else "superset"
    if blocking:
        word = "incompatible"
    elif any(f.open for f in findings):
        word = "unknown"
    fixes = [f.fix for f in blocking] or [f.fix for f in findings if f.severity == "risky"]
    return word, max(fixes, key=FIXES.index, default="none"), tuple(findings)


def together(findings):
    """Return the findings of a stack as its verdict has them: alike ones as one, with a count."""
    counts = Counter(f.of(0) for f in findings)
    first = {}
    for finding in findings:
        key = finding.of(0)
        first[key] = min(first.get(key, finding.vcpu), finding.vcpu)
    return {key.of(first[key], count) for key, count in counts.items()}
