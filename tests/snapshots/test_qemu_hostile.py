"""QEMU streams that are damaged or lie: one FormatError, in bounded time and memory."""

import json
import lzma
import random
import re
import struct

import pytest
from effort import at_most
from hypothesis import given, settings
from hypothesis import strategies as st
from qemu_files import description_at, qcow2_image, undescribed
from snapshot_files import qemu_stream

from xfast import snapshots
from xfast.errors import FormatError
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.qemu import reader as qemu
from xfast.snapshots.qemu import stream as walked

SECONDS = 20


@pytest.fixture(scope="session")
def stream(data):
    return lzma.decompress((data / "qemu/q72-max-smp2-q35.qemustate.xz").read_bytes())


@pytest.fixture(scope="session")
def attempt(tmp_path_factory):
    """Return a function that reads bytes: the vCPU count, or the error's one line."""
    path = tmp_path_factory.mktemp("hostile") / "stream"

    def read(data):
        path.write_bytes(data)
        with at_most(SECONDS):
            try:
                with Source.open(path) as source:
                    qemu.sniff(source)
                    result = sum(len(snapshot.vcpus) for snapshot in qemu.read(source))
            except FormatError as problem:
                result = str(problem)
                assert "\n" not in result
        return result

    return read


def refused(result):
    """Whether `attempt` came to an error that says what was expected, or what is wrong."""
    return re.search(r": (can't be judged: )?(expected .*, got |found )", str(result)) is not None


def described(stream, change):
    """Return a stream whose description was changed by a function or replaced by bytes."""
    start = description_at(stream)
    if callable(change):
        description = json.loads(stream[start:])
        change(description)
        change = json.dumps(description).encode()
    return stream[: start - 4] + struct.pack(">I", len(change)) + change


@pytest.mark.parametrize("data", [b"", b"Q", b"QEVM", b"QEVM\0\0\0\3", b"\0" * 300_000])
def test_too_little(attempt, data):
    assert refused(attempt(data))


@pytest.mark.parametrize("size", [100, 5000, 300_000])
def test_random_bytes(attempt, size):
    noise = random.Random(size).randbytes(size)
    assert "expected a QEMU stream (QEVM and version 3), got none" in attempt(noise)
    for record in range(256):
        result = attempt(b"QEVM\0\0\0\3" + bytes([record]) + noise)
        needed = (
            "expected a machine name of at most 1024" if record == 7 else "expected at least one"
        )
        assert needed in result, record


def test_truncated_anywhere(attempt, stream):
    assert attempt(stream) == 2
    bare = undescribed(stream)
    for size in [*range(0, len(stream), 1777), len(stream) - 1, len(bare) - 2]:
        result = attempt(stream[:size])
        assert result == 2 or refused(result)
    first, _ = places(stream)
    assert "expected at least one vCPU in the QEMU stream, got 0 (cut off?" in attempt(
        stream[:first]
    )


def places(stream):
    """Return where the first vCPU's section begins, and where the EOF record lies."""
    return stream.index(b"\x03cpu\0\0\0\0\0\0\0\x0c") - 5, description_at(stream) - 6


def test_a_stream_cut_off_before_its_end_is_no_snapshot(attempt, stream):
    """vCPUs may lie behind the cut, and a device that is lost does not restore either."""
    first, eof = places(stream)
    assert stream[eof] == 0
    for size in [*range(first, eof, 97), eof - 1, eof]:
        assert refused(attempt(stream[:size]))


def test_a_stream_cut_off_between_sections_is_no_snapshot(attempt, stream):
    """Where a section is whole, what follows it tells: EOF, or another section."""
    first, eof = places(stream)
    ends = [m.end() for m in re.finditer(rb"\x7e.{4}(?=\x04.{4}[\1-\x40]\w)", stream, re.S)]
    ends = [end for end in ends if first < end < eof]
    assert len(ends) > 20
    for size in ends:
        assert "no EOF record" in attempt(stream[:size]) or "expected at least one vCPU" in attempt(
            stream[:size]
        )


def test_a_cut_within_the_description_costs_no_vcpu(tmp_path, attempt, stream):
    _, eof = places(stream)
    for size, word in [(eof + 1, "none"), (eof + 2, "damaged"), (len(stream) - 1, "damaged")]:
        path = tmp_path / "stream"
        path.write_bytes(stream[:size])
        with Source.open(path) as source:
            (snapshot,) = qemu.read(source)
        assert (len(snapshot.vcpus), snapshot.facts["description"]) == (2, word)


def test_a_description_that_is_no_object_is_damaged(tmp_path, stream):
    path = tmp_path / "stream"
    path.write_bytes(described(stream, b"[1,2]"))
    with Source.open(path) as source:
        (snapshot,) = qemu.read(source)
    assert (len(snapshot.vcpus), snapshot.facts["description"]) == (2, "damaged")


