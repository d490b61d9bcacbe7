"""Plans: what goes, what stays, why; and that a host takes the result, whatever the format."""

import json
import lzma
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import xfast
from xfast.cli.main import main
from xfast.errors import PolicyError, XfastError
from xfast.hosts.model import Host
from xfast.kernels.behaviour import of_release
from xfast.repair.apply import apply
from xfast.repair.batch import fix_areas
from xfast.repair.plan import plan_fix
from xfast.snapshots.model import Snapshot, Vcpu
from xfast.store import put
from xfast.xsave import area as engine
from xfast.xsave.features import BY_NAME, PKRU, TILEDATA, bits
from xfast.xsave.layout import PRESETS

INTEL, GENOA, ROME, MILAN = (PRESETS[n] for n in ("intel", "amd-zen4", "amd-zen2", "amd-zen3"))


def host(mask=0x2E7, layout=INTEL, release="6.6", **facts):
    facts = {"mxcsr_mask": 0xFFFF, **facts}
    return Host(
        f"{layout.name}-{mask:x}@{release}",
        layout=layout.restricted(mask),
        xcr0=mask,
        kvm_xcr0=mask,
        kernel=of_release(release),
        **facts,
    )


def area(mask, layout=INTEL, size=4096, live=0, fill=0x5A):
    """Return an area whose components are init, but for `live`, which hold a pattern."""
    image = np.zeros(size, np.uint8)
    image[0:2] = 0x7F, 0x03
    image[24:26] = 0x80, 0x1F
    image[512:520] = np.frombuffer(mask.to_bytes(8, "little"), "u1")
    for nr in bits(live):
        if nr == 0:
            image[32:42] = fill
        elif nr == 1:
            image[160:416] = fill
        else:
            slot = layout.slot(nr)
            image[slot.offset : slot.offset + slot.size] = fill
    return image


def pkru(image, layout, value):
    offset = layout.slot(9).offset
    image[offset : offset + 4] = np.frombuffer(value.to_bytes(4, "little"), "u1")
    return image


def snapshot(*images, layout=INTEL, kind="vm", **facts):
    facts = {"xcr0": 7, "layout_source": "given", **facts}
    vcpus = [Vcpu(i, image, layout, **facts) for i, image in enumerate(images)]
    return Snapshot("blob", "raw", kind, "kvm", vcpus)


def held(image):
    return int.from_bytes(image[512:520].tobytes(), "little")


@pytest.mark.parametrize("value", [0, 0x55555554])
def test_a_leaked_pkru_goes_by_itself(value):
    image = pkru(area(0x207, live=6), INTEL, value)
    plan = plan_fix(snapshot(image), host(0x7, release="6.1"))
    assert plan.before.verdict == "incompatible"
    assert plan.after.verdict == "identical"
    (change,) = plan.changes
    assert (change.rule, change.component, change.field) == ("LEAK", "pkru", "xstate_bv")
    assert (change.before, change.after) == ("0x207", "0x7")
    assert change.state == ("default" if value else "init")
    assert held(plan.areas[0]) == 7
    assert not plan.areas[0][2688:].any()
    assert np.array_equal(plan.areas[0][576:832], image[576:832])
    assert "leaves the vCPU's PKRU as it was" in plan.notes[0]
    assert held(image) == 0x207  # the snapshot stays as it is


def test_live_data_stay_unless_they_are_given_up():
    image = pkru(area(0x207), INTEL, 0xC)
    blob, target = snapshot(image), host(0x7, release="6.1")
    plan = plan_fix(blob, target)
    assert not plan.changes
    assert [finding.component for finding in plan.left] == ["pkru"]
    with pytest.raises(PolicyError, match="--drop pkru --even-if-live"):
        plan.require_restorable()
    with pytest.raises(PolicyError, match="holds live data"):
        plan_fix(blob, target, drop=["pkru"])
    given_up = plan_fix(blob, target, drop=["pkru"], even_if_live=True)
    assert given_up.changes[0].state == "live"
    assert given_up.after.verdict == "identical"


def test_even_if_live_is_about_the_named_component_only():
    image = pkru(area(0xE7 | PKRU, live=0xE0), INTEL, 0xC)
    plan = plan_fix(snapshot(image), host(7), drop=["pkru"], even_if_live=True)
    assert [change.component for change in plan.changes] == ["pkru"]
    assert {finding.component for finding in plan.left} == {"opmask", "zmm_hi256", "hi16_zmm"}


