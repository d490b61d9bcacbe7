"""A scan: every input is a row, whoever judges it, and however often it was killed on the way."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from xfast.cli.main import main
from xfast.errors import XfastError
from xfast.fleet import judging, run
from xfast.fleet.dataset import Dataset, tables
from xfast.fleet.judging import Question
from xfast.fleet.summary import summarise
from xfast.hosts import resolve
from xfast.judge.verdict import Policy

pytest.importorskip("pyarrow", reason="needs pyarrow")

EXAMPLES = Path(__file__).parents[2] / "examples" / "snapshots"
LEAK = EXAMPLES / "q72-kvm-pkru-leak-bv207.qemustate"
CLEAN = EXAMPLES / "q72-kvm-bv7-xcr7-smp1.qemustate"
NAMES = ("intel-broadwell@6.12", "amd-milan@6.12", "amd-milan")


@pytest.fixture(scope="module")
def hosts():
    return [resolve(name) for name in NAMES]


@pytest.fixture
def fleet(tmp_path):
    """A folder with snapshots of two kinds, some other files, and some that can't be judged."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(20):
        (folder / f"leak-{i:02}").write_bytes(LEAK.read_bytes())
        (folder / f"clean-{i:02}").write_bytes(CLEAN.read_bytes())
    (folder / "noise").write_bytes(bytes(100))
    (folder / ".hidden").write_bytes(b"x")
    (folder / "old.orig").write_bytes(LEAK.read_bytes())
    (folder / os.fsdecode(b"no-\xff-utf8")).write_bytes(CLEAN.read_bytes())
    return folder


def rows(results, table="snapshots"):
    (found,) = tables(os.fspath(results), table)
    return found.to_pylist()


def content(results):
    """All tables, without an order."""
    return [
        sorted(json.dumps(row, sort_keys=True) for row in rows(results, table))
        for table in ("snapshots", "verdicts", "findings")
    ]


def test_every_input_is_a_row_and_every_answer_is_check_s(fleet, tmp_path, hosts):
    import xfast

    manifest = run.scan([os.fspath(fleet)], hosts, tmp_path / "out", jobs=1, chunk=7)
    assert (manifest["snapshots"], manifest["failed"]) == (41, 1)
    found = rows(tmp_path / "out")
    names = {row["snapshot"] for row in found}
    assert len(names) == len(found) == 42
    assert any(name.endswith("no-\\xff-utf8") for name in names)
    (bad,) = [row for row in found if row["error"]]
    assert bad["class"] is None
    assert bad["snapshot"].endswith("noise")
    answers = {
        (row["class"], row["host"]): (row["verdict"], row["fixable"], row["codes"])
        for row in rows(tmp_path / "out", "verdicts")
    }
    for path, kind in ((LEAK, "leak-00"), (CLEAN, "clean-00")):
        (snapshot,) = xfast.read(path)
        (row,) = [row for row in found if row["snapshot"].endswith(kind)]
        assert row["xstate_bv"] == xfast.headers(snapshot.vcpus[0].area).xstate_bv
        for verdict in xfast.check(snapshot, hosts):
            verdict_, fixable, codes = answers[row["class"], verdict.host]
            assert (verdict_, fixable) == (verdict.verdict, verdict.fixable)
            blocking = {f.code for f in verdict.findings if f.severity == "blocks" or f.open}
            assert set(codes) == blocking


def test_the_dataset_does_not_depend_on_who_judges(fleet, tmp_path, hosts):
    run.scan([os.fspath(fleet)], hosts, tmp_path / "one", jobs=1, chunk=5)
    run.scan([os.fspath(fleet)], hosts, tmp_path / "two", jobs=2, chunk=5)
    with ThreadPoolExecutor(3) as executor:
        run.scan([os.fspath(fleet)], hosts, tmp_path / "three", executor=executor, chunk=5)
    assert content(tmp_path / "one") == content(tmp_path / "two") == content(tmp_path / "three")


