"""The verbs fix and undo as people and scripts meet them: places, names, sums, advice."""

import json
import lzma
import shutil
from pathlib import Path

import numpy as np
import pytest

import xfast
from xfast.cli.main import main
from xfast.xsave.features import bits
from xfast.xsave.layout import PRESETS

HOST = "intel-haswell@6.12"
INTEL = PRESETS["intel"]


def area(mask=0x207, live=(2,)):
    image = np.zeros(4096, np.uint8)
    image[0:2] = 0x7F, 0x03
    image[24:26] = 0x80, 0x1F
    image[28:30] = 0xFF, 0xFF
    image[512:520] = np.frombuffer(mask.to_bytes(8, "little"), "u1")
    for nr in live:
        if not mask >> nr & 1:
            continue
        slot = INTEL.slot(nr)
        image[slot.offset : slot.offset + 8] = 0x5A
    return image.tobytes()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def three(tmp_path, monkeypatch):
    """A file to fix, one that is fine, one that can't be fixed without a loss."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "leak.xsave").write_bytes(area(0x207))
    (tmp_path / "fine.xsave").write_bytes(area(0x7))
    (tmp_path / "live.xsave").write_bytes(area(0x207, live=[2, 9]))
    return ["leak.xsave", "fine.xsave", "live.xsave"]


def fix(*words):
    return main(["fix", *words, "--layout", "intel", "--host", HOST])


def test_a_directory_is_made_and_one_line_sums_up(three, tmp_path, capsys):
    assert fix(*three, "-o", "out/") == 1
    said = capsys.readouterr()
    assert names(tmp_path / "out") == {"leak.xsave", "leak.xsave.xfast.json"}
    assert said.err.splitlines()[-1] == "3 snapshots: 1 fixed, 1 unchanged, 1 can't be fixed"
    assert "  wrote out/leak.xsave\n  record out/leak.xsave.xfast.json\n" in said.out
    assert not (tmp_path / "out").stat().st_mode & 0o022
    assert fix("leak.xsave", "-o", "out") == 3  # it is there now
    assert "out/leak.xsave: exists" in capsys.readouterr().err


def test_a_name_that_is_no_directory_is_refused_before_anything_is_written(three, tmp_path, capsys):
    before = names(tmp_path)
    assert fix(*three, "-o", "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected a directory for 3 snapshots (-o out/ makes one), got out" in line
    assert fix(*three, "-o", "fine.xsave") == 2
    assert names(tmp_path) == before


def test_two_of_one_name_do_not_meet_in_a_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "x.xsave").write_bytes(area())
        Path(folder, "README").write_text("some words about it")
    host = ["--host", HOST]
    assert main(["fix", "a", "b", "-o", "out/", *host]) == 2
    assert "different names for one directory, got x.xsave" in capsys.readouterr().err
    assert names(tmp_path) == {"a", "b"}
    assert main(["fix", "a", "-o", "out/", *host]) == 0
    assert names(tmp_path / "out") == {"x.xsave", "x.xsave.xfast.json"}


def test_a_dry_run_makes_no_directory(three, tmp_path, capsys):
    before = names(tmp_path)
    assert fix(*three, "--dry-run") == 1
    assert "3 snapshots: 1 to fix, 1 unchanged, 1 can't be fixed" in capsys.readouterr().err
    assert names(tmp_path) == before


def test_backups_are_told(three, capsys):
    assert fix("leak.xsave", "--in-place", "--backup") == 0
    said = capsys.readouterr().out
    assert "wrote leak.xsave\n" in said
    assert "record leak.xsave.xfast.json\n" in said
    assert "backup leak.xsave.orig\n" in said


def test_giving_data_up_is_advised_where_it_helps(three, capsys):
    assert fix("live.xsave", "-o", "out.xsave") == 1
    assert "--drop pkru --even-if-live gives the data up" in capsys.readouterr().out
    words = ["--drop", "pkru", "--even-if-live"]
    assert fix("live.xsave", "-o", "out.xsave", *words) == 0


def test_giving_data_up_is_not_advised_where_it_does_not_help(tmp_path, capsys):
    """The guest has AVX-512 enabled in XCR0: without its data the host refuses it just the same."""
    path = tmp_path / "live.xsave"
    path.write_bytes(area(0xE7, live=[2, 5, 6, 7]))
    xcrs = np.zeros(392, np.uint8)
    xcrs[0], xcrs[16:24] = 1, np.frombuffer((0xE7).to_bytes(8, "little"), "u1")
    (tmp_path / "live.xcrs").write_bytes(xcrs.tobytes())
    assert fix(str(path), "--dry-run") == 1
    said = capsys.readouterr().out
    assert "still blocks" in said
    assert "gives the data up" not in said
    (found,) = xfast.read(path, layout=INTEL)
    plan = xfast.plan_fix(found, xfast.resolve(HOST))
    with pytest.raises(xfast.PolicyError, match="choose another host"):
        plan.require_restorable()


def test_companions_travel(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(data / "raw" / "kvm618-guestxcr0_e7-bve7.xsave", "x.xsave")
    for end in (".xcrs", ".cpuid2"):
        shutil.copyfile(data / "raw" / f"kvm618-guestxcr0_e7{end}", f"x{end}")
    words = ["--host", "amd-genoa@6.12", "--drop", "avx", "--even-if-live"]
    assert main(["fix", "x.xsave", "-o", "y.xsave", *words]) == 0
    for end in (".xcrs", ".cpuid2"):
        assert Path("y" + end).read_bytes() == Path("x" + end).read_bytes()
        assert not Path("y" + end).stat().st_mode & 0o133
    (found,) = xfast.read("y.xsave")
    assert found.vcpus[0].xcr0 == 0xE7
    assert found.vcpus[0].layout_source == "cpuid"
    assert main(["fix", "x.xsave", "-o", "out/", *words]) == 0
    assert {"x.xcrs", "x.cpuid2"} <= names(tmp_path / "out")
    Path("z.xcrs").write_bytes(b"mine")
    assert main(["fix", "x.xsave", "-o", "z.xsave", *words]) == 3
    assert "z.xcrs: exists" in capsys.readouterr().err
    assert not Path("z.xsave").exists()
    assert not Path("z.cpuid2").exists()
    assert Path("z.xcrs").read_bytes() == b"mine"


def test_a_companion_that_is_a_link_is_not_copied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.xsave").write_bytes(area())
    xcrs = np.zeros(392, np.uint8)
    xcrs[0], xcrs[16] = 1, 7
    Path("secret").write_bytes(xcrs.tobytes())
    Path("x.xcrs").symlink_to("secret")
    assert fix("x.xsave", "-o", "y.xsave") == 3
    assert names(tmp_path) == {"x.xsave", "x.xcrs", "secret"}


def test_companions_go_again_where_the_rest_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.xsave").write_bytes(area())
    xcrs = np.zeros(392, np.uint8)
    xcrs[0], xcrs[16] = 1, 7
    Path("x.xcrs").write_bytes(xcrs.tobytes())
    Path("y.xsave.xfast.json").write_bytes(b"mine")
    assert fix("x.xsave", "-o", "y.xsave") == 3
    assert names(tmp_path) == {"x.xsave", "x.xcrs", "y.xsave.xfast.json"}


def test_internal_snapshots_of_one_disk_have_names_of_their_own(shared, tmp_path, capsys):
    path = shared / "samples" / "qemu" / "q72-savevm-tiny-S-smp2.qcow2"
    expected = [one.name for one in xfast.read(path)]
    main(["fix", str(path), "--host", HOST, "--dry-run", "--json"])
    rows = json.loads(capsys.readouterr().out)["plans"]
    assert [row["snapshot"] for row in rows] == expected
    assert len({row["snapshot"] for row in rows}) == len(rows)


@pytest.mark.parametrize("level", ["xstate", "fpu", "isa"])
@pytest.mark.parametrize("host", ["amd-milan", HOST, "intel-sapphirerapids@6.6"])
def test_fix_and_check_judge_a_checkpoint_alike(data, tmp_path, capsys, level, host):
    """At level fpu fix left CRIU's own rules out: check said incompatible, fix wrote."""
    path = str(data / "criu" / "criu42-regs64s-3thr")
    assert main(["check", path, "--host", host, "--level", level, "--json"]) in (0, 1, 3)
    (verdict,) = json.loads(capsys.readouterr().out)["verdicts"]
    main(["fix", path, "--host", host, "--level", level, "--dry-run", "--json"])
    (row,) = json.loads(capsys.readouterr().out)["plans"]
    assert row["before"] == verdict["verdict"]
    blocks = [f for f in verdict["findings"] if f["severity"] == "blocks" and f["fix"] == "none"]
    assert {f["code"] for f in blocks} <= {f["code"] for f in row["left"]}