def test_what_lies_under_clear_bits_is_not_passed_on_where_an_area_is_rewritten():
    image = pkru(area(0x204, live=4), INTEL, 0)
    slot = INTEL.slot(7)
    image[slot.offset : slot.offset + 6] = list(b"SECRET")
    image[32:38] = image[200:206] = list(b"SECRET")
    plan = plan_fix(snapshot(image), host(7, release="6.1"))
    assert b"SECRET" not in plan.areas[0].tobytes()
    assert plan.areas[0][:32].tobytes() == image[:32].tobytes()  # MXCSR counts for AVX
    assert "x87+sse+hi16_zmm, whose XSTATE_BV bits are clear" in " ".join(plan.notes)
    image[512:520] = 4, 0, 0, 0, 0, 0, 0, 0
    assert not plan_fix(snapshot(image), host(7, release="6.1")).areas


def test_what_is_asked_for_goes_although_nothing_needs_it():
    plan = plan_fix(snapshot(area(0x207, live=2)), host(0x207), drop=["9"])
    assert [(c.component, c.rule, c.state) for c in plan.changes] == [("pkru", "LEAK", "init")]
    plan = plan_fix(snapshot(area(7, live=2)), host(7), drop=["avx"])
    assert [(c.component, c.rule, c.state) for c in plan.changes] == [("avx", "", "init")]


def test_a_name_that_is_no_component():
    with pytest.raises(ValueError, match="got 'pku'"):
        plan_fix(snapshot(area(7)), host(7), drop=["pku"])


def test_components_that_the_target_lacks():
    image = area(0xE7, live=0x6)
    plan = plan_fix(snapshot(image, xcr0=7), host(7))
    assert {change.component for change in plan.changes} == {"opmask", "zmm_hi256", "hi16_zmm"}
    assert not plan.left
    assert held(plan.areas[0]) == 7
    enabled = plan_fix(snapshot(image, xcr0=0xE7), host(7))
    assert [finding.code for finding in enabled.left] == ["XCR0"]


def test_a_doubt_about_the_kernel_takes_no_x87_and_sse_away():
    plan = plan_fix(snapshot(area(3), xcr0=1), xfast.resolve("amd-milan"))
    doubts = [(f.code, f.component, f.open) for f in plan.before.findings]
    assert doubts == [("KERNEL", "x87", True), ("KERNEL", "sse", True)]
    assert not plan.changes


def test_a_component_that_xfd_disables():
    image = area(0x600E7, size=11008, live=0x6)
    target = host(0x600E7, release="6.6", xsave2_size=11008, guest_permission=TILEDATA)
    plan = plan_fix(snapshot(image, xcr0=0x600E7, xfd=TILEDATA), target)
    assert [(c.rule, c.component) for c in plan.changes] == [("XFD", "tiledata")]
    assert not plan.left


def test_idle_tiles_are_trimmed_in_every_vcpu():
    images = area(0x600E7, size=11008, live=6), area(0xE7, size=11008, live=6)
    target = host(0x600E7, xsave2_size=4096, guest_permission=TILEDATA)
    plan = plan_fix(snapshot(*images, xcr0=0xE7), target)
    assert {len(image) for image in plan.areas.values()} == {4096}
    assert sorted(plan.areas) == [0, 1]
    assert not plan.left
    sizes = [(c.vcpu, c.before, c.after) for c in plan.changes if c.field == "size"]
    assert sizes == [(0, "11008", "4096"), (1, "11008", "4096")]


def test_live_tiles_are_not_trimmed():
    image = area(0x600E7, size=11008, live=TILEDATA | 6)
    target = host(0x600E7, xsave2_size=4096, guest_permission=TILEDATA)
    plan = plan_fix(snapshot(image, xcr0=0x600E7), target)
    assert "SIZE" in {finding.code for finding in plan.left}
    assert not plan.areas


@pytest.mark.parametrize("dirty", [520, 528, 575])
def test_a_dirty_header_is_cleaned(dirty):
    image = area(7, live=6)
    image[dirty] = 1
    plan = plan_fix(snapshot(image), host(7))
    assert [(c.rule, c.field, c.after) for c in plan.changes] == [("FORMAT", "header", "zero")]
    differing = np.flatnonzero(plan.areas[0] != image)
    assert differing.tolist() == [dirty]


def test_a_compacted_area_is_expanded():
    image = area(7, live=6)
    packed = engine.compact(image, INTEL, xcomp_bv=7, size=4096)
    plan = plan_fix(snapshot(packed), host(7))
    assert np.array_equal(plan.areas[0], image)
    assert plan.after.verdict == "identical"


