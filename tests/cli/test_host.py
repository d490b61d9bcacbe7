"""Pools, `xfast host`, and the running machine."""

from __future__ import annotations

import json
import os
import platform
from functools import reduce
from operator import and_

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xfast.cli.main import main
from xfast.hosts import Host, load, parse, resolve, this
from xfast.hosts.baseline import (
    QEMU_LACKS,
    QEMU_MODEL_FEATURES,
    common,
    firecracker_template,
    qemu_cpu,
)
from xfast.hosts.catalogue import catalogue
from xfast.hosts.firecracker import apply_template
from xfast.hosts.models import qemu_name
from xfast.kernels.behaviour import of_release
from xfast.kvm import Kernel
from xfast.xsave.cpuid import FEATURES, RUNTIME_FEATURES
from xfast.xsave.features import XFEATURE_MASK_FPSSE
from xfast.xsave.layout import PRESETS

POOLS = st.lists(st.sampled_from(sorted(catalogue())), min_size=1, max_size=4)


@given(POOLS)
def test_pool_has_what_each_member_has(names):
    hosts = [catalogue()[name] for name in names]
    level = common(hosts)
    assert level.features == frozenset.intersection(*(h.features or frozenset() for h in hosts))
    assert level.kvm_xcr0 == reduce(and_, (h.kvm_xcr0 or 0 for h in hosts))
    assert level.layout is not None
    for slot in level.layout.slots:
        assert all(host.layout and host.layout.by_nr[slot.nr] == slot for host in hosts)


@given(POOLS, st.permutations(range(4)))
def test_order_of_a_pool_does_not_matter(names, order):
    shuffled = [names[i] for i in order if i < len(names)]
    one, two = (common([catalogue()[name] for name in pool]) for pool in (names, shuffled))
    assert one.replace(source="") == two.replace(source="")


def test_what_one_host_does_not_tell_is_unknown_of_the_pool():
    level = common([resolve("amd-rome"), Host("dark", xcr0=7)])
    assert level.xcr0 == 7
    assert (level.features, level.kvm_xcr0, level.layout) == (None, None, None)
    with pytest.raises(ValueError, match="got none"):
        common([])


def test_qemu_names_are_qemus(shared):
    text = (shared / "samples/qemu/q11-max-smp4-q35.json").read_text()
    known = json.loads(text)["model"]["model"]["props"].keys()
    for feature in FEATURES.keys() - RUNTIME_FEATURES - QEMU_LACKS:
        assert qemu_name(feature) in known
    for feature in QEMU_LACKS:
        assert feature.replace("_", "-") not in known


def test_qemu_cpu_adds_and_takes_away():
    features = (QEMU_MODEL_FEATURES | {"avx", "sse4_1", "user_shstk", "enqcmd"}) - {"cx16"}
    assert qemu_cpu(features) == "qemu64,-svm,+avx,+sse4.1,+cet-ss,-cx16"


@given(st.lists(st.sampled_from(sorted(catalogue())), min_size=2, max_size=4, unique=True))
def test_template_levels_every_host_of_its_pool(tmp_path_factory, names):
    """Apply it, as Firecracker would: all hosts then show the same features and components."""
    hosts = [catalogue()[name] for name in names]
    path = tmp_path_factory.mktemp("template") / "pool.json"
    path.write_text(json.dumps(firecracker_template(hosts)))
    level = common(hosts)
    hidden = {f.name for f in FEATURES.values() if (f.leaf, f.subleaf) == (7, 1)}
    for host in hosts:
        under = apply_template(host, str(path))
        assert under.kvm_xcr0 == level.kvm_xcr0
        assert under.features is not None
        assert level.features is not None
        extra = under.features - level.features
        assert extra <= hidden
        assert not extra or not level.features & hidden


def test_template_hides_a_subleaf_that_some_hosts_lack():
    """Firecracker issue 5674: a template that edits a sub-leaf breaks hosts without it."""
    template = firecracker_template([resolve("intel-haswell"), resolve("intel-sapphirerapids")])
    edited = {(entry["leaf"], entry["subleaf"]) for entry in template["cpuid_modifiers"]}
    assert ("0x7", "0x1") not in edited
    (leaf7,) = (entry for entry in template["cpuid_modifiers"] if entry["leaf"] == "0x7")
    assert {"register": "eax", "bitmap": "0b" + "0" * 32} in leaf7["modifiers"]


