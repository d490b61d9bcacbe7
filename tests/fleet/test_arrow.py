"""Arrow batches: the same answers as one by one, whatever the columns' types."""

import numpy as np
import pytest

import xfast
import xfast.arrow
from xfast.errors import XfastError
from xfast.hosts import resolve
from xfast.snapshots.model import Snapshot, Vcpu
from xfast.xsave.layout import PRESETS

pa = pytest.importorskip("pyarrow", reason="needs pyarrow")

HOSTS = [resolve(name) for name in ("intel-broadwell@6.12", "amd-milan@5.18", "amd-genoa@6.12")]


def areas(n, size=2752):
    """Areas with headers of all kinds: leaked, clean, compacted, with reserved bits."""
    rng = np.random.default_rng(7)
    rows = np.zeros((n, size), np.uint8)
    rows[:, 24:28] = np.frombuffer(np.uint32(0x1F80).tobytes(), np.uint8)
    masks = np.array([0x7, 0x207, 0x2E7, 0x3, 0, 0x600E7], "<u8")
    rows[:, 512:520] = rng.choice(masks, n).astype("<u8").view(np.uint8).reshape(n, 8)
    rows[::7, 576:600] = 1
    rows[::11, 530] = 1
    rows[::13, 26] = 0xFF
    return rows


def one_by_one(rows, layouts, xcr0s):
    for row, (area, layout, xcr0) in enumerate(zip(rows, layouts, xcr0s, strict=True)):
        known = None if layout is None else PRESETS[layout]
        vcpu = Vcpu(0, area, known, "given" if known else "unknown", xcr0=xcr0)
        for verdict in xfast.check(Snapshot("", "raw", "vm", "kvm", [vcpu]), HOSTS):
            codes = [f.code for f in verdict.findings if f.severity == "blocks" or f.open]
            yield {
                "row": row, "host": verdict.host, "verdict": verdict.verdict,
                "fixable": verdict.fixable, "risky": verdict.risky,
                "codes": list(dict.fromkeys(codes)),
            }  # fmt: skip


@pytest.mark.parametrize("kind", ["binary", "large_binary", "fixed", "table"])
def test_a_batch_is_judged_as_one_by_one(kind):
    rows = areas(60)
    layouts = [["intel", "amd-zen4", None][i % 3] for i in range(60)]
    xcr0s = [[7, 0x2E7, None][i // 3 % 3] for i in range(60)]
    types = {"binary": pa.binary(), "large_binary": pa.large_binary(), "table": pa.binary()}
    data = [row.tobytes() for row in rows]
    columns = {
        "area": pa.array(data, types.get(kind, pa.binary(2752))),
        "layout": pa.array(layouts),
        "xcr0": pa.array(xcr0s, pa.uint64()),
    }
    batch = pa.table(columns) if kind == "table" else pa.record_batch(columns)
    answer = xfast.arrow.check_batch(batch, HOSTS)
    assert answer.schema == xfast.arrow.schema()
    assert answer.to_pylist() == list(one_by_one(rows, layouts, xcr0s))


def test_an_empty_batch_is_an_empty_answer():
    batch = pa.record_batch(
        {"area": pa.array([], pa.binary()), "layout": pa.array([], pa.string()),
         "xcr0": pa.array([], pa.uint64())}
    )  # fmt: skip
    assert xfast.arrow.check_batch(batch, HOSTS).num_rows == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"area": [None]}, r"area\[0\]: expected at least 576 bytes, got none"),
        ({"area": [b"short"]}, r"area\[0\]: expected at least 576 bytes, got 5 bytes"),
        ({"layout": ["vax"]}, "vax"),
        ({"xcr0": None}, "expected columns area, layout and xcr0"),
    ],
)
def test_a_bad_column_is_named(change, message):
    columns = {"area": [bytes(576)], "layout": ["intel"], "xcr0": [7]} | change
    batch = pa.table({name: value for name, value in columns.items() if value is not None})
    with pytest.raises(XfastError, match=message):
        xfast.arrow.check_batch(batch, HOSTS)
