"""Ask this machine's KVM what a verdict says of it: KVM_SET_XSAVE on a scratch vCPU."""

from __future__ import annotations

import errno
from dataclasses import replace

import numpy as np

from xfast.area import Areas, headers, relayout
from xfast.features import KVM_XSAVE_SIZE
from xfast.hosts.model import Host
from xfast.kvm import live
from xfast.layout import Layout
from xfast.snapshots.model import Snapshot, Vcpu
from xfast.verdict import Verdict


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
        try:
            found = live.confirm(as_restored(vcpu, host.layout), layout, vcpu.cpuid)
        except OSError as problem:  # no /dev/kvm, or it refuses the guest's CPUID
            return replace(verdict, live=f"KVM can't be asked: {problem}")
        if not found.accepted:
            answer = f"KVM refuses ({errno.errorcode[found.errno]}, vCPU {vcpu.index})"
            break
    if verdict.settable != (answer == "KVM accepts"):
        answer += ", not as foretold"
    return replace(verdict, live=answer)


def as_restored(vcpu: Vcpu, layout: Layout) -> Areas:
    """Return the area that a VMM passes to KVM_SET_XSAVE on a host of `layout`.

    A raw area goes as it is. QEMU builds one with the host's offsets, and with the stream's
    XSTATE_BV verbatim: a bit survives although the host has no place for its data.

    *Source*: QEMU target/i386/xsave_helper.c x86_cpu_xsave_all_areas().
    """
    if not vcpu.portable or vcpu.layout is None:
        return vcpu.area
    size = max(layout.standard_size(), KVM_XSAVE_SIZE)
    row = relayout(vcpu.area, vcpu.layout, layout, size=size, lossy=True)
    row[512:520].view("<u8")[0] = np.uint64(headers(vcpu.area).xstate_bv)
    return row
