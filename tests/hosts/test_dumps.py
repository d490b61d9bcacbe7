"""Readers of CPU files: the public dumps, small ones written here, and damaged ones."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import xfast
from xfast.errors import FormatError
from xfast.hosts import load, parse, resolve
from xfast.hosts.dumps import by_cpu, cpuid_r_rows, instlat_rows
from xfast.kernels.behaviour import of_release
from xfast.xsave.features import TILEDATA
from xfast.xsave.layout import PRESETS, recognise

CPUID_R = """CPU 0:
   0x00000000 0x00: eax=0x0000000d ebx=0x68747541 ecx=0x444d4163 edx=0x69746e65
   0x00000001 0x00: eax=0x00a10f11 ebx=0x00020800 ecx=0x1c000001 edx=0x07808101
   0x00000007 0x00: eax=0x00000001 ebx=0x00010020 ecx=0x00000008 edx=0x00000000
   0x0000000d 0x00: eax=0x00000207 ebx=0x00000988 ecx=0x00000988 edx=0x00000000
   0x0000000d 0x01: eax=0x0000000f ebx=0x00000348 ecx=0x00001800 edx=0x00000000
   0x0000000d 0x02: eax=0x00000100 ebx=0x00000240 ecx=0x00000000 edx=0x00000000
   0x0000000d 0x09: eax=0x00000008 ebx=0x00000980 ecx=0x00000000 edx=0x00000000
   0x0000000d 0x0b: eax=0x00000010 ebx=0x00000000 ecx=0x00000001 edx=0x00000000
   0x0000000d 0x0c: eax=0x00000018 ebx=0x00000000 ecx=0x00000001 edx=0x00000000
   0x80000001 0x00: eax=0x00000000 ebx=0x00000000 ecx=0x000000a1 edx=0x20000800
