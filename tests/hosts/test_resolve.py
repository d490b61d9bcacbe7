"""Hosts: the description in JSON and TOML, the catalogue, and how a host is named."""

from __future__ import annotations

import json
import tomllib

import pytest
from effort import at_most
from hypothesis import given
from hypothesis import strategies as st

from xfast.errors import FormatError, XfastError
from xfast.hosts import Host, load, parse, parse_kernel, resolve, resolve_all
from xfast.hosts.catalogue import FILE, catalogue
from xfast.hosts.description import FIELDS, from_dict, to_dict, to_json, to_toml
from xfast.kernels.behaviour import BEHAVIOURS, Behaviours, of_release
from xfast.xsave.cpuid import FEATURES, XSAVE_FEATURES, Cpuid, Entry
from xfast.xsave.features import SUPERVISOR_MASK, TILEDATA, XFEATURE_MASK_FPSSE
from xfast.xsave.layout import PRESETS, Layout, recognise

WORDS = st.text(st.characters(exclude_categories="CZ", include_characters=" "), max_size=12)
U32 = st.integers(0, (1 << 32) - 1)
MASKS = st.none() | st.integers(0, (1 << 64) - 1)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    known = PRESETS[draw(st.sampled_from(sorted(PRESETS)))]
    return known.restricted(draw(st.integers(0, (1 << 63) - 1)))


HOSTS = st.builds(
    Host,
    name=WORDS,
    layout=st.none() | layouts() | st.sampled_from(sorted(PRESETS.values(), key=lambda p: p.name)),
    xcr0=MASKS,
    xss=MASKS,
    kvm_xcr0=MASKS,
    mxcsr_mask=st.none() | U32,
    features=st.none() | st.frozensets(st.sampled_from(sorted(FEATURES))),
    xsave=st.frozensets(st.sampled_from(sorted(XSAVE_FEATURES))),
    kernel=st.none()
    | st.builds(Behaviours, st.frozensets(st.sampled_from(sorted(BEHAVIOURS))), WORDS, WORDS),
    xsave2_size=st.none() | st.integers(0, 1 << 20),
    guest_permission=MASKS,
    vendor=st.none() | WORDS,
    cpuid=st.none() | st.lists(st.builds(Entry, *[U32] * 7)).map(tuple).map(Cpuid),
    provenance=st.dictionaries(st.sampled_from(sorted(FIELDS)), WORDS),
    source=WORDS,
)


def same(one: Host, two: Host) -> bool:
    return one == two and one.provenance == two.provenance


@given(st.lists(HOSTS, min_size=1, max_size=3))
def test_json_and_toml_keep_every_field(hosts):
    for text in (to_json(hosts), to_toml(hosts)):
        read = parse(text.encode())
        assert len(read) == len(hosts)
        assert all(map(same, read, hosts))


@given(st.lists(HOSTS, min_size=1, max_size=2))
def test_json_and_toml_are_one_schema(hosts):
    assert tomllib.loads(to_toml(hosts)) == json.loads(to_json(hosts))


def test_every_field_of_a_host_is_described():
    assert set(FIELDS) == set(Host.__dataclass_fields__)


def test_toml_as_people_write_it():
    text = """
    # two machines of rack 7
    schema = "xfast/1"

    [[hosts]]
    name = "rack7-a"
    layout = "amd-zen3"
    xcr0 = 0x207
    kvm_xcr0 = "0x207"
    kernel = "6.1.60"

    [[hosts]]
    name = "rack7-b"
    layout = [{nr = 2, size = 256, offset = 576}]
    """
    one, two = parse(text.encode())
    assert one.layout == PRESETS["amd-zen3"]
    assert one.xcr0 == one.kvm_xcr0 == 0x207
    assert one.kernel == of_release("6.1.60")
    assert one.provenance["xcr0"] == "given"
    assert two.layout is not None
    assert two.layout.standard_size() == 832
    assert two.xcr0 is None


