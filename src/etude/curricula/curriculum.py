"""What to learn next: uniform, a fixed mixture, easy to hard, and advance at a threshold.

Every curriculum draws from a `Pool`, which never repeats a problem before its epoch is over, and is a
sampler over fixed data where it need not hear results.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any

from etude.curricula.pool import ALL, Pool
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.plugs import register
from etude.experience.protocols import Clock, Report, World
from etude.experience.types import Problem

if TYPE_CHECKING:
    from torch.utils.data import Sampler

OWNS = frozenset({"next-item"})


class PoolCurriculum(ABC):
    """A curriculum that says from which shelf of a pool each problem comes. It is deaf unless it
    overrides `observe`; `listens` then says so."""

    listens = False

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    @abstractmethod
    def shelf(self, clock: Clock, keys: Keys) -> str:
        """Where the next problem comes from; `keys` are this draw's own."""

    def draw(self, n: int, clock: Clock, keys: Keys) -> list[Problem]:
        """The next `n` problems."""
        return [self.pool.problem(self.shelf(clock, keys.at("shelf", i)), keys) for i in range(n)]

    def observe(self, report: Report) -> None:  # noqa: B027 - most curricula are deaf
        """What came of a step."""

    def as_sampler(self, dataset: Sized, keys: Keys | None = None, epochs: int = 1) -> Sampler[int]:
        """A torch sampler of `len(dataset)` indices a pass, for a dataset that lists the split's problems in
        the world's order. It draws from this curriculum, whose state it therefore shares, and whose clock is
        at its end after `epochs` passes. A DataLoader with workers draws ahead of what is trained on.

        Raises UserError where the curriculum must hear results, or the dataset has another length.
        """
        from torch.utils.data import Sampler

        if self.listens:
            raise UserError(
                f"a {type(self).__name__} curriculum must hear what came of its draws, which a sampler cannot: "
                "use it in a loop"
            )
        if len(dataset) != self.pool.size:
            raise UserError(
                f"a dataset of {len(dataset)} items cannot stand for the {self.pool.size or 'endless'} problems of "
                f"world {self.pool.world.name!r}, split {self.pool.split!r}"
            )
        size, stream = len(dataset), keys or Keys(0)

        class Draws(Sampler[int]):
            def __init__(self, curriculum: PoolCurriculum) -> None:
                self.curriculum = curriculum

            def __iter__(self) -> Iterator[int]:
                pool = self.curriculum.pool
                for _ in range(size - pool.drawn % size):  # a resumed pass goes on where it was
                    clock = Clock(pool.drawn, size * epochs)
                    yield pool.index(self.curriculum.shelf(clock, stream.at("shelf", pool.drawn)), stream)

            def __len__(self) -> int:
                return size

        return Draws(self)

    def state_dict(self) -> dict[str, Any]:
        """Positions and order; subclasses add their own."""
        return {"pool": self.pool.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.pool.load_state_dict(state["pool"])


@register("curriculum", "uniform", owns=OWNS)
class Uniform(PoolCurriculum):
    """Every problem of the split equally often."""

    def __init__(self, world: World, split: str = "train") -> None:
        super().__init__(Pool(world, split))

    def shelf(self, clock: Clock, keys: Keys) -> str:
        """All of them."""
        return ALL


@register("curriculum", "mixture", owns=OWNS)
class Mixture(PoolCurriculum):
    """Categories in fixed shares, by `weights` (any positive scale; None: equal).

    After any number m of draws, category c of k has come m w_c times to within 1 - 1 / (2k - 2), so shares
    are exact wherever all m w_c are whole: R. Tijdeman, "The chairman assignment problem", Discrete
    Mathematics 32, 1980, section 2. A problem keeps its source in `category`.
    """

    def __init__(self, world: World, weights: Mapping[str, float] | None = None, split: str = "train") -> None:
        super().__init__(Pool(world, split))
        weights = dict.fromkeys(self.pool.names, 1.0) if weights is None else weights
        if not all(0 <= w < float("inf") for w in weights.values()):
            raise UserError(f"mixture weights must be finite and at least 0: {dict(weights)}")
        weights = {c: w for c, w in weights.items() if w > 0}
        self.pool.check(list(weights))
        total = sum(weights.values())
        self.weights = {c: w / total for c, w in weights.items()}
        self.counts = dict.fromkeys(self.weights, 0)

    def shelf(self, clock: Clock, keys: Keys) -> str:
        """Of the categories owed enough, the one that must come soonest."""
        m = sum(self.counts.values()) + 1
        slack = 1 / max(2 * len(self.counts) - 2, 1)
        owed = {c: w * m - self.counts[c] for c, w in self.weights.items()}
        eligible = [c for c, o in owed.items() if o >= slack - 1e-9]
        chosen = min(eligible, key=lambda c: (1 - slack - owed[c]) / self.weights[c])
        self.counts[chosen] += 1
        return chosen

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.counts = dict(state["counts"])


@register("curriculum", "easy-to-hard", owns=OWNS)
class EasyToHard(PoolCurriculum):
    """One shelf after another, each for an equal share of the loop.

    Shelves are the categories in `order` (None: the world's own order), or with `levels` as many equal
    parts of a finite world by rising difficulty (Bengio et al., "Curriculum learning", ICML 2009).
    """

    def __init__(
        self, world: World, order: Sequence[str] | None = None, levels: int | None = None, split: str = "train"
    ) -> None:
        super().__init__(Pool(world, split, levels))
        self.order = tuple(order) if order else self.pool.names
        self.pool.check(self.order)

    def shelf(self, clock: Clock, keys: Keys) -> str:
        """The shelf whose turn it is."""
        return self.order[min(int(clock.progress * len(self.order)), len(self.order) - 1)]


@register("curriculum", "threshold", owns=OWNS, needs={"correct"})
class ThresholdAdvance(PoolCurriculum):
    """Moves on to the next category once it is mastered: when the mean solve rate of the last `window`
    problems of the present one is at least `threshold`. Stays at the last."""

    listens = True

    def __init__(
        self,
        world: World,
        order: Sequence[str] | None = None,
        threshold: float = 0.8,
        window: int = 64,
        split: str = "train",
    ) -> None:
        super().__init__(Pool(world, split))
        if not 0 <= threshold <= 1 or window < 1:
            raise UserError(f"threshold must lie in 0 to 1 and window be at least 1, not {threshold} and {window}")
        self.order = tuple(order) if order else self.pool.names
        self.pool.check(self.order)
        self.threshold, self.window = threshold, window
        self.level = 0
        self.recent: list[float] = []

    def shelf(self, clock: Clock, keys: Keys) -> str:
        """The present category."""
        return self.order[self.level]

    def observe(self, report: Report) -> None:
        """Hears of every drawn group, kept or not."""
        here = self.order[self.level]
        self.recent += [g.solved for g in report.groups if g.problem.category == here]
        self.recent = self.recent[-self.window :]
        mastered = len(self.recent) == self.window and sum(self.recent) >= self.threshold * self.window - 1e-9
        if mastered and self.level + 1 < len(self.order):
            self.level += 1
            self.recent = []

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "level": self.level, "recent": list(self.recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.level, self.recent = state["level"], list(state["recent"])
