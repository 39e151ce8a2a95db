"""Tokens to look at: their texts, who wrote them, and a colour by advantage, log-probability or entropy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from etude.app.view.runs import Config
from etude.app.view.text import visible
from etude.experience.errors import UserError
from etude.experience.shards import common_prefix
from etude.experience.types import Author, Call, Ids, StepInfo, Trajectory

CHARACTERS = ("table", "tiny", "small")  # policies of the zoo whose tokenizer is always the same


@dataclass(frozen=True)
class Scale:
    """What tokens are coloured by. A value's class is that of the first bound that it does not exceed."""

    label: str
    bounds: tuple[tuple[float, str, str], ...]  # bound, CSS class, what the legend says

    def css(self, value: float) -> str:
        """The class of a value; none where it is not known."""
        return next((css for bound, css, _ in self.bounds if value <= bound), "")


SCALES = {
    "logp": Scale("log-probability", (
        (math.log(0.01), "heat4", "p up to 0.01"), (math.log(0.1), "heat3", "to 0.1"),
        (math.log(0.5), "heat2", "to 0.5"), (math.log(0.9), "heat1", "to 0.9"), (math.inf, "heat0", "above 0.9"),
    )),
    "advantage": Scale("advantage", (
        (-1.0, "down3", "up to -1"), (-0.5, "down2", "to -0.5"), (-1e-9, "down1", "below 0"), (1e-9, "heat0", "0"),
        (0.5, "up1", "to 0.5"), (1.0, "up2", "to 1"), (math.inf, "up3", "above 1"),
    )),
    "entropy": Scale("entropy", (
        (0.1, "heat0", "up to 0.1 nats"), (0.5, "heat1", "to 0.5"), (1.0, "heat2", "to 1"), (2.0, "heat3", "to 2"),
        (math.inf, "heat4", "above 2"),
    )),
}  # fmt: skip


@dataclass(frozen=True)
class Token:
    """A token with its numbers; `shown` is its text with what cannot be seen made visible."""

    place: int
    id: int
    shown: str
    author: str
    logp: float
    sampled: float
    weight: float
    entropy: float
    css: str

    @property
    def said(self) -> str:
        """Everything about it in a line."""
        out = f"{self.place}: id {self.id}, {self.author}"
        if math.isfinite(self.logp):
            out += f", log-probability {self.logp:.4f} (p = {math.exp(self.logp):.4f})"
        return out + (f", entropy {self.entropy:.4f}" if math.isfinite(self.entropy) else "")


@dataclass(frozen=True)
class Turn:
    """A call as it is read: what came before it that was not shown yet, what was written, what the world said."""

    call: Call
    before: str  # text
    runs: tuple[tuple[str, tuple[Token, ...]], ...]  # neighbours by one author
    steps: tuple[StepInfo, ...]


class Reader:
    """Text of single ids; numbers where no tokenizer is known."""

    def __init__(self, tokenizer: Any = None, source: str = "") -> None:
        self.tokenizer, self.source = tokenizer, source

    @classmethod
    def of(cls, folder: Path, config: Config) -> Reader:
        """The run's own tokenizer once the run is finished, else that of the policy it began with."""
        begun = config.policy.partition(":")[0]
        for place in (folder / "policy", Path(begun)):
            if begun and place.is_dir():
                try:
                    return cls(_loaded(str(place), place.stat().st_mtime_ns), f"the tokenizer in {place}")
                except UserError:
                    continue
        if begun in CHARACTERS:
            from etude.policies.tokenizers import CharTokenizer

            return cls(CharTokenizer(), f"the characters of {begun!r}, with which the run began")
        return cls()

    def text(self, ids: Ids) -> str:
        """What ids say together."""
        if self.tokenizer is None:
            return " ".join(f"·{int(i)}" for i in ids)
        return visible(self.tokenizer.decode(ids))

    def one(self, id: int) -> str:
        """What one id says: a control token its name or number."""
        if self.tokenizer is None:
            return f"·{id} "
        return visible(self.tokenizer.decode([id])).replace("\n", "↵\n") or self._name(id)

    def _name(self, id: int) -> str:
        names = getattr(self.tokenizer, "tokens", ())
        return names[id] if 0 <= id < len(names) else f"⟨{id}⟩"


def turns(t: Trajectory, reader: Reader, colour: str, advantage: float | None) -> list[Turn]:
    """The calls of a trajectory in order, tokens coloured by one of SCALES."""
    out = []
    seen = np.empty(0, np.int32)
    for k, call in enumerate(t.calls):
        new = call.context[common_prefix(seen, call.context) :]
        runs = groupby(_tokens(call, reader, colour, advantage), key=lambda token: token.author)
        steps = tuple(s for s in t.steps if s.call == k)
        out.append(Turn(call, reader.text(new), tuple((who, tuple(found)) for who, found in runs), steps))
        seen = np.concatenate([call.context, call.out])
    return out


def colours(t: Trajectory) -> list[str]:
    """What the tokens can be coloured by: advantage always may be asked for, entropy where it was stored."""
    stored = any(_entropy(call) is not None for call in t.calls)
    return [name for name in SCALES if name != "entropy" or stored]


def _tokens(call: Call, reader: Reader, colour: str, advantage: float | None) -> list[Token]:
    entropy = _entropy(call) or [math.nan] * len(call.out)
    out = []
    columns = (call.out, call.author, call.logp_raw, call.logp_sampled, call.weights, entropy)
    for i, (id, who, raw, sampled, weight, spread) in enumerate(zip(*columns, strict=True)):
        own = who == Author.SELF
        value = {"logp": float(raw), "entropy": float(spread)}.get(colour, math.nan)
        if colour == "advantage" and own and advantage is not None:
            value = advantage
        author = Author(int(who)).name.lower()
        numbers = (float(raw), float(sampled), float(weight), float(spread))
        out.append(Token(i, int(id), reader.one(int(id)), author, *numbers, SCALES[colour].css(value)))
    return out


def _entropy(call: Call) -> Sequence[float] | None:
    """The entropies that whoever sampled the call kept in its tags, one a token."""
    found = call.tags.get("entropy")
    return found if isinstance(found, list) and len(found) == len(call.out) else None


@lru_cache(maxsize=8)
def _loaded(folder: str, changed: int) -> Any:
    """A tokenizer, read again when its folder has changed."""
    from etude.policies.tokenizers import load_tokenizer

    return load_tokenizer(folder)
