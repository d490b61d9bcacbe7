"""Where tests find their files; a test that needs what is not here says so and is skipped."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


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
