"""Structural damage to small snapshots: all that says where, and how many, the vCPUs are.

`mutated` takes the example of a format and changes something of its structure; the registers
themselves stay. What it returns may be refused, or doubted, or read; but no vCPU may be lost in
silence.
"""

import json
import re
import struct

import snapshot_files as files

TIDS = (100, 101)


def mutated(name, rng):
    """Return the files of a damaged snapshot of a format, and which of them is to be read."""
    return MUTATORS[name](rng)


def _flipped(data, rng, kept=()):
    """Return bytes with one place changed, outside of the ranges in `kept`."""
    while True:
        at = rng.randrange(len(data))
        if not any(start <= at < end for start, end in kept):
            break
    width = rng.choice((1, 1, 1, 2, 4, 8))
    for start, _ in kept:
        if start >= at:
            width = min(width, start - at)
    old = data[at : at + width]
    new = rng.choice(
        (
            bytes(b ^ 1 << rng.randrange(8) for b in old),
            bytes(len(old)),
            b"\xff" * len(old),
            rng.randbytes(len(old)),
        )
    )
    return data[:at] + new + data[at + len(old) :]


def _areas(data, fills=(1, 2), size=files.AREA_SIZE):
    """Return where the registers of areas lie in a file: `size` bytes from each one's start."""
    found = []
    for fill in fills:
        start = files.area(fill)[:416]
        at = data.find(start)
        while at >= 0:
            found.append((at, at + size))
            at = data.find(start, at + 1)
    return found


def _qemu(rng):
    devices = files.qemu_devices(apics=rng.random() < 0.5)
    options = {"footers": rng.random() < 0.7, "described": rng.random() < 0.7}
    if not options["footers"]:
        options["described"] = True
    how = rng.choice(("flip",) * 3 + ("drop", "twice", "swap", "rename", "instance", "json"))
    cpus = [i for i, (entry, _) in enumerate(devices) if entry["name"] == "cpu"]
    at = rng.choice(cpus) if rng.random() < 0.6 else rng.randrange(len(devices))
    entry, data = devices[at]
    listed = [dict(entry) for entry, _ in devices]
    if how == "drop":
        del devices[at]
        if rng.random() < 0.5:
            del listed[at]
    elif how == "twice":
        devices.insert(rng.randrange(len(devices)), devices[at])
    elif how == "swap":
        other = rng.randrange(len(devices))
        devices[at], devices[other] = devices[other], devices[at]
    elif how == "rename":
        word = rng.choice(("gpu", "cpv", "cpu_", "CPU", "c", "timer", "kvmclock", "\x7fpu"))
        devices[at] = ({**entry, "name": word}, data)
        if rng.random() < 0.5:
            listed[at]["name"] = word
    elif how == "instance":
        new = rng.choice((0, 1, 2, 7, 0xFFFFFFFF))
        devices[at] = (entry, struct.pack(">I", new) + data[4:])
        if rng.random() < 0.5:
            listed[at]["instance_id"] = new
    elif how == "json":
        _json_lie(listed, at, rng)
    stream = files.qemu_stream(devices, listed=listed, **options)
    if how == "flip":
        kept = []
        for fill in (1, 2):
            fixed = files.qemu_cpu(fill)
            at = stream.find(fixed)
            kept.append((at, at + len(fixed)))
        stream = _flipped(stream, rng, kept)
    return {"vm": stream}, "vm"


def _json_lie(listed, at, rng):
    """Change what a description says of one device."""
    how = rng.choice(("drop", "twice", "size", "name", "swap"))
    if how == "drop":
        del listed[at]
    elif how == "twice":
        listed.insert(at, dict(listed[at]))
    elif how == "size":
        size = rng.choice((0, 1, 8, 1313, 1816, 1817, 1818, 1 << 31))
        listed[at]["fields"] = [{"name": "data", "size": size}]
    elif how == "name":
        listed[at]["name"] = rng.choice(("gpu", "", "cpu_common", "cpu"))
    else:
        other = rng.randrange(len(listed))
        listed[at], listed[other] = listed[other], listed[at]


def _elfcore(rng):
    notes = []
    for i, tid in enumerate(TIDS):
        notes += files.elf_notes(tid, files.area(i + 1))
    how = rng.choice(("flip", "flip", "drop", "twice", "swap", "short", "late", "type"))
    at = rng.randrange(len(notes))
    start, size = 0, sum(map(len, notes))
    if how == "drop":
        del notes[at]
        size = sum(map(len, notes))
    elif how == "twice":
        notes.insert(rng.randrange(len(notes)), notes[at])
        size = sum(map(len, notes))
    elif how == "swap":
        other = rng.randrange(len(notes))
        notes[at], notes[other] = notes[other], notes[at]
    elif how == "short":
        size = sum(map(len, notes[:at]))
    elif how == "late":
        start = sum(map(len, notes[:at]))
        size -= start
    elif how == "type":
        kind = rng.choice((0, 1, 2, 0x200, 0x202, 0x205, 0xFFFFFFFF))
        notes[at] = notes[at][:8] + struct.pack("<I", kind) + notes[at][12:]
    core = bytearray(files.elf_core(*notes))
    struct.pack_into("<Q", core, 64 + 8, 120 + start)
    struct.pack_into("<Q", core, 64 + 32, size)
    data = bytes(core)
    return {"core": _flipped(data, rng, _areas(data)) if how == "flip" else data}, "core"


