"""The table of kernel behaviours, and the formulas that read it."""

import itertools
import re
from pathlib import Path

import pytest

from xfast.kernels import behaviour
from xfast.kernels.behaviour import (
    BEHAVIOURS,
    Behaviours,
    accepted,
    has_landed,
    kvm_supported_xcr0,
    kvm_supported_xss,
    loaded,
    of_release,
    parse_version,
    refusal,
    reported,
    supervisor_kept,
    supervisor_supported,
    user_supported,
    user_xfeatures,
)
from xfast.kernels.guest import xcr0_problem

HOST, GUEST = 0x2E7, 7
GENERATIONS = {
    "0": ("5.10.262", "5.15.200"),
    "a": ("5.16", "5.16.12", "5.17-rc5"),
    "b1": ("5.16.13", "5.17-rc6", "5.17", "5.18.19", "5.19.11"),
    "b2": ("5.19.12", "6.0", "6.1.59", "6.5.8", "6.6-rc5"),
    "c": ("6.1.60", "6.1.192-1-amd64", "6.5.9", "6.6-rc6", "v6.6", "6.18.44-fc", "7.3.4"),
}
MASKS = {
    # before KVM_SET_CPUID2: reported, accepted; after it: reported, accepted
    "0": (3, HOST, 7, HOST),
    "a": (HOST, HOST, HOST, HOST),
    "b1": (HOST, HOST, 7, 7),
    "b2": (HOST, HOST, 7, 7),
    "c": (3, HOST, 7, HOST),
}


@pytest.mark.parametrize(
    ("generation", "release"),
    [(g, r) for g, releases in GENERATIONS.items() for r in releases],
)
def test_each_release_behaves_as_its_generation(generation, release):
    kernel = of_release(release)
    assert kernel.provenance == "assumed"
    found = []
    for guest in (None, GUEST):
        user = user_xfeatures(kernel, HOST, guest)
        found += [reported(kernel, user, guest or 0), accepted(kernel, user, HOST)]
    assert tuple(found) == MASKS[generation]


def test_a_guest_without_xsave_keeps_x87_and_sse_since_a1020a25e697():
    for release, kept in (("5.18.2", 0), ("6.0", 3), ("6.6", 3)):
        kernel = of_release(release)
        assert reported(kernel, user_xfeatures(kernel, HOST, 0), 0) == kept


def test_every_row_cites_a_commit_and_a_release():
    commits = [row.commit for row in BEHAVIOURS.values()]
    assert len(set(commits)) == len(commits)
    for row in BEHAVIOURS.values():
        assert re.fullmatch(r"[0-9a-f]{12}", row.commit)
        assert row.ref.startswith(f'Linux kernel commit {row.commit} ("{row.subject}") (in v')
        assert re.search(r"\(in v\d+\.\d+\)$", row.ref)
        mainline, *stable = (parse_version(text) for text in row.since)
        assert all(version < mainline for version in stable)
        assert all(version[3] == 0 for version in stable)
        assert row.effect


def test_rows_are_in_the_order_in_which_they_landed():
    versions = [parse_version(row.since[0])[:2] for row in BEHAVIOURS.values()]
    assert versions == sorted(versions)


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_a_stable_series_has_it_from_its_release_on(name):
    row = BEHAVIOURS[name]
    for text in row.since[1:]:
        major, minor, patch, _ = parse_version(text)
        assert has_landed(row, (major, minor, patch, 0))
        assert has_landed(row, (major, minor, patch + 1, 0))
        assert not has_landed(row, (major, minor, patch - 1, 0))
    major, minor, patch, rc = parse_version(row.since[0])
    assert has_landed(row, (major, minor, 0, 0))
    assert not has_landed(row, (major, minor, patch, rc - 1))


@pytest.mark.parametrize("name", sorted(BEHAVIOURS.keys() - {"copies-dynamic", "get-cpuid2-count"}))
def test_each_behaviour_is_read_by_the_formulas_or_the_model(name):
    """All but the two that change no byte of what the model returns."""
    package = Path(behaviour.__file__).parents[1]
    sources = [*(package / "kernels").glob("*.py"), *(package / "kvm").glob("*.py")]
    uses = sum(path.read_text().count(f'"{name}"') for path in sources)
    assert uses >= 2


def test_a_name_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="user-xfeatures-guset"):
        Behaviours(frozenset({"user-xfeatures-guset"}))


@pytest.mark.parametrize("text", ["", "six", "v", "6", "linux"])
def test_a_release_must_be_one(text):
    with pytest.raises(ValueError, match="kernel release"):
        parse_version(text)


def test_candidates_come_before_their_release():
    texts = ["5.16.20", "5.17-rc5", "5.17-rc6", "5.17", "5.17.1", "v6.6-rc6", "6.6"]
    versions = [parse_version(text) for text in texts]
    assert versions == sorted(versions)


