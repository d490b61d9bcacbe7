"""The swap benchmark: what strategies do by rule, what the timed code answers, and the plot."""

import argparse
import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xfast.bench import plot, swap
from xfast.bench.strategies import (
    CPU,
    GUESTS,
    HOST_LIVE,
    HOST_XCR0,
    STRATEGIES,
    consequence,
    random_area,
    reported_by_kvm,
)
from xfast.errors import XfastError
from xfast.xsave.features import PKRU, TILEDATA, bits

SIZES = {0: 152, 1: 256} | {slot.nr: slot.size for slot in CPU.layout.slots}
BY_NAME = {strategy.name: strategy for strategy in STRATEGIES}
PAIRS = [(s, g) for g in GUESTS for s in STRATEGIES]


def names(pair):
    return f"{pair[0].name}-{pair[1].name}"


def size(mask):
    return sum(SIZES[nr] for nr in bits(mask))


@pytest.mark.parametrize("pair", PAIRS, ids=names)
def test_pkru_gets_out_where_it_is_saved_and_neither_restored_nor_trimmed(pair):
    strategy, guest = pair
    moves = not (strategy.lazy and not guest.live)
    out = (
        moves
        and strategy.mask in ("host", "live")
        and not strategy.restores_pkru
        and not strategy.trims_at_get
    )
    assert consequence(strategy, guest).reported == (PKRU if out else 0)


@pytest.mark.parametrize("pair", PAIRS, ids=names)
def test_only_lazy_switching_lets_the_guest_see_host_registers(pair):
    strategy, guest = pair
    expected = HOST_LIVE & ~PKRU if strategy.lazy else 0
    assert consequence(strategy, guest).seen == expected


@pytest.mark.parametrize("guest", GUESTS, ids=lambda guest: guest.name)
def test_bytes_are_those_of_the_components(guest):
    tiles = guest.cpuid & TILEDATA
    host = HOST_XCR0 & ~TILEDATA
    saved = {name: consequence(BY_NAME[name], guest).saved for name in BY_NAME}
    both = 2 * 8 + 2 * 8  # XSTATE_BV, and MXCSR with its mask
    assert saved["XSAVE"] == size(host) + size(host | tiles) + both
    assert saved["XSAVE, no XFD"] == 2 * size(HOST_XCR0) + both
    # XSAVEOPT leaves out what is not in use; XSAVEC writes XCOMP_BV as well, but MXCSR with
    # SSE only
    assert saved["XSAVEOPT"] == size(HOST_LIVE) + size(guest.live | PKRU) + both
    guest_saves = size(guest.live | PKRU) + 16 + (8 if guest.live & 2 else 0)
    assert saved["XSAVEC"] == size(HOST_LIVE) + 24 + guest_saves
    restored = consequence(BY_NAME["XSAVEC"], guest).restored
    assert restored == size(guest.live) + size(HOST_LIVE & ~PKRU) + 2 * (64 + 8)


@pytest.mark.parametrize("guest", GUESTS, ids=lambda guest: guest.name)
@pytest.mark.parametrize("name", [s.name for s in STRATEGIES if s.kernel])
def test_the_kvm_model_agrees_with_the_masks(name, guest):
    strategy = BY_NAME[name]
    assert consequence(strategy, guest).source == "kvm"
    by_masks = consequence(strategy._replace(kernel=""), guest)
    assert by_masks.source == "masks"
    assert reported_by_kvm(strategy.kernel, guest) == by_masks.reported


@pytest.mark.parametrize("live", [guest.live for guest in GUESTS])
def test_benchmark_data_is_not_zero(live):
    area = random_area(CPU.layout, live | 3, 1)
    assert (area[160:416] != 0).all()
    for nr in bits(live & ~3):
        slot = CPU.layout.slot(nr)
        assert area[slot.offset : slot.offset + slot.size].any()


def arguments(*words):
    parser = argparse.ArgumentParser()
    swap.add_arguments(parser)
    return parser.parse_args(words)


