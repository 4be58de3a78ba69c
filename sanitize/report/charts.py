"""Charts as inline SVG strings: pure functions of numbers, coloured by the style sheet of the page, without scripts.

Every chart is well-formed XML by itself; text from the data is escaped here.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from sanitize.plural import counted

_WIDTH, _HEIGHT = 460, 236
_LEFT, _TOP, _X_END, _FOOT = 50, 24, 452, 194  # the plot inside a histogram: its left, top, right and lower edge
_NAMES = 340  # right edge of a plot whose lines are named at their ends
_LOWEST = 0.5  # count at the foot of the log axis, so that a bar of one sample is visible


def bin_edges(low: float, high: float, threshold: float | None, n_bins: int) -> list[float]:
    """Edges of about `n_bins` equal bins over [low, high], one of them on the threshold.

    Bins are open on the left, (a, b]: then no bin mixes scores above the threshold with scores below it.
    """
    if threshold is not None:
        low, high = min(low, threshold), max(high, threshold)
    if not high > low:
        margin = max(0.5, abs(low) * 1e-3)
        low, high = low - margin, high + margin
    width = (high - low) / n_bins
    anchor = low if threshold is None else threshold
    before, after = math.ceil((anchor - low) / width - 1e-9), math.ceil((high - anchor) / width - 1e-9)
    return [anchor + width * i for i in range(-before, after + 1)]


def nice_ticks(low: float, high: float, n: int = 6) -> list[float]:
    """At most about `n` round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    raw = (high - low) / n
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def count_ticks(highest: int) -> list[int]:
    """Round counts for a log axis that ends at `highest`."""
    decades = math.ceil(math.log10(max(highest, 2)))
    factors = (1, 2, 5) if decades <= 1 else (1, 3) if decades <= 2 else (1,)
    every = max(1, math.ceil(decades / 5))
    return [f * 10**d for d in range(0, decades + 1, every) for f in factors if f * 10**d <= highest]


def number(value: float, step: float = 0.0) -> str:
    """A number for people: four digits, or as many decimals as ticks `step` apart need; a true minus sign."""
    if step > 1e-4 and abs(value) < 1e6:
        text = f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
    else:
        text = f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.4g}"
    return text.replace("-", "\N{MINUS SIGN}")


def step_for(values: Sequence[float]) -> float:
    """The power of ten that shows the largest of `values` with four digits, and all of them with equal decimals."""
    highest = max((abs(value) for value in values), default=0.0)
    return 10.0 ** min(0, math.floor(math.log10(highest)) - 3) if highest > 0 else 0.0


def histogram(
    edges: Sequence[float], kept: Sequence[int], removed: Sequence[int], threshold: float | None, name: str
) -> str:
    """Scores of one class on a log count axis, with the threshold.

    Args:
        edges: edges of the bins, ascending; one more than the bins.
        kept, removed: number of samples in each bin.
        threshold: score above which samples are removed; None draws no line.
        name: name of the class, for the text alternative.
    """
    plot = _Plot(edges[0], edges[-1], max([2, *kept, *removed]))
    parts = [] if threshold is None else [_zone(plot, threshold)]
    parts += _count_axis(plot)
    for i, counts in enumerate(zip(kept, removed, strict=True)):
        parts += _bars(plot, edges[i], edges[i + 1], *counts)
    parts += _score_axis(plot)
    if threshold is not None:
        parts += _threshold(plot, threshold)
    return _svg("histogram", _WIDTH, _HEIGHT, _describe(name, kept, removed, edges, threshold), parts)


def counts(edges: Sequence[float], values: Sequence[int], x_name: str) -> str:
    """Histogram of a quantity on a log count axis.

    Args:
        edges: edges of the bins, ascending; one more than the bins.
        values: number of samples in each bin.
        x_name: name of the quantity.
    """
    plot = _Plot(edges[0], edges[-1], max([2, *values]))
    parts = _count_axis(plot)
    for i, n in enumerate(values):
        parts += _bars(plot, edges[i], edges[i + 1], n, 0, x_name)
    parts += _score_axis(plot, x_name)
    text = f"Histogram of {counted(sum(values), 'sample')}; {x_name} from {number(edges[0])} to {number(edges[-1])}."
    return _svg("histogram", _WIDTH, _HEIGHT, text, parts)


class _Plot(NamedTuple):
    """Scales of a histogram: scores from `low` to `high`, counts up to `highest`."""

    low: float
    high: float
    highest: int

    def x(self, score: float) -> float:
        return _LEFT + (score - self.low) / (self.high - self.low) * (_X_END - _LEFT)

    def y(self, count: float) -> float:
        return _FOOT - math.log(count / _LOWEST) / math.log(1.15 * self.highest / _LOWEST) * (_FOOT - _TOP)


