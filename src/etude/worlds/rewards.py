"""Reward functions with TRL's signature, `f(prompts, completions, **columns) -> list[float | None]`.

Each is one named part of an outcome. Prompts and completions are strings, or, where a problem's prompt
is a chat, lists of messages. Columns are `answer`, `category`, `completion_ids` where the caller has
them, and whatever the problems hold in `meta`; a function is given those it has parameters for.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etude.experience.errors import UserError
from etude.experience.protocols import Score
from etude.experience.types import Outcome, Problem
from etude.worlds.limits import TimeLimit, within
from etude.worlds.verifiers import from_import

log = logging.getLogger(__name__)

RewardFunction = Callable[..., Any]
Columns = dict[str, list[Any]]
Part = float | None  # None: not applicable
FAULT = math.nan


class Rewards:
    """The weighted sum of reward functions, as a score.

    `functions` are functions or imports ("file.py:function"), by name or in order (then their own
    names are used); `weights` match them (default 1). A function's None for a sample means that it
    does not apply and adds nothing. `verifier` gives `correct` and `parsed`, no reward.

    Where a function raises, takes longer than `seconds`, or returns NaN, infinity, something that is
    no number or not one value a sample, that sample is scored 0, `parts["fault"]` counts the functions
    at fault, and a warning is logged once for each function. A batch on which a function raises is
    given to it sample by sample, so that only the samples at fault suffer.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction | str] | Mapping[str, RewardFunction | str],
        weights: Sequence[float] | None = None,
        verifier: Score | None = None,
        seconds: float = 30.0,
    ) -> None:
        named = list(functions.items()) if isinstance(functions, Mapping) else [(_name(f), f) for f in functions]
        self.functions = {n: from_import(f) if isinstance(f, str) else f for n, f in named}
        if not named or len(self.functions) != len(named):
            raise UserError("give at least one reward function, and each under a name of its own")
        given = [1.0] * len(named) if weights is None else list(weights)
        if len(given) != len(named):
            raise UserError(f"{len(given)} weights for {len(named)} reward functions")
        self.weights = dict(zip(self.functions, given, strict=True))
        self.verifier = verifier
        self.seconds = seconds
        self._warned: set[str] = set()

    def __call__(self, problem: Problem, text: str) -> Outcome:
        """The outcome of one completion."""
        return self.judge([problem], [text])[0]

    def judge(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]] | None = None
    ) -> list[Outcome]:
        """The outcomes of completions, one call a function."""
        columns = _columns(problems, texts, completion_ids)
        parts = {name: self._parts(name, columns) for name in self.functions}
        return [
            self._outcome(problem, text, {name: values[i] for name, values in parts.items()})
            for i, (problem, text) in enumerate(zip(problems, texts, strict=True))
        ]

    def _outcome(self, problem: Problem, text: str, parts: Mapping[str, Part]) -> Outcome:
        verdict = self.verifier(problem, text) if self.verifier else Outcome(0.0)
        given = {n: v for n, v in parts.items() if v is not None}
        faults = sum(map(math.isnan, given.values()))
        shown = {n: 0.0 if math.isnan(v) else v for n, v in given.items()}
        reward = 0.0 if faults else sum(self.weights[n] * v for n, v in shown.items())
        if faults:
            shown["fault"] = float(faults)
        return Outcome(reward, verdict.correct, verdict.parsed, shown)

    def _parts(self, name: str, columns: Columns) -> list[Part]:
        """A function's value for each sample: a number, None, or NaN for a fault."""
        function, count = self.functions[name], len(columns["prompts"])
        try:
            values = list(within(self.seconds, function, **_accepted(function, columns)))
        except Exception as error:
            if count > 1 and not isinstance(error, TimeLimit):
                return [self._parts(name, {k: v[i : i + 1] for k, v in columns.items()})[0] for i in range(count)]
            self._warn(name, f"{type(error).__name__}: {error}")
            return [FAULT] * count
        if len(values) != count:
            self._warn(name, f"it gave {len(values)} values for {count} samples")
            return [FAULT] * count
        return [self._number(name, v) for v in values]

    def _number(self, name: str, value: Any) -> Part:
        if value is None:
            return None
        try:
            number = FAULT if isinstance(value, str) else float(value)
        except (TypeError, ValueError):
            number = FAULT
        if not math.isfinite(number):
            self._warn(name, f"it gave {value!r}, which is no finite number")
            return FAULT
        return number

    def _warn(self, name: str, what: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            log.warning("reward %s is at fault (%s): such samples are scored 0 and counted", name, what)


def _name(function: RewardFunction | str) -> str:
    if isinstance(function, str):
        return function.rpartition(":")[2]
    return getattr(function, "__name__", type(function).__name__)


def _columns(problems: Sequence[Problem], texts: Sequence[str], ids: Sequence[Sequence[int]] | None) -> Columns:
    """What the functions are given, by argument name: a list with one entry a sample."""
    names = {name for problem in problems for name in problem.meta}
    columns: Columns = {name: [p.meta.get(name) for p in problems] for name in sorted(names)}
    columns["answer"] = [p.answer for p in problems]
    columns["category"] = [p.category for p in problems]
    if ids is not None:
        columns["completion_ids"] = list(ids)
    chats = [not isinstance(p.prompt, str) for p in problems]
    columns["prompts"] = [list(p.prompt) if c else p.prompt for p, c in zip(problems, chats, strict=True)]
    columns["completions"] = [
        [{"role": "assistant", "content": t}] if c else t for t, c in zip(texts, chats, strict=True)
    ]
    return columns


def _accepted(function: RewardFunction, columns: Columns) -> Columns:
    """The columns that a function has parameters for: all, if it takes **kwargs."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return columns
    return {p.name: columns[p.name] for p in parameters if p.name in columns}