def _firecracker(rng):
    data = files.firecracker_state()
    kept = _areas(data, size=4096)
    first, second = (start for start, _ in sorted(kept))
    how = rng.choice(("flip", "flip", "flip", "drop", "insert"))
    if how == "drop":  # the second vCPU, from behind the first one's area on
        at = rng.randrange(first + 4096, second)
        data = data[:at] + data[rng.randrange(at, second + 4096) :]
    elif how == "insert":
        at = rng.randrange(first + 4096, second)
        data = data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]
    else:
        data = _flipped(data, rng, kept)
    return {"vm": files.sealed("firecracker", data)}, "vm"


def _cloud_hypervisor(rng):
    outer = json.loads(files.cloud_hypervisor_state())
    vcpus = outer["snapshots"]["cpu-manager"]["snapshots"]
    how = rng.choice(("flip", "flip", "drop", "rename", "empty"))
    key = rng.choice(sorted(vcpus))
    if how == "drop":
        del vcpus[key]
    elif how == "rename":
        vcpus[rng.choice(("2", "7", "cpu", "1x", ""))] = vcpus.pop(key)
    elif how == "empty":
        vcpus[key] = rng.choice(({}, None, {"snapshots": {}}, {"snapshot_data": None}))
    text = json.dumps(outer).encode()
    if how == "flip":  # all but the numbers of the areas
        numbers = [match.span() for match in re.finditer(rb"[0-9, ]{64,}", text)]
        text = _flipped(text, rng, numbers)
    config = json.dumps({"cpus": {"boot_vcpus": 2, "max_vcpus": 4}}).encode()
    return {"state.json": text, "config.json": config}, "state.json"


def _criu(rng):
    found = files.criu_files(*TIDS)
    how = rng.choice(("flip", "flip", "drop", "rename", "empty"))
    core = f"core-{rng.choice(TIDS)}.img"
    if how == "drop":
        del found[core]
    elif how == "rename":
        found[rng.choice(("core-7.img", "core-x.img", "kore-101.img"))] = found.pop(core)
    elif how == "empty":
        found[core] = files.criu_image(0x55053847, files.proto((1, 1), (2, b"")))
    else:
        name = rng.choice((core, "pstree.img"))
        data = found[name]
        fpregs = data.find(b"\x08\xff\x06")  # FCW 0x37f: the registers begin
        found[name] = _flipped(data, rng, [(fpregs, len(data))] if fpregs >= 0 else ())
    return found, ""


def _minidump(rng):
    data = files.minidump(files.area(1), files.area(2))
    return {"x.dmp": _flipped(data, rng, _areas(data, size=416))}, "x.dmp"


def _xen(rng):
    """Flip bits, and lose, double or rename entries, of both ways in which vCPUs are saved."""
    areas = [files.area(1), files.area(2)]
    if rng.random() < 0.5:
        entries = [files.xen_entry(2, i, area[:512] + bytes(488)) for i, area in enumerate(areas)]
        for i, area in enumerate(areas):
            entries.append(files.xen_entry(16, i, struct.pack("<3Q", 0, 7, 7) + area))
        pack, domain = (lambda some: [files.xen_context(*some)]), 2
    else:
        entries = [files.xen_record(4, struct.pack("<2I", i, 0) + bytes(64)) for i in range(2)]
        for i, area in enumerate(areas):
            head = struct.pack("<2I2Q", i, 0, 7, 7)
            entries.append(files.xen_record(6, head + area))
        pack, domain = list, 1
    how = rng.choice(("flip", "flip", "flip", "drop", "twice", "swap"))
    at, other = rng.randrange(len(entries)), rng.randrange(len(entries))
    if how == "drop":
        del entries[at]
    elif how == "twice":
        entries.insert(other, entries[at])
    elif how == "swap":
        entries[at], entries[other] = entries[other], entries[at]
    data = files.xen_image(*pack(entries), domain=domain)
    if how == "flip":
        data = _flipped(data, rng, _areas(data))
    return {"guest": data}, "guest"


def _crosvm(rng):
    """Change what surrounds the registers in one of the files, or which file it is."""
    found = {
        f"vcpu{i}": files.cbor(files.crosvm_vcpu(i, files.area(i + 1, 4096))) for i in range(2)
    }
    name = rng.choice(sorted(found))
    data = found[name]
    how = rng.choice(("flip", "flip", "flip", "cut", "rename", "copy"))
    start = data.index(b"\x64data")
    end = data.index(b"\x63len", start)
    if how == "flip":
        found[name] = _flipped(data, rng, [(start + 5, end)])
    elif how == "cut":
        found[name] = data[: rng.randrange(len(data))]
    elif how == "rename":
        found[rng.choice(("vcpu2", "vcpu7", "vcpu01"))] = found.pop(name)
    else:
        found[f"vcpu{rng.randrange(3)}"] = data
    return found, ""


MUTATORS = {
    "qemu": _qemu,
    "elfcore": _elfcore,
    "firecracker": _firecracker,
    "cloud-hypervisor": _cloud_hypervisor,
    "criu": _criu,
    "minidump": _minidump,
    "xen": _xen,
    "crosvm": _crosvm,
}
"""Format -> its mutator. A raw file says nothing of the number of its areas."""
