"""Files of any size that make a reader work as much as their bytes can: all structure, no state.

Each is a function of a size in bytes that returns the files of one snapshot, as the builders of
`snapshot_files` do. They pack well: what repeats is small.
"""

import json
import struct

import snapshot_files as files
from qemu_files import qcow2_image


def _fill(piece, size):
    """Return a piece again and again, as often as it fits."""
    return piece * max(1, size // len(piece))


# QEMU

LINK = b"\5\x08cpu/pkru\0\0\0\1" + bytes(4)
HEADER = b"\4\0\0\0\7\3cpu\0\0\0\1\0\0\0\x0c"


def qemu_headers(size):
    """Fake headers of `cpu` sections, one behind the other."""
    return {"vm": b"QEVM\0\0\0\3" + _fill(HEADER, size) + b"\0"}


def qemu_chains(size):
    """Fake headers that all lead into one chain of subsections."""
    half = size // 2
    return {"vm": b"QEVM\0\0\0\3" + _fill(HEADER + bytes(1300), half) + _fill(LINK, half) + b"\0"}


def qemu_vcpus(size):
    """Whole vCPUs, without description."""
    count = min(size, 15 << 20) // 2500
    devices = files.qemu_devices(count, apics=False)
    return {"vm": files.qemu_stream(devices, described=False)}


def qemu_devices(size):
    """A description of many empty devices."""
    listed = [entry for entry, _ in files.qemu_devices()]
    listed = [{"name": ""}] * (size // 14) + listed
    return {"vm": files.qemu_stream(listed=listed)}


def qemu_fields(size):
    """A device of many fields, then the usual ones."""
    listed = [entry for entry, _ in files.qemu_devices()]
    listed[0] = {"name": "timer", "fields": [{"size": 0}] * (size // 13)}
    return {"vm": files.qemu_stream(listed=listed)}


def qemu_lists(size):
    """A description of lists in lists."""
    text = b'{"devices": [' + _fill(b"[],", size) + b"0]}"
    stream = files.qemu_stream(described=False)
    return {"vm": stream + b"\6" + struct.pack(">I", len(text)) + text}


def qemu_descriptions(size):
    """Behind the devices what may begin a description, again and again, and no end of it."""
    mark = b"\0\6\0\x10\0\0" + b'{"devices": [{"name":"a"},'
    return {"vm": files.qemu_stream(described=False)[:-1] + _fill(mark, size)}


def qemu_behind(size):
    """A description of lists in lists, and something else behind it."""
    device = b'{"devices": [{"name": "timer", "fields": ['
    text = device + _fill(b"[],", size) + b"0]}]}"
    stream = files.qemu_stream(described=False)
    return {"vm": stream + b"\6" + struct.pack(">I", len(text)) + text + b"other"}


def qcow2_snapshots(size):
    """A disk image with 1,024 internal snapshots that share their clusters."""
    stream = files.qemu_stream(files.qemu_devices(max(2, size // 8000), apics=False))
    image = bytearray(qcow2_image([("a", stream)], 16, 0, base=1 << 17))
    (entry_at,) = struct.unpack_from(">Q", image, 64)
    entry = bytes(image[entry_at : entry_at + 40 + 16 + 8])
    struct.pack_into(">I", image, 60, 1024)
    image[entry_at : entry_at + 1024 * len(entry)] = entry * 1024
    return {"vm.qcow2": bytes(image)}


# ELF, minidumps, Xen


def elf_notes(size):
    """Empty notes."""
    return {"core": files.elf_core(_fill(struct.pack("<3I", 0, 0, 7), size))}


def elf_statuses(size):
    """Threads without state."""
    return {"core": files.elf_core(_fill(files.elf_notes(7, b"")[0], size))}


def elf_threads(size):
    """Whole threads."""
    return {"core": files.elf_core(_fill(b"".join(files.elf_notes(7, files.area())[::2]), size))}


def elf_states(size):
    """Whole threads in as many states as there can be."""
    notes = []
    for tid in range(max(1, size // 960)):
        state = bytearray(files.area()[:576])
        struct.pack_into("<Q", state, 464, tid * 4093 % 0xFFFFF | 3)
        struct.pack_into("<Q", state, 512, tid * 65521 % 0xFFFFF)
        notes += files.elf_notes(tid, bytes(state))[::2]
    return {"core": files.elf_core(b"".join(notes))}


def elf_segments(size):
    """Program headers of no notes."""
    count = min(size // 56, 1 << 20)
    core = bytearray(files.elf_core(*files.elf_notes(7, files.area())))
    struct.pack_into("<H", core, 56, 0xFFFF)
    struct.pack_into("<Q", core, 40, len(core))
    core += bytes(44) + struct.pack("<I", count) + bytes(16)
    struct.pack_into("<Q", core, 32, len(core))
    row = struct.pack("<2I6Q", 4, 4, 120, 0, 0, 0, 0, 4)
    core += row * (count - 1) + bytes(core[64:120])
    return {"core": bytes(core)}


def minidump_threads(size):
    """Threads of i386, which are the smallest."""
    count = min(size // 800, 1 << 16)
    return {"x.dmp": files.minidump(*[files.area()] * max(1, count * 800 // 1300))}


def minidump_empty(size):
    """Threads without state."""
    dump = bytearray(files.minidump(files.area()))
    (at,) = struct.unpack_from("<I", dump, 32 + 12 + 8)
    count = min(size // 48, 1 << 16)
    struct.pack_into("<3I", dump, 32 + 12, 3, 4 + 48 * (count + 1), len(dump))
    old = bytes(dump[at + 4 : at + 52])
    dump += struct.pack("<I", count + 1) + old + bytes(48) * count
    return {"x.dmp": bytes(dump)}


def xen_records(size):
    """Records of nothing."""
    return {"guest": files.xen_image(_fill(files.xen_record(2), size))}


def xen_contexts(size):
    """HVM contexts, of which the last counts."""
    record = files.xen_context(
        *(files.xen_entry(2, i, files.area(i + 1)[:512] + bytes(488)) for i in range(2)),
        *(
            files.xen_entry(16, i, struct.pack("<3Q", 0, 7, 7) + files.area(i + 1))
            for i in range(2)
        ),
    )
    return {"guest": files.xen_image(_fill(record, size))}


def xen_entries(size):
    """Entries of an HVM context that nobody knows, 16 MiB at most."""
    entries = _fill(files.xen_entry(99, 0, b""), min(size, 15 << 20))
    return {"guest": files.xen_image(files.xen_context(entries))}


def xen_vcpus(size):
    """vCPUs."""
    return {"guest": files.xen_guest(*[files.area()] * min(8192, size // 1900))}


# CRIU


def _tar(members):
    out = bytearray()
    for name, data in members:
        head = bytearray(512)
        head[: len(name)] = name.encode()
        head[124:136] = b"%011o\0" % len(data)
        head[148:156] = b" " * 8
        head[156:157] = b"0"
        head[257:262] = b"ustar"
        head[148:156] = b"%06o\0 " % sum(head)
        out += head + data + bytes(-len(data) % 512)
    return bytes(out)


def criu_fields(size):
    """An image of the smallest fields, 4 MiB at most."""
    body = _fill(b"\x08\1", min(size, 3 << 20))
    return {"c.tar": _tar([("core-1.img", files.criu_image(0x55053847, body))])}


def criu_words(size):
    """The components of a core as words, more than there can be."""
    words = files.proto(*((2, v) for v in range(4000))) * max(1, min(size, 3 << 20) // 12000)
    fpregs = files.proto((1, 0x37F), (13, files.proto((1, 7)) + words))
    core = files.proto((1, 1), (2, files.proto((1, 0), (2, b""), (3, fpregs))))
    return {"c.tar": _tar([("core-1.img", files.criu_image(0x55053847, core))])}


def criu_tree(size):
    """A pstree of threads."""
    entry = files.proto((1, 1), (2, 0), *((5, 1 << 20 | tid) for tid in range(4000)))
    images = {"core-1.img": files.criu_core(1)}
    tree = files.criu_image(0x50273030, *[entry] * max(1, size // len(entry)))
    return {"c.tar": _tar([*images.items(), ("pstree.img", tree)])}


def criu_members(size):
    """Members of an archive that are nothing, and one thread."""
    empty = _tar([("a", b"")])
    return {"c.tar": _fill(empty, size) + _tar([("core-1.img", files.criu_core(1))])}


def criu_threads(size):
    """Threads."""
    one = files.criu_core(1)
    count = max(1, min(size, 8 << 20) // (1024 + len(one)))
    return {"c.tar": _tar([(f"core-{i}.img", one) for i in range(count)])}


# Cloud Hypervisor, crosvm, raw, Firecracker


def ch_vcpus(size):
    """vCPUs, each as short as it can be."""
    region = list(struct.unpack("<1024I", files.area(1, 4096)))
    text = json.dumps(json.dumps({"xsave": {"region": region}}, separators=(",", ":")))
    state = f'{{"snapshot_data":{{"state":{text}}}}}'
    count = max(1, min(size, 31 << 20) // len(state))
    members = ",".join(f'"{i}":{state}' for i in range(count))
    return {"vm.json": f'{{"snapshots":{{"cpu-manager":{{"snapshots":{{{members}}}}}}}}}'.encode()}


def _ch_with(filling):
    head = b'{"a":[' + filling + b'0],"snapshots":{"cpu-manager":{"snapshots":'
    inner = files.cloud_hypervisor_state()
    at = inner.index(b'"snapshots"', 20) + len(b'"snapshots": ')
    return {"vm.json": head + inner[at:-2] + b"}}"}


def ch_numbers(size):
    """A list of numbers that nobody asks for."""
    return _ch_with(_fill(b"1,", min(size, 31 << 20)))


def ch_lists(size):
    """Lists that nobody asks for."""
    return _ch_with(_fill(b"[],", min(size, 31 << 20)))


def ch_bytes(size):
    """A vCPU's state as an array of bytes: a list of nothing but numbers."""
    state = b'{"snapshot_data":{"state":[' + _fill(b"1,", min(size, 31 << 20)) + b"1]}}"
    return {"vm.json": b'{"snapshots":{"cpu-manager":{"snapshots":{"0":' + state + b"}}}}"}


def ch_region(size):
    """A vCPU's area of too many numbers."""
    text = json.dumps(f'{{"xsave":{{"region":[{"1," * (min(size, 1 << 20) // 2 - 100)}1]}}}}')
    state = f'{{"snapshot_data":{{"state":{text}}}}}'
    return {
        "vm.json": f'{{"snapshots":{{"cpu-manager":{{"snapshots":{{"0":{state}}}}}}}}}'.encode()
    }


def crosvm_items(size):
    """A list of nothing, a byte each."""
    count = min(size, (1 << 20) - 100)
    body = b"\x81" + b"\x9a" + struct.pack(">I", count) + bytes(count)
    return {"vcpu0": b"\xa1\x67vcpu_id" + body}


def crosvm_text(size):
    """JSON of empty lists."""
    return {"vcpu0": b'{"vcpu_id":0,"a":[' + _fill(b"[],", min(size, (1 << 20) - 100)) + b"0]}"}


def crosvm_words(size):
    """An area of words."""
    words = [0] * (min(size, 1 << 20) - 1000)
    state = files.crosvm_vcpu(0, files.area(1, 4096))
    state["xsave"] = {"data": words[: (1 << 17) - 50], "len": 4096}
    return {"vcpu0": files.cbor(state)[: 1 << 20]}


def raw_areas(size):
    """Areas."""
    return {"vm.xsave": _fill(files.area(1, 4096), size)}


def firecracker_vcpus(size):
    """vCPUs, 10 MiB at most."""
    return {"vm": files.firecracker_state(max(1, min(size, 9 << 20) // 5100))}


def unknown(size):
    """Nothing at all."""
    return {"vm": bytes(size)}


BOMBS = {
    "qemu": (
        *(qemu_headers, qemu_chains, qemu_vcpus, qemu_devices, qemu_fields, qemu_lists),
        *(qemu_descriptions, qemu_behind, qcow2_snapshots),
    ),
    "elfcore": (elf_notes, elf_statuses, elf_threads, elf_states, elf_segments),
    "minidump": (minidump_threads, minidump_empty),
    "xen": (xen_records, xen_contexts, xen_entries, xen_vcpus),
    "criu": (criu_fields, criu_words, criu_tree, criu_members, criu_threads),
    "cloud-hypervisor": (ch_vcpus, ch_numbers, ch_lists, ch_bytes, ch_region),
    "crosvm": (crosvm_items, crosvm_text, crosvm_words),
    "raw": (raw_areas,),
    "firecracker": (firecracker_vcpus,),
    "": (unknown,),
}
"""Format -> what costs its reader most."""