def _describe(
    name: str, kept: Sequence[int], removed: Sequence[int], edges: Sequence[float], threshold: float | None
) -> str:
    line = "no threshold" if threshold is None else f"the threshold is {number(threshold)}"
    return (
        f"Histogram of the scores of class {name}: {counted(sum(kept), 'sample')} kept, {sum(removed):,} removed; "
        f"scores from {number(edges[0])} to {number(edges[-1])}; {line}."
    )


def _count_axis(plot: _Plot) -> list[str]:
    middle = (_TOP + _FOOT) / 2
    parts = [f'<text class="name mid" transform="translate(11 {middle:.0f}) rotate(-90)">samples, log scale</text>']
    for tick in count_ticks(plot.highest):
        y = plot.y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_X_END}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 6}" y="{y + 4:.1f}">{tick:,}</text>')
    return parts


def _score_axis(plot: _Plot, name: str = "score") -> list[str]:
    parts = [f'<line class="axis" x1="{_LEFT}" x2="{_X_END}" y1="{_FOOT}" y2="{_FOOT}"/>']
    ticks = nice_ticks(plot.low, plot.high)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 0.0
    for tick in ticks:
        x = plot.x(tick)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{_FOOT}" y2="{_FOOT + 4}"/>')
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{_FOOT + 17}">{number(tick, step)}</text>')
    middle = (_LEFT + _X_END) / 2
    return [*parts, f'<text class="name mid" x="{middle:.0f}" y="{_HEIGHT - 6}">{escape(_xml(name))}</text>']


def _bars(plot: _Plot, left: float, right: float, n_kept: int, n_removed: int, counted: str | None = None) -> list[str]:
    """Bars of one bin; kept and removed samples (after a restore) share its width."""
    shown = [(kind, n) for kind, n in (("kept", n_kept), ("removed", n_removed)) if n]
    width = (plot.x(right) - plot.x(left)) / max(1, len(shown))
    gap = min(1.0, width / 4)
    parts = []
    for i, (kind, n) in enumerate(shown):
        x, y = plot.x(left) + i * width, plot.y(n)
        place = f'x="{x:.1f}" y="{y:.1f}" width="{width - gap:.1f}" height="{_FOOT - y:.1f}"'
        what, name = ("score", kind) if counted is None else (counted, "samples")
        tip = f"{escape(_xml(what))} {number(left)} to {number(right)}: {n:,} {name}"
        parts.append(f'<rect class="{kind}" {place}><title>{tip}</title></rect>')
    return parts


def _zone(plot: _Plot, threshold: float) -> str:
    x = plot.x(threshold)
    return f'<rect class="zone" x="{x:.1f}" y="{_TOP}" width="{max(0.0, _X_END - x):.1f}" height="{_FOOT - _TOP}"/>'


def _threshold(plot: _Plot, threshold: float) -> list[str]:
    # In the right half the label is on the left of the line, to stay inside the picture.
    x = plot.x(threshold)
    side, at = ("end", x + 3) if x > _WIDTH / 2 else ("start", x - 3)
    text = f"threshold {number(threshold)}"
    return [
        f'<line class="threshold" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{_FOOT}"/>',
        f'<text class="threshold-name {side}" x="{at:.1f}" y="{_TOP - 10}">{text}</text>',
    ]


