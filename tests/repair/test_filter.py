"""The filter without QEMUs: what passes, what does not, and where it ends when something breaks."""

import contextlib
import os
import random
import re
import subprocess
import sys
import threading

import pytest
from qemu_files import END_OF_PAGES, PAGES, description_at, places_of, undescribed, with_memory

from xfast import snapshots
from xfast.hosts import resolve
from xfast.repair.filter import Filter, Wanted
from xfast.repair.plan import plan_fix

FILTER = [sys.executable, "-m", "xfast", "filter"]
TCG = "qemu-tcg-max@6.1"


PEAK = """
import re, sys
from xfast.cli.main import main
main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
"""
"""Run a verb, and print the most memory that it had (KiB)."""


def filtered(data, *words, host=TCG):
    """Run the filter on bytes; return its exit code, what it passed, and its complaint."""
    done = subprocess.run(
        [*FILTER, "--host", host, *words], input=data, capture_output=True, check=False
    )
    return done.returncode, done.stdout, done.stderr.decode()


def test_what_is_fine_passes_as_it_is(stream):
    data = with_memory(stream, PAGES["page"] * 5000 + PAGES["zero"] * 100 + PAGES["xbzrle"])
    for whole in (data, undescribed(data)):
        code, passed, words = filtered(whole)
        assert (code, passed == whole) == (0, True)
        assert "nothing to change" in words


def test_what_leaked_is_healed_as_fix_would(leak, tmp_path):
    path, fixed = tmp_path / "leak", tmp_path / "fixed"
    path.write_bytes(leak)
    (snapshot,) = snapshots.read(path)
    plan_fix(snapshot, resolve("amd-rome")).apply(str(fixed))
    code, passed, words = filtered(leak, host="amd-rome")
    assert (code, passed) == (0, fixed.read_bytes())
    assert "pkru xstate_bv 0x207 -> 0x7" in words
    fix = [sys.executable, "-m", "xfast", "fix", "-", "--host", "amd-rome", "-o", "-"]
    done = subprocess.run(fix, input=leak, capture_output=True, check=True)
    assert done.stdout == passed


def test_live_data_that_the_host_lacks_stop_it_before_the_devices(stream):
    code, passed, words = filtered(stream, host="amd-rome@6.1")
    assert code == 1
    assert passed == stream[: places_of(stream)[0]]
    assert words.count("\n") == 1
    assert "bndregs (live)" in words


def test_check_only_passes_everything_and_tells(stream, leak):
    for data, host, expected in (
        (stream, "amd-rome@6.1", 1),
        (leak, "amd-rome", 1),
        (stream, TCG, 0),
    ):
        code, passed, _ = filtered(data, "--check-only", host=host)
        assert (code, passed) == (expected, data)
        code, passed, _ = filtered(data, "--check-only", "--refuse", host=host)
        assert (code, len(passed) == len(data)) == (expected, not expected)


def test_live_data_go_when_they_are_named(stream):
    code, _, words = filtered(stream, "--drop", "pkru", host=TCG)
    assert (code, words.count("\n")) == (1, 1)
    code, passed, words = filtered(stream, "--drop", "pkru", "--even-if-live")
    assert code == 0
    assert len(passed) == len(stream)
    assert passed != stream
    assert "pkru xstate_bv" in words


def test_cut_off_anywhere_it_never_ends_like_a_whole_stream(stream):
    first, text = places_of(stream)[0], description_at(stream)
    for cut in (0, 7, first - 1, first, first + 99, text - 7, text - 6, text + 99, len(stream) - 1):
        code, passed, words = filtered(stream[:cut])
        assert code == 3, cut
        assert re.fullmatch(r"xfast: -: offset \d+: .*expected .*, got .*\n", words), words
        assert passed == stream[: len(passed)]
        assert len(passed) < text - 5  # the EOF record, at which a destination starts the VM


def test_what_is_not_known_is_named(stream):
    first, _ = places_of(stream)
    code, passed, words = filtered(stream[:first] + b"\1\0\0\1\0\4VFIO" + bytes(8) + stream[first:])
    assert code == 3
    assert stream[:first].startswith(passed)
    assert f"offset {first}: can't be judged: expected ram" in words
    assert "got the section 'VFIO'" in words
    assert filtered(random.Random(1).randbytes(9999))[0] == 3


def test_zeros_behind_a_stream_end_it(leak):
    code, passed, _ = filtered(leak + bytes(1 << 20), host="amd-rome")
    assert (code, len(passed)) == (0, len(leak))


