from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from etude.experience.store import Measured, Store
from etude.lab.axes import labels, short, ticks
from etude.lab.charts import COLOURS, MOST, Line, interval_chart, line_chart, sparkline

SCRIPT = Path(__file__).parents[1] / "docs" / "learning_curve.py"
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '"><script>alert(1)</script>\x00\ud800&'


def drawn(*lines: Line, **more: object) -> ElementTree.Element:
    return ElementTree.fromstring(line_chart(lines, title="t", x_label="steps", y_label="v", **more))


def dots(svg: ElementTree.Element) -> list[dict[str, str]]:
    return [c.attrib for c in svg.iter(f"{SVG}circle")]


def texts(svg: ElementTree.Element) -> list[str]:
    return [t.text or "" for t in svg.iter(f"{SVG}text")]


def test_points_say_their_numbers_and_lie_where_the_axes_put_them():
    svg = drawn(Line("a", [0, 5, 10], [0, 0.5, 1], [0, 0.4, 0.9], [0.1, 0.6, 1]), percent=True)
    found = dots(svg)
    assert [(d["data-x"], d["data-y"], d["data-low"], d["data-high"]) for d in found] == [
        ("0", "0", "0", "0.1"),
        ("5", "0.5", "0.4", "0.6"),
        ("10", "1", "0.9", "1"),
    ]
    xs, ys = ([float(d[k]) for d in found] for k in ("cx", "cy"))
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11)
    assert xs[0] == 58
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.11)
    assert ys[0] == 256
    assert ys[2] == 34
    assert {"0%", "25%", "50%", "75%", "100%"} <= set(texts(svg))
    assert svg.get("role") == "img"
    assert "v against steps" in svg.get("aria-label", "")


def test_the_band_goes_up_along_high_and_back_along_low():
    svg = drawn(Line("a", [0, 1], [2, 2], [1, 1], [3, 3]))
    (band,) = svg.iter(f"{SVG}polygon")
    y = [float(p.split(",")[1]) for p in band.get("points", "").split()]
    assert y[0] == y[1] < y[2] == y[3]


def test_the_interval_of_a_share_is_cut_where_shares_end():
    svg = drawn(Line("a", [0, 1], [0.1, 0.9], [-0.2, 0.8], [0.4, 1.3]), percent=True)
    assert [t for t in texts(svg) if t.endswith("%")] == ["0%", "25%", "50%", "75%", "100%"]
    (band,) = svg.iter(f"{SVG}polygon")
    assert [float(p.split(",")[1]) for p in band.get("points", "").split()] == [167.2, 34, 78.4, 256]


def test_equal_input_gives_equal_text_and_lists_or_arrays_are_the_same():
    x = np.arange(5)
    plain = line_chart([Line("a", list(x), list(x**2))], title="t", x_label="x", y_label="y")
    assert plain == line_chart([Line("a", x, x**2)], title="t", x_label="x", y_label="y")


def test_points_that_are_not_finite_are_left_out():
    nan, inf = math.nan, math.inf
    svg = drawn(Line("a", [0, 1, 2, nan], [1, nan, inf, 1], [nan, 0, 0, 0], [nan, 1, 1, 1]))
    assert [(d["data-x"], d["data-y"]) for d in dots(svg)] == [("0", "1")]
    assert "data-low" not in dots(svg)[0]
    assert not list(svg.iter(f"{SVG}polygon"))


@pytest.mark.parametrize("lines", [[], [Line("a", [], [])], [Line("a", [1], [math.nan])]])
def test_nothing_to_draw_is_said(lines: list[Line]):
    assert "nothing to draw yet" in texts(drawn(*lines))
    assert "nothing to draw yet" in interval_chart([], title="t")


@pytest.mark.parametrize(
    ("low", "high", "whole", "expected"),
    [
        (0, 100, True, ["0", "25", "50", "75", "100"]),
        (0, 1_500_000, False, ["0", "500k", "1M", "1.5M"]),
        (0, 3, True, ["0", "1", "2", "3"]),
        (-0.25, 0.75, False, ["-0.25", "0", "0.25", "0.5", "0.75"]),
        (7, 7, False, ["0", "5", "10", "15"]),
        (-2, -2, False, ["-4", "-3", "-2", "-1", "0"]),
        (0, 0, False, ["0", "0.25", "0.5", "0.75", "1"]),
        (1.00001, 1.00004, False, ["1.00001", "1.00002", "1.00003", "1.00004"]),
        (0, 5e-324, False, ["0", "0.25", "0.5", "0.75", "1"]),
        (1, 1 + 1e-15, False, ["0", "0.5", "1", "1.5", "2"]),
    ],
)
def test_ticks_are_round_and_can_be_told_apart(low: float, high: float, whole: bool, expected: list[str]):
    assert labels(ticks(low, high, whole)) == expected


