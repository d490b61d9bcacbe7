"""The walk over guest memory: every kind of record, any piece size, and what is not known."""

import lzma
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qemu_files import END_OF_PAGES, PAGES, page, places_of, with_memory

from xfast.engine.walk import NEEDED, Walker

NAMES = (
    "q72-max-smp2-q35",
    "q72-kvm-pkru-leak-bv207",
    "q11-max-smp4-q35",
    "q72-avx512-reinjected-S",
)


@pytest.fixture(scope="session", params=NAMES)
def stream(request, data):
    return lzma.decompress((data / f"qemu/{request.param}.qemustate.xz").read_bytes())


@pytest.fixture(scope="session")
def plain(data):
    return lzma.decompress((data / "qemu/q72-max-smp2-q35.qemustate.xz").read_bytes())


def walked(data, size=1 << 16):
    """Walk over bytes in pieces of `size`."""
    walker = Walker()
    while not walker.stopped:
        at = walker.position
        if not walker.feed(data[at : at + size]) and (at + size >= len(data) or size < NEEDED):
            break
    return walker


def test_real_streams(stream):
    walker = walked(stream)
    assert walker.devices == walker.position == places_of(stream)[0]
    assert not walker.early
    assert walker.trouble is None
    assert stream[walker.head] in (1, 8)


@given(
    kinds=st.lists(st.sampled_from(sorted(PAGES)), max_size=30),
    size=st.integers(NEEDED, 20_000),
)
def test_every_kind_of_page_in_pieces_of_any_size(plain, kinds, size):
    data = with_memory(plain, b"".join(PAGES[kind] for kind in kinds))
    walker = walked(data, size)
    assert walker.trouble is None
    assert walker.devices == places_of(data)[0]


@given(cut=st.integers(0, 9000), kinds=st.lists(st.sampled_from(sorted(PAGES)), max_size=4))
def test_what_is_left_comes_again(plain, cut, kinds):
    data = with_memory(plain, b"".join(PAGES[kind] for kind in kinds))
    cut = min(cut, len(data))
    walker = Walker()
    done = walker.feed(data[:cut])
    assert cut - NEEDED < done <= cut or walker.stopped
    assert walker.position == done
    walker.feed(data[done:])
    assert walker.devices == places_of(data)[0]


UNKNOWN = {
    "a page": (page(0x400), "RAM flags 0x420"),
    "no flags": (struct.pack(">Q", 0x1000), "RAM flags 0x0"),
    "two flags": (page(0x0A, b"\0"), "RAM flags 0x2a"),
    "xbzrle of another kind": (page(0x40, b"\2\0\3abc"), "an xbzrle page of type 2 with 3 bytes"),
    "xbzrle too long": (page(0x40, b"\1\x10\1"), "an xbzrle page of type 1 with 4097 bytes"),
    "compressed too long": (page(0x100, b"\xff" * 4), "a compressed page of 4294967295 bytes"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_pages_that_are_not_known(plain, kind):
    record, words = UNKNOWN[kind]
    at = places_of(plain)[0] + 5 + len(PAGES["page"])
    walker = walked(with_memory(plain, PAGES["page"] + record))
    assert walker.stopped
    assert walker.devices == -1
    assert walker.trouble[:2] == (at, words)


def started(name, version, instance=0):
    return b"\1\0\0\1\0" + bytes([len(name)]) + name + struct.pack(">II", instance, version)


RECORDS = {
    "a section in parts": (started(b"VFIO", 1), "the section 'VFIO', version 1"),
    "another version": (started(b"ram", 5), "the section 'ram', version 5"),
    "a part of nothing": (b"\2\0\0\2\0", "section 512"),
    "an end of nothing": (b"\3\0\0\2\0", "section 512"),
    "a footer of another": (b"\x7e\xff\0\0\0", "a footer of section 4278190080"),
    "postcopy": (b"\x08\0\x08\0\4\0\0\0\0", "the command that begins postcopy"),
    "COLO": (b"\x08\0\x0a\0\0", "the command that begins COLO"),
    "a description": (b"\6\0\0\0\0", "a record of type 0x6"),
    "noise": (b"\xff\0\0\0\0", "a record of type 0xff"),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_records_that_are_not_known(plain, kind):
    record, words = RECORDS[kind]
    at = places_of(plain)[0]
    walker = walked(plain[:at] + record + bytes(20))
    assert walker.trouble[:2] == (at, words)


def test_commands_are_passed_over(plain):
    at = places_of(plain)[0]
    data = plain[:at] + b"\x08\0\x02\0\4abcd" + b"\x08\0\x0b\0\0" + plain[at:]
    assert not walked(data).return_path
    assert walked(data).devices == at + 14
    data = plain[:at] + b"\x08\0\1\0\0" + plain[at:]
    assert walked(data).return_path


def test_a_stream_of_devices_only_and_one_of_nothing(plain):
    at = places_of(plain)[0]
    head = b"QEVM\0\0\0\3"
    walker = walked(head + plain[at:])
    assert (walker.devices, walker.early, walker.head) == (8, True, 8)
    walker = walked(plain[:at] + bytes(9))
    assert (walker.stopped, walker.ended, walker.devices) == (True, True, -1)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"QEVM\0\0\0\2\7", "no QEMU stream"),
        (b"QEVM\0\0\0\3\7\0\0\4\1", "a machine name of 1025 bytes"),
        (b"QEVM\0\0\0\3\7\0\0\0\0\5\5other" + bytes(8), "the subsection other"),
        (
            b"QEVM\0\0\0\3\7\0\0\0\0\5\x1econfiguration/target-page-bits\0\0\0\1\0\0\0\x10",
            "pages of 2^16 bytes",
        ),
        (
            b"QEVM\0\0\0\3\7\0\0\0\0\5\x1aconfiguration/capabilities\0\0\0\1\0\0\1\1",
            "257 capabilities",
        ),
    ],
)
def test_headers_that_are_not_known(data, words):
    assert walked(data).trouble[1] == words


