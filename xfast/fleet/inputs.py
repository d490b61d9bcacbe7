"""What is to be scanned: files, directories and URLs, expanded to one name an input."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice

from xfast.errors import XfastError
from xfast.snapshots.registry import walk

OURS = (".orig", ".xfast.json", ".xfast-journal")
"""How files end that xfast itself puts beside a snapshot."""

_URL = re.compile(r"[a-z][a-z0-9+.\-]*(?:://|::)")


def is_url(name: str) -> bool:
    """Tell whether a name is a URL (``s3://bucket/key``, ``zip::file.zip``), not a path."""
    return bool(_URL.match(name))


def is_passed_over(path: str) -> bool:
    """Tell whether a file in a directory is hidden, or one that xfast put there."""
    name = os.path.basename(path)
    return name.startswith(".") or name.endswith(OURS)


def expand(names: Iterable[str], results: str | None = None) -> Iterator[str]:
    """Yield the inputs that names stand for, in an order that depends on the names alone.

    A directory stands for the files in it, a URL that ends with ``/`` or has a wildcard for the
    objects under it. What can't be listed is yielded itself, so that reading it tells why.

    Parameters
    ----------
    names : iterable of str
    results : str, optional
        A folder, what is in which stands for nothing: where the scan writes.

    Raises
    ------
    XfastError
        If a URL is named and fsspec is not installed.
    """
    for name in names:
        if is_url(name):
            yield from _objects(name)
        elif os.path.isdir(name):
            ours = _below(name, results)
            for path in walk([name]):
                if path == name or not (is_passed_over(path) or path.startswith(ours)):
                    yield path
        else:
            yield name


def _below(name: str, results: str | None) -> tuple[str, ...]:
    """Return how what a walk finds in the results begins; () where they are not below `name`."""
    if results is None:
        return ()
    way = os.path.relpath(os.path.realpath(results), os.path.realpath(name))
    return () if way.split(os.sep)[0] == os.pardir else (os.path.join(name, way, ""),)


def _objects(url: str) -> Iterator[str]:
    """Yield the objects that a URL stands for."""
    from xfast.fleet.remote import file_system

    if not url.endswith("/") and not any(sign in url for sign in "*?["):
        yield url
        return
    system, path = file_system(url)
    try:
        found = system.glob(path) if any(sign in path for sign in "*?[") else system.find(path)
    except Exception as problem:
        raise XfastError(f"{url}: can't be listed: {problem}") from None
    for name in sorted(found):
        if not is_passed_over(name):
            yield system.unstrip_protocol(name)


def chunks(names: Iterable[str], size: int) -> Iterator[tuple[str, ...]]:
    """Yield names in chunks of `size`."""
    names = iter(names)
    while chunk := tuple(islice(names, size)):
        yield chunk


def count(names: Iterable[str]) -> int | None:
    """Return about how many inputs names stand for, or None where only a listing would tell."""
    total = 0
    for name in names:
        if is_url(name):
            return None
        if os.path.isdir(name):
            total += sum(len(files) for _, _, files in os.walk(name))
        else:
            total += 1
    return total
