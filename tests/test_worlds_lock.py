"""The lock ladder: rungs that nest, one symbol a turn, a reward only for all of them."""

from itertools import pairwise

import pytest
from gymnasium.utils.env_checker import check_env

from etude.experience.errors import UserError
from etude.experience.protocols import Interactive
from etude.worlds.lock import LockWorld
from etude.worlds.registry import load_world


def test_every_rung_holds_the_one_below():
    world = LockWorld()
    answers = [world.problem("train", i).answer for i in range(8)]
    assert [len(a) for a in answers] == list(range(1, 9))
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(answers))
    assert set("".join(answers)) <= set("012345")
    assert [world.problem("train", i).category for i in range(16)] == [*world.categories] * 2


def test_partners_depend_on_the_seed_alone():
    assert LockWorld().partners == LockWorld().partners
    assert len({LockWorld(seed=s).partners for s in range(5)}) == 5


def test_only_all_partners_open_it():
    world = load_world("lock", rungs=3)
    assert isinstance(world, Interactive)
    problem = world.problem("test", 0, "3")
    assert world.score(problem, world.partners).correct
    for wrong in ("", world.partners[:2], world.partners[:2] + "9", "x" + world.partners):
        assert world.score(problem, wrong).reward == 0.0


@pytest.mark.parametrize("slip", [None, 0, 1, 2])
def test_an_episode_shows_every_symbol_whatever_is_answered(slip):
    world = LockWorld(rungs=3)
    env = world.env(world.problem("train", 0, "3"))
    seen, _ = env.reset(seed=0)
    for turn in range(3):
        assert seen == "abc"[turn]
        seen, reward, terminated, truncated, info = env.step("9" if turn == slip else world.partners[turn])
        assert (terminated, truncated) == (turn == 2, False)
        assert reward == float(turn == 2 and slip is None)
    assert info["outcome"] == {"correct": slip is None, "reward": float(slip is None)}


def test_it_is_a_gymnasium_environment():
    world = LockWorld()
    env = world.env(world.problem("train", 3))
    check_env(env, skip_render_check=True)
    env.reset(seed=1)
    env.step("1")
    state = env.snapshot()
    env.step("2")
    env.restore(state)
    assert env.step("0")[0] == "c"


@pytest.mark.parametrize("options", [{"rungs": 0}, {"rungs": 27}, {"actions": 1}, {"actions": 11}])
def test_sizes_that_cannot_be_are_refused(options):
    with pytest.raises(UserError, match="lock: "):
        LockWorld(**options)


def test_unknown_splits_and_rungs_are_refused():
    with pytest.raises(UserError, match="unknown lock category '9'"):
        LockWorld().problem("train", 0, "9")
    with pytest.raises(UserError, match="unknown split"):
        LockWorld().problem("dev", 0)
