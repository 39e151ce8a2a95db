"""Every reasoning-gym task as a world, scored by the task's own verifier (arXiv:2505.24760).

Problems are drawn without end. A problem belongs to the test split if a hash of its content (not its
wording, where the task's notation tells them apart) says so: whatever the options, no problem of one
split is ever in the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from hashlib import blake2b
from typing import Any

from etude.experience.errors import UserError, unknown
from etude.experience.types import Outcome, Problem
from etude.worlds import compact, repairs
from etude.worlds.limits import within
from etude.worlds.tasks import LEVELS, TASKS, Levels
from etude.worlds.text import SUFFIX, extract_answer, is_number, squash

SPLITS = ("train", "test")
TEST_SHARE = 5  # one problem in so many is a test problem
TRIES = 300  # items drawn for one problem until one falls into its split
CACHED = 4096  # problems kept
SECONDS = 2.0  # that a verifier may take


class ReasoningWorld:
    """The reasoning-gym task `task`.

    `notation`: "natural" gives the task's own question and `suffix`, "compact" a few characters (see
    `compact`; only some tasks have it). `options` are the task's own settings (`min_terms=2`, ...).
    `levels` are the categories: a mapping of names to settings laid over `options`, or a number n for
    the first n levels of reasoning-gym's own curriculum. With neither, the task's levels in `LEVELS`;
    with options alone, the one category "default". An answer is correct if the verifier's score is
    exactly 1. With `partial` the reward is that score, which for many tasks is part of a point for a
    near miss; without, it is 1 for a correct answer and else 0.

    Raises UserError on an unknown task, option or value.
    """

    def __init__(
        self,
        task: str,
        *,
        notation: str = "natural",
        levels: Levels | int | None = None,
        partial: bool = False,
        suffix: str = SUFFIX,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if task not in TASKS:
            raise unknown("reasoning-gym task", task, TASKS)
        if notation not in ("natural", "compact"):
            raise unknown("notation", notation, ("natural", "compact"))
        if notation == "compact" and task not in compact.NOTATIONS:
            raise UserError(f"{task} has no compact notation; these tasks do: {', '.join(sorted(compact.NOTATIONS))}")
        self.name = task
        self.notation = notation
        self.partial = partial
        self.suffix = suffix
        self.seed = seed
        self._configs = _configs(task, levels, options)
        self.categories: tuple[str, ...] = tuple(self._configs)
        self._datasets: dict[str, Any] = {}
        self._problems: dict[tuple[str, int, str], Problem] = {}

    def size(self, split: str) -> int | None:
        """None: problems are drawn without end."""
        return None

    def problem(self, split: str, index: int, category: str | None = None) -> Problem:
        """Problem `index` of a split; without a category, the categories take turns.

        `answer` is a reference in this world's notation (None for rush_hour and boxnet, which have
        none), `difficulty` the number of the category, `meta["entry"]` reasoning-gym's entry as JSON
        would hold it. Raises UserError if the split is unknown or too few problems differ to fill it.
        """
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        if category is None:
            index, turn = divmod(index, len(self.categories))
            category = self.categories[turn]
        elif category not in self._configs:
            raise unknown(f"category of {self.name}", category, self.categories)
        key = (split, index, category)
        if key not in self._problems:
            if len(self._problems) >= CACHED:
                self._problems.clear()
            self._problems[key] = self._draw(split, index, category)
        return self._problems[key]

    def score(self, problem: Problem, text: str) -> Outcome:
        """Judges a completion by the task's verifier, under a time limit.

        `parts`: `score`, the verifier's; `refused`, for an answer that the verifier may not be given;
        `error`, where it raised or took too long. All but the first mean a reward of 0.
        """
        entry = problem.meta["entry"]
        if self.notation == "compact":
            answer = compact.read(text, entry)
        else:
            reference = entry["answer"] or ""
            answer = extract_answer(text, 1 + reference.count("\n"), is_number(reference))
        task = entry["metadata"]["source_dataset"]
        if not repairs.admissible(task, answer):
            return Outcome(0.0, False, answer[:100], {"score": 0.0, "refused": 1.0})
        dataset = self._dataset(problem.category if problem.category in self._configs else self.categories[0])
        if self.name == "composite":
            dataset = dataset.datasets[task]
        verify = repairs.verifier(task, dataset.score_answer)
        try:
            score = float(within(SECONDS, verify, answer, repairs.entry_for_scoring(task, entry)))
        except Exception:
            return Outcome(0.0, False, answer, {"score": 0.0, "error": 1.0})
        correct = score == 1.0
        reward = min(max(score, 0.0), 1.0) if self.partial else float(correct)
        return Outcome(reward, correct, answer, {"score": score})

    def _draw(self, split: str, index: int, category: str) -> Problem:
        """The first of a stream of items that falls into the split."""
        pool = repairs.POOLS.get(self.name, repairs.ENDLESS)
        failure = ""
        for attempt in range(TRIES):
            number = _hash(f"{self.seed}/{split}/{category}/{index}/{attempt}") % pool
            try:
                entry = self._entry(category, number)
            except Exception as error:  # some generators give up on some items
                failure = f" ({squash(str(error))})"
                continue
            if split_of(entry) == split and self._usable(entry):
                return self._problem(f"{split}/{category}/{index}", category, entry)
        raise UserError(
            f"{self.name}: none of {TRIES} items of category {category!r} could serve as {split} problem {index}: "
            f"its options allow too few different problems{failure}"
        )

    def _usable(self, entry: repairs.Entry) -> bool:
        """Whether the reference is an answer: some integrals are their own, unevaluated."""
        return entry["answer"] is None or repairs.admissible(entry["metadata"]["source_dataset"], entry["answer"])

    def _problem(self, name: str, category: str, entry: repairs.Entry) -> Problem:
        if self.notation == "compact":
            prompt, answer = compact.render(entry), compact.write(entry)
        else:
            prompt, answer = f"{entry['question'].rstrip()}\n\n{self.suffix}".rstrip(), entry["answer"]
        difficulty = float(self.categories.index(category))
        return Problem(name, prompt, answer, category, difficulty, meta={"task": self.name, "entry": entry})

    def _entry(self, category: str, number: int) -> repairs.Entry:
        """Item `number`, as JSON would hold it."""
        dataset = self._dataset(category)
        with repairs.steady_streams(self.name, number):
            raw = dataset[number]
        metadata = raw["metadata"]
        answer = raw["answer"]
        if answer is None and (hidden := repairs.HIDDEN_ANSWERS.get(metadata["source_dataset"])):
            answer = metadata[hidden] if isinstance(metadata[hidden], str) else json.dumps(metadata[hidden])
        entry: repairs.Entry = json.loads(
            json.dumps({"question": raw["question"], "answer": answer, "metadata": metadata})
        )
        return entry

    def _dataset(self, category: str) -> Any:
        if category not in self._datasets:
            from reasoning_gym.factory import DATASETS

            with repairs.steady_streams(self.name, self.seed):
                dataset = DATASETS[self.name][0](self._configs[category])
            self._datasets[category] = repairs.steady(self.name, dataset)
        return self._datasets[category]


def split_of(entry: repairs.Entry) -> str:
    """The split an entry belongs to, by the hash of its content."""
    task = entry["metadata"]["source_dataset"]
    content = compact.content(entry) if task in compact.NOTATIONS else squash(entry["question"])
    return "train" if _hash(f"{task}:{content}") % TEST_SHARE else "test"


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _configs(task: str, levels: Levels | int | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """reasoning-gym's configuration for each category."""
    if isinstance(levels, int):
        return _curriculum(task, levels, options)
    if levels is None:
        levels = {"default": {}} if options else LEVELS.get(task, {"default": {}})
    if not levels:
        raise UserError(f"{task}: levels may not be empty")
    return {name: _config(task, {**options, **level}) for name, level in levels.items()}


