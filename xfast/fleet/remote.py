"""Objects in a store, read by ranges: a Source whose bytes come over the network."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import lru_cache
from itertools import islice
from typing import IO, Any

from xfast.errors import FormatError, XfastError
from xfast.snapshots.bytes.source import Source

BLOCK = 16 << 10
"""What is fetched at least, and in multiples of which (bytes)."""

WHOLE_BLOCK = 8 << 20
"""What is fetched at a time where all of an object is needed (bytes)."""

TAIL = 208 << 10
"""What is fetched at most of an object's end before anybody asks (bytes): with the first block, and
the borders of blocks, less than 256 KiB."""

IN_FLIGHT = 32
"""How many objects a process has on the way at a time."""

TRIES = 3
"""How often a request is made before its error counts."""


_turn = threading.Lock()
"""Held by who makes a store's client, or uses one that is not made for several at a time."""


@lru_cache(maxsize=64)
def _system(protocol: str, options: tuple[tuple[str, Any], ...]) -> Any:
    import fsspec

    return fsspec.filesystem(protocol, **dict(options))


def file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the object's path in it.

    Raises
    ------
    XfastError
        If fsspec, or what it needs for this protocol, is not installed, or the URL is none.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise XfastError(f"{url}: needs fsspec: pip install 'xfast[cluster]'") from None
    try:
        system, path = url_to_fs(url)
    except ImportError as problem:
        raise XfastError(f"{url}: {problem}") from None
    except (ValueError, OSError) as problem:
        raise XfastError(f"{url}: can't be opened: {problem}") from None
    return system, path


class Remote(Source):
    """An object in a store: only the blocks that are asked for are fetched, each once.

    Attributes
    ----------
    bytes_fetched : int
        What came over the network until now.
    tail : int
        How far from its end the object was read (bytes), its first block left out.
    """

    def __init__(self, url: str) -> None:
        with _turn:
            self.system, self.key = file_system(url)
        super().__init__(url, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        self.blocks: dict[int, bytes] = {}
        self.bytes_fetched = self.tail = 0
        try:
            info = self._try(lambda: self.system.info(self.key))
            self.size = _size_of(url, info)
        except BaseException:
            self.close()
            raise
        self.tag = str(info.get("ETag") or info.get("etag") or info.get("LastModified") or "")

    def _try(self, ask: Any) -> Any:
        """Return what `ask` answers; what fails is asked again, since stores have moods."""
        several = getattr(self.system, "async_impl", False)
        for turn in range(TRIES):
            try:
                with nullcontext() if several else _turn:
                    return ask()
            except FileNotFoundError:
                raise XfastError(f"{self.path}: there is no such object") from None
            except PermissionError as problem:
                raise XfastError(f"{self.path}: can't be opened: {problem}") from None
            except Exception as problem:
                if turn + 1 == TRIES:
                    text = " ".join(str(problem).split())[:200] or type(problem).__name__
                    raise XfastError(f"{self.path}: can't be read: {text}") from None
                time.sleep(0.1 * 2**turn)
        raise AssertionError

    def _fetch(self, offset: int, length: int) -> bytes:
        """Return bytes that are inside; fetch the blocks that are missing in one request."""
        self.bytes_read += length
        if not length:
            return b""
        if offset + length > BLOCK:
            self.tail = max(self.tail, self.size - max(offset, BLOCK))
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        missing = [block for block in range(first, last + 1) if block not in self.blocks]
        if missing:
            start, end = missing[0] * BLOCK, min((missing[-1] + 1) * BLOCK, self.size)
            data = self._try(lambda: self.system.cat_file(self.key, start=start, end=end))
            if len(data) != end - start:
                raise FormatError(
                    self.path,
                    start,
                    f"expected {end - start} bytes, got {len(data)}: the server ignores ranges, "
                    "or the object changed",
                )
            self.bytes_fetched += len(data)
            for block in range(missing[0], missing[-1] + 1):
                at = block * BLOCK - start
                self.blocks[block] = bytes(data[at : at + BLOCK])
        whole = b"".join(self.blocks[block] for block in range(first, last + 1))
        return whole[offset - first * BLOCK :][:length]

    def fetch_ahead(self, tail: int) -> None:
        """Fetch what a reader is going to ask for: the first block, and so much of the end."""
        near = self.size <= tail + 2 * BLOCK
        self._fetch(0, self.size if near else BLOCK)
        if not near:
            self._fetch(self.size - tail, tail)
        self.bytes_read = self.tail = 0

    def whole(self) -> IO[bytes]:
        """Fetch all of the object into a file that vanishes: only what is packed needs it."""
        file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115, the caller closes it
        try:
            for start in range(0, self.size, WHOLE_BLOCK):
                file.write(self._fetch(start, min(WHOLE_BLOCK, self.size - start)))
                self.blocks.clear()
            file.seek(0)
        except BaseException:
            file.close()
            raise
        return file


def fetched(urls: Iterable[str]) -> Iterator[Future[Remote]]:
    """Yield objects in their order, while those behind them are on their way.

    Of each comes ahead what a reader asked of the one before: in a fleet they are alike. One is
    asked for after the other where its store's client is not made for several at a time.
    """
    tail = BLOCK

    def fetch(url: str) -> Remote:
        source = Remote(url)
        try:
            source.fetch_ahead(tail)
        except BaseException:
            source.close()
            raise
        return source

    rest = iter(urls)
    ahead: deque[Future[Remote]] = deque()
    with ThreadPoolExecutor(IN_FLIGHT, "xfast-fetch") as pool:
        while True:
            ahead += [pool.submit(fetch, url) for url in islice(rest, IN_FLIGHT - len(ahead))]
            if not ahead:
                return
            future = ahead.popleft()
            yield future
            if not future.exception():
                tail = min(future.result().tail, TAIL)


def _size_of(url: str, info: dict[str, Any]) -> int:
    size = info.get("size")
    if info.get("type") == "directory":
        raise XfastError(f"{url}: is a directory; a name that ends with / stands for what is in it")
    if not isinstance(size, int) or size < 0:
        raise XfastError(f"{url}: the server does not tell its size, which ranged reads need")
    return size
