"""Every kind of description that people have: what it tells, and what stays assumed."""

from __future__ import annotations

import json
import struct
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xfast.errors import FormatError, XfastError
from xfast.hosts import Host, expand, load, parse, resolve
from xfast.hosts.description import to_json
from xfast.hosts.readers import READERS
from xfast.xsave.layout import PRESETS, recognise

FLAGS = (
    "fpu de cx8 sep cmov clflush mmx fxsr sse sse2 syscall nx lm pni ssse3 fma cx16 sse4_1 sse4_2 "
    "movbe popcnt aes xsave avx f16c lahf_lm abm bmi1 avx2 bmi2 erms xsaveopt xsavec xgetbv1 xsaves"
)

CPUINFO = "".join(
    f"processor\t: {n}\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 1\n"
    f"model name\t: AMD EPYC 7763\nstepping\t: 1\nflags\t\t: {FLAGS} pku ospke misalignsse\n\n"
    for n in range(2)
)

LSCPU = f"""Architecture:            x86_64
  CPU op-mode(s):        32-bit, 64-bit
Vendor ID:               GenuineIntel
  Model name:            Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz
    CPU family:          6
    Model:               106
    Flags:               {FLAGS} avx512f avx512dq avx512cd avx512bw avx512vl pku ospke
Virtualization features:
  Hypervisor vendor:     KVM
"""

LSCPU_JSON = json.dumps({"lscpu": [
    {"field": "Architecture:", "data": "x86_64"},
    {"field": "Vendor ID:", "data": "GenuineIntel", "children": [
        {"field": "Model name:", "data": "Intel(R) Xeon(R)", "children": [
            {"field": "CPU family:", "data": "6"}, {"field": "Model:", "data": "106"},
            {"field": "Flags:", "data": f"{FLAGS} avx512f pku"}]}]}]})  # fmt: skip

XE = json.dumps({
    "vendor": "GenuineIntel", "modelname": "Intel", "family": "6", "model": "62",
    "flags": "fpu xsave avx avx2",
    "features_hvm": "1fcbfbff-f7ba2223-2d93fbff-00000403-00000001-00000281-00000000-00000000",
})  # fmt: skip

XE_TEXT = """      vendor      : GenuineIntel
   modelname      : Intel(R) Xeon(R) CPU E5-2630L v2
      family      : 6
       model      : 62
       flags      : fpu xsave avx
features_hvm (RO): 1fcbfbff-f7ba2223-2d93fbff-00000403-00000001-00000281-00000000-00000000
"""

XE_LINE = (
    "cpu_info (MRO): cpu_count: 4; socket_count: 1; vendor: GenuineIntel; speed: 2399.999; "
    "modelname: Intel(R) Xeon(R); family: 6; model: 62; stepping: 4; flags: fpu xsave avx; "
    "features_hvm: 1fcbfbff-f7ba2223-2d93fbff-00000403-00000001-00000281-00000000-00000000\n"
)

CAPABILITIES = """<capabilities><host><cpu><arch>x86_64</arch><model>Haswell-noTSX</model>
<vendor>Intel</vendor><signature family='6' model='85' stepping='7'/>
<feature name='avx512f'/><feature name='pku'/><feature name='pclmuldq'/></cpu>
<topology><cells><cell id='0'><cpus><cpu id='0'/></cpus></cell></cells></topology></host>
<guest><arch name='i686'/></guest></capabilities>"""

DOMCAPABILITIES = """<domainCapabilities><domain>kvm</domain><arch>x86_64</arch><cpu>
<mode name='host-passthrough' supported='yes'/>
<mode name='host-model' supported='yes'><model fallback='forbid'>EPYC-Milan</model>
<vendor>AMD</vendor><feature policy='require' name='vaes'/>
<feature policy='disable' name='pku'/></mode>
<mode name='custom' supported='yes'><model usable='yes'>qemu64</model></mode>
</cpu></domainCapabilities>"""

CPU_XML = """<cpu mode='custom' match='exact' check='full'>
  <model fallback='forbid'>Skylake-Server-IBRS</model><vendor>Intel</vendor>
  <feature policy='require' name='pku'/><feature policy='disable' name='mpx'/></cpu>"""

