"""Each help has examples that parse, says the exit codes, and describes every option."""

import argparse
import re
import shlex

import pytest

from xfast.cli.main import VERBS, parser_for
from xfast.hosts.readers import READERS


def parsers(parser=None):
    """Yield every parser of the command line: its own, each verb's, and those below."""
    parser = parser or parser_for(*VERBS)
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from parsers(sub)


PARSERS = {parser.prog: parser for parser in parsers()}


@pytest.mark.parametrize("name", PARSERS)
def test_a_help_has_two_examples_that_parse(name):
    text = PARSERS[name].format_help()
    assert "exit codes: 0 " in text
    lines = re.findall(r"^  (.*\bxfast .*)$", text.split("examples:\n")[1], re.M)
    assert len(lines) >= 2
    for line in lines:
        (command,) = re.findall(r"\b(xfast [^|<>]*)", line)
        words = shlex.split(command)[1:]
        assert command.startswith(name.split()[0])
        assert parser_for(words[0]).parse_args(words).verb == words[0]


@pytest.mark.parametrize("name", PARSERS)
def test_a_help_names_its_own_verb(name):
    (examples,) = re.findall(r"examples:\n(.*?)\n\n", PARSERS[name].format_help(), re.S)
    assert len(re.findall(rf"\b{name}\b", examples)) >= 2


@pytest.mark.parametrize("name", PARSERS)
def test_every_option_is_described(name):
    for action in PARSERS[name]._actions:
        if not isinstance(action, argparse._SubParsersAction):
            assert action.help, f"{name}: {action.option_strings or action.dest}"
            assert len(action.help.split()) > 1


def test_the_help_of_host_names_every_kind_of_file():
    text = " ".join(PARSERS["xfast host show"].format_help().split())
    refused = {"a Firecracker CPU template"}
    shown = {"a host description in JSON": "in JSON", "a host description in TOML": "TOML"}
    for reader in READERS:
        if reader.title not in refused:
            assert shown.get(reader.title, reader.title) in text