@pytest.mark.parametrize(
    ("ours", "theirs", "mask"),
    [(ROME, MILAN, 0x207), (INTEL, GENOA, 0x2E7), (GENOA, INTEL, 0xE7), (MILAN, INTEL, 0x207)],
)
def test_an_area_moves_to_the_targets_layout(ours, theirs, mask):
    image = area(mask, ours, live=mask & ~1)
    target = host(mask, theirs, mxcsr_mask=0xFFFF if theirs is INTEL else 0x2FFFF)
    plan = plan_fix(snapshot(image, layout=ours, xcr0=mask, cpuid=None), target)
    assert not plan.left
    assert engine.diff(image, plan.areas[0], ours, theirs) == 0
    assert [change.rule for change in plan.changes] == ["LAYOUT"]
    assert plan.areas[0][28:32].view("<u4")[0] == target.mxcsr_mask


@pytest.mark.parametrize("tells", [True, False])
def test_an_area_is_not_moved_twice(tells):
    """MXCSR_MASK tells that it was moved, or else bytes where the given layout has nothing."""
    image = area(0xE7, GENOA, live=0xE6)
    target = host(0xE7, mxcsr_mask=0xFFFF if tells else None)
    once = plan_fix(snapshot(image, layout=GENOA, xcr0=0xE7), target).areas[0]
    with pytest.raises(PolicyError, match="contradicted: " + ("MXCSR_MASK" if tells else "byte")):
        plan_fix(snapshot(once, layout=GENOA, xcr0=0xE7), target)


def test_a_small_area_grows_where_the_targets_layout_is_larger():
    images = area(0x207, ROME, 896, live=0x206), area(7, ROME, 896, live=6)
    plan = plan_fix(snapshot(*images, layout=ROME, xcr0=0x207), host(0x207))
    assert {len(image) for image in plan.areas.values()} == {2696}
    assert engine.diff(images[0], plan.areas[0], ROME, INTEL) == 0


def test_areas_of_different_sizes_stay_so_where_none_has_to_grow():
    images = area(0x207, size=11008, live=6), area(7, size=4096, live=6)
    plan = plan_fix(snapshot(*images), host(7))
    assert {i: len(image) for i, image in plan.areas.items()} == {0: 11008}


def test_a_layout_that_the_files_own_cpuid_fixes_is_left(data):
    (found,) = xfast.read(data / "vmm" / "ch-state.json")
    plan = plan_fix(found, xfast.resolve("intel-sapphirerapids@6.6"))
    assert {finding.code for finding in plan.left} == {"LAYOUT"}
    with pytest.raises(PolicyError, match="CPUID"):
        plan.require_restorable()


def test_an_unknown_layout_is_not_repaired_by_guess():
    image = pkru(area(0x207, MILAN), MILAN, 0)
    plan = plan_fix(snapshot(image, layout=None, layout_note="three fit"), host(7))
    assert not plan.changes
    assert plan.left


def test_a_core_of_an_old_gdb_is_refused(data, tmp_path):
    path = tmp_path / "core"
    path.write_bytes(lzma.decompress((data / "elf" / "gdb13-regs64-3thr.core.xz").read_bytes()))
    (found,) = xfast.read(path)
    assert {vcpu.layout.mask for vcpu in found.vcpus} == {7}
    plan = plan_fix(found, host(7))
    assert not plan.changes
    with pytest.raises(PolicyError, match="would still refuse"):
        plan.apply(str(tmp_path / "out"))
    with pytest.raises(PolicyError, match="is not known"):
        plan_fix(found, host(7), drop=["opmask", "zmm_hi256", "hi16_zmm"], even_if_live=True)


def test_bit_63_of_xstate_bv_is_no_component_and_goes():
    image = area(7)
    image[519] |= 0x80
    plan = plan_fix(snapshot(image, layout=INTEL.restricted(7)), host(7))
    (change,) = plan.changes
    assert (change.component, change.rule) == ("bit63", "LEAK")
    assert held(plan.areas[0]) == 7
    assert plan.after.verdict != "incompatible"


def test_a_component_that_nobody_knows_goes_where_its_data_may():
    image = area(7)
    image[517] |= 1
    one = snapshot(image, layout=INTEL.restricted(7))
    assert plan_fix(one, host(7)).left
    with pytest.raises(PolicyError, match="bit40 holds live data"):
        plan_fix(one, host(7), drop=["bit40"])
    plan = plan_fix(one, host(7), drop=["bit40"], even_if_live=True)
    assert held(plan.areas[0]) == 7


