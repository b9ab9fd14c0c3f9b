"""Curves: round ticks, honest bands, and points where they belong."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from loratune.evaluation.curves import MOST_POINTS, Series, bars, chart, number, smooth, thin, ticks


def svg(text: str) -> ET.Element:
    return ET.fromstring(text[: text.index("</svg>") + 6])


def places(element: ET.Element, kind: str) -> list[tuple[float, float]]:
    found = next(one for one in element.iter() if kind in one.get("class", "").split())
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in found.get("points", "").split())]


@pytest.mark.parametrize(
    ("low", "high", "wanted"), [(0, 10, [0, 2, 4, 6, 8, 10]), (-0.13, 0.05, [-0.1, -0.05, 0, 0.05]), (3, 3, [3])]
)
def test_ticks_are_round(low: float, high: float, wanted: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (0.012345, "0.0123"), (1.2e-5, "1.2e-5"), (12000, "12,000"), (123.4, "123"), (-2, "-2")],
)
def test_numbers_are_short(value: float, said: str) -> None:
    assert number(value) == said


def test_higher_values_are_higher_up_and_later_ones_further_right() -> None:
    made = places(svg(chart([Series("a", [(0, 1.0), (10, 3.0), (20, 2.0)])])), "line")
    assert made[0][0] < made[1][0] < made[2][0]
    assert made[1][1] < made[2][1] < made[0][1]


def test_the_band_is_as_high_as_the_error() -> None:
    drawn = svg(chart([Series("a", [(0, 1.0), (10, 2.0)], [0.5, 0.25])]))
    line, band = places(drawn, "line"), places(drawn, "band")
    scale = (line[0][1] - line[1][1]) / 1.0
    assert line[0][1] - band[0][1] == pytest.approx(0.5 * scale, abs=0.2)
    assert band[2][1] - line[1][1] == pytest.approx(0.25 * scale, abs=0.2)
    assert "± 0.5" in ET.tostring(drawn, encoding="unicode")


def test_zero_is_in_the_image_where_it_is_asked_for() -> None:
    points = [(0.0, 5.0), (1.0, 6.0)]
    assert 'class="zero"' in chart([Series("a", points)], zero=True)
    assert 'class="zero"' not in chart([Series("a", points)])


def test_a_logarithmic_axis_has_equal_ratios_at_equal_distances() -> None:
    made = places(svg(chart([Series("a", [(0, 1.0), (1, 10.0), (2, 100.0)])], log=True)), "line")
    assert made[0][1] - made[1][1] == pytest.approx(made[1][1] - made[2][1], abs=0.2)
    places(svg(chart([Series("a", [(0, 0.0), (1, 10.0)])], log=True)), "line")  # no logarithm of 0: a plain one


def test_smoothing_is_a_mean_and_keeps_the_ends() -> None:
    points = [(step, float(step % 2)) for step in range(9)]
    assert smooth(points, 3)[4] == (4, pytest.approx(2 / 3))
    assert [step for step, _ in smooth(points, 3)] == list(range(9))
    assert smooth([(0, 1.0), (1, 2.0), (2, 3.0)], 9)[0] == (0, 1.0)


def test_long_runs_are_thinned() -> None:
    points = [(step, float(step)) for step in range(10_000)]
    made = thin(points)
    assert len(made) <= MOST_POINTS + 1
    assert made[-1] == points[-1]
    assert thin(points[:10]) == points[:10]


def test_names_are_escaped_and_nothing_is_drawn_of_nothing() -> None:
    assert "<b>" not in chart([Series("<b>", [(0, 1.0)])])
    assert chart([Series("a", [])]) == ""
    assert bars([]) == ""


def test_bars_are_as_long_as_their_values() -> None:
    wide = [float(width) for width in re.findall(r'<rect[^>]*width="([\d.]+)"', bars([("a", 1.0), ("b", 4.0)]))]
    assert wide[1] == pytest.approx(4 * wide[0], rel=0.01)
