"""QEMU's monitor: the reply to query-cpu-model-expansion, alone or in a transcript.

*Source*: QEMU qapi/machine-target.json CpuModelExpansionInfo; target/i386/cpu.c.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xfast.errors import FormatError
from xfast.hosts.derive import from_features
from xfast.hosts.model import Host
from xfast.hosts.models import kernel_name, model_named

STEPS_LIMIT = 10_000
"""Values that are looked at for the model; it lies three deep."""


def find_model(documents: Sequence[object]) -> Mapping[str, Any] | None:
    """Return the last ``{"name": ..., "props": {...}}`` in the replies, or None."""
    found = None
    waiting = list(documents)
    for _ in range(STEPS_LIMIT):
        if not waiting:
            break
        item = waiting.pop(0)
        if isinstance(item, dict):
            if isinstance(item.get("props"), dict) and isinstance(item.get("name"), str):
                found = item
            waiting += [item[key] for key in ("return", "model") if key in item]
    return found


def read(documents: Sequence[object], name: str, path: str) -> Host:
    """Read the last model expansion in the replies.

    Raises
    ------
    FormatError
        If there is none.
    """
    model = find_model(documents)
    if model is None:
        raise FormatError(path, None, "expected a reply to query-cpu-model-expansion, got another")
    props: Mapping[str, Any] = model["props"]
    told = {kernel_name(key): value for key, value in props.items() if isinstance(value, bool)}
    features = {feature for feature, value in told.items() if feature and value}
    notes = [
        "QEMU lists what a guest with this model has; the layout and what KVM offers are assumed"
    ]
    base = model_named(str(model["name"]))
    if base is not None:
        features |= base.features - {feature for feature, value in told.items() if not value}
    elif "fpu" not in told:
        notes.append("the list is not whole: a feature that it does not name counts as missing")
    vendor = props.get("vendor")
    numbers = [props.get(key) for key in ("family", "model")]
    family, number = (
        value if isinstance(value, int) and not isinstance(value, bool) else None
        for value in numbers
    )
    host = from_features(
        frozenset(filter(None, features)), name, path,
        vendor=vendor if isinstance(vendor, str) else base.vendor if base else None,
        family=family, model=number,
    )  # fmt: skip
    return host.replace(notes=tuple(notes))
