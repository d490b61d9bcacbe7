"""What files are that xfast recognises and does not read: one table, for errors that name them.

A file that is no snapshot may belong to somebody else: an error says what kind of file it is, and
shows none of its bytes.

*Source*: VirtualBox src/VBox/VMM/VMMR3/SSM.cpp (SSMFILEHDR_MAGIC_BASE); illumos and VMware headers
of the suspended state (CPTDUMP_MAGIC_NUMBER); Linux kdump and makedumpfile
(diskdump_mod.h, makedumpfile.h); gVisor pkg/state/statefile/statefile.go (magicHeader);
Hyper-V VMRS headers as dissect.hypervisor documents them; libvirt, QEMU and util-linux tables of
disk images.
"""

from __future__ import annotations

from typing import NamedTuple

from xfast.snapshots.bytes.source import Source

HEAD_SIZE = 8192


class Signature(NamedTuple):
    """The bytes by which a file is known, and why it is not read."""

    magic: bytes
    name: str
    reason: str = ""
    offset: int = 0


UNITS = "its units are described by its source code alone"
NO_STATE = "it holds no extended state"
DISK = "a disk holds no state of CPUs"
UNPACK = "unpack it first"

SIGNATURES = (
    Signature(b"\x7fVirtualBox SavedState V", "a VirtualBox saved state (.sav)", UNITS),
    *(
        Signature(bytes.fromhex(magic), "a VMware suspended state (.vmss, .vmsn)", UNITS)
        for magic in ("d0be d2be", "d1ba d1ba", "d2be d2be", "d3be d3be", "d0be d0be")
    ),
    Signature(bytes.fromhex("14 20 28 01"), "a Hyper-V saved state (.vmrs, .vmcx)", UNITS),
    Signature(b"gVisorSF", "a gVisor checkpoint", "it is a graph of gVisor's own objects"),
    Signature(b"KDUMP   ", "a kdump (compressed kernel dump)", NO_STATE),
    Signature(b"DISKDUMP", "a diskdump (compressed kernel dump)", NO_STATE),
    Signature(b"makedumpfile\0", "a flattened kdump (makedumpfile -F)", NO_STATE),
    Signature(b"PAGEDU64", "a Windows kernel dump (MEMORY.DMP)", "its contexts are not decoded"),
    Signature(b"PAGEDUMP", "a Windows kernel dump (MEMORY.DMP)", "its contexts are not decoded"),
    *(
        Signature(magic, "a Windows hibernation file (hiberfil.sys)", "it is compressed memory")
        for magic in (b"HIBR", b"hibr", b"WAKE", b"wake", b"RSTR")
    ),
    Signature(b"S1SUSPEND", "a Linux hibernation image", "it is compressed memory", 4086),
    Signature(b"EMiL", "a LiME memory dump", NO_STATE),
    Signature(b"## checkpoint generated:", "a gem5 checkpoint (m5.cpt)", "it has no XSAVE area"),
    Signature(b"VMA\0", "a Proxmox backup (VMA)", "restore it, or take a snapshot with its RAM"),
    Signature(bytes.fromhex("cffaedfe"), "a Mach-O file", NO_STATE),
    Signature(b"KDMV", "a VMware disk image (VMDK)", DISK),
    Signature(b"COWD", "a VMware disk image (VMDK)", DISK),
    Signature(b"# Disk DescriptorFile", "a VMware disk image (VMDK)", DISK),
    Signature(b"vhdxfile", "a Hyper-V disk image (VHDX)", DISK),
    Signature(b"conectix", "a Hyper-V disk image (VHD)", DISK),
    Signature(bytes.fromhex("7f10dabe"), "a VirtualBox disk image (VDI)", DISK, 64),
    Signature(b"\x89LZO\0\r\n\x1a\n", "an lzop file", UNPACK),
    Signature(bytes.fromhex("02214c18"), "a legacy lz4 file (lz4 -l)", UNPACK),
    Signature(b"\x1f\x9d", "a compress file (.Z)", UNPACK),
    Signature(b"\x1f\xa0", "a compress file (.Z)", UNPACK),
    Signature(b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    Signature(b"PK\3\4", "a zip archive", UNPACK),
    Signature(b"Rar!\x1a\x07", "a rar archive", UNPACK),
    Signature(b"<?xml", "an XML text", NO_STATE),
    Signature(b"<domain", "a libvirt domain's XML", NO_STATE),
)


def found_in(source: Source) -> str:
    """Return what a file is that no reader takes: one clause, without any of its bytes."""
    head = source.read(0, min(HEAD_SIZE, source.size))
    for magic, name, reason, offset in SIGNATURES:
        if head[offset : offset + len(magic)] == magic:
            return f"expected a snapshot, got {name}: {reason}"
    if not head:
        what = "it is empty"
    elif not head.strip(b"\0"):
        what = "it begins with zeros"
    elif _is_text(head):
        what = "it is a text"
    else:
        what = "it is binary data"
    return f"not a snapshot format that xfast knows ({what}); for a bare XSAVE area give --layout"


def _is_text(head: bytes) -> bool:
    """Tell whether bytes are a text in UTF-8, the last character of which may be cut off."""
    try:
        text = head[:-3].decode() if len(head) == HEAD_SIZE else head.decode()
    except UnicodeDecodeError as problem:
        if problem.end < len(head) - 3:
            return False
        text = head[: problem.start].decode()
    return all(c.isprintable() or c.isspace() for c in text)
