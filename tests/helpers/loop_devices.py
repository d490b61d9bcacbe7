"""Block devices for tests: files attached to loop devices, where this machine lets us."""

import shutil
import subprocess
from contextlib import contextmanager

import pytest


@contextmanager
def loop_device(path):
    """Attach a file to a loop device, where this machine lets us."""
    if not shutil.which("losetup"):
        pytest.skip("losetup is not here")
    done = subprocess.run(
        ["losetup", "--find", "--show", path], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    name = done.stdout.strip()
    try:
        yield name
    finally:
        subprocess.run(["losetup", "--detach", name], check=True)
