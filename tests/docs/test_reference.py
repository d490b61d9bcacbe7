"""The generated pages are what the tables say, and the site has all pages."""

import re
import subprocess
import sys

import make_reference
import pytest

ROOT = make_reference.ROOT


@pytest.mark.parametrize("name", make_reference.PAGES)
def test_a_generated_page_is_what_the_tables_say(name):
    text = (ROOT / "docs" / name).read_text()
    assert text == make_reference.PAGES[name](), "python docs/make_reference.py writes it anew"


def test_the_site_has_every_page():
    menu = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert menu == {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}


def test_every_public_name_is_in_the_reference():
    import xfast

    text = (ROOT / "docs" / "api.md").read_text()
    for name in xfast.__all__:
        home = xfast._HOME[name]
        assert f"::: {home}.{name}\n" in text or f"::: {home}\n" in text, name


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings", reason="needs mkdocs-material and mkdocstrings")
    pytest.importorskip("material", reason="needs mkdocs-material")
    words = ["-W", "ignore", "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "KVM_SET_XSAVE" in (tmp_path / "rules.html").read_text()
    assert "classify" in (tmp_path / "api.html").read_text()
