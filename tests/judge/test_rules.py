"""The rule table: its columns, and what it takes to add a rule."""

import numpy as np
import pytest

from xfast.hosts.catalogue import catalogue
from xfast.judge import findings, judgement
from xfast.judge.judgement import check
from xfast.judge.rules import MENDS, RULES, Rule
from xfast.kernels.behaviour import of_release
from xfast.repair.plan import plan_fix
from xfast.snapshots.model import Snapshot, Vcpu
from xfast.xsave.features import AVX
from xfast.xsave.layout import preset


@pytest.fixture
def no_new_rules():
    """Take back what a test adds to the tables."""
    tables = (RULES, findings.FUNCTIONS)
    before = [dict(table) for table in tables]
    yield
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)
    judgement.forget()


def area(bv: int) -> np.ndarray:
    row = np.zeros(4096, np.uint8)
    row[:2].view("<u2")[0] = 0x37F
    row[24:28].view("<u4")[0] = 0x1F80
    row[512:520].view("<u8")[0] = bv
    return row


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.code)
def test_each_rule_is_complete(rule):
    assert rule.mends in MENDS
    assert rule.mends or not rule.mends_notes
    assert all((rule.title, rule.text, rule.ref, rule.next))
    assert rule.text.endswith(".")
    assert not rule.title.endswith(".")
    assert rule.code in findings.FUNCTIONS | findings.WHOLE


@pytest.mark.parametrize("code", ["NOPE", "LEAK"])
def test_a_function_without_a_rule_or_a_second_one_is_not_imported(code):
    with pytest.raises(ImportError, match=f"rule {code}"):
        findings.judges(code)


def test_a_rule_without_a_function_is_not_imported(no_new_rules):
    findings.require_all()
    RULES["NEW"] = Rule("NEW", "title", "text.", "ref", "next")
    with pytest.raises(ImportError, match="NEW"):
        findings.require_all()


def test_a_new_rule_is_a_row_and_a_function(no_new_rules):
    """Nothing else: the verdict, the fix and the words of the answer follow from the row."""
    RULES["ODD"] = Rule(
        "ODD", "AVX on odd days", "It is odd.", "none", "Wait a day.",
        call="KVM_SET_XSAVE", mends="drop",
    )  # fmt: skip

    @findings.judges("ODD")
    def _odd(state, target, policy):
        if state.bv & AVX:
            yield findings.finding_of(
                "ODD", "blocks", "KVM_SET_XSAVE fails: AVX is odd",
                component="avx", snapshot="0x7", host="0x3", fix="safe",
            )  # fmt: skip

    intel = preset("intel")
    host = catalogue()["intel-haswell"].with_kernel(of_release("6.12"))
    vcpu = Vcpu(0, area(7), intel.restricted(7), "given", xcr0=7)
    snapshot = Snapshot("odd", "raw", "vm", "kvm", [vcpu])
    (verdict,) = check(snapshot, host)
    assert (verdict.verdict, verdict.fixable, verdict.settable) == ("incompatible", "safe", False)
    plan = plan_fix(snapshot, host)
    assert [(change.component, change.rule) for change in plan.changes] == [("avx", "ODD")]
    assert plan.after.verdict == "identical"
