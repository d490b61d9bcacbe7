"""Migrations in flight, with real QEMUs on both sides: repaired, refused, and broken off."""

import os
import shutil
import signal
import subprocess
import sys
import time

import fpu_guest
import pytest
from fpu_guest import DEVICES, booted, counts
from qemu_machine import GUESTS, PROGRAM, Machine, restored

pytestmark = pytest.mark.skipif(not shutil.which(PROGRAM), reason=f"{PROGRAM} is not here")

FILTER = f"{sys.executable} -m xfast filter"
TCG = "qemu-tcg-max@6.1"


@pytest.fixture(scope="module")
def guest(tmp_path_factory):
    firmware = fpu_guest.firmware(tmp_path_factory.mktemp("guest"))
    return *GUESTS["tcg"], *DEVICES, "-bios", str(firmware)


def starts(guest, path):
    """Tell whether a QEMU takes a stream to its end; one that does not exits."""
    try:
        with Machine(*guest, "-incoming", f"exec:cat {path}") as target:
            return target.migrated() == "completed"
    except (EOFError, BrokenPipeError):
        return False


def migrate(machine, command):
    machine.run("migrate", uri=f"exec:{command}")
    return machine.migrated()


@pytest.mark.parametrize("verb", ["filter --host {}", "fix - --host {} -o -"])
def test_ten_migrations_in_a_row_without_a_wrong_value(guest, tmp_path, verb):
    source = booted(guest)
    try:
        for number in range(10 if verb.startswith("fix") else 2):
            os.mkfifo(fifo := tmp_path / f"fifo{number}")
            target = Machine(*guest, "-incoming", f"exec:cat {fifo}").__enter__()
            command = f"{sys.executable} -m xfast {verb.format(TCG)} > {fifo}"
            assert migrate(source, command) == "completed"
            assert target.migrated() == "completed"
            before = counts(source)
            source.__exit__(None)
            source = target
            assert counts(source) == before
            source.run("cont")
            counts(source, before + 1000)
    finally:
        source.__exit__(None)


def test_a_target_that_would_lose_live_data_fails_the_migration(guest, tmp_path):
    """AVX is live, and the target has none: the source goes on, the target starts nothing."""
    source = booted(guest)
    try:
        received = tmp_path / "received"
        command = f"{FILTER} --host intel-westmere@6.1 2> {tmp_path}/err > {received}"
        assert migrate(source, command) == "failed"
        counts(source, counts(source))
        assert source.run("query-status")["status"] == "running"
        words = (tmp_path / "err").read_text()
        assert words.startswith("xfast: -: intel-westmere")
        assert b'"devices": [' not in received.read_bytes()
        assert not starts(guest, received)
    finally:
        source.__exit__(None)


@pytest.mark.parametrize("broken", ["exit 0", "head -c 100", "head -c 20000 > /dev/null"])
def test_a_reader_that_goes_away_fails_the_migration(guest, broken):
    source = booted(guest)
    try:
        assert migrate(source, f"{FILTER} --host {TCG} | {broken}") == "failed"
        counts(source, counts(source))
    finally:
        source.__exit__(None)


def test_a_host_that_is_not_known_fails_the_migration(guest):
    source = booted(guest)
    try:
        assert migrate(source, f"{FILTER} --host no-such-host | cat > /dev/null") == "failed"
        counts(source, counts(source))
    finally:
        source.__exit__(None)


def test_killed_at_any_moment_one_machine_runs_and_never_two(guest, tmp_path):
    """The filter is killed before each of its reads in turn, up to one that it never does."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    source = booted(guest)
    outcomes = []
    try:
        for reads in (*range(12), *range(14, 200, 2)):
            received = tmp_path / "received"
            command = f"{sys.executable} {script} {reads} {TCG} > {received}; test $? -lt 128"
            command = f"{command} && touch {tmp_path / 'through'}"
            status = migrate(source, command)
            whole = received.read_bytes().endswith(b"}]}]}")
            outcomes.append((status, whole))
            if status == "completed":
                break
            assert status == "failed"
            assert not whole
            counts(source, counts(source))
        assert len(outcomes) > 5
        if not whole:  # killed behind the source's last byte: all is there, and waits
            assert not (tmp_path / "through").exists()
            source.run("cont")
            counts(source, counts(source))
        else:
            assert starts(guest, received)
    finally:
        source.__exit__(None)


KILLED = """
import os, signal, sys
from xfast.hosts import resolve
from xfast.repair.filter import Filter, Wanted

