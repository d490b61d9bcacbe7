"""What to do next about a judgement: the fact that is missing, the fix, or hosts that would do.

Nothing is advised that can't help: no dropping of data where something else blocks as well, no
kernel's switches for a process.
"""

from __future__ import annotations

from collections.abc import Iterator

from xfast.judge.rules import RULES
from xfast.judge.subject import Subject
from xfast.judge.target import Facts
from xfast.judge.verdict import Finding, Policy, Verdict

PKRU_STAYS = {
    "vm": "A KVM_SET_XSAVE without the PKRU bit leaves the vCPU's PKRU as it was: it does not "
    "reset it.",
    "process": "Where the PKRU bit is clear, sigreturn and ptrace set PKRU to 0.",
}
KERNEL_UNKNOWN = (
    "Name the host's kernel (--host NAME@RELEASE), or probe it there with xfast host dump: that "
    "settles it."
)
GUEST_UNKNOWN = (
    "The guest's CPUID settles it: keep it beside a bare area (NAME.cpuid2), or judge the "
    "libvirt image, which has the CPU's definition."
)
HOST_UNKNOWN = "Describe the host with its CPUID leaf 0xD (xfast host dump on it): that settles it."
LAYOUT_UNKNOWN = "Name the layout of the area (--layout NAME): that settles it."

STATES_LIMIT = 64
"""In so many states, at most, are the vCPUs for which other hosts are looked for."""

PROCESS: dict[str, str] = {
    "HOST-MISSING": "Restore the process on a host that has {names}, or start it anew on this one.",
    "SIZE": "Restore the process on a host whose XSAVE area is no larger, or start it anew there.",
    "ISA": "Restore the process on a host that has these instructions, or start it anew there.",
}
"""What to do about a finding of a process, where the rule's own advice is for VMs."""


def next_steps(verdict: Verdict) -> tuple[str, ...]:
    """Return what to do next, a sentence each; nothing where nothing speaks against a restore."""
    judgement, asked = verdict.judgement, verdict.judgement.asked
    kind = asked[0].kind if asked else "vm"
    blocking = [f for f in judgement.findings if f.severity == "blocks"]
    matters = blocking or [f for f in judgement.findings if f.open]
    matters = matters or [f for f in judgement.findings if f.severity == "risky"]
    if not matters:
        return ()
    if blocking:
        steps = list(_about_blocking(blocking, judgement.fixable, kind))
    else:
        facts = asked[1] if asked else None
        steps = [_about(finding, kind, facts) for finding in matters]
    if judgement.fixable != "safe" and asked and (blocking or judgement.verdict != "unknown"):
        steps.append(_hosts(*asked))
    return tuple(dict.fromkeys(filter(None, steps)))


def _about_blocking(findings: list[Finding], fixable: str, kind: str) -> Iterator[str]:
    drops = [f.component for f in findings if RULES[f.code].mends in ("drop", "trim")]
    if fixable == "safe":
        yield "xfast fix mends it, and nothing is lost."
    elif fixable == "lossy":
        live = dict.fromkeys(f.component for f in findings if f.fix == "lossy")
        named = " ".join(f"--drop {name}" for name in live)
        yield f"xfast fix {named} --even-if-live gives the data up; nothing else blocks."
    else:
        yield "No edit of the file helps: choose another host."
        return
    if "pkru" in drops:
        yield PKRU_STAYS[kind]


def _about(finding: Finding, kind: str, facts: Facts | None) -> str:
    """Say what would settle an open finding, or what to do about a risky one."""
    code = finding.code
    if not finding.open:
        text = PROCESS.get(code, "") if kind == "process" else ""
        return text.format(names=finding.component) if text else RULES[code].next
    if code == "HOST-MISSING":
        return HOST_UNKNOWN
    if code == "LAYOUT":
        return LAYOUT_UNKNOWN if finding.snapshot_value == "unknown" else HOST_UNKNOWN
    if code == "PARTIAL" or kind == "process":
        return RULES[code].next
    known = facts is not None and facts.host.kernel is not None
    return GUEST_UNKNOWN if known else KERNEL_UNKNOWN


def _hosts(subject: Subject, facts: Facts, policy: Policy) -> str:
    """Say which hosts of the catalogue would do, under the kernel that was asked about.

    Nothing is said where the vCPUs are in more states than those of a machine ever are.
    """
    from xfast.hosts.catalogue import catalogue
    from xfast.judge.judgement import facts_of, suits

    if len({part.state for part in subject.parts}) > STATES_LIMIT:
        return ""
    kernel = facts.host.kernel
    good = [
        host.name
        for host in catalogue().values()
        if suits(subject, facts_of(host.with_kernel(kernel) if kernel else host), policy)
    ]
    if not good:
        return ""
    more = f" and {len(good) - 6} more" if good[6:] else ""
    return f"Hosts of the catalogue that would do: {', '.join(good[:6])}{more}."