DUMPXML = (
    f"<domain type='kvm'><name>vm</name><os><type arch='x86_64'>hvm</type></os>{CPU_XML}</domain>"
)

QMP = '{"QMP": {"version": {}}}\n{"return": {}}\n' + json.dumps({"return": {"model": {
    "name": "max", "props": {
        "vendor": "AuthenticAMD", "family": 25, "model": 1, "fpu": True, "lm": True, "sse2": True,
        "avx": True, "xsave": True, "sse4.1": True, "pku": True, "cet-ss": False, "stepping": 1,
    }}}})  # fmt: skip

VBOX = """00:00:00.717368 Processor Extended State Enumeration (leaf 0xd):
00:00:00.717369    XSAVE area cur/max size by XCR0, Guest: 0x340/0x340
00:00:00.717369    XSAVE area cur/max size by XCR0,  Host: 0x988/0x988
00:00:00.717370                    Valid XCR0 bits, Guest: 0x00000000`00000007 ( x87 SSE YMM_Hi128 )
00:00:00.717371                    Valid XCR0 bits,  Host: 0x00000000`00000207 ( x87 SSE 9 )
00:00:00.717373                Valid IA32_XSS bits,  Host: 0x00001800`00000000 ( 43 44 )
00:00:00.717375   State #2,  Host:  off=0x0240, cb=0x0100 IA32_XSS-bit -- YMM_Hi128
00:00:00.717375   State #9,  Host:  off=0x0980, cb=0x0008 IA32_XSS-bit -- 9
00:00:00.717376   State #11,  Host:  off=0x0000, cb=0x0010 XCR0-bit -- 11
"""

VBOX_RAW = """00:00:01.185391          Raw Standard CPUID Leaves
00:00:01.185391      Leaf/sub-leaf  eax      ebx      ecx      edx
00:00:01.185392 Gst: 00000000/0000  0000000d 68747541 444d4163 69746e65
00:00:01.185392 Hst:                0000000d 68747541 444d4163 69746e65
00:00:01.185392 Gst: 00000001/0000  00a10f11 00020800 14000001 07808101
00:00:01.185392 Hst:                00a10f11 00020800 1c000001 07808101
00:00:01.185392 Gst: 00000007/0000  00000000 00000000 00000000 00000000
00:00:01.185392 Hst:                00000001 00010020 00000008 00000000
00:00:01.185392 Gst: 0000000d/0000  00000007 00000340 00000340 00000000
00:00:01.185392 Hst:                00000207 00000988 00000988 00000000
00:00:01.185392 Hst: 0000000d/0001  0000000f 00000348 00001800 00000000
00:00:01.185392 Hst: 0000000d/0002  00000100 00000240 00000000 00000000
00:00:01.185392 Hst: 0000000d/0009  00000008 00000980 00000000 00000000
"""

WORDS = """CPU 0:
   vendor_id = "AuthenticAMD"
   version information (1/eax):
      family          = 0xf (15)
      model           = 0x1 (1)
      extended family = 0xa (10)
      (family synth)  = 0x19 (25)
   feature information (1/edx):
      x87 FPU on chip                        = true
      SSE extensions                         = true
   feature information (1/ecx):
      XSAVE/XSTOR states                      = true
      OS-enabled XSAVE/XSTOR                  = true
      AVX: advanced vector extensions         = true
   extended feature flags (7):
      AVX2: advanced vector extensions 2       = true
      PKU protection keys for user-mode        = true
   XSAVE features (0xd/0):
      XCR0 valid bit field mask               = 0x0000000000000207
         PKRU state                           = true
      bytes required by fields in XCR0        = 0x00000988 (2440)
      bytes required by XSAVE/XRSTOR area     = 0x00000988 (2440)
      XSAVES/XRSTORS instructions             = true
      IA32_XSS valid bit field mask           = 0x0000000000000800
   AVX/YMM features (0xd/2):
      AVX/YMM save state byte size             = 0x00000100 (256)
      AVX/YMM save state byte offset           = 0x00000240 (576)
      supported in IA32_XSS or XCR0            = XCR0 (user state)
   PKRU features (0xd/9):
      PKRU save state byte size                = 0x00000008 (8)
      PKRU save state byte offset              = 0x00000980 (2432)
      supported in IA32_XSS or XCR0            = XCR0 (user state)
   CET_U user features (0xd/0xb):
      CET_U user save state byte size          = 0x00000010 (16)
      CET_U user save state byte offset        = 0x00000000 (0)
      supported in IA32_XSS or XCR0            = IA32_XSS (supervisor state)
   0x00000011 0x00: eax=0x00000000 ebx=0x00000000 ecx=0x00000000 edx=0x00000000
   extended feature flags (0x80000001/edx):
      SSE extensions                        = true
      long mode (AA-64)                     = true
      misaligned SSE mode                    = true
"""

