"""Labelled points: what a classifier learns, drawn from a law of its own or scikit-learn's digits.

A problem is a point of `D` numbers, its answer a class; `arrays` gives a whole split at once. As text the numbers
stand in a row parted by spaces, which is what the tokenizer of the policy `classifier` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etude.experience.errors import UserError, missing, unknown
from etude.experience.keys import Keys
from etude.experience.types import Floats, Outcome, Problem

SPLITS = ("train", "test")
Labels = NDArray[np.int64]
Drawn = tuple[Floats, Labels]  # points f32[n, D] and their classes int64[n]
Draw = Callable[[int, np.random.Generator], tuple[NDArray[np.float64], Labels]]


@dataclass(frozen=True)
class PointsWorld:
    """Points and their classes; the classes are the categories, "0" first.

    `kind` "logistic": points x ~ N(0, I) of `features` numbers whose class is drawn from a softmax of `sharpness`
    W x, with W ~ N(0, I / D). "gaussian": x ~ N(`separation` m_c, I) around the mean m_c ~ N(0, I / D) of a class
    drawn uniformly. The numbers are then scaled by factors that fall geometrically from 1 to 1 / sqrt(`condition`),
    so that their covariance has about that condition number, while the law of the classes stays as it is. "digits":
    scikit-learn's 8 x 8 images, 64 numbers from 0 to 1, 10 classes; a fifth of them, by the hash of their pixels, is
    the test split, and the sizes do not apply.

    A share `flips` of the training labels is replaced by another class, drawn uniformly; test labels stay right.
    Raises UserError on options that cannot be, or where scikit-learn is not installed.
    """

    kind: str = "logistic"
    points: int = 2000  # in the training split
    test: int = 1000  # in the test split
    features: int = 20  # D
    classes: int = 4
    condition: float = 100.0  # largest over smallest variance of the numbers
    sharpness: float = 5.0  # of a logistic world: scale of the logits
    separation: float = 5.0  # of a gaussian world: how far its means lie apart
    flips: float = 0.0  # share of training labels that are wrong
    seed: int = 0  # of the points
    name: str = field(default="points", init=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("kind of points", self.kind, KINDS)
        if not 0 <= self.flips <= 1:
            raise UserError(f"points: flips is a share from 0 to 1, not {self.flips}")
        if min(self.points, self.test, self.features) < 1 or self.classes < 2:
            raise UserError("points: points, test and features must be at least 1, and classes at least 2")
        if not (self.condition >= 1 and self.sharpness > 0 and self.separation >= 0):
            raise UserError("points: condition must be at least 1, sharpness above 0 and separation at least 0")
        if self.kind == "digits":
            object.__setattr__(self, "features", 64)
            object.__setattr__(self, "classes", 10)

    @property
    def categories(self) -> tuple[str, ...]:
        """The classes."""
        return tuple(map(str, range(self.classes)))

    def arrays(self, split: str) -> Drawn:
        """All points of a split (f32[n, D]) and their labels (int64[n]), flips included; not to be written to.
        Raises UserError for another split."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        return self._drawn[split]

    def size(self, split: str) -> int:
        """How many points a split has."""
        return len(self._drawn[split][1]) if split in SPLITS else 0

    def problem(self, split: str, index: int, category: str | None = None) -> Problem:
        """Point `index` of a split (of those with that label); after the last it starts over. `meta["point"]` is
        f32[D]."""
        points, labels = self.arrays(split)
        if category is not None:
            if category not in self.categories:
                raise unknown("class of points", category, self.categories)
            of = self._of_class[split, category]
            if not len(of):
                raise UserError(f"points: no {split} point has the label {category}")
            index = int(of[index % len(of)])
        index %= len(labels)
        label = str(labels[index])
        text = " ".join(map(str, points[index]))
        return Problem(f"{split}/{index}", text, label, label, meta={"point": points[index]})

    def score(self, problem: Problem, text: str) -> Outcome:
        """Reward 1 if `text` is the label, else 0."""
        said = text.strip()
        correct = said == problem.answer
        return Outcome(float(correct), correct, said if said in self.categories else None)

    @property
    def weights(self) -> NDArray[np.float64]:
        """f64[D, C]: W of a logistic world."""
        draw = Keys(self.seed).at("points", "logistic", "weights").numpy()
        return draw.normal(size=(self.features, self.classes)) / np.sqrt(self.features)

    @cached_property
    def least_loss(self) -> float:
        """The smallest mean -log p (nats) that a linear classifier can have on the training split: what plain training
        of one converges to."""
        from scipy.optimize import minimize
        from scipy.special import log_softmax

        points, labels = self.arrays("train")
        inputs = np.column_stack([points / (points.std(0) + 1e-12), np.ones(len(points))]).astype(np.float64)
        wanted = np.eye(self.classes)[labels]

        def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            logp = log_softmax(inputs @ weights.reshape(-1, self.classes), axis=1)
            gradient = inputs.T @ (np.exp(logp) - wanted) / len(labels)
            return -float((wanted * logp).sum()) / len(labels), gradient.ravel()

        start = np.zeros(inputs.shape[1] * self.classes)
        limits = {"maxiter": 5000, "maxfun": 10000, "ftol": 1e-14, "gtol": 1e-8}
        return float(minimize(loss, start, jac=True, method="L-BFGS-B", options=limits).fun)

    @cached_property
    def _drawn(self) -> Mapping[str, Drawn]:
        keys = Keys(self.seed).at("points", self.kind)
        drawn = KINDS[self.kind](self, keys)
        points, labels = drawn["train"]
        draw = keys.at("flips").numpy()
        flipped = draw.random(len(labels)) < self.flips
        shift = draw.integers(1, self.classes, len(labels))
        drawn["train"] = points, np.where(flipped, (labels + shift) % self.classes, labels)
        for array in (a for both in drawn.values() for a in both):
            array.setflags(write=False)
        return drawn

    @cached_property
    def _of_class(self) -> Mapping[tuple[str, str], NDArray[np.int64]]:
        return {(s, c): np.flatnonzero(self._drawn[s][1] == int(c)) for s in SPLITS for c in self.categories}


