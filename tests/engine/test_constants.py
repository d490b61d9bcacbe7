"""The engine holds no table of its own: its constants are those of the Python floors."""

import ast
import re
from pathlib import Path

from xfast import engine
from xfast.xsave import area, features

HERE = Path(engine.__file__).parent


def enums(name):
    """Return the constants of a .pxd file."""
    text = (HERE / name).read_text()
    found = re.findall(r"^    ([A-Z_0-9]+) = ([^#\n]+)", text, re.M)
    return {key: eval(compile(ast.parse(value.strip(), mode="eval"), name, "eval"))
            for key, value in found}  # fmt: skip


ENGINE = enums("area.pxd")


def test_offsets_and_components():
    same = {
        "PAGE": features.KVM_XSAVE_SIZE,
        "LEGACY": features.HEADER_OFFSET,
        "EXTENDED": features.EXTENDED_OFFSET,
        "FP": features.X87,
        "SSE": features.SSE,
        "AVX": features.AVX,
        "PKRU": features.PKRU,
        "FCW_INIT": features.FCW_INIT,
        "MXCSR_INIT": features.MXCSR_INIT,
        "PKRU_DEFAULT": features.PKRU_DEFAULT,
    }
    assert {name: ENGINE[name] for name in same} == same


def test_codes():
    assert {n: v for n, v in ENGINE.items() if n.startswith("AUDIT_")} == {
        f"AUDIT_{flag.name}": flag.value for flag in area.Audit
    }
    assert {n: v for n, v in ENGINE.items() if n.startswith("FAULT_")} == {
        f"FAULT_{fault.name}": fault.value for fault in area.UabiFault if fault
    }


def test_facts_and_groups_measure_what_the_engine_writes():
    assert area.FACTS.itemsize == 64
    assert area.GROUPS.itemsize == 88
    text = (HERE / "area.pxd").read_text()
    struct = text[text.index("cdef struct Facts") :]
    names = re.findall(r"^    uint\d+_t (\w+)", struct[: struct.index("\n\n")], re.M)
    assert tuple(names) == area.FACTS.names
