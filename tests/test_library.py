"""`import xfast` for those who build on it: names, types, and what is accepted where."""

import ast
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import xfast
from xfast.errors import FormatError, LayoutError, XfastError

EXAMPLES = Path(__file__).parents[1] / "examples" / "snapshots"
LEAK = EXAMPLES / "q72-kvm-pkru-leak-bv207.qemustate"
BLOB = EXAMPLES / "kvm618-guestxcr0_e7-bve7.xsave"
HOSTS = ["intel-broadwell@6.12", "amd-milan@6.12"]


def test_checkers_see_the_names_that_are_there():
    """The imports for type checkers are the table by which names are found."""
    tree = ast.parse(Path(xfast.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == xfast._HOME
    assert set(xfast.__all__) == set(typed)


CLIENT = """
import numpy as np
import xfast

(snapshot,) = xfast.read("x.qemustate")
verdicts = xfast.check(snapshot, ["amd-milan@6.12"])
reveal_type(snapshot)
reveal_type(verdicts[0].verdict)
reveal_type(xfast.preset("intel"))
reveal_type(xfast.plan_fix)
areas = xfast.empty(3, "intel")
reveal_type(areas)
xfast.check(snapshot, 3)
"""


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_a_client_gets_real_types(tmp_path, checker):
    if checker == "mypy":
        pytest.importorskip("mypy", reason="mypy is not installed")
        command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "client.py"]
    else:
        if not shutil.which("pyright", path=Path(sys.executable).parent):
            pytest.skip("pyright is not installed")
        command = [
            str(Path(sys.executable).with_name("pyright")),
            "--pythonpath",
            sys.executable,
            "client.py",
        ]
    (tmp_path / "client.py").write_text(CLIENT)
    root = Path(xfast.__file__).parents[1]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/bin", "MYPYPATH": str(root), "PYTHONPATH": str(root),
             "HOME": str(tmp_path)},
    )  # fmt: skip
    out = done.stdout
    for expected in ("Snapshot", "str", "Layout", "Plan", "unsignedinteger"):
        assert expected in out, out + done.stderr
    assert '"Any"' not in out
    errors = [line for line in out.splitlines() if "error:" in line]
    assert len(errors) == 1, out
    assert "check" in errors[0] or "arg" in errors[0]


def test_read_takes_paths_bytes_buffers_files_and_arrays():
    data = LEAK.read_bytes()
    (expected,) = xfast.read(LEAK)
    with LEAK.open("rb") as file:
        for what in (str(LEAK), data, bytearray(data), memoryview(data), file):
            (found,) = xfast.read(what)
            assert found.vcpus[0].area.tobytes() == expected.vcpus[0].area.tobytes()
    areas = np.fromfile(BLOB, np.uint8)
    (found,) = xfast.read(areas, layout="amd-zen4")
    assert found.vcpus[0].layout == xfast.preset("amd-zen4")


def test_walk_names_the_snapshots_of_a_tree():
    names = {Path(name).name for name in xfast.walk([EXAMPLES])}
    assert LEAK.name in names
    assert "kvm618-guestxcr0_e7.xcrs" not in names


def test_hosts_are_accepted_by_name():
    (snapshot,) = xfast.read(LEAK)
    by_name = xfast.check(snapshot, HOSTS)
    by_value = xfast.check(snapshot, [xfast.resolve(name) for name in HOSTS])
    assert by_name == by_value
    assert xfast.check(snapshot, HOSTS[0]) == by_name[:1]
    assert xfast.check(snapshot, xfast.resolve(HOSTS[0])) == by_name[:1]
    with pytest.raises(XfastError, match="nobody"):
        xfast.check(snapshot, "nobody")


def test_layouts_are_accepted_by_name():
    intel, zen4 = xfast.preset("intel"), xfast.preset("amd-zen4")
    areas = xfast.empty(3, "intel")
    areas[:, :4096] = np.fromfile(BLOB, np.uint8)
    for name, layout in (("amd-zen4", zen4), ("intel", intel)):
        assert (xfast.classify(areas, name).live == xfast.classify(areas, layout).live).all()
        assert (xfast.xinuse(areas, name) == xfast.xinuse(areas, layout)).all()
    moved = xfast.relayout(areas, "amd-zen4", "intel")
    assert (moved == xfast.relayout(areas, zen4, intel)).all()
    assert not xfast.diff(areas, moved, "amd-zen4", "intel").any()
    assert xfast.Registers(areas, "amd-zen4")["mxcsr"].shape == (3,)
    with pytest.raises(LayoutError, match=r"expected one of intel.*got 'vax'"):
        xfast.classify(areas, "vax")


