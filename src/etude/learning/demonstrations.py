"""Demonstrations to learn from: a data file, what the world's oracle writes, or the labels of points."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from etude.curation.examples import Examples, completion
from etude.experience.errors import UserError
from etude.experience.protocols import Tokenizer
from etude.experience.rows import Row
from etude.experience.types import Prompt
from etude.learning.setting import Setting, named
from etude.worlds.data import load_examples
from etude.worlds.oracles import load_oracle
from etude.worlds.points import PointsWorld


def demonstrated(
    s: Setting,
    data: str | None,
    columns: Sequence[str],
    count: int,
    style: str,
    noise: float = 0.0,
    faults: Sequence[str] = (),
) -> list[tuple[Prompt, str]]:
    """(prompt, completion) of each line of the file `data` (with `columns`, ours=theirs); without one `count`
    completions that the oracle writes in a `style` for training problems, a share `noise` of them with one of the
    `faults` (none: of any kind), or of a world of points its whole training split.

    Raises UserError for a file that holds no such data, a world without an oracle, and a style it does not have.
    """
    if data is not None:
        return [(e.prompt, e.completion) for e in load_examples(data, "completion", named(columns, "column"))]
    if isinstance(s.world, PointsWorld):
        points = (s.world.problem("train", i) for i in range(s.world.size("train")))
        return [(p.prompt, p.answer or "") for p in points]
    oracle = load_oracle(s.world, noise, faults)
    if style not in oracle.styles:
        raise UserError(f"style must be one of {', '.join(oracle.styles)}, not {style!r}")
    problems = (s.world.problem("train", i) for i in range(count))
    return [(p.prompt, oracle.demonstrate(p, style, s.run.keys.at("demonstrate", p.id))) for p in problems]


def demonstrations(
    s: Setting,
    data: str | None,
    columns: Sequence[str],
    count: int,
    style: str,
    noise: float = 0.0,
    faults: Sequence[str] = (),
    row: Callable[[Tokenizer, Prompt, str, int], Row] = completion,
) -> Examples:
    """What is `demonstrated`, in rows: `row(tokenizer, prompt, text, limit)` makes one of each."""
    shown = demonstrated(s, data, columns, count, style, noise, faults)
    return Examples([row(s.policy.tokenizer, prompt, text, s.policy.limit) for prompt, text in shown])
