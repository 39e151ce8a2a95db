"""Where reasoning-gym needs help: generators that are not pure, verifiers that can be hung or misled.

Some verifiers hand a model's text to `eval` or to SymPy, which evaluates it: an answer may run code,
or raise 9 to the power of 9**9. A predicate per task says what such a verifier may be given.
"""

from __future__ import annotations

import ast
import contextlib
import io
import random
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from etude.worlds.text import squash

Entry = dict[str, Any]  # question, answer, metadata

LONGEST = 8192  # characters of an answer that a verifier is shown
ENDLESS = 2**31  # item numbers of most tasks
POOLS = {  # of those that draw all their items at once, or limit them
    "acre": 2048,
    "composite": 2048,
    "gsm_symbolic": 2**18,
    "list_functions": 2**18,
    "word_ladder": 20_000,
}

GLOBAL_STREAMS = frozenset({"list_functions", "pool_matrix"})  # draw from `random` and `numpy.random` themselves
CHATTY = frozenset({"bf", "codeio"})  # print while they generate
HIDDEN_ANSWERS = {  # tasks that keep a reference solution in their metadata only
    "graph_color": "possible_answer",
    "propositional_logic": "example_answer",
    "rubiks_cube": "example_correct_answer",
}


# --- generators ----------------------------------------------------------------------------------


class _Sorted(frozenset[Any]):
    """A set whose order does not depend on the process's hash seed."""

    def __iter__(self) -> Iterator[Any]:
        return iter(sorted(super().__iter__(), key=str))

    def __sub__(self, other: Any) -> _Sorted:
        return _Sorted(super().__sub__(other))


def steady(task: str, dataset: Any) -> Any:
    """The dataset, made to give the same items in every process."""
    if task in ("isomorphic_strings", "ransom_note"):
        dataset.letters = _Sorted(dataset.letters)
    elif task == "polynomial_multiplication":
        draw = dataset._get_monomials
        dataset._get_monomials = lambda rng: sorted(draw(rng), key=str)
    elif task == "knight_swap":
        from reasoning_gym.games import knight_swap

        knight_swap.frozenset = _Sorted  # its solver tries the pieces in the order of a set
    elif task == "countdown":
        dataset._generate_expression = _quick_countdown(dataset)
    elif task == "composite":
        for name, part in dataset.datasets.items():
            steady(name, part)
    return dataset