def test_a_scan_goes_on_where_it_was(fleet, tmp_path, hosts, monkeypatch):
    asked = []
    real = judging.judge

    def counted(names, packed):
        asked.extend(names)
        if len(asked) > 20:
            raise KeyboardInterrupt
        return real(names, packed)

    monkeypatch.setattr(run, "judge", counted)
    with pytest.raises(KeyboardInterrupt):
        run.scan([os.fspath(fleet)], hosts, tmp_path / "out", jobs=1, chunk=5)
    first = set(asked[:20])
    asked.clear()
    monkeypatch.setattr(run, "judge", lambda n, p: asked.extend(n) or real(n, p))
    run.scan([os.fspath(fleet)], hosts, tmp_path / "out", jobs=1, chunk=5)
    assert not first & set(asked)
    run.scan([os.fspath(fleet)], hosts, tmp_path / "whole", jobs=1, chunk=5)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_after_a_complete_scan_all_is_judged_anew(tmp_path, hosts):
    """It told the old verdicts of snapshots that had been mended in between."""
    fleet, out = tmp_path / "fleet", tmp_path / "out"
    fleet.mkdir()
    for i in range(3):
        (fleet / f"{i}.xsave").write_bytes(LEAK.read_bytes())
    names = [os.fspath(fleet)]
    assert run.scan(names, hosts, out, jobs=1)["failed"] == 0
    (fleet / "1.xsave").write_bytes(b"no snapshot any more")
    for _ in range(2):
        assert run.scan(names, hosts, out, jobs=1)["failed"] == 1
        assert len(list(out.glob("snapshots/*"))) == len(list(out.glob("_work/*"))) == 1


def test_a_scan_that_is_stopped_after_a_complete_one_is_none_yet(
    fleet, tmp_path, hosts, monkeypatch
):
    """Its parts and the last one's together would hold inputs twice: no manifest names them."""
    names, out = [os.fspath(fleet)], tmp_path / "out"
    run.scan(names, hosts, out, jobs=1, chunk=7)
    before = content(out)
    real, asked = judging.judge, []

    def stopped(names, packed):
        asked.append(names)
        if len(asked) > 2:
            raise KeyboardInterrupt
        return real(names, packed)

    monkeypatch.setattr(run, "judge", stopped)
    with pytest.raises(KeyboardInterrupt):
        run.scan(names, hosts, out, jobs=1, chunk=7)
    assert len(asked) == 3, "all is looked at anew"
    with pytest.raises(XfastError, match="expected a finished scan"):
        content(out)
    monkeypatch.setattr(run, "judge", real)
    run.scan(names, hosts, out, jobs=1, chunk=7)
    assert content(out) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_process_that_they_work_for(fleet, tmp_path, number):
    """They waited for more work for ever, at 37 MB each."""
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "xfast", "scan", *[fleet] * 500, "--host", *NAMES, "-o", out,
        "--chunk", "2", "-j", "2", "-q",
    ]  # fmt: skip
    killed = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    while not list(out.glob("_work/*.json")):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(number)
    assert killed.wait() == -number
    while any(is_in_group(entry, killed.pid) for entry in Path("/proc").glob("[0-9]*")):
        time.sleep(0.05)  # the time limit of a test bounds this


def is_in_group(entry: Path, group: int) -> bool:
    """Tell whether a process is of a group, and no zombie."""
    try:
        state, _, its = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
    except OSError:  # it has just ended
        return False
    return int(its) == group and state != "Z"


@pytest.mark.parametrize("delay", [0.3, 0.8, 1.5])
def test_killed_at_any_moment_it_finishes_the_rest(fleet, tmp_path, hosts, delay):
    command = [
        sys.executable, "-m", "xfast", "scan", fleet, "--host", *NAMES, "-o", tmp_path / "out",
        "--chunk", "2", "-j", "2", "-q",
    ]  # fmt: skip
    killed = subprocess.Popen(command, start_new_session=True)
    time.sleep(delay)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert subprocess.run(command, check=False).returncode == 1
    run.scan([os.fspath(fleet)], hosts, tmp_path / "whole", jobs=1, chunk=2)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not list((tmp_path / "out").rglob(".*new"))


def test_a_worker_that_dies_costs_one_row(fleet, tmp_path):
    (fleet / "killer").write_bytes(LEAK.read_bytes())
    script = tmp_path / "kill.py"
    script.write_text(KILLER)
    command = [sys.executable, script, fleet, tmp_path / "out", *NAMES]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "out")
    assert len(found) == 43
    assert len({row["snapshot"] for row in found}) == 43
    errors = {Path(row["snapshot"]).name: row["error"] for row in found if row["error"]}
    assert errors["killer"] == "the worker that judged it died"
    assert set(errors) == {"killer", "noise"}


KILLER = """
import os, sys
from xfast.fleet import judging, run
from xfast.hosts import resolve

real = judging.judge

def deadly(names, packed):
    if any(name.endswith("killer") for name in names):
        os._exit(9)
    return real(names, packed)

run.judge = deadly
if __name__ == "__main__":
    run.scan([sys.argv[1]], [resolve(n) for n in sys.argv[3:]], sys.argv[2], jobs=2, chunk=10)
"""


