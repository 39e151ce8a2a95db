"""Worlds of many turns: retries and TextWorld games, saved, restored and replayed."""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Interactive
from etude.experience.types import Problem, StepInfo
from etude.worlds.chain import ChainWorld
from etude.worlds.oracles import faulty, step_oracle
from etude.worlds.reasoning import ReasoningWorld
from etude.worlds.retry import RetryWorld
from etude.worlds.textenv import TextEnv, opening, outcome, replay
from etude.worlds.textworld import TextWorld, commands, game_file

RETRY = RetryWorld(ChainWorld(), attempts=3, discount=0.5)
GAMES = TextWorld(lengths=(1, 2, 3), max_turns=6)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Games of this test are made in a folder of its own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ETUDE_CACHE", str(folder))
        GAMES.prepare([GAMES.problem("train", i) for i in range(3)], workers=2)
        yield folder


# --- retries --------------------------------------------------------------------------------------


def play(problem: Problem, answers: list[str]) -> list[StepInfo]:
    return replay(answers, RETRY.env(problem))


def test_a_right_answer_ends_the_episode_and_later_ones_earn_less() -> None:
    problem = RETRY.problem("train", 0)
    right = problem.answer or ""
    for k in range(1, 4):
        steps = play(problem, ["0"] * (k - 1) + [right, right])
        assert len(steps) == k
        ended = outcome(steps)
        assert ended.correct
        assert ended.reward == 0.5 ** (k - 1)
        assert ended.per_call == (0.0,) * (k - 1) + (0.5 ** (k - 1),)
        assert [s.terminated for s in steps] == [False] * (k - 1) + [True]
        assert [s.events for s in steps] == [("wrong",)] * (k - 1) + [("right",)]
    failed = play(problem, ["0"] * 5)
    assert len(failed) == 3
    assert (outcome(failed).reward, outcome(failed).correct) == (0.0, False)


def test_the_last_info_holds_the_outcome() -> None:
    problem = RETRY.problem("train", 0)
    env = RETRY.env(problem)
    assert env.reset()[0] == ""
    _, _, _, _, info = env.step("0")
    assert "outcome" not in info
    _, reward, terminated, truncated, info = env.step(problem.answer or "")
    assert info["outcome"] == {"correct": True, "reward": 0.5}
    assert (reward, terminated, truncated) == (0.5, True, False)
    with pytest.raises(UserError, match="call reset first"):
        env.step("0")


def test_feedback_gives_a_reason_but_not_the_answer() -> None:
    inner = ReasoningWorld("countdown", notation="compact")
    wrong = 0
    for i in range(10):
        problem = RetryWorld(inner).problem("train", i)
        env = RetryWorld(inner).env(problem)
        env.reset()
        numbers = problem.meta["entry"]["metadata"]["numbers"]
        target = problem.meta["entry"]["metadata"]["target"]
        observation, reward, *_ = env.step("+".join(map(str, numbers)))
        wrong += reward == 0
        assert observation == ("right" if reward else f"wrong: gives {sum(numbers)}, not {target}")
    assert wrong
    world = ReasoningWorld("chain_sum", notation="natural")
    oracle = faulty(step_oracle(world), 1.0, ("arithmetic",))
    for i in range(50):
        problem = world.problem("train", i)
        env = RetryWorld(world).env(problem)
        env.reset()
        observation = env.step(oracle.demonstrate(problem, "plain", Keys(i)))[0]
        assert observation.startswith("That is wrong: step ")
        assert observation.endswith(" is wrong. Try again.")


def test_retry_is_the_inner_world_for_one_answer() -> None:
    problem = RETRY.problem("test", 4, "long")
    assert problem.prompt == RETRY.inner.problem("test", 4, "long").prompt
    assert RETRY.score(problem, problem.answer or "").correct
    assert (RETRY.name, RETRY.categories, RETRY.size("train")) == ("retry:chain", ("short", "long"), None)
    assert isinstance(RETRY, Interactive)
    assert step_oracle(RETRY).solve(problem)[1] == problem.answer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RetryWorld(ChainWorld(), attempts=0), "attempts 0"),
        (lambda: RetryWorld(ChainWorld(), discount=0.0), "discount 0.0"),
        (lambda: RetryWorld(RETRY), "turns of its own"),
    ],
)
def test_bad_retry(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


# --- the protocol ---------------------------------------------------------------------------------


def test_environments_are_gymnasiums() -> None:
    check_env(RETRY.env(RETRY.problem("train", 0)), skip_render_check=True)
    check_env(GAMES.env(GAMES.problem("train", 1)), skip_render_check=True)


answers = st.lists(st.sampled_from(["0", "7", "16", "right", "é\n;", ""]), max_size=3)


@given(st.integers(0, 50), answers, answers)
def test_retry_snapshots_continue_alike(index: int, before: list[str], after: list[str]) -> None:
    problem = RETRY.problem("train", index)
    fill = [problem.answer or "" if a == "right" else a for a in (*before, *after)]
    same_continuation(RETRY.env(problem), RETRY.env(problem), fill[: len(before)], fill[len(before) :])


moves = st.lists(
    st.one_of(st.integers(0, 40), st.sampled_from(["dance", "go nowhere", "", "> look\nlook"])), max_size=4
)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2), moves, moves)
def test_textworld_snapshots_continue_alike(index: int, before: list[int | str], after: list[int | str]) -> None:
    problem = GAMES.problem("train", index)
    same_continuation(GAMES.env(problem), GAMES.env(problem), before, after)


