"""Objects in stores, on real servers: nginx with ranges, and an S3 server."""

import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import xfast
from xfast.errors import XfastError
from xfast.fleet import run
from xfast.fleet.dataset import tables
from xfast.fleet.judging import Question, judge
from xfast.fleet.remote import BLOCK, TAIL, Remote, fetched
from xfast.hosts import resolve
from xfast.judge.verdict import Policy
from xfast.snapshots.bytes.source import EXPAND_LIMIT, Source

pytest.importorskip("pyarrow", reason="needs pyarrow")
pytest.importorskip("fsspec", reason="needs fsspec")
pytest.importorskip("aiohttp", reason="fsspec needs aiohttp for http")

EXAMPLES = Path(__file__).parents[2] / "examples" / "snapshots"
LEAK = EXAMPLES / "q72-kvm-pkru-leak-bv207.qemustate"
HOSTS = [resolve("intel-broadwell@6.12"), resolve("amd-milan@6.12")]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def nginx(tmp_path_factory):
    if not shutil.which("nginx"):
        pytest.skip("nginx is not here")
    root = tmp_path_factory.mktemp("www")
    port = free_port()
    for path in EXAMPLES.iterdir():
        shutil.copy(path, root)
    (root / "noise").write_bytes(bytes(1000))
    (root / "root").write_text(os.fspath(root))
    os.chmod(root, 0o755)
    config = root.parent / "nginx.conf"
    config.write_text(
        f"daemon off; pid {root.parent}/nginx.pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; client_body_temp_path {root.parent}/b;"
        f"proxy_temp_path {root.parent}/p; fastcgi_temp_path {root.parent}/f;"
        f"uwsgi_temp_path {root.parent}/u; scgi_temp_path {root.parent}/s;"
        f"server {{ listen 127.0.0.1:{port}; root {root}; autoindex on; }} }}\n"
    )
    if os.geteuid() == 0:
        config.write_text("user root;\n" + config.read_text())
    url = f"http://127.0.0.1:{port}/"
    with subprocess.Popen(["nginx", "-c", config], stderr=subprocess.PIPE) as server:
        for _ in range(200):
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, server.stderr.read()
                time.sleep(0.05)
        yield url
        server.terminate()


def test_the_answer_is_that_of_the_file(nginx):
    for path in sorted(EXAMPLES.iterdir()):
        if path.suffix in (".xcrs", ".cpuid2"):
            continue
        (here,) = xfast.read(path)
        (there,) = xfast.read(Remote(nginx + path.name).expanded(EXPAND_LIMIT))
        assert [v.area.tobytes() for v in there.vcpus] == [v.area.tobytes() for v in here.vcpus]


def test_little_of_a_stream_is_fetched(nginx):
    with Remote(nginx + LEAK.name) as source:
        xfast.read(source)
        assert source.bytes_fetched <= 256 << 10


def test_little_of_a_large_stream_is_fetched(nginx, shared):
    """75 MB with all of the guest's memory: its devices are found from the end."""
    path = shared / "samples/qemu/q72-max-smp2-pc-fullram.qemustate.zst"
    served = Path(urllib.request.urlopen(nginx + "root").read().decode()) / "large"
    with Source.open(path) as source, open(served, "wb") as out:
        out.writelines(source.chunks())
    remote = Remote(nginx + "large")
    assert remote.size > 64 << 20
    (snapshot,) = xfast.read(remote)
    assert len(snapshot.vcpus) == 2
    assert remote.bytes_fetched <= 256 << 10


def test_a_scan_of_a_server(nginx, tmp_path):
    names = [nginx + path.name for path in EXAMPLES.iterdir() if "pkru-leak-bv" in path.name]
    names += [nginx + "noise", nginx + "nothing-here"]
    manifest = run.scan(names, HOSTS, tmp_path / "out", jobs=1)
    assert (manifest["snapshots"], manifest["failed"]) == (1, 2)
    (table,) = tables(os.fspath(tmp_path / "out"), "snapshots")
    errors = {row["snapshot"]: row["error"] for row in table.to_pylist() if row["error"]}
    assert "there is no such object" in errors[nginx + "nothing-here"]