def test_steps_are_marked_in_whole_numbers():
    assert {"0", "1", "2", "3"} <= set(texts(drawn(Line("a", [0, 1, 2, 3], [5, 6, 7, 8]))))


@pytest.mark.parametrize("y", [[1e308, -1e308, 0], [5e-324, 0, 0], [1e149, 0, 1], [0, 0, 0], [1, 1 + 1e-15, 1]])
def test_extreme_values_are_drawn_or_left_out(y: list[float]):
    assert 1 <= len(dots(drawn(Line("a", [0, 1, 2], y)))) <= 3


def test_short_numbers():
    assert [short(v) for v in (0, 999, 1500, 2e6, 3.2e9, 0.00012, -2500)] == [
        "0", "999", "1.5k", "2M", "3.2G", "0.00012", "-2.5k",
    ]  # fmt: skip
    assert short(0.405, percent=True) == "40.5%"
    assert short(math.nan) == "nan"


def test_a_long_line_keeps_its_ends_and_its_extremes():
    y = np.zeros(100_000)
    y[54_321], y[99] = 7.0, -3.0
    found = dots(drawn(Line("a", np.arange(100_000), y)))
    assert len(found) <= MOST + 2
    assert (found[0]["data-x"], found[-1]["data-x"]) == ("0", "99999")
    assert {("54321", "7"), ("99", "-3")} <= {(d["data-x"], d["data-y"]) for d in found}


def test_a_sparkline_rises_with_its_values_and_needs_two():
    svg = ElementTree.fromstring(sparkline([0.0, math.nan, 0.5, 1.0], label="a < b", percent=True))
    (line,) = svg.iter(f"{SVG}polyline")
    assert line.get("points") == "3.0,25.0 79.0,14.0 117.0,3.0"
    assert svg.get("aria-label") == "a < b"
    assert sparkline([1.0, math.nan], label="") == ""


def test_several_lines_differ_in_colour_and_dash_and_are_named():
    svg = drawn(*(Line(f"arm {i}", [0, 1], [i, i]) for i in range(12)))
    looks = [(p.get("stroke"), p.get("stroke-dasharray")) for p in svg.iter(f"{SVG}polyline")]
    assert len(set(looks)) == 12
    assert {c for c, _ in looks} == set(COLOURS)
    assert {f"arm {i}" for i in range(12)} <= set(texts(svg))
    width, height = (float(v) for v in svg.get("viewBox", "").split()[2:])
    assert all(float(t.get("x", 0)) < width and float(t.get("y", 0)) < height for t in svg.iter(f"{SVG}text"))


def test_intervals_are_drawn_against_zero():
    text = interval_chart([("gain", 0.1, 0.05, 0.2), ("open", 0.1, -math.inf, math.inf)], title="t", percent=True)
    svg = ElementTree.fromstring(text)
    zero = next(p for p in svg.iter(f"{SVG}path") if p.get("class") == "zero")
    at = float(zero.get("d", "")[1:].split()[0])
    assert [float(d["cx"]) > at for d in dots(svg)] == [True, True]
    assert "10% [5%, 20%]" in texts(svg)
    assert "10% [-inf%, inf%]" in texts(svg)


def test_a_long_label_leaves_room_for_its_numbers():
    found = texts(ElementTree.fromstring(interval_chart([("x" * 200, 1, 0, 2)], title="t", width=420)))
    assert "1 [0, 2]" in found
    (label,) = (t for t in found if t.startswith("x"))
    assert 6.4 * (len(label) + len("1 [0, 2]")) < 420 - 40


def test_hostile_text_stays_text():
    lines = [Line(HOSTILE, [0, 1], [1, 2]), Line("b", [0, 1], [1, 2])]
    chart = line_chart(lines, title=HOSTILE, x_label=HOSTILE, y_label=HOSTILE)
    for text in (chart, interval_chart([(HOSTILE, 1, 0, 2)], title=HOSTILE, x_label=HOSTILE)):
        svg = ElementTree.fromstring(text)
        assert not list(svg.iter(f"{SVG}script"))
        assert "<script" not in text
        assert any("<script>alert(1)</script>\ufffd\ufffd&" in t for t in texts(svg))


class _Eval:
    world, split, items = "w<orld", "test", {}

    def __init__(self, value: float) -> None:
        self.value = value

    def rows(self):
        yield Measured("w<orld", "test", "accuracy", self.value, self.value - 0.1, self.value + 0.1, 10)


def test_the_script_draws_the_curve_of_a_run(tmp_path):
    with Store(tmp_path / "run") as store:
        for step in range(3):
            store.commit("train", step, evaluations=[_Eval(0.2 + step / 10)])
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "run", tmp_path / "out.svg"])
    assert done.returncode == 0
    svg = ElementTree.fromstring((tmp_path / "out.svg").read_text())
    assert [d["data-y"] for d in dots(svg)] == ["0.2", "0.3", "0.4"]
    assert "held-out accuracy on w<orld, with 95% interval" in texts(svg)