NEW_LOG = """[    0.000000] Linux version 6.12.0 (builder@example) (gcc 14) #1 SMP
[    0.419594] x86/fpu: Supporting XSAVE feature 0x001: 'x87 floating point registers'
[    0.424595] x86/fpu: xstate_offset[2]:  576, xstate_sizes[2]:  256
[    0.428594] x86/fpu: Enabled xstate features 0x207, context size is 840 bytes, using 'compacted' format.
[    0.464638] smpboot: CPU0: AMD EPYC 7763 64-Core Processor (family: 0x19, model: 0x1, stepping: 0x1)
"""  # noqa: E501

OLD_LOG = (
    "Jan  2 03:04:05 host1 kernel: Linux version 3.10.0-1160.el7.x86_64 (m@b) (gcc version 4.8.5)\n"
    "Jan  2 03:04:05 host1 kernel: xsave/xrstor: enabled xstate_bv 0x7, cntxt size 0x340\n"
)

HEX_LOG = """[    0.000000] Linux version 4.2.0-16-generic (b@l)
[    0.000000] x86/fpu: xstate_offset[2]: 0240, xstate_sizes[2]: 0100
[    0.000000] x86/fpu: Enabled xstate features 0x7, context size is 0x340 bytes, using 'standard' format.
"""  # noqa: E501

RHEL7_LOG = """[    0.000000] Linux version 3.10.0-693.el7.x86_64 (b@l)
[    0.000000] x86/fpu: xstate_offset[2]: 0240, xstate_sizes[2]: 0100
[    0.000000] x86/fpu: xstate_offset[3]: 0000, xstate_sizes[3]: 0000
[    0.000000] x86/fpu: xstate_offset[9]: 0a80, xstate_sizes[9]: 0008
[    0.000000] xsave: enabled xstate_bv 0x207, cntxt size 0xa88
"""

NO_XSAVE = "[    0.000000] Linux version 6.1.0\n[    0.0] x86/fpu: x87 FPU will use FXSAVE\n"

LEAVES = """[    0.000000] XSAVE consistency problem: size 10752 != kernel_size 10704
[    0.000000] CPUID[0d, 00]: eax=000600e7 ebx=00002b00 ecx=00002b00 edx=00000000
[    0.000000] CPUID[0d, 01]: eax=0000001b ebx=000029d0 ecx=00001800 edx=00000000
[    0.000000] CPUID[0d, 02]: eax=00000100 ebx=00000240 ecx=00000000 edx=00000000
[    0.000000] CPUID[0d, 03]: eax=00000000 ebx=00000000 ecx=00000000 edx=00000000
[    0.000000] CPUID[0d, 05]: eax=00000040 ebx=00000440 ecx=00000000 edx=00000000
[    0.000000] CPUID[0d, 06]: eax=00000200 ebx=00000480 ecx=00000000 edx=00000000
[    0.000000] CPUID[0d, 07]: eax=00000400 ebx=00000680 ecx=00000000 edx=00000000
[    0.000000] CPUID[0d, 11]: eax=00000040 ebx=00000ac0 ecx=00000002 edx=00000000
[    0.000000] CPUID[0d, 12]: eax=00002000 ebx=00000b00 ecx=00000006 edx=00000000
"""


