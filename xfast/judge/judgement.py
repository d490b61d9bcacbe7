"""Snapshot x hosts -> findings and a verdict. A pure function: no file, no ioctl, no clock.

What a snapshot requires comes from its own state: what is live, the guest's XCR0, and the
guest's CPUID where the file has it.

Whatever repeats is judged once. A snapshot becomes a Subject and a host becomes Facts, both by
value; a pair of them that was met before is one look-up, and hosts that would do the same with
a State share its findings. The caches forget the oldest when they are full; they never change
an answer, because findings see nothing but State, Target and Policy.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from xfast.engine.keys import same
from xfast.hosts.model import Host
from xfast.judge.findings import WHOLE
from xfast.judge.registry import FUNCTIONS
from xfast.judge.rules import CALLS, FIXES, SEVERITIES
from xfast.judge.subject import State, Subject, subject_of
from xfast.judge.target import Facts, Target, target_of
from xfast.judge.verdict import Failure, Finding, Judgement, Policy, Verdicts
from xfast.snapshots.model import Snapshot, Vcpu
from xfast.xsave.cpuid import Cpuid
from xfast.xsave.layout import Layout, layout_of

K = TypeVar("K")
V = TypeVar("V")


def findings_of(state: State, target: Target, policy: Policy) -> tuple[Finding, ...]:
    """Return what every rule has to say of a State on a Target; the findings are of no vCPU."""
    return tuple(
        _weighed(policy, finding)
        for rule in FUNCTIONS.values()
        for finding in rule(state, target, policy)
    )


def _weighed(policy: Policy, finding: Finding) -> Finding:
    """Return a finding, as a note if its rule is to be ignored."""
    if finding.code in policy.ignore:
        return replace(finding, severity="note", open=False)
    return finding


def _of_the_whole(subject: Subject, host: Host, policy: Policy) -> Iterator[Finding]:
    """Yield the findings that are of no single vCPU."""
    if subject.machine is not None:
        from xfast.judge.criu import criu_findings  # which only checkpoints need

        for finding in criu_findings(subject, host, policy):
            yield _weighed(policy, finding)
    for rule in WHOLE.values():
        for finding in rule(subject):
            yield _weighed(policy, finding)


def judge(subject: Subject, facts: Facts, policy: Policy) -> Judgement:
    """Judge one Subject on one host. All that `check` and a fix say comes from here."""
    targets = {part.state: _target_of(part.state, facts) for part in subject.parts}
    findings = [
        finding.of(vcpu, alike)
        for state, vcpu, alike in subject.parts
        for finding in _findings_of(state, targets[state], policy)
    ]
    if subject.stacked:
        findings = _merged(findings)
    findings += _of_the_whole(subject, facts.host, policy)
    verdict = conclude(findings, all(target.same for target in targets.values()))
    calls = (
        ([f.call for f in _findings_of(state, targets[state], policy) if f.call], state.xss or 0)
        for state, _, _ in subject.parts
    )
    return replace(verdict, failure=_first_failure(calls), asked=(subject, facts, policy))


def suits(subject: Subject, facts: Facts, policy: Policy) -> bool:
    """Tell whether nothing that `judge` would find blocks, leaves open or risks anything."""
    states = dict.fromkeys(part.state for part in subject.parts)
    found = chain.from_iterable(
        _findings_of(state, _target_of(state, facts), policy) for state in states
    )
    return not any(
        finding.open or finding.severity in ("blocks", "risky")
        for finding in chain(_of_the_whole(subject, facts.host, policy), found)
    )


def _first_failure(vcpus: Iterable[tuple[list[str], int]]) -> Failure | None:
    """Return what fails first, of each vCPU's calls that would fail; with its IA32_XSS."""
    for calls, xss in vcpus:
        if calls:
            call = min(calls, key=CALLS.index)
            return Failure(call, "EPERM" if call == "KVM_SET_CPUID2" else "EINVAL", xss)
    return None