@pytest.mark.parametrize("size", [0, 1, BLOCK, 230 << 10, 241 << 10, 256 << 10, (1 << 20) + 1])
def test_no_more_is_fetched_ahead_than_a_stream_may_cost(tmp_path, size):
    """Whatever was read of the one before: 256 KiB, however large it is."""
    (tmp_path / "object").write_bytes(bytes(size))
    with Remote(f"file://{tmp_path}/object") as source:
        source.fetch_ahead(TAIL)
        assert min(size, TAIL) <= source.bytes_fetched <= 256 << 10


class Slow(BaseHTTPRequestHandler):
    """Answers no one before eight requests at a time have waited for an answer."""

    waiting = threading.Semaphore(7)
    together = threading.Event()
    body = LEAK.read_bytes()

    def do_HEAD(self):
        self.answer(200, b"", len(self.body))

    def do_GET(self):
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        self.answer(206, self.body[first : last + 1], last + 1 - first)

    def answer(self, code, data, length):
        if not self.waiting.acquire(blocking=False):
            self.together.set()
        self.together.wait(timeout=60)
        self.send_response(code)
        self.send_header("Content-Length", str(length))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_many_objects_are_on_their_way_at_a_time():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    names = [f"http://127.0.0.1:{server.server_port}/{i}.qemustate" for i in range(32)]
    try:
        result = judge(names, Question(tuple(HOSTS), Policy(), {}).packed())
    finally:
        server.shutdown()
        server.server_close()
    assert Slow.together.is_set()
    assert (result.snapshots, result.failed) == (32, 0)
    assert [row[0] for row in result.rows] == names
    whole = judge([os.fspath(LEAK)] * 32, Question(tuple(HOSTS), Policy(), {}).packed())
    assert result.classes == whole.classes


def test_what_was_read_of_one_object_is_fetched_of_the_next(nginx):
    for turn, future in enumerate(fetched([nginx + LEAK.name] * 40)):
        with future.result() as source:
            before = source.bytes_fetched
            xfast.read(source)
            if turn == 39:
                assert before == source.bytes_fetched <= 256 << 10
                assert source.tail > BLOCK


class Broken(BaseHTTPRequestHandler):
    """Answers with the whole body to every range, or with an error."""

    body = LEAK.read_bytes()

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self):
        if "500" in self.path:
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.do_HEAD()
        self.wfile.write(self.body)

    def log_message(self, *_):
        pass


@pytest.fixture
def broken():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_a_server_that_ignores_ranges_is_said(broken):
    with pytest.raises(XfastError, match="ignores ranges"):
        xfast.read(Remote(broken + "whole"))


def test_a_server_that_fails_is_one_line(broken, monkeypatch):
    monkeypatch.setattr("xfast.fleet.remote.time.sleep", lambda _: None)
    with pytest.raises(XfastError, match="can't be read") as error:
        xfast.read(Remote(broken + "500"))
    assert "\n" not in str(error.value)


def test_s3(tmp_path, monkeypatch):
    pytest.importorskip("s3fs", reason="needs s3fs")
    server_module = pytest.importorskip("moto.server", reason="needs moto's server")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=free_port())
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        store = s3fs.S3FileSystem(endpoint_url=f"http://{host}:{port}")
        store.mkdir("bucket")
        for path in EXAMPLES.glob("*.qemustate"):
            store.put(os.fspath(path), f"bucket/fleet/{path.name}")
        manifest = run.scan(["s3://bucket/fleet/"], HOSTS, tmp_path / "out", jobs=1)
        (whole,) = [
            run.scan([os.fspath(p) for p in EXAMPLES.glob("*.qemustate")], HOSTS, tmp_path / "l",
                     jobs=1)
        ]  # fmt: skip
        assert manifest["verdicts"] == whole["verdicts"]
        assert manifest["snapshots"] == 3
    finally:
        server.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_zip_on_the_disk(tmp_path):
    archive = shutil.make_archive(os.fspath(tmp_path / "a"), "zip", EXAMPLES)
    url = f"zip://{LEAK.name}::{archive}"
    (there,) = xfast.read(Remote(url))
    assert there.vcpus[0].xcr0 == 7
