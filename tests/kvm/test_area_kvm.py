"""`get_uabi` and `set_uabi` against recordings of a real KVM."""

import base64
import errno
import json
import zlib

import numpy as np
import pytest

from xfast.xsave import area
from xfast.xsave.layout import from_leaf_d

PLAIN_OPS = {"SET_XSAVE", "GET_XSAVE", "GET_XSAVE2", "SET_CPUID2", "GET_XCRS", "SET_XCRS"}


def unpack(text):
    return np.frombuffer(zlib.decompress(base64.b64decode(text[2:])), np.uint8)


def fresh_image(mxcsr_mask):
    image = area.empty(1, 4096)[0]
    image[:2] = [0x7F, 0x03]
    image[24:32] = np.frombuffer(np.array([0x1F80, mxcsr_mask], "<u4").tobytes(), np.uint8)
    return image


def test_recorded_ioctl_sequences_without_a_run(shared):
    leaf = json.loads((shared / "vectors/recording-cpu-leaf-d.json").read_text())["leafD"]
    layout, _ = from_leaf_d({int(nr): tuple(row) for nr, row in leaf.items()})
    gets = sets = 0
    for line in (shared / "vectors/kvm.jsonl").read_text().splitlines():
        record = json.loads(line)
        if not {op["op"] for op in record["ops"]} <= PLAIN_OPS or record["cat"] == "cpuidswap":
            continue
        host, mxcsr_mask = record["xcr0_host"], record["mxcsr_mask"]
        guest = 0
        image = fresh_image(mxcsr_mask)
        for op in record["ops"]:
            if op["op"] == "SET_CPUID2":
                guest = op.get("guest_supported_xcr0", guest)
            elif op["op"] == "SET_XSAVE" and op["errno"] != errno.EFAULT:
                fault = area.set_uabi(
                    unpack(op["in"])[:4096],
                    layout,
                    image,
                    user_xfeatures=host,
                    mxcsr_mask=mxcsr_mask,
                )
                assert bool(fault) == (op["errno"] == errno.EINVAL), (record["id"], fault)
                sets += 1
            elif op["op"] in ("GET_XSAVE", "GET_XSAVE2") and op["errno"] == 0:
                got = area.get_uabi(
                    image, layout, mask=host & (guest | 3), features=host, mxcsr_mask=mxcsr_mask
                )
                assert got.tobytes() == unpack(op["out"]).tobytes(), record["id"]
                gets += 1
    assert gets > 400
    assert sets > 300


if __name__ == "__main__":
    pytest.main([__file__])