"""
"""As `cpuid -r` prints it: an AMD CPU with PKRU at 2432."""

ROWS = list(cpuid_r_rows(CPUID_R))

INSTLAT = "------[ Logical CPU #0 ]------\n" + "".join(
    f"CPUID {leaf:08X}: {eax:08X}-{ebx:08X}-{ecx:08X}-{edx:08X}"
    + (f" [SL {sub:02X}]\n" if leaf in (7, 0xD) else " [a comment]\n")
    for leaf, sub, eax, ebx, ecx, edx in ROWS
)

LIBVIRT = (
    "<!-- a CPU -->\n<cpudata arch='x86'>\n"
    + "".join(
        f"<cpuid eax_in='{leaf:#x}'"
        + (f" ecx_in='{sub:#x}'" if sub else "")
        + f" eax='{eax:#x}' ebx='{ebx:#x}' ecx='{ecx:#x}' edx='{edx:#x}'/>\n"
        for leaf, sub, eax, ebx, ecx, edx in ROWS
    )
    + "<msr index='0x10a' edx='0x0' eax='0x2b'/>\n</cpudata>\n"
)

FINGERPRINT = json.dumps({
    "kernel_version": "6.1.172-216.329.amzn2023.x86_64",
    "guest_cpu_config": {"cpuid_modifiers": [
        {
            "leaf": hex(leaf), "subleaf": hex(sub), "flags": int(leaf in (7, 0xD)),
            "modifiers": [
                {"register": register, "bitmap": f"0b{value:032b}"}
                for register, value in zip(["eax", "ebx", "ecx", "edx"], values, strict=True)
            ],
        }
        for leaf, sub, *values in ROWS
    ]},
})  # fmt: skip

TEMPLATE = {
    "cpuid_modifiers": [
        {"leaf": "0x7", "subleaf": "0x0", "flags": 1, "modifiers": [
            {"register": "ecx", "bitmap": "0b" + "x" * 28 + "0xxx"}]},
        {"leaf": "0xd", "subleaf": "0x0", "flags": 1, "modifiers": [
            {"register": "eax", "bitmap": "0b" + "x" * 22 + "0000000xxx"}]},
    ]
}  # fmt: skip


@pytest.mark.parametrize("text", [CPUID_R, INSTLAT, LIBVIRT, FINGERPRINT])
def test_one_cpu_reads_the_same_from_every_kind_of_dump(text):
    (host,) = parse(text.encode(), "some/milan.txt")
    assert host.name == "milan"
    assert host.vendor == "AuthenticAMD"
    assert host.layout is not None
    assert recognise(host.layout) == "amd-zen3"
    assert host.xcr0 == host.kvm_xcr0 == 0x207
    assert host.mxcsr_mask == 0x2FFFF
    assert host.features is not None
    assert {"avx", "avx2", "pku", "lahf_lm", "lm", "syscall"} <= host.features
    assert host.xsave == {"xsave", "xsaveopt", "xsavec", "xgetbv1", "xsaves"}


def test_runtime_bits_are_no_features_of_a_host():
    (host,) = parse(CPUID_R.encode())
    assert host.cpuid is not None
    assert "osxsave" in host.cpuid.features
    assert host.features is not None
    assert "osxsave" not in host.features


def test_fingerprint_names_the_kernel_it_was_taken_on():
    (host,) = parse(FINGERPRINT.encode())
    assert host.kernel is not None
    assert host.kernel.names == of_release("6.1.172").names
    assert host.provenance["kernel"] == "assumed"
    assert host.provenance["kvm_xcr0"] == "dump"


def test_kernel_that_a_dump_ran_is_believed_and_another_one_cuts(shared):
    """What KVM of 6.1 offered, 5.10 does not; and a back-port that a dump shows is not denied."""
    path = shared / "samples/cpuid/firecracker/fingerprint_INTEL_SAPPHIRE_RAPIDS_6.1host.json"
    assert resolve(str(path)).kvm_xcr0 == 0x602E7
    older = resolve(f"{path}@5.10")
    assert (older.kvm_xcr0, older.guest_permission) == (0x2E7, 0)
    ported = json.loads(path.read_text()) | {"kernel_version": "5.14.0-427.el9.x86_64"}
    (host,) = parse(json.dumps(ported).encode())
    assert (host.kvm_xcr0, host.guest_permission) == (0x602E7, TILEDATA)


def test_hybrid_cpus_give_what_both_kinds_have():
    second = CPUID_R.replace("CPU 0", "CPU 1")
    second = second.replace("ecx=0x00000008", "ecx=0x00000000")
    second = second.replace("eax=0x00000207", "eax=0x00000007")
    (host,) = parse((CPUID_R + second).encode(), "hybrid")
    assert host.xcr0 == 7
    assert host.features is not None
    assert "pku" not in host.features
    assert "avx2" in host.features
    assert host.cpuid is None
    assert host.source == "hybrid (common to 2 kinds of CPU)"


def test_equal_cpus_are_one():
    (host,) = parse((CPUID_R + CPUID_R.replace("CPU 0", "CPU 1")).encode())
    assert host.cpuid is not None
    assert host.xcr0 == 0x207


def test_dump_that_stops_early_leaves_its_components_unplaced():
    """13 public dumps list PKRU in sub-leaf 0 and end before sub-leaf 9."""
    text = "".join(line for line in CPUID_R.splitlines(True) if "0d 0x09" not in line)
    (host,) = parse(text.encode())
    assert host.xcr0 == 0x207
    assert host.layout is not None
    assert 9 not in host.layout.by_nr


def test_area_is_not_judged_against_a_place_that_a_dump_does_not_tell():
    text = "".join(line for line in CPUID_R.splitlines(True) if "0d 0x09" not in line)
    (host,) = parse(text.encode())
    area = xfast.empty(1, 4096)[0]
    area[:] = 0
    area[512] = 4
    area[513] = 2
    area[2432] = 0x34
    (verdict,) = xfast.check(area, host, layout=PRESETS["amd-zen3"], xcr0=0x207)
    assert verdict.verdict == "unknown"
    (finding,) = (f for f in verdict.findings if f.code == "LAYOUT")
    assert finding.component == "pkru"
    assert "does not say where pkru lies" in finding.why
    (whole,) = parse(CPUID_R.encode())
    (verdict,) = xfast.check(area, whole, layout=PRESETS["amd-zen3"], xcr0=0x207)
    assert "LAYOUT" not in {f.code for f in verdict.findings}


def test_guest_with_osxsave_lacks_nothing_on_its_own_cpu():
    """OSXSAVE mirrors the guest's CR4: a host's dump that lacks it lacks no instruction."""
    (host,) = parse(CPUID_R.encode())
    assert host.cpuid is not None
    assert "osxsave" in host.cpuid.features
    area = xfast.empty(1, 4096)[0]
    area[:] = 0
    (verdict,) = xfast.check(area, host, layout=host.layout, xcr0=7, cpuid=host.cpuid)
    assert "ISA" not in {f.code for f in verdict.findings}


def test_dump_without_leaf_7_tells_no_features():
    text = "".join(line for line in CPUID_R.splitlines(True) if "0x00000007" not in line)
    (host,) = parse(text.encode())
    assert host.features is None
    assert host.xcr0 == 0x207


def test_dump_without_leaf_d_tells_no_state():
    text = "".join(line for line in CPUID_R.splitlines(True) if "0x0000000d" not in line)
    (host,) = parse(text.encode())
    assert (host.layout, host.xcr0, host.kvm_xcr0) == (None, None, None)


def test_impossible_leaf_d_is_a_format_error():
    with pytest.raises(FormatError, match=r"leaf 0xd: layout: .* component 9"):
        parse(CPUID_R.replace("ebx=0x00000980", "ebx=0x00000010").encode())


def test_supported_cpuid_of_a_kvm_that_denies_xsave_tells_no_features(data):
    """kvm_pvm lists leaf 0xD without announcing XSAVE: its feature bits are not to be believed."""
    (host,) = load(data / "raw/kvm_get_supported_cpuid.bin")
    assert host.layout is not None
    assert recognise(host.layout) == "amd-zen4"
    assert host.kvm_xcr0 == 0xE7
    assert host.features is None
    (guest,) = load(data / "raw/kvm618-guestxcr0_e7.cpuid2")
    assert guest.kvm_xcr0 == 0xE7


def test_boot_log_in_standard_format_tells_the_layout():
    log = """[    0.000000] Linux version 4.15.0-20-generic (buildd@x) (gcc version 7.3.0)
