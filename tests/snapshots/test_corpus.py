"""What the fuzzer kept: each input of the small corpus is taken without a finding."""

from pathlib import Path

import pytest

from xfast.store import put

CORPUS = Path(__file__).parents[2] / "fuzz" / "corpus"


@pytest.fixture(scope="module")
def targets():
    import targets

    return targets.TARGETS


@pytest.fixture(autouse=True)
def _patched_from(monkeypatch):
    """Have what a target sets put back: from which size on files are patched."""
    monkeypatch.setattr(put, "PATCH_FROM", put.PATCH_FROM)


def test_every_folder_is_a_target(targets):
    assert {path.name for path in CORPUS.iterdir()} <= set(targets)


@pytest.mark.parametrize(
    "path", sorted(CORPUS.glob("*/*")), ids=lambda p: f"{p.parent.name}-{p.name[:12]}"
)
def test_an_input_of_the_corpus(targets, path):
    targets[path.parent.name].run(path.read_bytes())


def test_the_seeds_of_every_target(targets):
    for target in targets.values():
        for data in target.seeds():
            target.run(data)
