"""What repeats is judged once, and comes out as if each vCPU had been judged by itself."""

import numpy as np
import pytest
from helpers.one_by_one import judge_one_by_one, together
from hypothesis import given, settings
from hypothesis import strategies as st

import xfast
from xfast.hosts.catalogue import catalogue
from xfast.hosts.model import Host
from xfast.judge import findings, judgement
from xfast.judge.judgement import check
from xfast.kernels.behaviour import of_release
from xfast.snapshots.model import Snapshot, Stack, Vcpu
from xfast.snapshots.sorts import classes_of
from xfast.xsave.area import Groups
from xfast.xsave.cpuid import Cpuid, Entry
from xfast.xsave.layout import PRESETS, Layout, preset

KERNELS = ("5.15", "5.16", "5.18", "6.0", "6.6", "6.12.66", "6.19")
HOSTS = [
    host if release is None else host.with_kernel(of_release(release))
    for host in catalogue().values()
    for release in (None, *KERNELS)
]
INTEL = preset("intel")


def area(bv=7, xcomp=0, reserved=0, mxcsr=0x1F80, size=4096, pkru=0, fill=()) -> np.ndarray:
    row = np.zeros(size, np.uint8)
    row[:2].view("<u2")[0] = 0x37F
    row[24:28].view("<u4")[0] = mxcsr
    row[512:536].view("<u8")[:] = bv, xcomp, reserved
    for place in fill:
        row[place % size] |= 1
    row[512:520].view("<u8")[0] = bv
    if size >= 2696:
        row[2688:2692].view("<u4")[0] = pkru
    return row


def cpuid(mask: int, xss: int = 0, leaf_1: int = 0) -> Cpuid:
    rows = {(0xD, 0): (mask & 0xFFFFFFFF, 576, 0, 0), (0xD, 1): (15, 0, xss, 0)}
    return Cpuid.from_rows({(1, 0): (0, 0, leaf_1, 0), **rows})


MASKS = (0, 1, 3, 7, 0xE7, 0x207, 0x2E7, 0x602E7, 0x1F, 0x800 | 7, 1 << 62 | 7)
AREAS = st.builds(
    area,
    bv=st.sampled_from(MASKS),
    xcomp=st.sampled_from([0, 0, 0, 7, 1 << 63 | 0x207]),
    reserved=st.sampled_from([0, 0, 0, 1]),
    mxcsr=st.sampled_from([0x1F80, 0x1FA0, 0x21F80]),
    size=st.sampled_from([832, 4096, 11008]),
    pkru=st.sampled_from([0, 0x55555554, 0x1234]),
    fill=st.lists(st.sampled_from([32, 160, 576, 960, 1088, 2816, 2700]), max_size=4),
)
TOLD = st.fixed_dictionaries(
    {
        "layout": st.sampled_from([None, INTEL, *PRESETS.values(), INTEL.restricted(7)]),
        "layout_source": st.sampled_from(["given", "cpuid", "unknown"]),
        "layout_note": st.sampled_from(["", "three layouts fit"]),
        "portable": st.booleans(),
        "xcr0": st.sampled_from([None, *MASKS]),
        "xss": st.sampled_from([None, 0, 0x800, 0x1800]),
        "xfd": st.sampled_from([None, 0, 1 << 18]),
        "cpuid": st.sampled_from([None, *(cpuid(mask, 0x1800, 1 << 28) for mask in MASKS)]),
        "guest_mask": st.sampled_from([None, *MASKS]),
        "pkru_enabled": st.sampled_from([None, False, True]),
        "msrs": st.sampled_from([None, (0xDA0,)]),
        "fpu_differs": st.sampled_from([(), ("fcw",)]),
    }
)
VCPUS = st.builds(lambda row, told: Vcpu(0, row, **told), AREAS, TOLD)


def numbered(vcpus) -> list[Vcpu]:
    for i, vcpu in enumerate(vcpus):
        vcpu.index = i
    return vcpus


