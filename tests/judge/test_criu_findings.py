"""What CRIU's own --cpu-cap levels would answer: rules from its source, a dump that it made."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import xfast
from xfast.hosts.catalogue import catalogue
from xfast.hosts.model import Host
from xfast.judge.criu import COMPARED, INS, INS_ONLY, criu_findings
from xfast.judge.judgement import check
from xfast.judge.subject import subject_of
from xfast.judge.verdict import Policy
from xfast.snapshots.criu import reader as criu
from xfast.snapshots.criu.cpuinfo import CAPABILITY, cpuid_of
from xfast.snapshots.criu.wire import encoded
from xfast.xsave.cpuid import FEATURES, RUNTIME_FEATURES
from xfast.xsave.features import PKRU, XFEATURE_MASK_XTILE, bits
from xfast.xsave.layout import PRESETS

SAMPLE = Path(__file__).parents[1] / "data" / "criu" / "criu42-regs64s-3thr"
REFUSES = {level: f"criu --cpu-cap={level} refuses" for level in ("fpu", "ins", "cpu")}


@pytest.fixture
def sample():
    (snapshot,) = xfast.read(SAMPLE)
    return snapshot


def twin(snapshot, **changes) -> Host:
    """Return the machine that made the dump."""
    cpuid = snapshot.vcpus[0].cpuid
    facts = {
        "layout": PRESETS["amd-zen4"].restricted(0xE7),
        "xcr0": 0xE7,
        "features": cpuid.features - {"osxsave", "ospke"},
        "cpuid": cpuid,
    }
    return Host("twin", **{**facts, **changes})


def said(snapshot, host, policy="fpu") -> list:
    return list(criu_findings(subject_of(snapshot), host, Policy(policy)))


def levels(findings) -> set[str]:
    return {level for level, words in REFUSES.items() for f in findings if words in f.why}


def changed(snapshot, **cpuinfo):
    """Return the snapshot with other facts in cpuinfo.img; None takes a field away."""
    new = copy.deepcopy(snapshot)
    for vcpu in new.vcpus:
        vcpu.cpuinfo = replace(vcpu.cpuinfo, **cpuinfo)
        vcpu.cpuid = cpuid_of(vcpu.cpuinfo, 0)
    return new


def with_bit(snapshot, word: int, bit: int, value: int):
    words = list(snapshot.vcpus[0].cpuinfo.capability)
    words[word] = words[word] & ~(1 << bit) | value << bit
    return changed(snapshot, capability=words)


@pytest.mark.parametrize("level", ["xstate", "isa", "strict"])
def test_the_machine_that_made_the_dump_takes_it(sample, level):
    assert said(sample, twin(sample), level) == []
    (verdict,) = check(sample, twin(sample), policy=level)
    assert verdict.verdict in ("identical", "superset")


@pytest.mark.parametrize(
    ("name", "size", "missing", "refusing"),
    [
        ("amd-genoa", 2440, set(), {"fpu", "cpu"}),
        ("amd-milan", 2440, {"opmask", "zmm_hi256", "hi16_zmm"}, {"fpu", "ins", "cpu"}),
        ("intel-icelake-server", 2696, set(), {"fpu", "ins", "cpu"}),
        ("intel-haswell", 832, {"opmask", "zmm_hi256", "hi16_zmm"}, {"fpu", "ins", "cpu"}),
    ],
)
def test_the_sample_on_catalogue_hosts(sample, name, size, missing, refusing):
    findings = said(sample, catalogue()[name])
    assert levels(findings) == refusing
    sizes = [f for f in findings if f.code == "SIZE"]
    assert {(f.severity, f.snapshot_value, f.host_value) for f in sizes} == {
        ("blocks", "2432", f"{size}")
    }
    assert sizes[0].why == (
        f"criu --cpu-cap=fpu refuses: xsave size 2432 on the image, {size} on the host "
        "(CRIU asks for equal)"
    )
    assert sizes[0].ref == "CRIU criu/arch/x86/cpu.c cpu_validate_features()"
    absent = [f for f in findings if f.code == "HOST-MISSING" and f.component != "xsaves"]
    assert {f.component for f in absent} == missing
    for finding in absent:
        assert finding.snapshot_value == "0xe5"
        assert "(live in thread 23807)" in finding.why
    assert {f.severity for f in findings if f.code == "ISA"} == {"note"}
    (verdict,) = check(sample, catalogue()[name], policy="fpu")
    assert verdict.verdict == "incompatible"


def test_what_criu_compares_only_when_asked_is_risky_until_asked(sample):
    """A plain criu restore reads no cpuinfo.img; --cpu-cap=fpu does."""
    genoa = catalogue()["amd-genoa"]
    assert {f.severity for f in said(sample, genoa, "xstate") if f.code == "SIZE"} == {"risky"}
    assert [v.verdict for v in check(sample, genoa)] == ["superset"]
    assert [v.verdict for v in check(sample, genoa, policy="fpu")] == ["incompatible"]


def test_xsaves_is_asked_for(sample):
    haswell = said(sample, catalogue()["intel-haswell"])
    (finding,) = [f for f in haswell if f.component == "xsaves"]
    assert (finding.code, finding.severity) == ("HOST-MISSING", "blocks")
    without = with_bit(sample, 10, 3, 0)
    assert "xsaves" not in {f.component for f in said(without, catalogue()["intel-haswell"])}


def test_sizes_may_differ_neither_up_nor_down(sample):
    for size in (832, 2431, 2433, 11008):
        (finding,) = said(changed(sample, xsave_size=size), twin(sample))
        assert (finding.severity, finding.snapshot_value, finding.host_value) == (
            "blocks", f"{size}", "2432",
        )  # fmt: skip
        (finding,) = said(changed(sample, xsave_size_max=size), twin(sample))
        assert "xsave max size" in finding.why


def test_a_kernel_that_enables_less_changes_the_size_and_not_the_largest(sample):
    (finding,) = said(sample, twin(sample, xcr0=7))
    assert (finding.snapshot_value, finding.host_value) == ("2432", "832")
    assert finding.why.startswith("criu --cpu-cap=fpu refuses: xsave size ")


def test_components_that_no_thread_has_live(sample):
    """CRIU refuses all the same; whoever reads it sees that dropping them loses nothing."""
    target = twin(sample, layout=PRESETS["amd-zen4"].restricted(7))
    idle = copy.deepcopy(sample)
    del idle.vcpus[0]
    missing = [f for f in said(idle, target) if f.code == "HOST-MISSING"]
    assert {f.component for f in missing} == {"opmask", "zmm_hi256", "hi16_zmm"}
    assert all("(live in no thread)" in f.why for f in missing)


def test_many_threads_are_not_all_named(sample):
    many = copy.deepcopy(sample)
    many.vcpus = [copy.copy(many.vcpus[0]) for _ in range(9)]
    for i, vcpu in enumerate(many.vcpus):
        vcpu.index = i
    findings = said(many, catalogue()["amd-milan"])
    assert "(live in thread 0, 1, 2, 3 and 5 more)" in findings[0].why
    assert len(findings) == len(said(sample, catalogue()["amd-milan"]))  # once, not once a thread


def test_sse_and_bndregs_are_never_compared(sample):
    """CRIU clears them in the mask by a slip: 0xe5 is what it makes of 0xe7."""
    assert 0xE7 & COMPARED == sample.vcpus[0].cpuinfo.xfeatures_mask == 0xE5
    mpx = Host("mpx", layout=PRESETS["intel"].restricted(0x1F), xcr0=0x1F)
    assert mpx.layout.user_mask & COMPARED == 0x15
    assert list(bits(COMPARED)) == [0, 2, 4, 5, 6, 7, 9]
    for mask in (0xE5, 0xE7, 0xED, 0x600E5):
        assert said(changed(sample, xfeatures_mask=mask), twin(sample)) == []


def test_what_old_images_do_not_tell_is_taken_as_equal(sample):
    old = changed(sample, xfeatures_mask=None, xsave_size=None, xsave_size_max=None)
    assert said(old, catalogue()["amd-genoa"])[0].code == "ISA"
    assert "fpu" not in levels(said(old, catalogue()["amd-milan"]))
    version_1 = sample.vcpus[0].cpuinfo.capability[:12]
    older = changed(sample, capability=version_1, capability_ver=1)
    assert "cpu" not in levels(said(older, catalogue()["amd-genoa"]))


@pytest.mark.parametrize("policy", ["xstate", "fpu", "isa", "strict"])
def test_ins_and_cpu_weigh_what_the_policy_asks(sample, policy):
    host = twin(sample, features=twin(sample).features - {"sha_ni"})
    ins, cpu = said(sample, host, policy)
    assert levels([ins]) == {"ins"}
    assert (ins.code, ins.component) == ("ISA", "sha_ni")
    assert ins.severity == ("blocks" if policy in ("isa", "strict") else "note")
    assert levels([cpu]) == {"cpu"}
    assert cpu.severity == ("blocks" if policy == "strict" else "note")
    assert (cpu.snapshot_value, cpu.host_value) == ("sha_ni", "none")


def test_ins_does_not_ask_for_fma_and_cpu_does(sample):
    host = twin(sample, features=twin(sample).features - {"fma"})
    assert levels(said(sample, host)) == {"cpu"}


def test_a_richer_host_is_refused_by_cpu_only(sample):
    host = twin(sample, features=twin(sample).features | {"pku"})
    (finding,) = said(sample, host, "strict")
    assert (finding.severity, finding.host_value) == ("blocks", "pku")
    assert levels([finding]) == {"cpu"}


def test_ins_says_whether_the_instructions_have_live_state(sample):
    milan = said(sample, catalogue()["amd-milan"])
    (ins,) = [f for f in milan if REFUSES["ins"] in f.why]
    assert ins.why.endswith("whose state is live in thread 23807")


@pytest.mark.parametrize("feature", INS_ONLY, ids=lambda f: f.name)
def test_features_that_only_criu_asks_for(sample, feature):
    """They are compared where the host's CPUID is known, and else told of."""
    (word,) = [
        word
        for word, place in CAPABILITY.items()
        if place == (feature.leaf, feature.subleaf, feature.register)
    ]
    image = with_bit(sample, word, feature.bit, 1)
    lacks = twin(sample, cpuid=with_bit(sample, word, feature.bit, 0).vcpus[0].cpuid)
    ins, cpu = said(image, lacks)
    assert (levels([ins]), levels([cpu])) == ({"ins"}, {"cpu"})
    assert (ins.component, cpu.snapshot_value) == (feature.name, feature.name)
    (finding,) = said(image, lacks.replace(cpuid=None))
    assert finding.severity == "note"
    assert feature.name in finding.snapshot_value
    assert levels([finding]) == set()