def curves(
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    x_name: str,
    share: bool = False,
    whole: bool = True,
) -> str:
    """Lines over a common axis, each with its name at its end.

    Args:
        x: ascending values; a single value is drawn as points.
        series: name -> values, as many as in `x`.
        x_name: name of the axis.
        share: True for an axis from 0 to 1, marked in per cent.
        whole: True for an axis of counts, marked at whole numbers only.
    """
    values = [value for line in series.values() for value in line]
    low, high = (0.0, 1.0) if share else (min(0.0, *values), max(*values, 1e-9))
    left, right = min(x), max(x) if not whole and max(x) > min(x) else max(max(x), min(x) + 1)

    def at(x_value: float, value: float) -> tuple[float, float]:
        return (
            _LEFT + (x_value - left) / (right - left) * (_NAMES - _LEFT),
            _FOOT - (value - low) / (high - low) * (_FOOT - _TOP),
        )

    ticks = nice_ticks(low, high, 5)
    parts = []
    for tick in ticks:
        y = at(left, tick)[1]
        text = f"{100 * tick:.0f} %" if share else number(tick, ticks[1] - ticks[0] if len(ticks) > 1 else 0.0)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_NAMES}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 6}" y="{y + 4:.1f}">{text}</text>')
    for tick in nice_ticks(left, right):
        if not whole or tick == round(tick):
            parts.append(f'<text class="tick mid" x="{at(tick, low)[0]:.1f}" y="{_FOOT + 17}">{number(tick)}</text>')
    parts.append(
        f'<text class="name mid" x="{(_LEFT + _NAMES) / 2:.0f}" y="{_HEIGHT - 6}">{escape(_xml(x_name))}</text>'
    )
    ends = _apart([at(x[-1], line[-1])[1] for line in series.values()])
    for i, ((name, line), end) in enumerate(zip(series.items(), ends, strict=True)):
        tip = escape(_xml(f"{name}, {x_name}"))
        points = " ".join(f"{px:.1f},{py:.1f}" for px, py in map(at, x, line))
        last = f"{100 * line[-1]:.1f} %" if share else number(line[-1])
        parts.append(f'<polyline class="line line-{i}" points="{points}"/>')
        parts += [
            f'<circle class="dot line-{i}" cx="{px:.1f}" cy="{py:.1f}" r="2.5"><title>{tip} '
            f"{number(x_value)}: {number(value)}</title></circle>"
            for x_value, value, (px, py) in zip(x, line, map(at, x, line), strict=True)
        ]
        label = f"{escape(_xml(name))} {last}"
        parts.append(f'<text class="tick line-name" x="{_NAMES + 7}" y="{end + 4:.1f}">{label}</text>')
    text = "; ".join(f"{name} from {number(line[0])} to {number(line[-1])}" for name, line in series.items())
    return _svg("curves", _WIDTH, _HEIGHT, f"{text}, over {len(x)} points of {x_name}.", parts)


def _apart(heights: Sequence[float], least: float = 14.0) -> list[float]:
    """The heights, moved down where two are closer than `least`."""
    moved = list(heights)
    order = sorted(range(len(moved)), key=moved.__getitem__)
    for above, below in itertools.pairwise(order):
        moved[below] = max(moved[below], moved[above] + least)
    return moved


def gauge(value: float, level: float | None, top: float, removed: bool) -> str:
    """A small horizontal bar of `value` on a scale from 0 to `top`, with a tick at the level that it must exceed."""
    scale = 120 / top if top > 0 else 0.0
    kind = "removed" if removed else "kept"
    parts = ['<rect class="track" x="0" y="4" width="120" height="6" rx="1"/>']
    length = min(120.0, max(0.0, value * scale))
    parts.append(f'<rect class="{kind}" x="0" y="4" width="{length:.1f}" height="6" rx="1"/>')
    text = number(value)
    if level is not None and top > 0:
        at = min(119.0, max(1.0, level * scale))
        parts.append(f'<line class="level" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="14"/>')
        text += f", level {number(level)}"
    return _svg("gauge", 120, 14, text, parts)


def whisker(mean: float, low: float, high: float) -> str:
    """A share on a scale from 0 to 1: a dot at the mean, and a line for its interval."""
    at, start, end = (4 + 112 * share for share in (mean, low, high))
    parts = [
        '<rect class="track" x="4" y="6" width="112" height="2"/>',
        f'<rect class="kept" x="{start:.1f}" y="5" width="{max(1.0, end - start):.1f}" height="4"/>',
        f'<circle class="dot line-0" cx="{at:.1f}" cy="7" r="3.5"/>',
    ]
    return _svg("gauge", 120, 14, f"{100 * mean:.1f} %, between {100 * low:.1f} and {100 * high:.1f} %", parts)


def balance(parts: Sequence[tuple[str, int]]) -> str:
    """One bar divided in proportion to (kind, count); every count above 0 is visible."""
    total = sum(n for _, n in parts)
    least = 4.0
    shares = [0.0 if n == 0 else max(least, 1000 * n / total) for _, n in parts]
    scale = 1000 / max(1.0, sum(shares))
    drawn, x = [], 0.0
    for (kind, n), share in zip(parts, shares, strict=True):
        if n:
            width = max(0.5, share * scale - 1.5)
            drawn.append(f'<rect class="{escape(kind)}" x="{x:.1f}" y="0" width="{width:.1f}" height="10"/>')
            x += share * scale
    text = ", ".join(f"{n:,} {kind}" for kind, n in parts)
    return _svg("balance", 1000, 10, text, drawn, stretch=True)


def _svg(kind: str, width: int, height: int, text: str, parts: Sequence[str], stretch: bool = False) -> str:
    ratio = ' preserveAspectRatio="none"' if stretch else ""
    return (
        f'<svg class="{kind}" viewBox="0 0 {width} {height}"{ratio} role="img" aria-label="{escape(_xml(text))}">'
        f"{''.join(parts)}</svg>"
    )


def _xml(text: str) -> str:
    """The text without characters that XML cannot hold."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
