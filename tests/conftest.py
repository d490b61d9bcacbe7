"""Where tests find their files; a test that needs what is not here says so and is skipped."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

HERE = Path(__file__).parent

# CI tries the same examples every time; elsewhere each run tries new ones.
settings.register_profile("xfast", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("xfast")


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
