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


def qcow2_image(states, cluster_bits=9, disk_size=1 << 30, extra=16):
    """Write a qcow2 image with internal snapshots, their clusters in descending order."""
    cluster = 1 << cluster_bits
    span = 1 << (2 * cluster_bits - 3)
    first = -(-disk_size // span)
    entries, blocks = [], bytearray()
    base = 1 << 20

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
