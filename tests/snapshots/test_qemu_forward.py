"""Streams with something behind them: volumes, sparse files, old data; and where they end."""

import subprocess
import sys

import numpy as np
import pytest
from loop_devices import loop_device
from qemu_files import PAGES, description_at, places_of, undescribed, with_memory

from xfast import snapshots
from xfast.errors import FormatError
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.qemu import forward
from xfast.snapshots.qemu.stream import find_cpus

GIB = 1 << 30


def volume(path, *parts, size=0):
    """Write a file: the parts, one behind the other, and then a hole."""
    with open(path, "wb") as file:
        file.writelines(parts)
        file.truncate(max(size, file.tell()))
    return path


def assert_same(path, plain):
    """Compare what is read of a file with what a plain file of the same stream holds."""
    (found,), (expected,) = snapshots.read(path), snapshots.read(plain)
    assert len(found.vcpus) == len(expected.vcpus)
    for one, two in zip(found.vcpus, expected.vcpus, strict=True):
        assert np.array_equal(one.area, two.area)
        assert one.where == two.where
        assert (one.index, one.xcr0) == (two.index, two.xcr0)


@pytest.mark.parametrize("padding", [4096, 1 << 20, 64 << 20, 4 * GIB])
@pytest.mark.parametrize("bare", [False, True])
def test_zeros_behind_a_stream(tmp_path, stream, padding, bare):
    stream = undescribed(stream) if bare else stream
    plain = volume(tmp_path / "plain", stream)
    padded = volume(tmp_path / "padded", stream, size=len(stream) + padding)
    assert_same(padded, plain)


def test_old_data_behind_a_stream_are_not_judged_in_its_place(tmp_path, stream, leak):
    """An older, longer stream lay in the volume: its end is whole, and of another VM."""
    plain = volume(tmp_path / "plain", stream)
    for size in (0, GIB):
        old = volume(tmp_path / "old", stream, leak[len(stream) :], leak, size=size)
        if size:
            assert_same(old, plain)
    noise = np.random.default_rng(1).integers(0, 256, 1 << 20, np.uint8).tobytes()
    assert_same(volume(tmp_path / "noise", stream, noise), plain)
    assert_same(volume(tmp_path / "noise", stream, bytes(1 << 20), noise, size=GIB), plain)


def test_where_a_stream_ends(tmp_path, stream):
    for data in (stream, undescribed(stream)):
        with Source.open(volume(tmp_path / "padded", data, size=GIB)) as source:
            place = forward.extent(source, 0)
            assert place.end == len(data)
            assert place.devices == places_of(data)[0]
            view = forward.without_memory(source, place)
            assert view.size == place.head + place.end - place.devices
            for cpu, plain in zip(
                find_cpus(view).cpus, find_cpus(source.view(0, len(data))).cpus, strict=True
            ):
                assert view.runs(cpu.offset, 1) == [(plain.offset, 1)]


def test_memory_is_passed_over(tmp_path, stream):
    data = with_memory(stream, PAGES["page"] * 3000 + PAGES["zero"] + PAGES["xbzrle"] * 1000)
    assert_same(volume(tmp_path / "padded", data, size=GIB), volume(tmp_path / "plain", data))


def test_what_stops_the_walk_is_named(tmp_path, stream):
    at = places_of(stream)[0]
    for record, words in (
        (b"\1\0\0\1\0\4VFIO\0\0\0\0\0\0\0\1", "expected ram.*got the section 'VFIO', version 1"),
        (b"\x08\0\x08\0\4\0\0\0\0", "expected a stream.*got the command that begins postcopy"),
    ):
        path = volume(tmp_path / "padded", stream[:at] + record + stream[at:], size=GIB)
        with pytest.raises(FormatError, match=f"offset {at}: can't be judged: {words}"):
            snapshots.read(path)


def test_streams_that_are_cut_off(tmp_path, stream):
    at = places_of(stream)[0]
    for cut in (at - 3, at + 40, len(undescribed(stream)) - 3):
        for size in (cut, GIB):
            path = volume(tmp_path / "cut", stream[:cut], size=size)
            with pytest.raises(FormatError, match=r"offset \d+: .*(expected .*, got|found) "):
                snapshots.read(path)
    for cut in (
        description_at(stream) + 50,
        len(stream) - 1,
    ):  # QEMU itself does without the description
        path = volume(tmp_path / "cut", stream[:cut], size=GIB)
        assert len(snapshots.read(path)[0].vcpus) == 2


def test_without_description_old_data_make_it_unknown(tmp_path, stream, leak):
    path = volume(tmp_path / "old", undescribed(stream), leak, size=GIB)
    with pytest.raises(FormatError, match=r"can't be judged: .*, got a section of unknown length"):
        snapshots.read(path)


