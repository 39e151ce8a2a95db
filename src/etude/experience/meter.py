"""One meter counts everything that costs, where it happens.

Kinds: tokens `sampled`, `prefilled`, `scored`, `trained`, `discarded`; `episodes` (trajectories that a loop
collected); environment `steps`; `attempts`; `judge` and `teacher` queries; `questions` to people; `updates`;
`flops`; `seconds`.
Seconds are the only kind that a resumed run may not repeat exactly.
"""

from __future__ import annotations

from collections.abc import Mapping

KINDS = (
    "sampled",
    "prefilled",
    "scored",
    "trained",
    "discarded",
    "episodes",
    "steps",
    "attempts",
    "judge",
    "teacher",
    "questions",
    "updates",
    "flops",
    "seconds",
)


class Meter:
    """Counters by kind; `charge` adds, `since` subtracts an earlier reading."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(KINDS, 0.0)

    def charge(self, kind: str, n: float) -> None:
        """Add `n` to `kind`. Raises ValueError on an unknown kind or a negative or NaN amount."""
        if kind not in self._counts:
            raise ValueError(f"unknown cost kind {kind!r}; kinds: {', '.join(KINDS)}")
        if not n >= 0:
            raise ValueError(f"cost {kind}={n} is not a number of at least 0")
        self._counts[kind] += n

    def __getitem__(self, kind: str) -> float:
        return self._counts[kind]

    def read(self) -> dict[str, float]:
        """A copy of all counters."""
        return dict(self._counts)

    def since(self, earlier: Mapping[str, float]) -> dict[str, float]:
        """What has been charged since `earlier` was read."""
        return {k: v - earlier.get(k, 0.0) for k, v in self._counts.items()}

    def state_dict(self) -> dict[str, float]:
        return self.read()

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._counts = {k: float(state.get(k, 0.0)) for k in KINDS}
