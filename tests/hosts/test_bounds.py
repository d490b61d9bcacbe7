"""Hostile descriptions: bounds by construction, and one line at once."""

from __future__ import annotations

import struct
import time
import tracemalloc

import pytest

from xfast.errors import FormatError, XfastError
from xfast.hosts import load, parse
from xfast.hosts.bounds import DEPTH_LIMIT, DOTS_LIMIT, TOML_LIMIT

MIB = 1 << 20
HEAD = 'schema = "xfast/1"\n'


def repeated(unit: str, head: str = "", size: int = MIB) -> bytes:
    return (head + unit * ((size - len(head)) // len(unit))).encode()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (HEAD + "a." * 20_000 + "b = 1", f"at most {DOTS_LIMIT} dots in a key"),
        (HEAD + "a . " * 20_000 + "b = 1", f"at most {DOTS_LIMIT} dots in a key"),
        (HEAD + '"a".' * 9_000 + "b = 1", f"at most {DOTS_LIMIT} dots in a key"),
        (HEAD + "'a'." * 9_000 + "b = 1", f"at most {DOTS_LIMIT} dots in a key"),
        (HEAD + "x = {" + "a." * 20_000 + "b = 1}", f"at most {DOTS_LIMIT} dots in a key"),
        (HEAD + "[" + "a." * 20_000 + "b]", f"at most {DOTS_LIMIT} dots in a key"),
        (HEAD + "a = " + "9" * 5_000, "at most 64 characters in a number"),
        (HEAD + "a = 0x" + "f" * 5_000, "at most 64 characters in a number"),
        (HEAD + "a = 1" + "_1" * 5_000, "at most 64 characters in a number"),
        (HEAD + "a = " + "[" * 5_000, f"at most {DEPTH_LIMIT} brackets"),
        (HEAD + "a = " + "{b=" * 5_000, f"at most {DEPTH_LIMIT} brackets"),
        (HEAD + "#" * TOML_LIMIT, f"at most {TOML_LIMIT} characters of TOML"),
        (HEAD + 'a = "' + '\\"' * 100_000, "not TOML"),
        ('{"schema": ' + "[" * 5_000, f"at most {DEPTH_LIMIT} brackets"),
        ('{"schema": ' + "9" * 5_000 + "}", "at most 64 digits"),
        ('{"guest_cpu_config": NaN}', "expected a finite number, got NaN"),
        ('{"guest_cpu_config": -Infinity}', "got -Infinity"),
        ("{}" * 5_000, "at most 1024 JSON values"),
        ("<cpu>" + "<a>" * 5_000, f"at most {DEPTH_LIMIT} elements in each other"),
        ("<cpu>" + "<a/>" * 200_000, "at most 100000 elements"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><cpu>&b;</cpu>', "DOCTYPE"),
        ("<cpu><model>&b;</model></cpu>", "undefined entity"),
    ],
)
def test_what_no_honest_description_has_is_refused(text, complaint):
    with pytest.raises(FormatError, match=complaint) as raised:
        parse(text.encode(), "h")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("flags", ["1e999", "-1", "0.5", "true", "null", '"z"', "4294967296"])
def test_number_of_a_fingerprint_that_is_none(flags):
    """1e999 is infinity, and int() of that raised an OverflowError."""
    row = f'{{"leaf": "0x7", "subleaf": "0x0", "flags": {flags}, "modifiers": []}}'
    with pytest.raises(FormatError, match=r"cpuid_modifiers: expected .*, got"):
        parse(f'{{"guest_cpu_config": {{"cpuid_modifiers": [{row}]}}}}'.encode())


def test_honest_descriptions_are_within_the_bounds():
    text = HEAD + '[[hosts]]\nname = "a.b.c.d.e.f.g.h.i.j.k.l"\nsource = "' + "." * 500 + '"\n'
    text += "# 1.2.3.4.5.6.7.8.9.10.11.12.13\nfeatures = ['" + "9" * 100 + "']\n"
    (host,) = parse(text.encode())
    assert host.source == "." * 500


ROW = "   0x00000000 0x00: eax=0x00000001 ebx=0x756e6547 ecx=0x6c65746e edx=0x49656e69\n"
ENABLED = (
    "x86/fpu: Enabled xstate features 0x7, context size is 832 bytes, using 'standard' format.\n"
)

MEBIBYTES = {
    "blanks": repeated(" "),
    "lines": repeated("\n"),
    "colons": repeated(":"),
    "zeros": bytes(MIB),
    "high": b"\xff" * MIB,
    "utf-16": b"\xff\xfe" + b"a\0" * (MIB // 2),
    "cpuid -r, CPUs": repeated(ROW),
    "cpuid -r, kinds": b"".join(
        ROW.encode() + ROW.replace("0x00000000 ", "0x00000001 ").replace(
            "eax=0x00000001", f"eax={n:#010x}").encode() for n in range(6_000)),
    "cpuid -r, rows": "".join(
        f"   0x0000000d {n:#04x}: eax={n:#010x} ebx=0x00000001 ecx=0x00000000 edx=0x00000000\n"
        for n in range(12_000)).encode(),
    "InstLatx64": repeated("CPUID 0000000D: 00000001-756E6547-6C65746E-49656E69 [SL 02]\n"),
    "cpuid, CPUs": repeated('CPU 0:\n   vendor_id = "GenuineIntel"\n'),
    "cpuid, states": repeated(
        "   X features (0xd/2):\n      X byte size = 0x100\n", "   vendor_id = \n"),
    "log, lines": repeated(ENABLED),
    "log, boots": repeated("Linux version 6.1\n", ENABLED),
    "log, FXSAVE": repeated("Linux version 6.1\nx87 FPU will use FXSAVE\n"),
    "log, features": repeated("Supporting XSAVE feature 0x1:\n" + ENABLED),
    "log, CPUs": repeated("CPU0: Intel(R) ", ENABLED),
    "log, slots": repeated("xstate_offset[2]:         ", ENABLED),
    "log, leaves": repeated("CPUID[0d, 02]: eax=00000100 ebx=00000240 ecx=00000000 edx=00000000\n"),
    "cpuinfo, CPUs": repeated("processor : 0\nflags : fpu\n"),
    "cpuinfo, kinds": "".join(f"processor : 0\nflags : x{n}\n" for n in range(40_000)).encode(),
    "cpuinfo, flags": b"flags : " + b"a " * (MIB // 2 - 4),
    "xml, elements": repeated("<a/>", "<cpu>"),
    "xml, attributes": b"<cpu " + b" ".join(b"a%d='1'" % n for n in range(90_000)) + b"/>",
    "xml, text": b"<cpu><model>" + b"a" * MIB + b"</model></cpu>",
    "json, lists": b'{"return":[' + b"[]," * (MIB // 3) + b"[]]}",
    "json, objects": b'{"schema":[' + b"{}," * (MIB // 3) + b"{}]}",
    "json, keys": b"{" + b",".join(b'"k%d":1' % n for n in range(90_000)) + b"}",
    "json, hosts": b'{"schema":"xfast/1","hosts":[' + b",".join([b'{"name":"a"}'] * 80_000) + b"]}",
    "json, values": repeated("{}"),
    "qmp, props": b'{"return":{"model":{"name":"max","props":{'
    + b",".join(b'"k%d":true' % n for n in range(70_000)) + b"}}}}",
    "lscpu, fields": b'{"lscpu":[' + b",".join([b'{"field":"x","data":"a"}'] * 40_000) + b"]}",
    "xe, flags": b'{"flags":"' + b"a " * (MIB // 2) + b'"}',
    "vbox, rows": repeated("Hst: 00000001/0000  00000001 00000001 00000001 00000001\n",
                           "Raw Standard CPUID Leaves\n"),
    "vbox, states": repeated("State #2,  Host:  off=0x0240, cb=0x0100\n",
                             "Valid XCR0 bits,  Host: 0x00000000`00000207\n"),
    "toml, hosts": repeated('[[hosts]]\nname="a"\n', HEAD, TOML_LIMIT),
    "toml, keys": (HEAD + "".join(f"a{n}=1\n" for n in range(27_000))).encode(),
    "toml, tables": (HEAD + "".join(f"[a.b.c.d{n}]\n" for n in range(17_000))).encode(),
    "cpuinfo.img": struct.pack("<III", 0x54564319, 0x61404013, MIB)
    + b"\x0a\x02\x08\x01" * (MIB // 4),
}  # fmt: skip
"""A mebibyte (a quarter of TOML) of each thing that a reader repeats work for."""


@pytest.mark.parametrize("name", MEBIBYTES)
def test_a_mebibyte_of_anything_costs_little(name):
    """At most 256 MiB, and no time that grows with the square: seconds where it was minutes."""
    began = time.process_time()
    try:
        parse(MEBIBYTES[name], "h")
    except XfastError as error:
        assert "\n" not in str(error)  # noqa: PT017
    assert time.process_time() - began < 5
    tracemalloc.start()
    try:
        parse(MEBIBYTES[name][: MIB // 4], "h")
    except XfastError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 64 * MIB


@pytest.mark.parametrize("name", ["host-dotted.toml", "host-bigint.toml", "host-inf-flags.json"])
def test_hostile_files_from_a_review(shared, name):
    with pytest.raises(FormatError) as raised:
        load(shared / "cases/hostile" / name)
    assert "\n" not in str(raised.value)
