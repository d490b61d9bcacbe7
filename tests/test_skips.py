"""The page of skips: what runs say goes into it, and comes out of it."""

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
SKIPS = runpy.run_path(str(DOCS / "make_skips.py"))

RUN = """\
..ss.                                                                    [100%]
=========================== short test summary info ============================
SKIPPED [3] tests/engine/test_hw.py:105: this machine has no PKRU (XCR0 bit 9)
SKIPPED [1] tests/engine/test_hw.py:109: this machine has no PKRU (XCR0 bit 9)
SKIPPED [2] tests/kvm/test_qemu.py: QEMU is not here | or not ours
4031 passed, 6 skipped in 61.53s (0:01:01)
"""


def test_a_run_is_read_and_reasons_of_one_kind_are_counted_together():
    assert SKIPS["parse_run"](RUN) == {
        ("engine/test_hw.py", "this machine has no PKRU (XCR0 bit 9)"): 4,
        ("kvm/test_qemu.py", "QEMU is not here / or not ours"): 2,
    }


@pytest.mark.parametrize("text", ["", "1 failed, 3 passed in 2s", "2 skipped in 1s"])
def test_a_run_that_failed_or_did_not_finish_is_refused(text):
    with pytest.raises(ValueError, match="expected a run without failures"):
        SKIPS["parse_run"](text)


def test_the_page_holds_what_the_runs_said():
    runs = {"one": SKIPS["parse_run"](RUN), "two": SKIPS["parse_run"]("3 passed in 1s")}
    assert SKIPS["parse_page"](SKIPS["render"](runs)) == runs


def test_the_page_is_as_its_script_writes_it():
    page = (DOCS / "skips.md").read_text("utf-8")
    assert SKIPS["render"](SKIPS["parse_page"](page)) == page
