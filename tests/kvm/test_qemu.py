"""What the model predicts of a restore, and what a real QEMU under KVM shows after it."""

import lzma
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from qemu_machine import GUESTS, PROGRAM, Machine

from xfast.hosts.model import Host
from xfast.hosts.this import this_host
from xfast.kvm import Kernel, migrate
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.qemu import reader as qemu
from xfast.xsave.features import PKRU

pytestmark = [
    pytest.mark.skipif(not shutil.which(PROGRAM), reason=f"{PROGRAM} is not here"),
    pytest.mark.skipif(
        not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm is not here, or not ours"
    ),
]

CLEAN, LEAKED = "q72-kvm-bv7-xcr7-smp1", "q72-kvm-pkru-leak-bv207"


def vmm():
    """Return which of the model's VMMs the QEMU here is."""
    told = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=True)
    major = int(re.search(r"version (\d+)", told.stdout)[1])
    if major == 7:
        return "qemu-7.2"
    if major >= 10:
        return "qemu"
    pytest.skip(f"what QEMU {major} does with a failed KVM_SET_XSAVE is not known")


def predict(path, here):
    """Return the migration that the model makes of a stream's first vCPU, from Linux 5.16."""
    with Source.open(path) as source:
        (snapshot,) = qemu.read(source)
    saved = snapshot.vcpus[0]
    mask = saved.layout.user_mask & ~0x18 | PKRU
    there = Host(
        "source",
        saved.layout,
        xcr0=mask & saved.layout.user_mask,
        xss=0,
        mxcsr_mask=0xFFFF,
        xsave=frozenset({"xsave"}),
    )
    vcpu = Kernel(there, "5.16.2").create_vcpu()
    vcpu.set_cpuid2([(0xD, 0, 1, saved.xcr0, 0, 0, 0)])
    area = np.zeros(4096, np.uint8)
    area[: len(saved.area)] = saved.area[:4096]
    vcpu.set_xsave(area)
    vcpu.set_xcrs([(0, saved.xcr0)])
    return migrate(vcpu, here, vmm())


@pytest.mark.parametrize("name", [CLEAN, LEAKED])
def test_qemu_shows_what_the_model_predicts(name, data, tmp_path):
    here = this_host()
    if here.kvm_xcr0 & PKRU:
        pytest.skip("this host has PKU and takes the leaked bit")
    path = tmp_path / name
    path.write_bytes(lzma.decompress((data / "qemu" / f"{name}.qemustate.xz").read_bytes()))
    predicted = predict(path, here)
    assert predicted.silent == (name == LEAKED and vmm() == "qemu-7.2")
    arguments = (*GUESTS["kvm"], "-m", "128", "-machine", "pc-i440fx-7.2")
    machine = Machine(*arguments, "-incoming", f"exec:cat {path}")
    if predicted.vcpu is None:
        with pytest.raises(EOFError), machine:
            machine.migrated()
        return
    with machine:
        assert machine.migrated() == "completed"
        registers = machine.registers()[0]
    area = np.frombuffer(predicted.vcpu.get_xsave(), np.uint8)
    assert registers["MXCSR"] == [int(area[24:28].view("<u4")[0])]
    shown = registers.get("YMM00") or registers["XMM00"]  # YMM where XCR0 has AVX
    assert shown[-2:] == [int(word) for word in area[160:176].view("<u8")[::-1]]
    if len(shown) == 4:
        assert shown[:2] == [int(word) for word in area[576:592].view("<u8")[::-1]]
    lost = name == LEAKED
    assert registers["MXCSR"] == [0x1F80 if lost else 0x1FA0]
    assert any(shown) != lost
    assert (len(shown) == 4) != lost
    if lost:
        assert predicted.lost == 6  # x87 had its initial value
        assert predicted.xcr0_lost == 6