def test_a_plan_for_a_good_snapshot_is_empty():
    plan = plan_fix(snapshot(area(7, live=6)), host(7))
    assert (plan.changes, plan.areas, plan.notes) == ((), {}, ())


def test_what_a_process_lost_with_its_pkru_is_told():
    image = pkru(area(0x207), INTEL, 0x55555554)
    plan = plan_fix(snapshot(image, kind="process"), host(7))
    assert [change.rule for change in plan.changes] == ["HOST-MISSING"]
    assert "sigreturn" in plan.notes[0]


MASKS = st.sampled_from([0x3, 0x7, 0x1F, 0xE7, 0x207, 0x2E7, 0x2FF, 0x602E7])


@settings(max_examples=150)
@given(
    mask=MASKS, live=st.integers(0, 0x602FF), have=MASKS, xcr0=MASKS, release=st.sampled_from(
        ["5.15", "5.16", "5.18", "6.1", "6.6", "6.19"]
    ),
)  # fmt: skip
def test_a_second_plan_has_nothing_to_do(mask, live, have, xcr0, release):
    target = host(have, release=release, xsave2_size=11008, guest_permission=TILEDATA)
    image = area(mask, size=11008, live=live & mask)
    plan = plan_fix(snapshot(image, xcr0=xcr0), target)
    repaired = plan.areas.get(0, image)
    again = plan_fix(snapshot(repaired, xcr0=xcr0), target)
    assert not again.changes
    assert again.before.findings == plan.after.findings
    kept = held(repaired)
    assert engine.diff(image, repaired, INTEL) & (live & mask) == 0  # nothing live was lost
    assert not kept & ~mask
    fixed = {(c.rule, c.component) for c in plan.changes}
    assert not fixed & {(f.code, f.component) for f in again.before.findings}


def test_a_batch_of_areas_in_one_call():
    rng = np.random.default_rng(7)
    masks = rng.choice([0x7, 0x3, 0x207, 0xE7, 0x2E7], 500)
    images = np.stack([area(int(m), live=6 & int(m)) for m in masks])
    fixed = fix_areas(images, INTEL, host(7))
    assert fixed.dropped.tolist() == [int(m) & ~7 for m in masks]
    for image, old, mask in zip(fixed.areas, images, masks, strict=True):
        assert held(image) == mask & 7
        assert engine.diff(image, old, INTEL) == 0
    assert engine.audit(fixed.areas, 7, 0xFFFF).any() == False  # noqa: E712
    one = fix_areas(images[2], INTEL, host(7))
    assert np.array_equal(one.areas, fixed.areas[2])
    assert one.dropped == fixed.dropped[2]


def test_a_batch_with_one_live_row_is_refused_as_a_whole():
    images = np.stack([area(0x207), pkru(area(0x207), INTEL, 0xC), pkru(area(0x207), INTEL, 4)])
    with pytest.raises(PolicyError, match=r"areas\[1\]: pkru .* \(2 areas\)"):
        fix_areas(images, INTEL, host(7))
    assert [held(image) for image in images] == [0x207] * 3
    fixed = fix_areas(images, INTEL, host(7), drop=PKRU)
    assert fixed.dropped.tolist() == [PKRU] * 3
    guest = fix_areas(images[:1], INTEL, host(0x207), guest=7)
    assert guest.dropped.tolist() == [PKRU]


def test_a_batch_moves_to_the_hosts_layout():
    images = np.stack([area(0xE7, GENOA, live=0xE6, fill=i) for i in range(1, 60)])
    fixed = fix_areas(images, GENOA, host(0xE7))
    assert not engine.diff(fixed.areas, images, INTEL, GENOA).any()
    assert (fixed.areas[:, 28:32].copy().view("<u4") == 0xFFFF).all()
    mixed = images.copy()
    mixed[3] = engine.compact(images[3], GENOA, xcomp_bv=0xE7, size=4096)
    assert np.array_equal(fix_areas(mixed, GENOA, host(0xE7)).areas, fixed.areas)


def test_a_batch_into_the_callers_memory():
    images = np.stack([area(0x207, live=6)] * 5)
    out = np.full((5, 4096), 0xAA, np.uint8)
    fixed = fix_areas(images, INTEL, host(0x602E7), guest=7, out=out)
    assert fixed.areas is out
    assert (engine.headers(out).xstate_bv == 7).all()
    assert fix_areas(images, INTEL, host(0x602E7)).areas.shape == (5, 4096)
    assert fix_areas(images[:0], INTEL, host(7)).areas.shape == (0, 4096)
    with pytest.raises(ValueError, match="memory"):
        fix_areas(images, INTEL, host(7), out=images)