def test_the_tables_name_features_that_exist():
    assert FEATURES.keys() >= INS
    assert not FEATURES.keys() & {f.name for f in INS_ONLY}
    for name in INS:
        feature = FEATURES[name]
        assert (feature.leaf, feature.subleaf, feature.register) in CAPABILITY.values()


FPU_BITS = {(0, 0), (0, 24), (4, 27), (10, 3)}
INS_BITS = {
    0: (0, 4, 8, 11, 15, 19, 23, 24, 25, 26),
    1: (11, 22, 27, 30, 31),
    4: (0, 1, 3, 9, 13, 19, 20, 22, 23, 25, 26, 27, 28, 29, 30),
    6: (5, 6, 7, 8, 11, 16, 21),
    9: (0, 3, 4, 5, 8, 9, 11, 14, 16, 17, 18, 19, 23, 26, 27, 28, 29, 30, 31),
    10: (0, 1, 2),
    11: (1, 6, 8, 9, 10, 11, 12, 13, 14, 22),
    13: (0,),
    18: (2, 3),
}
"""Word and bits that CRIU's table of instruction capabilities has, rep_good and nopl left out."""

NAMED = [
    (word, f.bit)
    for word, place in CAPABILITY.items()
    for f in (*FEATURES.values(), *INS_ONLY)
    if (f.leaf, f.subleaf, f.register) == place and f.name not in RUNTIME_FEATURES | {"xsave"}
]


