"""What a method learns to imitate: prompts with completions, of a file or of the world's own oracle."""

from __future__ import annotations

from collections.abc import Sequence

from etude.experience.errors import UserError
from etude.experience.types import Prompt
from etude.learning.setting import Setting, named
from etude.worlds.data import load_examples
from etude.worlds.oracles import load_oracle


def shown(s: Setting, data: str | None, columns: Sequence[str], count: int, style: str) -> list[tuple[Prompt, str]]:
    """(prompt, completion) of each row of the file `data`, whose columns may be named as ours=theirs; without a file, of
    the first `count` training problems as the oracle writes them in a style. Raises UserError for a file that cannot
    be read, a world without an oracle, and a style it does not have."""
    if data is not None:
        loaded = load_examples(data, "completion", named(columns, "column"))
        return [(e.prompt, e.completion) for e in loaded]
    oracle = load_oracle(s.world)
    if style not in oracle.styles:
        raise UserError(f"style must be one of {', '.join(oracle.styles)}, not {style!r}")
    problems = (s.world.problem("train", i) for i in range(count))
    return [(p.prompt, oracle.demonstrate(p, style, s.run.keys.at("demonstrate", p.id))) for p in problems]