def cpuinfo_img() -> bytes:
    """Return CRIU's cpuinfo.img of a made-up AMD CPU with XCR0 0x207 (2440 bytes)."""
    words = [0] * 20
    words[0], words[1], words[4] = 1 | 1 << 25, 1 << 29, 1 << 26 | 1 << 28
    words[9], words[10], words[11] = 1 << 5, 0xF, 1 << 3

    def varint(value: int) -> bytes:
        out = b""
        while value > 0x7F:
            out += bytes([value & 0x7F | 0x80])
            value >>= 7
        return out + bytes([value])

    numbers = [(1, 2), (2, 25), (3, 1), (4, 1), (5, 1), *((6, w) for w in words)]
    numbers += [(8, 0x205), (9, 2440), (10, 2440)]
    cpu = b"".join(varint(number << 3) + varint(value) for number, value in numbers)
    message = b"\x0a" + varint(len(cpu)) + cpu
    return struct.pack("<III", 0x54564319, 0x61404013, len(message)) + message


KINDS: dict[str, tuple[str | bytes, int, int | None, str | None]] = {
    "cpuinfo": (CPUINFO, 0x207, 0x207, "assumed"),
    "lscpu": (LSCPU, 0x2E7, 0x2E7, "assumed"),
    "lscpu-json": (LSCPU_JSON, 0x2E7, 0x2E7, "assumed"),
    "xe": (XE, 0x7, 0x7, "assumed"),
    "xe-text": (XE_TEXT, 0x7, 0x7, "assumed"),
    "xe-line": (XE_LINE, 0x7, 0x7, "assumed"),
    "bare-flags": (FLAGS + " pku\n", 0x207, 0x207, None),
    "capabilities": (CAPABILITIES, 0x2E7, 0x2E7, "assumed"),
    "domcapabilities": (DOMCAPABILITIES, 0x7, 0x7, "assumed"),
    "cpu": (CPU_XML, 0x2E7, 0x2E7, "assumed"),
    "dumpxml": (DUMPXML, 0x2E7, 0x2E7, "assumed"),
    "qmp": (QMP, 0x207, 0x207, "assumed"),
    "vbox": (VBOX, 0x207, 0x207, "dump"),
    "vbox-lower": (VBOX.replace(" Host:", "host:"), 0x207, 0x207, "dump"),
    "vbox-raw": (VBOX_RAW, 0x207, 0x207, "dump"),
    "words": (WORDS, 0x207, 0x207, "dump"),
    "new-log": (NEW_LOG, 0x207, 0x207, "assumed"),
    "old-log": (OLD_LOG, 0x7, 0x7, "assumed"),
    "hex-log": (HEX_LOG, 0x7, 0x7, "dump"),
    "rhel7-log": (RHEL7_LOG, 0x207, 0x207, "dump"),
    "no-xsave": (NO_XSAVE, 0x3, 0, "dump"),
    "leaves": (LEAVES, 0x600E7, 0x600E7, "dump"),
    "cpuinfo.img": (cpuinfo_img(), 0x207, 0x207, "assumed"),
}
"""{kind: (a small one, its XCR0, what KVM offers, how its layout is known)}."""


def read(kind: str) -> Host:
    data = KINDS[kind][0]
    (host,) = parse(data if isinstance(data, bytes) else data.encode(), f"there/{kind}.x")
    return host


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_tells_its_components(kind):
    _, xcr0, kvm_xcr0, layout = KINDS[kind]
    host = read(kind)
    assert host.name == kind
    assert (host.xcr0, host.kvm_xcr0) == (xcr0, kvm_xcr0)
    assert host.layout is not None
    if layout is None:  # no vendor: AVX lies there on all CPUs, and PKRU may lie anywhere
        assert host.layout == PRESETS["intel"].restricted(7)
        return
    assert host.provenance["layout"] == layout
    assert not xcr0 & ~host.layout.mask
    assert recognise(host.layout)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_kind_tells_can_be_written_and_read_again(kind):
    host = read(kind)
    (again,) = parse(to_json([host]).encode())
    assert again == host
    assert (again.notes, again.provenance) == (host.notes, host.provenance)