def _logistic(world: PointsWorld, keys: Keys) -> dict[str, Drawn]:
    weights = world.weights

    def draw(count: int, draws: np.random.Generator) -> tuple[NDArray[np.float64], Labels]:
        points = draws.normal(size=(count, world.features))
        gumbel = -np.log(draws.exponential(size=(count, world.classes)))  # its maximum is a draw from the softmax
        return points, (world.sharpness * points @ weights + gumbel).argmax(1)

    return _splits(world, keys, draw)


def _gaussian(world: PointsWorld, keys: Keys) -> dict[str, Drawn]:
    means = keys.at("means").numpy().normal(size=(world.classes, world.features)) / np.sqrt(world.features)

    def draw(count: int, draws: np.random.Generator) -> tuple[NDArray[np.float64], Labels]:
        labels = draws.integers(world.classes, size=count)
        return world.separation * means[labels] + draws.normal(size=(count, world.features)), labels

    return _splits(world, keys, draw)


def _splits(world: PointsWorld, keys: Keys, draw: Draw) -> dict[str, Drawn]:
    """Both splits of a law, which share no point but by a chance of nothing, with their numbers scaled."""
    scale = np.geomspace(1.0, world.condition**-0.5, world.features)
    found = {}
    for split, count in (("train", world.points), ("test", world.test)):
        points, labels = draw(count, keys.at(split).numpy())
        found[split] = (points * scale).astype(np.float32), labels
    return found


def _digits(world: PointsWorld, keys: Keys) -> dict[str, Drawn]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise missing("scikit-learn", "data", "the digits of world points") from None
    images, labels = load_digits(return_X_y=True)
    test = np.array([blake2b(x.tobytes(), digest_size=4).digest()[0] % 5 == 0 for x in images])
    points = (images / 16).astype(np.float32)
    return {"train": (points[~test], labels[~test]), "test": (points[test], labels[test])}


KINDS: dict[str, Callable[[PointsWorld, Keys], dict[str, Any]]] = {
    "logistic": _logistic,
    "gaussian": _gaussian,
    "digits": _digits,
}
