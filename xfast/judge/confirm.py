"""Ask this machine's KVM what a verdict says of it: KVM_SET_XSAVE on a scratch vCPU."""

from __future__ import annotations

import errno
from dataclasses import replace

from xfast.hosts.model import Host
from xfast.judge.verdict import Verdict
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
        `live` is ``KVM accepts`` or ``KVM refuses (EINVAL, vCPU n)``, and says so where that is
        not what the findings foretold; or why KVM could not be asked. A process is no case
        for KVM.
    """
    if snapshot.kind != "vm" or host.layout is None:
        return verdict
    answer = "KVM accepts"
    for vcpu in snapshot.vcpus:
        layout = vcpu.layout or Layout(())
        portable = vcpu.portable and vcpu.layout is not None
        size = max(host.layout.standard_size(), len(vcpu.area), KVM_XSAVE_SIZE)
        row = sent(vcpu.area, layout, host.layout, size, portable=portable)
        try:
            found = live.confirm(row, host.layout if portable else layout, vcpu.cpuid)
        except OSError as problem:  # no /dev/kvm, or it refuses the guest's CPUID
            return replace(verdict, live=f"KVM can't be asked: {problem}")
        if not found.accepted:
            answer = f"KVM refuses ({errno.errorcode[found.errno]}, vCPU {vcpu.index})"
            break
    if verdict.settable != (answer == "KVM accepts"):
        answer += ", not as foretold"
    return replace(verdict, live=answer)