def test_a_host_that_does_not_tell_takes_no_batch():
    with pytest.raises(PolicyError, match="kvm_xcr0"):
        fix_areas(area(7), INTEL, Host("unknown"))


@pytest.mark.parametrize("name", ["vmm/ch-state.json", "vmm/fc-bincode1-v4.vmstate",
                                  "vmm/fc-bincode2-v8.vmstate"])  # fmt: skip
def test_vmms_files_come_out_valid(data, tmp_path, name):
    path = tmp_path / Path(name).name
    shutil.copy(data / name, path)
    (found,) = xfast.read(path)
    target = host(0xE7, GENOA, mxcsr_mask=0x2FFFF)
    plan = plan_fix(found, target, drop=["avx"], even_if_live=True)
    plan.apply(str(path) + ".new")
    (fixed,) = xfast.read(str(path) + ".new")  # its CRC64 is checked, its JSON parsed
    for old, new in zip(found.vcpus, fixed.vcpus, strict=True):
        assert held(new.area) == held(old.area) & ~4
        assert engine.diff(old.area, new.area, old.layout) & ~4 == 0
        assert not new.area[576:832].any()
        assert new.fpu_differs == ()
    plan.apply(in_place=True)
    assert path.read_bytes() == Path(str(path) + ".new").read_bytes()
    assert not plan_fix(xfast.read(path)[0], target, drop=["avx"], even_if_live=True).changes


def test_both_copies_of_cloud_hypervisors_sse_state(data, tmp_path):
    path = tmp_path / "state.json"
    whole = json.loads((data / "vmm" / "ch-state.json").read_text())
    for node in whole["snapshots"]["cpu-manager"]["snapshots"].values():
        state = json.loads(node["snapshot_data"]["state"])
        image = np.array(state["Kvm"]["xsave"]["region"], "<u4").view("u1")
        xmm = image[160:416].reshape(16, 16).tolist()
        state["Kvm"]["fpu"] = {"xmm": xmm, "mxcsr": int(image[24:28].view("<u4")[0]), "fcw": 895}
        node["snapshot_data"]["state"] = json.dumps(state)
    path.write_text(json.dumps(whole))
    (found,) = xfast.read(path)
    assert all(any(vcpu.facts["fpu"]["xmm"]) for vcpu in found.vcpus)
    target = host(0xE7, GENOA, mxcsr_mask=0x2FFFF)
    plan_fix(found, target, drop=["sse"], even_if_live=True).apply(in_place=True)
    (fixed,) = xfast.read(path)
    for vcpu in fixed.vcpus:
        assert not held(vcpu.area) & 2
        assert not any(vcpu.facts["fpu"]["xmm"])
        assert vcpu.fpu_differs == ()


def test_a_criu_directory(data, tmp_path):
    folder = tmp_path / "dump"
    shutil.copytree(data / "criu" / "criu42-regs64s-3thr", folder)
    (found,) = xfast.read(folder)
    target = host(7, INTEL, mxcsr_mask=0x2FFFF)
    words = ["opmask", "zmm_hi256", "hi16_zmm"]
    plan = plan_fix(found, target, drop=words, even_if_live=True)
    record = plan.apply(str(tmp_path / "out"))
    assert {p.name for p in tmp_path.iterdir()} == {"dump", "out", "out.xfast.json"}
    assert len(record["files"]) == len(plan.areas)
    names = {p.name for p in folder.iterdir()}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    touched = {file["name"] for file in record["files"]}
    for name in names - touched:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    (fixed,) = xfast.read(tmp_path / "out")
    for old, new in zip(found.vcpus, fixed.vcpus, strict=True):
        assert held(new.area) == held(old.area) & 7
        assert engine.diff(old.area, new.area, INTEL) & 7 == 0
    plan.apply(in_place=True, backup=True, record=str(tmp_path / "record"))
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert {p.name for p in folder.iterdir()} == names | {f"{name}.orig" for name in touched}


def test_links_in_a_criu_directory_stay_links(data, tmp_path):
    folder = tmp_path / "dump"
    shutil.copytree(data / "criu" / "criu42-regs64s-3thr", folder)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (folder / "parent").symlink_to(secret)
    words = ["opmask", "zmm_hi256", "hi16_zmm"]
    target = host(7, mxcsr_mask=0x2FFFF)
    plan = plan_fix(xfast.read(folder)[0], target, drop=words, even_if_live=True)
    assert plan.apply(str(tmp_path / "out"))
    assert (tmp_path / "out" / "parent").is_symlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(XfastError, match=r"pipe: is a device or pipe"):
        plan.apply(str(tmp_path / "other"))
    assert {p.name for p in tmp_path.iterdir()} == {"dump", "out", "out.xfast.json", "secret"}


