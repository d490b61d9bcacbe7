"""Verdicts against the model of KVM: what `check` says of KVM_SET_XSAVE, the model does."""

import contextlib
import errno

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from xfast.hosts.model import Host
from xfast.judge.judgement import check
from xfast.judge.rules import RULES
from xfast.kernels.behaviour import of_release
from xfast.kvm import Kernel
from xfast.xsave import area as xa
from xfast.xsave.cpuid import Cpuid, Entry
from xfast.xsave.features import bits
from xfast.xsave.layout import preset

INTEL = preset("intel")
RELEASES = ("5.10", "5.15", "5.16", "5.18", "5.19.12", "6.0", "6.1.55", "6.1.60", "6.6", "6.12.80")
XSTATE_RULES = {rule.code for rule in RULES.values() if rule.refuses_set}
USER = 0x602E7
PERMIT = 0x1025  # ARCH_REQ_XCOMP_GUEST_PERM


def subsets(mask: int):
    return st.sets(st.sampled_from(list(bits(mask)))).map(lambda nrs: sum(1 << n for n in nrs))


FLAGS = frozenset({"xsave", "xsaveopt", "xsavec", "xfd"})
CPUS = (  # (CPUID's XSAVE flags, features)
    (FLAGS, None),
    (FLAGS - {"xfd"}, None),
    (frozenset(), None),
    (FLAGS, FLAGS),
    (frozenset(), FLAGS),
    (FLAGS, frozenset()),
    (frozenset(), frozenset()),
)


@given(
    release=st.sampled_from((*RELEASES, "6.16")),
    host_mask=st.sampled_from([0x3, 0x7, 0xE7, 0x207, 0x2E7, 0x602E7, 0x800FF]),
    cpu=st.sampled_from(CPUS),
    guest_mask=st.sampled_from([0, 0x3, 0x7, 0xE7, 0x207, 0x2E7, 0x602E7]),
    xstate_bv=st.one_of(subsets(USER), subsets(USER | 0x918)),
    xcomp_bv=st.sampled_from([0, 0, 0, 7, 1 << 63 | 7]),
    reserved=st.sampled_from([0, 0, 0, 1]),
    mxcsr=st.sampled_from([0x1F80, 0x1FA0, 0x21F80, 0x11F80]),
)
@example("5.18", 0x207, CPUS[0], 0x7, 0x207, 0, 0, 0x1F80)
@example("6.12.80", 0x602E7, CPUS[0], 0x2E7, 0x602E7, 0, 0, 0x1F80)
@example("6.6", 0x207, CPUS[0], 0x7, 0x207, 0, 0, 0x1F80)
@example("6.6", 0x7, CPUS[2], 0x7, 0x7, 0, 0, 0x1F80)
@example("6.6", 0x7, CPUS[5], 0x7, 0x7, 0, 0, 0x1F80)
@example("6.16", 0x800FF, CPUS[0], 0x7, 0x7, 0, 0, 0x1F80)
@example("6.12.80", 0x602E7, CPUS[1], 0x2E7, 0x602E7, 0, 0, 0x1F80)
@example("5.16", 0x3, CPUS[2], 0, 0, 0, 0, 0x21F80)
def test_check_says_what_the_model_of_kvm_does(
    release, host_mask, cpu, guest_mask, xstate_bv, xcomp_bv, reserved, mxcsr
):
    host = Host(
        "host",
        layout=INTEL.restricted(host_mask),
        xcr0=host_mask,
        xss=0,
        mxcsr_mask=0xFFFF,
        vendor="GenuineIntel",
        xsave=cpu[0],
        features=cpu[1],
        xsave2_size=11008,
        guest_permission=1 << 18,
        kernel=of_release(release),
    )
    kernel = Kernel(host)
    host = host.replace(kvm_xcr0=kernel.supported_xcr0)
    row = xa.empty(1, 11008)[0]
    row[:416] = 1
    row[576:] = 1
    words = row[512:576].view("<u8")
    words[:3] = xstate_bv, xcomp_bv, reserved
    row[24:28].view("<u4")[0] = mxcsr
    cpuid = Cpuid((Entry(0xD, 0, 1, guest_mask, 576, 0, 0),))
    with contextlib.suppress(OSError):
        kernel.arch_prctl(PERMIT, 18)
    vcpu = kernel.create_vcpu()
    try:
        vcpu.set_cpuid2(cpuid)
    except OSError:
        assume(False)  # no tiles for guests here: there is nothing to restore into
    refusal = None
    try:
        vcpu.set_xsave(row)
    except OSError as error:
        refusal = error.errno
    assert refusal in (None, errno.EINVAL)
    accepted = refusal is None
    (verdict,) = check(row, host, layout=INTEL, cpuid=cpuid)
    blocking = {f.code for f in verdict.findings if f.severity == "blocks"} & XSTATE_RULES
    if xcomp_bv >> 63 and accepted:
        assert blocking == {"FORMAT"}  # taken for standard format, and misread
    else:
        assert accepted == (not blocking)
    assert verdict.verdict != "unknown"
    if accepted and not xcomp_bv:
        get = vcpu.get_xsave2 if kernel.xsave2_size else vcpu.get_xsave
        after = xa.headers(np.frombuffer(get(), np.uint8)).xstate_bv
        lost = xstate_bv & ~after
        told = {f.component for f in verdict.findings if "next KVM_GET_XSAVE" in f.why}
        assert bool(lost & 0x2E4) <= bool(told)


@pytest.mark.parametrize("release", RELEASES)
def test_the_leak_is_one_story_in_the_model_and_in_the_verdict(release):
    """A host with PKU, a guest without: run, GET, and judge what comes out for the next host."""
    pku = Host(
        "pku",
        layout=INTEL.restricted(0x207),
        xcr0=0x207,
        kvm_xcr0=0x207,
        mxcsr_mask=0xFFFF,
        vendor="GenuineIntel",
        xsave=frozenset({"xsave", "xsaveopt", "xsavec"}),
        kernel=of_release(release),
    )
    guest = Cpuid((Entry(0xD, 0, 1, 7, 576, 0, 0),))
    vcpu = Kernel(pku).create_vcpu()
    vcpu.set_cpuid2(guest)
    with pytest.raises(InterruptedError):
        vcpu.run(immediate_exit=True)
    blob = np.frombuffer(vcpu.get_xsave(), np.uint8)
    leaks = bool(xa.headers(blob).xstate_bv & 0x200)
    assert leaks == (release == "5.16")
    target = pku.replace(name="plain", layout=INTEL.restricted(7), xcr0=7, kvm_xcr0=7)
    (verdict,) = check(blob, target, layout=INTEL, cpuid=guest)
    assert (verdict.verdict == "incompatible") == leaks
    assert ("LEAK" in {f.code for f in verdict.findings}) == leaks