def test_json_has_every_strategy_with_a_time_or_a_reason(capsys):
    assert swap.run(arguments("--guest", "avx2", "--samples", "1", "--json")) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["schema"] == "xfast/1"
    assert [row["name"] for row in answer["results"]] == list(BY_NAME)
    for row in answer["results"]:
        assert bool(row["cpu"]) != bool(row["absent"])
        assert row["save"] != "xsaves" or row["absent"]
        for timing in (row["cpu"], row["engine"]):
            assert timing is None or (timing["ns"] > 0 and timing["ratio"] > 0)
    leaky = {row["name"] for row in answer["results"] if row["reported"] == ["pkru"]}
    assert "Linux 5.17-rc5" in leaky
    assert not leaky & {"Linux 6.0", "Linux 6.12", "XSAVEC, guest CPUID"}


def test_the_table_names_the_strategies_that_let_pkru_out(capsys, tmp_path):
    target = tmp_path / "swap.svg"
    words = ("--guest", "idle", "--guest", "avx512", "--samples", "1", "--plot", str(target))
    assert swap.run(arguments(*words)) == 0
    text = capsys.readouterr().out
    assert "GET reports PKRU to a guest without PKU: Linux 5.17-rc5; XSAVE; " in text
    assert text.count("round trips with guest") == 2
    root = ElementTree.fromstring(target.read_text())
    labels = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    if swap.Machine().instructions >= {"xsaveopt", "xsavec", "xgetbv"}:
        assert set(BY_NAME) <= set(labels)
    assert "Linux 6.12" in labels


def test_a_plot_that_cannot_be_written_is_one_line(tmp_path):
    words = ("--guest", "idle", "--samples", "1", "--plot", str(tmp_path / "none" / "a.svg"))
    with pytest.raises(XfastError, match=r"a\.svg: No such file or directory"):
        swap.run(arguments(*words))


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5"])
def test_samples_are_a_count(text, capsys):
    with pytest.raises(SystemExit):
        arguments("--samples", text)
    assert "expected a number from 1" in capsys.readouterr().err


def test_a_swap_that_loses_state_is_not_timed(monkeypatch):
    def forgets(registers, leave, enter, layout, **masks):
        registers[:] = 0

    monkeypatch.setattr(swap.area, "swap", forgets)
    with pytest.raises(AssertionError, match=r"XSAVE: .*came back changed"):
        swap.engine_trip(BY_NAME["XSAVE"], GUESTS[3])


def test_ratios_are_to_the_copies_around_each_sample():
    copies = iter([1.0, 3.0, 10.0, 30.0, 100.0, 300.0])
    times = iter([4.0, 60.0, 500.0])
    timing = swap.measure(lambda: next(times), lambda: next(copies), 3)
    assert timing == swap.Timing(60.0, 2.5)  # ratios 2, 3, 2.5


# The plot.

AMOUNT = st.just(0) | st.floats(0.01, 1e6)
LEGEND = dict.fromkeys([*plot.KINDS, "measured", "computed"], "meaning")


def drawn(points):
    svg = plot.scatter(points, "title", "<&>", ("x", "y"), LEGEND)
    root = ElementTree.fromstring(svg)
    tag = "{http://www.w3.org/2000/svg}"
    return svg, list(root.iter(f"{tag}circle")), list(root.iter(f"{tag}rect"))


def test_one_mark_a_strategy():
    points = [
        plot.Point("a", 100, 10, "clean", True),
        plot.Point("b", 1000, 100, "leaks", True),
        plot.Point("c", 0, 0, "exposes", False),
    ]
    svg, circles, rects = drawn(points)
    legend = 3 + 1  # kinds, and the circle that stands for "measured"
    assert len(circles) == 2 + legend
    assert len(rects) == 1 + 1 + 1  # a mark, its legend, the paper
    assert "nan" not in svg
    assert "&lt;&amp;&gt;" in svg