GOOD = {"name": "x", "xcr0": "0x7"}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"xcr0": "seven"}, r"hosts\[0\].xcr0: expected .*, got 'seven'"),
        ({"xcr0": -1}, "xcr0"),
        ({"xcr0": 1 << 64}, "xcr0"),
        ({"xcr0": True}, "xcr0"),
        ({"xcr0": 7.0}, "xcr0"),
        ({"xcr0": "-0x7"}, "xcr0"),
        ({"xcr": "0x7"}, "expected only name, vendor"),
        ({"name": "a\x1b[2Jb"}, "expected printable text"),
        ({"name": 7}, "name"),
        ({"layout": "amd-zen9"}, "one of:? intel"),
        ({"layout": {}}, "expected a list"),
        ({"layout": [{"nr": 2, "size": 256, "offset": 100}]}, "offset 100"),
        (
            {"layout": [{"nr": 2, "name": "pkru", "size": 8, "offset": 576}]},
            "expected the name avx for nr 2",
        ),
        ({"layout": [{"nr": 2, "size": 8, "offset": 576, "xfd": 1}]}, "true or false"),
        ({"layout": [{"nr": 2, "size": 8, "offset": 576, "at": 1}]}, "got 'at'"),
        ({"layout": [{"size": 8, "offset": 576}]}, "layout: expected .*, got None"),
        ({"kernel": "six"}, "kernel release: expected .*got 'six'"),
        ({"kernel": {"behaviours": ["nope"]}}, "behaviour: expected some of .*got nope"),
        ({"kernel": {}}, "expected a list"),
        ({"features": "avx"}, "features: expected a list, got 'avx'"),
        ({"cpuid": [{"function": 1, "eax": 1 << 32}]}, "cpuid"),
        ({"provenance": {"nope": "x"}}, "provenance: expected .*, got 'nope'"),
        ({"provenance": []}, "expected a table"),
    ],
)
def test_bad_field_is_named(change, complaint):
    document = {"schema": "xfast/1", "hosts": [GOOD | change]}
    with pytest.raises(FormatError, match=complaint) as raised:
        parse(json.dumps(document).encode(), "pool.json")
    assert str(raised.value).startswith("pool.json: hosts[0]")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 700


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not JSON"),
        ("{}", r"expected a host in JSON \(schema 'xfast/1'\), got the keys none"),
        ('{"error": 1}', "got the keys 'error'"),
        ('{"schema": "xfast/2", "hosts": []}', "expected schema 'xfast/1'"),
        ('{"schema": "xfast/1", "hosts": []}', "expected a list with a host in it"),
        ('{"schema": "xfast/1", "hosts": {}}', "expected a list with a host in it"),
        ('{"schema": "xfast/1", "hosts": [7]}', "expected a table"),
        ('{"schema": "xfast/1", "hosts": [{}]}', "expected a name, got none"),
        ('{"a":' * 100_000, "expected at most 32 brackets in each other"),
        ('{"a": ' + "9" * 10_000 + "}", "expected at most 64 digits in a number"),
        ("schema = ", "not TOML"),
        (
            "schema = 'xfast/1'\nhosts = " + "[" * 100_000,
            "expected at most 32 brackets in each other",
        ),
        ("", "expected a host, got an empty file"),
        ("[1, 2]", "expected a host, got a text of another kind: xfast host show --help"),
        ("hello", "expected a host, got a text of another kind: xfast host show --help"),
        ("<a/>", "expected <cpudata>"),
        ("<a", "XML"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><cpudata arch="x86"/>', "DOCTYPE"),
        ("<cpudata/>", "expected <cpudata> with <cpuid> rows"),
        (
            "<cpudata><cpuid eax_in='z'/></cpudata>",
            "XML: expected numbers of 32 bits, got {'eax_in': 'z'}",
        ),
        ("<cpudata><cpuid eax='0x100000000'/></cpudata>", "32 bits"),
        ("x86/fpu: hello", "Enabled xstate features"),
    ],
)
def test_bad_document_is_one_clear_line(text, complaint):
    with pytest.raises(FormatError, match=complaint) as raised:
        parse(text.encode(), "h")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data):
    with pytest.raises(FormatError):
        parse(data)


@pytest.mark.parametrize(
    "unit", ["\n", " ", "\n0x0", "<!--", "<a>", "x86/fpu: ", "CPUID ", "[", "#\n"]
)
def test_long_nonsense_is_refused_in_no_time(unit):
    with at_most(5), pytest.raises(FormatError):
        parse(unit.encode() * (1 << 19))


def test_too_large_a_file_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr("xfast.hosts.readers.SIZE_LIMIT", 100)
    path = tmp_path / "h.json"
    path.write_text(to_json([Host("x" * 200)]))
    with pytest.raises(FormatError, match="at most 100 bytes"):
        load(path)


def test_catalogue_covers_the_common_server_types():
    names = (
        "intel-nehalem intel-sandybridge intel-haswell intel-broadwell intel-skylake-server "
        "intel-cascadelake intel-cooperlake intel-icelake-server intel-sapphirerapids "
        "intel-emeraldrapids intel-graniterapids amd-bulldozer amd-naples amd-rome amd-milan "
        "amd-genoa amd-turin qemu-tcg-max"
    )
    assert set(names.split()) <= catalogue().keys()


def test_catalogue_is_consistent():
    for name, host in catalogue().items():
        assert host.source, name
        assert host.kernel is None, name
        assert host.features, name
        assert host.layout is not None, name
        assert recognise(host.layout), name
        assert host.xsave == host.features & XSAVE_FEATURES
        assert host.xcr0 is not None
        assert host.kvm_xcr0 is not None
        assert not host.kvm_xcr0 & ~host.xcr0, name
        assert not host.xcr0 & ~host.layout.user_mask, name
        assert not (host.xss or 0) & ~SUPERVISOR_MASK, name
        if host.vendor == "AuthenticAMD":
            assert not host.xcr0 & 0x18, name
        for feature in ("avx", "pku", "mpx", "avx512f", "amx_tile"):
            needed = FEATURES[feature].components
            assert (feature in host.features) == (host.xcr0 & needed == needed), (name, feature)
        assert same(from_dict(to_dict(host)), host)


