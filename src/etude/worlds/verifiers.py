"""Verifiers: functions `f(text, answer) -> Outcome` that hold a completion against a reference.

Text that does not parse is wrong, never an error.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math as _math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from etude.experience.errors import UserError, missing, unknown
from etude.experience.types import Outcome
from etude.worlds.limits import within
from etude.worlds.text import extract_answer, number, squash

Verifier = Callable[[str, str], Outcome]

SECONDS = 5.0  # that one verdict may take
LONGEST = 4000  # characters that `regex` searches, from the end
LONGEST_FORMULA = 500  # characters of an answer that `math` reads


def exact(text: str, answer: str) -> Outcome:
    """Whether the final answer in `text` is `answer`, white space aside."""
    parsed = extract_answer(text, lines=1 + answer.strip().count("\n"))
    return _outcome(squash(parsed) == squash(answer), parsed)


def numeric(text: str, answer: str, tolerance: float = 1e-6) -> Outcome:
    """Whether the last number of the final answer equals the one in `answer`, up to `tolerance`
    times the larger of 1 and its size. Knows fractions, exponents, thousands separators."""
    parsed = extract_answer(text)
    found, wanted = number(parsed), number(answer)
    if found is None or wanted is None:
        return _outcome(False, parsed)
    return _outcome(abs(found - wanted) <= tolerance * max(1.0, abs(float(wanted))), parsed)


def regex(text: str, answer: str) -> Outcome:
    """Whether the pattern `answer` matches somewhere in `text`. Raises UserError if it is no pattern."""
    try:
        pattern = re.compile(answer)
    except re.error as error:
        raise UserError(f"the answer {answer!r} is not a regular expression: {error}") from None
    found = within(SECONDS, pattern.search, text[-LONGEST:])
    return _outcome(found is not None, found.group() if found else None)


def math(text: str, answer: str) -> Outcome:
    """Whether the final answer is mathematically equal to `answer`, by math-verify.
    Raises UserError if it is not installed."""
    try:
        from math_verify import parse, verify
    except ImportError:
        raise missing("math-verify", "math", "the verifier 'math'") from None
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own limit is off
    parsed = extract_answer(text)
    if len(parsed) > LONGEST_FORMULA or _towering(parsed):
        return _outcome(False, parsed[:100])

    def equal() -> bool:
        # Its own limit is a signal, which only the main thread may set; ours holds in any thread.
        gold, found = (parse(f"${t.strip('$')}$", parsing_timeout=None) for t in (answer, parsed))
        return bool(verify(gold, found, timeout_seconds=None))

    return _outcome(within(SECONDS, equal), parsed)


VERIFIERS: dict[str, Verifier] = {"exact": exact, "numeric": numeric, "regex": regex, "math": math}


def load_verifier(spec: str | Callable[[str, str], Any]) -> Verifier:
    """A verifier by name, by import ("package.module:function", "file.py:function"), or a function.

    A function may return an Outcome, or a number: the reward, correct if it is at least 1. If it
    raises, takes longer than 5 seconds or returns anything else, the answer is scored 0 and
    `parts["fault"]` is 1. Raises UserError if there is no such verifier.
    """
    if isinstance(spec, str) and ":" not in spec:
        if spec not in VERIFIERS:
            raise unknown("verifier", spec, VERIFIERS)
        return partial(_guarded, VERIFIERS[spec])
    return partial(_guarded, from_import(spec) if isinstance(spec, str) else spec)


def from_import(spec: str) -> Callable[..., Any]:
    """The function that "package.module:function" or "path/file.py:function" names.
    Raises UserError if it cannot be imported or called."""
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise UserError(f"{spec!r} names no function: write package.module:function or file.py:function")
    try:
        module = _from_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{source!r} cannot be imported: {type(error).__name__}: {squash(str(error))}") from None
    found = getattr(module, name, None)
    if found is None:
        functions = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise unknown(f"function in {source!r},", name, functions)
    if not callable(found):
        raise UserError(f"{spec!r} is a {type(found).__name__}, not a function")
    return found


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None, "a .py file has a spec"
    assert spec.loader is not None, "and a loader"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _guarded(verifier: Callable[[str, str], Any], text: str, answer: str) -> Outcome:
    try:
        value = within(SECONDS, verifier, text, answer)
        if isinstance(value, Outcome):
            return value
        reward = float(value)
    except UserError:
        raise
    except Exception:
        reward = _math.nan
    if not _math.isfinite(reward):
        return Outcome(0.0, False, None, {"fault": 1.0})
    return Outcome(reward, reward >= 1.0)


def _towering(text: str) -> bool:
    """Whether evaluating it could take for ever: a power of a power, a long exponent, a factorial of
    a number of more than three digits."""
    powers = [m.end() for m in re.finditer(r"\^|\*\*", text)]
    stacked = any(re.match(r"\s*[\^{(\d\s.]*(?:\^|\*\*)", text[end:]) for end in powers)
    return stacked or re.search(r"(?:\^|\*\*)[\s{(+-]*\d{4}|\d{4}[\s})]*!|!\s*!", text) is not None


def _outcome(correct: bool, parsed: str | None) -> Outcome:
    return Outcome(float(correct), correct, parsed)