def test_pieces_of_any_size_and_a_return_path(leak):
    """With a return path nothing is waited for behind the last byte, and the pipe stays open."""
    first, _ = places_of(leak)
    answered = leak[:first] + b"\x08\0\1\0\0" + leak[first:]
    for data, chunk in ((leak, 1000), (leak, 4097), (answered, 60_000)):
        (source, write), (read, target) = os.pipe(), os.pipe()
        received = bytearray()

        def feed(data=data, chunk=chunk, write=write):
            for at in range(0, len(data), chunk):
                os.write(write, data[at : at + chunk])
            if data is leak:
                os.close(write)

        def drain(read=read, received=received):
            while piece := os.read(read, 1 << 16):
                received.extend(piece)

        threads = [threading.Thread(target=work) for work in (feed, drain)]
        for thread in threads:
            thread.start()
        plan = Filter(source, target, Wanted(resolve("amd-rome"))).run()
        os.close(target)
        for thread in threads:
            thread.join()
        assert plan.after.verdict == "identical"
        assert len(received) == len(data)
        assert bytes(received) != data
        for fd in (source, read, *([write] if data is answered else [])):
            os.close(fd)


def test_memory_is_flat(stream):
    """A stream with 512 MiB of pages; the filter's peak stays below 64 MiB."""
    first, _ = places_of(stream)
    data = with_memory(stream, PAGES["page"] * 4096)
    more = data[first : first + len(data) - len(stream)]
    process = subprocess.Popen(
        [sys.executable, "-c", PEAK, "filter", "--host", TCG],
        stdin=-1, stdout=subprocess.DEVNULL, stderr=-1,
    )  # fmt: skip
    process.stdin.write(stream[:first])
    for _ in range(32):
        process.stdin.write(more)
    _, words = process.communicate(stream[first:])
    assert int(words.split()[-1]) < 64 << 10


def endless(stream, kind):
    """Return how a hostile stream begins, and what it then repeats."""
    first, section = places_of(stream)
    head = b"QEVM\0\0\0\3\7\0\0\0\2pc"
    names = {"uuid": bytes(16), "target-page-bits": b"\0\0\0\x0c", "capabilities": bytes(4)}
    if kind in names:
        name = b"configuration/" + kind.encode()
        return head, bytes([5, len(name)]) + name + b"\0\0\0\1" + names[kind]
    memory = stream[:first] + b"\2" + section
    return {
        "pages": (memory, PAGES["zero"]),
        "names": (memory, PAGES["fill"].replace(b"\6pc.ram", b"\xff" + b"n" * 255)),
        "hooks": (memory, PAGES["hook"]),
        "parts": (stream[:first], b"\2" + section + END_OF_PAGES + b"\x7e" + section),
        "commands": (stream[:first], b"\x08\0\x05\xff\xff" + bytes(65535)),
        "devices": (stream[:first], b"\4\0\0\0\1\3abc" + bytes(range(256)) * 20),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["uuid", "target-page-bits", "capabilities", "pages", "names", "hooks", "parts", "commands",
     "devices"],
)  # fmt: skip
def test_what_never_ends_takes_no_memory(stream, kind):
    """128 MiB of it: one line, and the filter's peak stays below 64 MiB."""
    start, more = endless(stream, kind)
    process = subprocess.Popen(
        [sys.executable, "-c", PEAK, "filter", "--host", TCG],
        stdin=-1, stdout=subprocess.DEVNULL, stderr=-1,
    )  # fmt: skip
    more *= (1 << 20) // len(more)
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(start)
        for _ in range(128):
            process.stdin.write(more)
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    words = process.stderr.read().decode().splitlines()
    process.stderr.close()
    assert process.wait() == 0
    assert len(words) == 2
    assert re.fullmatch(r"xfast: -: offset \d+: .*expected .*, got .*", words[0])
    assert int(words[1]) < 64 << 10


def test_endless_devices_end_somewhere(stream, monkeypatch):
    monkeypatch.setattr("xfast.snapshots.qemu.forward.HOLD_LIMIT", 1 << 20)
    first, _ = places_of(stream)
    source, write = os.pipe()

    def feed():
        try:
            os.write(write, stream[:first])
            while True:
                os.write(write, b"\4" + bytes(range(255)) * 16)
        except BrokenPipeError:
            os.close(write)

    thread = threading.Thread(target=feed)
    thread.start()
    with (
        open(os.devnull, "wb") as target,
        pytest.raises(ValueError, match="expected the end of the devices within"),
    ):
        Filter(source, target.fileno(), Wanted(resolve(TCG))).run()
    os.close(source)
    thread.join()


def test_words_that_make_no_sense(stream):
    for words in (["--refuse"], ["--drop", "nothing"]):
        code, passed, complaint = filtered(stream, *words)
        assert (code, passed) == (2, b"")
        assert complaint.startswith("xfast: ")
