"""Random access, expansion with a limit, and putting things back as they were."""

import bz2
import gzip
import io
import lzma
import os
import random
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xfast.errors import FormatError, XfastError
from xfast.snapshots.bytes import codecs
from xfast.snapshots.bytes.source import Source, View
from xfast.snapshots.model import Splice

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    zstd = pytest.importorskip("backports.zstd")

lz4 = pytest.importorskip("lz4.frame")

PAYLOAD = bytes(range(256)) * 9000
PACKERS = {
    "bzip2": bz2.compress,
    "gzip": gzip.compress,
    "lz4": lz4.compress,
    "xz": lzma.compress,
    "zstd": zstd.compress,
}
UNPACKERS = {
    "gzip": gzip.decompress,
    "bzip2": bz2.decompress,
    "lz4": lambda data: lz4.open(io.BytesIO(data)).read(),
    "xz": lzma.decompress,
    "zstd": zstd.decompress,
}


def libvirt_image(body, number, xml=b"<domstatus/>"):
    """Return a libvirt save image with `body` in it."""
    data = xml + bytes(200)
    return b"LibvirtQemudSave" + struct.pack("<5I56x", 2, len(data), 1, number, 0) + data + body


def write(folder, data, name="file"):
    path = folder / name
    path.write_bytes(data)
    return path


def rewritten(source, splices, folder):
    with open(folder / "out", "wb") as out:
        source.rewrite(splices, out)
    return (folder / "out").read_bytes()


def test_reads_what_is_there_and_counts_it(tmp_path):
    with Source.open(write(tmp_path, PAYLOAD)) as source:
        assert source.size == len(PAYLOAD)
        assert source.container == ()
        before = source.bytes_read
        assert before < 100
        assert source.read(700, 300) == PAYLOAD[700:1000]
        assert source.unpack(">HI", 4) == (0x0405, 0x06070809)
        assert source.bytes_read == before + 306
        assert b"".join(source.chunks(5, 2_000_000)) == PAYLOAD[5:2_000_000]


@pytest.mark.parametrize(("offset", "length"), [(-1, 4), (0, -1), (98, 3), (1 << 70, 1), (0, 101)])
def test_refuses_what_is_outside(tmp_path, offset, length):
    with (
        Source.open(write(tmp_path, bytes(100))) as source,
        pytest.raises(FormatError, match=f"offset {offset}: expected {length} bytes, got "),
    ):
        source.read(offset, length)


@pytest.mark.parametrize("codec", PACKERS)
def test_compressed_files_are_read_through_and_rewritten_as_they_were(tmp_path, codec):
    half = len(PAYLOAD) // 2
    packed = PACKERS[codec](PAYLOAD[:half]) + PACKERS[codec](PAYLOAD[half:])
    with Source.open(write(tmp_path, packed)) as source:
        assert source.container == (codec,)
        assert source.read(0, source.size) == PAYLOAD
        assert rewritten(source, [], tmp_path) == packed
        edit = Splice(1_500_000, PAYLOAD[1_500_000:1_500_004], b"abcd")
        result = UNPACKERS[codec](rewritten(source, [edit], tmp_path))
    assert result == PAYLOAD[:1_500_000] + b"abcd" + PAYLOAD[1_500_004:]


def test_zstd_keeps_checksum_and_content_size(tmp_path):
    flag = zstd.CompressionParameter.checksum_flag
    for checksum in (False, True):
        for size in (len(PAYLOAD), None):
            packer = zstd.ZstdCompressor(options={flag: checksum})
            packer.set_pledged_input_size(size)
            packed = packer.compress(PAYLOAD[:1000]) + packer.compress(PAYLOAD[1000:])
            with Source.open(write(tmp_path, packed + packer.flush())) as source:
                result = rewritten(source, [Splice(0, PAYLOAD[:2], b"QEMU")], tmp_path)
            assert result[4] & 4 == checksum * 4
            assert zstd.get_frame_info(result).decompressed_size == (size and size + 2)
            assert zstd.decompress(result) == b"QEMU" + PAYLOAD[2:]


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("store_size", [False, True])
def test_lz4_keeps_checksums_block_mode_and_content_size(tmp_path, checksum, linked, store_size):
    packed = lz4.compress(
        PAYLOAD,
        block_size=lz4.BLOCKSIZE_MAX256KB,
        block_linked=linked,
        content_checksum=checksum,
        block_checksum=checksum,
        store_size=store_size,
    )
    with Source.open(write(tmp_path, packed)) as source:
        result = rewritten(source, [Splice(0, PAYLOAD[:2], b"QEMU")], tmp_path)
    wanted = {**lz4.get_frame_info(packed), "content_size": store_size * (len(PAYLOAD) + 2)}
    assert lz4.get_frame_info(result) == wanted
    assert lz4.decompress(result) == b"QEMU" + PAYLOAD[2:]


