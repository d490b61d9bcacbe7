"""Changes taken back: every format and mode, to the byte; nothing where anything else happened."""

import gzip
import hashlib
import json
import lzma
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import xfast
from xfast.cli.main import main
from xfast.errors import XfastError
from xfast.judge.verdict import Judgement
from xfast.repair.apply import apply
from xfast.repair.plan import plan_fix
from xfast.store import put
from xfast.store.undo import undo

HOST = "intel-haswell@6.1"
LEAK = "qemu/q72-kvm-pkru-leak-bv207.qemustate.xz"


def content(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    files = (one for one in path.rglob("*") if one.is_file())
    return {str(one.relative_to(path)): one.read_bytes() for one in files}


def forced(path: Path) -> list:
    """Plans that change a byte of every vCPU's x87 state, whatever the format."""
    plans = [plan_fix(one, xfast.resolve("intel-sapphirerapids@6.6")) for one in xfast.read(path)]
    fine = Judgement("identical", "none", ())
    plans = [replace(plan, after=plan.after._replace(judgement=fine)) for plan in plans]
    for plan in plans:
        for i, vcpu in enumerate(plan.snapshot.vcpus):
            plan.areas[i] = vcpu.area.copy()
            plan.areas[i][40] ^= 0x55
    return plans


def stream(data, tmp_path) -> Path:
    path = tmp_path / "leak"
    path.write_bytes(lzma.decompress((data / LEAK).read_bytes()))
    return path


def archive(data, tmp_path) -> Path:
    path = tmp_path / "checkpoint.tar"
    with tarfile.open(path, "w") as tar:
        for file in sorted((data / "criu" / "criu42-regs64s-3thr").iterdir()):
            tar.add(file, f"checkpoint/{file.name}")
    return path


def copied(name):
    def make(data, tmp_path) -> Path:
        path = tmp_path / Path(name).name
        (shutil.copytree if (data / name).is_dir() else shutil.copyfile)(data / name, path)
        return path

    return make


def core(data, tmp_path) -> Path:
    path = tmp_path / "core"
    packed = data / "elf" / "kernel618-regs64-3thr.core.xz"
    path.write_bytes(lzma.decompress(packed.read_bytes()))
    return path


MAKERS = {
    "qemu": stream,
    "raw": copied("raw/kvm618-guestxcr0_e7-bve7.xsave"),
    "cloud-hypervisor": copied("vmm/ch-state.json"),
    "firecracker": copied("vmm/fc-bincode2-v8.vmstate"),
    "libvirt": copied("qemu/xf-max-smp2-gzip-trimmed.save"),
    "criu": copied("criu/criu42-regs64s-3thr"),
    "tar": archive,
    "elfcore": core,
}


def packed(path: Path) -> bool:
    return path.name.endswith((".save", ".gz"))


@pytest.mark.parametrize("mode", ["in place", "patched", "backup", "new"])
@pytest.mark.parametrize("name", MAKERS)
def test_every_format_comes_back_to_the_byte(data, tmp_path, monkeypatch, name, mode):
    monkeypatch.setattr(put, "PATCH_FROM", 0 if mode == "patched" else 1 << 40)
    path = MAKERS[name](data, tmp_path)
    before = content(path)
    if mode == "new":
        changed = tmp_path / "out"
        assert apply(forced(path), str(changed))
    else:
        changed = path
        assert apply(forced(path), in_place=True, backup=mode == "backup")
    after = content(changed)
    assert {key: after[key] for key in before} != before
    record = str(changed) + ".xfast.json"
    told = undo(record, dry_run=True)
    assert all(to_do for _, to_do in told.files)
    assert content(changed) == after
    undo(record)
    now = content(changed)
    if packed(path) and mode != "backup":  # packed anew: what it expands to is the same
        areas = [[vcpu.area.tobytes() for vcpu in one.vcpus] for one in xfast.read(changed)]
        (tmp_path / "old").write_bytes(before[""])
        old = [[vcpu.area.tobytes() for vcpu in one.vcpus] for one in xfast.read(tmp_path / "old")]
        assert areas == old
        record = json.loads(Path(record).read_text())
        body = path.read_bytes().index(b"\x1f\x8b")
        digest = hashlib.sha256(gzip.decompress(now[""][body:])).hexdigest()
        assert digest == record["files"][0]["content_before"]
    else:
        assert {key: now[key] for key in before} == before
    again = undo(str(changed) + ".xfast.json")
    assert not any(to_do for _, to_do in again.files)


def test_a_disk_image_with_several_snapshots_comes_back(shared, tmp_path):
    path = tmp_path / "disk.qcow2"
    shutil.copyfile(shared / "samples" / "qemu" / "q72-savevm-tiny-S-smp2.qcow2", path)
    before = path.read_bytes()
    assert apply(forced(path), in_place=True)
    assert path.read_bytes() != before
    undo(str(path) + ".xfast.json")
    assert path.read_bytes() == before


@pytest.fixture
def fixed(data, tmp_path) -> Path:
    path = stream(data, tmp_path)
    host = xfast.resolve(HOST)
    assert plan_fix(xfast.read(path)[0], host).apply(in_place=True)
    return path


@pytest.mark.parametrize("change", ["a byte", "shorter", "gone", "linked", "a folder"])
def test_a_file_that_is_not_what_the_record_left_stays(fixed, change):
    data = bytearray(fixed.read_bytes())
    if change == "a byte":
        data[5] ^= 1
        fixed.write_bytes(data)
    elif change == "shorter":
        fixed.write_bytes(data[:-1])
    else:
        fixed.unlink()
    if change == "linked":
        other = fixed.with_name("other")
        other.write_bytes(data)
        fixed.symlink_to(other)
    elif change == "a folder":
        fixed.mkdir()
    before = content(fixed.parent)
    with pytest.raises(XfastError):
        undo(str(fixed) + ".xfast.json")
    assert content(fixed.parent) == before


def edited(path: Path, **facts) -> str:
    record = Path(str(path) + ".xfast.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | facts))
    return str(record)


def test_a_record_that_names_another_file_changes_none(fixed, tmp_path):
    """Whoever could have a record trusted would have root write where it says."""
    victim = tmp_path / "shadow"
    victim.write_bytes(fixed.read_bytes())
    before = victim.read_bytes()
    for name in ("../shadow", "/etc/passwd", "..", "a/b", ""):
        rows = json.loads(Path(str(fixed) + ".xfast.json").read_text())["files"]
        record = edited(fixed, files=[rows[0] | {"name": name}])
        with pytest.raises(XfastError, match="expected a record of"):
            undo(record)
    assert victim.read_bytes() == before


@pytest.mark.parametrize("doubt", ["another's", "open to others", "linked", "a link", "a pipe"])
def test_a_record_that_another_may_have_written_is_not_followed(fixed, doubt):
    record = Path(str(fixed) + ".xfast.json")
    before = fixed.read_bytes()
    if doubt == "another's":
        if os.geteuid():
            pytest.skip("only root can give a file away")
        os.chown(record, 4321, 4321)
    elif doubt == "open to others":
        record.chmod(0o666)
    elif doubt == "linked":
        os.link(record, record.with_name("second"))
    else:
        record.rename(record.with_name("aside"))
        record.symlink_to("aside") if doubt == "a link" else os.mkfifo(record)
    with pytest.raises(XfastError, match="json"):
        undo(str(record))
    assert fixed.read_bytes() == before


HOSTILE = (
    {"edits": [{}]},
    {"edits": [{"offset": -1, "length": [8, 8], "before": "00", "after": "00", "field": ""}]},
    {"edits": [{"offset": 1 << 70, "length": [1, 1], "before": "0", "after": "", "field": ""}]},
    {"edits": "x"},
    {"edits": []},
    {"files": []},
    {"files": [{"name": 3, "before": "", "after": ""}]},
    {"nonce": 3},
    {"output": None},
    {"schema": "other"},
    {"changes": [3]},
)


@pytest.mark.parametrize("facts", HOSTILE, ids=str)
def test_a_strange_record_is_one_line(fixed, capsys, facts):
    before = fixed.read_bytes()
    record = edited(fixed, **facts)
    assert main(["undo", record]) in (2, 3)
    (line,) = capsys.readouterr().err.splitlines()
    assert "failed unexpectedly" not in line
    assert fixed.read_bytes() == before


def test_a_bomb_in_a_record_is_not_unpacked(fixed):
    import base64
    import zlib

    record = json.loads(Path(str(fixed) + ".xfast.json").read_text())
    bomb = base64.b64encode(zlib.compress(bytes(64 << 20))).decode()
    record["edits"][0]["before"] = "zlib:" + bomb
    with pytest.raises(XfastError, match="expected edits with their bytes: expected 8 bytes"):
        undo(edited(fixed, edits=record["edits"]))


def test_a_record_elsewhere_needs_the_files_name(data, tmp_path, capsys):
    path = stream(data, tmp_path)
    before = path.read_bytes()
    elsewhere = tmp_path / "records"
    elsewhere.mkdir()
    elsewhere.chmod(0o777)
    record = str(elsewhere / "r.json")
    plan_fix(xfast.read(path)[0], xfast.resolve(HOST)).apply(in_place=True, record=record)
    with pytest.raises(XfastError, match="--file names another"):
        undo(record)
    assert main(["undo", record, "--file", str(path)]) == 0
    assert "was put back" in capsys.readouterr().out
    assert path.read_bytes() == before


def test_what_undo_tells(fixed, capsys):
    assert main(["undo", "--dry-run", str(fixed) + ".xfast.json"]) == 0
    said = capsys.readouterr().out
    assert f"xfast {xfast.__version__} changed {fixed} for {HOST}" in said
    assert "pkru xstate_bv 0x207 0x7" in said
    assert "is what the record left" in said
    record = json.loads(Path(str(fixed) + ".xfast.json").read_text())
    assert record["host"]["description"]["name"] == HOST
    assert len(record["host"]["description"]) > 4


def test_after_an_undo_the_same_fix_can_be_made_again(fixed):
    new = fixed.read_bytes()
    undo(str(fixed) + ".xfast.json")
    assert fixed.read_bytes() != new
    assert plan_fix(xfast.read(fixed)[0], xfast.resolve(HOST)).apply(in_place=True)
    assert fixed.read_bytes() == new


def test_a_stack_of_tiles_that_was_trimmed_is_whole_again(tmp_path):
    """More than 16 KiB of old bytes: they are packed in the record."""
    images = np.zeros((3, 11008), np.uint8)
    images[:, 0:2] = 0x7F, 0x03
    images[:, 24:26] = 0x80, 0x1F
    images[:, 576:832] = np.random.default_rng(3).integers(0, 256, (3, 256))
    images[:, 512:515] = 7, 0, 4
    path = tmp_path / "tiles.xsave"
    path.write_bytes(images.tobytes())
    intel = xfast.preset("intel")
    target = xfast.resolve("intel-sapphirerapids@6.6").replace(xsave2_size=4096)
    (found,) = xfast.read(path, layout=intel, size=11008)
    plan = plan_fix(found, target, drop=["tiledata"])
    assert plan.areas
    assert plan.apply(in_place=True)
    assert path.stat().st_size == 3 * 4096
    undo(str(path) + ".xfast.json")
    assert path.read_bytes() == images.tobytes()
