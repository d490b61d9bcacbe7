"""The messages of ``messages.toml``, ready to be searched."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from xfast.messages.reading import in_parts, lines_with

STATE = "state"
EITHER = "either"
ELSEWHERE = "elsewhere"
SCOPES = {
    STATE: "",
    EITHER: "This can be an extended-state problem, or another.",
    ELSEWHERE: "This is not an extended-state problem.",
}
"""Whether a message is about extended state, and how its answer begins."""


class Message(NamedTuple):
    """One message; the fields are explained at the head of ``messages.toml``.

    `patterns` are in parts that a line has one after another.
    """

    program: str
    literals: tuple[str, ...]
    patterns: tuple[tuple[re.Pattern[str], ...], ...]
    scope: str
    codes: tuple[str, ...]
    text: str
    next: str
    source: str
    lists: bool


@cache
def messages() -> tuple[Message, ...]:
    """Return all messages, in the order in which they are tried."""
    data = tomllib.loads(files(__package__).joinpath("messages.toml").read_text("utf-8"))
    texts = data["texts"]

    def filled(text: str) -> str:
        return re.sub(r"\$([A-Z_]+)", lambda name: texts[name[1]].strip(), text).strip()

    return tuple(
        Message(
            row["program"],
            tuple(row["literals"]),
            tuple(map(in_parts, row["patterns"])),
            row["scope"],
            tuple(row["codes"]),
            filled(row["text"]),
            filled(row["next"]),
            filled(row["source"]),
            row.get("lists", False),
        )
        for row in data["message"]
    )


def messages_in(text: str) -> dict[int, tuple[int, Message]]:
    """Return what the lines of a text in lower case match first.

    Returns
    -------
    dict
        {where a line begins: (where in the text its match begins, the message)}, in the order of
        the messages.
    """
    found: dict[int, tuple[int, Message]] = {}
    for message in messages():
        for pattern in message.patterns:
            for line, at in lines_with(pattern, text):
                found.setdefault(line, (at, message))
    return found


def message_of(line: str) -> Message | None:
    """Return the first message that a line matches, if any."""
    return next((message for _, message in messages_in(line.lower()).values()), None)