def holes(image: np.ndarray, layout) -> np.ndarray:
    """Which bytes of an area belong to no component that is present."""
    empty = np.ones(len(image), bool)
    empty[512:576] = False
    empty[24:32] = empty[464:472] = empty[0:2] = False
    for nr in bits(int(image[512:520].copy().view("<u8")[0])):
        if nr == 0:
            empty[0:24] = empty[32:160] = False
        elif nr == 1:
            empty[160:416] = False
        else:
            slot = layout.slot(nr)
            empty[slot.offset : slot.offset + slot.size] = False
    return empty


def test_nothing_stale_comes_through_where_no_component_lies(shared, tmp_path):
    path = shared / "cases" / "hostile" / "stale-under-clear-bits.xsave"
    out = tmp_path / "out.xsave"
    words = ["fix", str(path), "--host", "intel-broadwell@6.12", "-o", str(out)]
    assert main(words) == 0
    image = np.frombuffer(out.read_bytes(), np.uint8)
    assert not image[holes(image, INTEL)].any()


@pytest.mark.parametrize("layout", ["intel", None])
@pytest.mark.parametrize("mask", [0x207, 0x204, 0x203, 0x206])
def test_old_bytes_in_gaps_and_behind_the_end_are_zero(tmp_path, mask, layout):
    image = np.full(4096, 0xA5, np.uint8)
    image[0:32] = np.frombuffer(area()[:32], np.uint8)
    image[2:24] = 0x77
    image[464:472] = 0
    image[512:576] = np.frombuffer(area(mask)[512:576], np.uint8)
    image[2688:2696] = 0
    path, out = tmp_path / "stale.xsave", tmp_path / "out.xsave"
    path.write_bytes(image.tobytes())
    words = ["fix", str(path), "--host", HOST, "-o", str(out)]
    assert main([*words, *(["--layout", layout] if layout else [])]) in (0, 3)
    now = np.frombuffer(out.read_bytes(), np.uint8)
    assert not now[holes(now, INTEL)].any()
    assert now[512] == mask & 0xFF


