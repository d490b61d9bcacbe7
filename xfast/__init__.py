"""xfast: x86 XSAVE state in VM snapshots: read, judge, repair and convert it.

Names are imported when they are first used; ``import xfast`` itself costs next to nothing.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "xfast.xsave.area": (
        "empty", "headers", "classify", "keep", "relayout", "diff", "compact", "expand",
        "get_uabi", "set_uabi", "swap", "audit", "xinuse",
    ),
    "xfast.judge.judgement": ("check",),
    "xfast.repair.plan": ("plan_fix",),
    "xfast.repair.batch": ("fix_areas",),
    "xfast.judge.verdict": ("Finding", "Policy", "Verdict"),
    "xfast.snapshots": ("read",),
    "xfast.snapshots.model": ("Snapshot", "Vcpu"),
    "xfast.hosts": ("resolve",),
    "xfast.hosts.model": ("Host",),
    "xfast.xsave.layout": ("Layout", "preset"),
    "xfast.xsave.cpuid": ("Cpuid",),
    "xfast.xsave.registers": ("Registers",),
    "xfast.errors": ("XfastError", "FormatError", "LayoutError", "PolicyError"),
}  # fmt: skip

_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("xfast")
    try:
        module = _HOME[name]
    except KeyError:
        raise AttributeError(f"module 'xfast' has no attribute {name!r}") from None
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, "__version__"})
