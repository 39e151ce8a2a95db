"""Draws held-out accuracy against steps, with its 95% interval, from a run directory: RUN OUT.svg."""

from __future__ import annotations

import sys
from pathlib import Path

from etude.experience.store import Store

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 300, 56, 16, 36, 44


def draw(run: str) -> str:
    """The curve as SVG text, readable on light and dark pages."""
    with Store(run, read_only=True) as store:
        points = [(e["step"], e["value"], e["low"], e["high"]) for e in store.evaluations("accuracy")]
        world = store.evaluations("accuracy")[0]["world"]
    last = max(step for step, *_ in points)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(share: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    band = [f"{x(s):.1f},{y(h):.1f}" for s, _, _, h in points] + [
        f"{x(s):.1f},{y(w):.1f}" for s, _, w, _ in points[::-1]
    ]
    line = [f"{x(s):.1f},{y(v):.1f}" for s, v, _, _ in points]
    grid = [
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}" stroke="#888" stroke-opacity=".3"/>'
        f'<text x="{LEFT - 8}" y="{y(t) + 4:.1f}" text-anchor="end">{t:.0%}</text>'
        for t in (0, 0.25, 0.5, 0.75, 1)
    ]
    ticks = [f'<text x="{x(s):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{s}</text>' for s, *_ in points]
    dots = [f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="3" fill="#3b82f6"/>' for p in line]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
            'font-size="12" fill="#888" role="img" aria-label="held-out accuracy against steps">',
            f'<text x="{LEFT}" y="20" font-size="14">held-out accuracy on {world}, with 95% interval</text>',
            *grid,
            *ticks,
            f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">steps of GRPO</text>',
            f'<polygon points="{" ".join(band)}" fill="#3b82f6" fill-opacity=".18"/>',
            f'<polyline points="{" ".join(line)}" fill="none" stroke="#3b82f6" stroke-width="2"/>',
            *dots,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(draw(sys.argv[1]))
