"""What the README says is so: its library example runs, its tables are the program's."""

import re
from pathlib import Path

from xfast.cli.main import VERBS
from xfast.judge.rules import RULES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_library_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "intel-broadwell@6.12 incompatible ['LEAK']" in out
    assert "0x1fa0" in out
    assert out.endswith("False\n")


def test_every_rule_and_verb_is_listed():
    rows = dict(re.findall(r"^\| `([A-Z0-9-]+)` \| (.*) \|$", README, re.M))
    assert rows == {rule.code: rule.title for rule in RULES.values()}
    for verb in VERBS:
        assert f"`xfast {verb} " in README


def test_every_module_named_exists():
    for path in re.findall(r"^    (xfast/\S+)", README, re.M):
        assert (ROOT / path).exists(), path
