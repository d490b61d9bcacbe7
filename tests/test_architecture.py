"""The house itself: who may import whom, what an import costs, how large a room is."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import xfast

PACKAGE = Path(xfast.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
CYTHON = sorted(path for end in ("pyx", "pxd", "pxi") for path in PACKAGE.rglob(f"*.{end}"))

FLOORS = (
    {"errors", "version", "_core", "engine"},
    {"xsave"},
    {"kernels"},
    {"hosts", "snapshots"},
    {"kvm"},
    {"judge", "store"},
    {"messages", "repair", "report"},
    {"arrow", "fleet"},
    {"bench"},
    {"cli"},
    {"__main__", "__init__"},
)
"""The floors, lowest first; a module imports from its own floor or a lower one."""

FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in MODULES + CYTHON}


def room(name: str) -> str:
    return [*name.split("."), "__init__"][1]


def imports(path: Path):
    """Yield the modules that a Python file imports, those for type checkers included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "xfast":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in NAMES else node.module
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "xfast":
                    yield alias.name


def cimports(path: Path):
    """Yield the modules that a Cython file cimports or includes."""
    text = path.read_text()
    yield from re.findall(r"^from (xfast[\w.]*) c?import", text, re.M)
    for name in re.findall(r'^include "(\w+)\.pxi"', text, re.M):
        yield f"xfast.engine.{name}"


@pytest.mark.parametrize("path", MODULES + CYTHON, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    level = FLOOR[room(name_of(path))]
    for target in (imports if path.suffix == ".py" else cimports)(path):
        assert FLOOR[room(target)] <= level, f"{path.name} imports {target}"


def test_nothing_imports_in_a_circle():
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        graph.setdefault(name_of(path), set()).update(imports(path))
    for path in CYTHON:
        graph.setdefault(name_of(path), set()).update(cimports(path))
    for name, targets in graph.items():
        targets.discard(name)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_formats_neither_judge_nor_print():
    for path in (PACKAGE / "snapshots").rglob("*.py"):
        rooms = {room(target) for target in imports(path)}
        assert rooms <= {"errors", "engine", "kernels", "snapshots", "xsave", "__init__"}, path
        assert "print(" not in path.read_text()


def test_no_module_bears_the_name_of_a_public_function():
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert not (modules | folders) & set(xfast.__all__)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_stay_readable_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 600  # "about 500"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_fit_on_a_page(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            doc = ast.get_docstring(node, clean=False) or ""
            lines = node.end_lineno - node.lineno - doc.count("\n")
            assert lines <= 75, f"{node.name}: {lines} lines"


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout


def test_every_public_name_exists():
    for name in xfast.__all__:
        assert getattr(xfast, name) is not None
    assert xfast.__version__
    assert set(xfast.__all__) <= set(dir(xfast))
    with pytest.raises(AttributeError, match="nothing"):
        _ = xfast.nothing


def test_import_stays_light():
    loaded = python("import xfast, sys; xfast.check; print(*sys.modules)").split()
    assert "numpy" in loaded
    assert not {"pyarrow", "fsspec", "distributed", "rich", "argparse"} & set(loaded)


@pytest.mark.parametrize(
    ("what", "own", "all_told"), [("import xfast", 1, 2), ("xfast.check", 32, 64)]
)
def test_an_import_loads_few_modules_beyond_numpy(what, own, all_told):
    before = "" if what.startswith("import") else "import xfast;"
    code = (
        f"import numpy, sys; {before} old = set(sys.modules); {what}; "
        "new = set(sys.modules) - old; print(sum(n.startswith('xfast') for n in new), len(new))"
    )
    found = [int(word) for word in python(code).split()]
    assert found[0] <= own
    assert found[1] <= all_told, found


@pytest.mark.parametrize("words", [["--version"], ["explain", "LEAK"], ["explain"]])
def test_words_that_need_no_numpy(words):
    code = (
        f"import sys; from xfast.cli.main import main\ntry: main({words!r})\n"
        "except SystemExit: pass\nprint('numpy' in sys.modules)"
    )
    assert python(code).splitlines()[-1] == "False"
