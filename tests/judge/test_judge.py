"""Verdicts: each rule by name and with both values, and the cases that real fleets met."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xfast.errors import PolicyError
from xfast.hosts.catalogue import catalogue
from xfast.hosts.model import Host
from xfast.judge.advice import next_steps
from xfast.judge.judgement import check
from xfast.judge.verdict import Policy
from xfast.kernels.behaviour import BEHAVIOURS, of_release
from xfast.snapshots.model import Snapshot, Vcpu
from xfast.xsave import area as xa
from xfast.xsave.cpuid import Cpuid, Entry
from xfast.xsave.features import BY_NR, PKRU_DEFAULT, bits
from xfast.xsave.layout import Layout, preset
from xfast.xsave.registers import Registers

INTEL, ROME, MILAN, GENOA = map(preset, ("intel", "amd-zen2", "amd-zen3", "amd-zen4"))


def host(name="host", mask=0x207, layout=INTEL, kernel="6.12", **more) -> Host:
    return Host(
        name,
        layout=layout.restricted(mask),
        xcr0=mask,
        kvm_xcr0=mask,
        xss=0,
        mxcsr_mask=more.pop("mxcsr_mask", 0xFFFF),
        kernel=of_release(kernel) if kernel else None,
        **more,
    )


def area(bv: int, layout=INTEL, size=4096, live=True, **registers) -> np.ndarray:
    row = xa.empty(1, size)[0]
    row[512:520].view("<u8")[0] = bv
    row[:2].view("<u2")[0] = 0x37F
    row[24:28].view("<u4")[0] = 0x1F80
    if live:
        if bv & 1:
            row[32] = 1
        if bv & 2:
            row[160] = 1
        for nr in bits(bv & layout.mask & ~3):
            slot = layout.by_nr[nr]
            if slot.offset + slot.size <= size:
                row[slot.offset] = 1
    regs = Registers(row, layout)
    for name, value in registers.items():
        regs[name] = value
    return row


def guest(mask: int, **features) -> Cpuid:
    return Cpuid((Entry(0xD, 0, 1, mask & 0xFFFFFFFF, 576, 0, mask >> 32),))


def codes(verdict, severity=None):
    return {f.code for f in verdict.findings if severity in (None, f.severity)}


def only(verdict, code):
    (finding,) = [f for f in verdict.findings if f.code == code]
    return finding


PKRU_VALUES = {"signature": 0, "default": PKRU_DEFAULT, "live": 0x12345670}

LEAK_CASES = [
    # kernel, host has PKU, verdict, severity of LEAK
    ("5.15", False, "incompatible", "blocks"),
    ("5.15", True, "superset", "note"),
    ("5.16", False, "incompatible", "blocks"),
    ("5.16", True, "superset", "risky"),
    ("5.18", False, "incompatible", "blocks"),
    ("5.18", True, "incompatible", "blocks"),
    ("6.1.55", True, "incompatible", "blocks"),
    ("6.1.60", True, "superset", "note"),
    ("6.12", False, "incompatible", "blocks"),
    ("6.12", True, "superset", "note"),
]


@pytest.mark.parametrize("value", PKRU_VALUES)
@pytest.mark.parametrize(("kernel", "pku", "verdict", "severity"), LEAK_CASES)
def test_leaked_pkru_under_every_kernel(kernel, pku, verdict, severity, value):
    leaked = area(0x207, pkru=PKRU_VALUES[value])
    target = host(mask=0x207 if pku else 7, kernel=kernel)
    (answer,) = check(leaked, target, layout=INTEL, xcr0=7, cpuid=guest(7))
    assert answer.verdict == verdict
    leak = only(answer, "LEAK")
    assert (leak.component, leak.severity) == ("pkru", severity)
    assert leak.snapshot_value == "0x207"
    assert leak.fix == ("lossy" if value == "live" else "safe")
    assert f"{PKRU_VALUES[value]:#x}" in leak.why
    assert leak.host_value == ("0x7" if severity == "blocks" else "0x207")
    if verdict == "incompatible":
        assert answer.fixable == leak.fix
        assert "EINVAL" in leak.why


def test_a_guest_with_pku_has_no_leak():
    live = area(0x207, pkru=0)
    for kernel in ("5.15", "5.16", "5.18", "6.12"):
        (answer,) = check(live, host(kernel=kernel), layout=INTEL, xcr0=0x207, cpuid=guest(0x207))
        assert answer.verdict == "identical"
        assert "LEAK" not in codes(answer)


def test_the_same_leak_under_an_unknown_kernel_is_unknown():
    leaked = area(0x207, pkru=0)
    (answer,) = check(leaked, host(kernel=None), layout=INTEL, xcr0=7, cpuid=guest(7))
    assert answer.verdict == "unknown"
    assert "not known" in only(answer, "LEAK").why


def test_without_guest_cpuid_a_rejecting_kernel_is_unknown():
    """XCR0 bounds what the guest has from below only: its CPUID may have PKU unused."""
    (answer,) = check(area(0x207, pkru=0), host(kernel="5.18"), layout=INTEL, xcr0=7)
    assert answer.verdict == "unknown"


def test_the_signature_alone_names_the_leak():
    (answer,) = check(area(0x207, pkru=0), host(mask=7), layout=INTEL)
    leak = only(answer, "LEAK")
    assert answer.verdict == "incompatible"
    assert "signature" in leak.why
    assert answer.fixable == "safe"


def test_qemus_silent_loss_is_told():
    vcpu = Vcpu(0, area(0x207, pkru=0), INTEL, "format", portable=True, xcr0=7, pkru_enabled=False)
    snapshot = Snapshot("leak", "qemu", "vm", "qemu-kvm", [vcpu])
    (answer,) = check(snapshot, host(mask=7))
    assert "QEMU 7.2 reports the restore as done" in only(answer, "LEAK").why


@pytest.mark.parametrize(("mask", "nr"), [(0xE7, 5), (0x207, 9)])
def test_live_state_needs_its_component(mask, nr):
    (answer,) = check(area(mask), host(mask=7), layout=INTEL, xcr0=mask, cpuid=guest(mask))
    missing = [f for f in answer.findings if f.code == "HOST-MISSING"]
    assert BY_NR[nr].name in {f.component for f in missing}
    assert {f.severity for f in missing} == {"blocks"}
    assert (missing[0].snapshot_value, missing[0].host_value) == (f"{mask:#x}", "0x7")
    assert "XCR0" in codes(answer, "blocks")
    assert answer.fixable == "none"


def test_init_state_of_a_missing_component_is_a_safe_fix():
    (answer,) = check(area(0xE7, live=False), host(mask=7), layout=INTEL, xcr0=7, cpuid=guest(0xE7))
    blocking = [f for f in answer.findings if f.severity == "blocks"]
    assert {f.code for f in blocking} == {"HOST-MISSING"}
    assert answer.fixable == "safe"


def test_amx_area_over_4096_bytes():
    amx = 0x602E7
    big = area(amx, size=11008)
    old = host(mask=amx, kernel="5.16")
    new = host(mask=amx, xsave2_size=11008, guest_permission=1 << 18)
    small = host(mask=amx, xsave2_size=4096, guest_permission=0)
    answers = check(big, [old, new, small], layout=INTEL, xcr0=amx, cpuid=guest(amx))
    assert [a.verdict for a in answers] == ["incompatible", "identical", "incompatible"]
    size = only(answers[2], "SIZE")
    assert (size.snapshot_value, size.host_value) == ("11008", "4096")
    assert only(answers[2], "PERM").severity == "blocks"
    assert "SIZE" in codes(answers[0], "blocks")
    assert "PERM" not in codes(answers[0])  # KVM_SET_CPUID2 asks for permission since 5.17


def test_a_truncated_amx_area_is_seen():
    (answer,) = check(area(0x602E7), host(mask=0x602E7), layout=INTEL)
    size = [f for f in answer.findings if f.code == "SIZE"]
    assert "tiledata" in {f.component for f in size}
    assert answer.verdict == "incompatible"


@pytest.mark.parametrize(
    ("ours", "theirs", "mask", "components"),
    [
        (ROME, MILAN, 0x207, {"pkru"}),
        (INTEL, GENOA, 0x2E7, {"opmask", "zmm_hi256", "hi16_zmm", "pkru"}),
        (GENOA, INTEL, 0xE7, {"opmask", "zmm_hi256", "hi16_zmm"}),
        (MILAN, GENOA, 0x207, set()),
    ],
)
def test_blobs_between_layouts(ours, theirs, mask, components):
    target = host(mask=mask, layout=theirs, mxcsr_mask=0x2FFFF)
    (answer,) = check(area(mask, ours), target, layout=ours, xcr0=mask, cpuid=guest(mask))
    moved = [f for f in answer.findings if f.code == "LAYOUT"]
    assert {f.component for f in moved} == components
    assert answer.verdict == ("incompatible" if components else "identical")
    assert answer.fixable == ("safe" if components else "none")
    if components:
        pkru = moved[-1]
        assert pkru.snapshot_value.split("+")[0] == str(ours.slot(BY_NR_OF(pkru)).offset)
        assert pkru.host_value.split("+")[0] == str(theirs.slot(BY_NR_OF(pkru)).offset)


def BY_NR_OF(finding):
    return next(nr for nr, c in BY_NR.items() if c.name == finding.component)


def test_an_unknown_layout_is_no_guess():
    vcpu = Vcpu(0, area(0x207), None, layout_note="three layouts fit")
    (answer,) = check(vcpu, host())
    assert answer.verdict == "unknown"
    assert "three layouts fit" in only(answer, "LAYOUT").why


def test_what_a_layout_does_not_place_is_no_guess_either():
    """AVX lies at one place everywhere; where PKRU lies, and what it holds, is not known."""
    vcpu = Vcpu(0, area(0x207), INTEL.restricted(7), layout_note="three layouts fit", xcr0=0x207)
    (answer,) = check(vcpu, host())
    assert answer.verdict == "unknown"
    assert only(answer, "LAYOUT").component == "pkru"
    assert "where pkru lies in the area is not known (three" in only(answer, "LAYOUT").why
    (answer,) = check(vcpu, host(mask=7))
    assert only(answer, "HOST-MISSING").fix == "lossy"
    assert "value unknown" in only(answer, "HOST-MISSING").why
    assert not [f for f in answer.findings if f.code == "LAYOUT"]


@pytest.mark.parametrize("bit", [0, 1, 2, 5])
def test_bits_that_say_init_although_data_is_there(bit):
    row = area(0xE7)
    row[512:520].view("<u8")[0] &= ~np.uint64(1 << bit)
    (answer,) = check(row, host(mask=0xE7), layout=INTEL, xcr0=0xE7, cpuid=guest(0xE7))
    finding = only(answer, "INUSE")
    assert finding.component == BY_NR[bit].name
    assert finding.severity == ("risky" if bit < 2 else "note")
    assert answer.verdict == "identical"


def test_bits_that_say_in_use_over_init_data():
    row = area(0x207, live=False)
    (answer,) = check(row, host(), layout=INTEL, xcr0=0x207, cpuid=guest(0x207))
    assert {f.component for f in answer.findings if f.code == "INUSE"} == {"avx", "pkru"}


@pytest.mark.parametrize(
    ("kernel", "severity", "verdict"),
    [
        ("6.12.67", "note", "identical"),
        ("6.12.66", "blocks", "incompatible"),
        (None, "risky", "unknown"),
    ],
)
def test_live_tiles_that_xfd_disables(kernel, severity, verdict):
    amx = 0x602E7
    vcpu = Vcpu(
        0,
        area(amx, size=11008),
        INTEL,
        xcr0=amx,
        xfd=1 << 18,
        cpuid=guest(amx),
        layout_source="given",
    )
    target = host(mask=amx, kernel=kernel, xsave2_size=11008, guest_permission=1 << 18)
    (answer,) = check(vcpu, target)
    assert only(answer, "XFD").severity == severity
    assert only(answer, "XFD").fix == "lossy"
    assert answer.verdict == verdict


@pytest.mark.parametrize(("offset", "value"), [(520, 7), (527, 0x80), (528, 1), (575, 1)])
def test_dirty_headers(offset, value):
    row = area(7)
    row[offset] = value
    (answer,) = check(row, host(), layout=INTEL, xcr0=7, cpuid=guest(7))
    assert answer.verdict == "incompatible"
    assert only(answer, "FORMAT").fix == "safe"


def test_gen_0_kernels_ignore_reserved_header_bytes():
    row = area(7)
    row[530] = 1
    (answer,) = check(row, host(kernel="5.15"), layout=INTEL, xcr0=7, cpuid=guest(7))
    assert only(answer, "FORMAT").severity == "note"
    assert answer.verdict == "superset"


def test_amds_mxcsr_bit_on_intel():
    row = area(7, mxcsr=0x21F80)
    amd = host(mxcsr_mask=0x2FFFF)
    answers = check(row, [host(), amd], layout=INTEL, xcr0=7, cpuid=guest(7))
    assert [a.verdict for a in answers] == ["incompatible", "superset"]
    finding = only(answers[0], "MXCSR")
    assert (finding.snapshot_value, finding.host_value) == ("0x21f80", "0xffff")


@pytest.mark.parametrize(
    ("xcr0", "good"),
    [
        (1, True),
        (3, True),
        (7, True),
        (5, False),
        (0x27, False),
        (0xE7, True),
        (0xE3, False),
        (0x20003, False),
        (0xF, False),
        (2, False),
        (0x207, True),
    ],
)
def test_xcr0_combinations(xcr0, good):
    (answer,) = check(area(3), host(mask=0x602FF), layout=INTEL, xcr0=xcr0, cpuid=guest(0x602FF))
    assert ("XCR0" not in codes(answer)) is good


def test_pre_xsave_guest_on_kernels_that_lost_fp_and_sse():
    """Nehalem guests: before a1020a25e697 KVM refused x87 and SSE without leaf 0xD."""
    none = Cpuid((Entry(1, 0, 0, 0, 0, 0, 0),))
    answers = check(
        area(3), [host(kernel="5.18"), host(kernel="6.0")], layout=INTEL, xcr0=1, cpuid=none
    )
    assert [a.verdict for a in answers] == ["incompatible", "superset"]
    assert {f.component for f in answers[0].findings if f.code == "KERNEL"} == {"x87", "sse"}


def test_what_was_promised_and_not_used_is_a_matter_of_policy():
    subject = {"layout": INTEL, "xcr0": 7, "cpuid": guest(0xE7)}
    (answer,) = check(area(7), host(mask=7), **subject)
    assert answer.verdict == "superset"
    (answer,) = check(area(7), host(mask=7), policy="fpu", **subject)
    assert answer.verdict == "incompatible"
    ignoring = Policy("fpu", frozenset({"HOST-MISSING"}))
    (answer,) = check(area(7), host(mask=7), policy=ignoring, **subject)
    assert answer.verdict == "superset"


@pytest.mark.parametrize("bad", [{"level": "paranoid"}, {"ignore": frozenset({"NOPE"})}])
def test_policies_that_do_not_exist(bad):
    with pytest.raises(PolicyError, match=r"expected .*, got"):
        Policy(**bad)


def test_a_process_is_judged_by_other_rules():
    vcpu = Vcpu(1, area(0x207, pkru=PKRU_DEFAULT), INTEL, "note", xcr0=0x207)
    core = Snapshot("core", "elfcore", "process", "kernel", [vcpu])
    (answer,) = check(core, host(mask=7))
    assert answer.verdict == "superset"
    bigger = host(mask=0x2E7)
    (answer,) = check(
        Snapshot("c", "elfcore", "process", "kernel", [Vcpu(1, area(7), INTEL, xcr0=7)]), bigger
    )
    assert only(answer, "SIZE").severity == "risky"


def test_a_host_without_facts_is_unknown():
    (answer,) = check(area(7), Host("mystery"), layout=INTEL)
    assert answer.verdict == "unknown"


@given(
    st.integers(0, (1 << 63) - 1),
    st.sampled_from([INTEL, GENOA, None]),
    st.sampled_from([None, 7, 0x207, 0x602E7]),
    st.sampled_from([None, *BEHAVIOURS]),
    st.binary(min_size=576, max_size=4096),
)
def test_any_bytes_get_a_verdict_with_complete_findings(bv, layout, xcr0, name, data):
    row = np.frombuffer(bytearray(data), np.uint8)
    row[512:520].view("<u8")[0] = bv
    kernel = None if name is None else "6.1.55"
    vcpu = Vcpu(0, row, layout, xcr0=xcr0)
    for answer in check(vcpu, [host(kernel=kernel), Host("x"), host(mask=0x602E7)]):
        assert answer.verdict in ("identical", "superset", "incompatible", "unknown")
        blocking = [f for f in answer.findings if f.severity == "blocks"]
        assert (answer.verdict == "incompatible") == bool(blocking)
        for f in answer.findings:
            assert f.why
            assert f.ref
            assert f.fix in ("safe", "lossy", "none")
            assert f.snapshot_value
            assert f.host_value


def test_judging_one_area_is_pure_and_quick(benchmark_free_timer):
    row = area(0x207, pkru=0)
    before = row.copy()
    row.flags.writeable = False
    hosts = [host(), host(mask=7)]
    seconds = benchmark_free_timer(lambda: check(row, hosts, layout=INTEL, xcr0=7, cpuid=CPUID7))
    assert np.array_equal(row, before)
    assert seconds / 2 < 500e-6


CPUID7 = guest(7)


@pytest.fixture
def benchmark_free_timer():
    """Return the best time of a call out of many: a ceiling that a busy machine keeps."""
    import timeit

    return lambda call: min(timeit.repeat(call, number=20, repeat=20)) / 20


def test_a_host_without_xsave_takes_x87_and_sse():
    """Nehalem: KVM's supported_xcr0 is 0 there, and KVM_SET_XSAVE takes bits 0 and 1."""
    plain = Host(
        "nehalem",
        layout=Layout(()),
        xcr0=3,
        kvm_xcr0=0,
        mxcsr_mask=0xFFFF,
        features=frozenset({"sse", "fxsr"}),
        kernel=of_release("6.12"),
    )
    assert check(area(3), plain, layout=INTEL, xcr0=1)[0].verdict == "superset"
    (answer,) = check(area(7), plain, layout=INTEL, xcr0=7)
    assert answer.verdict == "incompatible"
    assert "avx" in {f.component for f in answer.findings if f.severity == "blocks"}