def test_answers_compare_hash_pickle_and_print():
    (snapshot,) = xfast.read(LEAK)
    verdicts = xfast.check(snapshot, HOSTS)
    assert pickle.loads(pickle.dumps(verdicts)) == verdicts
    assert len({*verdicts, *xfast.check(snapshot, HOSTS)}) == len(HOSTS)
    assert str(verdicts).splitlines()[0].split() == [HOSTS[0], "incompatible"]
    page = verdicts._repr_html_()
    assert "<table>" in page
    assert "PKRU" in page or "pkru" in page
    evil = xfast.check(snapshot, xfast.resolve(HOSTS[0]).replace(name="<script>"))
    assert "<script>" not in evil._repr_html_()
    one = verdicts[0]._repr_html_()
    assert one.count("<tr>") == 2
    assert one.count("<td>") == 5
    plan = xfast.plan_fix(snapshot, HOSTS[0])
    assert plan == xfast.plan_fix(snapshot, xfast.resolve(HOSTS[0]))
    assert isinstance(plan, xfast.Plan)
    assert all(isinstance(change, xfast.Change) for change in plan.changes)


def test_empty_batches_are_empty_answers():
    none = np.empty((0, 4096), np.uint8)
    assert xfast.classify(none, "intel").live.shape == (0,)
    assert xfast.headers(none).xstate_bv.shape == (0,)
    assert xfast.relayout(none, "intel", "amd-zen4").shape[0] == 0
    assert xfast.check(xfast.read(LEAK)[0], []) == []


def test_what_an_error_quotes_of_a_file_is_one_short_line():
    """Found by fuzzing: a section's name of 255 zeros was quoted as a thousand characters."""
    problem = FormatError("vm", 3, "expected ram, got " + "\n\x1b" * 5000)
    assert str(problem).isprintable()
    assert len(str(problem)) < 700
    assert str(problem).startswith(r"vm: offset 3: expected ram, got \x0a\x1b")


def test_snapshots_and_vcpus_compare():
    """`==` raised numpy's ValueError about the truth of an array."""
    one, two = (xfast.read(LEAK)[0] for _ in range(2))
    assert one == two
    assert pickle.loads(pickle.dumps(one)) == one
    two.vcpus[0].area = two.vcpus[0].area.copy()
    two.vcpus[0].area[200] ^= 1
    assert one != two
    assert one.vcpus[0] != two.vcpus[0]
    assert one.vcpus[0] != "a vCPU"
    two = xfast.read(LEAK)[0]
    two.vcpus[0].xcr0 = 3
    assert one.vcpus[0] != two.vcpus[0]


def test_walk_takes_one_path_as_well_as_several(tmp_path):
    """A str was taken apart into its letters."""
    (tmp_path / "a.xsave").write_bytes(b"")
    several = list(xfast.walk([tmp_path]))
    assert several == list(xfast.walk(tmp_path)) == list(xfast.walk(str(tmp_path)))
    assert [str(path) for path in several] == [str(tmp_path / "a.xsave")]


def test_bare_areas_are_fixed_by_names_of_layout_and_host():
    area = xfast.read(LEAK)[0].vcpus[0].area
    host = xfast.resolve("amd-milan@6.12")
    named = xfast.fix_areas(area, "intel", "amd-milan@6.12", guest=7)
    given = xfast.fix_areas(area, xfast.preset("intel"), host, guest=7)
    assert (named.areas == given.areas).all()
    assert named.dropped == given.dropped == 0x200


@pytest.mark.parametrize("bad", [3, None, [1, 2], {"a": 1}])
def test_what_can_not_be_read_is_named_with_what_can(bad):
    with pytest.raises(TypeError, match=f"expected a path, .* got {type(bad).__name__}"):
        xfast.read(bad)


def test_a_plan_prints_in_a_line_and_its_repr_holds_no_arrays():
    (snapshot,) = xfast.read(LEAK)
    plan = xfast.plan_fix(snapshot, HOSTS[0])
    assert str(plan).endswith(f"on {HOSTS[0]}: 1 change, incompatible before, identical after")
    assert "array(" not in repr(plan)
    assert len(repr(plan)) < 3000
