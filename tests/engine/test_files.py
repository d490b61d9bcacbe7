"""The loops that readers of files share, against slow references in Python."""

import json
import os
import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xfast.engine import files

WIDE = st.text('[]{}"\\,:0123456789 abé€\U0001f600', max_size=40)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=12,
)
NEXT = re.compile(r'[^"\[\]{}]*+(["\[\]{}])')
STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


def slow_closed(text, start):
    position, depth = start, 0
    while match := NEXT.match(text, position):
        position = match.end()
        if match[1] == '"':
            string = STRING.match(text, position - 1)
            if string is None:
                return ~(position - 1)
            position = string.end()
        elif match[1] in "[{":
            depth += 1
        else:
            depth -= 1
            if not depth:
                return position
    return ~start


@given(WIDE)
def test_closed_finds_the_end_that_the_regular_expressions_find(text):
    for start, first in enumerate(text):
        if first in "[{":
            assert files.closed(text, start) == slow_closed(text, start)


@given(WIDE)
def test_tokens_are_counted_as_in_the_text(text):
    strings = text.count('"') - text.count('\\"')
    assert files.tokens(text) == text.count("[") + text.count("{") + strings // 2


@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=6), st.sampled_from([None, 1]))
def test_members_are_those_of_json(value, indent):
    text = json.dumps(value, indent=indent)
    found = files.members(text, 0)
    if found is None:  # a key with an escape
        assert any("\\" in json.dumps(key) for key in value)
        return
    assert {key: json.loads(text[a:b]) for key, (a, b) in found.items()} == value


@given(WIDE)
def test_members_of_anything_end_inside(text):
    found = files.members("{" + text, 0) or {}
    assert all(0 < a < b <= len(text) + 1 for a, b in found.values())


@given(st.text(max_size=30))
def test_unescaped_says_what_json_says(value):
    text = json.dumps(value, ensure_ascii=False)
    found = files.unescaped(text, 0, len(text))
    assert found in (None, value)
    if re.fullmatch(r'[ !#-\[\]-~"\\]*', value):
        assert found == value


@given(st.text('"\\ab', max_size=12))
def test_unescaped_takes_no_string_that_json_refuses(body):
    text = f'"{body}"'
    found = files.unescaped(text, 0, len(text))
    try:
        assert found in (None, json.loads(text))
    except ValueError:
        assert found is None


@given(st.text("[]0123456789,  -.a", max_size=30) | st.lists(st.integers(0, 300)).map(str))
def test_a_list_of_bytes_is_one_for_json_too(text):
    found = files.byte_list(text, 0, len(text))
    try:
        value = json.loads(text)
    except ValueError:
        assert found is None
        return
    simple = type(value) is list and value and all(type(v) is int and v < 256 for v in value)
    if found is not None:
        assert simple
        assert list(found) == value
    elif simple:
        assert "-" in text  # -0


ROWS = st.lists(
    st.fixed_dictionaries(
        {"index": st.integers(-1, 1 << 65) | st.integers(0, 9), "data": st.integers(0, 9)},
        optional={"more": st.integers(0, 9), "é": st.none() | st.integers(0, 9)},
    ),
    max_size=4,
)


@given(ROWS, st.integers(0, 200), st.sampled_from('0,x}]" -'), st.booleans())
def test_records_are_those_of_json(rows, at, wrong, damaged):
    text = json.dumps(rows, ensure_ascii=False)
    if damaged:
        text = text[:at] + wrong + text[at + 1 :]
    found = files.records(text, 0, len(text), ("index", "data"))
    if found is not None:
        assert found == [(row["index"], row["data"]) for row in json.loads(text)]
    elif not damaged and rows:
        numbers = [value for row in rows for value in row.values()]
        assert any(value is None or not 0 <= value < 10**19 for value in numbers)


@given(st.text("[]0123456789,  \n-a", max_size=60), st.integers(1, 1 << 33))
def test_numbers_are_all_or_none(text, limit):
    out = np.zeros(8, np.uint64)
    found = files.numbers(text, 0, len(text), limit, out)
    values = [int(word) for word in re.findall(r"\d+", text)]
    bad = re.search(r"[-a]", text) or any(v >= limit for v in values) or len(values) > 8
    bad = bad or text.count(",") >= 8
    long = any(len(word) > 19 for word in re.findall(r"\d+", text))
    assert found == (-1 if bad or long else len(values))
    assert found < 0 or out[:found].tolist() == values


def test_swapped_words_and_zeros_around_them():
    rng = random.Random(7)
    data = rng.randbytes(64)
    runs = np.array([[1, 8, 8, 40], [9, 16, 4, 0], [30, 6, 2, 20], [60, 3, 1, 61]], np.int32)
    out = np.full(64, 0xAA, np.uint8)
    files.swap_runs(data, runs, out)
    wanted = np.zeros(64, np.uint8)
    for start, length, unit, target in runs.tolist():
        words = np.frombuffer(data, np.uint8)[start : start + length].reshape(-1, unit)
        wanted[target : target + length] = words[:, ::-1].reshape(-1)
    assert np.array_equal(out, wanted)


@pytest.mark.parametrize(
    "run",
    [(60, 8, 8, 0), (-1, 8, 8, 0), (0, 8, 8, 57), (0, 8, 8, -1), (0, 6, 8, 0), (0, 8, 3, 0),
     (2**31 - 1, 8, 8, 0), (0, 0, 1, 0)],
)  # fmt: skip
def test_runs_that_lie_outside_are_refused(run):
    with pytest.raises(ValueError, match="runs: expected"):
        files.swap_runs(bytes(64), np.array([run], np.int32), np.zeros(64, np.uint8))


