"""The man page and the completions are what the parser says, and they are installed."""

import shutil
import subprocess
import sys

import make_manual
import pytest

ROOT = make_manual.ROOT
HOW = "python docs/make_manual.py writes it anew"


def test_the_man_page_is_what_the_parser_says():
    assert (ROOT / make_manual.MAN).read_text() == make_manual.manual(), HOW


@pytest.mark.parametrize("shell", make_manual.SHELLS)
def test_the_completions_are_what_the_parser_says(shell):
    pytest.importorskip("shtab", reason="needs shtab")
    path = ROOT / make_manual.SHELLS[shell]
    assert path.read_text() == make_manual.completions(shell), HOW


def test_the_man_page_has_no_mistake_that_man_knows():
    if not shutil.which("man") or not shutil.which("groff"):
        pytest.skip("needs man and groff")
    done = subprocess.run(
        ["man", "--warnings", "-l", str(ROOT / make_manual.MAN)],
        capture_output=True, text=True, env={"MANWIDTH": "90", "PATH": "/usr/bin:/bin"},
        timeout=60, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    assert "XFAST HOST BASELINE" in done.stdout
    assert "\\" not in done.stdout.replace("\\\n", "")  # one example has a line that goes on


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["xfast", "che"], ["check"]), (["xfast", "check", "x", "--onl"], ["--only"])],
)
def test_bash_completes(words, expected):
    script = (
        f"source {make_manual.SHELLS['bash']}; COMP_WORDS=({' '.join(words)}); "
        f"COMP_CWORD={len(words) - 1}; _shtab_xfast; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split() == expected, done.stderr


def test_a_wheel_installs_them(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "setup.py", "-q", "install_data", "-d", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    for path in (make_manual.MAN, *make_manual.SHELLS.values()):
        assert (tmp_path / path).exists(), done.stderr
