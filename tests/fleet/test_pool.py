"""Which snapshots of a scan stand in the way of a pool: `xfast host baseline --snapshots`."""

import json
import shutil
from pathlib import Path

import pytest

import xfast
from xfast.cli.main import main
from xfast.errors import XfastError
from xfast.fleet import run
from xfast.fleet.pool import hold_against
from xfast.hosts import resolve

pytest.importorskip("pyarrow", reason="needs pyarrow")

EXAMPLES = Path(__file__).parents[2] / "examples" / "snapshots"
POOL = ("amd-milan@6.12", "intel-broadwell@6.12", "amd-genoa@6.12")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool") / "snapshots"
    shutil.copytree(EXAMPLES, folder)
    (folder / "noise").write_bytes(bytes(100))
    hosts = [resolve(name) for name in (*POOL, "intel-skylake-server")]
    run.scan([str(folder)], hosts, str(folder.parent / "out"), jobs=1)
    return str(folder.parent / "out")


def needs(verdicts):
    """Return what a snapshot needs before all of these hosts take it, from its own verdicts."""
    if any(v.verdict == "incompatible" and v.fixable != "safe" for v in verdicts):
        return "retire"
    if any(v.verdict == "unknown" for v in verdicts):
        return "unknown"
    return "fix" if any(v.verdict == "incompatible" for v in verdicts) else "fit"


@pytest.mark.parametrize("hosts", [POOL, POOL[:1], POOL[1:], ("intel-skylake-server", POOL[0])])
def test_the_answer_is_that_of_check_for_every_snapshot(results, hosts):
    pool = hold_against(results, hosts)
    wanted = {"fit": 0, "fix": 0, "retire": 0, "unknown": 0}
    without = dict.fromkeys(hosts, 0)
    for path in sorted(EXAMPLES.iterdir()):
        if path.suffix in (".cpuid2", ".xcrs"):  # companions of an area
            continue
        for snapshot in xfast.read(str(path)):
            verdicts = xfast.check(snapshot, list(hosts))
            wanted[needs(verdicts)] += 1
            for host, own in zip(hosts, verdicts, strict=True):
                without[host] += needs([v for v in verdicts if v is not own]) in ("fit", "fix")
    answer = pool.as_json()
    assert {word: answer[word] for word in wanted} == wanted
    assert answer["without"] == without
    assert answer["failed"] == 1
    assert sum(wanted.values()) == answer["count"] == 7
    named = [name for one in pool.obstacles for name in one.names]
    assert len(named) == len(set(named)) == answer["count"] - answer["fit"]


def test_a_leak_is_repaired_and_live_state_is_retired(results, capsys):
    words = ["host", "baseline", *POOL, "--snapshots", results]
    assert main(words) == 0
    lines = [line.split(None, 1) for line in capsys.readouterr().out.splitlines()]
    fixes = [text for word, text in lines if word == "fix"]
    assert any("with pkru, not for intel-broadwell@6.12" in text for text in fixes)
    (then,) = (text for word, text in lines if word == "then")
    assert "retire" in then
    assert then.split(";")[0].endswith("all fit everywhere")
    assert main([*words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)["baseline"]["snapshots"]
    live = [o for o in answer["obstacles"] if o["remedy"] == "retire" and "bndregs" in o["causes"]]
    assert live
    assert all("q11-max-smp4" in name for one in live for name in one["snapshots"])


def test_a_host_that_the_scan_did_not_ask_is_named(results, capsys):
    with pytest.raises(XfastError, match="expected a scan that asked amd-rome, got one that asked"):
        hold_against(results, ["amd-rome"])
    assert main(["host", "baseline", "amd-rome", "--snapshots", results]) == 2
    assert "amd-rome" in capsys.readouterr().err


def test_a_folder_without_a_scan_and_a_format_without_room_are_refused(results, tmp_path, capsys):
    assert main(["host", "baseline", "amd-milan", "--snapshots", str(tmp_path)]) == 2
    assert "expected a finished scan" in capsys.readouterr().err
    words = ["host", "baseline", POOL[0], "--snapshots", results, "--format", "qemu"]
    assert main(words) == 2
    assert "expected --format table or json, got qemu" in capsys.readouterr().err
