"""Charts: well-formed, to scale, and no bin on both sides of the threshold."""

import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from sanitize.report import charts

RANGES = [
    (0.0, 1.0, None),
    (-60.0, 420.0, 0.0),
    (3.0, 3.0, None),
    (3.0, 3.0, 9.0),
    (-1e30, 1e30, 0.0),
    (5, 6, 6),
    (5, 6, 2),
]


@pytest.mark.parametrize(("low", "high", "threshold"), RANGES)
def test_bins_are_equal_cover_the_range_and_break_at_the_threshold(
    low: float, high: float, threshold: float | None
) -> None:
    edges = charts.bin_edges(low, high, threshold, 48)
    widths = np.diff(edges)
    slack = 1e-6 * widths[0]
    assert edges[0] <= low + slack
    assert edges[-1] >= high - slack
    assert 1 <= len(widths) <= 50
    assert np.allclose(widths, widths[0])
    assert threshold is None or threshold in edges


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3e-5, 8e-5), (1e6, 1e6 + 3), (-400.0, 2100.0)])
def test_ticks_lie_within_the_axis_and_are_few(low: float, high: float) -> None:
    ticks = charts.nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert all(low - 1e-9 * abs(low) <= tick <= high + 1e-9 * abs(high) for tick in ticks)
    steps = np.diff(ticks)
    assert np.allclose(steps, steps[0])


@pytest.mark.parametrize("highest", [2, 9, 10, 99, 1_000, 50_000, 10**9])
def test_count_ticks_start_at_one_and_are_few(highest: int) -> None:
    ticks = charts.count_ticks(highest)
    assert ticks[0] == 1
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= 7
    assert ticks[-1] <= highest


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [
        (0, 0, "0"),
        (12.8, 0.1, "12.8"),
        (-50, 20, "\u221250"),
        (1234.5, 0, "1,234"),
        (0.00012346, 0, "0.0001235"),
        (3, 0.5, "3.0"),
    ],
)
def test_numbers_are_written_for_people(value: float, step: float, text: str) -> None:
    assert charts.number(value, step) == text


@pytest.mark.parametrize("threshold", [None, 0.0, 9.99])
def test_histogram_is_well_formed_and_to_scale(threshold: float | None) -> None:
    edges = charts.bin_edges(-10, 10, threshold, 20)
    kept = [10 if right <= 0 else 0 for right in edges[1:]]
    removed = [100 if left >= 0 else 0 for left in edges[:-1]]
    root = ET.fromstring(charts.histogram(edges, kept, removed, threshold, '<b> & "quotes" \x00'))
    assert "<b> &" in root.attrib["aria-label"]
    bars = [bar for bar in root.iter("rect") if bar.get("class") in ("kept", "removed")]
    assert len(bars) == sum(map(bool, kept)) + sum(map(bool, removed))
    heights = {bar.get("class"): float(bar.attrib["height"]) for bar in bars}
    decade = heights["removed"] - heights["kept"]  # from 10 to 100
    assert math.isclose(heights["kept"], decade * math.log10(10 / 0.5), rel_tol=0.01)
    lines = [line for line in root.iter("line") if line.get("class") == "threshold"]
    assert len(lines) == (threshold is not None)
    axis = " ".join(text.text or "" for text in root.iter("text"))
    assert "score" in axis
    assert "log scale" in axis


def test_a_bin_with_both_kinds_shows_both() -> None:
    root = ET.fromstring(charts.histogram([0.0, 1.0], [5], [2], None, "0"))
    bars = {b.get("class"): b for b in root.iter("rect")}
    assert float(bars["removed"].attrib["x"]) > float(bars["kept"].attrib["x"])
    titles = [title.text for title in root.iter("title")]
    assert titles == ["score 0 to 1: 5 kept", "score 0 to 1: 2 removed"]


def test_gauge_keeps_within_its_track() -> None:
    for value, level, top in [(5.0, 4.0, 10.0), (50.0, None, 10.0), (-1.0, 20.0, 10.0), (0.0, 0.0, 0.0)]:
        root = ET.fromstring(charts.gauge(value, level, top, removed=True))
        widths = [float(rect.attrib["width"]) for rect in root.iter("rect")]
        assert all(0 <= width <= 120 for width in widths)


@pytest.mark.parametrize(("mean", "low", "high"), [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.5, 0.25, 1.0)])
def test_whisker_is_to_scale(mean: float, low: float, high: float) -> None:
    root = ET.fromstring(charts.whisker(mean, low, high))
    track, line, dot = root
    start, length = float(track.attrib["x"]), float(track.attrib["width"])
    assert float(dot.attrib["cx"]) == pytest.approx(start + mean * length, abs=0.1)
    assert float(line.attrib["x"]) == pytest.approx(start + low * length, abs=0.1)
    assert float(line.attrib["width"]) == pytest.approx(max(1, (high - low) * length), abs=0.1)


def test_balance_shows_one_sample_among_millions() -> None:
    root = ET.fromstring(charts.balance([("clean", 10_000_000), ("quarantined", 1), ("unreadable", 0)]))
    widths = {rect.get("class"): float(rect.attrib["width"]) for rect in root.iter("rect")}
    assert set(widths) == {"clean", "quarantined"}
    assert widths["quarantined"] > 1
    assert sum(widths.values()) <= 1000


@pytest.mark.parametrize("n", [1, 2, 30])
@pytest.mark.parametrize("share", [True, False])
def test_curves_are_to_scale_and_named_at_their_ends(n: int, share: bool) -> None:
    x = list(range(1, n + 1))
    series = {"rising": [i / n for i in x], "flat & <low>": [0.0] * n, "flat, too": [0.01] * n}
    svg = ET.fromstring(charts.curves(x, series, "epoch", share))
    lines = [line.get("points") for line in svg.iter("polyline")]
    assert len(lines) == 3
    rising = [tuple(map(float, point.split(","))) for point in (lines[0] or "").split()]
    flat = [tuple(map(float, point.split(","))) for point in (lines[1] or "").split()]
    heights = [low[1] - high[1] for low, high in zip(flat, rising, strict=True)]
    assert np.allclose(heights, [i * heights[-1] / n for i in x], atol=0.2)
    assert np.allclose(np.diff([px for px, _ in rising]), (rising[-1][0] - rising[0][0]) / max(1, n - 1), atol=0.2)
    names = [text for text in svg.iter("text") if "line-name" in (text.get("class") or "")]
    assert [(text.text or "").rsplit(" ", 2 if share else 1)[0] for text in names] == list(series)
    ends = sorted(float(text.get("y") or 0) for text in names)
    assert min(np.diff(ends)) >= 13.9


def test_curves_of_losses_below_zero_and_of_nothing_but_zero_are_drawn() -> None:
    for values in ([-2.0, -3.0], [0.0, 0.0]):
        svg = ET.fromstring(charts.curves([1, 2], {"loss": values}, "epoch"))
        for circle in svg.iter("circle"):
            assert 0 <= float(circle.get("cy") or -1) <= charts._HEIGHT
