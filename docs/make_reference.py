"""Write the pages that are generated: rules, kernels, commands, formats and JSON fields.

    python docs/make_reference.py

Their sources are the tables of the program, its parser, the README and docs/schema/.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import make_manual

from xfast.cli.main import VERBS, parser_for
from xfast.judge.rules import RULES
from xfast.kernels.behaviour import BEHAVIOURS
from xfast.kvm import render, story

ROOT = Path(__file__).resolve().parents[1]
GENERATED = "<!-- Written by docs/make_reference.py. -->\n\n"
SCHEMA = "schema/xfast-1.json"
ANSWERS = ("show", "check", "check_line", "fix", "record", "diff", "hosts", "baseline", "scan",
           "report")  # fmt: skip
"""The definitions of the schema that are whole answers; the others are parts of them."""


def rules() -> str:
    """Return the page of the rules."""
    text = GENERATED + (
        "# Rules\n\nA finding bears the code of a rule. `xfast explain CODE` prints the same.\n"
        "`--ignore CODE` makes a rule's findings notes.\n"
    )
    for rule in RULES.values():
        call = f"- refused by: `{rule.call}`\n" if rule.call else ""
        mends = f"- how `xfast fix` mends it: {rule.mends}\n" if rule.mends else ""
        text += (
            f"\n## {rule.code}\n\n**{rule.title}**\n\n{rule.text}\n\n{rule.next}\n\n"
            f"{call}{mends}- source: {rule.ref}\n"
        )
    return text


def kernels() -> str:
    """Return the page of the kernels' behaviours, with the story of the leak."""
    rows = "".join(
        f"| `{one.name}` | {_cell(one.effect)}{_cell(f' ({one.note})' if one.note else '')} "
        f"| {', '.join(one.since)} | {_cell(one.ref)} |\n"
        for one in BEHAVIOURS.values()
    )
    return GENERATED + (
        "# Kernels\n\nWhat KVM_GET_XSAVE emits, and what KVM_SET_XSAVE accepts, differs between "
        "kernels, and\ndistributions back-port changes. So a kernel is a set of named "
        "*behaviours*, each with the commit\nthat brought it. A release stands for the behaviours "
        "that kernel.org's had, and this is marked\n`assumed`; `xfast host dump` on the host "
        "*probes* them.\n\n## The story of the leak\n\nThe model replays it, as `xfast explain "
        f"ad856280ddea` does:\n\n```text\n{render(story())}\n```\n\n## Behaviours\n\n"
        "| name | what the kernel does | since | commit |\n|---|---|---|---|\n" + rows
    )


def commands() -> str:
    """Return the page of the commands, a section a verb."""
    text = (
        GENERATED + "# Commands\n\nThe same stands in the man page, and in `xfast VERB --help`.\n"
    )
    for parser in list(make_manual.sections(parser_for(*VERBS)))[1:]:
        depth = "#" * len(parser.prog.split())
        usage = re.sub(r"\\f[BIR]|\\", "", make_manual.synopsis(parser))
        text += f"\n{depth} {parser.prog}\n\n{parser.description}\n\n```text\n{usage}\n```\n\n"
        rows = [
            f"| {_cell(_option(action))} | {_cell(str(action.help))} |\n"
            for action in make_manual.arguments(parser)
        ]
        text += "".join(["| argument | |\n|---|---|\n", *rows, "\n"]) if rows else ""
        epilog, _, codes = (parser.epilog or "").partition("exit codes:")
        text += f"```text\n{epilog.strip()}\n```\n\nExit codes:{codes.rstrip()}.\n"
    return text


def _option(action: Any) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    if action.nargs == 0:
        return names
    choices = "|".join(map(str, action.choices)) if action.choices else action.metavar
    return f"{names} `{choices or action.dest.upper()}`".strip()


def formats() -> str:
    """Return the page of the formats: the README's table and what stands below it."""
    readme = (ROOT / "README.md").read_text()
    (table,) = re.findall(r"^\| format \| .*?(?=\n\n`HOST`)", readme, re.S | re.M)
    return GENERATED + (
        '# Formats\n\nFormats are recognised by content. "Checked against" says what a reader '
        "was tried on: where it\nis **no real file**, it follows the format's definition, and "
        f"nobody could check it yet.\n\n{table}\n"
    )


def fields() -> str:
    """Return the page of the JSON fields."""
    defs = json.loads((ROOT / "docs" / SCHEMA).read_text())["$defs"]
    text = GENERATED + (
        f"# JSON\n\nThe schema is [{SCHEMA}]({SCHEMA}) (JSON Schema 2020-12); the tests hold every "
        "answer to it. Every\nanswer has a field `schema`. Names and meanings are stable; later "
        "releases may add fields. Masks are\nhexadecimal strings.\n"
    )
    parts = [name for name in defs if name not in ANSWERS]
    for title, names in (("Answers", ANSWERS), ("Parts", parts)):
        text += f"\n## {title}\n"
        for name in names:
            text += f"\n### {name}\n\n{defs[name]['description']}\n\n| field | is |\n|---|---|\n"
            text += "".join(_field_rows(defs[name]))
    return text


def _field_rows(one: dict[str, Any]) -> Iterator[str]:
    shapes = one.get("oneOf", [one])
    for shape in shapes:
        for name, field in shape["properties"].items():
            words = [field.get("description", "")]
            ref = field.get("$ref") or field.get("items", {}).get("$ref")
            if ref:
                words.append(f"see [{ref.split('/')[-1]}](#{ref.split('/')[-1]})")
            if "enum" in field:
                words.append(", ".join(f"`{value}`" for value in field["enum"]))
            optional = "" if name in shape["required"] else " (optional)"
            yield f"| `{name}`{optional} | {_cell('; '.join(filter(None, words)))} |\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


PAGES = {
    "rules.md": rules,
    "kernels.md": kernels,
    "commands.md": commands,
    "formats.md": formats,
    "json.md": fields,
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (ROOT / "docs" / name).write_text(page())
