"""Ask this machine's KVM what a verdict says of it: KVM_SET_XSAVE on a scratch vCPU."""

from __future__ import annotations

import errno

from xfast.hosts.model import Host
from xfast.judge.verdict import KvmAnswer, Verdict
from xfast.kvm import live
from xfast.kvm.migration import sent
from xfast.snapshots.model import Snapshot
from xfast.xsave.features import KVM_XSAVE_SIZE
from xfast.xsave.layout import Layout


def confirm(snapshot: Snapshot, host: Host, verdict: Verdict) -> Verdict:
    """Return `verdict` with what KVM_SET_XSAVE answered for all of the snapshot's vCPUs.

    Parameters
    ----------
    host : Host
        This machine.

    Returns
    -------
    Verdict
        With `kvm`, the answer. A process is no case for KVM: its verdict stays as it is.
    """
    if snapshot.kind != "vm" or host.layout is None:
        return verdict
    return verdict._replace(kvm=_ask(snapshot, host, verdict.settable))


def _ask(snapshot: Snapshot, host: Host, settable: bool) -> KvmAnswer:
    assert host.layout is not None
    for vcpu in snapshot.vcpus:
        layout = vcpu.layout or Layout(())
        portable = vcpu.portable and vcpu.layout is not None
        size = max(host.layout.standard_size(), len(vcpu.area), KVM_XSAVE_SIZE)
        row = sent(vcpu.area, layout, host.layout, size, portable=portable)
        try:
            found = live.confirm(row, host.layout if portable else layout, vcpu.cpuid)
        except OSError as problem:  # no /dev/kvm, or it refuses the guest's CPUID
            return KvmAnswer(None, error=str(problem))
        if not found.accepted:
            return KvmAnswer(False, not settable, errno.errorcode[found.errno], vcpu.index)
    return KvmAnswer(True, settable)