@given(
    here=st.sets(st.sampled_from(NAMED), max_size=6),
    there=st.sets(st.sampled_from(NAMED), max_size=6),
    mask=st.sampled_from([0xE5, 0x5, 0x2E5, 0x205, 0x15]),
    size=st.sampled_from([2432, 2440, 832]),
)
def test_every_level_answers_as_crius_own_words_do(here, there, mask, size):
    """CRIU compares words of bits; here that is done bit by bit, and must come to the same."""
    (sample,) = xfast.read(SAMPLE)
    ours, theirs = flipped(sample, here), flipped(sample, there)
    image = changed(sample, capability=ours, xfeatures_mask=mask, xsave_size=size)
    host = twin(changed(sample, capability=theirs))
    lacking = {(w, b) for w, _ in enumerate(ours) for b in bits(ours[w] & ~theirs[w])}
    refuses = set()
    if lacking & FPU_BITS or mask & ~0xE5 or size != 2432:
        refuses.add("fpu")
    if any((w, b) in lacking for w, some in INS_BITS.items() for b in some):
        refuses.add("ins")
    if ours != theirs:
        refuses.add("cpu")
    assert levels(said(image, host)) == refuses


def flipped(snapshot, places) -> list[int]:
    words = list(snapshot.vcpus[0].cpuinfo.capability)
    for word, bit in places:
        words[word] ^= 1 << bit
    return words


