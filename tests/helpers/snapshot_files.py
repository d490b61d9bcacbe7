"""Small snapshots of every format, made from scratch: what the contract of a format is tried on.

A builder returns the files of one snapshot by name: one file, or those of a directory. Each has
two vCPUs or threads with x87, SSE and AVX, and what the format says of their number. A new format
adds its builder to `BUILDERS`.
"""

import json
import struct

from xfast.snapshots.firecracker import crc64

XCR0 = 7
AREA_SIZE = 832
READ_ONLY = frozenset({"crosvm", "minidump", "xen"})
"""Formats that are not edited: nobody restores them, or no edit could be checked."""


def leaked_area() -> bytes:
    """Return an area with a leaked PKRU bit, in Intel's layout."""
    image = bytearray(4096)
    image[0:2] = 0x7F, 0x03
    image[24:26] = 0x80, 0x1F
    image[28:30] = 0xFF, 0xFF
    image[512:514] = 7, 2
    image[576:832] = bytes([0x5A]) * 256
    return bytes(image)


def area(fill: int = 1, size: int = AREA_SIZE, xstate_bv: int = XCR0) -> bytes:
    """Return an XSAVE area in standard format whose registers tell `fill`."""
    image = bytearray(size)
    struct.pack_into("<H22xII", image, 0, 0x37F, 0x1FA0, 0xFFFF)
    for i in range(8):
        struct.pack_into("<QH", image, 32 + 16 * i, 1 << 63 | fill, 0x3FFF)
    for i in range(16):
        struct.pack_into("<2Q", image, 160 + 16 * i, fill << 8 | i, fill)
        struct.pack_into("<2Q", image, 576 + 16 * i, fill << 16 | i, fill)
    image[4] = 0xFF
    struct.pack_into("<2Q", image, 464, XCR0, 0)
    struct.pack_into("<Q", image, 512, xstate_bv)
    return bytes(image)


# QEMU


def qemu_cpu(fill: int, *, xstate_bv: int = XCR0) -> bytes:
    """Return the fixed part of a `cpu` section of x86_64, version 12."""
    data = bytearray(1817)
    image = area(fill)
    fcw, fsw, ftw = struct.unpack_from("<HHB", image)
    struct.pack_into(">4H", data, 148, fcw, fsw, ftw, 0)
    for i in range(8):
        struct.pack_into(">QH", data, 156 + 10 * i, *struct.unpack_from("<QH", image, 32 + 16 * i))
    struct.pack_into(">Q", data, 480, 1 << 18)
    struct.pack_into(">I", data, 556, 0x1FA0)
    struct.pack_into(">32Q", data, 560, *struct.unpack_from("<32Q", image, 160))
    struct.pack_into(">2Q", data, 1545, XCR0, xstate_bv)
    struct.pack_into(">32Q", data, 1561, *struct.unpack_from("<32Q", image, 576))
    return bytes(data)


def qemu_device(name, data, instance=0, version=1, subsections=()):
    """Return a device: what the description says of it, and its section's content."""
    entry = {
        "name": name,
        "instance_id": instance,
        "vmsd_name": name,
        "version": version,
        "fields": [{"name": "data", "type": "buffer", "size": len(data)}],
    }
    for sub, content in subsections:
        entry.setdefault("subsections", []).append(
            {"vmsd_name": sub, "version": 1, "fields": [{"name": "d", "size": len(content)}]}
        )
        data += struct.pack(f">BB{len(sub)}sI", 5, len(sub), sub.encode(), 1) + content
    return entry, struct.pack(">II", instance, version) + data


def qemu_devices(vcpus: int = 2, *, apics=True, **fields) -> list:
    """Return the devices of a small machine under KVM."""
    found = [qemu_device("timer", bytes(24), 0, 2)]
    for i in range(vcpus):
        tsc = [("cpu/xss", bytes(8)), ("cpu/tsc_khz", struct.pack(">Q", 3_000_000))]
        found.append(qemu_device("cpu_common", bytes(5), i))
        found.append(qemu_device("cpu", qemu_cpu(i + 1, **fields), i, 12, tsc))
        if apics:
            found.append(qemu_device("apic", bytes(176), i, 3))
    found.append(qemu_device("kvmclock", bytes(8), 0))
    found.append(qemu_device("fw_cfg", bytes(40), 0))
    return found


def qemu_stream(
    devices=None, *, ram: bytes = bytes(512), footers=True, described=True, listed=None
) -> bytes:
    """Return a migration stream of these devices; `listed` is what the description says of them."""
    devices = qemu_devices() if devices is None else devices
    machine = b"pc-q35-7.2"
    out = bytearray(b"QEVM\0\0\0\3\x07" + struct.pack(">I", len(machine)) + machine)
    out += b"\x01" + struct.pack(">IB3sII", 2, 3, b"ram", 0, 4) + ram
    out += (b"\x7e" + struct.pack(">I", 2)) * footers
    for number, (entry, data) in enumerate(devices, 3):
        name = entry["name"].encode()
        out += struct.pack(f">BIB{len(name)}s", 4, number, len(name), name) + data
        out += (b"\x7e" + struct.pack(">I", number)) * footers
    out += b"\0"
    if described:
        listed = [entry for entry, _ in devices] if listed is None else listed
        text = json.dumps({"page_size": 4096, "devices": listed}).encode()
        out += b"\x06" + struct.pack(">I", len(text)) + text
    return bytes(out)