left = int(sys.argv[1])

def watch(fd, count):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1

Filter(0, 1, Wanted(resolve(sys.argv[2])), watch).run()
"""


RETURN_PATH = [{"capability": "return-path", "state": True}]


@pytest.fixture(params=["microvm", "isapc"])
def scarce(request, tmp_path):
    """A running guest with so few devices that a pipe holds them all, and its arguments."""
    words = ("-accel", "tcg", "-cpu", "max", "-m", "16", "-machine", request.param)
    guest = (*words, "-bios", str(fpu_guest.firmware(tmp_path)))
    source = booted(guest)
    source.run("migrate-set-capabilities", capabilities=RETURN_PATH)
    yield source, guest
    source.__exit__(None)


def answered(source, guest, tmp_path, command):
    """Migrate with a return path; return the source's status and the target, as it is then."""
    for name in ("forth", "back"):
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name)
    target = Machine(*guest, "-incoming", "defer").__enter__()
    target.run("migrate-set-capabilities", capabilities=RETURN_PATH)
    uri = f"exec:cat {tmp_path}/forth & exec cat > {tmp_path}/back"
    target.run("migrate-incoming", uri=uri)
    status = migrate(source, f"cat {tmp_path}/back & exec {command} > {tmp_path}/forth")
    return status, target


def test_with_a_return_path_the_source_runs_on_whatever_the_machine(scarce, tmp_path):
    """The filter refuses, and is then killed before each of its reads, up to one it never does.

    Not before the first one: a QEMU 7.2 that is sent nothing at all never notices the end.
    """
    source, guest = scarce
    refused = f"{FILTER} --host intel-westmere@6.1 2> {tmp_path}/err"
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    killed = [f"{sys.executable} {script} {reads} {TCG}" for reads in range(1, 99)]
    failed = 0
    for command in (refused, *killed):
        status, target = answered(source, guest, tmp_path, command)
        if status == "completed":
            break
        target.__exit__("it waits for a stream that ended")
        assert status == "failed"
        failed += 1
        counts(source, counts(source))
    assert failed > 1
    assert "intel-westmere" in (tmp_path / "err").read_text()
    assert target.migrated() == "completed"
    count = counts(target)
    assert counts(source) == count
    target.run("cont")
    counts(target, count)
    target.__exit__(None)


def test_check_only_fails_a_migration_when_told_to(guest, tmp_path):
    source = booted(guest)
    try:
        command = f"{FILTER} --host intel-westmere@6.1 --check-only"
        assert migrate(source, f"{command} --refuse > {tmp_path / 'refused'}") == "failed"
        counts(source, counts(source))
        assert migrate(source, f"{command} > {tmp_path / 'passed'}") == "completed"
    finally:
        source.__exit__(None)
    with Machine(*guest, "-incoming", f"exec:cat {tmp_path / 'passed'}") as target:
        assert target.migrated() == "completed"
        count = counts(target)
        target.run("cont")
        counts(target, count)


def test_a_leaked_stream_is_healed_in_flight(shared):
    """On a host without PKU QEMU says that the leaked stream is fine, and loses the registers."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm can't be opened")
    path = shared / "samples/qemu/kvm/q72-kvm-pkru-leak-bv207.qemustate"
    machine = (*GUESTS["kvm"], "-m", "128", "-machine", "pc-i440fx-7.2")
    registers = restored(machine, f"{path} | {FILTER} --host amd-rome")
    assert registers["MXCSR"] == [0x1FA0]
    low, high = 0x1111222233334444, 0x5555666677778888
    assert registers["YMM00"] == [0, 0x9999AAAABBBBCCCC, high, low]


def test_interrupted_by_the_user(guest):
    """A pipe that stalls: Ctrl-C ends the filter with 130."""
    process = subprocess.Popen(
        [*FILTER.split(), "--host", TCG], stdin=-1, stdout=subprocess.DEVNULL, stderr=-1, text=True
    )
    process.stdin.write("QEVM")
    process.stdin.flush()
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=20)
    assert (process.returncode, words) == (130, "xfast: interrupted\n")
