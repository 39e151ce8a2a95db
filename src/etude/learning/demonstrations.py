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
    """The rows of the file `data` (with `columns`, ours=theirs); without one `count` completions that the oracle
    writes in a `style` for training problems, a share `noise` of them with one of the `faults` (none: of any kind), or
    of a world of points its whole training split. `row(tokenizer, prompt, text, limit)` makes a row of each.

    Raises UserError for a file that holds no such data, a world without an oracle, and a style it does not have.
    """
    tokenizer, limit = s.policy.tokenizer, s.policy.limit
    if data is not None:
        loaded = load_examples(data, "completion", named(columns, "column"))
        return Examples([row(tokenizer, e.prompt, e.completion, limit) for e in loaded])
    if isinstance(s.world, PointsWorld):
        points = (s.world.problem("train", i) for i in range(s.world.size("train")))
        return Examples([row(tokenizer, p.prompt, p.answer or "", limit) for p in points])
    oracle = load_oracle(s.world, noise, faults)
    if style not in oracle.styles:
        raise UserError(f"style must be one of {', '.join(oracle.styles)}, not {style!r}")
    rows = []
    for i in range(count):
        problem = s.world.problem("train", i)
        text = oracle.demonstrate(problem, style, s.run.keys.at("demonstrate", problem.id))
        rows.append(row(tokenizer, problem.prompt, text, limit))
    return Examples(rows)