# ELF


def elf_note(name: str, kind: int, data: bytes) -> bytes:
    """Return one note."""
    text = name.encode() + b"\0"
    head = struct.pack("<3I", len(text), len(data), kind)
    return head + text + bytes(-len(text) % 4) + data + bytes(-len(data) % 4)


def elf_notes(tid: int, image: bytes) -> list[bytes]:
    """Return a thread's notes: NT_PRSTATUS, NT_FPREGSET and NT_X86_XSTATE."""
    status = bytes(32) + struct.pack("<I", tid) + bytes(300)
    return [
        elf_note("CORE", 1, status),
        elf_note("CORE", 2, bytes(512)),
        elf_note("LINUX", 0x202, image),
    ]


def elf_core(*notes: bytes) -> bytes:
    """Return a 64-bit x86 core of these notes."""
    body = b"".join(notes)
    head = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9) + struct.pack("<2HIQ", 4, 62, 1, 0)
    head += struct.pack("<QQI6H", 64, 0, 0, 64, 56, 1, 64, 0, 0)
    return head + struct.pack("<2I6Q", 4, 4, 120, 0, 0, len(body), 0, 4) + body


# Firecracker


def xcrs(value: int = XCR0) -> bytes:
    """Return struct kvm_xcrs."""
    return struct.pack("<2I2IQ", 1, 0, 0, 0, value).ljust(392, b"\0")


def firecracker_vcpu(fill: int) -> bytes:
    """Return a vCPU of Firecracker 1.13, without what xfast passes over."""
    row = struct.pack("<7I12x", 0xD, 0, 1, XCR0, AREA_SIZE, AREA_SIZE, 0)
    cpuid = struct.pack("<QIIQQ", 8, 1, 0, 1, len(row)) + row
    sregs = struct.pack("<Q", 312) + bytes(312)
    image = area(fill, 4096)
    blobs = cpuid + struct.pack("<Q", 64) + bytes(64) + sregs + struct.pack("<Q", 392) + xcrs()
    return blobs + struct.pack("<2Q", 4104, 0) + image + struct.pack("<QB", 0, 0)


def firecracker_state(vcpus: int = 2) -> bytes:
    """Return a vmstate file of version 8.0.0."""
    head = struct.pack("<2Q", 0x0710_1984_8664_0000, 5) + b"8.0.0" + bytes(40)
    body = head + struct.pack("<Q", vcpus)
    body += b"".join(firecracker_vcpu(i + 1) for i in range(vcpus)) + bytes(24)
    return body + struct.pack("<Q", crc64(body))


def sealed(name: str, data: bytes) -> bytes:
    """Return a file of a format with the checksum that it needs, if any."""
    return data[:-8] + struct.pack("<Q", crc64(data[:-8])) if name == "firecracker" else data


# Cloud Hypervisor


def cloud_hypervisor_vcpu(fill: int) -> str:
    """Return the text of a vCPU's state."""
    region = list(struct.unpack("<1024I", area(fill, 4096)))
    return json.dumps({"Kvm": {"xcrs": list(xcrs()), "xsave": {"region": region}}})


def cloud_hypervisor_state(vcpus: int = 2) -> bytes:
    """Return a state.json of v39 or later."""
    states = {
        str(i): {"snapshots": {}, "snapshot_data": {"state": cloud_hypervisor_vcpu(i + 1)}}
        for i in range(vcpus)
    }
    return json.dumps({"snapshots": {"cpu-manager": {"snapshots": states}}}).encode()


# CRIU


