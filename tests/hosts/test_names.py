"""Hosts by name: models of QEMU and libvirt, CPUs as sold, cloud instances."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xfast.errors import XfastError
from xfast.hosts import resolve
from xfast.hosts.catalogue import catalogue
from xfast.hosts.derive import likely_layout
from xfast.hosts.models import (
    MAP,
    kernel_name,
    largest,
    model_named,
    models,
    qemu_name,
    read_map,
)
from xfast.hosts.names import CPUS, INSTANCES, named, suggestions
from xfast.hosts.silicon import family_and_model
from xfast.xsave.cpuid import FEATURES, psabi_level
from xfast.xsave.layout import PRESETS, Layout, Slot, recognise


@pytest.mark.parametrize(
    ("name", "xcr0", "layout", "psabi"),
    [
        ("Nehalem", 0x3, "intel", "x86-64-v2"),
        ("Skylake-Server-IBRS", 0x2E7, "intel", "x86-64-v4"),
        ("Cascadelake-Server-noTSX", 0x2E7, "intel", "x86-64-v4"),
        ("SapphireRapids", 0x602E7, "intel", "x86-64-v4"),
        ("SierraForest", 0x207, "intel", "x86-64-v3"),
        ("EPYC", 0x7, "amd-zen2", "x86-64-v3"),
        ("EPYC-Rome", 0x7, "amd-zen2", "x86-64-v3"),
        ("EPYC-Milan", 0x207, "amd-zen3", "x86-64-v3"),
        ("EPYC-Milan-v2", 0x207, "amd-zen3", "x86-64-v3"),
        ("EPYC-Genoa", 0x2E7, "amd-zen4", "x86-64-v4"),
        ("EPYC-Turin", 0x2E7, "amd-zen4", "x86-64-v4"),
    ],
)
def test_models_promise_components(name, xcr0, layout, psabi):
    host = resolve(f"{name}@6.6")
    assert host.name == f"{name}@6.6"
    assert host.xcr0 == xcr0
    assert host.kvm_xcr0 == (xcr0 if "xsave" in host.xsave else 0)
    assert host.layout is not None
    assert host.layout == PRESETS[layout].restricted(xcr0)
    assert host.features is not None
    assert psabi_level(host.features) == psabi
    assert set(host.provenance.values()) <= {"assumed", "derived"}
    assert host.provenance["features"] == "assumed"
    assert "and no more" in host.notes[0]


def test_every_model_in_the_table_is_sound():
    assert len(models()) >= 65
    for name, model in models().items():
        assert model.name == name
        assert model.features <= FEATURES.keys(), name
        assert model.source, name
        assert named(name) is not None, name


def test_models_agree_with_the_catalogue_about_their_cpus():
    """A CPU has what the model named after it promises, TSX and MPX apart: microcode took them."""
    for model, entry in (
        ("EPYC-Milan", "amd-milan"),
        ("EPYC-Genoa", "amd-genoa"),
        ("EPYC-Turin", "amd-turin"),
        ("SapphireRapids", "intel-sapphirerapids"),
        ("GraniteRapids", "intel-graniterapids"),
        ("Haswell-noTSX", "intel-haswell"),
        ("Nehalem", "intel-nehalem"),
        ("Westmere", "intel-westmere"),
    ):
        missing = models()[model].given - (catalogue()[entry].features or frozenset())
        assert missing <= {"hle", "rtm", "tsxldtrk"}, model


def test_map_of_an_installed_libvirt_is_asked_first(tmp_path):
    (tmp_path / "x86_new.xml").write_text(
        "<cpus><model name='EPYC-Milan'><decode host='on' guest='on'/>"
        "<signature family='25' model='1'/><signature family='25' model='33'/>"
        "<vendor name='AMD'/><feature name='lm'/><feature name='sse4.1'/><feature name='ibrs'/>"
        "<feature name='mpx' removed='yes'/><feature name='avx' added='yes'/></model></cpus>"
    )
    (tmp_path / "x86_son.xml").write_text(
        "<cpus><model name='Son'><model name='EPYC-Milan'/><feature name='pku'/></model></cpus>"
    )
    (tmp_path / "x86_broken.xml").write_text("<cpus><model name='Broken'>")
    (tmp_path / "arm_a.xml").write_text("<cpus><model name='Neoverse'/></cpus>")
    found = models(tmp_path)
    assert found["EPYC-Milan"].features == {"lm", "sse4_1", "avx"}
    assert found["EPYC-Milan"].vendor == "AuthenticAMD"
    assert found["EPYC-Milan"].signatures == ((25, 1), (25, 33))
    assert found["Son"].features == {"lm", "sse4_1", "avx", "pku"}
    assert found["EPYC-Rome"] == models()["EPYC-Rome"]
    assert not {"Broken", "Neoverse"} & found.keys()
    assert read_map(tmp_path / "nothing", "x") == {}


def test_version_that_is_not_in_the_table_is_its_model():
    model = model_named("EPYC-Milan-v7")
    assert model is not None
    assert model.features == models()["EPYC-Milan"].features
    assert model.source.endswith("as EPYC-Milan")
    assert model_named("EPYC-Milan-v") is None


@given(st.sampled_from(sorted(FEATURES)))
def test_names_of_features_lead_back(feature):
    assert kernel_name(qemu_name(feature)) == feature
    assert kernel_name(feature) == feature


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("Xeon Platinum 8259CL", "intel-cascadelake"),
        ("Intel(R) Xeon(R) Platinum 8175M CPU @ 2.50GHz", "intel-skylake-server"),
        ("Intel Xeon Platinum 8375C", "intel-icelake-server"),
        ("Xeon Gold 6338N", "intel-icelake-server"),
        ("Xeon Platinum 8380H", "intel-cooperlake"),
        ("Xeon Platinum 8488C", "intel-sapphirerapids"),
        ("Intel(R) Xeon(R) Platinum 8592+", "intel-emeraldrapids"),
        ("Intel(R) Xeon(R) 6975P-C", "intel-graniterapids"),
        ("Intel(R) Xeon(R) Silver 4114 CPU @ 2.20GHz", "intel-skylake-server"),
        ("Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz", "intel-broadwell"),
        ("Intel(R) Xeon(R) CPU E5-2650 v3", "intel-haswell"),
        ("Xeon E5-2630L v2", "intel-ivybridge"),
        ("Intel(R) Xeon(R) CPU E5-2670 0 @ 2.60GHz", "intel-sandybridge"),
        ("Intel(R) Xeon(R) CPU X5650 @ 2.67GHz", "intel-westmere"),
        ("AMD EPYC 7551P 32-Core Processor", "amd-naples"),
        ("AMD EPYC 7402P", "amd-rome"),
        ("AMD EPYC 7763 64-Core Processor", "amd-milan"),
        ("AMD EPYC 7R13", "amd-milan"),
        ("AMD EPYC 7B12", "amd-rome"),
        ("EPYC 9654", "amd-genoa"),
        ("AMD EPYC 9V74 80-Core Processor", "amd-genoa"),
        ("AMD EPYC 9755 128-Core Processor", "amd-turin"),
    ],
)
def test_cpus_as_sold_are_their_generation(name, entry):
    host = resolve(f"{name}@6.6") if "@" not in name else resolve(name)
    assert host.kvm_xcr0 == catalogue()[entry].with_kernel(resolve("amd-rome@6.6").kernel).kvm_xcr0
    assert host.layout == catalogue()[entry].layout
    assert host.notes == (f"taken to be {entry}",)
    assert host.provenance["layout"] == "assumed"


@pytest.mark.parametrize("name", ["Xeon Platinum 9999Z", "EPYC 1234", "Xeon", "Core i7", "E5", ""])
def test_cpus_that_nobody_sold_are_not_guessed(name):
    assert named(name) is None


@pytest.mark.parametrize(
    ("name", "xcr0", "layout"),
    [
        ("m5.metal", 0x2FF, "intel"),
        ("c5n.18xlarge", 0x2FF, "intel"),
        ("m6i.metal", 0x2E7, "intel"),
        ("c7i.metal-24xl", 0x602E7, "intel"),
        ("m7a.medium", 0x2E7, "amd-zen4"),
        ("m6a.large", 0x207, "amd-zen3"),
        ("t3a.small", 0x7, "amd-zen2"),
        ("c5ad.large", 0x7, "amd-zen2"),
        ("n2d-standard-8", 0x7, "amd-zen3"),
        ("n2-standard-4", 0x2E7, "intel"),
        ("c3-standard-176", 0x602E7, "intel"),
        ("Standard_D4s_v5", 0x2E7, "intel"),
        ("Standard_E8ads_v5", 0x207, "amd-zen3"),
    ],
)
def test_instances_have_what_all_their_cpus_have(name, xcr0, layout):
    host = resolve(name)
    assert host.kvm_xcr0 is not None
    assert host.kvm_xcr0 & 0xFFFFF == xcr0
    assert set(host.provenance.values()) == {"assumed"}
    assert host.layout is not None
    assert "docs.aws" in host.source or "google" in host.source or "microsoft" in host.source
    assert recognise(host.layout.restricted(xcr0)) is not None
    assert host.layout.restricted(xcr0).slots == PRESETS[layout].restricted(xcr0).slots


def test_instance_of_several_cpus_names_them():
    assert "taken to be amd-rome or amd-milan" in resolve("n2d-standard-8").notes[0]


def test_tables_name_entries_of_the_catalogue():
    assert {entry for _, entry in CPUS} <= catalogue().keys()
    assert {entry for row in INSTANCES for entry in row.cpus} <= catalogue().keys()


def test_suggestions_are_names_that_resolve():
    for text in ("amd-milano", "sapphire", "EPYC-Genua", "intel-haswel", "Skylake"):
        assert suggestions(text)
        for name in suggestions(text):
            assert named(name) is not None or name == "this"
    assert suggestions("\x00" * 10_000) == []


@given(st.text(max_size=40))
def test_any_text_is_a_host_or_one_line(text):
    complaint = ""
    try:
        resolve(f"nowhere/{text}")
    except XfastError as error:
        complaint = str(error)
    assert complaint
    assert "\n" not in complaint


def test_likely_layouts_agree_with_every_dump_of_the_survey(shared):
    with open(shared / "samples/cpuid/LAYOUTS.tsv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    placed = 0
    for row in rows:
        family, _ = family_and_model(int(row["cpuid1_eax"] or "0", 16))
        slots = []
        for item in row["subleaves(comp:offset+size/ecx)"].split():
            nr, _, rest = item.partition(":")
            offset, _, size = rest.partition("/")[0].partition("+")
            if int(offset):
                slots.append(Slot(int(nr), int(size), int(offset)))
        real = Layout(tuple(slots))
        mask = int(row["xcr0_mask"], 16) & 0xE02FF
        likely = likely_layout(mask, row["vendor"], family)
        assert likely is not None, row["file"]
        for slot in likely.slots:
            if slot.nr in real.by_nr and slot.offset:
                assert real.by_nr[slot.nr][:3] == slot[:3], row["file"]
                placed += 1
    assert placed > 800


@pytest.mark.parametrize(
    ("mask", "vendor", "family", "size", "places"),
    [
        (0x207, None, None, None, {2: 576}),
        (0x207, None, None, 2440, {2: 576, 9: 2432}),
        (0x207, None, None, 896, {2: 576, 9: 832}),
        (0x207, "AuthenticAMD", None, None, {2: 576}),
        (0x207, "AuthenticAMD", 25, None, {2: 576, 9: 2432}),
        (0x21F, None, None, None, {2: 576, 3: 960, 4: 1024, 9: 2688}),
        (0x207, "GenuineIntel", 6, 1, {2: 576, 9: 2688}),
    ],
)
def test_only_what_is_alike_in_all_possible_layouts_is_placed(mask, vendor, family, size, places):
    layout = likely_layout(mask, vendor, family, size)
    assert layout is not None
    assert {slot.nr: slot.offset for slot in layout.slots} == places


def test_layout_that_no_cpu_has_is_unknown():
    assert likely_layout(0x80019, "GenuineIntel") is not None
    assert likely_layout(1 << 40, "GenuineIntel") is None
    assert likely_layout(0x60007, "AuthenticAMD", 25) is None


@pytest.mark.parametrize(
    ("pool", "model"),
    [
        (["amd-milan", "amd-genoa"], "EPYC-Milan"),
        (["amd-milan", "intel-haswell"], "x86-64-v3"),
        (["intel-nehalem", "amd-milan"], "x86-64-v2"),
        (["intel-icelake-server", "intel-sapphirerapids"], "Icelake-Server-noTSX"),
        (["intel-nehalem"], "Nehalem"),
        (["amd-genoa"], "EPYC-Genoa"),
    ],
)
def test_largest_model_is_within_the_pool(pool, model):
    from xfast.hosts.baseline import common

    level = common([resolve(name) for name in pool])
    assert level.features is not None
    found = largest(level.features, level.vendor)
    assert found is not None
    assert found.given <= level.features
    assert found.name == model


def test_no_model_fits_a_cpu_of_32_bits():
    assert largest(frozenset({"fpu", "sse2"}), "GenuineIntel") is None


def test_table_is_what_its_maker_writes():
    """Where the map that it was made from is installed; else there is nothing to compare with."""
    index = MAP / "index.xml"
    if not index.is_file() or "EPYC-Genoa" in index.read_text():
        pytest.skip("libvirt 9.0's CPU map is not installed")
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("QEMU 7.2 is not installed")
    made = subprocess.run(
        [sys.executable, "docs/make_models.py", str(MAP)],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    from xfast.hosts.models import FILE

    assert made == FILE.read_text()
