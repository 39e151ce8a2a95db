"""Curves and intervals as SVG text: the one way that Etude draws.

The same text serves in a page and as a file of its own: greys and line colours are legible on light and on
dark paper, lines differ by dashes as well as by colour, and every point says its numbers in data attributes
and in a <title>. Equal input gives equal text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from etude.lab.axes import finite, labels, room, short, ticks

# At least 3:1 against white and against near-black, and apart for the colour-blind (after Okabe and Ito).
COLOURS = ("#3b82f6", "#d55e00", "#009e73", "#c065a0", "#a67c00", "#7f7f7f")
DASHES = ("", "7 3", "2 3", "9 3 2 3")
INK = "#767676"
LEFT, RIGHT, TOP, BOTTOM, ROW = 58, 18, 34, 44, 18
MOST = 200  # points of a line that are drawn; of more, the lowest and highest of every bucket
DOTTED = 40  # a line of no more points shows each of them
BAND = 'fill-opacity=".16" stroke="none"'

Point = tuple[float, float, float, float]  # x, y, low, high


@dataclass(frozen=True)
class Line:
    """A curve over `x`, perhaps with a band from `low` to `high`. Points that are not finite are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None

    def points(self) -> list[Point]:
        """The finite points in the order of x; an end of the band that is not there is nan."""
        nan = [math.nan] * len(self.x)
        low, high = (nan if end is None else end for end in (self.low, self.high))
        rows = zip(self.x, self.y, low, high, strict=True)
        found: list[Point] = [(float(x), float(y), float(a), float(b)) for x, y, a, b in rows if finite(x, y)]
        return _thin(sorted(found, key=lambda p: p[0]))


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    percent: bool = False,
    width: int = 640,
    height: int = 300,
) -> str:
    """An <svg> of curves with their bands, ticks and, for more than one, a legend. `percent`: y is a share."""
    drawn = [(i, line, line.points()) for i, line in enumerate(lines)]
    points = [p for _, _, found in drawn for p in found]
    entries = _legend([line.name for line in lines], width) if len(lines) > 1 else []
    top = TOP + ROW * (1 + entries[-1][1] if entries else 0)
    height += top - TOP
    out = [f'<text x="{LEFT}" y="20" font-size="14" class="title">{_text(_cut(title, width // 8))}</text>']
    out += [_key(i, name, x, TOP + ROW * row) for i, (x, row, name) in enumerate(entries)]
    if not points:
        out.append(f'<text x="{width / 2:g}" y="{height / 2:g}" text-anchor="middle">nothing to draw yet</text>')
        return _svg(out, width, height, f"{title}: nothing to draw yet")
    heights = [v for p in points for v in p[1:] if math.isfinite(v)]
    xs = ticks(min(p[0] for p in points), max(p[0] for p in points), all(p[0] == int(p[0]) for p in points))
    low, high = min(heights), max(heights)
    if percent and all(0 <= p[1] <= 1 for p in points):  # the interval of a share may leave what a share can be
        low, high = max(low, 0.0), min(high, 1.0)
    ys = ticks(*room(low, high, percent))
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    if x0 == x1:
        x0, x1 = xs[0], xs[-1]

    def x(value: float) -> float:
        return LEFT + (width - LEFT - RIGHT) * (value - x0) / (x1 - x0)

    def y(value: float) -> float:
        share = (min(max(value, ys[0]), ys[-1]) - ys[0]) / (ys[-1] - ys[0])
        return height - BOTTOM - (height - top - BOTTOM) * share

    for t, said in zip(ys, labels(ys, percent), strict=True):
        out.append(f'<path d="M{LEFT} {y(t):.1f}H{width - RIGHT}" stroke="{INK}" stroke-opacity=".3"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y(t) + 4:.1f}" text-anchor="end">{said}</text>')
    for t, said in zip(xs, labels(xs), strict=True):
        if not x0 <= t <= x1:
            continue
        out.append(f'<text x="{x(t):.1f}" y="{height - BOTTOM + 18}" text-anchor="middle">{said}</text>')
    middle = (LEFT + width - RIGHT) / 2
    out.append(f'<text x="{middle:g}" y="{height - 6}" text-anchor="middle">{_text(x_label)}</text>')
    for i, line, found in drawn:
        colour, dash = _style(i)
        band = [p for p in found if finite(p[2], p[3])]
        if len(band) > 1:
            edge = [f"{x(p[0]):.1f},{y(p[3]):.1f}" for p in band] + [f"{x(p[0]):.1f},{y(p[2]):.1f}" for p in band[::-1]]
            out.append(f'<polygon points="{" ".join(edge)}" fill="{colour}" {BAND}/>')
        path = " ".join(f"{x(p[0]):.1f},{y(p[1]):.1f}" for p in found)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        dots = "".join(_dot(line.name, p, x(p[0]), y(p[1]), x_label, percent) for p in found)
        hidden = ' fill-opacity="0"' if len(found) > DOTTED else ""
        out.append(f'<g fill="{colour}"{hidden}>{dots}</g>')
    return _svg(out, width, height, f"{title}: {y_label} against {x_label}")