def test_what_only_some_kernels_refuse_is_unknown_where_the_kernel_is():
    row = area(7)
    row[528] = 1
    (answer,) = check(row, host(kernel=None), layout=INTEL, xcr0=7, cpuid=guest(7))
    assert answer.verdict == "unknown"


def test_a_guest_that_may_lack_leaf_d_is_unknown_to_kernels_that_refused_fp_and_sse():
    (answer,) = check(area(3), host(kernel="5.18"), layout=INTEL, xcr0=1)
    assert answer.verdict == "unknown"
    assert {f.component for f in answer.findings if f.code == "KERNEL"} == {"x87", "sse"}


@pytest.mark.parametrize("mask", [0x207, 0x2E7])
def test_the_host_value_of_a_leak_is_what_its_kernel_accepts(mask):
    (answer,) = check(
        area(0x207, pkru=0), host(mask=mask, kernel="5.18"), layout=INTEL, cpuid=guest(7)
    )
    assert only(answer, "LEAK").host_value == "0x7"


def test_the_vmm_must_ask_for_tiles_whoever_grants_them():
    amx = 0x602E7
    subject = {"layout": INTEL, "xcr0": amx, "cpuid": guest(amx)}
    for granted in (None, 1 << 18):
        target = host(mask=amx, xsave2_size=11008, guest_permission=granted)
        (answer,) = check(area(amx, size=11008), target, **subject)
        assert only(answer, "PERM").severity == "note"