@pytest.mark.parametrize("kind", ["cpuinfo", "lscpu", "lscpu-json", "xe", "capabilities", "qmp"])
def test_flags_alone_leave_layout_and_kvm_assumed(kind):
    host = read(kind)
    assert host.provenance["features"] == "dump"
    assert host.provenance["xcr0"] == "derived"
    assert host.provenance["kvm_xcr0"] == "assumed"
    assert host.notes
    doubts = {doubt.fact: doubt for doubt in host.doubts}
    assert doubts["layout"].how == doubts["kvm_xcr0"].how == "assumed"
    assert "cpuid -r" in doubts["layout"].remedy
    assert "host dump" in doubts["kvm_xcr0"].remedy
    assert doubts["kernel"].how == "unknown"


@pytest.mark.parametrize("kind", ["vbox-raw", "words", "cpuinfo"])
def test_one_cpu_has_its_layout_from_each_kind(kind):
    host = read(kind)
    assert host.vendor == "AuthenticAMD"
    assert host.layout is not None
    assert host.layout.by_nr[9] == PRESETS["amd-zen3"].by_nr[9]


def test_caveat_says_what_a_verdict_rests_on():
    caveat = read("cpuinfo").caveat
    assert caveat.startswith(
        "layout assumed (certain with the output of `cpuid -r` there); "
        "kvm_xcr0 assumed (certain with `xfast host dump` there); "
    )
    (host,) = parse((HEX_LOG + NEW_LOG).encode())
    assert "2 boots in this log" in host.caveat
    assert resolve("amd-milan@6.6").caveat == ""
    assert resolve("amd-milan").caveat == ""


def test_assumed_masks_are_cut_by_a_kernel():
    (host,) = parse(LSCPU.replace("pku", "pku amx_tile").encode())
    assert host.kvm_xcr0 == 0x602E7
    assert host.with_kernel(resolve("amd-rome@5.10").kernel).kvm_xcr0 == 0x2E7


def test_guest_is_told_from_machine():
    assert any("virtual machine" in note for note in parse(
        LSCPU.replace("Flags:  ", "Flags: hypervisor ").encode())[0].notes)  # fmt: skip
    assert any("a guest's" in note for note in read("dumpxml").notes)


def test_domain_without_a_model_names_none():
    with pytest.raises(FormatError, match="expected a CPU model, got 'host-passthrough'"):
        parse(b"<domain><cpu mode='host-passthrough' check='none'/></domain>")


def test_features_of_an_unknown_model_are_not_guessed():
    (host,) = parse(b"<cpu><model>EPYC-Venice</model><vendor>AMD</vendor></cpu>")
    assert (host.features, host.xcr0, host.layout) == (None, None, None)
    assert host.vendor == "AuthenticAMD"
    assert "EPYC-Venice is not known" in host.notes[0]


def test_emulation_has_intels_layout_on_any_vendors_name():
    text = DOMCAPABILITIES.replace(">kvm<", ">qemu<").replace("name='pku'", "name='svm'")
    (host,) = parse(text.encode())
    assert host.layout == PRESETS["intel"].restricted(0x207)


def test_model_of_qmp_counts_where_it_is_named():
    document = {"return": {"model": {"name": "Haswell-v4", "props": {"avx2": False, "pku": True}}}}
    (host,) = parse(json.dumps(document).encode())
    assert host.features is not None
    assert {"fma", "pku", "sse2"} <= host.features
    assert "avx2" not in host.features
    (host,) = parse(b'{"return": {"model": {"name": "max", "props": {"avx": true}}}}')
    assert host.features == {"avx"}
    assert "not whole" in host.notes[1]


def test_other_replies_of_qmp_are_refused():
    with pytest.raises(FormatError, match="expected a reply to query-cpu-model-expansion"):
        parse(b'{"return": [{"name": "x", "unavailable-features": []}]}')


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("Architecture: aarch64\nFlags: fp asimd\n", "expected an x86 machine, got 'aarch64'"),
        ("Architecture: aarch64\nVendor ID: ARM\n", "another machine's"),
        ("processor: 0\nFeatures\t: fp asimd evtstrm\n", "another machine's"),
        ("<capabilities><host><cpu><arch>ppc64</arch></cpu></host></capabilities>", "got 'ppc64'"),
    ],
)
def test_other_architectures_are_refused(text, complaint):
    with pytest.raises(FormatError, match=complaint):
        parse(text.encode())