def test_a_stream_is_searched_for_its_vcpus_twice_and_no_more(data, tmp_path, monkeypatch):
    """Once to plan, and once to read back what was written."""
    from xfast.snapshots.qemu import reader

    path = tmp_path / "leak"
    packed = data / "qemu" / "q72-kvm-pkru-leak-bv207.qemustate.xz"
    path.write_bytes(lzma.decompress(packed.read_bytes()))
    calls = []
    real = reader.read
    monkeypatch.setattr(reader, "read", lambda *a, **k: calls.append(1) or real(*a, **k))
    assert main(["fix", str(path), "--host", HOST, "-o", str(tmp_path / "out")]) == 0
    assert len(calls) == 2


def test_a_directory_of_images_is_written_into_a_directory(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data / "criu" / "criu42-regs64s-3thr", "dump")
    drop = [
        word for name in ("avx", "opmask", "zmm_hi256", "hi16_zmm") for word in ("--drop", name)
    ]
    words = ["--host", "amd-milan", *drop, "--even-if-live"]
    assert main(["fix", "dump/", "-o", "out/", *words]) == 0
    assert names(tmp_path / "out") == {"dump", "dump.xfast.json"}
    assert main(["undo", "out/dump.xfast.json"]) == 0
    capsys.readouterr()
    for path in Path("dump").iterdir():
        assert Path("out/dump", path.name).read_bytes() == path.read_bytes()
