"""The running machine as a host: what it has, what its KVM offers, and what neither says."""

import os
import platform

import pytest

from xfast.hosts import this
from xfast.hosts.model import Host
from xfast.hosts.this import (
    SWITCHED,
    kernel_flags,
    probe_x87_pointer_bits,
    read_cpuid,
    this_host,
    told_apart,
    with_offer,
)

OWN = frozenset({"xsave", "avx", "pku", "user_shstk"})


def host(**facts):
    return Host("this", features=OWN, provenance={"features": "probed"}, **facts)


def test_what_only_cpuid_has_is_told_apart():
    told = told_apart(host(), OWN - {"user_shstk"} | {"erms"})
    assert told.features == OWN - {"user_shstk"}
    assert told.notes == ("CPUID has these, and the kernel does not use them: user_shstk",)
    assert told_apart(host(), OWN - {"avx", "user_shstk"}).features == OWN - {"user_shstk"}
    for flags in (None, OWN):
        assert told_apart(host(), flags).features == OWN
        assert not told_apart(host(), flags).notes


def test_what_kvm_does_not_offer_is_no_feature_for_guests():
    told = with_offer(host(), frozenset({"xsave", "avx"}))
    assert told.features == {"xsave", "avx"}
    assert told.provenance["features"] == "probed"
    assert told.notes == ("this KVM does not offer these to guests: pku user_shstk",)
    assert not with_offer(host(), OWN).notes


def test_where_kvm_does_not_say_the_features_are_assumed():
    told = with_offer(host(), None)
    assert told.features == OWN
    assert told.provenance["features"] == "assumed"
    assert "KVM_GET_SUPPORTED_CPUID does not say" in told.notes[0]


needs_linux = pytest.mark.skipif(
    kernel_flags() is None, reason="/proc/cpuinfo has no flags: this is no x86 Linux"
)


@needs_linux
def test_this_host_has_no_feature_that_the_kernel_does_not_use(monkeypatch):
    flags = kernel_flags()
    monkeypatch.setattr(this, "_ask_kvm", lambda host, stack: host)
    alone = this_host()
    assert alone.features & SWITCHED <= flags
    raw = read_cpuid().features & SWITCHED - flags
    assert bool(raw) == any("the kernel does not use them" in note for note in alone.notes)


@needs_linux
def test_without_kvm_that_is_said(monkeypatch):
    def refuse(host, stack):
        raise OSError(13, os.strerror(13))

    monkeypatch.setattr(this, "_ask_kvm", refuse)
    assert "/dev/kvm can't be used (Permission denied)" in this_host().notes[-1]


@needs_linux
def test_the_width_of_x87s_pointers_is_probed():
    width = probe_x87_pointer_bits()
    if width is None:
        pytest.skip("x87's pointers have neither 48 nor 57 bits here")
    assert this_host().x87_pointer_bits == width
    assert this_host().provenance["x87_pointer_bits"] == "probed"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="not an x86_64 machine")
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity")
def test_the_same_cpu_is_asked_wherever_the_process_runs():
    """A dump and the next one differed in APIC IDs, where the process had moved in between."""
    allowed = os.sched_getaffinity(0)
    first = this.read_cpuid()
    assert os.sched_getaffinity(0) == allowed
    for _ in range(50):
        os.sched_setaffinity(0, {max(allowed)})
        os.sched_setaffinity(0, allowed)
        assert this.read_cpuid() == first
