"""The tasks of CONTRIBUTING.md: each is done here, for something made up, by its steps alone."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

import xfast
from xfast.hosts.catalogue import catalogue
from xfast.judge import judgement
from xfast.judge.judgement import check
from xfast.kernels import behaviour
from xfast.kernels.behaviour import Behaviour, of_release
from xfast.snapshots.model import Snapshot, Vcpu
from xfast.xsave import features
from xfast.xsave.features import COMPONENTS, Component, parse_component
from xfast.xsave.layout import Layout, Slot, preset

PACKAGE = Path(xfast.__file__).parent
GUIDE = PACKAGE.parent / "CONTRIBUTING.md"
INTEL = preset("intel")


@pytest.fixture
def fresh():
    """Forget what was judged before and during a test that changes the tables."""
    judgement.forget()
    yield
    judgement.forget()


def area(bv: int, size: int = 4096) -> np.ndarray:
    row = np.zeros(size, np.uint8)
    row[:2].view("<u2")[0] = 0x37F
    row[24:28].view("<u4")[0] = 0x1F80
    row[512:520].view("<u8")[0] = bv
    return row


def test_a_new_component_is_a_row(monkeypatch, fresh):
    """Named in a verdict, dropped by a fix, read by the engine: from its row and its slot."""
    new = Component(20, "novel", "novel registers", 64, 3072, "novel")
    monkeypatch.setattr(features, "COMPONENTS", (*COMPONENTS, new))
    monkeypatch.setitem(features.BY_NR, 20, new)
    monkeypatch.setitem(features.BY_NAME, "novel", new)
    layout = Layout((*INTEL.restricted(4).slots, Slot(20, new.size, new.offset)), "novel")
    mask = new.bit | 7
    here = catalogue()["intel-haswell"].replace(
        layout=layout, xcr0=mask, kvm_xcr0=mask, kernel=of_release("6.12")
    )
    there = here.replace(layout=layout.restricted(7), xcr0=7, kvm_xcr0=7)
    assert parse_component("novel") == 20
    vcpu = Vcpu(0, area(mask), layout, "given", xcr0=7, guest_mask=mask)
    snapshot = Snapshot("s", "raw", "vm", "kvm", [vcpu])
    verdicts = check(snapshot, [here, there])
    assert [v.verdict for v in verdicts] == ["identical", "incompatible"]
    assert [f.component for f in verdicts[1].findings if f.severity == "blocks"] == ["novel"]
    plan = xfast.plan_fix(snapshot, there)
    assert [change.component for change in plan.changes] == ["novel"]
    vcpu.area[new.offset] = 1
    assert check(snapshot, there)[0].fixable == "lossy"
    assert xfast.classify(vcpu.area, layout).state(20) == "live"


def test_a_new_behaviour_is_a_row_and_a_formula(monkeypatch, fresh):
    """A made-up commit of Linux 9.0 makes KVM_SET_XSAVE refuse AVX; the verdicts follow."""
    new = Behaviour("no-avx", "0123456789ab", "KVM: x86: Refuse AVX", ("9.0-rc1",), "none")
    monkeypatch.setattr(behaviour, "_TABLE", (*behaviour._TABLE, new))
    monkeypatch.setitem(behaviour.BEHAVIOURS, "no-avx", new)
    accepted = behaviour.accepted

    def formula(kernel, user, kvm_xcr0):
        allowed = accepted(kernel, user, kvm_xcr0)
        return allowed & ~features.AVX if "no-avx" in kernel else allowed

    monkeypatch.setattr(behaviour, "accepted", formula)
    hosts = [catalogue()["intel-haswell"].with_kernel(of_release(r)) for r in ("8.9", "9.0")]
    vcpu = Vcpu(0, area(7), INTEL, "given", xcr0=7, guest_mask=7)
    words = [v.verdict for v in check(Snapshot("s", "raw", "vm", "kvm", [vcpu]), hosts)]
    assert words == ["identical", "incompatible"]


def test_the_guide_names_files_and_tests_that_exist():
    text = GUIDE.read_text()
    for name in re.findall(r"`((?:xfast|tests)/[\w/]+\.\w+)", text):
        assert name.endswith("NAME.py") or (PACKAGE.parent / name).is_file(), name
    for name, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        assert f"def {test}(" in (PACKAGE.parent / name).read_text()
    assert len(re.findall(r"^## A new ", text, re.M)) == 5


LEAVES = {0x80000001, 0x80000008, 0x1E}
"""CPUID leaves, the only numbers that these rooms may have in hex."""


@pytest.mark.parametrize(
    "path",
    sorted([*(PACKAGE / "judge").glob("*.py"), *(PACKAGE / "repair").glob("*.py")]),
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_masks_and_component_numbers_have_names(path):
    """PKRU was a bare 9 in 17 places, and masks stood as numbers."""
    text = path.read_text()
    tree = ast.parse(text)
    places = {  # CPUID's registers have bits of their own
        id(node)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Feature"
        for node in ast.walk(call)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and type(node.value) is int and id(node) not in places:
            written = ast.get_source_segment(text, node) or ""
            bare = written.lower().startswith("0x") and node.value > 0xF
            where = f"{path.name}:{node.lineno}: {written}"
            assert not bare or node.value in LEAVES, where
            assert node.value != 9, where
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.LShift):
            assert not isinstance(node.right, ast.Constant), f"{path.name}:{node.lineno}"
