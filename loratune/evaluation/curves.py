"""Curves as inline SVG: no library, no script, legible in light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 34
COLOURS = 6  # of the page's style, c1 to c6
MOST_POINTS = 400
SHOWN_AS_DOTS = 40


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Args:
        name: in the legend.
        points: (step, value), steps rising.
        errors: half of the band's height at each point; none draws no band.
        faint: drawn thin, behind the others, without a place in the legend.
        colour: number of the colour, from 0; by default its place among the lines.
    """

    name: str
    points: Sequence[tuple[float, float]]
    errors: Sequence[float] = ()
    faint: bool = False
    colour: int | None = None


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within [low, high], about so many: multiples of 1, 2 or 5 times a power of ten."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A number as people read it, with about three digits: 0.0123, 1.2e-05, 12,000."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-3:
        mantissa, power = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:.3g}" if size < 100 else f"{value:.0f}"


def smooth(points: Sequence[tuple[float, float]], width: int) -> list[tuple[float, float]]:
    """The mean of each `width` neighbours, centred; at the ends of fewer."""
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    smoothed = []
    for at, (step, _) in enumerate(points):
        half = min(width // 2, at, len(points) - 1 - at)
        smoothed.append((step, (sums[at + half + 1] - sums[at - half]) / (2 * half + 1)))
    return smoothed


def thin(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most about `most` points: the means of equal runs, and the last point as it is."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    means = [(run[-1][0], sum(value for _, value in run) / len(run)) for run in runs]
    return [*means[:-1], points[-1]]


def chart(lines: Sequence[Series], unit: str = "", zero: bool = False, log: bool = False) -> str:
    """Lines over steps, as an SVG element with its legend below.

    Args:
        lines: those without points are left out; none at all gives an empty text.
        unit: of the values, above the axis.
        zero: let the axis include 0, and draw a line there.
        log: a logarithmic axis, where all values are above 0.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    log = log and all(value > 0 for line in lines for _, value in line.points)
    scale = _Scale(lines, zero, log)
    parts = [_axes(scale, unit, zero)]
    colour = 0
    legend = []
    for line in sorted(lines, key=lambda line: not line.faint):
        own = line.colour if line.colour is not None else colour
        colour += not line.faint
        parts.append(_drawn(line, scale, own % COLOURS + 1))
        if not line.faint:
            legend.append(f'<span class="key c{own % COLOURS + 1}">{escape(line.name)}</span>')
    label = escape(", ".join(line.name for line in lines if not line.faint))
    image = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return image + (f'<p class="legend">{" ".join(legend)}</p>' if legend else "")


class _Scale:
    """From steps and values to places in the image."""

    def __init__(self, lines: Sequence[Series], zero: bool, log: bool) -> None:
        self.log = log
        steps = [step for line in lines for step, _ in line.points]
        self.first, self.last = min(steps), max(steps)
        strong = [line for line in lines if not line.faint] or list(lines)
        values = [value for line in strong for _, value in line.points]
        for line in strong:
            pairs = zip(line.points, line.errors, strict=False)
            values += [value + sign * error for (_, value), error in pairs for sign in (-1, 1) if not log]
        for line in lines:  # of a faint line what is far from all others may leave the image
            ordered = sorted(value for _, value in line.points)
            values += ordered[len(ordered) // 50 : len(ordered) - len(ordered) // 50]
        values += [0.0] if zero and not log else []
        low, high = self._of(min(values)), self._of(max(values))
        room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        self.low, self.high = low - room, high + room

    def _of(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def x(self, step: float) -> float:
        wide = (self.last - self.first) or 1
        return LEFT + (step - self.first) / wide * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (self._of(value) - self.low) / (self.high - self.low)
        return TOP + (1 - min(max(share, 0), 1)) * (HEIGHT - TOP - BOTTOM)

    def marks(self) -> list[float]:
        if not self.log:
            return ticks(self.low, self.high)
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        values = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        within = [value for value in values if self.low <= math.log10(value) <= self.high]
        return within if len(within) <= 7 else [value for value in within if f"{value:e}".startswith("1.")]


def _axes(scale: _Scale, unit: str, zero: bool) -> str:
    elements = []
    for value in scale.marks():
        y = scale.y(value)
        kind = "zero" if zero and value == 0 else "grid"
        elements.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        elements.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    base = HEIGHT - BOTTOM
    for step in ticks(scale.first, scale.last, 6):
        elements.append(f'<text x="{scale.x(step):.1f}" y="{base + 17}" text-anchor="middle">{number(step)}</text>')
    elements.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    elements.append(f'<text class="unit" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">step</text>')
    if unit:
        elements.append(f'<text class="unit" x="{LEFT}" y="{TOP - 1}">{escape(unit)}</text>')
    return "".join(elements)


def _drawn(line: Series, scale: _Scale, colour: int) -> str:
    whole = len(line.points) <= MOST_POINTS
    places = [(scale.x(step), scale.y(value)) for step, value in thin(line.points)]
    elements = []
    if line.errors and whole:
        pairs = list(zip(line.points, line.errors, strict=True))
        edge = [(scale.x(step), scale.y(value + error)) for (step, value), error in pairs]
        edge += [(scale.x(step), scale.y(value - error)) for (step, value), error in reversed(pairs)]
        elements.append(f'<polygon class="band c{colour}" points="{_path(edge)}"/>')
    kind = "faint" if line.faint else "line"
    elements.append(f'<polyline class="{kind} c{colour}" points="{_path(places)}"/>')
    if not line.faint and len(line.points) <= SHOWN_AS_DOTS:
        errors = line.errors or [0.0] * len(line.points)
        for (x, y), (step, value), error in zip(places, line.points, errors, strict=True):
            title = f"step {number(step)}: {number(value)}" + (f" ± {number(error)}" if error else "")
            elements.append(
                f'<circle class="c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{title}</title></circle>'
            )
    return "".join(elements)


def _path(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def bars(values: Sequence[tuple[str, float]], unit: str = "") -> str:
    """Horizontal bars with their names and numbers, in the order given; values of 0 or more."""
    if not values:
        return ""
    most = max(value for _, value in values) or 1.0
    row, left, right = 24, 190, 70
    tall = row * len(values) + 22
    elements = [f'<text class="unit" x="{left}" y="12">{escape(unit)}</text>'] if unit else []
    for at, (name, value) in enumerate(values):
        y, wide = 20 + row * at, (WIDTH - left - right) * value / most
        elements.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        elements.append(f'<rect class="c1" x="{left}" y="{y}" width="{max(wide, 0.5):.1f}" height="{row - 7}" rx="2"/>')
        elements.append(f'<text x="{left + wide + 6:.1f}" y="{y + 13}">{number(value)}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {tall}" role="img" aria-label="{escape(unit)}">{"".join(elements)}</svg>'
