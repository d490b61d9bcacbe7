"""How far a long run is, or a pipe: on a terminal, or else a line a minute; nothing if quiet."""

from __future__ import annotations

import select
import sys
import time
from types import TracebackType
from typing import Any

PATIENCE = 1.0
"""A run that takes less shows nothing (seconds)."""

EVERY = 60.0
"""How often a line is written where there is no terminal (seconds)."""


class Bar:
    """Progress on standard error. A context manager.

    Parameters
    ----------
    title : str
        What is under way, in a word.
    quiet : bool
        Show nothing.
    """

    def __init__(self, title: str, *, quiet: bool = False) -> None:
        self.title = title
        self.quiet = quiet
        self.terminal = sys.stderr.isatty()
        self.started = time.monotonic()
        self.written = self.started
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    @property
    def due(self) -> bool:
        """Whether the run has taken long enough for anything to be shown."""
        return not self.quiet and time.monotonic() - self.started >= PATIENCE

    def show(self, done: int, total: int | None, text: str) -> None:
        """Show that `done` of `total` inputs are judged; `text` says what was found so far."""
        if not self.due:
            return
        now = time.monotonic()
        if self.terminal:
            if self.bar is None:
                self._start()
            self.bar.update(self.task, completed=done, total=total, text=text)
        elif now - self.written >= EVERY:
            self.written = now
            rate = done / (now - self.started)
            of = f" of about {total:,}" if total else ""
            left = f", about {(total - done) / rate / 60:.0f} min left" if total and rate else ""
            line = f"{done:,}{of} inputs, {rate:,.0f}/s{left}; {text}"
            print(f"xfast: {self.title}: {line}", file=sys.stderr, flush=True)

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text

        class Rate(ProgressColumn):
            """Inputs a second."""

            def render(self, task: Any) -> Text:
                return Text(f"{task.speed:,.0f}/s" if task.speed else "")

        self.bar = Progress(
            TextColumn(self.title),
            BarColumn(),
            MofNCompleteColumn(),
            Rate(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self.bar.start()
        self.task = self.bar.add_task(self.title, text="")


class Stream:
    """What a terminal is shown of a pipe: how much has come, and whether it stalls.

    Parameters
    ----------
    word : str
        What is done with the bytes: ``passed``, ``read``.
    """

    def __init__(self, word: str) -> None:
        self.word = word
        self.shown = sys.stderr.isatty()
        self.next = time.monotonic() + PATIENCE
        self.last = time.monotonic()

    def __call__(self, fd: int, count: int) -> None:
        """Wait for the next bytes, and tell about it now and then."""
        while True:
            ready, _, _ = select.select([fd], [], [], PATIENCE)
            now = time.monotonic()
            if now >= self.next:
                self.next = now + PATIENCE
                stalled = now - self.last
                words = f", nothing for {stalled:.0f} s" if stalled > 2 * PATIENCE else ""
                text = f"\rxfast: {count / 1e6:,.0f} MB {self.word}{words}\x1b[K"
                print(text, end="", file=sys.stderr)
                sys.stderr.flush()
            if ready:
                self.last = now
                return

    def clear(self) -> None:
        """Remove the line."""
        if self.shown:
            print("\r\x1b[K", end="", file=sys.stderr)
            sys.stderr.flush()
