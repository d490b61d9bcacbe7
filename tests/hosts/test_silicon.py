"""What CPUs do that CPUID does not tell: the table by family and model."""

import pytest

from xfast.hosts.catalogue import catalogue
from xfast.hosts.silicon import GENERATIONS, family_and_model, generation


@pytest.mark.parametrize(
    ("signature", "expected"),
    [
        (0x00A00F11, (25, 1)),  # EPYC 7003, Milan
        (0x00A10F11, (25, 17)),  # EPYC 9004, Genoa
        (0x00830F10, (23, 49)),  # EPYC 7002, Rome
        (0x000806F8, (6, 143)),  # Sapphire Rapids
        (0x00050657, (6, 85)),  # Cascade Lake
        (0x000106A3, (6, 26)),  # Nehalem
        (0x00000543, (5, 4)),  # before there were extended fields
    ],
)
def test_family_and_model_of_leaf_1(signature, expected):
    assert family_and_model(signature) == expected


@pytest.mark.parametrize(
    ("vendor", "family", "model", "bits"),
    [
        ("AuthenticAMD", 25, 1, 48),
        ("AuthenticAMD", 25, 17, 57),
        ("AuthenticAMD", 23, 49, 48),
        ("GenuineIntel", 6, 85, 48),
        ("GenuineIntel", 6, 106, 57),
        ("GenuineIntel", 6, 143, 57),
    ],
)
def test_the_width_of_x87s_pointers(vendor, family, model, bits):
    assert generation(vendor, family, model).x87_pointer_bits == bits


@pytest.mark.parametrize(
    ("vendor", "family", "model"),
    [
        ("AuthenticAMD", 25, None),
        ("AuthenticAMD", 26, 2),
        ("GenuineIntel", 6, 26),
        ("HygonGenuine", 25, 1),
        (None, 6, 85),
    ],
)
def test_of_other_cpus_nothing_is_known(vendor, family, model):
    assert generation(vendor, family, model) is None


def test_no_cpu_belongs_to_two_generations():
    seen = [
        (one.vendor, one.family, model)
        for one in GENERATIONS
        for first, last in one.models
        for model in range(first, last + 1)
    ]
    assert len(seen) == len(set(seen))
    assert {one.x87_pointer_bits for one in GENERATIONS} == {48, 57}


def test_the_catalogue_tells_the_width_where_it_is_known():
    widths = {name: host.x87_pointer_bits for name, host in catalogue().items()}
    expected = {
        "amd-milan": 48,
        "amd-genoa": 57,
        "amd-rome": 48,
        "intel-cascadelake": 48,
        "intel-icelake-server": 57,
        "intel-sapphirerapids": 57,
        "intel-graniterapids": 57,
        "amd-turin": None,
        "intel-nehalem": None,
        "zhaoxin-kx7000": None,
    }
    assert expected == {name: widths[name] for name in expected}
    for host in catalogue().values():
        told = host.provenance.get("x87_pointer_bits")
        assert told == ("derived" if host.x87_pointer_bits else None), host.name