def conclude(findings: list[Finding], same: bool) -> Judgement:
    """Draw the conclusion; `same`: the host gives the guest exactly what it had."""
    findings = sorted(findings, key=lambda f: -SEVERITIES.index(f.severity))
    blocking = [f for f in findings if f.severity == "blocks"]
    if blocking:
        word = "incompatible"
    elif any(f.open for f in findings):
        word = "unknown"
    else:
        word = "identical" if same else "superset"
    fixes = [f.fix for f in blocking] or [f.fix for f in findings if f.severity == "risky"]
    return Judgement(word, max(fixes, key=FIXES.index, default="none"), tuple(findings))


def _merged(findings: list[Finding]) -> list[Finding]:
    """Make one finding of those that differ only in the vCPUs that they are about."""
    found: dict[Finding, tuple[int, int]] = {}
    for finding in findings:
        key = finding.of(0)
        first, count = found.get(key, (finding.vcpu, 0))
        found[key] = min(first, finding.vcpu), count + finding.count
    return sorted((key.of(*vcpus) for key, vcpus in found.items()), key=lambda f: f.vcpu)


_policy = lru_cache(maxsize=64)(Policy)
_findings_of = lru_cache(maxsize=16_384)(findings_of)
_target_of = lru_cache(maxsize=16_384)(target_of)


class _Case:
    """A Subject that was met, and its judgements."""

    __slots__ = ("answers", "judged", "states", "subject")

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.states = tuple(dict.fromkeys(part.state for part in subject.parts))
        self.judged: dict[tuple[Any, Policy], Judgement] = {}
        self.answers: dict[_Pool, tuple[Judgement, ...]] = {}

    def answer(self, pool: _Pool) -> tuple[Judgement, ...]:
        """Return the judgement for each host of a pool."""
        found = self.answers.get(pool)
        if found is None:
            found = tuple([self._judge(facts, pool.policy) for facts in pool.facts])
            _remember(self.answers, pool, found, 64)
        return found

    def _judge(self, facts: Facts, policy: Policy) -> Judgement:
        subject = self.subject
        # CRIU compares whole machines: there, every host is a target of its own.
        targets: Any = facts
        if subject.machine is None:
            targets = tuple([_target_of(state, facts) for state in self.states])
        found = self.judged.get((targets, policy))
        if found is None:
            found = judge(subject, facts, policy)
            _remember(self.judged, (targets, policy), found, 1024)
        return found


class _Pool:
    """Hosts that are asked about together, and how; it keeps them alive, and so their ids."""

    __slots__ = ("facts", "hosts", "names", "policy")

    def __init__(self, hosts: tuple[Host, ...], policy: Policy) -> None:
        self.hosts = hosts
        self.policy = policy
        self.names = tuple(host.name for host in hosts)
        self.facts = tuple(facts_of(host) for host in hosts)


_CASES: dict[Subject, _Case] = {}
_SEEN: dict[tuple[Hashable, ...], _Case] = {}
"""Cases by what stands for snapshots that nobody has looked into (`Snapshot.key`)."""
_POOLS: dict[tuple[tuple[int, ...], Policy], _Pool] = {}
_LAST: list[_Pool] = []
_FACTS: dict[tuple[Host, str], Facts] = {}


def _remember(table: dict[K, V], key: K, value: V, limit: int) -> V:
    """Put something into a cache that forgets the oldest entry when it is full."""
    if len(table) >= limit:
        table.pop(next(iter(table)), None)
    table[key] = value
    return value


def forget() -> None:
    """Empty the caches: for those who change the rules, or measure."""
    for table in (_CASES, _SEEN, _POOLS, _FACTS):
        table.clear()
    _LAST.clear()
    _findings_of.cache_clear()
    _target_of.cache_clear()


