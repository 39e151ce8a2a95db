"""The problems of one split of a world, handed out shelf by shelf without repeats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etude.experience.errors import UserError, unknown
from etude.experience.keys import Keys
from etude.experience.protocols import World
from etude.experience.types import Problem

ALL = ""  # the shelf that holds every problem of the split
START = 2**30  # an endless world is entered at a keyed index below this


class Pool:
    """A position per shelf. A shelf is a category, or `ALL`, or one of `levels`.

    In a finite world a shelf is gone through in a keyed order, another in every epoch, and no problem
    comes twice in an epoch. In an endless one its indices are counted up from a keyed start, so that
    runs with other seeds see other problems. The order is fixed by the keys of the first draw.

    `levels` replaces the categories by that many equal parts of a finite world by rising difficulty,
    named "0", "1", ... Raises UserError for an empty split, or one that cannot be ordered so.
    """

    def __init__(self, world: World, split: str, levels: int | None = None) -> None:
        self.world, self.split = world, split
        self.size = world.size(split)
        if self.size == 0:
            raise UserError(f"world {world.name!r} has no problems in its split {split!r}")
        self.levels = levels
        if levels is not None and (self.size is None or not 1 <= levels <= self.size):
            raise UserError(
                f"world {world.name!r} has {self.size or 'endless'} problems, which cannot be parted into "
                f"{levels} levels of difficulty: order it by category"
            )
        self._shelves: dict[str, Sequence[int]] = {ALL: range(self.size or 0)}
        self._seed: int | None = None
        self._position: dict[str, int] = {}
        self._order: dict[str, tuple[int, NDArray[np.int64]]] = {}  # of each shelf: (epoch, permutation)

    @property
    def seed(self) -> int:
        """What the order of the shelves is keyed by. Raises ValueError before the first draw."""
        if self._seed is None:
            raise ValueError("a pool's order is fixed by its first draw, which has not been")
        return self._seed

    @property
    def names(self) -> tuple[str, ...]:
        """The shelves: levels of difficulty, or the world's categories."""
        return tuple(map(str, range(self.levels))) if self.levels else tuple(self.world.categories)

    def check(self, names: Sequence[str]) -> None:
        """Raises UserError for no names, an unknown one, or one without a problem in this split."""
        if not names:
            raise UserError(f"world {self.world.name!r} has no categories to choose among")
        for name in names:
            if name not in self.names:
                raise unknown("category", name, self.names)
            if self.size is not None and not self._shelf(name):
                raise UserError(f"category {name!r} has no problems in the split {self.split!r}")

    def index(self, shelf: str, keys: Keys) -> int:
        """The index in the world of the shelf's next problem."""
        if self._seed is None:
            self._seed = keys.at("pool").digest() & (2**62 - 1)
        position = self._position.get(shelf, 0)
        self._position[shelf] = position + 1
        if self.size is None:
            return int(Keys(self._seed).at(shelf, "start").numpy().integers(START)) + position
        indices = self._shelf(shelf)
        epoch, offset = divmod(position, len(indices))
        if self._order.get(shelf, (-1,))[0] != epoch:
            order = Keys(self._seed).at(shelf, epoch).numpy().permutation(len(indices))
            self._order[shelf] = (epoch, order)
        return indices[self._order[shelf][1][offset]]

    def problem(self, shelf: str, keys: Keys) -> Problem:
        """The shelf's next problem."""
        index = self.index(shelf, keys)
        category = shelf if self.size is None and shelf != ALL else None
        return self.world.problem(self.split, index, category)

    @property
    def drawn(self) -> int:
        """How many problems were handed out."""
        return sum(self._position.values())

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self._seed, "position": dict(self._position)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seed = state["seed"]
        self._position = dict(state["position"])
        self._order = {}

    def _shelf(self, name: str) -> Sequence[int]:
        """The indices of a finite world's problems on a shelf; all are sorted in when one is asked for."""
        if name not in self._shelves and self.size is not None:
            self._shelves |= self._by_difficulty(self.size) if self.levels else self._by_category(self.size)
        return self._shelves.get(name, ())

    def _by_category(self, size: int) -> dict[str, list[int]]:
        shelves: dict[str, list[int]] = {}
        for i in range(size):
            shelves.setdefault(self.world.problem(self.split, i).category, []).append(i)
        return shelves

    def _by_difficulty(self, size: int) -> dict[str, list[int]]:
        difficulty = []
        for i in range(size):
            problem = self.world.problem(self.split, i)
            if problem.difficulty is None:
                raise UserError(f"problem {problem.id} has no difficulty: order by category")
            difficulty.append(problem.difficulty)
        parts = np.array_split(np.argsort(difficulty, kind="stable"), self.levels or 1)
        return {str(level): part.tolist() for level, part in enumerate(parts)}