def test_bytes_that_mpx_and_apx_share_are_mpxs():
    row = area(7)
    row[960] = 1
    (answer,) = check(row, host(), layout=INTEL, cpuid=guest(7))
    assert {f.component for f in answer.findings if f.code == "INUSE"} >= {"bndregs"}
    assert "apx" not in {f.component for f in answer.findings}


class TestWhatTheVmmMeetsFirst:
    """A VMM stops at the first call that KVM refuses, and prints its text."""

    def test_the_area_is_refused(self):
        (verdict,) = check(area(0x207, pkru=0), host(mask=7), layout=INTEL, xcr0=7)
        assert verdict.failure[:2] == ("KVM_SET_XSAVE", "EINVAL")
        texts = verdict.failure.texts()
        assert "Failed to set XSAVE: Invalid argument" in texts["QEMU 9.2 and later"]
        assert list(verdict.failure.texts("firecracker")) == ["Firecracker"]

    @pytest.mark.parametrize(("pke", "call"), [(True, "KVM_SET_SREGS"), (False, "KVM_SET_XSAVE")])
    def test_cr4_comes_before_the_area(self, pke, call):
        vcpu = Vcpu(0, area(0x207, pkru=4), INTEL, portable=True, xcr0=0x207, pkru_enabled=pke)
        (verdict,) = check(Snapshot("s", "qemu", "vm", "qemu-kvm", [vcpu]), host(mask=7))
        assert verdict.failure.call == call
        assert verdict.verdict == "incompatible"

    def test_osxsave_on_a_host_without_xsave(self):
        plain = Host("old", xcr0=3, kvm_xcr0=0, mxcsr_mask=0xFFFF, features=frozenset({"sse"}))
        (verdict,) = check(area(7), plain, layout=INTEL, xcr0=7)
        assert verdict.failure.call == "KVM_SET_SREGS"
        assert any("CR4 has OSXSAVE" in f.why for f in verdict.findings)
        assert check(area(3), plain, layout=INTEL, xcr0=1)[0].failure is None

    def test_xcr0_and_permission_and_msrs(self):
        (verdict,) = check(area(7), host(mask=7), layout=INTEL, xcr0=0xE7, cpuid=guest(0xE7))
        assert verdict.failure.call == "KVM_SET_XCRS"
        amx = host(mask=0x602E7, xsave2_size=11008, guest_permission=0)
        (verdict,) = check(area(7), amx, layout=INTEL, xcr0=0x602E7, cpuid=guest(0x602E7))
        assert verdict.failure[:2] == ("KVM_SET_CPUID2", "EPERM")
        (verdict,) = check(Vcpu(0, area(7), INTEL, xcr0=7, xss=0x1800), host(mask=7))
        assert verdict.failure.texts("qemu") == {"QEMU": "error: failed to set MSR 0xda0 to 0x1800"}
        assert verdict.settable

    def test_nothing_fails_where_bytes_would_be_misread(self):
        target = host(mask=0x207, layout=MILAN, mxcsr_mask=0x2FFFF)
        (verdict,) = check(area(0x207, ROME), target, layout=ROME, xcr0=0x207)
        assert verdict.verdict == "incompatible"
        assert verdict.failure is None

    def test_explain_knows_every_text(self):
        from xfast.judge.vmm import TEXTS
        from xfast.messages.table import message_of

        for texts in TEXTS.values():
            for text in texts.values():
                if not text.startswith(("nothing", "error: failed to set MSR")):
                    assert message_of(text), text