def test_a_tar_archive(data, tmp_path):
    import tarfile

    path = tmp_path / "checkpoint.tar"
    source = data / "criu" / "criu42-regs64s-3thr"
    with tarfile.open(path, "w") as tar:
        for file in sorted(source.iterdir()):
            tar.add(file, f"../../checkpoint/{file.name}")
    (found,) = xfast.read(path)
    target = host(0x67, mxcsr_mask=0x2FFFF)
    plan_fix(found, target, drop=["hi16_zmm"], even_if_live=True).apply(str(tmp_path / "out.tar"))
    with tarfile.open(tmp_path / "out.tar") as tar, tarfile.open(path) as before:
        assert tar.getnames() == before.getnames()
    (fixed,) = xfast.read(tmp_path / "out.tar")
    assert {held(vcpu.area) & 0x80 for vcpu in fixed.vcpus} == {0}
    assert {p.name for p in tmp_path.iterdir()} == {
        "checkpoint.tar", "out.tar", "out.tar.xfast.json",
    }  # fmt: skip


def test_a_core_keeps_every_other_byte(data, tmp_path):
    path = tmp_path / "core"
    packed = (data / "elf" / "kernel618-regs64-3thr.core.xz").read_bytes()
    path.write_bytes(lzma.decompress(packed))
    (found,) = xfast.read(path)
    target = host(0xE7, GENOA, mxcsr_mask=0x2FFFF)
    record = plan_fix(found, target, drop=["opmask"], even_if_live=True).apply(in_place=True)
    old, new = lzma.decompress(packed), path.read_bytes()
    differing = np.flatnonzero(np.frombuffer(old, "u1") != np.frombuffer(new, "u1"))
    inside = np.zeros(len(old), bool)
    for edit in record["edits"]:
        inside[edit["offset"] : edit["offset"] + edit["length"][0]] = True
    assert differing.size
    assert inside[differing].all()


@pytest.mark.parametrize("fmt", ["npy", "raw"])
def test_stacks_of_areas_shrink_together(tmp_path, fmt):
    images = np.stack([area(0x600E7, size=11008, live=6), area(0xE7, size=11008, live=6)])
    path = tmp_path / f"stack.{'npy' if fmt == 'npy' else 'xsave'}"
    if fmt == "npy":
        np.save(path, images)
    else:
        path.write_bytes(images.tobytes())
    (found,) = xfast.read(path, layout=INTEL, size=11008)
    target = host(0x600E7, xsave2_size=4096, guest_permission=TILEDATA)
    plan_fix(found, target).apply(str(tmp_path / "out"))
    (fixed,) = xfast.read(tmp_path / "out", layout=INTEL, format="raw")
    assert [len(vcpu.area) for vcpu in fixed.vcpus] == [4096, 4096]
    for vcpu, image in zip(fixed.vcpus, images, strict=True):
        assert engine.diff(vcpu.area, image, INTEL) & 0xE7 == 0
    if fmt == "npy":
        assert np.load(tmp_path / "out").shape == (2, 4096)


def test_a_disk_image_through_its_own_tables(shared, tmp_path):
    path = tmp_path / "disk.qcow2"
    shutil.copyfile(shared / "samples" / "qemu" / "q72-savevm-tiny-S-smp2.qcow2", path)
    before = path.read_bytes()
    plans = [plan_fix(one, host(0x2FF)) for one in xfast.read(path)]
    assert not any(plan.areas for plan in plans)
    for plan in plans:
        for i, vcpu in enumerate(plan.snapshot.vcpus):
            plan.areas[i] = vcpu.area.copy()
            plan.areas[i][160:176] = 0x11 * (i + 1)
    record = apply(plans, in_place=True)
    after = path.read_bytes()
    differing = np.flatnonzero(np.frombuffer(before, "u1") != np.frombuffer(after, "u1"))
    inside = np.zeros(len(before), bool)
    for edit in record["edits"]:
        inside[edit["offset"] : edit["offset"] + edit["length"][0]] = True
    assert len(differing) == 32 * len(plans)
    assert inside[differing].all()
    for plan, now in zip(plans, xfast.read(path), strict=True):
        for i, vcpu in enumerate(now.vcpus):
            assert np.array_equal(vcpu.area, plan.areas[i])


