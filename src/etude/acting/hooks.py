"""Hooks: code that is asked while a row is being written, and may take the pen.

A hook says in `when` at which moments it is asked about a row, and answers with what is to happen:
`Go`, `Stop`, `Force` (the agent must say these tokens), `Inject` (text that is not the agent's) or
`Rewind`. It is asked after a token has been written, even one that ends the row: an answer that
writes more, or takes that token back, lets the row go on. Hooks are asked in order, and the first
answer other than `Go` counts. While forced or injected text is being written no hook is asked; what
fell due meanwhile falls due at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from etude.experience.keys import Keys
from etude.experience.types import Ids


@dataclass(frozen=True)
class When:
    """The moments at which a hook is asked about a row.

    `counts`: when the row has so many tokens (0: before its first); `every`: at each multiple of it;
    `ids`: when the agent has written one of these; `strings`: when it has completed one of these.
    """

    counts: frozenset[int] = frozenset()
    every: int = 0
    ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()

    def due(self, after: int, upto: int) -> bool:
        """Whether a count lies in (after, upto]."""
        if self.every and upto // self.every > max(after, 0) // self.every:
            return True
        return any(after < c <= upto for c in self.counts)


@dataclass(frozen=True)
class Go:
    """Nothing: the row goes on, or ends, as it would have."""


@dataclass(frozen=True)
class Stop:
    """The row ends here; its call's `stop` is "hook"."""


@dataclass(frozen=True)
class Force:
    """The agent must write `ids` next (author GIVEN). A stop token among them ends the row."""

    ids: Sequence[int]


@dataclass(frozen=True)
class Inject:
    """`ids` are put in next (author INJECTED); nothing in them ends the row. Listed in the call's
    `tags["injected"]` as (first token, number of tokens, tag)."""

    ids: Sequence[int]
    tag: str = ""


@dataclass(frozen=True)
class Rewind:
    """The row is cut back to its first `offset` tokens and goes on with fresh draws. What is cut is
    counted as discarded, and counts and strings in it fall due anew: a hook that rewinds must know
    when to give up. The row's law names "rewind" as its tilt, for what is kept was selected. A context
    of a single token cannot be rewound to its start."""

    offset: int


Action = Go | Stop | Force | Inject | Rewind


@dataclass(frozen=True)
class Writing:
    """A row as a hook sees it. `row` is its index in the call of `generate`, `out` int32[t] what it has
    written so far, `rewinds` how often it was cut back, `keys` a stream of this very moment."""

    row: int
    context: Ids
    out: Ids
    rewinds: int
    keys: Keys
    decode: Callable[[Sequence[int]], str]

    @property
    def text(self) -> str:
        """`out`, decoded."""
        return self.decode(self.out.tolist())


class Hook(Protocol):
    """Asked `when` it said. Must not depend on the order in which rows are asked."""

    @property
    def when(self) -> When: ...

    def __call__(self, row: Writing) -> Action: ...
