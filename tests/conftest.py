"""Where tests find their files; a test that needs what is not here says so and is skipped."""

import lzma
import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

HERE = Path(__file__).parent

# A shell starts what is in its background with Ctrl-C ignored, which programs under test inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

# CI tries the same examples every time; elsewhere each run tries new ones.
settings.register_profile("xfast", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("xfast")

FIRST = ("test_crash.py", "test_filter_live.py")
"""What forks its process at every system call, which is cheap while that is small."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run those of `FIRST` first; all else keeps its order."""
    items.sort(key=lambda item: item.path.name not in FIRST)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of recordings and samples beside the project."""
    folder = HERE.parents[1] / "shared"
    if not folder.is_dir():
        pytest.skip("../shared is not here")
    return folder


@pytest.fixture(scope="session")
def data() -> Path:
    """Return the project's own copies of real files."""
    return HERE / "data"


@pytest.fixture(scope="session")
def stream(data: Path) -> bytes:
    """Return a QEMU stream of two vCPUs that hold no leak."""
    return lzma.decompress((data / "qemu/q72-max-smp2-q35.qemustate.xz").read_bytes())


@pytest.fixture(scope="session")
def leak(data: Path) -> bytes:
    """Return a QEMU stream with the PKRU leak of Linux 5.16."""
    return lzma.decompress((data / "qemu/q72-kvm-pkru-leak-bv207.qemustate.xz").read_bytes())
