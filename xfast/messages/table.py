"""The messages of ``messages.toml``, ready to be searched."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib.resources import files
from typing import NamedTuple

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
    """One message; the fields are explained at the head of ``messages.toml``."""

    program: str
    literals: tuple[str, ...]
    patterns: tuple[re.Pattern[str], ...]
    scope: str
    codes: tuple[str, ...]
    text: str
    next: str
    source: str
    lists: bool

    def matches(self, line: str) -> bool:
        """Tell whether this is what a line says."""
        return any(pattern.search(line) for pattern in self.patterns)


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
            tuple(re.compile(pattern, re.IGNORECASE) for pattern in row["patterns"]),
            row["scope"],
            tuple(row["codes"]),
            filled(row["text"]),
            filled(row["next"]),
            filled(row["source"]),
            row.get("lists", False),
        )
        for row in data["message"]
    )


def message_of(line: str) -> Message | None:
    """Return the first message that a line matches, if any."""
    return next((message for message in messages() if message.matches(line)), None)