@pytest.mark.parametrize("name", ["q11-mappedram-tiny-S-smp2.qemustate.zst"])
def test_mapped_memory_in_a_volume(shared, tmp_path, name):
    with Source.open(shared / "samples/qemu" / name) as source:
        plain = volume(tmp_path / "plain", *source.chunks())
    padded = volume(tmp_path / "padded", plain.read_bytes(), b"\xff" * 5000, size=GIB)
    assert_same(padded, plain)


def test_a_walk_takes_little_memory_whatever_the_guest_has(tmp_path, stream):
    """A subprocess reads a stream with 256 MiB of pages; its peak stays below 64 MiB."""
    at, _ = places_of(stream)
    data = with_memory(stream, PAGES["page"] * 4096)
    more = data[at : at + len(data) - len(stream)]
    path = volume(tmp_path / "large", stream[:at], *[more] * 16, stream[at:], size=4 * GIB)
    code = (
        "import sys, re; from xfast import snapshots\n"
        "print(len(snapshots.read(sys.argv[1])[0].vcpus),"
        " re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    )
    vcpus, peak = (int(word) for word in done.stdout.split())
    assert vcpus == 2
    assert peak < 64 << 10


LIES = {
    "many descriptions": b'\0\6\0\x7f\xff\xff{"devices": [' + b'{"name": "a"},' * 100,
    "descriptions in descriptions": b'\0\6\0\0\0\x20{"' * 100_000,
    "endless names": b"\4\0\0\0\1\xff" + b"a" * 255 + bytes(8),
}


@pytest.mark.parametrize("lie", LIES)
def test_devices_that_invite_endless_work(tmp_path, stream, lie):
    at = places_of(stream)[0]
    path = volume(tmp_path / "lie", stream[:at] + b"\4" + LIES[lie] * 50, size=GIB)
    with pytest.raises(FormatError, match=r"expected .*, got |found "):
        snapshots.read(path)


def test_block_devices(tmp_path, stream, leak):
    plain = volume(tmp_path / "plain", stream)
    image = volume(tmp_path / "image", stream, leak[len(stream) :], size=128 << 20)
    with loop_device(image) as device:
        assert_same(device, plain)


def test_the_last_bytes_of_a_device_may_be_an_older_stream(tmp_path, stream, leak):
    """From behind, this device looks like a whole file of another VM."""
    plain = volume(tmp_path / "plain", stream)
    size = (len(stream) + len(leak) + 511) // 512 * 512
    image = tmp_path / "image"
    image.write_bytes(stream + bytes(size - len(stream) - len(leak)) + leak)
    with loop_device(image) as device:
        assert_same(device, plain)


def test_a_device_is_repaired_into_a_file(tmp_path, leak):
    """The file is as long as the device, and its padding is a hole."""
    image = volume(tmp_path / "image", leak, size=64 << 20)
    out = tmp_path / "out"
    with loop_device(image) as device:
        fix = [sys.executable, "-m", "xfast", "fix", device, "--host", "amd-rome"]
        subprocess.run([*fix, "-o", out], check=True, capture_output=True)
    fixed = out.read_bytes()
    assert len(fixed) == 64 << 20
    assert sum(a != b for a, b in zip(fixed[: len(leak)], leak, strict=True)) == 1
    assert not any(fixed[len(leak) :])
    assert out.stat().st_blocks * 512 < 4 << 20


def test_a_stream_through_a_pipe_is_judged_whatever_its_size(stream, tmp_path):
    """Through standard input, with a limit for what is expanded that is far below its size."""
    first = places_of(stream)[0]
    data = with_memory(stream, PAGES["page"] * 4096)
    more = data[first : first + len(data) - len(stream)]
    check = [sys.executable, "-m", "xfast", "check", "-", "--host", "qemu-tcg-max@6.1", "--json"]
    process = subprocess.Popen([*check, "--expand-limit", "1M"], stdin=-1, stdout=-1)
    process.stdin.write(stream[:first])
    for _ in range(8):
        process.stdin.write(more)
    out, _ = process.communicate(stream[first:])
    assert process.returncode == 0
    assert b'"identical"' in out
    for cut in (first - 5, first + 50):
        done = subprocess.run(check, input=stream[:cut], capture_output=True, check=False)
        assert done.returncode == 3
        assert b": offset " in done.stderr or b"expected at least one vCPU" in done.stderr
    bare = subprocess.run(check, input=undescribed(stream), capture_output=True, check=False)
    assert bare.returncode == 0