def _quick_countdown(dataset: Any) -> Callable[[random.Random], tuple[str, list[int], int]]:
    """countdown's generator of (expression, numbers, target), some five times as fast.

    Most candidates miss the range of targets. Their values are worked out here, with the same draws,
    and only the one that is kept is built in SymPy.
    """
    config = dataset.config

    def value_of_candidate(rng: random.Random, count: int) -> int:
        numbers = [rng.randint(config.min_value, config.max_value) for _ in range(count)]
        value = numbers[0]
        for i in range(1, count):
            sign = rng.choice(config.operators)
            if sign == "/":
                divisors = numbers[i:]
                rng.shuffle(divisors)
                even = [d for d in divisors if value % d == 0]
                numbers[i], sign = (even[0], "/") if even else (numbers[i], "-")
            n = numbers[i]
            value = {"+": value + n, "-": value - n, "*": value * n, "/": value // n}[sign]
        return value

    def generate(rng: random.Random) -> tuple[str, list[int], int]:
        count = rng.randint(config.min_numbers, config.max_numbers)
        for _ in range(100):
            before = rng.getstate()
            target = value_of_candidate(rng, count)
            if config.min_target <= target <= config.max_target:
                rng.setstate(before)
                _, numbers, _, expression = dataset._generate_candidate_expression(rng, count)
                return expression, numbers, target
        raise ValueError("no expression hit the range of targets")

    return generate


@contextlib.contextmanager
def steady_streams(task: str, index: int) -> Iterator[None]:
    """Around the generation of one item: global random streams are seeded by `index` and then put
    back where the task uses them, and what it prints is dropped."""
    with contextlib.ExitStack() as stack:
        if task in CHATTY or task == "composite":
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if task in GLOBAL_STREAMS or task == "composite":
            stack.callback(random.setstate, random.getstate())
            stack.callback(np.random.set_state, np.random.get_state())
            random.seed(index)
            np.random.seed(index)
        yield


# --- verifiers -----------------------------------------------------------------------------------


def admissible(task: str, answer: str) -> bool:
    """Whether the task's verifier may be given this answer."""
    return len(answer) <= LONGEST and (task not in _GUARDS or _GUARDS[task](answer))


def verifier(task: str, score: Callable[[str, Entry], float]) -> Callable[[str, Entry], float]:
    """The task's verifier; a comparison with the reference where the task's own accepts anything
    (game_of_life_halting compares the truth of two non-empty strings)."""
    if task == "game_of_life_halting":
        return lambda answer, entry: float(squash(answer).lower() == entry["answer"].lower())
    return score


def entry_for_scoring(task: str, entry: Mapping[str, Any]) -> Entry:
    """An entry read from JSON, in the form the verifier expects: the ARC verifiers compare tuples."""
    if task not in ("arc_agi", "rearc"):
        return dict(entry)
    metadata = entry["metadata"]
    return {**entry, "metadata": {**metadata, "output": tuple(tuple(row) for row in metadata["output"])}}


def _matches(pattern: str, longest: int) -> Callable[[str], bool]:
    compiled = re.compile(pattern, re.ASCII)
    return lambda answer: len(answer) <= longest and compiled.fullmatch(answer) is not None


def _literal(answer: str) -> bool:
    """Whether `eval` can do no harm: a Python literal, or text without anything to call or compute."""
    if re.fullmatch(r"[\w\s,.#-]*", answer) and "--" not in answer:
        return True
    try:
        ast.literal_eval(answer.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return True


_CALLABLE = re.compile(r"a?(?:sin|cos|tan)h?|cot|sec|csc|exp|log|ln|sqrt|Abs")


def _formula(answer: str) -> bool:
    """Whether SymPy can evaluate it in no time: a short formula of small constant powers."""
    if len(answer) > 1000 or re.search(r"\d\.?[eE][-+]?\d{3}", answer):
        return False
    try:
        tree = ast.parse(answer.strip(), mode="eval")
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
    return _plain(tree.body, depth=0)


def _plain(node: ast.expr, depth: int) -> bool:
    if depth > 60:
        return False
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float) and abs(node.value) < 1e30
    if isinstance(node, ast.Name):
        return re.fullmatch(r"[A-Za-z][A-Za-z0-9]{0,9}", node.id) is not None
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.UAdd | ast.USub) and _plain(node.operand, depth + 1)
    if isinstance(node, ast.Call):
        named = isinstance(node.func, ast.Name) and _CALLABLE.fullmatch(node.func.id) is not None
        return named and not node.keywords and len(node.args) == 1 and _plain(node.args[0], depth + 1)
    if not isinstance(node, ast.BinOp) or not (_plain(node.left, depth + 1) and _plain(node.right, depth + 1)):
        return False
    if isinstance(node.op, ast.Pow):
        return _small_power(node)
    return isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div)


def _small_power(node: ast.BinOp) -> bool:
    """A power whose exponent holds no power, and no number above 100."""
    inside = list(ast.walk(node.right))
    if any(isinstance(n, ast.Pow) for n in inside):
        return False
    numbers = [n.value for n in inside if isinstance(n, ast.Constant)]
    return len(inside) <= 12 and all(isinstance(v, int | float) and abs(v) <= 100 for v in numbers)


_ARITHMETIC = _matches(r"(?:[\d\s+\-()]|\*(?!\s*\*)|/(?!\s*/)|(?<=\d)\.(?=\d))*", 400)
_GUARDS: dict[str, Callable[[str], bool]] = {
    "countdown": _ARITHMETIC,
    "puzzle24": _ARITHMETIC,
    "polynomial_multiplication": _formula,
    "simple_integration": _formula,
    "intermediate_integration": _formula,
    "string_insertion": _literal,
    "spiral_matrix": _literal,
    "binary_matrix": _literal,
    "n_queens": _literal,
    "coin_flip": _matches(r"\s*[-+]?[\d.]+(?:e-?\d{1,3})?(?:/\d+)?\s*", 100),
    "complex_arithmetic": lambda answer: "nan" not in answer.lower(),
    "pool_matrix": _matches(r"[\d\s.-]*\d[\d\s.-]*", LONGEST),
    "rubiks_cube": lambda answer: re.search(r"\d{3}", answer) is None,
}
