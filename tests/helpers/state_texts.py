"""Texts of Cloud Hypervisor's state.json with all that is read of a vCPU; changes of numbers."""

import json
import re
import struct

import numpy as np
import snapshot_files as files

from xfast.snapshots import kvm_fpu

NUMBERS = re.compile(rb"(?<![0-9])[0-9]+(?![0-9])")


def changed_numbers(data, rng):
    """Return a text with some of its numbers changed, in length too, and now and then damaged."""
    places = [match.span() for match in NUMBERS.finditer(data)]
    out = bytearray(data)
    for start, end in sorted(rng.sample(places, rng.choice((1, 2, 30))), reverse=True):
        old = int(data[start:end])
        near = (old ^ 1, min(old + 1, old | 255), rng.randrange(max(min(old, 256), 1)), 0, 255)
        far = (
            old ^ 1 << rng.randrange(33), rng.randrange(1 << 32), 1 << 32, (1 << 32) - 1, 256,
            10**19 - 1, 10**19, 1 << 64,
        )  # fmt: skip
        new = rng.choice(far if rng.random() < 0.1 else near)
        text = str(new).encode()
        if rng.random() < 0.01:
            text = rng.choice((b"0" + text, b"-" + text, text + b".5", b"", b"x", b'"1"', b"[1]"))
        out[start:end] = text
    return bytes(out)


def texts(rng):
    """Return a state.json with all that is read of a vCPU, between devices of all kinds."""
    extra = rng.choice(({}, {"extra": [rng.randrange(1 << 32) for _ in range(5)]}))
    states = {}
    for number in range(rng.choice((1, 2))):
        area = bytearray(files.area(number, 4096, rng.choice((7, 0xE7, 4, 0))))
        fpu = {
            name: [int(v) for v in np.frombuffer(area, dtype, count, offset)]
            if count > 1 else int(np.frombuffer(area, dtype, 1, offset)[0])
            for name, (_, offset, dtype, count, _) in kvm_fpu.FPU.items()
            if rng.random() < 0.97
        }  # fmt: skip
        rows = [{"index": i, "data": rng.randrange(1 << 64)} for i in (0x10, 0xDA0, 0x1C4, 0x174)]
        leaf = dict(zip(("function", "index", "flags", "eax", "ebx", "ecx", "edx"),
                        (13, 0, 1, 0xE7, 2696, 2696, 0), strict=True))  # fmt: skip
        state = {
            "cpuid": [leaf], "msrs": rows if rng.random() < 0.7 else [{"nmsrs": 4}, rows],
            "fpu": fpu, "regs": {"r8": rng.randrange(1 << 64), "rip": 16},
            "lapic_state": [rng.randrange(256) for _ in range(8)], "x": "1 2 3",
            "sregs": [rng.randrange(256) for _ in range(312)],
            "xsave": {"region": struct.unpack("<1024I", area), **extra},
            "xcrs": list(files.xcrs(0xE7)),
        }  # fmt: skip
        for name in rng.sample(sorted(state), rng.choice((0, 0, 1))):
            if name != "xsave":
                del state[name]
        inner = json.dumps({"Kvm": state}, separators=rng.choice(((",", ":"), (", ", ": "))))
        states[str(number)] = {"snapshots": {}, "snapshot_data": {"state": inner}}
    devices = {"_net1": {"snapshot_data": {"state": json.dumps({"queue": [1, 256, 77]})}}}
    middle = {"cpu-manager": {"snapshots": states, "id": 12}}
    return json.dumps({"snapshots": {**devices, **middle, "last": {"at": [5, 66, -7, 1.5]}}})
