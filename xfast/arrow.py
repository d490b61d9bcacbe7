"""Areas in Arrow batches judged, for engines that bring batches to functions (Spark, Ray Data).

`check_batch` is a pure function of one batch: what repeats in it is judged once, and nothing of it
is kept. docs/scale.md has recipes for ``mapInArrow`` and ``map_batches``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xfast.errors import XfastError
from xfast.hosts.model import Host
from xfast.judge.judgement import check, host_of
from xfast.judge.verdict import Policy, Verdict
from xfast.snapshots.model import Snapshot, Vcpu
from xfast.xsave.area import Groups
from xfast.xsave.features import EXTENDED_OFFSET
from xfast.xsave.layout import Layout, preset


def _arrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise XfastError("xfast.arrow needs pyarrow: pip install 'xfast[arrow]'") from None
    return pyarrow


def schema() -> Any:
    """Return the schema of the rows that `check_batch` returns."""
    pa = _arrow()
    return pa.schema(
        [
            ("row", pa.int64()),
            ("host", pa.string()),
            ("verdict", pa.string()),
            ("fixable", pa.string()),
            ("risky", pa.bool_()),
            ("codes", pa.list_(pa.string())),
        ]
    )


def check_batch(batch: Any, hosts: Sequence[Host | str], *, policy: Policy | None = None) -> Any:
    """Judge bare areas of guests' vCPUs.

    Parameters
    ----------
    batch : pyarrow.RecordBatch or Table
        Columns: ``area`` (binary, large_binary or fixed_size_binary), one XSAVE area a row;
        ``layout`` (string), a preset's name, null where it is not known; ``xcr0`` (integer), null
        where it is not known.
    hosts : sequence of Host or str
        A name is resolved as `xfast.resolve` does.
    policy : Policy, optional

    Returns
    -------
    pyarrow.RecordBatch
        A row for each area and host, in this order: the columns of `schema`. ``row`` is the
        area's row in the batch; ``codes`` are the rules that block, or leave a doubt.

    Raises
    ------
    XfastError
        If a column is missing, an area is null or shorter than 576 bytes, or a layout does not
        exist; the message names the row.
    """
    pa = _arrow()
    columns = _columns(batch)
    known = [host_of(host) for host in hosts]
    answers: list[Sequence[Verdict]] = [()] * len(columns["area"])
    for (name, xcr0, size), rows in _alike(columns).items():
        layout = None if name is None else preset(name)
        areas = np.frombuffer(b"".join(columns["area"][row] for row in rows), np.uint8)
        areas = areas.reshape(len(rows), size)
        for row, verdicts in zip(rows, _judge(areas, layout, xcr0, known, policy), strict=True):
            answers[row] = verdicts
    found = [(row, verdict) for row, verdicts in enumerate(answers) for verdict in verdicts]
    return pa.record_batch(
        [
            pa.array([row for row, _ in found], pa.int64()),
            pa.array([verdict.host for _, verdict in found], pa.string()),
            pa.array([verdict.verdict for _, verdict in found], pa.string()),
            pa.array([verdict.fixable for _, verdict in found], pa.string()),
            pa.array([verdict.risky for _, verdict in found], pa.bool_()),
            pa.array([_codes(verdict) for _, verdict in found], pa.list_(pa.string())),
        ],
        schema=schema(),
    )


def _columns(batch: Any) -> dict[str, list[Any]]:
    """Return the three columns as lists; raise XfastError where one is missing."""
    names = set(batch.schema.names)
    for name in ("area", "layout", "xcr0"):
        if name not in names:
            found = ", ".join(sorted(names)) or "none"
            raise XfastError(f"batch: expected columns area, layout and xcr0, got {found}")
    return {name: batch.column(name).to_pylist() for name in ("area", "layout", "xcr0")}


def _alike(columns: dict[str, list[Any]]) -> dict[tuple[str | None, int | None, int], list[int]]:
    """Return {(layout, xcr0, size): rows}."""
    found: dict[tuple[str | None, int | None, int], list[int]] = defaultdict(list)
    for row, (area, layout, xcr0) in enumerate(zip(*columns.values(), strict=True)):
        if not isinstance(area, bytes) or len(area) < EXTENDED_OFFSET:
            what = f"{len(area)} bytes" if isinstance(area, bytes) else "none"
            raise XfastError(f"area[{row}]: expected at least {EXTENDED_OFFSET} bytes, got {what}")
        found[layout, xcr0, len(area)].append(row)
    return found


def _judge(
    areas: NDArray[np.uint8],
    layout: Layout | None,
    xcr0: int | None,
    hosts: Sequence[Host],
    policy: Policy | None,
) -> list[Sequence[Verdict]]:
    """Return the verdicts for each row; rows that nothing tells apart are judged once."""
    groups = Groups(layout or Layout(()))
    index = groups.add(areas)
    source = "given" if layout else "unknown"
    answers = []
    for group in groups.classes:
        vcpu = Vcpu(0, areas[group["first"]], layout, source, xcr0=xcr0)
        snapshot = Snapshot("", "raw", "vm", "kvm", [vcpu])
        answers.append(check(snapshot, hosts, policy=policy or Policy()))
    return [answers[i] for i in index]


def _codes(verdict: Verdict) -> list[str]:
    codes = [f.code for f in verdict.findings if f.severity == "blocks" or f.open]
    return list(dict.fromkeys(codes))