@pytest.mark.parametrize(
    "check", [lzma.CHECK_NONE, lzma.CHECK_CRC32, lzma.CHECK_CRC64, lzma.CHECK_SHA256]
)
def test_xz_keeps_its_check(tmp_path, check):
    packed = lzma.compress(PAYLOAD, check=check)
    with Source.open(write(tmp_path, packed)) as source:
        result = rewritten(source, [Splice(0, PAYLOAD[:2], b"QE")], tmp_path)
    assert result[:12] == packed[:12]
    assert lzma.decompress(result) == b"QE" + PAYLOAD[2:]


@pytest.mark.parametrize("name", ["", "state", "state.gz", "zust\xe4nde.gz.gz"])
@pytest.mark.parametrize("extra", [b"", b"\3\0abc"])
def test_gzip_keeps_name_and_time(tmp_path, name, extra):
    packed = bytearray(gzip.compress(PAYLOAD, mtime=1_700_000_000))
    packed[3] = 8 * bool(name) | 4 * bool(extra)
    packed[10:10] = extra + (name.encode("latin-1") + b"\0" if name else b"")
    with Source.open(write(tmp_path, packed)) as source:
        result = rewritten(source, [Splice(0, PAYLOAD[:2], b"QE")], tmp_path)
    assert result[3] == 8 * bool(name)
    assert struct.unpack_from("<I", result, 4) == (1_700_000_000,)
    if name:
        assert result[10:].startswith(name.encode("latin-1") + b"\0")
    assert gzip.decompress(result) == b"QE" + PAYLOAD[2:]


@pytest.mark.parametrize(("number", "codec"), [(1, "gzip"), (2, "bzip2"), (3, "xz"), (5, "zstd")])
def test_libvirt_bodies_are_read_through_and_keep_their_header(tmp_path, number, codec):
    pack = PACKERS[codec]
    image = libvirt_image(pack(PAYLOAD), number)
    with Source.open(write(tmp_path, image)) as source:
        assert source.container == ("libvirt-save", codec)
        assert source.read(0, source.size) == PAYLOAD
        result = rewritten(source, [Splice(0, PAYLOAD[:2], b"QE")], tmp_path)
    assert result[: source.body] == image[: source.body]
    assert UNPACKERS[codec](result[source.body :]) == b"QE" + PAYLOAD[2:]


@pytest.mark.parametrize(
    "what", ["earlier in PATH", "another's", "writable", "exchangeable", "nowhere"]
)
def test_a_tenants_lzop_does_not_run(tmp_path, monkeypatch, what):
    """What is sought by name, or what others can write, would be a tenant's program as root."""
    folder = tmp_path / "bin"
    folder.mkdir()
    folder.chmod(0o775 if what == "exchangeable" else 0o755)
    program = folder / "lzop"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o777 if what == "writable" else 0o755)
    if what == "another's":
        if os.geteuid():
            pytest.skip("only root can give a file away")
        os.chown(program, 4321, 4321)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    if what != "earlier in PATH":
        places = (f"{folder}/none",) if what == "nowhere" else (f"{folder}/lzop",)
        monkeypatch.setattr(codecs, "LZOP", places)
    with pytest.raises(XfastError, match=r"found damage|only root can write|ended with"):
        Source.open(write(tmp_path, libvirt_image(b"\x89LZO", 4)))
    assert not (tmp_path / "ran").exists()


def test_lzop_bodies_go_through_the_program_or_say_what_is_missing(tmp_path):
    try:
        body = subprocess.run(["lzop", "-c"], input=PAYLOAD, stdout=-1, check=True).stdout
    except FileNotFoundError:
        path = write(tmp_path, libvirt_image(b"\x89LZO", 4))
        with pytest.raises(XfastError, match="expected a program that only root can write"):
            Source.open(path)
        return
    with Source.open(write(tmp_path, libvirt_image(body, 4))) as source:
        assert source.container == ("libvirt-save", "lzop")
        assert source.read(0, source.size) == PAYLOAD
        result = rewritten(source, [Splice(0, PAYLOAD[:2], b"QE")], tmp_path)
        again = subprocess.run(["lzop", "-dc"], input=result[source.body :], stdout=-1, check=True)
    assert again.stdout == b"QE" + PAYLOAD[2:]