def same_continuation(env: TextEnv, other: TextEnv, before: list[Any], after: list[Any]) -> None:
    """A snapshot restored into another environment, and into the same one later, continues alike."""
    _, info = env.reset(seed=3)
    for action in before:
        if env.over:
            break
        info = env.step(chosen(action, info))[4]
    state = env.snapshot()
    json.loads(state)
    over = env.over
    first = finish(env, after, info)
    other.restore(state)
    assert (other.snapshot(), other.over) == (state, over)
    second = finish(other, after, info)
    env.restore(state)
    third = finish(env, after, info)
    assert first == second == third


def finish(env: TextEnv, actions: list[Any], info: dict[str, Any]) -> list[Any]:
    results: list[Any] = []
    for action in actions:
        if env.over:
            break
        results.append(env.step(chosen(action, info)))
        info = results[-1][4]
    return results


def chosen(action: Any, info: dict[str, Any]) -> str:
    """A number picks an admissible action."""
    if isinstance(action, str):
        return action
    return str(info["admissible"][action % len(info["admissible"])]) if info["admissible"] else "look"


@pytest.mark.parametrize("state", [b"", b"[]", b"{}", b"\x80\x04", b'{"problem": 1}'])
def test_what_is_no_snapshot_is_refused(state: bytes) -> None:
    with pytest.raises(UserError, match="restore needs what snapshot gave"):
        RETRY.env(RETRY.problem("train", 0)).restore(state)


def test_a_snapshot_belongs_to_its_problem() -> None:
    env = RETRY.env(RETRY.problem("train", 0))
    env.reset()
    with pytest.raises(UserError, match="cannot be restored into problem 'train/"):
        RETRY.env(RETRY.problem("train", 1)).restore(env.snapshot())


def test_opening() -> None:
    assert opening(Problem("a", "Question"), "") == "Question"
    assert opening(Problem("a", "Question"), "Room") == "Question\n\nRoom"
    chat = ({"role": "system", "content": "s"}, {"role": "user", "content": "q"})
    assert opening(Problem("a", chat), "Room")[1]["content"] == "q\n\nRoom"  # type: ignore[index,typeddict-item]


# --- TextWorld ------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(3))
def test_the_expert_wins(index: int) -> None:
    problem = GAMES.problem("train", index)
    oracle = step_oracle(GAMES)
    steps, answer = oracle.solve(problem)
    assert len(steps) == GAMES.lengths[index]
    won = GAMES.score(problem, oracle.demonstrate(problem, "plain", Keys(0)))
    assert (won.correct, won.reward) == (True, 1.0)
    assert not GAMES.score(problem, "\n".join(steps[:-1])).correct
    for i, step in enumerate(steps):
        assert oracle.plan(problem, steps[:i]) == step
        assert oracle.check_step(problem, steps[:i], step)
        assert not oracle.check_step(problem, steps[:i], "look")
    assert oracle.plan(problem, steps) is None
    for tier in oracle.hints(problem):
        assert all(answer not in hint and steps[-1] not in hint for hint in tier)


def test_the_faulty_expert_loses() -> None:
    problem = GAMES.problem("train", 2)
    for kind in ("left-out", "format"):
        demo = faulty(step_oracle(GAMES), 1.0, (kind,)).trace(problem, "plain", Keys(1))
        (fault,) = demo.faults
        assert not GAMES.score(problem, demo.text).correct
        assert demo.text[slice(*fault.spans[0])] == commands(demo.text)[fault.step]
        assert demo.text[slice(*fault.spans[0])] not in step_oracle(GAMES).solve(problem)[0]


def test_a_game_says_what_can_be_done() -> None:
    env = GAMES.env(GAMES.problem("train", 2))
    observation, info = env.reset()
    assert observation.splitlines()[0].isprintable()
    assert "$" not in observation
    assert env.expert()[0] in info["admissible"]
    _, reward, _, _, info = env.step("dance")
    assert (info["valid"], info["correct"], reward) == (False, False, 0.0)
    for _ in range(5):
        _, _, terminated, truncated, info = env.step("look")
    assert (terminated, truncated, info["outcome"]) == (False, True, {"correct": False, "reward": 0.0})


def test_games_depend_on_their_problem_alone(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    problem = GAMES.problem("train", 1)
    first = GAMES.env(problem).reset()
    made = game_file(problem.options)
    assert made.parent.parent == cache
    stamp = made.stat().st_mtime_ns
    game_file(problem.options)
    assert made.stat().st_mtime_ns == stamp
    monkeypatch.setenv("ETUDE_CACHE", str(tmp_path))
    assert GAMES.env(problem).reset() == first
    assert GAMES.problem("test", 1).options["split"] == "test"
    assert problem.category == "quest-2"


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("textworld"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"needs the package textworld: pip install 'etude\[textworld\]'"):
        GAMES.env(GAMES.problem("train", 0))


@pytest.mark.parametrize("action", ["\\help", "save", "look then quit", "look. restart", "go east\x07", "a" * 500])
def test_what_would_talk_to_the_interpreter_never_reaches_it(action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = TextWorld(lengths=(1,))
    env = w.env(w.problem("train", 0))
    env.reset()
    monkeypatch.setattr(env.unwrapped.game, "step", lambda command: pytest.fail(f"sent {command!r}"))
    observation, reward, terminated, truncated, info = env.step(action)
    assert (reward, terminated, truncated, info["valid"]) == (0.0, False, False, False)
    assert observation == "That is not something you can do here."