def test_zeros_behind_a_stream_are_padding(attempt, stream):
    assert attempt(undescribed(stream) + bytes(5000)) == 2
    assert "no EOF record" in attempt(undescribed(stream) + bytes(5000) + b"\1")


def test_without_footers_all_vcpus_up_to_the_last_are_needed(attempt, stream):
    """Streams of a machine type up to 2.3, cut off or with vCPU 2 behind vCPU 0."""
    data = undescribed(stream)
    for match in [*re.finditer(rb"\x7e.{4}(?=\x04.{4}[\1-\x40]\w|\0\Z)", data, re.S)][::-1]:
        data = data[: match.start()] + data[match.end() :]
    assert attempt(data) == 2
    for match in re.finditer(rb"\x04.{4}(?:\x03cpu|\x04apic|\x0acpu_common)", data, re.S):
        assert refused(attempt(data[: match.start()] + b"\0"))
        assert refused(attempt(data[: match.end() + 30] + b"\0"))
    assert "no EOF record" in attempt(data + b"\1")
    at = data.rindex(b"\x03cpu\0\0\0\1")
    assert "no EOF record" in attempt(data[: at + 7] + b"\2" + data[at + 8 :])


@given(
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=9)), max_size=8),
    bare=st.booleans(),
    cut=st.integers(0, 300),
)
@settings(max_examples=150)
def test_mutated_streams(attempt, stream, edits, bare, cut):
    data = bytearray(undescribed(stream) if bare else stream)
    for place, new in edits:
        offset = int(place * len(data))
        data[offset : offset + len(new)] = new
    attempt(data[: len(data) - cut])


@given(edits=st.lists(st.tuples(st.integers(0, 70_000), st.binary(min_size=1, max_size=9))))
@settings(max_examples=60)
def test_mutated_disk_images(attempt, stream, edits):
    data = bytearray(qcow2_image([("one", stream), ("two", stream)], 9))
    for offset, new in edits:
        offset = offset if offset < 5000 else offset + (1 << 20)
        data[offset : offset + len(new)] = new
    attempt(data)


def cpu(description):
    return next(device for device in description["devices"] if device["name"] == "cpu")