def test_hybrid_cpuinfo_gives_what_both_kinds_have():
    first, _, second = CPUINFO.partition("\n\n")
    (host,) = parse(f"{first}\n\n{second.replace(' pku', '').replace(' avx2', '')}".encode())
    assert host.features is not None
    assert "avx2" not in host.features
    assert host.xcr0 == 7
    assert "common to 2 kinds" in host.source


def test_colours_of_dmesg_are_no_part_of_it():
    log = NEW_LOG.replace("x86/fpu: ", "\x1b[33mx86/fpu: \x1b[0m").replace("[ ", "\x1b[32m[ ")
    (host,) = parse(log.encode())
    assert host.replace(source="") == read("new-log").replace(name="host", source="")


def test_host_without_xsave():
    host = read("no-xsave")
    assert not host.has_xsave
    assert (host.xcr0, host.xss, host.kvm_xcr0) == (3, 0, 0)
    assert "FXSAVE" in host.notes[0]


def test_of_two_boots_the_last_is_taken_and_said():
    (host,) = parse((HEX_LOG + NEW_LOG).encode())
    assert host.xcr0 == 0x207
    assert host.kernel is not None
    assert host.kernel.release == "6.12.0"
    assert host.notes[0] == "2 boots in this log: the last one is taken, Linux 6.12.0"
    (host,) = parse((NEW_LOG + HEX_LOG).encode())
    assert (host.xcr0, host.notes[0][-5:]) == (7, "eneric"[-5:])
    assert not read("new-log").notes


def test_boot_that_tells_nothing_is_passed_over_and_said():
    (host,) = parse((NEW_LOG + "[    0.000000] Linux version 6.18.1\n").encode())
    assert host.kernel is not None
    assert host.kernel.release == "6.12.0"
    assert "last one that tells of the FPU" in host.notes[0]


def test_boots_without_versions_are_told_apart():
    fpu = "".join(line for line in NEW_LOG.splitlines(True) if "Linux version" not in line)
    (host,) = parse((fpu + fpu.replace("0x207", "0x7").replace("840", "832")).encode())
    assert host.xcr0 == 7
    assert "2 boots" in host.notes[0]


def test_context_that_does_not_fit_is_said():
    """RHEL 7 logged 0xa80 bytes for 0x2ff: PKRU is in the mask and not in the size."""
    log = "xsave/xrstor: enabled xstate_bv 0x2ff, cntxt size 0xa80\n"
    (host,) = parse(log.encode())
    assert host.layout == PRESETS["intel"].restricted(0x2FF)
    assert "2688 bytes" in host.notes[0]
    assert "the size without pkru" in host.notes[0]


def test_vendor_and_family_of_a_boot_log_place_pkru():
    log = NEW_LOG.replace("family: 0x19", "fam: 17").replace("model: 0x1,", "model: 31,")
    (host,) = parse(log.encode())
    assert host.layout is not None
    assert host.layout.by_nr[9].offset == 832  # Zen 2
    assert read("new-log").layout == PRESETS["amd-zen3"].restricted(0x207)


def test_cpuinfo_img_is_read_alone_and_damaged_it_is_one_line():
    host = read("cpuinfo.img")
    assert host.layout == PRESETS["amd-zen3"].restricted(0x207)
    assert host.features is not None
    assert {"avx", "avx2", "pku", "lm"} <= host.features
    with pytest.raises(FormatError, match=r"offset 8: expected \d+ bytes of CPUs"):
        parse(cpuinfo_img()[:-1])