def test_what_kernels_can_enable():
    expected = {
        "5.15": (0x2FF, 0x400),
        "5.16": (0x602FF, 0x400),
        "6.5": (0x602FF, 0x400),
        "6.6": (0x602FF, 0xC00),
        "6.16": (0xE02FF, 0xC00),
        "6.17": (0xE02FF, 0x1C00),
    }
    for release, (user, supervisor) in expected.items():
        kernel = of_release(release)
        assert (user_supported(kernel), supervisor_supported(kernel)) == (user, supervisor)


def test_what_kvm_offers():
    everything = 0xE02FF
    assert kvm_supported_xcr0(of_release("5.16"), everything) == 0x2FF
    assert kvm_supported_xcr0(of_release("5.17"), everything) == 0x602FF
    assert kvm_supported_xcr0(of_release("7.0"), everything) == 0x602FF
    assert kvm_supported_xcr0(of_release("7.0"), everything, "AuthenticAMD") == 0x602E7
    assert kvm_supported_xss(of_release("6.17"), 0x1C00) == 0
    assert kvm_supported_xss(of_release("6.18"), 0x1C00) == 0x1800
    assert kvm_supported_xss(of_release("6.18"), 0x800) == 0


def test_supervisor_bits_survive_set_xsave():
    kept = [supervisor_kept(of_release(r)) for r in ("5.15", "5.16", "6.5", "6.6", "7.0")]
    assert kept == [0, 0x8500, 0x8500, 0x9D00, 0x9D00]


def test_xfd_clears_bits_of_the_input_only_with_the_fix():
    assert loaded(of_release("6.12.66"), 0x60007, 0x40000) == 0x60007
    assert loaded(of_release("6.12.67"), 0x60007, 0x40000) == 0x20007


AREA = {"xstate_bv": 7, "xcomp_bv": 0, "reserved": False, "mxcsr": 0x1F80}
FACTS = {"user": HOST, "kvm_xcr0": HOST, "mxcsr_mask": 0xFFFF}


@pytest.mark.parametrize(
    ("change", "old", "new"),
    [
        ({}, None, None),
        ({"xstate_bv": 1 << 61}, ("xstate_bv", 1 << 61), ("xstate_bv", 1 << 61)),
        ({"xcomp_bv": 1 << 63}, None, ("xcomp_bv", 1 << 63)),
        ({"reserved": True}, None, ("reserved", 0)),
        ({"mxcsr": 0x11F80}, ("mxcsr", 0x10000), ("mxcsr", 0x10000)),
        ({"mxcsr": 0x11F80, "xstate_bv": 0x20}, ("mxcsr", 0x10000), None),
        (
            {"xstate_bv": 1 << 61, "xcomp_bv": 1, "reserved": True, "mxcsr": 1 << 31},
            ("xstate_bv", 1 << 61),
            ("xstate_bv", 1 << 61),
        ),
        ({"xcomp_bv": 1, "reserved": True, "mxcsr": 1 << 31}, ("mxcsr", 1 << 31), ("xcomp_bv", 1)),
    ],
)
def test_the_first_rule_that_an_area_breaks(change, old, new):
    assert refusal(of_release("5.15"), **{**AREA, **change}, **FACTS) == old
    assert refusal(of_release("6.6"), **{**AREA, **change}, **FACTS) == new


def test_a_host_without_xsave_takes_x87_and_sse():
    kernel = of_release("6.6")
    assert refusal(kernel, **{**AREA, "xcomp_bv": 5}, **FACTS, xsave=False) == ("xstate_bv", 4)
    assert refusal(kernel, **{**AREA, "xstate_bv": 3, "xcomp_bv": 5}, **FACTS, xsave=False) is None


def test_xcr0_rules_against_a_table_of_all_combinations():
    """Every value of nine bits, by the SDM's wording: groups that come together, and orders."""
    limit = 0x602FF
    low = [1 << nr for nr in (0, 1, 2, 3, 4, 5, 6, 7, 9, 17, 18)]
    for chosen in itertools.product((0, 1), repeat=len(low)):
        value = sum(bit for bit, yes in zip(low, chosen, strict=True) if yes)
        x87, sse, avx, bndregs, bndcsr, opmask, zmm, hi16, _, cfg, data = chosen
        legal = (
            x87
            and (sse or not avx)
            and bndregs == bndcsr
            and opmask == zmm == hi16
            and (avx or not opmask)
            and cfg == data
        )
        assert bool(legal) == (xcr0_problem(value, limit) == ""), hex(value)
    assert "0x80000" in xcr0_problem(0x80007, limit)
    assert xcr0_problem(1, 0) == ""