@given(
    vcpus=st.lists(VCPUS, min_size=1, max_size=4).map(numbered),
    kind=st.sampled_from([("vm", "qemu-kvm"), ("vm", ""), ("process", "kernel")]),
    hosts=st.lists(st.sampled_from([*HOSTS, Host("mystery")]), min_size=1, max_size=4),
    level=st.sampled_from(["xstate", "fpu", "isa", "strict"]),
)
@settings(max_examples=150)
def test_each_vcpu_is_judged_as_if_it_were_alone(vcpus, kind, hosts, level):
    snapshot = Snapshot("s", "raw", *kind, vcpus)
    for host, verdict in zip(hosts, check(snapshot, hosts, policy=level), strict=True):
        slow = judge_one_by_one(snapshot, host, level)
        assert (verdict.verdict, verdict.fixable, verdict.findings) == slow
        assert (verdict.snapshot, verdict.host) == ("s", host.name)


@given(
    rows=st.lists(AREAS.filter(lambda row: row.size == 4096), min_size=1, max_size=5),
    order=st.lists(st.integers(0, 4), min_size=1, max_size=40),
    told=st.lists(TOLD, min_size=1, max_size=2),
    host=st.sampled_from(HOSTS),
)
@settings(max_examples=60)
def test_a_stack_is_judged_as_its_areas_are_one_by_one(rows, order, told, host):
    areas = np.stack([rows[i % len(rows)] for i in order])
    kinds = [Vcpu(0, areas[0], **one) for one in told]
    sort_of = np.arange(len(areas), dtype=np.uint32) % len(kinds)

    def make(kind, i, row):
        return Vcpu(i, row, **told[kinds.index(kind)]) if len(kinds) == 1 else Vcpu(
            i, row, **told[int(sort_of[i])]
        )  # fmt: skip

    groups = Groups(*(kind.layout or Layout(()) for kind in kinds))
    for first in range(0, len(areas), 7):
        groups.add(areas[first : first + 7], sort_of[first : first + 7])
    stack = Stack(areas, kinds, classes_of(groups), sort_of, make)
    snapshot = Snapshot("s", "raw", "vm", "kvm", stack)
    (verdict,) = check(snapshot, host)
    word, fixable, slow = judge_one_by_one(snapshot, host)
    assert (verdict.verdict, verdict.fixable) == (word, fixable)
    assert len(set(verdict.findings)) == len(verdict.findings)
    assert set(verdict.findings) == together(slow)
    weights = [f.severity for f in verdict.findings]
    assert weights == sorted(weights, key=["blocks", "risky", "note"].index)


def every_sample(folder):
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size < 1 << 20:
            try:
                yield from xfast.read(path)
            except (xfast.XfastError, OSError):
                continue


def test_every_sample_on_every_host_under_every_kernel(data):
    """Finding by finding, in the order in which one judge after the other would tell them."""
    samples = [s for s in every_sample(data) if len(s.vcpus) <= 8]
    samples += xfast.read(data / "criu" / "criu42-regs64s-3thr")
    assert len(samples) > 20
    for i, snapshot in enumerate(samples):
        hosts = HOSTS[i % 7 :: 7]  # each host with each kernel comes by many times
        for host, verdict in zip(hosts, check(snapshot, hosts), strict=True):
            slow = judge_one_by_one(snapshot, host)
            assert (verdict.verdict, verdict.fixable, verdict.findings) == slow


@pytest.fixture
def calls(monkeypatch):
    """Count how often each rule is asked."""
    counts = dict.fromkeys(findings.FUNCTIONS, 0)

    def counting(code, function):
        def count(*arguments):
            counts[code] += 1
            return function(*arguments)

        return count

    for code, function in findings.FUNCTIONS.items():
        monkeypatch.setitem(findings.FUNCTIONS, code, counting(code, function))
    judgement.forget()
    yield counts
    judgement.forget()


def test_what_repeats_is_judged_once(calls):
    """64 vCPUs of two files on a hundred hosts that differ in nothing but their names."""
    host = catalogue()["intel-haswell"]
    hosts = [host.replace(name=f"host{i}", source=f"rack {i}") for i in range(100)]
    for name in ("one", "two"):
        vcpus = [Vcpu(i, area(0x207), INTEL, xcr0=7) for i in range(64)]
        verdicts = check(Snapshot(name, "raw", "vm", "kvm", vcpus), hosts)
        assert [v.host for v in verdicts] == [h.name for h in hosts]
        assert {v.snapshot for v in verdicts} == {name}
        assert len({id(v.judgement) for v in verdicts}) == 1
        assert {f.vcpu for f in verdicts[0].findings} == set(range(64))
    assert set(calls.values()) == {1}