def test_unknown_facts_stay_unknown(sample):
    bare = twin(sample, layout=None, features=None, cpuid=None)
    findings = said(sample, bare, "strict")
    assert {f.severity for f in findings} == {"risky"}
    assert all(f.open for f in findings)
    assert {f.host_value for f in findings} == {"unknown"}
    assert {f.code for f in findings} == {"HOST-MISSING", "SIZE"}
    (verdict,) = check(sample, bare, policy="fpu")
    assert verdict.verdict == "unknown"
    (verdict,) = check(sample, bare, policy=Policy("fpu", frozenset({"HOST-MISSING", "SIZE"})))
    assert verdict.verdict != "unknown"
    unplaced = twin(sample, layout=PRESETS["amd-zen4"].restricted(0x27))
    assert {f.host_value for f in said(sample, unplaced) if f.code == "SIZE"} == {"unknown"}


def test_a_host_without_xsave_is_refused_with_or_without_cpuinfo(sample):
    for snapshot in (sample, without_cpuinfo(sample)):
        (finding,) = said(snapshot, catalogue()["intel-core2"])
        assert (finding.code, finding.severity) == ("HOST-MISSING", "blocks")
        assert finding.ref == "CRIU criu/arch/x86/crtools.c valid_xsave_frame()"


def without_cpuinfo(snapshot):
    new = copy.deepcopy(snapshot)
    for vcpu in new.vcpus:
        vcpu.cpuinfo = None
        vcpu.cpuid = None
    return new


def test_without_cpuinfo_there_is_nothing_to_compare(sample):
    assert said(without_cpuinfo(sample), catalogue()["amd-milan"]) == []