def configured(*capabilities):
    names = b"".join(bytes([len(name)]) + name for name in capabilities)
    return (
        b"QEVM\0\0\0\3\7\0\0\0\2pc\5\x12configuration/uuid\0\0\0\1" + bytes(16)
        + b"\5\x1aconfiguration/capabilities" + struct.pack(">II", 1, len(capabilities)) + names
        + b"\1\0\0\0\1\3ram\0\0\0\0\0\0\0\4"
    )  # fmt: skip


def blocks(*parts):
    return struct.pack(">Q", 0x30004) + b"".join(parts) + END_OF_PAGES + b"\x7e\0\0\0\1"


DEVICE = b"\4\0\0\0\2\5timer" + bytes(16)
LARGE = b"\2pc" + struct.pack(">Q", 0x20000)
SMALL = b"\4bios" + struct.pack(">Q", 0x10000)
HUGE_PAGE = struct.pack(">Q", 2 << 20)


@pytest.mark.parametrize(
    ("capabilities", "list_of_blocks"),
    [
        ([], blocks(LARGE, SMALL)),
        ([], blocks(LARGE, HUGE_PAGE, SMALL)),
        ([], blocks(SMALL, LARGE, HUGE_PAGE)),
        ([b"x-ignore-shared"], blocks(LARGE, bytes(8), SMALL, struct.pack(">Q", 0xFFFC0000))),
        ([b"other", b"x-ignore-shared"], blocks(SMALL, bytes(8), LARGE, bytes(8))),
    ],
)
def test_lists_of_blocks(capabilities, list_of_blocks):
    data = configured(*capabilities) + list_of_blocks + DEVICE
    assert walked(data).devices == len(data) - len(DEVICE)


def test_blocks_that_lie():
    for part, words in (
        (b"\2pc" + struct.pack(">Q", 1 << 63), "a RAM block of 9223372036854775808 bytes"),
        (b"\0" + bytes(8), "a RAM block of 0 bytes with a name of 0"),
    ):
        walker = walked(configured() + blocks(part) + DEVICE)
        assert walker.trouble[1].startswith(words)


def mapped(version, bitmap, pages):
    return struct.pack(">IQQQ", version, 4096, bitmap, pages)


def test_mapped_memory_is_jumped_over():
    head = configured(b"mapped-ram") + struct.pack(">Q", 0x30004) + LARGE
    body = head + mapped(1, 4096, 1 << 40)
    walker = Walker()
    assert walker.feed(body) == len(body)
    walker.jump()
    assert (walker.position, walker.skip) == ((1 << 40) + 0x20000, 0)
    rest = SMALL + mapped(1, 1 << 50, walker.position + 4096)
    rest = rest.ljust(4096 + 0x10000, b"\xff")
    walker.feed(rest + END_OF_PAGES + b"\x7e\0\0\0\1" + DEVICE)
    assert walker.devices == (1 << 40) + 0x20000 + len(rest) + 13
    for lie, words in (
        (mapped(2, 4096, 8192), "mapped-ram, version 2"),
        (mapped(1, 4096, (1 << 64) - 0x20000), "pages at 18446744073709420544"),
    ):
        assert walked(head + lie).trouble[1].startswith(words)
    late = Walker(1 << 30)
    late.feed(head + mapped(1, 4096, 8192))  # offsets are the file's: these lie before the stream
    assert late.trouble[1].startswith("pages at 8192, 131072 bytes")


def bitmap(flags, data=b"", device=b"", name=b""):
    flags |= 8 * bool(device) | 4 * bool(name)
    names = b"".join(bytes([len(word)]) + word for word in (device, name) if word)
    return bytes([flags]) + names + data


def test_dirty_bitmaps(plain):
    at = places_of(plain)[0]
    begin = started(b"dirty-bitmap", 1)
    chunks = [
        bitmap(0x10, b"\0\1\0\0\1", b"node", b"map"),
        bitmap(0x50 - 0x10, struct.pack(">QIQ", 0, 64, 5) + b"\4\5\6\7\1", b"node", b"map"),
        bitmap(0x42, struct.pack(">QI", 64, 64)),
        bitmap(0x20, b"", b"", b"map"),
        bitmap(0x01),
    ]
    data = plain[:at] + begin + b"".join(chunks) + b"\x7e\0\0\1\0" + plain[at:]
    for size in (NEEDED, 1 << 16):
        assert walked(data, size).devices == len(data) - len(plain) + at
    for chunk, words in (
        (bitmap(0x80, b"\0"), "dirty-bitmap flags 0x80"),
        (bitmap(0x40, struct.pack(">QIQ", 0, 1, 1 << 63)), "a bitmap of 9223372036854775808 bytes"),
    ):
        walker = walked(plain[:at] + begin + chunk)
        assert walker.trouble[1] == words


@given(st.binary(max_size=300))
def test_noise_stops_somewhere(plain, noise):
    at = places_of(plain)[0]
    for data in (noise, b"QEVM\0\0\0\3" + noise, plain[:at] + noise, with_memory(plain, noise)):
        walker = walked(data)
        assert walker.position <= len(data)
        assert (walker.trouble is None) or walker.stopped