def _config(task: str, options: Mapping[str, Any]) -> Any:
    """A valid configuration. Raises UserError naming the option or value that is wrong."""
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.factory import DATASETS

    config = DATASETS[task][1]
    known = {f.name: f for f in fields(config) if f.name not in ("seed", "size")}
    for name, value in options.items():
        if name not in known:
            raise unknown(f"option of {task}", name, known)
        default = known[name].default
        if default is not MISSING and not _fits(value, default):
            raise UserError(f"{task}: {name}={value!r} should be {type(default).__name__}, such as {default!r}")
    values = dict(options)
    if task == "composite" and isinstance(values.get("datasets"), list):
        values["datasets"] = [DatasetSpec(**d) if isinstance(d, Mapping) else d for d in values["datasets"]]
    try:
        made = config(seed=0, size=repairs.POOLS.get(task, repairs.ENDLESS), **values)
        if hasattr(made, "validate"):
            made.validate()
    except Exception as error:
        reason = squash(str(error)) or type(error).__name__
        given = ", ".join(f"{k}={v!r}" for k, v in options.items())
        raise UserError(f"{task}: {reason} (given {given or 'no options'})") from None
    return made


def _fits(value: Any, default: Any) -> bool:
    if default is None or isinstance(value, type(default)):
        return not isinstance(value, bool) or isinstance(default, bool) or default is None
    if isinstance(default, float):
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(default, tuple | list) and isinstance(value, tuple | list)


def _curriculum(task: str, count: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """The first `count` levels of the task's own curriculum, each at its own difficulty alone."""
    from reasoning_gym.coaching.base_curriculum import DefaultCurriculumContext, RangeAttributeMode
    from reasoning_gym.factory import create_curriculum, has_curriculum

    if not has_curriculum(task):
        raise UserError(f"{task} has no curriculum: give its levels as a mapping of names to options")
    curriculum = create_curriculum(task)
    most = max(len(a.levels) for a in curriculum.attributes.values())
    if not 1 <= count <= most:
        raise UserError(f"{task} has 1 to {most} levels, not {count}")
    context = DefaultCurriculumContext(RangeAttributeMode.UPPER_BOUND)
    configs = {}
    for level in range(count):
        curriculum.set_global_level(level)
        config = curriculum.generate_configuration(context=context)
        own = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in ("seed", "size")}
        configs[f"level-{level}"] = _config(task, {**own, **options})
    return configs
