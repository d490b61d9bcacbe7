"""The house itself: who may import whom, what an import costs, how large a room is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import xfast

PACKAGE = Path(xfast.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

FLOORS = (
    {"features", "errors", "_bench", "_convert", "_core", "_cpu", "_hw", "_memory"},
    {"layout"},
    {"cpuid", "rules"},
    {"area", "behaviour", "rows", "transfer", "verdict"},
    {"registers", "processor", "instructions", "hosts", "snapshots"},
    {"kvm"},
    {"requirement"},
    {"findings", "findings_criu"},
    {"judge"},
    {"repair", "rewrite", "record", "amend", "report", "difference"},
    {"convert", "bench"},
    {"cli", "verbs"},
    {"__main__", "__init__"},
)
"""The floors, lowest first; a module imports from its own floor or a lower one."""

FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}
VERB_FUNCTIONS = {"complain", "hosts_of", "layout_named", "reading_arguments", "snapshots_of"}


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "xfast":
            words = node.module.split(".")
            for alias in node.names:
                yield (words[1] if words[1:] else alias.name), alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("xfast."):
                    yield alias.name.split(".")[1], ""


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    level = FLOOR[room(path)]
    for target, name in imports(path):
        if target == "cli" and name in VERB_FUNCTIONS:
            continue  # a verb's module shares the command line's ways of reading
        assert FLOOR[target] <= level, f"{path.name} imports xfast.{target}"


def test_formats_neither_judge_nor_print():
    for path in (PACKAGE / "snapshots").glob("*.py"):
        assert {t for t, _ in imports(path)} <= {
            "area", "cpuid", "errors", "features", "layout", "registers", "snapshots",
        }  # fmt: skip
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


@pytest.mark.parametrize(("what", "milliseconds"), [("import xfast", 15), ("xfast.check", 60)])
def test_import_time_beyond_numpy(what, milliseconds):
    before = "" if what.startswith("import") else "import xfast;"
    code = (
        f"import numpy, time; {before} a = time.perf_counter(); {what}; "
        "print(time.perf_counter() - a)"
    )
    assert min(float(python(code)) for _ in range(7)) < milliseconds / 1000


@pytest.mark.parametrize("words", [["--version"], ["explain", "LEAK"], ["explain"]])
def test_words_that_need_no_numpy(words):
    code = (
        f"import sys; from xfast.cli import main\ntry: main({words!r})\n"
        "except SystemExit: pass\nprint('numpy' in sys.modules)"
    )
    assert python(code).splitlines()[-1] == "False"
