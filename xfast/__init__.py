"""xfast: x86 XSAVE state in VM snapshots: read, judge, repair and convert it.

Names are imported when they are first used; ``import xfast`` itself costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xfast.errors import FormatError as FormatError
    from xfast.errors import LayoutError as LayoutError
    from xfast.errors import PolicyError as PolicyError
    from xfast.errors import UnknownFormatError as UnknownFormatError
    from xfast.errors import XfastError as XfastError
    from xfast.hosts import resolve as resolve
    from xfast.hosts.model import Host as Host
    from xfast.judge.judgement import check as check
    from xfast.judge.verdict import Finding as Finding
    from xfast.judge.verdict import Judgement as Judgement
    from xfast.judge.verdict import Policy as Policy
    from xfast.judge.verdict import Verdict as Verdict
    from xfast.repair.batch import Fixed as Fixed
    from xfast.repair.batch import fix_areas as fix_areas
    from xfast.repair.plan import Change as Change
    from xfast.repair.plan import Plan as Plan
    from xfast.repair.plan import plan_fix as plan_fix
    from xfast.snapshots import read as read
    from xfast.snapshots.model import Snapshot as Snapshot
    from xfast.snapshots.model import Vcpu as Vcpu
    from xfast.snapshots.registry import walk as walk
    from xfast.version import __version__ as __version__
    from xfast.xsave.area import Audit as Audit
    from xfast.xsave.area import Classes as Classes
    from xfast.xsave.area import Headers as Headers
    from xfast.xsave.area import audit as audit
    from xfast.xsave.area import classify as classify
    from xfast.xsave.area import compact as compact
    from xfast.xsave.area import diff as diff
    from xfast.xsave.area import empty as empty
    from xfast.xsave.area import expand as expand
    from xfast.xsave.area import get_uabi as get_uabi
    from xfast.xsave.area import headers as headers
    from xfast.xsave.area import keep as keep
    from xfast.xsave.area import relayout as relayout
    from xfast.xsave.area import set_uabi as set_uabi
    from xfast.xsave.area import swap as swap
    from xfast.xsave.area import xinuse as xinuse
    from xfast.xsave.cpuid import Cpuid as Cpuid
    from xfast.xsave.layout import Layout as Layout
    from xfast.xsave.layout import preset as preset
    from xfast.xsave.registers import Registers as Registers

_HOMES = {
    "xfast.xsave.area": (
        "Audit", "Classes", "Headers",
        "empty", "headers", "classify", "keep", "relayout", "diff", "compact", "expand",
        "get_uabi", "set_uabi", "swap", "audit", "xinuse",
    ),
    "xfast.judge.judgement": ("check",),
    "xfast.judge.verdict": ("Finding", "Judgement", "Policy", "Verdict"),
    "xfast.repair.batch": ("Fixed", "fix_areas"),
    "xfast.repair.plan": ("Change", "Plan", "plan_fix"),
    "xfast.snapshots": ("read",),
    "xfast.snapshots.model": ("Snapshot", "Vcpu"),
    "xfast.snapshots.registry": ("walk",),
    "xfast.hosts": ("resolve",),
    "xfast.hosts.model": ("Host",),
    "xfast.xsave.layout": ("Layout", "preset"),
    "xfast.xsave.cpuid": ("Cpuid",),
    "xfast.xsave.registers": ("Registers",),
    "xfast.errors": (
        "XfastError", "FormatError", "LayoutError", "PolicyError", "UnknownFormatError",
    ),
    "xfast.version": ("__version__",),
}  # fmt: skip
"""Where each public name lives; type checkers read the imports above, and a test compares."""

_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    try:
        module = _HOME[name]
    except KeyError:
        raise AttributeError(f"module 'xfast' has no attribute {name!r}") from None
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