class TestNext:
    """Advice names the missing fact or a host that would do, and nothing that can't help."""

    def test_a_safe_fix(self):
        (verdict,) = check(area(0x207, pkru=0), host(mask=7), layout=INTEL, xcr0=7)
        first, second = next_steps(verdict)
        assert "xfast fix" in first
        assert "does not reset it" in second

    def test_dropping_does_not_help_where_xcr0_blocks_as_well(self):
        (verdict,) = check(area(0xE7), host(mask=7), layout=INTEL, xcr0=0xE7, cpuid=guest(0xE7))
        text = " ".join(next_steps(verdict))
        assert "--drop" not in text
        assert "Hosts of the catalogue that would do: intel-cascadelake, " in text
        assert "PKRU" not in text

    def test_the_missing_fact_is_named(self):
        (verdict,) = check(area(0x207, pkru=0), host(kernel=None), layout=INTEL, cpuid=guest(7))
        assert "Name the host's kernel" in next_steps(verdict)[0]
        (verdict,) = check(area(0x207, pkru=0), host(kernel="5.18"), layout=INTEL, xcr0=7)
        assert "guest's CPUID settles it" in next_steps(verdict)[0]
        (verdict,) = check(Vcpu(0, area(0x207), None, layout_note="three fit"), host())
        assert "--layout" in next_steps(verdict)[0]
        (verdict,) = check(area(7), Host("mystery"), layout=INTEL)
        assert "CPUID leaf 0xD" in next_steps(verdict)[0]

    def test_nothing_to_do(self):
        (verdict,) = check(area(7), host(mask=7), layout=INTEL, xcr0=7, cpuid=guest(7))
        assert next_steps(verdict) == ()

    def test_a_process_is_told_as_one(self):
        vcpu = Vcpu(1, area(3), INTEL, "note", xcr0=0xE7)
        core = Snapshot("core", "elfcore", "process", "kernel", [vcpu])
        (verdict,) = check(core, host(mask=7))
        text = " ".join(next_steps(verdict))
        assert "process" in text
        assert "KVM" not in text


