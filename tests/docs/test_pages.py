"""The pages say what the program does: every block runs, and every link leads somewhere."""

import re
from pathlib import Path

import make_picture
import pages
import pytest

ROOT = Path(__file__).parents[2]


PAGES = {str(path.relative_to(ROOT)): path for path in pages.pages()}


NEEDS = {
    "docs/scale.md": ("pyarrow",),
    "docs/howto/data.md": ("duckdb", "polars", "pyarrow"),
    "docs/howto/fleet.md": ("pyarrow",),
}
"""What a page's blocks import beyond what xfast itself needs."""


@pytest.mark.parametrize("name", PAGES)
def test_blocks_print_what_the_page_says(name, tmp_path, monkeypatch):
    monkeypatch.delenv("XFAST_ISA", raising=False)
    for module in NEEDS.get(name, ()):
        pytest.importorskip(module, reason=f"needs {module}")
    for ran in pages.run_page(PAGES[name], tmp_path):
        if not ran.same:
            assert ran.found == ran.told, "python docs/pages.py --update writes it anew"


@pytest.mark.parametrize("name", PAGES)
def test_blocks_are_of_a_kind_that_is_known(name):
    kinds = re.findall(r"^```(\w*)\n(?:.*\n)*?```$", PAGES[name].read_text(), re.M)
    assert set(kinds) <= {"console", "python", "text", "toml", "json", "sql", "yaml"}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files(name):
    path = PAGES[name]
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_the_picture_is_what_check_prints():
    assert (ROOT / "docs" / "check.svg").read_text() == make_picture.draw(make_picture.answer())


def test_three_points_stand_for_any_lines():
    assert pages.Ran("", "$ a\n...\nz\n", "$ a\nb\nc\nz\n").same
    assert pages.Ran("", "$ a\n...\n", "$ a\n").same
    assert not pages.Ran("", "$ a\n...\nz\n", "$ a\nb\n").same
    assert not pages.Ran("", "$ a\nb\n", "$ a\nb\nc\n").same