def test_catalogue_is_what_its_generator_writes(shared):
    import runpy
    from contextlib import redirect_stdout
    from io import StringIO

    script = FILE.parents[2] / "docs" / "make_catalogue.py"
    with redirect_stdout(StringIO()) as out:
        runpy.run_path(str(script))["main"](shared / "samples")
    assert out.getvalue() == FILE.read_text("utf-8")


def test_rome_announces_pkru_that_no_kernel_enables():
    """Zen 2 lists component 9 in leaf 0xD, yet has no PKU feature: its XCR0 never has the bit."""
    rome = resolve("amd-rome")
    assert rome.layout is not None
    assert rome.layout.user_mask == 0x207
    assert rome.xcr0 == rome.kvm_xcr0 == 0x7


@pytest.mark.parametrize(
    ("kernel", "xcr0", "kvm_xcr0", "permission"),
    [
        ("5.15", 0x2E7, 0x2E7, 0),
        ("5.16", 0x602E7, 0x2E7, 0),
        ("5.17", 0x602E7, 0x602E7, TILEDATA),
        ("6.6", 0x602E7, 0x602E7, TILEDATA),
    ],
)
def test_amx_depends_on_the_kernel(kernel, xcr0, kvm_xcr0, permission):
    """Firecracker issue 5438: 5.16 gives AMX to its tasks, and not to guests."""
    host = resolve(f"intel-sapphirerapids@{kernel}")
    assert host.name == f"intel-sapphirerapids@{kernel}"
    assert (host.xcr0, host.kvm_xcr0, host.guest_permission) == (xcr0, kvm_xcr0, permission)
    assert host.kernel == of_release(kernel)
    assert host.provenance["kernel"] == "assumed"


def test_facts_that_were_probed_survive_another_kernel():
    probed = Host("x", xcr0=0x602E7, provenance={"xcr0": "probed"})
    assert probed.with_kernel(of_release("5.15")).xcr0 == 0x602E7


def test_kernel_is_a_release_behaviours_or_both():
    assert parse_kernel("5.17-rc5") == of_release("5.17-rc5")
    assert parse_kernel("v6.6") == Behaviours(of_release("6.6").names, "v6.6", "assumed")
    named = parse_kernel("fpu-core-uabi,get-trims")
    assert named == Behaviours(frozenset({"fpu-core-uabi", "get-trims"}))
    ported = parse_kernel("5.14,get-trims")
    assert ported.names == of_release("5.14").names | {"get-trims"}
    assert ported.provenance == "given"


@pytest.mark.parametrize("kernel", ["", "nope", "6", "6.6,nope", "get-trims,"])
def test_bad_kernel_says_what_is_needed(kernel):
    with pytest.raises(XfastError, match=r"expected (some|one)"):
        resolve(f"amd-rome@{kernel}")


def test_unknown_host_lists_those_known():
    for spec in ("", "@6.6", "zzz", "zzz@6.6", "zzz" * 1000):
        with pytest.raises(XfastError, match=r"a file, .* 'this', .*; the catalogue has: amd-bull"):
            resolve(spec)


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("amd-room", "amd-rome"),
        ("amd-milna@6.6", "amd-milan"),
        ("AMD-MILAN", "amd-milan"),
        ("intel-sapphire-rapids", "intel-sapphirerapids"),
        ("amd-rome+nope.json", "amd-rome"),
        ("EPYC-Millan", "EPYC-Milan"),
        ("Skylake-Sever-IBRS", "Skylake-Server-IBRS"),
        ("thsi", "this"),
    ],
)
def test_unknown_host_is_told_what_may_have_been_meant(spec, meant):
    with pytest.raises(XfastError, match=f"got .*; did you mean .*{meant}") as raised:
        resolve(spec)
    assert "\n" not in str(raised.value)


def test_file_whose_name_looks_like_a_specification(tmp_path):
    path = tmp_path / "a@6.6+b.json"
    path.write_text(to_json([Host("inner", xcr0=7)]))
    assert resolve(str(path)).kernel is None
    assert resolve(f"{path}@6.6").kernel == of_release("6.6")
    assert resolve(f"{path}@6.6").name == "inner@6.6"


def test_file_of_several_hosts_is_no_single_host(tmp_path):
    path = tmp_path / "pool.toml"
    path.write_text(to_toml([Host("a"), Host("b")]))
    assert [host.name for host in resolve_all(f"{path}@6.6")] == ["a@6.6", "b@6.6"]
    with pytest.raises(XfastError, match="expected one, got 2 hosts"):
        resolve(str(path))


def test_host_without_xsave_has_the_legacy_components_alone():
    nehalem = resolve("intel-nehalem")
    assert nehalem.xcr0 == XFEATURE_MASK_FPSSE
    assert nehalem.kvm_xcr0 == 0
    assert nehalem.xsave == frozenset()


def test_description_in_the_documentation_is_one():
    text = (FILE.parents[2] / "docs" / "hosts.md").read_text("utf-8")
    (host,) = parse(text.partition("```toml\n")[2].partition("```")[0].encode())
    assert host.name == "rack7"
    assert host.layout == PRESETS["amd-zen3"]
    assert host.kernel == of_release("6.1.60")