def varint(value: int) -> bytes:
    """Return a number as Protocol Buffers write it."""
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def proto(*fields) -> bytes:
    """Return a message of (number, value) pairs; values are numbers or messages."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def criu_image(magic: int, *entries: bytes) -> bytes:
    """Return an image file of these entries."""
    body = b"".join(struct.pack("<I", len(entry)) + entry for entry in entries)
    return struct.pack("<2I", 0x54564319, magic) + body


def criu_core(fill: int) -> bytes:
    """Return a core image with the registers of `area`."""
    image = area(fill)
    values = struct.unpack_from("<HHBxHQQII", image)
    xsave = proto((1, XCR0), *((2, v) for v in struct.unpack_from("<64I", image, 576)))
    fpregs = proto(
        *enumerate(values, 1),
        *((9, v) for v in struct.unpack_from("<32I", image, 32)),
        *((10, v) for v in struct.unpack_from("<64I", image, 160)),
        (13, xsave),
    )
    return criu_image(0x55053847, proto((1, 1), (2, proto((1, 0), (2, b""), (3, fpregs)))))


def criu_pstree(*tids: int) -> bytes:
    """Return pstree.img of one process with these threads."""
    return criu_image(
        0x50273030, proto((1, tids[0]), (2, 0), (3, 1), (4, 1), *((5, tid) for tid in tids))
    )


def criu_files(*tids: int) -> dict[str, bytes]:
    """Return the images of one process."""
    cores = {f"core-{tid}.img": criu_core(i + 1) for i, tid in enumerate(tids)}
    return {**cores, "pstree.img": criu_pstree(*tids)}


# Minidump


def minidump(*areas: bytes) -> bytes:
    """Return a Windows minidump of x86-64 with a thread an area."""
    system = struct.pack("<H18xI32x", 9, 2)
    at = 32 + 2 * 12
    threads_at = at + len(system)
    context_at = threads_at + 4 + 48 * len(areas)
    threads, contexts = bytearray(struct.pack("<I", len(areas))), bytearray()
    for i, image in enumerate(areas):
        context = bytes(48) + struct.pack("<I", 0x10000F) + bytes(204) + image[:512]
        context = context.ljust(1232, b"\0")
        threads += struct.pack("<I36x2I", 100 + i, len(context), context_at + len(contexts))
        contexts += context
    directory = struct.pack("<3I", 7, len(system), at)
    directory += struct.pack("<3I", 3, len(threads), threads_at)
    header = struct.pack("<4s3I2IQ", b"MDMP", 0x1234A793, 2, 32, 0, 0, 0)
    return header + directory + system + threads + contexts


# Xen


def xen_record(kind: int, body: bytes = b"") -> bytes:
    return struct.pack("<2I", kind, len(body)) + body + bytes(-len(body) % 8)


def xen_entry(kind: int, number: int, body: bytes) -> bytes:
    return struct.pack("<2HI", kind, number, len(body)) + body


def xen_context(*entries: bytes) -> bytes:
    """Return the record HVM_CONTEXT with these entries."""
    header = struct.pack("<2IQ2I", 0x54381286, 1, 0, 0x306C3, 2_000_000)
    return xen_record(9, xen_entry(1, 0, header) + b"".join(entries) + xen_entry(0, 0, b""))


def xen_image(*records: bytes, domain: int = 2, version: int = 3, end: bool = True) -> bytes:
    """Return a domain image of Xen 4.17 with a page of memory before these records."""
    head = b"\xff" * 8 + b"XENF" + struct.pack(">IH6x", version, 0)
    head += struct.pack("<I2H2I", domain, 12, 0, 4, 17)
    pages = xen_record(1, struct.pack("<2IQ", 1, 0, 5) + b"\xa5" * 4096)
    return head + pages + b"".join(records) + xen_record(0) * end


def xen_guest(*areas: bytes) -> bytes:
    """Return the image of an HVM guest with a vCPU an area."""
    entries = [xen_entry(2, i, image[:512] + bytes(488)) for i, image in enumerate(areas)]
    for i, image in enumerate(areas):
        entries.append(xen_entry(16, i, struct.pack("<3Q", 0, XCR0, XCR0) + image))
    return xen_image(xen_context(*entries))


# crosvm


def cbor(value) -> bytes:
    """Return a value in CBOR, as serde writes it."""

    def head(major: int, number: int) -> bytes:
        if number < 24:
            return bytes([major << 5 | number])
        size = next(size for size in (1, 2, 4, 8) if number < 1 << 8 * size)
        return bytes([major << 5 | 23 + size.bit_length()]) + number.to_bytes(size, "big")

    if value is None:
        return b"\xf6"
    if isinstance(value, int):
        return head(0, value)
    if isinstance(value, str):
        return head(3, len(value)) + value.encode()
    if isinstance(value, list):
        return head(4, len(value)) + b"".join(map(cbor, value))
    items = (cbor(key) + cbor(item) for key, item in value.items())
    return head(5, len(value)) + b"".join(items)


def crosvm_vcpu(number: int, image: bytes, **more) -> dict:
    """Return what crosvm saves of a vCPU."""
    words = list(struct.unpack(f"<{len(image) // 4}I", image))
    return {
        "vcpu_id": number,
        "regs": {"rax": 1},
        "sregs": {"cr4": 0x40000},
        "xcrs": {0: XCR0},
        "msrs": {0x174: 0},
        "xsave": {"data": words, "len": len(image)},
        "hypervisor_data": None,
        **more,
    }


BUILDERS = {
    "qemu": lambda: {"vm.qemustate": qemu_stream()},
    "elfcore": lambda: {"core": elf_core(*elf_notes(100, area(1)), *elf_notes(101, area(2)))},
    "firecracker": lambda: {"vm.vmstate": firecracker_state()},
    "cloud-hypervisor": lambda: {"vm.json": cloud_hypervisor_state()},
    "criu": lambda: criu_files(100, 101),
    "raw": lambda: {"vm.xsave": area(1, 4096) + area(2, 4096)},
    "minidump": lambda: {"x.dmp": minidump(area(1), area(2))},
    "crosvm": lambda: {f"vcpu{i}": cbor(crosvm_vcpu(i, area(i + 1, 4096))) for i in range(2)},
    "xen": lambda: {"guest.xen": xen_guest(area(1), area(2))},
}
"""Format -> a function that returns the files of one snapshot: {name: bytes}."""