def test_the_verb(data, tmp_path, capsys):
    path = tmp_path / "leak"
    packed = data / "qemu" / "q72-kvm-pkru-leak-bv207.qemustate.xz"
    path.write_bytes(lzma.decompress(packed.read_bytes()))
    words = ["fix", str(path), "--host", "intel-haswell@6.1"]
    assert main(words) == 2
    assert "expected -o OUT" in capsys.readouterr().err
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "pkru xstate_bv 0x207 -> 0x7 (init)" in said
    assert "leaves the vCPU's PKRU as it was" in said
    assert [p.name for p in tmp_path.iterdir()] == ["leak"]
    (tmp_path / "out").mkdir()
    assert main([*words, "-o", str(tmp_path / "out"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["schema"] == "xfast/1"
    (row,) = answer["plans"]
    assert (row["before"], row["after"]) == ("incompatible", "identical")
    assert row["written"] == str(tmp_path / "out" / "leak")
    assert main(["check", row["written"], "--host", "intel-haswell@6.1"]) == 0
    capsys.readouterr()
    assert main(["fix", row["written"], "--host", "intel-haswell@6.1", "--in-place"]) == 0
    assert "nothing to change" in capsys.readouterr().out


def test_the_verb_on_what_stays_blocked(data, capsys, tmp_path):
    path = data / "raw" / "kvm618-guestxcr0_e7-bve7.xsave"
    words = ["fix", str(path), "--host", "intel-haswell@6.6", "-o", str(tmp_path / "out")]
    assert main(words) == 1
    assert "still blocks" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["-o", "x", "--backup"], "expected --in-place"),
        (["-o", "x", "--drop", "nonsense"], "got 'nonsense'"),
    ],
)
def test_the_verbs_complaints(data, capsys, extra, says):
    path = data / "raw" / "kvm618-guestxcr0_e7-bve7.xsave"
    try:
        status = main(["fix", str(path), "--host", "amd-genoa@6.6", *extra])
    except SystemExit as end:
        status = end.code
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_apply_wants_one_place():
    plan = plan_fix(snapshot(area(7)), host(7))
    for how in ({}, {"output": "x", "in_place": True}, {"output": "x", "backup": True}):
        with pytest.raises(ValueError, match="expected either"):
            plan.apply(**how)
    with pytest.raises(XfastError, match="blob"):
        plan.apply("out")


def test_a_finding_by_a_joined_name():
    image = area(0x1807, live=6)
    plan = plan_fix(
        snapshot(image, layout=replace(PRESETS["intel"])), host(7), drop=["cet_u", "cet_s"],
        even_if_live=True,
    )  # fmt: skip
    assert {change.component for change in plan.changes} == {"cet_u", "cet_s"}
    assert not plan.left
    assert BY_NAME["cet_u"].supervisor


@pytest.mark.parametrize("name", ["xf-max-smp2-gzip-trimmed.save", "xf-max-smp2-xz-trimmed.save"])
def test_libvirts_images_keep_their_header_and_compression(data, tmp_path, name):
    import gzip
    import struct

    path = tmp_path / name
    shutil.copy(data / "qemu" / name, path)
    (found,) = xfast.read(path)
    target = xfast.resolve("qemu-tcg-max")
    plan = plan_fix(found, target, drop=["bndregs", "bndcsr"], even_if_live=True)
    record = plan.apply(str(tmp_path / "out"))
    old, new = path.read_bytes(), (tmp_path / "out").read_bytes()
    body = 92 + struct.unpack_from("<I", old, 20)[0]
    assert new[:body] == old[:body]
    unpack = gzip.decompress if "gzip" in name else lzma.decompress
    before, after = unpack(old[body:]), unpack(new[body:])
    differing = np.flatnonzero(np.frombuffer(before, "u1") != np.frombuffer(after, "u1"))
    inside = np.zeros(len(before), bool)
    for edit in record["edits"]:
        assert edit["field"] == "cpu/mpx"
        inside[edit["offset"] : edit["offset"] + edit["length"][0]] = True
        assert before[edit["offset"] :].startswith(bytes.fromhex(edit["before"]))
        assert after[edit["offset"] :].startswith(bytes.fromhex(edit["after"]))
    assert differing.size
    assert inside[differing].all()
    (fixed,) = xfast.read(tmp_path / "out")
    assert fixed.container == found.container
    for one, two in zip(found.vcpus, fixed.vcpus, strict=True):
        assert engine.diff(one.area, two.area, INTEL) & ~0x18 == 0
        assert not held(two.area) & 0x18


