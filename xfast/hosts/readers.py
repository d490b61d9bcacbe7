"""Every kind of text and file that tells of a host: one table, first match wins.

A reader says by content whether a document is of its kind, and returns the hosts in it. To add a
kind, add a row. What costs least to tell comes first; the files of snapshots come last, for the
machine that wrote one is a host as well.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from xfast.errors import FormatError, printable
from xfast.hosts import bootlog, cpuid_words, dumps, flags, libvirt, qmp, snapshot, vbox
from xfast.hosts.bounds import SIZE_LIMIT, check_json
from xfast.hosts.derive import from_cpuid
from xfast.hosts.description import hosts_of, parse_json, read_toml
from xfast.hosts.firecracker import read_fingerprint
from xfast.hosts.model import Host

REPLIES_LIMIT = 1024
"""JSON values one after the other, at most: a transcript of QMP."""


class Document:
    """The bytes that describe a host, and what is worked out of them once."""

    def __init__(self, data: bytes, path: str) -> None:
        self.data = data
        self.path = path
        self.name = printable(Path(path).stem)

    @cached_property
    def text(self) -> str:
        """The bytes as text, empty where they are binary.

        UTF-16 is what PowerShell writes; colours are what `dmesg` puts between words.
        """
        if self.data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            text = self.data.decode("utf-16", "replace")
        elif b"\0" in self.data:
            return ""
        else:
            text = self.data.decode("utf-8-sig", "replace")
        return _COLOUR.sub("", text) if "\x1b[" in text else text

    @cached_property
    def documents(self) -> list[Any]:
        """The JSON values one after the other in the text; none where it is not JSON.

        Raises
        ------
        FormatError
            If it starts as JSON and is damaged, or would cost too much.
        """
        text = self.text.lstrip()
        if text[:1] != "{":
            return []
        check_json(text, self.path)
        decoder = json.JSONDecoder(parse_constant=_no_constant)
        found: list[Any] = []
        position = 0
        while position < len(text):
            if len(found) == REPLIES_LIMIT:
                raise FormatError(
                    self.path, None, f"expected at most {REPLIES_LIMIT} JSON values, got more"
                )
            try:
                value, position = decoder.raw_decode(text, position)
            except (ValueError, RecursionError) as error:
                raise FormatError(self.path, None, f"not JSON: {error}") from None
            found.append(value)
            position = _SPACE.match(text, position).end()  # type: ignore[union-attr]
        return found

    def holds(self, *keys: str) -> bool:
        """Return whether the first JSON value has one of these keys."""
        first = self.documents[0] if self.documents else None
        return isinstance(first, dict) and any(key in first for key in keys)

    def one(self) -> dict[str, Any]:
        """Return the one JSON object that this is. Raises FormatError where there are more."""
        if len(self.documents) != 1:
            raise FormatError(
                self.path, None, f"expected one JSON object, got {len(self.documents)}"
            )
        return parse_json(self.documents[0], self.path)


_COLOUR = re.compile(r"\x1b\[[0-9;]{0,20}m")
_SPACE = re.compile(r"\s*")
_TOML = re.compile(r"^[ \t]{0,40}schema[ \t]{0,40}=", re.MULTILINE)


def _no_constant(word: str) -> None:
    raise ValueError(f"expected a finite number, got {word}")


class Reader(NamedTuple):
    """One kind of description: what to call it, how to tell it, how to read it."""

    title: str
    recognise: Callable[[Document], bool]
    read: Callable[[Document], list[Host]]


def _text_reader(
    title: str,
    recognise: Callable[[str], Any],
    read: Callable[[str, str, str], Host],
) -> Reader:
    """Return the reader of a kind of text that describes one host."""
    return Reader(
        title,
        lambda document: bool(recognise(document.text)),
        lambda document: [read(document.text, document.name, document.path)],
    )


def _refuse_template(document: Document) -> list[Host]:
    path = document.path
    raise FormatError(
        path, None, f"expected a host, got a CPU template; HOST+{path} applies it to one"
    )


def _json_reader(
    title: str, keys: tuple[str, ...], read: Callable[[dict[str, Any], str, str], Host]
) -> Reader:
    """Return the reader of a kind of JSON object, told by one of its keys."""
    return Reader(
        title,
        lambda document: document.holds(*keys),
        lambda document: [read(document.one(), document.name, document.path)],
    )


READERS: tuple[Reader, ...] = (
    Reader(
        "struct kvm_cpuid2",
        lambda document: dumps.is_cpuid2(document.data),
        lambda document: [
            from_cpuid(dumps.read_cpuid2(document.data), document.name, document.path, by_kvm=True)
        ],
    ),
    Reader(
        "CRIU's cpuinfo.img",
        lambda document: snapshot.is_cpuinfo(document.data),
        lambda document: [snapshot.read_cpuinfo(document.data, document.name, document.path)],
    ),
    Reader(
        "a host description in JSON",
        lambda document: document.holds("schema"),
        lambda document: hosts_of(document.one(), document.path),
    ),
    _json_reader("a Firecracker fingerprint", ("guest_cpu_config",), read_fingerprint),
    Reader(
        "a Firecracker CPU template",
        lambda document: document.holds("cpuid_modifiers"),
        _refuse_template,
    ),
    _json_reader("lscpu -J", ("lscpu",), flags.read_lscpu),
    _json_reader(
        "xe host-cpu-info",
        ("flags", "features_hvm"),
        lambda document, name, path: flags.of_fields(flags.renamed(document), name, path),
    ),
    Reader(
        "QMP query-cpu-model-expansion",
        lambda document: (
            qmp.find_model(document.documents) is not None or document.holds("QMP", "return")
        ),
        lambda document: [qmp.read(document.documents, document.name, document.path)],
    ),
    Reader(
        "a host description in TOML",
        lambda document: bool(_TOML.search(document.text)),
        lambda document: read_toml(document.text, document.path),
    ),
    _text_reader("cpuid", cpuid_words.is_words, cpuid_words.read),
    _text_reader("cpuid -r", dumps.CPUID_R.search, dumps.read_cpuid_r),
    _text_reader("an InstLatx64 dump", dumps.INSTLAT.search, dumps.read_instlat),
    _text_reader("libvirt's XML", re.compile(r"\A\s*<").match, libvirt.read),
    _text_reader("VBox.log", vbox.is_log, vbox.read),
    _text_reader("a kernel's boot log", bootlog.is_boot_log, bootlog.read),
    _text_reader("/proc/cpuinfo or lscpu", flags.is_flags, flags.read),
)
"""The kinds, in the order in which they are tried."""


def find(document: Document) -> Reader | None:
    """Return the reader of a document's kind, or None."""
    return next((reader for reader in READERS if reader.recognise(document)), None)