def interval_chart(
    rows: Sequence[tuple[str, float, float, float]],
    *,
    title: str,
    x_label: str = "",
    percent: bool = False,
    zero: float = 0.0,
    width: int = 640,
) -> str:
    """An <svg> forest plot: of each row its label, estimate and interval from low to high, with a line at
    `zero`, where there is no effect. An end that is not finite runs to the edge."""
    height = TOP + 2 * ROW * len(rows) + BOTTOM
    out = [f'<text x="12" y="20" font-size="14" class="title">{_text(_cut(title, width // 8))}</text>']
    known = [v for row in rows for v in row[1:] if math.isfinite(v)]
    if not known:
        out.append(f'<text x="12" y="{TOP + ROW}">nothing to draw yet</text>')
        return _svg(out, width, max(height, TOP + 2 * ROW), f"{title}: nothing to draw yet")
    marks = ticks(min(*known, zero), max(*known, zero))
    first, last = marks[0], marks[-1]

    def x(value: float) -> float:
        return 20 + (width - 40) * (min(max(value, first), last) - first) / (last - first)

    bottom = height - BOTTOM + 4
    for t, said in zip(marks, labels(marks, percent), strict=True):
        out.append(f'<path d="M{x(t):.1f} {TOP}V{bottom}" stroke="{INK}" stroke-opacity=".2"/>')
        out.append(f'<text x="{x(t):.1f}" y="{bottom + 16}" text-anchor="middle">{said}</text>')
    out.append(f'<path d="M{x(zero):.1f} {TOP}V{bottom}" stroke="{INK}" stroke-width="2" class="zero"/>')
    out.append(f'<text x="{width / 2:g}" y="{height - 6}" text-anchor="middle">{_text(x_label)}</text>')
    for i, (label, estimate, low, high) in enumerate(rows):
        y = TOP + 2 * ROW * i + ROW
        colour = COLOURS[0]
        said = f"{short(estimate, percent)} [{short(low, percent)}, {short(high, percent)}]"
        said = said if math.isfinite(estimate) else "not measured"
        out.append(f'<text x="20" y="{y - 3}">{_text(_cut(label, int((width - 50) / 6.4) - len(said)))}</text>')
        out.append(f'<text x="{width - 20}" y="{y - 3}" text-anchor="end">{_text(said)}</text>')
        if not math.isnan(low) and not math.isnan(high):
            out.append(f'<path d="M{x(low):.1f} {y + 8}H{x(high):.1f}" stroke="{colour}" stroke-width="3"/>')
        if math.isfinite(estimate):
            numbers = f'data-y="{estimate:.6g}" data-low="{low:.6g}" data-high="{high:.6g}"'
            dot = f'<circle cx="{x(estimate):.1f}" cy="{y + 8}" r="5" fill="{colour}" {numbers}>'
            out.append(f"{dot}<title>{_text(f'{label}: {said}')}</title></circle>")
    return _svg(out, width, height, f"{title}: estimates with their intervals")


