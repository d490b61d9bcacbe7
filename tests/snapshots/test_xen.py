"""Xen's save images, made here from the public specification: no real one was to be had."""

import struct
import time

import numpy as np
import pytest
from snapshot_files import xen_context as context
from snapshot_files import xen_entry as entry
from snapshot_files import xen_image as image
from snapshot_files import xen_record as record

from xfast import snapshots
from xfast.errors import FormatError, PolicyError
from xfast.snapshots.bytes.source import Source
from xfast.xsave.area import headers
from xfast.xsave.layout import PRESETS

PV = 1


def area(mask: int, size: int) -> bytes:
    image = bytearray(size)
    struct.pack_into("<H22xI", image, 0, 0x37F, 0x1F80)
    struct.pack_into("<Q", image, 512, mask)
    return bytes(image)


def cpu(number: int, cr4: int = 0x40000, fpu: bytes = bytes(512)) -> bytes:
    body = bytearray(1000)
    body[:512] = fpu
    struct.pack_into("<Q", body, 680, cr4)
    return entry(2, number, bytes(body))


def xsave(number: int, mask: int, size: int, xcr0: int = 7, accumulated: int = 7) -> bytes:
    return entry(16, number, struct.pack("<3Q", 0, xcr0, accumulated) + area(mask, size))


def msrs(number: int, **values: int) -> bytes:
    rows = b"".join(struct.pack("<2IQ", int(k[1:], 16), 0, v) for k, v in values.items())
    return entry(20, number, struct.pack("<2I", len(values), 0) + rows)


def cpuid(layout, mask: int) -> bytes:
    rows = [(0, 0xFFFFFFFF, 0xD, 0, 0, 0), (0xD, 0, mask, 0, 0, 0), (0xD, 1, 0, 0, 0, 0)]
    rows += [(0xD, s.nr, s.size, s.offset, 0, 0) for s in layout.slots if mask >> s.nr & 1]
    return record(0x11, b"".join(struct.pack("<6I", *row) for row in rows))


def wrapped(data: bytes, way: str) -> bytes:
    libxl = b"LibxlFmt" + struct.pack(">2I", 2, 0) + record(1) + data + record(0)
    config = b"name='guest'\n" * 3
    return {
        "libxc": data,
        "libxl": libxl,
        "xl": b"Xen saved domain, xl format\n \0 \r"
        + struct.pack("<4I", 0x01020304, 3, 0, len(config))
        + config
        + libxl,
        "libvirt": b"libvirt-xml\n \0 \r" + struct.pack("<2I40x", 2, len(config)) + config + libxl,
    }[way]


def read(path, data: bytes, **options):
    path.write_bytes(data)
    (snapshot,) = snapshots.read(path, **options)
    return snapshot


@pytest.mark.parametrize("way", ["libxc", "libxl", "xl", "libvirt"])
def test_an_hvm_guest_in_every_wrapping(tmp_path, way):
    data = image(
        cpuid(PRESETS["amd-zen4"], 0xE7),
        context(
            cpu(0),
            cpu(1, cr4=0x440000),
            xsave(0, 7, 2432, 7, 0xE7),
            xsave(1, 0xE7, 2432, 0xE7, 0xE7),
            msrs(1, xDA0=0x800, x1C4=0x40000),
        ),
    )
    snapshot = read(tmp_path / "x", wrapped(data, way))
    assert (snapshot.format, snapshot.kind, snapshot.producer) == ("xen", "vm", "xen")
    assert snapshot.facts == {"domain": "HVM", "xen": "4.17"}
    first, second = snapshot.vcpus
    assert [headers(vcpu.area).xstate_bv for vcpu in snapshot.vcpus] == [7, 0xE7]
    assert [vcpu.xcr0 for vcpu in snapshot.vcpus] == [7, 0xE7]
    assert [vcpu.pkru_enabled for vcpu in snapshot.vcpus] == [False, True]
    assert (first.xss, first.xfd, second.xss, second.xfd) == (None, None, 0x800, 0x40000)
    assert first.layout_source == "cpuid"
    assert second.layout.restricted(0xE7) == PRESETS["amd-zen4"].restricted(0xE7)


def test_without_a_cpuid_policy_the_size_tells_the_layout(tmp_path):
    data = image(context(cpu(0), xsave(0, 0xE7, 2688, 0xE7, 0xE7)), version=2)
    (vcpu,) = read(tmp_path / "x", data).vcpus
    assert (vcpu.layout_source, vcpu.cpuid) == ("inferred", None)
    assert vcpu.layout.restricted(0xE7) == PRESETS["intel"].restricted(0xE7)


