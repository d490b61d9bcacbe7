"""The model against the running kernel: the same operations on both, no difference allowed.

`python tests/helpers/kvm_pair.py -n 1000000` runs as many as one likes; here are a few thousand.
"""

import errno
import json
import os
import random
import subprocess
import sys

import kvm_pair
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from xfast.kernels.uapi import CR4_OSXSAVE, CR4_PKE
from xfast.kvm import live
from xfast.xsave.features import PKRU, XFEATURE_MASK_XTILE, bits, name_of
from xfast.xsave.layout import preset

pytestmark = pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm is not here, or not ours"
)


def test_random_sequences_make_no_difference():
    done, machine = kvm_pair.search(4000, seed=20)
    assert done.total() >= 4000
    assert done["set_xsave"] > 500
    assert not kvm_pair.never_accepted(machine)
    told = kvm_pair.report(done, machine, 0)
    for nr in bits(machine.host.kvm_xcr0 & ~XFEATURE_MASK_XTILE):
        assert f"'{name_of(nr)}': " in told


def test_a_component_that_was_never_accepted_is_a_failure(monkeypatch):
    monkeypatch.setattr(kvm_pair, "never_accepted", lambda machine: PKRU)
    with pytest.raises(AssertionError, match="never accepted: pkru"):
        kvm_pair.search(kvm_pair.LEAST_FOR_COVERAGE, seed=21)


class SameOperations(RuleBasedStateMachine):
    """Hypothesis chooses, and shrinks, what both vCPUs do."""

    machine = None

    def __init__(self):
        super().__init__()
        self.pair = self.machine.pair()
        self.choices = kvm_pair.Operations(self.machine, None)
        self.swapped = False

    seeds = st.integers(0, 2**32)

    def seeded(self, seed):
        self.choices.rng = random.Random(seed)
        return self.choices

    @rule(seed=seeds)
    def set_xsave(self, seed):
        self.pair.apply("set_xsave", self.seeded(seed).area(wild=False))

    @rule()
    def get_xsave(self):
        self.pair.apply("get_xsave")

    @rule()
    def get_xsave2(self):
        self.pair.apply("get_xsave2")

    @rule(size=st.sampled_from((0, 576, 4095, 4096)))
    def get_xsave_into(self, size):
        self.pair.apply("get_xsave", size)

    @rule(name=st.sampled_from(sorted(kvm_pair.cpuid_lists(0))))
    def set_cpuid2(self, name):
        self.pair.apply("set_cpuid2", name)

    @rule(seed=seeds)
    def set_xcrs(self, seed):
        self.pair.apply("set_xcrs", *self.seeded(seed).xcrs())

    @rule(value=st.sampled_from((0, CR4_OSXSAVE, CR4_PKE, CR4_OSXSAVE | CR4_PKE)))
    def set_cr4(self, value):
        self.pair.apply("set_cr4", value)

    @rule(seed=seeds)
    def vmm_wrpkru(self, seed):
        self.pair.apply("vmm_wrpkru", self.seeded(seed).pkru())

    @rule()
    def get_xcrs(self):
        self.pair.apply("get_xcrs")

    @rule(seed=seeds)
    def set_fpu(self, seed):
        self.pair.apply("set_fpu", self.seeded(seed).kvm_fpu())

    @rule()
    def get_fpu(self):
        self.pair.apply("get_fpu")

    @precondition(lambda self: not self.swapped)
    @rule()
    def run(self):
        self.swapped = True
        self.pair.apply("run")
        self.pair.apply("get_values")
        self.pair.apply("set_xsave", self.choices.everything())


def test_what_hypothesis_thinks_of_makes_no_difference():
    machine = kvm_pair.Machine()
    one = type("SameOperationsHere", (SameOperations,), {"machine": machine})
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    one.TestCase.settings = settings(
        max_examples=25, stateful_step_count=20, suppress_health_check=checks
    )
    try:
        one.TestCase("runTest").runTest()
    finally:
        machine.close()