def endpoint_charts(record: Mapping[str, Any], width: int = 640) -> list[str]:
    """The endpoints of a record of evidence as forest plots: one for each unit, and one for ratios."""
    scales: dict[tuple[bool, str], list[tuple[str, float, float, float]]] = {}
    for e in record["endpoints"]:
        ratio = bool(e.get("ratio"))
        unit = "" if ratio else record.get("claim", {}).get("metrics", {}).get(e["metric"], {}).get("unit", "")
        estimate, low, high = (math.nan if v is None else float(v) for v in (e["estimate"], e["low"], e["high"]))
        scales.setdefault((ratio, unit), []).append((f"{e['name']} ({e['role']})", estimate, low, high))
    charts = []
    for (ratio, unit), rows in scales.items():
        title = "ratios" if ratio else f"differences in {unit}" if unit and unit != "%" else "differences"
        better = "1 is no effect" if ratio else "positive is better, in the metric's better direction"
        zero = 1.0 if ratio else 0.0
        charts.append(interval_chart(rows, title=title, x_label=better, percent=unit == "%", zero=zero, width=width))
    return charts


def sparkline(values: Sequence[float], *, label: str, percent: bool = False) -> str:
    """A curve the size of a word, from its first to its last value; empty for fewer than two finite values."""
    found = [(i, v) for i, v in enumerate(values) if finite(v)]
    if len(found) < 2:
        return ""
    low, high = (0.0, 1.0) if percent else (min(v for _, v in found), max(v for _, v in found))
    points = " ".join(
        f"{3 + 114 * i / (len(values) - 1):.1f},{25 - 22 * (v - low) / (high - low or 1):.1f}" for i, v in found
    )
    line = f'<polyline points="{points}" fill="none" stroke="{COLOURS[0]}" stroke-width="2"/>'
    return _svg([line], 120, 28, label)


def _thin(points: list[Point]) -> list[Point]:
    if len(points) <= MOST:
        return points
    size = math.ceil(2 * len(points) / MOST)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        bucket = range(start, min(start + size, len(points)))
        kept |= {min(bucket, key=lambda i: points[i][1]), max(bucket, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def _legend(names: Iterable[str], width: int) -> list[tuple[float, int, str]]:
    """Of each name its place: x, row, and what is shown of it."""
    out: list[tuple[float, int, str]] = []
    x, row = float(LEFT), 0
    for name in names:
        shown = _cut(name, 36)
        taken = 34 + 6.8 * len(shown)
        if x > LEFT and x + taken > width:
            x, row = float(LEFT), row + 1
        out.append((x, row, shown))
        x += taken
    return out


def _key(i: int, name: str, x: float, y: float) -> str:
    colour, dash = _style(i)
    path = f'<path d="M{x:.1f} {y - 1}h18" stroke="{colour}" stroke-width="2"{dash}/>'
    return f'{path}<text x="{x + 24:.1f}" y="{y + 3}">{_text(name)}</text>'


def _style(i: int) -> tuple[str, str]:
    """The colour of the i-th line and its dashes; 12 lines differ."""
    dash = DASHES[i % len(DASHES)]
    return COLOURS[i % len(COLOURS)], f' stroke-dasharray="{dash}"' if dash else ""


def _dot(name: str, p: Point, x: float, y: float, x_label: str, percent: bool) -> str:
    numbers = f'data-name="{_text(name)}" data-x="{p[0]:.10g}" data-y="{p[1]:.6g}"'
    said = f"{name}: {short(p[1], percent)} at {x_label} {short(p[0])}"
    if finite(p[2], p[3]):
        numbers += f' data-low="{p[2]:.6g}" data-high="{p[3]:.6g}"'
        said += f", {short(p[2], percent)} to {short(p[3], percent)}"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" {numbers}><title>{_text(said)}</title></circle>'


def _svg(body: Iterable[str], width: int, height: int, label: str) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" class="chart"'
    style = f'font-family="sans-serif" font-size="12" fill="{INK}" role="img" aria-label="{_text(label)}"'
    return "\n".join([f"{head} {style}>", *body, "</svg>\n"])


def _text(text: str) -> str:
    """Any text within XML, also within an attribute; characters that XML has no place for are marked."""
    return escape(re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