@given(
    st.lists(
        st.tuples(AMOUNT, AMOUNT, st.sampled_from([*plot.KINDS]), st.booleans()),
        min_size=1,
        max_size=20,
    )
)
def test_marks_lie_in_the_frame_and_every_label_is_there_once(rows):
    points = [plot.Point(f"label {i}", *row) for i, row in enumerate(rows)]
    svg, circles, _ = drawn(points)
    for circle in circles:
        x, y = float(circle.get("cx")), float(circle.get("cy"))
        assert 0 <= x <= plot.WIDTH
        assert 0 <= y <= plot.HEIGHT
    for point in points:
        assert svg.count(f">{point.label}<") == 1


@given(st.lists(st.tuples(st.floats(100, 900), st.floats(120, 540)), min_size=1, max_size=17))
def test_no_mark_covers_another_and_none_goes_far(marks):
    apart = plot.set_apart(marks)
    for i, one in enumerate(apart):
        assert math.dist(one, marks[i]) < 80
        for two in apart[:i]:
            assert math.dist(one, two) > 2 * plot.MARK


def test_the_plot_says_which_guests_it_averages(tmp_path):
    rows = list(swap.results([GUESTS[0], GUESTS[2]], 1))
    averaged = ", ".join(guest.name for guest in swap.averaged(rows))
    assert f"mean over guests {averaged};" in swap.as_plot(rows)


def test_no_strategy_is_cut_at_80_columns(monkeypatch, capsys):
    real = swap.console

    def narrow(file):
        out = real(file)
        out.width = 80
        out.soft_wrap = False
        return out

    monkeypatch.setattr(swap, "console", narrow)
    swap.print_table(list(swap.results([GUESTS[3]], 1)))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for strategy in swap.STRATEGIES:
        assert any(line.startswith(f"{strategy.name}  ") for line in lines), strategy.name


def test_labels_of_the_real_plot_do_not_cover_each_other():
    marks = [(370.0, 420.0 + i) for i in range(7)] + [
        (480.0, 400.0),
        (476.0, 405.0),
        (760.0, 260.0),
    ]
    labels = [f"XSAVEC, guest {i}" for i in range(len(marks))]
    groups = plot.clusters(marks)
    assert sorted(len(group) for group in groups) == [1, 2, 7]
    boxes = plot.place_lists(marks, labels, groups)
    for i, one in enumerate(boxes):
        assert one.overlap(plot.FRAME) == pytest.approx(one.area)
        assert not any(one.overlap(two) for two in boxes[i + 1 :])


@pytest.mark.parametrize("seed", range(8))
def test_labels_of_a_crowd_cover_neither_each_other_nor_marks(seed):
    """A plot of a fast machine: a dozen strategies within 30 pixels, beside other crowds."""
    rng = np.random.default_rng(seed)
    crowd = [(268.0 + rng.uniform(-6, 6), y) for y in rng.uniform(300, 420, 12)]
    others = [(268.0, 200.0), (190.0, 410.0), (455.0, 360.0), (448.0, 372.0), (790.0, 390.0)]
    marks = plot.set_apart(crowd + others)
    labels = [f"XSAVEC, guest CPUID {i}" for i in range(len(marks))]
    boxes = plot.place_lists(marks, labels, plot.clusters(marks))
    r = plot.MARK
    circles = [plot.Box(x - r, y - r, x + r, y + r) for x, y in marks]
    for i, one in enumerate(boxes):
        assert one.overlap(plot.FRAME) == pytest.approx(one.area)
        assert sum(one.overlap(two) for two in boxes[i + 1 :]) < 1
        assert sum(one.overlap(circle) for circle in circles) < 1


def test_an_axis_is_logarithmic():
    scale = plot.Axis(1, 100, 0, 200)
    assert np.allclose([scale.at(v) for v in (0, 1, 10, 100, 1000)], [0, 0, 100, 200, 200])
    assert list(plot.Axis(1, 10, 0, 1).ticks()) == [1, 1.5, 2, 3, 5, 7, 10]
