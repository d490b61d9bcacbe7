"""A real dask cluster of two worker processes, one of which is killed on the way."""

import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from xfast.cli.main import main
from xfast.fleet import run
from xfast.fleet.dataset import tables
from xfast.hosts import resolve

distributed = pytest.importorskip("distributed", reason="needs distributed")
pytest.importorskip("pyarrow", reason="needs pyarrow")

EXAMPLES = Path(__file__).parents[2] / "examples" / "snapshots"
NAMES = ("intel-broadwell@6.12", "amd-milan@6.12")

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def fleet(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(60):
        for path in EXAMPLES.glob("q72-*.qemustate"):
            shutil.copy(path, folder / f"{i:03}-{path.name}")
    return folder


@pytest.fixture
def cluster():
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    ) as cluster:
        yield cluster


def test_a_killed_worker_costs_no_row(fleet, tmp_path, cluster):
    hosts = [resolve(name) for name in NAMES]
    victims = [worker.pid for worker in cluster.workers.values()]

    def kill(progress):
        if victims and progress.inputs >= 20:
            os.kill(victims.pop(), 9)
            victims.clear()

    with distributed.Client(cluster) as client, client.get_executor() as executor:
        manifest = run.scan(
            [os.fspath(fleet)], hosts, tmp_path / "out", executor=executor, chunk=5,
            on_progress=kill,
        )  # fmt: skip
    assert not victims, "a worker was killed on the way"
    assert (manifest["snapshots"], manifest["failed"]) == (120, 0)
    (table,) = tables(os.fspath(tmp_path / "out"), "snapshots")
    names = [row["snapshot"] for row in table.to_pylist()]
    assert len(names) == len(set(names)) == 120


def test_the_command_line_reaches_a_cluster(fleet, tmp_path, cluster, capsys):
    address = cluster.scheduler_address.removeprefix("tcp://")
    words = ["scan", os.fspath(fleet), "--host", *NAMES, "-o", os.fspath(tmp_path / "out")]
    assert main([*words, "--executor", f"dask://{address}", "--chunk", "20"]) == 1
    assert "120 snapshots judged" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["spark://somewhere", "dask://127.0.0.1:1"])
def test_a_cluster_that_is_not_there_is_one_line(fleet, tmp_path, capsys, url):
    words = ["scan", os.fspath(fleet), "--host", *NAMES, "-o", os.fspath(tmp_path / "out")]
    started = threading.active_count()
    assert main([*words, "--executor", url]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    for _ in range(100):
        if threading.active_count() <= started + 2:
            break
        time.sleep(0.1)