def test_pkru_of_a_stream_that_has_no_bit_for_it(data, tmp_path):
    """TCG's XSTATE_BV is always 0; its PKRU goes by its subsection."""
    source = data / "qemu" / "q72-max-smp2-q35.qemustate.xz"
    (found,) = xfast.read(source)
    assert held(found.vcpus[0].area) & PKRU
    plan = plan_fix(found, xfast.resolve("qemu-tcg-max"), drop=["pkru"], even_if_live=True)
    plan.apply(str(tmp_path / "out"))
    (fixed,) = xfast.read(tmp_path / "out")
    assert not any(held(vcpu.area) & PKRU for vcpu in fixed.vcpus)


@pytest.mark.parametrize("patched", [False, True])
def test_what_a_format_has_no_bit_for_is_an_error(data, tmp_path, monkeypatch, patched):
    """x87, SSE and AVX are always in a TCG stream: XCR0 alone says whether they are in use."""
    monkeypatch.setattr(put, "PATCH_FROM", 0 if patched else 1 << 40)
    path = tmp_path / "stream"
    packed = data / "qemu" / "q72-max-smp2-q35.qemustate.xz"
    path.write_bytes(lzma.decompress(packed.read_bytes()))
    old = path.read_bytes()
    (found,) = xfast.read(path)
    plan = plan_fix(found, xfast.resolve("qemu-tcg-max"), drop=["sse"], even_if_live=True)
    with pytest.raises(PolicyError, match=r"format can't hold the plan: .*XSTATE_BV"):
        plan.apply(in_place=True)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["stream"]


SUBJECTS = (
    "qemu/q72-kvm-pkru-leak-bv207.qemustate.xz",
    "qemu/q72-max-smp2-q35.qemustate.xz",
    "qemu/xf2-haswell-pku-smp1-raw-trimmed.save.xz",
    "raw/kvm618-guestxcr0_07-setbve7.xsave",
    "vmm/ch-state.json",
    "vmm/fc-bincode1-v4.vmstate",
    "vmm/fc-bincode2-v8.vmstate",
    "elf/kernel618-regs32-3thr.core.xz",
    "criu/criu42-regs64s-3thr",
)
HOSTS = (
    "intel-haswell@5.18", "intel-sapphirerapids@5.16", "intel-sapphirerapids@6.6",
    "amd-rome@6.1", "amd-milan@5.15", "amd-genoa@6.6",
)  # fmt: skip
GIVEN_UP = ("opmask", "zmm_hi256", "hi16_zmm", "pkru", "bndregs", "bndcsr")


@pytest.mark.parametrize("target", HOSTS)
@pytest.mark.parametrize("drop", [(), GIVEN_UP], ids=["safe", "lossy"])
@pytest.mark.parametrize("name", SUBJECTS)
def test_the_result_is_as_clean_as_the_plan_said(data, tmp_path, name, drop, target):
    """No fix leaves its own finding: the file is read again, and judged again."""
    source = tmp_path / Path(name).name
    if (data / name).is_dir():
        shutil.copytree(data / name, source)
    else:  # without what lies beside it, as it would be elsewhere
        shutil.copyfile(data / name, source)
    there = xfast.resolve(target)
    (found,) = xfast.read(source)
    plan = plan_fix(found, there, drop=drop, even_if_live=bool(drop))
    if plan.left or not plan.areas:
        return
    out = tmp_path / "out"
    plan.apply(str(out))
    moved = there.layout if any(c.field == "layout" for c in plan.changes) else None
    (again,) = xfast.read(out, format=found.format, layout=moved)
    second = plan_fix(again, there, drop=drop, even_if_live=bool(drop))
    assert not second.changes
    assert second.before.verdict == plan.after.verdict != "incompatible"

    def gist(verdict):
        return sorted((f.code, f.component, f.vcpu, f.severity) for f in verdict.findings)

    assert gist(second.before) == gist(plan.after)


def test_an_area_that_claims_a_component_without_a_place_is_refused_by_name():
    """An XCOMP_BV of noise, beside an area that has to move."""
    broken = area(7, live=7)
    broken[520:528] = np.frombuffer((0xFFFFFFFFFF000000).to_bytes(8, "little"), "u1")
    vcpus = [Vcpu(i, image, INTEL, "given") for i, image in enumerate((area(7), broken))]
    with pytest.raises(PolicyError, match="blob: an area can't be moved"):
        plan_fix(Snapshot("blob", "raw", "vm", "kvm", vcpus), host(7))
