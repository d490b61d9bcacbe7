"""Standard input that is a pipe: of any size, stalled, interrupted; and where a stream ends."""

import os
import pty
import re
import signal
import subprocess
import sys

import pytest
from loop_devices import loop_device
from qemu_files import END_OF_PAGES, PAGES, places_of, undescribed, with_memory

from xfast.cli.main import main

HOST = "qemu-tcg-max@6.1"
XFAST = [sys.executable, "-m", "xfast"]


VERBS = {
    "check": (["check", "-", "--host", HOST], "read"),
    "show": (["show", "-"], "read"),
    "filter": (["filter", "--host", HOST], "passed"),
}


@pytest.mark.parametrize(
    ("verb", "start"),
    [
        ("check", "memory"), ("check", "devices"), ("check", "noise"), ("show", "memory"),
        ("filter", "memory"), ("filter", "devices"),
    ],
)  # fmt: skip
def test_a_pipe_that_stalls_shows_progress_and_can_be_interrupted(stream, tmp_path, verb, start):
    """On a terminal; and nothing is left in the folder of temporary files."""
    words, done = VERBS[verb]
    first = {
        "memory": with_memory(stream, PAGES["page"] * 1000)[:2_000_000],
        "devices": stream[:-1],
        "noise": b"\x7fELF" + bytes(3_000_000),
    }[start]
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [*XFAST, *words], stdin=-1, stdout=subprocess.DEVNULL, stderr=end,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    os.close(end)
    process.stdin.write(first)
    process.stdin.flush()
    seen = ""
    while not re.search(rf"\rxfast: {len(first) / 1e6:.0f} MB {done}, nothing for \d+ s", seen):
        seen += os.read(terminal, 1000).decode()
    process.send_signal(signal.SIGINT)
    while not seen.endswith("xfast: interrupted\r\n"):
        seen += os.read(terminal, 1000).decode()
    assert process.wait(20) == 130
    assert "\r\x1b[K" in seen
    assert os.listdir(tmp_path) == []
    process.stdin.close()
    os.close(terminal)


def run_on(words, pieces):
    """Run a verb with pieces on its standard input; return exit code, output and complaints."""
    process = subprocess.Popen(
        [*XFAST, *words], stdin=-1, stdout=-1, stderr=-1, env={**os.environ, "COLUMNS": "200"}
    )
    for piece in pieces:
        process.stdin.write(piece)
    out, words = process.communicate()
    return process.returncode, out.decode(), words.decode()


def large(stream):
    """Yield a stream with 256 MiB of full pages, piece by piece."""
    first, section = places_of(stream)
    yield stream[:first] + b"\2" + section
    for _ in range(16):
        yield PAGES["page"] * 4096
    yield END_OF_PAGES + b"\x7e" + section + stream[first:]


def test_diff_and_convert_take_a_pipe_of_any_size(stream, leak, tmp_path):
    plain, other = tmp_path / "plain", tmp_path / "other"
    plain.write_bytes(stream)
    other.write_bytes(leak)
    assert run_on(["diff", "-", plain], large(stream)) == (0, "", "")
    assert run_on(["diff", plain, "-"], large(stream)) == (0, "", "")
    code, out, _ = run_on(["diff", "-", other], large(stream))
    assert (code, "vCPU 0: " in out) == (1, True)
    assert run_on(["convert", "-", "-o", tmp_path / "a.npy"], large(stream)) == (0, "", "")
    assert main(["convert", str(plain), "-o", str(tmp_path / "b.npy")]) == 0
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_two_pipes_are_not_one():
    code, _, words = run_on(["diff", "-", "-"], [])
    assert code == 2
    assert words == "xfast: diff: expected - (standard input) once, got it twice\n"


@pytest.mark.parametrize("bare", [False, True])
def test_every_verb_says_where_a_stream_ends(stream, tmp_path, capsys, bare):
    data = undescribed(stream) if bare else stream
    path = tmp_path / "volume"
    path.write_bytes(data + bytes((1 << 20) - len(data)))
    with loop_device(path) as device:
        line = f"xfast: {device}: the stream ends at offset {len(data)}; what follows is no part"
        for words in (
            ["check", device, "--host", HOST],
            ["show", device],
            ["fix", device, "--host", HOST, "--dry-run"],
            ["convert", device, "-o", str(tmp_path / "areas.npy")],
            ["diff", device, device],
        ):
            assert main(words) == 0
            assert line in capsys.readouterr().err
        assert main(["check", device, "--host", HOST, "--quiet"]) == 0
        assert capsys.readouterr().err == ""
        assert main(["show", device, "--json"]) == 0
        assert f'"stream_end": {len(data)}' in capsys.readouterr().out
