"""Modes: the first tokens are forced and only those, in plain use, as plugs, and refused where there are none."""

import pytest

from etude.acting.agent import PolicyAgent
from etude.acting.modes import Moded
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Clock, Limits
from etude.experience.store import Store
from etude.experience.types import Author
from etude.methods.api import train
from etude.policies.lm import LM
from etude.policies.tokenizers import CharTokenizer
from etude.policies.transformer import Shape
from etude.policies.zoo import load_policy
from etude.worlds.chain import ChainWorld
from etude.worlds.maze import MazeWorld

WORLD, TOKENS = MazeWorld(), CharTokenizer()
TINY = "tiny:width=16,depth=1,heads=2,ffn=32"


@pytest.fixture(scope="module")
def policy():
    shape = Shape(TOKENS.size, 16, 1, heads=2, kv_heads=1, head_dim=8, ffn=32, limit=128)
    return LM(shape, TOKENS, Keys(0).torch())


@pytest.mark.parametrize(("mode", "first"), [("fast", ">"), ("slow", "+")])
def test_the_first_token_is_forced_and_only_that(policy, mode, first):
    agent = PolicyAgent(policy, limits=Limits(max_tokens=6))
    problems = [WORLD.problem("test", i) for i in range(5)]
    groups = Moded(mode)({"actor": agent}, problems, 3, WORLD.score, Clock(0, 1), Keys(0))
    assert [len(g.members) for g in groups] == [3] * 5
    for member in (m for g in groups for m in g.members):
        assert member.text.startswith(first)
        (call,) = member.calls
        assert call.author.tolist() == [Author.GIVEN] + [Author.SELF] * (len(call.out) - 1)
        assert (member.outcome.parts["trace"] == 0) == (mode == "fast")  # no trace may follow a plan
        assert member.tokens() == len(call.out) - 1


def test_a_world_whose_answers_have_no_modes_is_refused():
    world = ChainWorld()
    agent = PolicyAgent(load_policy(TINY))
    with pytest.raises(UserError, match="must say whether a trace follows"):
        Moded("fast")({"actor": agent}, [world.problem("test", 0)], 1, world.score, Clock(0, 1), Keys(0))


@pytest.mark.parametrize("act", ["fast", "slow"])
def test_modes_are_acting_plugs(act, tmp_path):
    options = {"world": "grid_maze", "policy": TINY, "steps": 2, "problems": 2, "members": 2, "max_tokens": 8}
    options["eval_problems"] = 4
    run = train("group-rl", out=tmp_path / "r", act=act, base=False, **options)
    with Store(run.folder, read_only=True) as store:
        texts = {t["text"][0] for t in store.trajectories()}
    assert texts == {{"fast": ">", "slow": "+"}[act]}
    with pytest.raises(UserError, match="must say whether a trace follows"):
        train("group-rl", out=tmp_path / "s", act=act, base=False, **{**options, "world": "chain_sum"})
