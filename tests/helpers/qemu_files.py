"""Files around QEMU streams, written for tests."""

import re
import struct


def description_at(data):
    """Return where the description of a stream begins."""
    for match in re.finditer(rb'\0\x06(.{4})\{"', data, re.DOTALL):
        if match.end() - 2 + struct.unpack(">I", match[1])[0] == len(data):
            return match.end() - 2
    raise ValueError("no description")


def undescribed(data):
    """Return a stream as a QEMU without description leaves it: it ends at EOF."""
    return data[: description_at(data) - 5]


def qcow2_image(states, cluster_bits=9, disk_size=1 << 30, extra=16, base=1 << 20):
    """Write a qcow2 image with internal snapshots, their clusters in descending order."""
    cluster = 1 << cluster_bits
    span = 1 << (2 * cluster_bits - 3)
    first = -(-disk_size // span)
    entries, blocks = [], bytearray()

    def put(data):
        nonlocal blocks
        offset = base + len(blocks)
        blocks += data.ljust(-(-len(data) // cluster) * cluster, b"\0")
        return offset

    for number, (name, state) in enumerate(states):
        pieces = [state[i : i + cluster] for i in range(0, len(state), cluster)]
        places = [put(piece) | 1 << 63 if any(piece) else 0 for piece in pieces[::-1]][::-1]
        tables = [places[i : i + cluster // 8] for i in range(0, len(places), cluster // 8)]
        l1 = [0] * first + [put(struct.pack(f">{len(t)}Q", *t)) | 1 << 63 for t in tables]
        sizes = struct.pack(">QQ", len(state), disk_size)[:extra]
        entries.append(
            struct.pack(">QIHHIIQII", put(struct.pack(f">{len(l1)}Q", *l1)), len(l1), 1,
                        len(name), 0, 0, 0, 0 if extra else len(state), extra)
            + sizes + str(number).encode() + name.encode()
        )  # fmt: skip
    table = b"".join(entry.ljust(-(-len(entry) // 8) * 8, b"\0") for entry in entries)
    head = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, 0, 0, cluster_bits, disk_size, 0, 0, 0,
                       0, 0, len(states), 4096)  # fmt: skip
    assert 4096 + len(table) < base
    return head.ljust(4096, b"\0") + table.ljust(base - 4096, b"\0") + bytes(blocks)


def registers_of(text):
    """Return each vCPU's registers as `info registers -a` prints them."""
    for part in re.split(r"CPU#\d+", text)[1:]:
        yield {
            name: [int(word, 16) for word in value.split()]
            for name, value in re.findall(
                r"(FCW|FSW|FTW|MXCSR|FPR\d|[XY]MM\d\d)=([0-9a-f]+(?: [0-9a-f]+)*)", part
            )
        }


def page(flags, data=b"", name=b"", addr=0):
    """Return one record of guest memory; without a name it goes on in the block of the last."""
    if name:
        return struct.pack(">QB", addr | flags, len(name)) + name + data
    return struct.pack(">Q", addr | flags | 0x20) + data


END_OF_PAGES = struct.pack(">Q", 0x10)
PAGES = {
    "zero": page(2, b"\0"),
    "fill": page(2, b"\xa5", b"pc.ram"),
    "page": page(8, b"\x5a" * 4096),
    "first page": page(8, b"\x10" * 4096, b"pc.ram", 0x7000),
    "xbzrle": page(0x40, b"\1\0\3abc"),
    "first xbzrle": page(0x40, b"\1\x10\0" + b"\x10" * 4096, b"pc.bios"),
    "compressed": page(0x100, b"\0\0\0\5abcde", b"pc.rom"),
    "hook": struct.pack(">Q", 0x80),
    "multifd flush": struct.pack(">Q", 0x200),
}
"""Every kind of record that guest memory comes in."""


def with_pages(stream):
    """Return a stream of `snapshot_files` with guest memory that can be walked, of each kind."""
    ram = b"\x01" + struct.pack(">IB3sII", 2, 3, b"ram", 0, 4)
    listed = struct.pack(">Q", 1 << 20 | 4) + b"\6pc.ram" + struct.pack(">Q", 1 << 20)
    part = b"\x7e" + struct.pack(">I", 2) + b"\x02" + struct.pack(">I", 2)
    pages = listed + END_OF_PAGES + part + b"".join(PAGES.values()) + END_OF_PAGES
    return stream.replace(ram + bytes(512), ram + pages, 1)


def places_of(stream):
    """Return where the first device section of a real stream begins, and its RAM section's id."""
    section = re.search(b"\x01(.{4})\x03ram\0{7}\x04", stream, re.DOTALL)[1]
    footer = re.escape(b"\x7e" + section)
    device = re.search(footer + rb"(?:\x08\0\x0b\0\0)*(?=\x04.{5}\w)", stream, re.DOTALL)
    return device.end(), section


def with_memory(stream, records):
    """Return a stream with another section of guest memory in front of its first device."""
    device, section = places_of(stream)
    more = b"\2" + section + records + END_OF_PAGES + b"\x7e" + section
    return stream[:device] + more + stream[device:]