def test_hosts_that_would_do_the_same_share_a_judgement(calls):
    host = catalogue()["intel-haswell"]
    hosts = [host.with_kernel(of_release(f"6.{minor}")) for minor in (6, 8, 10, 12)]
    verdicts = check(area(7), hosts, layout=INTEL, xcr0=7)
    assert len({id(v.judgement) for v in verdicts}) == 1
    assert set(calls.values()) == {1}


def test_a_changed_area_is_judged_anew():
    row = area(7)
    host = catalogue()["intel-haswell"]
    assert check(row, host, layout=INTEL)[0].verdict != "incompatible"
    row[512:520].view("<u8")[0] = 0x207
    assert check(row, host, layout=INTEL)[0].verdict == "incompatible"


def test_layouts_that_are_equal_keep_their_names():
    """Layouts compare by their slots; a finding cites the name of the one that was given."""
    one, two = (preset("intel").restricted(7) for _ in range(2))
    object.__setattr__(two, "name", "another name")
    unplaced = catalogue()["amd-milan"].replace(layout=preset("amd-zen3").restricted(0))
    for layout in (one, two):
        (verdict,) = check(area(7, fill=[576]), unplaced, layout=layout)
        (finding,) = [f for f in verdict.findings if f.code == "LAYOUT"]
        assert finding.snapshot_value == layout.name


def test_a_stack_of_many_areas_has_few_findings(tmp_path):
    path = tmp_path / "stack.npy"
    rows = np.stack([area(0x207 if i % 3 == 1 else 7, fill=[160]) for i in range(300)])
    rows[:, 28:32].view("<u4")[:] = 0xFFFF
    np.save(path, rows)
    (snapshot,) = xfast.read(path)
    assert isinstance(snapshot.vcpus, Stack)
    (verdict,) = check(snapshot, catalogue()["intel-haswell"].with_kernel(of_release("6.12")))
    found = [(f.code, f.component, f.vcpu, f.count) for f in verdict.findings]
    assert ("LEAK", "pkru", 1, 100) in found or ("HOST-MISSING", "pkru", 1, 100) in found
    assert verdict.findings[0].as_json()["count"] == 100
    assert len(found) < 10
    assert [vcpu.index for vcpu in snapshot.vcpus[-2:]] == [298, 299]
    assert np.array_equal(snapshot.vcpus[17].area, rows[17])


def test_a_row_that_is_no_area_is_named_by_its_offset(tmp_path):
    rows = np.stack([area(7) for _ in range(300)])
    rows[270] = 0xEE
    path = tmp_path / "bad.npy"
    np.save(path, rows)
    with pytest.raises(xfast.FormatError) as error:
        xfast.read(path)
    assert error.value.offset == 128 + 270 * 4096


def test_entries_that_differ_in_what_no_rule_reads_are_one(calls):
    """Each vCPU's CPUID has an APIC id of its own, and no verdict depends on it."""
    base = cpuid(7).entries
    vcpus = [
        Vcpu(i, area(7), INTEL, cpuid=Cpuid((*base, Entry(0xB, 0, 1, 0, 0, 0, i))))
        for i in range(8)
    ]
    check(Snapshot("s", "raw", "vm", "kvm", vcpus), catalogue()["intel-haswell"])
    assert set(calls.values()) == {1}


@settings(max_examples=60)
@given(st.lists(AREAS, min_size=1, max_size=3), st.sampled_from(MASKS), st.sampled_from(HOSTS))
def test_a_host_suits_where_its_judgement_speaks_against_nothing(areas, xcr0, host):
    vcpus = [Vcpu(i, one, INTEL, "given", xcr0=xcr0) for i, one in enumerate(areas)]
    (verdict,) = check(Snapshot("x", "raw", "vm", None, vcpus), host)
    subject, facts, policy = verdict.judgement.asked
    speaks = any(f.open or f.severity in ("blocks", "risky") for f in verdict.findings)
    assert judgement.suits(subject, facts, policy) == (not speaks)
    assert speaks or verdict.verdict in ("identical", "superset")
