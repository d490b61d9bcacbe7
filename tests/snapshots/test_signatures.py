"""Files that are no snapshot, or none that is read: named as what they are, without their bytes."""

import pytest

from xfast import snapshots
from xfast.errors import FormatError
from xfast.snapshots.signatures import SIGNATURES


@pytest.mark.parametrize("signature", SIGNATURES, ids=lambda s: s.magic[:8].hex())
def test_what_is_recognised_and_not_read_is_named(tmp_path, signature):
    path = tmp_path / "file"
    path.write_bytes(bytes(signature.offset) + signature.magic + bytes(range(1, 200)) * 50)
    with pytest.raises(FormatError) as caught:
        snapshots.read(path)
    line = str(caught.value)
    assert signature.name in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "it is empty"),
        (bytes(5000), "it begins with zeros"),
        (b"# notes\nroot:x:0\n", "it is a text"),
        ("Straße\n".encode() * 3000, "it is a text"),
        (b"# notes\x1b[31m", "it is binary data"),
        (bytes(range(256)) * 40, "it is binary data"),
    ],
)
def test_a_file_that_is_no_snapshot_shows_none_of_its_bytes(tmp_path, content, kind):
    path = tmp_path / "secret"
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        snapshots.read(path)
    assert str(caught.value) == (
        f"{path}: not a snapshot format that xfast knows ({kind}); "
        "for a bare XSAVE area give --layout"
    )


def test_a_file_that_only_bears_an_areas_name_shows_none_of_its_bytes(tmp_path):
    """A tenant's link x.xsave to somebody's secrets once printed 16 bytes of them."""
    path = tmp_path / "x.xsave"
    path.write_bytes(b"SECRET42" * 512)
    with pytest.raises(FormatError) as caught:
        snapshots.read(path)
    assert b"SECRET42".hex() not in str(caught.value)
    assert f"{int.from_bytes(b'SECRET42', 'little'):#x}" not in str(caught.value)