@pytest.mark.parametrize(
    ("name", "xcr0", "how"),
    [
        ("cpuid-nonraw.txt", 0x2FF, "assumed"),
        ("cpuinfo-2cpu.txt", 0x7, "assumed"),
        ("crun2092-dmesg.txt", 0xE7, "assumed"),
        ("dumpxml-cpu.xml", 0x2E7, "assumed"),
        ("fc5065-guest-cpuid-r.txt", 0x2E7, "dump"),
        ("fxsave.txt", 0x3, "dump"),
        ("lscpu.json", 0x207, "assumed"),
        ("lscpu.txt", 0x2FF, "assumed"),
        ("openvmm708-leaves.txt", 0x600E7, "dump"),
        ("qmp-model.json", 0x2E7, "assumed"),
        ("rhel7-dmesg.txt", 0x2FF, "assumed"),
        ("twoboots.txt", 0xE7, "assumed"),
        ("vbox336.log", 0x207, "dump"),
        ("xcp561-cpuinfo.json", 0x7, "assumed"),
    ],
)
def test_cases_from_public_reports(shared, name, xcr0, how):
    (host,) = load(shared / "cases/hosts" / name)
    assert host.xcr0 == xcr0
    assert host.provenance["layout"] == how


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("criu/criu42-regs64s-3thr", "assumed"),
        ("criu/criu42-regs64s-3thr/cpuinfo.img", "assumed"),
        ("elf/kernel618-regs64-3thr.core", "dump"),
        ("vmm/ch-state.json", "dump"),
        ("vmm/fc-bincode2-v8.vmstate", "dump"),
    ],
)
def test_machine_that_wrote_a_snapshot_is_a_host(shared, name, layout):
    """All were recorded on one Zen 4 with XCR0 0xe7."""
    host = resolve(str(shared / "samples" / name))
    assert host.kvm_xcr0 == 0xE7
    assert host.layout is not None
    assert host.layout.restricted(0xE7) == PRESETS["amd-zen4"].restricted(0xE7)
    assert host.provenance["layout"] == layout
    assert resolve(f"{shared / 'samples' / name}@6.6").kernel is not None


def test_snapshot_that_tells_of_no_machine_is_one_line(shared):
    path = shared / "samples/qemu/trimmed/q72-haswell-smp2-pc.qemustate"
    with pytest.raises(XfastError, match="does not tell which machine wrote it"):
        load(path)


def test_directory_stands_for_its_descriptions(tmp_path):
    (tmp_path / "b.txt").write_text(CPUINFO)
    (tmp_path / "a.log").write_text(NEW_LOG)
    (tmp_path / ".hidden").write_text("x")
    (tmp_path / "sub").mkdir()
    specs = expand(f"{tmp_path}@6.6")
    assert [resolve(spec).name for spec in specs] == ["a@6.6", "b@6.6"]
    assert expand(str(tmp_path / "a.log")) == [str(tmp_path / "a.log")]
    assert expand("amd-milan@6.6") == ["amd-milan@6.6"]


def test_utf16_is_what_powershell_writes():
    (host,) = parse(CPUINFO.encode("utf-16"))
    assert host.xcr0 == 0x207


def test_control_characters_are_escaped_wherever_they_come_from():
    evil = "\x1b[31mroot\x07\u202e"
    (host,) = parse(CPUINFO.replace("AuthenticAMD", evil).encode(), f"d/{evil}.txt")
    assert host.vendor is not None
    for text in (host.name, host.vendor, host.source, *host.notes):
        assert text.isprintable(), text
    (host,) = parse(CPU_XML.replace("Skylake-Server-IBRS", "&#9;x").encode())
    assert all(note.isprintable() for note in host.notes)
    ebx = int.from_bytes(b"\x1b[2J", "little")
    (host,) = parse(f"   0x00000000 0x00: eax=0x00000001 ebx={ebx:#010x} ecx=0x00000000 "
                    "edx=0x00000000\n".encode())  # fmt: skip
    assert host.vendor is not None
    assert host.vendor.isprintable()


def test_every_reader_has_a_title_of_its_own():
    titles = [reader.title for reader in READERS]
    assert len(titles) == len(set(titles))


def one_line_or_hosts(data: bytes) -> None:
    """Read `data`, and take hosts or one clear line."""
    complaint = ""
    try:
        for host in parse(data, "h"):
            parse(to_json([host]).encode())
    except XfastError as error:
        complaint = str(error)
    assert "\n" not in complaint
    assert not complaint or complaint.startswith("h: ")


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_at_every_64th_byte(kind):
    data = KINDS[kind][0]
    whole = data if isinstance(data, bytes) else data.encode()
    for length in range(0, len(whole), 64):
        one_line_or_hosts(whole[:length])