def test_workers_that_can_not_start_are_one_line(fleet, tmp_path):
    """A script without a guard runs itself in each worker; the scan tried again for ever."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, xfast\n"
        "from xfast.fleet.run import scan\n"
        "hosts = [xfast.resolve('intel-broadwell@6.12')]\n"
        "scan([sys.argv[1]], hosts, sys.argv[2], jobs=2)\n"
    )
    done = subprocess.run(
        [sys.executable, script, fleet, tmp_path / "results"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    said = "xfast.errors.XfastError: scan: expected worker processes to start"
    assert [line.startswith(said) for line in done.stderr.splitlines()].count(True) == 1


def test_a_folder_is_held_by_one_scan(fleet, tmp_path, hosts):
    question = Question(tuple(hosts), Policy(), {})
    with (
        Dataset(os.fspath(tmp_path / "out"), question),
        pytest.raises(XfastError, match="another scan is writing here"),
        Dataset(os.fspath(tmp_path / "out"), question),
    ):
        pass


def test_a_folder_with_something_else_in_it_is_refused(fleet, tmp_path, hosts):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(XfastError, match=r"thesis\.tex"):
        run.scan([os.fspath(fleet)], hosts, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["thesis.tex"]


@pytest.mark.parametrize("name", ["snapshots", "verdicts", "findings", "_work"])
def test_a_folder_of_snapshots_is_not_taken_for_a_scans(fleet, tmp_path, hosts, name):
    """`scan /data/snapshots -o /data` removed the snapshots: its own folder is called so too."""
    top = tmp_path / "data"
    top.mkdir()
    fleet.rename(top / name)
    before = {path.name: path.read_bytes() for path in (top / name).iterdir()}
    with pytest.raises(XfastError, match=rf"an empty folder or a scan's results, got '{name}/"):
        run.scan([os.fspath(top / name)], hosts, top, jobs=1)
    assert os.listdir(top) == [name]
    assert {path.name: path.read_bytes() for path in (top / name).iterdir()} == before


def test_what_others_put_into_its_folders_meanwhile_stays(fleet, tmp_path, hosts):
    out = tmp_path / "out"
    question = Question(tuple(hosts), Policy(), {})
    with Dataset(os.fspath(out), question) as dataset:
        for name in ("snapshots/notes", "_work/vm.save", f"snapshots/{'0' * 24}.parquet"):
            (out / name).write_bytes(b"x")
        dataset.finish()
    assert sorted(os.listdir(out / "snapshots")) == ["notes"]
    assert os.listdir(out / "_work") == ["vm.save"]


@pytest.mark.parametrize("way", ["the folder", "from within", "a link"])
def test_a_scan_does_not_judge_its_own_results(fleet, tmp_path, hosts, monkeypatch, way):
    """They lie below the folder that is scanned; the second run took them for inputs."""
    monkeypatch.chdir(fleet)
    (tmp_path / "link").symlink_to(fleet)
    name = {
        "the folder": os.fspath(fleet),
        "from within": ".",
        "a link": os.fspath(tmp_path / "link"),
    }
    for _ in range(2):
        manifest = run.scan([name[way]], hosts, fleet / "results", jobs=1, chunk=7)
        assert (manifest["snapshots"], manifest["failed"]) == (41, 1)
    (fleet / "results2").mkdir()
    (fleet / "results2" / "one").write_bytes(CLEAN.read_bytes())
    assert run.scan([name[way]], hosts, fleet / "results", jobs=1)["snapshots"] == 42


def test_another_question_leaves_nothing_of_the_old_answer(fleet, tmp_path, hosts):
    run.scan([os.fspath(fleet)], hosts, tmp_path / "out", jobs=1, chunk=5)
    run.scan([os.fspath(fleet)], hosts[:1], tmp_path / "out", jobs=1, chunk=5)
    run.scan([os.fspath(fleet)], hosts[:1], tmp_path / "whole", jobs=1, chunk=5)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_an_unfinished_or_damaged_folder_is_said(tmp_path):
    with pytest.raises(XfastError, match="finished scan"):
        list(tables(os.fspath(tmp_path), "snapshots"))


@pytest.mark.parametrize("library", ["pyarrow", "duckdb", "polars"])
def test_it_is_read_as_it_is(fleet, tmp_path, hosts, library):
    module = pytest.importorskip(library, reason=f"{library} is not installed")
    out = tmp_path / "out"
    run.scan([os.fspath(fleet)], hosts, out, jobs=1)
    if library == "duckdb":
        ((number,),) = module.sql(
            f"SELECT count(*) FROM '{out}/snapshots/*.parquet' JOIN '{out}/verdicts/*.parquet' "
            f"USING (class) WHERE host = '{NAMES[0]}' AND verdict = 'incompatible'"
        ).fetchall()
    elif library == "polars":
        snapshots, verdicts = (module.read_parquet(out / t / "*.parquet") for t in TABLES)
        both = snapshots.join(verdicts, on="class")
        number = len(both.filter(host=NAMES[0], verdict="incompatible"))
    else:
        from pyarrow import dataset

        snapshots, verdicts = (dataset.dataset(out / t).to_table() for t in TABLES)
        both = snapshots.join(verdicts.drop(["codes"]), "class").to_pylist()
        number = sum((r["host"], r["verdict"]) == (NAMES[0], "incompatible") for r in both)
    assert number == 20


TABLES = ("snapshots", "verdicts")


def test_the_command_line(fleet, tmp_path, capsys):
    words = ["scan", os.fspath(fleet), "--host", *NAMES, "-o", os.fspath(tmp_path / "out"), "-j1"]
    assert main(words) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "41 snapshots judged" in printed.err
    assert main([*words, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["snapshots"] == 41
    assert main(["scan", os.fspath(fleet), "--host", "nobody", "-o", "x"]) == 2


def test_a_full_disk_is_one_line_and_the_rest_is_done_later(fleet, tmp_path, hosts, monkeypatch):
    real = os.fsync
    left = [12]

    def full(fd):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(XfastError, match="No space left on device; what is finished stays"):
        run.scan([os.fspath(fleet)], hosts, tmp_path / "out", jobs=1, chunk=5)
    monkeypatch.undo()
    run.scan([os.fspath(fleet)], hosts, tmp_path / "out", jobs=1, chunk=5)
    run.scan([os.fspath(fleet)], hosts, tmp_path / "whole", jobs=1, chunk=5)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_folder_that_can_not_be_made_is_one_line(fleet, capsys):
    words = ["scan", os.fspath(fleet), "--host", NAMES[0], "-o", "/dev/null/nowhere"]
    assert main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_stack_is_a_row_for_all_areas_that_are_alike(tmp_path, hosts, capsys):
    one = (Path(__file__).parents[1] / "data/raw/kvm618-guestxcr0_e7-bve7.xsave").read_bytes()
    other = (Path(__file__).parents[1] / "data/raw/kvm618-guestxcr0_e7-bv07.xsave").read_bytes()
    (tmp_path / "stack").write_bytes(other + one * 400 + other * 200)
    run.scan([os.fspath(tmp_path / "stack")], hosts, tmp_path / "out", jobs=1)
    found = rows(tmp_path / "out")
    assert [(row["vcpu"], row["xstate_bv"], row["count"]) for row in found] == [
        (0, 0x7, 201), (1, 0xE7, 400),
    ]  # fmt: skip
    assert len({row["class"] for row in found}) == 1
    assert summarise(os.fspath(tmp_path / "out")).xstate_bv == {0x7: 201, 0xE7: 400}
    assert main(["show", os.fspath(tmp_path / "stack")]) == 0
    shown = capsys.readouterr().out
    assert "and 399 alike" in shown
    assert "and 200 alike" in shown
    assert shown.count("vCPU") == 2


def test_what_vanishes_or_may_not_be_read_is_a_row(fleet, tmp_path, hosts, monkeypatch):
    (fleet / "circle").symlink_to(fleet)
    (fleet / "closed").mkdir(mode=0)
    read = judging.read

    def vanishing(name, **options):
        if name.endswith("leak-03"):
            os.unlink(name)
        if name.endswith("leak-04"):
            raise PermissionError(13, "Permission denied", name)
        return read(name, **options)

    monkeypatch.setattr(judging, "read", vanishing)
    manifest = run.scan([os.fspath(fleet)], hosts, tmp_path / "out", jobs=1)
    bad = {row["snapshot"].rpartition("/")[2]: row["error"] for row in rows(tmp_path / "out")}
    assert "No such file" in bad["leak-03"]
    assert "Permission denied" in bad["leak-04"]
    assert manifest["failed"] == sum(1 for error in bad.values() if error)
    assert not any("circle" in name for name in bad)


def test_a_stream_that_is_cut_while_it_is_read_is_a_row(tmp_path, hosts, monkeypatch):
    from xfast.snapshots.bytes import source

    path = tmp_path / "in" / "growing"
    path.parent.mkdir()
    path.write_bytes(LEAK.read_bytes())
    read_at = source.read_at

    def cutting(fd, length, offset):
        os.truncate(path, 5000)
        return read_at(fd, length, offset)

    monkeypatch.setattr(source, "read_at", cutting)
    manifest = run.scan([os.fspath(path.parent)], hosts, tmp_path / "out", jobs=1)
    assert (manifest["snapshots"], manifest["failed"]) == (0, 1)
    (row,) = rows(tmp_path / "out")
    assert "expected " in row["error"]
    assert ", got " in row["error"]
    assert row["count"] is None
