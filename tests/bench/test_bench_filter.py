"""The filter's bench: every line is measured, on a stream that is still one."""

import io
import json
import lzma

import pytest

from xfast.bench.filter import with_pages
from xfast.cli.main import main
from xfast.snapshots import read
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.qemu.forward import walk

HOST = "qemu-tcg-max@6.1"


@pytest.fixture
def stream(data, tmp_path):
    path = tmp_path / "stream"
    packed = (data / "qemu/q72-max-smp2-q35.qemustate.xz").read_bytes()
    path.write_bytes(lzma.decompress(packed))
    return path


def test_pages_are_added_and_nothing_else_changes(stream, tmp_path):
    with Source.open(stream) as source:
        _, devices = walk(source, 0)
    with open(tmp_path / "large", "wb") as file:
        with_pages(stream.read_bytes(), devices, 5000, file)
    with Source.open(tmp_path / "large") as source:
        added = walk(source, 0)[1] - devices
    assert 4 * 1024 * 4104 < added < 5001 * 4104
    (before,), (after,) = read(stream), read(tmp_path / "large")
    assert [bytes(one.area) for one in before.vcpus] == [bytes(one.area) for one in after.vcpus]


def test_a_stream_without_memory_is_refused(stream):
    with pytest.raises(ValueError, match="expected a stream with guest memory"):
        with_pages(stream.read_bytes(), 20, 1, io.BytesIO())


def test_every_line_is_measured(stream, capsys):
    words = ["--host", HOST, "--memory", "16", "--samples", "3", "--json"]
    main(["bench", "filter", str(stream), *words])
    rows = json.loads(capsys.readouterr().out)["filter"]
    assert [row["unit"] for row in rows] == ["", "MiB", "ms", "ms"]
    assert all(row["ratio"] > 0 for row in rows[:3])
    assert 10 < rows[1]["ratio"] < 1000


def test_a_host_that_refuses_the_stream_is_told(stream, capfd):
    words = ["--host", "amd-rome@6.1", "--memory", "16", "--samples", "3"]
    assert main(["bench", "filter", str(stream), *words]) == 2
    assert "expected exit code 0, got 1" in capfd.readouterr().err