@given(st.sampled_from(sorted(KINDS)), st.data())
def test_damaged_in_any_place(kind, draw):
    data = KINDS[kind][0]
    whole = data if isinstance(data, bytes) else data.encode()
    at = draw.draw(st.integers(0, len(whole)))
    cut = draw.draw(st.integers(0, 40))
    more = draw.draw(
        st.binary(max_size=20)
        | st.sampled_from([b"9" * 40, b"-1", b"0x" + b"f" * 30, b"[" * 40, b'"', b"\x1b", b"1e999"])
    )
    one_line_or_hosts(whole[:at] + more + whole[at + cut :])


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = (
    "schema", "hosts", "guest_cpu_config", "kernel_version", "cpuid_modifiers", "lscpu", "flags",
    "features_hvm", "vendor", "family", "model", "return", "QMP", "props", "name",
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=4))
def test_wrong_types_in_json(document):
    one_line_or_hosts(json.dumps(document).encode())


@given(VALUES, st.sampled_from(["lscpu", "return", "flags", "features_hvm", "guest_cpu_config"]))
def test_wrong_types_deeper_in_json(value, key):
    row = {"leaf": "0x7", "subleaf": "0x0", "flags": value}
    for inner in (
        value,
        [value],
        {"model": value},
        {"model": {"name": "max", "props": value}},
        [{"field": "Flags:", "data": value}],
        {"cpuid_modifiers": [value]},
        {"cpuid_modifiers": [row]},
    ):
        one_line_or_hosts(json.dumps({key: inner}).encode())


WHOLE = """\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 1
flags\t\t: fpu vme de pse tsc msr pae fxsr sse sse2 ht syscall nx lm xsave avx avx2 pku
bugs\t\t: spectre_v1
bogomips\t: 4890.84
"""


@pytest.mark.parametrize("cut", [90, 100, 120, 140])
def test_flags_that_are_cut_off_are_no_fact(cut):
    """A file cut within its flags told of a machine without AVX, as a fact."""
    assert WHOLE.index(" vme") < cut < WHOLE.index("\nbugs")
    with pytest.raises(FormatError, match="got the end within them"):
        parse(WHOLE[:cut].encode(), "cut.txt")
    (host,) = parse((WHOLE + "\n" + WHOLE[:cut]).encode(), "cut.txt")
    assert host.xcr0 == 0x207


def test_flags_at_the_end_of_a_text_may_be_cut_off():
    flags = WHOLE.splitlines()[4]
    (host,) = parse(flags.encode(), "pasted.txt")
    assert any("cut off" in note for note in host.notes)
    (host,) = parse(f"{flags}\n".encode(), "pasted.txt")
    assert not any("cut off" in note for note in host.notes)


@pytest.mark.parametrize("width", [20, 40, 70])
def test_flags_that_a_mail_wrapped_are_read_to_their_end(width):
    head, flags = WHOLE.partition("flags")[0], WHOLE.splitlines()[4][9:]
    wrapped = "\n".join(textwrap.wrap(flags, width))
    (whole,) = parse(WHOLE.encode(), "cpuinfo")
    (host,) = parse(f"{head}flags\t\t: {wrapped}\nbugs\t\t: none\n".encode(), "cpuinfo")
    assert (host.features, host.xcr0) == (whole.features, whole.xcr0)


@pytest.mark.parametrize(
    "labels",
    [
        ("Architektur:", "Anbieterkennung:", "Markierungen:"),
        ("Architecture :", "Identifiant constructeur :", "Drapaux :"),
        ("\u67b6\u6784\uff1a", "\u5382\u5546 ID\uff1a", "\u6807\u8bb0\uff1a"),
    ],
)
@pytest.mark.parametrize("form", ["text", "json"])
def test_lscpu_in_any_language(labels, form):
    flags = WHOLE.splitlines()[4][9:]
    fields = dict(zip(labels, ("x86_64", "AuthenticAMD", flags), strict=True))
    text = "".join(f"{key:<30}{value}\n" for key, value in fields.items())
    if form == "json":
        rows = [{"field": key, "data": value} for key, value in fields.items()]
        text = json.dumps({"lscpu": rows})
    (host,) = parse(text.encode(), "lscpu")
    assert host.vendor == "AuthenticAMD"
    assert host.xcr0 == 0x207
    assert {"avx2", "pku"} <= host.features