@pytest.mark.parametrize("size", [1 << 63, (1 << 64) - 1])
def test_a_part_larger_than_any_file_is_refused(size):
    """A disk image may say so of a snapshot's state: an OverflowError once, found by fuzzing."""
    with Source.of(bytes(8)) as source, pytest.raises(FormatError, match=f"got {size}"):
        source.view(4, size)


def test_a_missing_zstd_module_is_named(tmp_path, monkeypatch):
    path = write(tmp_path, zstd.compress(PAYLOAD))
    monkeypatch.setitem(sys.modules, zstd.__name__.partition(".")[0], None)
    with pytest.raises(
        XfastError, match=r"zstd: expected .*, got none: pip install 'xfast\[zstd\]'"
    ):
        Source.open(path)


def test_layers_within_layers(tmp_path):
    image = gzip.compress(libvirt_image(lzma.compress(PAYLOAD), 3))
    with Source.open(write(tmp_path, image)) as source:
        assert source.container == ("gzip", "libvirt-save", "xz")
        assert rewritten(source, [], tmp_path) == image
        result = gzip.decompress(rewritten(source, [Splice(0, PAYLOAD[:1], b"Q")], tmp_path))
    assert lzma.decompress(result[source.body :]) == b"Q" + PAYLOAD[1:]


def test_endless_layers_are_refused(tmp_path):
    data = PAYLOAD
    for _ in range(9):
        data = gzip.compress(data)
    with pytest.raises(FormatError, match="expected fewer layers"):
        Source.open(write(tmp_path, data))


@pytest.mark.parametrize("codec", PACKERS)
def test_a_bomb_stops_at_the_limit(tmp_path, codec):
    path = write(tmp_path, PACKERS[codec](bytes(64 << 20)))
    with pytest.raises(FormatError, match="expected at most 8388608 bytes, got more"):
        Source.open(path, expand_limit=8 << 20)


@pytest.mark.parametrize("codec", PACKERS)
def test_without_a_word_the_limit_is_64_mebibytes_for_a_small_file(tmp_path, codec):
    path = write(tmp_path, PACKERS[codec](bytes(65 << 20)))
    with pytest.raises(FormatError, match=r"at most 67108864 bytes, got more: .*--expand-limit"):
        Source.open(path)
    with Source.open(path, expand_limit=1 << 30) as source:
        assert source.size == 65 << 20


@pytest.mark.parametrize("codec", PACKERS)
def test_damage_is_one_clear_line(tmp_path, codec):
    packed = PACKERS[codec](random.Random(1).randbytes(100_000))
    for broken in (packed[:-9], packed[:10] + bytes(50) + packed[60:]):
        with pytest.raises(FormatError, match=r"file: offset \d+: found damage in what") as caught:
            Source.open(write(tmp_path, broken))
        assert "\n" not in str(caught.value)


def test_what_is_no_regular_file_is_refused_without_being_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name, words in ((tmp_path, "directory"), (tmp_path / "fifo", "pipe"), ("/dev/zero", "")):
        with pytest.raises(
            FormatError, match=f"expected a file or a block device, got a .*{words}"
        ):
            Source.open(name)
    with pytest.raises(XfastError, match="can't be opened: No such file"):
        Source.open(tmp_path / "none")


@pytest.mark.parametrize("way", ["pipe", "file"])
def test_standard_input(tmp_path, way):
    script = (
        "import hashlib; from xfast.snapshots.bytes.source import Source\n"
        "with Source.open('-') as s: print(s.path, s.container, s.read(s.size - 4, 4).hex())"
    )
    packed = gzip.compress(PAYLOAD)
    feed = {"input": packed}
    if way == "file":
        feed = {"stdin": open(write(tmp_path, packed), "rb")}  # noqa: SIM115
    result = subprocess.run([sys.executable, "-c", script], stdout=-1, check=True, **feed)
    feed.get("stdin", io.BytesIO()).close()
    assert result.stdout.decode().strip() == "- ('gzip',) fcfdfeff"