LIES = {
    "negative size": lambda d: cpu(d)["fields"][0].update(size=-8),
    "huge size": lambda d: cpu(d)["fields"][0].update(size=1 << 40),
    "large size": lambda d: cpu(d)["fields"][0].update(size=0xFFFFFFFF),
    "size in words": lambda d: cpu(d)["fields"][0].update(size="eight"),
    "no size": lambda d: cpu(d)["fields"][0].pop("size"),
    "huge array": lambda d: cpu(d)["fields"][0].update(array_len=1 << 62),
    "fields are a number": lambda d: cpu(d).update(fields=5),
    "fields are an object": lambda d: cpu(d).update(fields={}),
    "subsections are an object": lambda d: cpu(d).update(subsections={}),
    "fields are null": lambda d: cpu(d).update(fields=None),
    "no fields": lambda d: cpu(d).pop("fields"),
    "field is a list": lambda d: cpu(d)["fields"].append([]),
    "subsection without name": lambda d: cpu(d)["subsections"][0].pop("vmsd_name"),
    "subsection named 5": lambda d: cpu(d)["subsections"][0].update(vmsd_name=5),
    "subsection renamed": lambda d: cpu(d)["subsections"][0].update(vmsd_name="cpu/" + "X" * 16),
    "subsection of surrogates": lambda d: cpu(d)["subsections"][0].update(vmsd_name="\ud800" * 20),
    "subsection twice": lambda d: cpu(d)["subsections"].append(cpu(d)["subsections"][0]),
    "device without name": lambda d: d["devices"][-1].pop("name"),
    "device with a long name": lambda d: d["devices"][-1].update(name="x" * 100_000),
    "device is a number": lambda d: d["devices"].append(7),
    "no devices": lambda d: d.pop("devices"),
    "no device": lambda d: d["devices"].clear(),
    "devices are null": lambda d: d.update(devices=None),
    "devices are words": lambda d: d.update(devices="cpu"),
    "devices by name": lambda d: d.update(devices={"cpu": 1}),
    "a third vCPU": lambda d: d["devices"].append(cpu(d)),
    "many vCPUs": lambda d: d["devices"].extend([{"name": "cpu"}] * 900_000),
    "many fields": lambda d: cpu(d)["fields"].extend([{"size": 0}] * 500_000),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_descriptions_that_lie(attempt, stream, lie):
    result = attempt(described(stream, LIES[lie]))
    assert result == 2 or refused(result)
    if lie.endswith("an object"):
        assert f"offset {places(stream)[1] + 6}: found a description that makes" in result
    if lie in ("a third vCPU", "many vCPUs"):
        assert "vCPUs in the QEMU stream, got 2" in result


def test_more_vcpus_than_kvm_has_are_refused(tmp_path, monkeypatch):
    """A disk image of 567 KB, packed, held 8,257 of them in one stream: 1.2 s."""
    assert walked.VCPU_LIMIT == 4096
    (tmp_path / "vm").write_bytes(qemu_stream())
    monkeypatch.setattr(walked, "VCPU_LIMIT", 1)
    with pytest.raises(FormatError, match="expected at most 1 vCPUs, got more"):
        snapshots.read(tmp_path / "vm")


@pytest.mark.parametrize(
    "text",
    [
        b'{"devices":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"devices":' + b'[{"subsections":' * 50_000 + b"0" + b"}]" * 50_000 + b"}",
        b'{"devices":[' + b"9" * 100_000 + b"]}",
        b'{"devices":[' + b"[]," * (4 << 20) + b"[]]}",
        b'{"devices":' + b" " * (20 << 20) + b"[]}",
        b'{"\xff\xfe"}',
    ],
)
def test_descriptions_that_are_bombs(attempt, stream, text):
    result = attempt(described(stream, text))
    assert result == 2 or refused(result)


def test_nested_subsections_end_somewhere(attempt, stream):
    def nest(description):
        for _ in range(100):
            cpu(description)["subsections"] = [
                {"vmsd_name": "cpu/xss", "subsections": cpu(description)["subsections"]}
            ]

    assert "a subsection 17 deep" in attempt(described(stream, nest))


@pytest.mark.parametrize(
    "pattern",
    [
        b'\0\x06\0\0\0\x01{"',
        b"\x04abcd\x03cpu\0\0\0\1\0\0\0\x0c",
        b"\x04abcd\x03cpu\0\0\0\1\0\0\0\x0c" + bytes(1817) + b"\x05\x08cpu/pkru",
        b"\x05\x08cpu/pkru" + bytes(8),
        b"\x05\x1aconfiguration/capabilities\0\0\0\1\0\0\0\0",
    ],
)
def test_patterns_that_invite_endless_work(attempt, pattern):
    body = pattern * ((4 << 20) // len(pattern))
    for end in (b"}", b"\0"):
        assert refused(attempt(b"QEVM\0\0\0\3\x07\0\0\0\0" + body + end))


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (20, struct.pack(">I", 40)),
        (20, struct.pack(">I", 0)),
        (60, struct.pack(">I", 0xFFFFFFFF)),
        (60, struct.pack(">I", 1025)),
        (64, struct.pack(">Q", 1 << 63)),
        (4096, struct.pack(">Q", 1 << 63)),
        (4096 + 8, struct.pack(">I", 0)),
        (4096 + 36, b"\xff\xff\xff\xff"),
        (4096 + 40, struct.pack(">Q", 1 << 62)),
    ],
)
def test_disk_images_that_lie(attempt, stream, offset, value):
    data = bytearray(qcow2_image([("one", stream)]))
    assert attempt(data) == 2
    data[offset : offset + len(value)] = value
    assert refused(attempt(data))


def test_a_disk_image_cut_off_behind_its_vm_state(attempt, stream):
    """The state is whole; the disk that goes with it is not, and QEMU opens no such image."""
    data = bytearray(qcow2_image([("one", stream)]))
    l2 = len(data)
    data[36:48] = struct.pack(">IQ", 1, 2048)
    data[2048:2056] = struct.pack(">Q", l2 | 1 << 63)
    assert attempt(data + bytes(512)) == 2
    assert f"offset {l2 + 511}: expected an L2 table" in attempt(data + bytes(511))
    data[36:40] = b"\xff" * 4
    assert "L1 entries" in attempt(data + bytes(512))


def test_a_disk_image_without_snapshots(attempt):
    assert "expected a snapshot with a VM state, got none" in attempt(qcow2_image([]))


@pytest.mark.parametrize(
    "xml",
    [
        b"",
        b"<domain",
        b"<other/>",
        b"\xff\xfe<domain/>",
        b"<!DOCTYPE d [<!ENTITY a 'aaaaaaaaaa'>"
        + b"".join(b"<!ENTITY a%d '%s'>" % (i, b"&a%d;" % (i - 1) * 10) for i in range(1, 12))
        + b"]><domain>&a11;</domain>",
    ],
)
def test_xml_that_is_no_domains(attempt, stream, xml):
    head = b"LibvirtQemudSave" + struct.pack("<5I56x", 2, len(xml) + 1, 1, 0, 0)
    assert "found XML that is no domain's" in attempt(head + xml + b"\0" + stream)


def test_xml_nested_deep(attempt, stream):
    deep = b"<domain>" + b"<a>" * 300_000 + b"</a>" * 300_000 + b"</domain>"
    head = b"LibvirtQemudSave" + struct.pack("<5I56x", 2, len(deep) + 1, 1, 0, 0)
    assert attempt(head + deep + b"\0" + stream) == 2