def load(path: str) -> list[Host]:
    """Return the hosts that a file describes, or the machine that wrote a snapshot.

    Raises
    ------
    FormatError
        If it is of no kind in READERS and no snapshot, or damaged.
    OSError
        If it can't be read.
    """
    if os.path.isdir(path):
        return snapshot.read(path)
    with open(path, "rb") as file:
        data = file.read(SIZE_LIMIT + 1)
    if len(data) <= SIZE_LIMIT:
        document = Document(data, path)
        reader = find(document)
        if reader is not None:
            return reader.read(document)
    try:
        return snapshot.read(path)
    except FormatError:
        return parse(data, path)  # which says what was expected of a description


def parse(data: bytes, path: str) -> list[Host]:
    """Return the hosts that `data` describes.

    Raises
    ------
    FormatError
        If it is of no kind in READERS, or damaged.
    """
    if len(data) > SIZE_LIMIT:
        raise FormatError(
            path, SIZE_LIMIT, f"expected at most {SIZE_LIMIT} bytes of a host, got more"
        )
    document = Document(data, path)
    reader = find(document)
    if reader is not None:
        return reader.read(document)
    if document.documents:
        keys = ", ".join(map(repr, document.one())) or "none"
        raise FormatError(
            path, None, f"expected a host in JSON (schema 'xfast/1'), got the keys {keys:.60}"
        )
    if b"\0" in data and not document.text:
        found = data.index(b"\0")
        raise FormatError(path, found, "expected a struct kvm_cpuid2 or text, got binary data")
    got = "a text of another kind" if document.text.strip() else "an empty file"
    raise FormatError(
        path, 0, f"expected a host, got {got}: xfast host show --help lists the kinds of file"
    )
