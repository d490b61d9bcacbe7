"""Snapshot x hosts -> findings and a verdict. A pure function: no file, no ioctl, no clock.

What a snapshot requires comes from its own state: what is live, the guest's XCR0, and the
guest's CPUID where the file has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from xfast.hosts.model import Host
from xfast.judge.criu import criu_findings
from xfast.judge.findings import FUNCTIONS
from xfast.judge.rules import FIXES, SEVERITIES
from xfast.judge.subject import State, state_of, target_of
from xfast.judge.verdict import Finding, Policy, Verdict
from xfast.snapshots.model import Snapshot, Vcpu
from xfast.xsave.cpuid import Cpuid
from xfast.xsave.layout import Layout


def findings_of(state: State, host: Host, policy: Policy) -> Iterator[Finding]:
    """Yield what every rule has to say of one vCPU on one host."""
    target = target_of(state, host)
    for rule in FUNCTIONS.values():
        yield from heed(policy, rule(state, host, target, policy))


def heed(policy: Policy, findings: Iterable[Finding]) -> Iterator[Finding]:
    """Yield the findings, those of ignored rules as notes."""
    for finding in findings:
        if finding.code in policy.ignore:
            finding = replace(finding, severity="note", open=False)
        yield finding


def _same(state: State, host: Host) -> bool:
    """Whether the host gives the guest exactly what the snapshot's guest had."""
    asked = state.guest_cpuid_mask if state.guest_cpuid_mask is not None else state.vcpu.xcr0
    have = host.kvm_xcr0 if state.kind == "vm" else host.xcr0
    return asked is not None and asked == have


def verdict_of(
    path: str, host: Host, states: list[State], policy: Policy, more: Iterable[Finding] = ()
) -> Verdict:
    """Return the verdict for one host, from the states of all vCPUs and what `more` there is."""
    findings = [f for state in states for f in findings_of(state, host, policy)]
    return sum_up(path, host, states, [*findings, *heed(policy, more)])


def sum_up(path: str, host: Host, states: list[State], findings: list[Finding]) -> Verdict:
    """Return the verdict that findings amount to."""
    findings = sorted(findings, key=lambda f: -SEVERITIES.index(f.severity))
    blocking = [f for f in findings if f.severity == "blocks"]
    if blocking:
        word = "incompatible"
    elif any(f.open for f in findings):
        word = "unknown"
    else:
        word = "identical" if all(_same(state, host) for state in states) else "superset"
    fixable = "none"
    fixes = [f.fix for f in blocking] or [f.fix for f in findings if f.severity == "risky"]
    if fixes:
        fixable = max(fixes, key=FIXES.index)
    return Verdict(path, host.name, word, fixable, tuple(findings))


def check(
    subject: Any,
    hosts: Host | Iterable[Host],
    *,
    policy: Policy | str = "xstate",
    layout: Layout | None = None,
    xcr0: int | None = None,
    cpuid: Cpuid | None = None,
) -> list[Verdict]:
    """Judge which hosts can take a snapshot, and why the others can't.

    Parameters
    ----------
    subject : Snapshot, Vcpu, (size,) uint8 or bytes
        A snapshot from `xfast.read`, one vCPU, or one bare XSAVE area.
    hosts : Host or iterable of Host
    policy : Policy or str
        Or just its level.
    layout, xcr0, cpuid
        For a bare area: its Layout, the guest's XCR0 and the guest's Cpuid, as far as known.

    Returns
    -------
    list of Verdict
        One for each host, in the hosts' order.

    Raises
    ------
    ValueError
        If a bare area is shorter than 576 bytes or no bytes at all.
    PolicyError
        If the level does not exist.
    """
    rules = policy if isinstance(policy, Policy) else Policy(policy)
    if isinstance(subject, Snapshot):
        snapshot = subject
    else:
        vcpu = subject
        if not isinstance(subject, Vcpu):
            area = subject if isinstance(subject, np.ndarray) else np.frombuffer(subject, np.uint8)
            source = "unknown" if layout is None else "given"
            vcpu = Vcpu(0, area, layout, source, xcr0=xcr0, cpuid=cpuid)
        snapshot = Snapshot("", "area", "vm", "", [vcpu])
    states = [state_of(vcpu, snapshot.kind, snapshot.producer) for vcpu in snapshot.vcpus]
    pool = [hosts] if isinstance(hosts, Host) else hosts
    return [
        verdict_of(snapshot.name, host, states, rules, criu_findings(states, host, rules))
        for host in pool
    ]
