"""The host description: one schema, written as JSON by tools and as TOML by people.

A document holds ``schema = "xfast/1"`` and a list of ``hosts``; the fields of a host are those
of `Host`, absent where not known. Masks are hexadecimal strings (plain integers are read too),
``layout`` is a list of slots or a preset's name, ``kernel`` is a table or just a release.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from xfast.errors import FormatError
from xfast.hosts.bounds import HOSTS_LIMIT, check_json, check_toml
from xfast.hosts.model import Host
from xfast.kernels.behaviour import Behaviours, of_release
from xfast.xsave.cpuid import Cpuid, Entry
from xfast.xsave.features import name_of
from xfast.xsave.layout import PRESETS, Layout, Slot, preset

SCHEMA = "xfast/1"

SLOT_FLAGS = ("supervisor", "align64", "xfd")


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"expected printable text, got {value!r:.40}")
    return value


def integer(value: object, limit: int = 1 << 64) -> int:
    """Return a number below `limit`, from itself or hexadecimal text. Raises ValueError."""
    number = value
    if isinstance(value, str):
        try:
            number = int(value, 16)
        except ValueError:
            number = None
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < limit:
        raise ValueError(
            f"expected a number below {limit:#x}, hexadecimal as text, got {value!r:.40}"
        )
    return number


def _items(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list, got {value!r:.40}")
    return value


def _table(value: object, known: Iterable[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a table, got {value!r:.40}")
    unknown = sorted(value.keys() - set(known))
    if unknown:
        raise ValueError(f"expected only {', '.join(known)}, got {unknown[0]!r:.40}")
    return value


def _names(value: object) -> frozenset[str]:
    return frozenset(_text(item) for item in _items(value))


def _slot(value: object) -> Slot:
    table = _table(value, ("nr", "name", "size", "offset", *SLOT_FLAGS))
    nr = integer(table.get("nr"), 64)
    if table.get("name", name_of(nr)) != name_of(nr):
        raise ValueError(f"expected the name {name_of(nr)} for nr {nr}, got {table['name']!r:.40}")
    size, offset = integer(table.get("size"), 1 << 32), integer(table.get("offset", 0), 1 << 32)
    flags = [table.get(flag, False) for flag in SLOT_FLAGS]
    if not all(isinstance(flag, bool) for flag in flags):
        raise ValueError(f"expected true or false for {', '.join(SLOT_FLAGS)}, got {flags}")
    return Slot(nr, size, offset, *flags)


def _layout(value: object) -> Layout:
    if isinstance(value, str):
        return preset(value)
    return Layout(tuple(_slot(item) for item in _items(value)), "given")


def _write_layout(layout: Layout) -> str | list[dict[str, Any]]:
    if layout == PRESETS.get(layout.name):
        return layout.name
    return [
        {"nr": s.nr, "name": name_of(s.nr), "size": s.size, "offset": s.offset}
        | {flag: True for flag in SLOT_FLAGS if getattr(s, flag)}
        for s in layout.slots
    ]


def _kernel(value: object) -> Behaviours:
    if isinstance(value, str):
        return of_release(_text(value))
    table = _table(value, ("behaviours", "release", "provenance"))
    return Behaviours(
        _names(table.get("behaviours")),
        _text(table.get("release", "")),
        _text(table.get("provenance", "given")),
    )


def _write_kernel(kernel: Behaviours) -> dict[str, Any]:
    return {
        "behaviours": sorted(kernel.names),
        "release": kernel.release,
        "provenance": kernel.provenance,
    }


def _cpuid(value: object) -> Cpuid:
    rows = (_table(item, Entry._fields) for item in _items(value))
    u32 = 1 << 32
    return Cpuid(
        tuple(Entry(*(integer(row.get(f, 0), u32) for f in Entry._fields)) for row in rows)
    )


def _write_cpuid(cpuid: Cpuid) -> list[dict[str, str]]:
    return [{field: hex(value) for field, value in e._asdict().items()} for e in cpuid.entries]


def _provenance(value: object) -> dict[str, str]:
    return {name: _text(how) for name, how in _table(value, FIELDS).items()}


def _notes(value: object) -> tuple[str, ...]:
    return tuple(_text(item) for item in _items(value))


class _Codec(NamedTuple):
    """How one field is read from JSON or TOML, and written."""

    read: Callable[[object], Any]
    write: Callable[[Any], Any]


_TEXT = _Codec(_text, str)
_MASK = _Codec(integer, hex)
_NAMES = _Codec(_names, sorted)

FIELDS: dict[str, _Codec] = {
    "name": _TEXT,
    "vendor": _TEXT,
    "source": _TEXT,
    "xcr0": _MASK,
    "xss": _MASK,
    "kvm_xcr0": _MASK,
    "guest_permission": _MASK,
    "xsave2_size": _Codec(integer, int),
    "mxcsr_mask": _MASK,
    "x87_pointer_bits": _Codec(lambda value: integer(value, 65), int),
    "kernel": _Codec(_kernel, _write_kernel),
    "xsave": _NAMES,
    "features": _NAMES,
    "layout": _Codec(_layout, _write_layout),
    "provenance": _Codec(_provenance, dict),
    "notes": _Codec(_notes, list),
    "cpuid": _Codec(_cpuid, _write_cpuid),
}
"""Every field of `Host`, in the order in which they are written."""


def to_dict(host: Host) -> dict[str, Any]:
    """Return a host as plain values, what is not known left out."""
    values = ((name, codec, getattr(host, name)) for name, codec in FIELDS.items())
    return {name: codec.write(value) for name, codec, value in values if value not in (None, ())}


def from_dict(data: object, path: str = "host", where: str = "host") -> Host:
    """Return the host that plain values describe; the inverse of `to_dict`.

    Without a ``provenance`` in it, every fact is marked ``given``.

    Raises
    ------
    FormatError
        If a field is unknown, or has an impossible value; the message names the field.
    """
    at = where
    try:
        table = _table(data, FIELDS)
        if "name" not in table:
            raise ValueError("expected a name, got none")
        values = {}
        for name, value in table.items():
            at = f"{where}.{name}"
            values[name] = FIELDS[name].read(value)
    except ValueError as error:
        raise FormatError(path, None, f"{at}: {error}") from None
    facts = table.keys() - {"name", "source", "notes"}
    values.setdefault("provenance", dict.fromkeys(sorted(facts), "given"))
    return Host(**values)


def parse_json(document: object, path: str) -> dict[str, Any]:
    """Return a JSON value that is an object. Raises FormatError if it is another."""
    if not isinstance(document, dict):
        raise FormatError(path, None, f"expected a JSON object, got {document!r:.40}")
    return document


def read_json(text: str, path: str) -> dict[str, Any]:
    """Return a JSON document. Raises FormatError if it is none, no object, or costs too much."""
    check_json(text, path)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(path, None, f"not JSON: {error}") from None
    return parse_json(document, path)


def read_toml(text: str, path: str) -> list[Host]:
    """Return the hosts of a description in TOML. Raises FormatError if it is none."""
    check_toml(text, path)
    try:
        return hosts_of(tomllib.loads(text), path)
    except (ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(path, None, f"not TOML: {error}") from None


def hosts_of(document: dict[str, Any], path: str) -> list[Host]:
    """Return the hosts of a description, JSON or TOML, that has been parsed.

    Raises
    ------
    FormatError
        If the document is not of this schema.
    """
    if document.get("schema") != SCHEMA:
        found = document.get("schema")
        raise FormatError(path, None, f"expected schema {SCHEMA!r}, got {found!r:.40}")
    hosts = document.get("hosts")
    if not isinstance(hosts, list) or not hosts:
        raise FormatError(path, None, "expected a list with a host in it, got none")
    if len(hosts) > HOSTS_LIMIT:
        raise FormatError(path, None, f"expected at most {HOSTS_LIMIT} hosts, got {len(hosts)}")
    return [from_dict(host, path, f"hosts[{i}]") for i, host in enumerate(hosts)]


def to_json(hosts: Iterable[Host]) -> str:
    """Return a description as JSON text."""
    document = {"schema": SCHEMA, "hosts": [to_dict(host) for host in hosts]}
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def to_toml(hosts: Iterable[Host]) -> str:
    """Return a description as TOML text."""
    lines = [f"schema = {_toml(SCHEMA)}"]
    for host in hosts:
        lines += ["", "[[hosts]]"]
        lines += [f"{name} = {_toml(value, 2)}" for name, value in to_dict(host).items()]
    return "\n".join(lines) + "\n"


def _toml(value: object, wrap: int = 0) -> str:
    """Return one value in TOML; a list of tables has one a line at the outermost level."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        items = [_toml(item) for item in value]
        if wrap and value and isinstance(value[0], dict):
            return "[\n" + "".join(f"  {item},\n" for item in items) + "]"
        return "[" + ", ".join(items) + "]"
    return json.dumps(value, ensure_ascii=False)
