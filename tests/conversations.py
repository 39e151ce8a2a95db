"""Random experience for the tests: many-turn conversations of every shape that trajectories may have."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from etude.experience.types import (
    GREEDY,
    RAW,
    Author,
    Call,
    Group,
    Law,
    Outcome,
    Problem,
    StepInfo,
    Trajectory,
)

LAWS = (RAW, GREEDY, Law(temperature=0.7, top_k=5), Law(top_p=0.9, min_p=0.05, tilt=("best-of-4",)))
RELATIONS = ("extend", "again", "window", "rewind", "fresh")


def _tokens(rng: np.random.Generator, low: int, high: int) -> np.ndarray:
    # Few tokens, so that contexts agree by accident too.
    return rng.integers(0, 3, rng.integers(low, high + 1)).astype(np.int32)


def _context(rng: np.random.Generator, relation: str, before: np.ndarray) -> np.ndarray:
    new = _tokens(rng, 0, 3)
    if relation == "extend":
        context = np.concatenate([before, new])
    elif relation == "again":
        context = before
    elif relation == "window":
        context = np.concatenate([before[rng.integers(0, len(before) + 1) :], new])
    elif relation == "rewind":
        context = np.concatenate([before[: rng.integers(0, len(before) + 1)], new])
    else:
        context = new
    return context if len(context) else np.zeros(1, np.int32)


def _overrides(rng: np.random.Generator, kind: str, n: int, previous: Call | None) -> tuple:
    """Positions and branches: none, at random, or those of the call before carried on."""
    if kind == "none":
        return None, None
    pos, branch = rng.integers(0, 9, n).astype(np.int32), rng.integers(0, 3, n).astype(np.int32)
    if kind == "carried" and previous is not None and previous.pos is not None:
        m = min(n, len(previous.pos))
        pos[:m], branch[:m] = previous.pos[:m], previous.branch[:m]
    if kind == "plain":
        pos, branch = np.arange(n, dtype=np.int32), np.zeros(n, np.int32)
    return pos, branch


@st.composite
def calls(draw, first: np.ndarray | None = None, most: int = 5) -> tuple[Call, ...]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    overrides = draw(st.sampled_from(("none", "none", "random", "carried", "plain")))
    made: list[Call] = []
    for i in range(draw(st.integers(1, most))):
        if i == 0 and first is not None:
            context = first
        elif i == 0:
            context = _tokens(rng, 1, 4)
        else:
            previous = np.concatenate([made[-1].context, made[-1].out])
            context = _context(rng, draw(st.sampled_from(RELATIONS)), previous)
        out = _tokens(rng, 0, 5)
        t = len(out)
        author = rng.choice([Author.SELF] * 3 + list(Author), t).astype(np.int8)
        chosen = author == Author.SELF
        logp = np.where(chosen, -rng.random((2, t)), np.nan).astype(np.float32)
        weight = None if rng.random() < 0.6 else (rng.random(t) * rng.integers(0, 2, t)).astype(np.float32)
        kind = overrides if rng.random() < 0.8 else "none"
        pos, branch = _overrides(rng, kind, len(context) + t, made[-1] if made else None)
        made.append(
            Call(
                draw(st.sampled_from(("actor", "critic"))),
                context,
                out,
                author,
                logp[0],
                logp[1],
                law=draw(st.sampled_from(LAWS)),
                weight=weight,
                stop=draw(st.sampled_from(("stop", "length"))),
                tags={"note": "x"} if rng.random() < 0.3 else {},
                pos=pos,
                branch=branch,
            )
        )
    return tuple(made)


@st.composite
def trajectories(draw, problem: Problem, parent: Trajectory | None = None, member: int = 0) -> Trajectory:
    if parent is None:
        own, origin = draw(calls()), None
    else:
        k = draw(st.integers(0, len(parent.calls) - 1))
        token = draw(st.integers(0, len(parent.calls[k].out)))
        shared = np.concatenate([parent.calls[k].context, parent.calls[k].out[:token]])
        own, origin = draw(calls(first=shared)), (parent, k, token)
    outcome = draw(
        st.none()
        | st.builds(
            Outcome,
            st.floats(allow_nan=True, width=32),
            st.sampled_from((None, True, False)),
            st.none() | st.text(max_size=4),
            st.dictionaries(st.text(max_size=3), st.floats(allow_nan=False), max_size=2),
            st.none() | st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
        )
    )
    steps = draw(
        st.lists(st.builds(StepInfo, st.floats(-1, 1), st.booleans(), st.just(("a", "b")), call=st.just(0)), max_size=2)
    )
    return Trajectory(problem, own, tuple(steps), outcome, origin, member, draw(st.text(max_size=6)), {"seed": 3})


PROMPTS = st.text(max_size=5) | st.just(
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1"})
)


@st.composite
def groups(draw, members: int = 3) -> Group:
    problem = Problem(
        draw(st.text(max_size=4)),
        draw(PROMPTS),
        draw(st.none() | st.text(max_size=3)),
        draw(st.sampled_from(("", "short", "long"))),
        draw(st.none() | st.floats(0, 1)),
        {"terms": 3},
        {"deep": {"list": [1, 2.5, None, "é"]}},
    )
    made: list[Trajectory] = []
    for i in range(draw(st.integers(1, members))):
        parent = draw(st.sampled_from([None, *made]))
        made.append(draw(trajectories(problem, parent, i)))
    lone = draw(trajectories(problem))  # a parent that is in no group
    cut = draw(st.integers(0, len(made)))
    discarded = [*made[cut:], *([draw(trajectories(problem, lone, 9))] if draw(st.booleans()) else [])]
    return Group(problem, tuple(made[:cut]), tuple(discarded))


def same_array(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    """Equal bit for bit, nan and all."""
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