class TestTiles:
    def test_amx_on_the_dumping_cpu(self, sample):
        image = with_bit(sample, 18, 24, 1)
        notes = [f for f in said(image, twin(sample)) if f.component == "tiledata"]
        assert [(f.code, f.severity) for f in notes] == [("SIZE", "note")]
        assert "no field for tiles" in notes[0].why

    def test_amx_on_the_host_matters_where_the_dumping_cpu_is_unknown(self, sample):
        host = catalogue()["intel-sapphirerapids"]
        (finding,) = said(without_cpuinfo(sample), host)
        assert (finding.code, finding.severity, finding.component) == ("SIZE", "note", "tiledata")
        assert "tiledata" not in {f.component for f in said(sample, host)}

    def test_tiles_that_a_thread_had_are_lost(self, sample):
        lost = copy.deepcopy(sample)
        lost.vcpus[1].area[512:520].view("<u8")[0] |= XFEATURE_MASK_XTILE
        finding = said(lost, catalogue()["intel-sapphirerapids"])[0]
        assert (finding.code, finding.severity) == ("SIZE", "risky")
        assert "thread 23809" in finding.why


def test_other_snapshots_are_none_of_crius_business(sample):
    sample.producer = "kernel"
    assert said(sample, catalogue()["amd-milan"]) == []


def test_ignored_rules_are_notes_here_too(sample):
    genoa = catalogue()["amd-genoa"]
    (verdict,) = check(sample, genoa, policy=Policy("fpu", frozenset({"SIZE"})))
    assert verdict.verdict == "superset"
    assert {f.severity for f in verdict.findings if f.code == "SIZE"} == {"note"}


def test_a_fix_says_what_cpuinfo_still_tells(sample):
    """The plan mends the threads' registers; CRIU's comparison of machines it can't."""
    words = ["opmask", "zmm_hi256", "hi16_zmm"]
    plan = xfast.plan_fix(sample, catalogue()["amd-milan"], drop=words, even_if_live=True)
    plan.require_restorable()
    told = [note for note in plan.notes if note.startswith("cpuinfo.img stays as it is: ")]
    assert len(told) == 5
    assert "opmask (live in no thread)" in told[0]
    assert not xfast.plan_fix(sample, twin(sample)).notes


def test_pkru_of_a_real_image_is_two_numbers(tmp_path):
    """struct pkru_state has 8 bytes, and CRIU stores all of it."""
    number, message = (
        encoded,
        lambda nr, data: encoded(nr << 3 | 2) + encoded(len(data)) + data,
    )
    xsave = (
        number(1 << 3)
        + number(PKRU | 7)
        + (number(8 << 3) + number(0x54))
        + (number(8 << 3) + number(0))
    )
    legacy = [(field, 1) for field in range(1, 9)] + [(9, 32), (10, 64)]
    words = b"".join(number(field << 3) + number(0) for field, n in legacy for _ in range(n))
    info = message(2, message(3, words + message(13, xsave)))
    core = number(1 << 3) + number(1) + info
    head = b"".join(
        value.to_bytes(4, "little") for value in (criu.IMG_COMMON_MAGIC, criu.CORE_MAGIC, len(core))
    )
    path = tmp_path / "core-5.img"
    path.write_bytes(head + core)
    (snapshot,) = xfast.read(path)
    assert snapshot.vcpus[0].area[2688] == 0x54


def test_cloud_hypervisors_two_copies_that_differ(data):
    (snapshot,) = xfast.read(data / "vmm" / "ch-state.json")
    host = catalogue()["amd-genoa"]

    def notes():
        (verdict,) = check(snapshot, host)
        return [f for f in verdict.findings if "KVM_SET_FPU" in f.why]

    assert notes() == []
    snapshot.vcpus[1].fpu_differs = ("fcw", "xmm")
    (finding,) = notes()
    assert (finding.code, finding.severity, finding.vcpu) == ("INUSE", "note", 1)
    assert "differ in fcw, xmm: " in finding.why
