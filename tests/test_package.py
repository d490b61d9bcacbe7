"""What is built, and what a tree says that is not built or lacks an extra."""

import io
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from wheel_contents import problems

import xfast

ROOT = Path(__file__).parents[1]
SOURCE = Path(xfast.__file__).parent
WHEEL = {
    "xfast/_core.cpython-311-x86_64-linux-gnu.so": b"\x7fELF",
    "xfast/_core.pxd": b"",
    "xfast/_core.pyi": b"",
    "xfast/py.typed": b"",
    "xfast/engine/loops_plain.cpython-311-x86_64-linux-gnu.so": b"\x7fELF",
    "xfast/engine/simd.h": b"",
    "xfast/hosts/catalogue.toml": b"",
    "xfast/messages/messages.toml": b"",
    "xfast/fleet/report.css": b"",
    "xfast-1.0.dist-info/licenses/LICENSE": b"",
    "xfast-1.0.dist-info/entry_points.txt": b"",
}


def packed(files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
    return zipfile.ZipFile(file)


def test_a_complete_wheel_has_no_problems():
    assert list(problems(packed(WHEEL))) == []


@pytest.mark.parametrize("name", WHEEL)
def test_whatever_a_wheel_lacks_is_told(name):
    (problem,) = problems(packed({key: WHEEL[key] for key in WHEEL.keys() - {name}}))
    assert problem.startswith("missing: ")


@pytest.mark.parametrize(
    "name", ["tests/conftest.py", "xfast/engine/hw.c", "xfast/_core.pyx", "xfast/__pycache__/a.pyc"]
)
def test_what_a_wheel_should_not_hold_is_told(name):
    assert list(problems(packed(WHEEL | {name: b""}))) == [f"not to be in a wheel: {name}"]


def test_a_path_of_the_building_machine_is_told():
    """Wheels had pyenv's folder as run path, and pip's random one in their debug information."""
    name = "xfast/_core.cpython-311-x86_64-linux-gnu.so"
    (problem,) = problems(packed(WHEEL | {name: b"\x7fELF\0/tmp/build-x1/numpy\0"}))
    assert problem.endswith("got /tmp/build-x1/numpy")


def test_install_commands_name_extras_that_exist():
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"].keys()
    texts = [*SOURCE.rglob("*.py"), ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    told = {
        extra
        for path in texts
        for extras in re.findall(r"pip install '(?:xfast|\.)\[(.+?)\]'", path.read_text())
        for extra in extras.split(",")
    }
    told = (told - {"{0}"}) | {"zstd", "lz4"}  # `codecs` fills in its own names
    assert told >= {"arrow", "cluster"}
    assert told <= extras


@pytest.fixture(scope="module")
def unbuilt(tmp_path_factory):
    """Return a tree with the sources alone, nowhere installed."""
    tree = tmp_path_factory.mktemp("unbuilt")
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(SOURCE, tree / "xfast", ignore=ignored)
    return tree


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["--version"], 0, rf"xfast {xfast.__version__} \(engine not built, Python 3\.\d+.*\)"),
        (["check", "x"], 3, r"xfast: cannot import name .*; `pip install \.` in the source .*"),
    ],
)
def test_a_tree_that_is_not_built_says_so_in_a_line(unbuilt, words, code, expected):
    done = subprocess.run(
        [sys.executable, "-m", "xfast", *words], cwd=unbuilt, env={"PYTHONPATH": str(unbuilt)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert re.fullmatch(expected, (done.stdout + done.stderr).strip())