def test_a_view_maps_back_to_the_file(tmp_path):
    runs = {0: 4096, 1: None, 2: 0, 3: 8192}
    with Source.open(write(tmp_path, PAYLOAD)) as source:

        def locate(at):
            start = runs[at // 1024]
            return (None if start is None else start + at % 1024), 1024 - at % 1024

        view = View(source, 4096, locate)
        part = view.view(24)
        zeros = bytes(1024)
        whole = PAYLOAD[4096:5120] + zeros + PAYLOAD[:1024] + PAYLOAD[8192:9216]
        assert view.read(0, 4096) == whole
        assert part.read(1000, 2000) == whole[1024:3024]
        assert part.runs(3000, 100) == [(976, 48), (8192, 52)]
        assert part.runs(1000, 4) == [(None, 4)]
        with pytest.raises(FormatError):
            part.read(4000, 100)


@given(
    cuts=st.lists(st.tuples(st.integers(0, 5000), st.binary(max_size=40)), max_size=6),
)
def test_splices_change_exactly_their_bytes(tmp_path_factory, cuts):
    folder = tmp_path_factory.mktemp("splices")
    edits, expected, end = [], bytearray(PAYLOAD), 0
    for offset, new in sorted(cuts):
        if offset >= end:
            edits.append(Splice(offset, PAYLOAD[offset : offset + len(new)], new))
            expected[offset : offset + len(new)] = new
            end = offset + len(new)
    path = write(folder, PAYLOAD)
    with Source.open(path) as source:
        assert rewritten(source, edits, folder) == expected
        with open(path, "r+b") as file:
            source.patch(edits, file.fileno())
    assert path.read_bytes() == expected


def test_a_copy_keeps_the_holes_of_a_sparse_file(tmp_path):
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        for place in (0, 1 << 30, 8 << 30):
            file.seek(place)
            file.write(PAYLOAD[:9000])
        file.truncate(16 << 30)
    with Source.open(path) as source, open(tmp_path / "out", "wb") as out:
        source.rewrite([Splice((8 << 30) + 1, b"\1", b"x")], out)
    assert (tmp_path / "out").stat().st_size == 16 << 30
    assert (tmp_path / "out").stat().st_blocks <= path.stat().st_blocks + 64
    with Source.open(tmp_path / "out") as copy:
        assert copy.read(1 << 30, 9000) == PAYLOAD[:9000]
        assert copy.read((8 << 30) - 1, 4) == b"\0\0x\2"


def test_splices_that_do_not_fit_change_nothing(tmp_path):
    path = write(tmp_path, PAYLOAD)
    with Source.open(path) as source, open(path, "r+b") as file:
        with pytest.raises(FormatError, match="found other bytes than mxcsr had"):
            source.patch([Splice(0, b"x", b"y", "mxcsr")], file.fileno())
        with pytest.raises(FormatError, match="got edits that change its length"):
            source.patch([Splice(0, PAYLOAD[:1], b"yy")], file.fileno())
        with pytest.raises(ValueError, match="expected edits apart"):
            source.patch([Splice(0, PAYLOAD[:2], b"yy"), Splice(1, b"\1", b"z")], file.fileno())
    assert path.read_bytes() == PAYLOAD


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({0: b"LibvirtQemudPart"}, "expected a whole libvirt save, got an unfinished one"),
        ({16: struct.pack("<I", 1)}, "expected libvirt save version 2, got 1"),
        ({28: struct.pack("<I", 9)}, "expected libvirt save format 0 to 6, got 9"),
        ({20: struct.pack("<I", 1 << 31)}, "bytes of XML, got 2147483648"),
        ({20: struct.pack("<I", 1 << 20)}, "expected 1048576 bytes, got 212"),
        ({32: struct.pack("<I", 5000)}, "expected the cookie within .* got it at 5000"),
    ],
)
def test_libvirt_headers_that_lie(tmp_path, change, words):
    image = bytearray(libvirt_image(b"", 0))
    for offset, new in change.items():
        image[offset : offset + len(new)] = new
    with pytest.raises(FormatError, match=words):
        Source.open(write(tmp_path, image))


def test_an_edit_is_checked_against_the_file_and_not_against_what_was_read(tmp_path):
    """The head that a source keeps stood in for the file: a change since then was written over."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    with Source.open(path) as source:
        source.read(0, 200)
        path.write_bytes(bytes(50) + bytes(range(50, 200)))
        stale = Splice(20, bytes(range(20, 24)), b"abcd", "a field")
        with path.open("r+b") as file, pytest.raises(FormatError, match="found other bytes"):
            source.patch([stale], file.fileno())
        fresh = Splice(60, bytes(range(60, 64)), b"abcd", "a field")
        with path.open("r+b") as file:
            source.patch([fresh], file.fileno())
        assert source.read(0, 100)[58:66] == b"\x3a\x3babcd\x40\x41"