[    0.000000] x86/fpu: Supporting XSAVE feature 0x001: 'x87 floating point registers'
[    0.000000] x86/fpu: xstate_offset[2]:  576, xstate_sizes[2]:  256
[    0.000000] x86/fpu: xstate_offset[3]:  960, xstate_sizes[3]:   64
[    0.000000] x86/fpu: xstate_offset[4]: 1024, xstate_sizes[4]:   64
[    0.000000] x86/fpu: xstate_offset[9]: 2688, xstate_sizes[9]:    8
[    0.000000] x86/fpu: Enabled xstate features 0x21f, context size is 2696 bytes, using 'standard' format.
"""  # noqa: E501
    (host,) = parse(log.encode())
    assert host.xcr0 == host.kvm_xcr0 == 0x21F
    assert host.layout == PRESETS["intel"].restricted(0x21F)
    assert host.kernel is not None
    assert host.kernel.release == "4.15.0-20-generic"


def test_boot_log_in_compacted_format_does_not():
    log = """x86/fpu: xstate_offset[2]:  576, xstate_sizes[2]:  256
x86/fpu: xstate_offset[9]:  832, xstate_sizes[9]:    8
x86/fpu: xstate_offset[11]:  840, xstate_sizes[11]:   16
x86/fpu: Enabled xstate features 0xa07, context size is 856 bytes, using 'compacted' format.
"""
    (host,) = parse(log.encode())
    assert (host.xcr0, host.xss) == (0x207, 0x800)
    assert host.layout == PRESETS["intel"].restricted(7)  # AVX lies there on all CPUs; PKRU may not
    assert host.provenance["layout"] == "assumed"
    bad = log.replace("compacted", "standard").replace("576", "100")
    with pytest.raises(FormatError, match="offset 100"):
        parse(bad.encode())


def test_template_takes_away_from_a_host(tmp_path):
    dump, template = tmp_path / "milan.txt", tmp_path / "mask.json"
    dump.write_text(CPUID_R)
    template.write_text(json.dumps(TEMPLATE))
    bare = resolve(str(dump))
    host = resolve(f"{dump}+{template}@6.6")
    assert host.name == "milan+mask@6.6"
    assert host.kvm_xcr0 == 7
    assert host.xcr0 == bare.xcr0 == 0x207
    assert bare.features is not None
    assert host.features == bare.features - {"pku"}
    with pytest.raises(FormatError, match="expected a host, got a CPU template"):
        load(template)
    template.write_text('{"cpuid_modifiers": 7}')
    with pytest.raises(FormatError, match="cpuid_modifiers"):
        resolve(f"{dump}+{template}")


@pytest.mark.parametrize(
    "change",
    [
        ("leaf", 7),
        ("subleaf", "x"),
        ("flags", None),
        ("modifiers", [{"register": "eax"}]),
        ("modifiers", [{"register": "rax", "bitmap": "0b" + "0" * 32}]),
        ("modifiers", [{"register": "eax", "bitmap": "0b2"}]),
        ("modifiers", 7),
    ],
)
def test_damaged_fingerprint_is_one_clear_line(change):
    document = json.loads(FINGERPRINT)
    document["guest_cpu_config"]["cpuid_modifiers"][1] |= dict([change])
    with pytest.raises(FormatError, match="cpuid_modifiers: ") as raised:
        parse(json.dumps(document).encode())
    assert "\n" not in str(raised.value)


def test_a_dump_of_too_many_cpus_is_refused():
    row = CPUID_R.splitlines(True)[1]
    with pytest.raises(FormatError, match="expected at most 8192 CPUs, got 100000"):
        parse(row.encode() * 100_000)


def test_binary_data_is_refused():
    with pytest.raises(FormatError, match=r"offset 2: expected .*, got binary data"):
        parse(b"ab\0cd")


@given(st.data())
def test_damaged_dumps_never_raise_anything_else(draw):
    text = draw.draw(st.sampled_from([CPUID_R, INSTLAT, LIBVIRT, FINGERPRINT])).encode()
    at = draw.draw(st.integers(0, len(text)))
    length = draw.draw(st.integers(0, 40))
    damaged = text[:at] + draw.draw(st.binary(max_size=20)) + text[at + length :]
    try:
        hosts = parse(damaged)
    except FormatError:
        return
    assert hosts


def public_dumps(shared: Path) -> list[Path]:
    folder = shared / "samples/cpuid"
    kinds = ("libvirt/*.xml", "instlatx64/*.txt", "firecracker/fingerprint_*.json")
    return [path for kind in (*kinds, "other/*cpuid-r*.txt") for path in sorted(folder.glob(kind))]


def test_every_public_dump_reads(shared):
    paths = public_dumps(shared)
    assert len(paths) >= 40
    for path in paths:
        (host,) = load(path)
        assert host.vendor, path.name
        assert host.features, path.name
        assert host.layout is not None, path.name
        assert not host.kvm_xcr0 & ~host.xcr0, path.name
        assert recognise(host.layout), path.name


def test_dumps_agree_with_the_survey(shared):
    with open(shared / "samples/cpuid/LAYOUTS.tsv", encoding="utf-8") as file:
        rows = {row["file"]: row for row in csv.DictReader(file, delimiter="\t")}
    compared = 0
    for path in public_dumps(shared):
        row = rows.get(path.name)
        if row is None or row["source"] == "firecracker":
            continue
        reader = instlat_rows if path.suffix == ".txt" else None
        cpuid = by_cpu(reader(path.read_text("latin-1")))[0] if reader else load(path)[0].cpuid
        assert cpuid is not None
        assert cpuid.vendor == row["vendor"]
        assert cpuid.signature == int(row["cpuid1_eax"], 16)
        assert cpuid.xcr0 == int(row["xcr0_mask"], 16)
        assert cpuid.xss == int(row["xss_mask"], 16)
        flags = dict(item.split("=") for item in row["flags"].split())
        for name in ("pku", "mpx", "avx512f"):
            assert (name in cpuid.features) == (flags[name] == "1"), (path.name, name)
        compared += 1
    assert compared >= 25


def test_kernel_of_a_fingerprint_decides_about_amx(shared):
    """KVM of 5.10 hides AMX, that of 6.1 shows it: the model says the same of the bare CPU."""
    for release in ("5.10", "6.1"):
        fingerprint = f"fingerprint_INTEL_SAPPHIRE_RAPIDS_{release}host.json"
        (seen,) = load(shared / "samples/cpuid/firecracker" / fingerprint)
        assert seen.kernel is not None
        predicted = resolve(f"intel-sapphirerapids@{seen.kernel.release}")
        assert seen.kvm_xcr0 == predicted.kvm_xcr0
        assert bool(seen.kvm_xcr0 & TILEDATA) == (release == "6.1")


def test_bare_cpus_predict_what_kvm_shows(shared):
    """Cascade Lake: from libvirt's bare dump, the mask that Firecracker saw KVM offer, MPX too."""
    for name, fingerprint in (
        ("intel-cascadelake", "INTEL_CASCADELAKE_6.1host"),
        ("intel-cascadelake", "INTEL_CASCADELAKE_6.18host"),
        ("intel-sapphirerapids", "INTEL_SAPPHIRE_RAPIDS_6.1host"),
    ):
        (seen,) = load(shared / f"samples/cpuid/firecracker/fingerprint_{fingerprint}.json")
        assert resolve(name).with_kernel(seen.kernel).kvm_xcr0 == seen.kvm_xcr0