@pytest.mark.parametrize("xcr0", [7, 0xE7])
def test_a_core_of_a_machine_with_avx_is_no_silent_superset(xcr0):
    """CPUID told the process of AVX: it may execute it at any time, used or not so far."""
    vcpu = Vcpu(1, area(3), INTEL, "note", xcr0=xcr0)
    core = Snapshot("core", "elfcore", "process", "kernel", [vcpu])
    (verdict,) = check(core, host(mask=3))
    assert verdict.verdict == "superset"
    assert verdict.risky
    told = [f for f in verdict.findings if f.code == "HOST-MISSING"]
    assert {f.severity for f in told} == {"risky"}
    assert all(f.why.startswith("The process may meet SIGILL") for f in told)
    assert not check(core, host(mask=0xE7))[0].risky or xcr0 == 7
    assert check(core, host(mask=3), policy="fpu")[0].verdict == "incompatible"


@pytest.mark.parametrize(("mask", "risky"), [(0x202E7, True), (0x2E7, False), (0x602E7, False)])
def test_half_of_amx_in_a_guests_cpuid_is_risky(mask, risky):
    """Linux 5.17 to 6.3 offered XTILE_CFG without XTILE_DATA; guests fault at XSETBV then."""
    target = host(mask=0x602E7, xsave2_size=11008, guest_permission=1 << 18)
    (verdict,) = check(area(3), target, layout=INTEL, xcr0=3, cpuid=guest(mask))
    assert ("XCR0" in codes(verdict, "risky")) == risky
    if risky:
        assert only(verdict, "XCR0").component == "tilecfg"
        assert "55cd57b596e8" in only(verdict, "XCR0").ref


def test_vcpus_that_may_be_missing_leave_the_verdict_unknown():
    snapshot = Snapshot("s", "qemu", "vm", "qemu-kvm", [Vcpu(0, area(7), INTEL, xcr0=7)])
    snapshot.doubts = ("expected 2 vCPUs, got 1",)
    (verdict,) = check(snapshot, host(mask=7))
    assert verdict.verdict == "unknown"
    assert "expected 2 vCPUs, got 1" in only(verdict, "PARTIAL").why
    snapshot.doubts = ()
    assert check(snapshot, host(mask=7))[0].verdict == "identical"


def test_fix_and_check_agree_on_criu_files(data):
    """At level fpu check said incompatible where fix said superset, and wrote."""
    import xfast

    (snapshot,) = xfast.read(data / "criu" / "criu42-regs64s-3thr")
    for target in catalogue().values():
        for level in ("xstate", "fpu", "strict"):
            plan = xfast.plan_fix(snapshot, target, policy=level)
            (verdict,) = check(snapshot, target, policy=level)
            assert plan.before.verdict == verdict.verdict
            (after,) = check(snapshot, target, policy=level)
            if not plan.changes:
                assert plan.after.verdict == after.verdict
