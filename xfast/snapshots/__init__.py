"""Snapshot formats: readers, what they return, and the registry that finds the right one.

`model.py` is what a reader returns, `contract.py` what a format is, `registry.py` how an input
finds its format; those names are here too, imported when they are first used, since who judges a
snapshot in memory needs no reader.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xfast.snapshots.model import Snapshot, Splice, Vcpu
    from xfast.snapshots.registry import (
        FORMATS,
        format_named,
        open_input,
        read,
        recognise,
        splices,
        walk,
    )

__all__ = [
    "FORMATS",
    "Snapshot",
    "Splice",
    "Vcpu",
    "format_named",
    "open_input",
    "read",
    "recognise",
    "splices",
    "walk",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "model" if name in ("Snapshot", "Splice", "Vcpu") else "registry"
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