AMX_SCRIPT = """
import json, errno, sys
from xfast.kvm import Kernel, live
from xfast.hosts.this import this_host
import kvm_pair

def attempt(call, *arguments):
    try:
        return call(*arguments)
    except OSError as refused:
        return errno.errorcode[refused.errno]

def story(kernel):
    told = [[code, attempt(kernel.arch_prctl, code, arg)] for code, arg in (
        (0x1021, 0), (0x1022, 0), (0x1024, 0), (0x1025, 17), (0x1025, 19), (0x1025, 20),
        (0x1025, 63), (0x1023, 0), (0x1025, 18 if permitted else 2), (0x1024, 0))]
    vcpu = kernel.create_vcpu()
    told.append(["locked", attempt(kernel.arch_prctl, 0x1025, 18)])
    told.append(["size", kernel.xsave2_size])
    area = bytearray(16384)
    area[24:26], area[512], area[576] = b"\\x80\\x1f", 6, 0x55
    for entries in (kvm_pair.leaf_d(plain), kvm_pair.leaf_d(plain | 0x60000)):
        told.append(["set", attempt(vcpu.set_xsave, area)])
        told.append(["cpuid", attempt(vcpu.set_cpuid2, entries)])
        for get in (vcpu.get_xsave, vcpu.get_xsave2):
            data = attempt(get)
            told.append(["get", data if isinstance(data, str) else data.hex()])
    for bv in (7, 0x20000, 0x40000, 0x60007):
        area[512:520] = bv.to_bytes(8, "little")
        told.append(["set", attempt(vcpu.set_xsave, area)])
    short = attempt(vcpu.set_xsave, bytes(vcpu_size(vcpu) - 1))
    return [*told, ["short", short]]

def vcpu_size(vcpu):
    return len(vcpu.get_xsave2())

permitted = sys.argv[1] == "permitted"
with live.Kernel() as kernel:
    plain = kernel.supported_xcr0 & ~0x60000
real = story(live.Kernel())
host = this_host()
print(json.dumps([story(Kernel(host)), real]))
"""


@pytest.mark.parametrize("permission", ["permitted", "not permitted"])
def test_amx_permissions_and_the_larger_area_make_no_difference(permission):
    """arch_prctl() speaks for a whole process, once: each case has its own."""
    path = os.pathsep.join(["tests/helpers", *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", AMX_SCRIPT, permission],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": path},
        cwd=os.path.dirname(os.path.dirname(os.path.dirname(__file__))),
    )
    assert done.returncode == 0, done.stderr
    model, real = json.loads(done.stdout)
    assert model == real


def test_confirm_tells_what_the_kernel_did():
    with live.Kernel() as kernel:
        supported = kernel.supported_xcr0
    area = np.zeros(4096, np.uint8)
    area[24:26], area[512] = (0x80, 0x1F), 3
    area[160] = 9
    taken = live.confirm(area, preset("intel"))
    assert taken.accepted
    assert taken.reported == 3
    assert not taken.changed
    area[512:520].view("<u8")[0] = 1 << 61
    refused = live.confirm(area, preset("intel"))
    assert not supported >> 61 & 1
    assert refused.errno == errno.EINVAL


def test_the_list_of_before_the_run_is_the_same_after_it():
    """Writes of XCR0 refresh what it is compared with: the answer is 0 where nothing is added."""
    machine = kvm_pair.Machine()
    pair = machine.pair()
    for operation in (
        ("set_cpuid2", "as KVM rewrites it"),
        ("set_xcrs", [(0, machine.host.kvm_xcr0 & ~XFEATURE_MASK_XTILE)], None, 0),
        ("run",),
        ("resend_cpuid2",),
    ):
        answer = pair.apply(*operation)
    assert answer in (None, f"errno {errno.EINVAL}")
