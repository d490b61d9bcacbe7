"""Streams whose memory a real QEMU sends in other ways: each passes the filter, and is walked."""

import os
import shutil
import signal
import subprocess
import sys
import time

import fpu_guest
import pytest
from fpu_guest import DEVICES, booted, counts
from qemu_machine import PROGRAM, Machine

from xfast.snapshots import read
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.qemu.forward import walk

pytestmark = pytest.mark.skipif(not shutil.which(PROGRAM), reason=f"{PROGRAM} is not here")

GUEST = ("-accel", "tcg", "-cpu", "max", "-smp", "2", "-machine", "pc", *DEVICES)
FILTER = f"{sys.executable} -m xfast filter --host qemu-tcg-max@6.1"


@pytest.fixture(scope="module")
def firmware(tmp_path_factory):
    return fpu_guest.firmware(tmp_path_factory.mktemp("guest"))


def sent(machine, path):
    """Migrate through the filter into a file; return QEMU's answer."""
    machine.run("migrate", uri=f"exec:{FILTER} > {path}")
    assert machine.migrated() == "completed"
    return machine.run("query-migrate")


def limit(machine, bandwidth, downtime):
    how = {"max-bandwidth": bandwidth, "downtime-limit": downtime}
    machine.run("migrate-set-parameters", **how)


def await_answer(machine, ready):
    for _ in range(1500):
        now = machine.run("query-migrate")
        if "ram" in now and ready(now):
            return
        time.sleep(0.02)
    raise AssertionError(now)


def assert_goes_on(machine, guest, path, *capabilities):
    """The file is walked to its devices; a target takes it, and the guest counts on."""
    data = path.read_bytes()
    with Source.open(path) as source:
        first = walk(source, 0)[1]
        assert (data[first], data[first - 5]) == (4, 0x7E)
    padded = path.with_suffix(".padded")
    padded.write_bytes(data + bytes(1 << 20))
    (plain,), (walked,) = read(path), read(padded)
    for one, other in zip(plain.vcpus, walked.vcpus, strict=True):
        assert (one.area == other.area).all()
    before = counts(machine)
    with Machine(*guest, "-incoming", "defer") as target:
        enable(target, *capabilities)
        target.run("migrate-incoming", uri=f"exec:cat {path}")
        assert target.migrated() == "completed"
        assert counts(target) == before
        target.run("cont")
        counts(target, before + 1000)


def enable(machine, *capabilities):
    wanted = [{"capability": name, "state": True} for name in capabilities]
    machine.run("migrate-set-capabilities", capabilities=wanted)


def test_xbzrle_pages(firmware, tmp_path):
    guest = (*GUEST, "-m", "16", "-bios", str(firmware))
    source = booted(guest)
    try:
        enable(source, "xbzrle")
        path = tmp_path / "stream"
        limit(source, 1_000_000, 1)
        source.run("migrate", uri=f"exec:{FILTER} > {path}")
        await_answer(source, lambda now: now["ram"]["remaining"] < 200_000)
        limit(source, 50_000, 1)  # so that it goes over memory again and again
        await_answer(source, lambda now: now["xbzrle-cache"]["pages"] > 2)
        limit(source, 10**9, 300)
        assert source.migrated() == "completed"
        assert_goes_on(source, guest, path, "xbzrle")
    finally:
        source.__exit__(None)


def test_compressed_pages(firmware, tmp_path):
    guest = (*GUEST, "-m", "16", "-bios", str(firmware))
    source = booted(guest)
    try:
        enable(source, "compress")
        done = sent(source, tmp_path / "stream")
        assert done["compression"]["pages"] > 10
        assert_goes_on(source, guest, tmp_path / "stream", "compress")
    finally:
        source.__exit__(None)


def test_shared_memory_that_stays_out_and_postcopy_that_is_not_used(firmware, tmp_path):
    (tmp_path / "ram").touch()
    memory = f"memory-backend-file,id=ram,size=16M,mem-path={tmp_path}/ram,share=on"
    guest = (*GUEST[: -len(DEVICES) - 2], "-m", "16", "-object", memory)
    guest = (*guest, "-machine", "pc,memory-backend=ram", *DEVICES, "-bios", str(firmware))
    source = booted(guest)
    try:
        enable(source, "x-ignore-shared")
        sent(source, tmp_path / "stream")
        assert_goes_on(source, guest, tmp_path / "stream", "x-ignore-shared")
    finally:
        source.__exit__(None)


def test_dirty_bitmaps(firmware, tmp_path):
    nodes = ()
    for name, byte in (("disk", b"\0"), ("other", b"\x5a")):
        (tmp_path / name).write_bytes(byte * (1 << 20))
        file = f"file.driver=file,file.filename={tmp_path}/{name},file.locking=off"
        nodes += ("-blockdev", f"raw,node-name={name},{file}")
    guest = (*GUEST, "-m", "16", *nodes, "-bios", str(firmware))
    source = booted(guest)
    try:
        for number in range(3):
            source.run("block-dirty-bitmap-add", node="disk", name=f"map{number}", granularity=512)
        how = {"job-id": "job", "device": "other", "target": "disk", "sync": "full"}
        source.run("blockdev-mirror", **how)
        while not source.run("query-block-jobs")[0]["ready"]:
            time.sleep(0.01)
        source.run("block-job-cancel", device="job")
        while source.run("query-block-jobs"):
            time.sleep(0.01)
        nodes = source.run("query-named-block-nodes")
        (disk,) = (one for one in nodes if one.get("node-name") == "disk")
        assert [one["count"] for one in disk["dirty-bitmaps"]] == [1 << 20] * 3
        enable(source, "dirty-bitmaps")
        sent(source, tmp_path / "stream")
        assert (tmp_path / "stream").read_bytes().count(b"\x0cdirty-bitmap") == 1
        assert_goes_on(source, guest, tmp_path / "stream", "dirty-bitmaps")
    finally:
        source.__exit__(None)


SOCKETS = """
mkfifo back
socat UNIX-LISTEN:in - < back | {filter} | socat - UNIX-CONNECT:out > back
"""


@pytest.mark.parametrize("host", ["intel-westmere@6.1", "qemu-tcg-max@6.1"])
def test_sockets_with_a_return_path(firmware, tmp_path, host):
    """As Proxmox migrates: the answers pass as they are; refused, the source runs on."""
    if not shutil.which("socat"):
        pytest.skip("socat is not here")
    guest = (*GUEST, "-m", "16", "-bios", str(firmware))
    source = booted(guest)
    target = Machine(*guest, "-incoming", f"unix:{tmp_path}/out").__enter__()
    enable(source, "return-path")
    enable(target, "return-path")
    command = f"{sys.executable} -m xfast filter --host {host}"
    script = SOCKETS.format(filter=command)
    with subprocess.Popen(
        ["bash", "-c", script], cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as between:  # fmt: skip
        try:
            while not (tmp_path / "in").exists():
                time.sleep(0.02)
            source.run("migrate", uri=f"unix:{tmp_path}/in")
            if host == "intel-westmere@6.1":
                assert source.migrated() == "failed"
                counts(source, counts(source))
                target.__exit__("it waits for the rest")
                source.__exit__(None)
            else:
                assert source.migrated() == "completed"
                before = counts(source)
                source.__exit__(None)
                assert target.migrated() == "completed"
                assert counts(target) == before
                target.run("cont")
                counts(target, before + 1000)
                target.__exit__(None)
        finally:
            os.killpg(between.pid, signal.SIGTERM)