def facts_of(host: Host) -> Facts:
    """Return the facts of a host: one object for all hosts that differ in nothing but names."""
    nameless = host.replace(name="", source="")
    key = nameless, host.layout.name if host.layout else ""  # which equal layouts need not share
    return _FACTS.get(key) or _remember(_FACTS, key, Facts(nameless), 4096)


def _pool_of(hosts: tuple[Host | str, ...], policy: Policy) -> _Pool:
    """Return hosts as the judge keeps them; most often they are those of the call before."""
    for last in _LAST:
        if policy is last.policy and same(hosts, last.hosts):
            return last
    pool = _POOLS.get((tuple(map(id, hosts)), policy)) or _new_pool(hosts, policy)
    if pool.hosts and same(hosts, pool.hosts):
        _LAST[:] = [pool]
    return pool


def _new_pool(hosts: tuple[Host | str, ...], policy: Policy) -> _Pool:
    """Return hosts that were not met before; names are resolved anew each time."""
    known = tuple(host for host in hosts if isinstance(host, Host))
    if len(known) == len(hosts):
        return _remember(_POOLS, (tuple(map(id, known)), policy), _Pool(known, policy), 64)
    return _Pool(tuple(map(host_of, hosts)), policy)


def _case_of(snapshot: Snapshot) -> _Case:
    """Return the case of a snapshot; one whose like was seen is not looked into."""
    key = snapshot.key
    if key is None:
        return _new_case(snapshot)
    return _SEEN.get(key) or _remember(_SEEN, key, _new_case(snapshot), 4096)


def _new_case(snapshot: Snapshot) -> _Case:
    subject = subject_of(snapshot)
    return _CASES.get(subject) or _remember(_CASES, subject, _Case(subject), 4096)


def check(
    subject: Any,
    hosts: Host | str | Iterable[Host | str],
    *,
    policy: Policy | str = "xstate",
    layout: Layout | str | None = None,
    xcr0: int | None = None,
    cpuid: Cpuid | None = None,
) -> Verdicts:
    """Judge which hosts can take a snapshot, and why the others can't.

    Parameters
    ----------
    subject : Snapshot, Vcpu, (size,) uint8 or bytes
        A snapshot from `xfast.read`, one vCPU, or one bare XSAVE area.
    hosts : Host, str, or iterable of them
        A name is resolved as `xfast.resolve` does, at every call; a Host is read once.
    policy : Policy or str
        Or just its level.
    layout, xcr0, cpuid
        For a bare area: its Layout, the guest's XCR0 and the guest's Cpuid, as far as known.

    Returns
    -------
    Verdicts
        A sequence: one Verdict for each host, in the hosts' order.

    Raises
    ------
    ValueError
        If a bare area is shorter than 576 bytes or no bytes at all.
    PolicyError
        If the level does not exist.
    """
    rules = policy if isinstance(policy, Policy) else _policy(policy)
    if isinstance(subject, Snapshot):
        snapshot = subject
    else:
        vcpu = subject
        if not isinstance(subject, Vcpu):
            area = subject if isinstance(subject, np.ndarray) else np.frombuffer(subject, np.uint8)
            source = "unknown" if layout is None else "given"
            known = None if layout is None else layout_of(layout)
            vcpu = Vcpu(0, area, known, source, xcr0=xcr0, cpuid=cpuid)
        snapshot = Snapshot("", "area", "vm", "", [vcpu])
    pool = _pool_of((hosts,) if isinstance(hosts, (Host, str)) else tuple(hosts), rules)
    return Verdicts(snapshot.name, pool.names, _case_of(snapshot).answer(pool))


def host_of(host: Host | str) -> Host:
    """Return a Host, or the one that `xfast.resolve` finds: how public functions take a host."""
    if isinstance(host, Host):
        return host
    from xfast.hosts import resolve

    return resolve(host)


__all__ = ["check", "facts_of", "findings_of", "forget", "host_of", "judge"]
