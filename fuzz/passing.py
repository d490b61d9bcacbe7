"""Targets for what comes by and is not kept: streams in a pipe, the filter, pasted messages."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator

import snapshot_files as files
from deeper import HOSTS
from qemu_files import qcow2_image, undescribed, with_pages

from xfast import check, snapshots
from xfast.errors import FormatError, PolicyError
from xfast.messages.answer import answers, lines_of
from xfast.messages.table import messages
from xfast.repair.filter import Filter, Wanted
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.qemu.forward import from_pipe

SCREEN = 4000
"""No line of an answer is longer (characters)."""


class Pieces(io.BytesIO):
    """Bytes that come in pieces, as through a pipe; how large, the bytes before tell."""

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read a piece."""
        place = self.tell()
        size = 1 + 37 * (self.getbuffer()[place - 1] if place else 3)
        return super().readinto(buffer[:size])


def forward(data: bytes) -> None:
    """Read a stream as it comes through a pipe, in pieces of any size, and at once.

    Both ways say the same: how it was cut is no matter of the stream.
    """
    found = []
    for file in (Pieces(data), io.BytesIO(data)):
        try:
            with from_pipe("-", file, 4 << 20) as source:  # type: ignore[arg-type]
                form = snapshots.format_named("qemu")
                form.sniff(source)
                found.append([vcpu.area.tobytes() for vcpu in form.read(source)[0].vcpus])
        except FormatError:
            found.append([])
    assert found[0] == found[1]


def passed(data: bytes, wanted: Wanted) -> bytes | None:
    """Return what a filter lets through; None if it refuses.

    Then all passed as it came; or a verdict fell, the end is missing, and no EOF record passed.
    """
    source, target = os.memfd_create("source"), os.memfd_create("target")
    os.write(source, data)
    os.lseek(source, 0, os.SEEK_SET)
    one = Filter(source, target, wanted)
    try:
        one.run()
        return os.pread(target, len(data) + 4096, 0)
    except (FormatError, PolicyError):
        out = os.pread(target, len(data) + 4096, 0)
        assert data.startswith(out) or (one.plan is not None and one.passed < one.end)
        return None
    finally:
        os.close(source)
        os.close(target)


def through(data: bytes) -> None:
    """Pass a stream through the filter: what comes out is as long, and the host takes it."""
    for host in HOSTS[:2]:
        out = passed(data, Wanted(host))
        if out is None:
            continue
        assert len(out) <= len(data)
        with Source.of(out) as source:
            try:
                (snapshot,) = snapshots.format_named("qemu").read(source)
            except FormatError:  # of a description's end, which QEMU skips, a filter knows nothing
                continue
        (verdict,) = check(snapshot, host)
        refused = [finding for finding in verdict.findings if finding.severity == "blocks"]
        assert not refused, refused[0]


def explain(data: bytes) -> None:
    """Explain a pasted text: each line of an answer is one line, and fits."""
    for one in answers(data.decode("utf-8", "replace")):
        for line in lines_of(one):
            assert "\n" not in line
            assert len(line) < SCREEN, len(line)


def streams() -> Iterator[bytes]:
    """Return streams with and without memory, description, footers."""
    yield files.qemu_stream()
    yield undescribed(files.qemu_stream())
    yield files.qemu_stream(files.qemu_devices(xstate_bv=0x207))
    yield files.qemu_stream(footers=False)
    yield with_pages(files.qemu_stream())
    yield undescribed(with_pages(files.qemu_stream()))


def images() -> Iterator[bytes]:
    """Return disk images with internal snapshots, and a stream in an image of libvirt's."""
    stream = files.qemu_stream()
    yield qcow2_image([("a", stream), ("b", undescribed(stream))], disk_size=0, base=8192)
    text = b"<domain type='kvm'><vcpu>2</vcpu></domain>\0"
    head = b"LibvirtQemudSave" + b"".join(
        number.to_bytes(4, "little") for number in (2, len(text), 1, 0, 0)
    )
    yield head.ljust(92, b"\0") + text + stream


def pasted() -> Iterator[bytes]:
    """Return texts that messages are known for, as their patterns have them, and some logs."""
    for message in messages():
        yield "\n".join(message.literals).encode()
    yield b"qemu-kvm: error: failed to set MSR 0xda0 to 0x0\nkvm: CPUID.07H:EBX.avx512f [bit 16]"
    yield b"x86/fpu: Enabled xstate features 0x2e7, context size is 2440 bytes"
    yield b'{"log": "missing features: avx512f,pku &amp; la57\\n\\u001b[31mos error 22"}'