def test_template_of_equal_hosts_changes_nothing():
    assert firecracker_template([resolve("amd-milan")] * 2) == {"cpuid_modifiers": []}
    with pytest.raises(ValueError, match="not known of dark"):
        firecracker_template([Host("dark")])


def test_show_lists_the_catalogue(capsys):
    assert main(["host", "show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == sorted(catalogue())


def test_show_tells_how_each_fact_is_known(capsys):
    assert main(["host", "show", "amd-milan@6.1.60"]) == 0
    out = capsys.readouterr().out
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert rows["layout"] == "amd-zen3  [dump]"
    assert rows["kvm_xcr0"] == "0x207 x87+sse+avx+pkru  [derived]"
    assert rows["kernel"].startswith("6.1.60 ")
    assert rows["kernel"].endswith("[assumed]")
    assert rows["xsave2_size"] == "unknown"


def test_show_json_is_a_description(capsys):
    assert main(["host", "show", "amd-rome", "intel-haswell@6.6", "--json"]) == 0
    assert parse(capsys.readouterr().out.encode()) == [
        resolve("amd-rome"),
        resolve("intel-haswell@6.6"),
    ]


def test_show_names_a_layout_of_its_own(capsys, tmp_path):
    path = tmp_path / "odd.toml"
    path.write_text(
        'schema = "xfast/1"\n[[hosts]]\nname = "odd"\n'
        "layout = [{nr = 2, size = 256, offset = 576}, {nr = 9, size = 8, offset = 832}]\n"
    )
    assert main(["host", "show", str(path)]) == 0
    assert "its own: avx@576+256 pkru@832+8" in capsys.readouterr().out


def test_baseline_of_a_mixed_pool(capsys):
    pool = ["intel-icelake-server", "amd-genoa", "intel-sapphirerapids"]
    assert main(["host", "baseline", *pool]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["XCR0"] == "0x2e7"
    assert rows["elsewhere"] == "opmask zmm_hi256 hi16_zmm pkru"
    assert rows["psABI"] == "x86-64-v4"
    assert main(["host", "baseline", *pool, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "xfast/1"
    facts = document["baseline"]
    assert facts["hosts"] == pool
    assert facts["xcr0"] == "0x2e7"
    assert facts["moved"] == ["opmask", "zmm_hi256", "hi16_zmm", "pkru"]
    assert rows["QEMU"] == "-cpu " + facts["qemu_cpu"]
    assert main(["host", "baseline", *pool, "--format", "qemu"]) == 0
    assert capsys.readouterr().out.strip() == facts["qemu_cpu"]
    assert main(["host", "baseline", *pool, "--format", "firecracker"]) == 0
    assert json.loads(capsys.readouterr().out) == facts["firecracker_template"]


def test_baseline_says_unknown(capsys, tmp_path):
    path = tmp_path / "dark.toml"
    path.write_text('schema = "xfast/1"\n[[hosts]]\nname = "dark"\n')
    assert main(["host", "baseline", "amd-rome", str(path)]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    for row in ("XCR0", "components", "elsewhere", "psABI", "features", "QEMU"):
        assert rows[row] == "unknown", row
    for kind in ("qemu", "firecracker"):
        assert main(["host", "baseline", str(path), "--format", kind]) == 2


def test_no_such_host_is_one_line_and_exit_2(capsys):
    assert main(["host", "show", "nope"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1


needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="not an x86_64 machine")


@needs_x86
def test_this_machine_can_be_written_and_read(tmp_path, capsys):
    path = tmp_path / "this.json"
    assert main(["host", "dump", "-o", str(path)]) == 0
    assert capsys.readouterr().out == ""
    (host,) = load(path)
    assert host.name == platform.node()
    assert host == resolve("this").replace(name=host.name, source=host.source)
    assert host.kernel is not None
    assert host.kernel.release == os.uname().release


@needs_x86
def test_this_machine_has_the_flags_of_its_kernel():
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        flags = next(line for line in file if line.startswith("flags")).split()[2:]
    host = resolve("this")
    assert host.cpuid is not None
    kernel_hides = {"user_shstk", "movdiri", "movdir64b", "avx10", "lwp", "uintr", "syscall"}
    assert set(flags) & FEATURES.keys() <= host.cpuid.features
    user = {"avx", "avx2", "avx512f", "amx_tile", "pku"} - kernel_hides
    assert host.cpuid.features & user == set(flags) & user


@needs_x86
def test_this_machine_enables_what_it_can_place():
    host = resolve("this")
    if "xsave" not in host.xsave:
        pytest.skip("no XSAVE here")
    assert host.layout is not None
    assert host.xcr0 is not None
    assert host.xcr0 & XFEATURE_MASK_FPSSE == XFEATURE_MASK_FPSSE
    assert not host.xcr0 & ~host.layout.user_mask
    assert any(host.layout.restricted(p.mask) == host.layout for p in PRESETS.values())


@needs_x86
def test_this_kvm_is_probed():
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm can't be opened")
    host = resolve("this")
    for fact in ("kvm_xcr0", "guest_permission", "mxcsr_mask", "kernel"):
        assert host.provenance[fact] == "probed", fact
    assert host.kernel is not None
    assert host.kernel.provenance == "probed"
    if host.kernel.release.startswith(("6.6.", "6.12.", "6.18.")):
        assert "get-trims" in host.kernel


@needs_x86
def test_without_kvm_the_kernel_is_assumed(monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", "/dev/kvm")

    monkeypatch.setattr("xfast.hosts.this.os.open", refuse)
    host = resolve("this")
    assert host.provenance["kernel"] == "assumed"
    assert host.provenance["kvm_xcr0"] == "derived"
    assert host.xsave2_size is None


@pytest.mark.parametrize(
    "release",
    ["5.15", "5.16.2", "5.17", "5.18.3", "6.0", "6.1.59", "6.1.60", "6.5.9", "6.6", "6.18"],
)
def test_probe_tells_the_generations_of_the_model_apart(monkeypatch, release):
    """The probe's ioctls, answered by the modelled kernel: it finds what that kernel is."""
    vcpu = Kernel(resolve("amd-genoa"), release).create_vcpu()

    def ioctl(descriptor, request, buffer):
        assert descriptor == 7
        if request == this.KVM_SET_CPUID2:
            vcpu.set_cpuid2(this.read_cpuid2(bytes(buffer)))
        elif request == this.KVM_SET_XSAVE:
            vcpu.set_xsave(bytes(buffer))
        elif request == this.KVM_GET_XSAVE:
            buffer[:] = vcpu.get_xsave()
        else:
            raise AssertionError(hex(request))

    monkeypatch.setattr(this, "ioctl", ioctl)
    settled = this.PROBED - {"xsave2"}
    assert this.probe(7, 4096) == of_release(release).names & settled


def test_show_says_what_is_assumed_and_what_would_settle_it(capsys, tmp_path):
    path = tmp_path / "flags.txt"
    path.write_text("vendor_id : GenuineIntel\nflags : fpu sse sse2 xsave avx\n")
    assert main(["host", "show", str(path)]) == 0
    out = capsys.readouterr().out
    assert "layout            as all CPUs  [assumed]" in out
    assert "note              flags tell features alone" in out
    assert "uncertain         layout is assumed: the output of `cpuid -r` there" in out
    assert "kvm_xcr0 is assumed: `xfast host dump` there" in out


def test_show_warns_of_a_list_that_contradicts_itself(capsys, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(
        "   0x0000000d 0x00: eax=0x00020007 ebx=0x00000340 ecx=0x00000340 edx=0x00000000\n"
        "   0x0000000d 0x02: eax=0x00000100 ebx=0x00000240 ecx=0x00000000 edx=0x00000000\n"
    )
    assert main(["host", "show", str(path)]) == 0
    out = capsys.readouterr().out
    assert "warning           xcr0: leaf 0xD has one component of AMX without the other" in out
    assert "warning           unplaced: leaf 0xD announces tilecfg" in out
    assert "layout            as all CPUs; place unknown: tilecfg  [dump]" in out


def test_show_of_a_directory_goes_on_past_a_bad_file(capsys, tmp_path):
    (tmp_path / "good.txt").write_text("flags : fpu sse sse2 xsave avx\n")
    (tmp_path / "bad.toml").write_text("schema = 1\n")
    assert main(["host", "show", f"{tmp_path}@6.6"]) == 3
    captured = capsys.readouterr()
    assert "good@6.6" in captured.out
    assert captured.err.count("\n") == 1
    assert "bad.toml" in captured.err
    assert main(["host", "baseline", str(tmp_path)]) == 2


def test_nothing_that_a_file_says_reaches_the_terminal_raw(capsys, tmp_path):
    path = tmp_path / "a\x1b[31mb.txt"
    path.write_text("vendor_id : \x1b]0;x\x07\nflags : fpu sse sse2 xsave avx\n")
    assert main(["host", "show", str(path)]) == 0
    assert main(["host", "show", str(path), "amd-rome"]) == 0
    assert main(["host", "show", "--json", str(path)]) == 0
    assert main(["host", "baseline", str(path), "amd-rome"]) == 0
    captured = capsys.readouterr()
    assert not {"\x1b", "\x07"} & set(captured.out + captured.err)
    assert "\\x1b[31mb" in captured.out


def test_layout_tells_which_component_makes_the_size(capsys):
    """The size that a guest's kernel found, 10752: XCR0 0x600e7 and IA32_XSS 0x1800, compacted."""
    assert main(["host", "layout", "0x600e7|0x1800"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("intel: 0x618e7 x87+sse+avx")
    assert ["11", "cet_u", "16", "-", "2432"] in [line.split() for line in lines]
    assert ["17", "tilecfg", "64", "2752", "2496"] in [line.split() for line in lines]
    assert lines[-2:] == [
        "standard   11008 bytes, by tiledata",
        "compacted  10752 bytes, by tiledata",
    ]
    assert main(["host", "layout", "avx+pkru", "--host", "amd-milan"]) == 0
    out = capsys.readouterr().out
    assert "amd-milan, layout dump: 0x204 avx+pkru" in out
    assert "standard   2440 bytes, by pkru" in out
    assert main(["host", "layout", "0x80007"]) == 0
    assert "standard   1088 bytes, by apx" in capsys.readouterr().out
    assert main(["host", "layout", "0x207"]) == 0
    assert capsys.readouterr().out.count("standard   ") == 4  # all layouts that can hold it


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["0xzz"], "expected a mask such as 0x2e7"),
        (["avx+nope"], "expected a mask such as 0x2e7"),
        ([""], "expected a mask"),
        (["-1"], "expected a mask"),
        (["0x8000000000000000"], "below 2^63"),
        ([str(1 << 5000)], "expected a mask"),
        (["0x4000000000060000"], "components that some CPU has together"),
        (["0x60007", "--host", "amd-milan"], "has no tilecfg+tiledata"),
        (["0x7", "--host", "nowhere"], "expected a file"),
    ],
)
def test_layout_of_what_is_no_mask_is_one_line(capsys, words, complaint):
    assert main(["host", "layout", *words[1:], "--", words[0]]) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_layout_of_a_host_that_does_not_tell_it(capsys, tmp_path):
    path = tmp_path / "dark.toml"
    path.write_text('schema = "xfast/1"\n[[hosts]]\nname = "dark"\n')
    assert main(["host", "layout", "7", "--host", str(path)]) == 2
    assert "does not tell its layout" in capsys.readouterr().err


def test_baseline_names_the_best_model(capsys):
    assert main(["host", "baseline", "amd-milan", "amd-genoa"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["named"].startswith("-cpu EPYC-Milan  (without ")
    assert main(["host", "baseline", "amd-milan", "intel-haswell", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["baseline"]
    assert facts["qemu_model"] == "x86-64-v3"
    assert main(["host", "baseline", "m5.metal", "EPYC-Milan"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["named"].startswith("-cpu x86-64-v3")


def test_check_says_which_facts_of_a_host_are_assumed(capsys, tmp_path, data):
    path = tmp_path / "flags.txt"
    path.write_text("vendor_id : GenuineIntel\nflags : fpu sse sse2 xsave avx\n")
    area = str(data / "raw/kvm618-guestxcr0_e7-bv03.xsave")
    main(["check", area, "--host", str(path), "amd-milan"])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "assumed" in line]
    assert line.startswith("xfast: flags: layout assumed (certain with ")
    main(["check", "--quiet", area, "--host", str(path)])
    assert "assumed" not in capsys.readouterr().err