def test_big_endian_numbers_at_places():
    data = bytes(range(1, 17))
    places = np.array([[0, 8], [15, 1], [14, 4], [-1, 0], [4, 4], [0, 9], [16, 1]], np.int32)
    assert files.big_endian(data, places) == (
        int.from_bytes(data[:8], "big"), 16, None, None, 0x05060708, None, None,
    )  # fmt: skip


def test_marks_hold_where_every_byte_does():
    marks = files.Marks(np.array([1, 3]), b"ac", np.array([0]), np.array([5]))
    assert marks.hold(b"xa.c.x", 0)
    assert marks.hold(b"__xa.c.x", 2)
    assert not marks.hold(b"xa.c.x", 1)
    assert not marks.hold(b"xa.c.x", -1)
    for at in (0, 1, 3, 5):
        data = bytearray(b"xa.c.x")
        data[at] ^= 1
        assert not marks.hold(bytes(data), 0)
    with pytest.raises(ValueError, match="as many places"):
        files.Marks(np.array([1]), b"", np.array([0]), np.array([5]))
    with pytest.raises(ValueError, match="from 0 on"):
        files.Marks(np.array([-1]), b"a", np.array([0]), np.array([5]))


@pytest.mark.parametrize("last", ["file", "f\xe4", "\u4e2d", "\udcff"])
def test_opening_tells_what_the_system_tells(tmp_path, last):
    path = tmp_path / last
    for size in (0, 1, 511, 512, 513, 65_536, 65_537):
        path.write_bytes(bytes(range(256)) * (size // 256) + bytes(size % 256))
        for name, folder in ((str(path), None), (last, os.open(tmp_path, os.O_RDONLY))):
            fd, (mode, stamp, head) = files.opened(name, f"{path}.journal", folder)
            status = os.fstat(fd)
            wanted = (status.st_dev, status.st_ino, size, status.st_mtime_ns)
            assert (mode, stamp) == (status.st_mode, wanted)
            assert head == (path.read_bytes() if size <= 65_536 else path.read_bytes()[:512])
            assert not os.get_inheritable(fd)
            for one in (fd, folder):
                if one is not None:
                    os.close(one)


def test_opening_leaves_anything_else_to_the_caller(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x")
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "pipe")
    folder = os.open(tmp_path, os.O_RDONLY)
    before = len(os.listdir("/proc/self/fd"))
    for name in ("", "none", "pipe", ".", "file\0", "file\0\xe4", "file/", "\ud800", "link/x"):
        assert files.opened(f"{tmp_path}/{name}", "no journal") is None
        assert files.opened(name, "no journal", folder) is None
    assert files.opened("link", "no journal", folder) is None  # found, not named
    assert files.opened("/dev/null", "no journal") is None
    (tmp_path / "file.journal").symlink_to("nowhere")
    assert files.opened(str(path), f"{path}.journal") is None
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(folder)
    found = files.opened(str(tmp_path / "link"), "no journal")
    assert found is not None  # named: it is followed
    os.close(found[0])


class Shown(files.Reader):
    """Tells what it is asked for beyond its head."""

    def _fetch(self, offset, length):
        return b"fetched %d %d" % (offset, length)

    def _refuse(self, offset, length):
        return b"refused %d %d" % (offset, length)


def test_what_is_known_is_read_at_once_and_nothing_outside():
    shown = Shown()
    shown.hold("name", -1, (0, (1, 2, 10, 3), b"01234567"))
    assert (shown.path, shown.size, shown.bytes_read) == ("name", 10, 0)
    edges = (-(1 << 70), -(1 << 63), -1, 0, 1, 7, 8, 9, 10, 11, (1 << 63) - 1, 1 << 63, 1 << 70)
    read = 0
    for offset in edges:
        for length in edges:
            found = shown.read(offset, length)
            if offset < 0 or length < 0 or offset + length > 10:
                assert found == b"refused %d %d" % (offset, length)
            elif offset + length > 8:
                assert found == b"fetched %d %d" % (offset, length)
            else:
                assert found == b"01234567"[offset : offset + length]
                read += length
    assert shown.bytes_read == read
    with pytest.raises(TypeError):
        shown.read("0", 1)


def test_a_file_is_closed_once_with_what_is_around_it(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    inner, outer = Shown(), Shown()
    for one in (inner, outer):
        one.hold("name", *files.opened(str(tmp_path / "file"), "no journal"))
    inner.outer = outer
    descriptors = inner.fd, outer.fd
    inner.close()
    inner.close()
    assert (inner.fd, outer.fd) == (-1, -1)
    for fd in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    outer.hold("name", descriptors[0], (0, (1, 2, 3, 4), b""))
    with pytest.raises(OSError, match="Bad file descriptor"):
        outer.close()


def test_each_path_that_is_there_is_told(tmp_path):
    names = [str(tmp_path / name) for name in ("a", "b", "c", "d")]
    for there in range(16):
        for i, name in enumerate(names):
            if there >> i & 1:
                open(name, "w").close()
            elif os.path.exists(name):
                os.unlink(name)
        assert files.present("\0".join(names)) == there
    assert files.present("\ud800") == 0
    assert files.present("") == 0


def test_pieces_are_found_inside_their_bounds():
    data = b"..cpu...cpu"
    for start in range(-2, 14):
        for end in range(-2, 14):
            inside = data[max(start, 0) : max(end, 0)]
            assert files.holds(data, b"cpu", start, end) == (b"cpu" in inside), (start, end)