def test_a_cpu_without_xsave_has_its_fxsave_area(tmp_path):
    fpu = area(0, 576)[:512]
    (vcpu,) = read(tmp_path / "x", image(context(cpu(0, fpu=fpu)))).vcpus
    assert headers(vcpu.area).xstate_bv == 3
    assert (vcpu.layout_source, vcpu.xcr0) == ("format", None)


def test_a_pv_guest(tmp_path):
    body = struct.pack("<2I2Q", 1, 0, 7, 7) + area(7, 832)
    first = struct.pack("<2I2Q", 0, 0, 7, 7) + area(3, 832)
    data = image(record(4, bytes(64)), record(6, first), record(6, body), domain=PV)
    snapshot = read(tmp_path / "x", data)
    assert [vcpu.index for vcpu in snapshot.vcpus] == [0, 1]
    assert [headers(vcpu.area).xstate_bv for vcpu in snapshot.vcpus] == [3, 7]


def test_of_checkpoints_the_last_counts(tmp_path):
    one, two = (context(cpu(0), xsave(0, mask, 832)) for mask in (3, 7))
    (vcpu,) = read(tmp_path / "x", image(one, record(0xE), two)).vcpus
    assert headers(vcpu.area).xstate_bv == 7


def test_an_offline_vcpu_is_not_saved(tmp_path):
    data = image(context(cpu(0), cpu(2), xsave(0, 7, 832), xsave(2, 7, 832)))
    assert [vcpu.index for vcpu in read(tmp_path / "x", data).vcpus] == [0, 2]


def test_it_is_read_only(tmp_path):
    snapshot = read(tmp_path / "x", image(context(cpu(0), xsave(0, 7, 832))))
    with Source.open(tmp_path / "x") as source, pytest.raises(PolicyError, match="read only"):
        snapshots.splices(source, snapshot, {0: np.zeros(832, np.uint8)})


GOOD = image(context(cpu(0), xsave(0, 7, 832)))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (GOOD[:10], "not a snapshot format"),
        (GOOD[:20], "expected"),
        (GOOD[:-8], "expected 8"),
        (GOOD[:100], "expected record 0x1 to end"),
        (image(end=False), "expected 8"),
        (image(), "expected vCPUs in the Xen image, got none"),
        (image(domain=4), "expected an x86 domain, got type 4"),
        (image(version=1), "expected image version 2 or 3"),
        (image(record(4, bytes(64)), domain=PV), "vCPU 0 can't be judged: its XSAVE state is"),
        (image(record(4, b"\xff" * 64)), "expected a vCPU below 8192"),
        (image(record(9, b"")), "expected END of the HVM context"),
        (image(record(9, struct.pack("<2HI", 2, 0, 1 << 31))), "expected HVM entry 2 within"),
        (image(context(cpu(0), cpu(0))), "expected CPU 0 once"),
        (image(context(entry(2, 0, bytes(20)))), "expected CPU 0 once, whole"),
        (image(context(entry(16, 0, bytes(599)))), "expected CPU_XSAVE of 600"),
        (image(context(cpu(0), xsave(0, 1 << 40, 832))), "expected known components"),
        (image(record(0x11, bytes(25))), "leaves of 24 bytes"),
        (wrapped(GOOD, "libxl")[:16] + record(0), "expected the record LIBXC_CONTEXT"),
        (wrapped(b"x" * 64, "libxl"), r"expected a Xen domain image \(XENF\)"),
        (wrapped(GOOD, "libxl").replace(b"\0\0\0\2", b"\0\0\0\1", 1), "libxl image version 2"),
    ],
)
def test_one_clear_line(tmp_path, data, words):
    with pytest.raises(FormatError, match=words) as caught:
        read(tmp_path / "x", data)
    assert "\n" not in str(caught.value)


def test_every_cut_is_one_line(tmp_path):
    for end in range(24, len(GOOD), 61):
        with pytest.raises(FormatError):
            read(tmp_path / "x", GOOD[:end])


def test_a_megabyte_of_empty_records_takes_no_longer_than_reading_it(tmp_path):
    start = time.process_time()
    with pytest.raises(FormatError, match="got none"):
        read(tmp_path / "x", image(record(0x80000001) * (1 << 17)))
    assert time.process_time() - start < 2
