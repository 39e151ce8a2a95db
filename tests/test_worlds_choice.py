"""The choice world, how exploitable a strategy is in it, and mixtures of policies."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from etude.acting.agent import PolicyAgent
from etude.audits.exploitability import exploitability, mean_exploitability, preference_of, strategies
from etude.experience.batch import pack
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Game, Limits, Preferring
from etude.experience.rows import example
from etude.policies.mixture import Mixture
from etude.policies.zoo import load_policy, save_policy
from etude.worlds.chain import ChainWorld
from etude.worlds.choice import GOOD, RESPONSES, ChoiceWorld
from etude.worlds.oracles import load_oracle
from etude.worlds.registry import load_world
from small import small_lm

WORLD = ChoiceWorld()
PROBLEMS = [WORLD.problem("test", i) for i in range(WORLD.contexts)]
CYCLE = np.array([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]])


# --- the world -----------------------------------------------------------------------------------


def good(world, problem):
    return [r for r in RESPONSES if world.score(problem, r).parts["dominated"] == 0]


def test_three_responses_beat_one_another_in_a_circle_and_all_others():
    for problem in PROBLEMS:
        three = good(WORLD, problem)
        assert len(three) == GOOD
        wins = np.array([[WORLD.prefer(problem, a, b) for b in three] for a in three])
        assert sorted(wins[0]) == pytest.approx([0.1, 0.5, 0.9])
        assert wins.sum(1) == pytest.approx([1.5] * 3)  # no ranking
        for a in three:
            assert all(WORLD.prefer(problem, a, b) > 0.88 for b in set(RESPONSES) - set(three))
    assert len({tuple(good(WORLD, p)) for p in PROBLEMS}) > 5  # labelled anew in every context


def test_the_control_has_a_best_response():
    world = load_world("choice", cycle=False)
    for i in range(5):
        problem = world.problem("train", i)
        best = [r for r in RESPONSES if world.score(problem, r).correct]
        assert len(best) == 1
        assert all(world.prefer(problem, best[0], b) > 0.7 for b in set(RESPONSES) - set(best))


@given(st.text(max_size=4), st.text(max_size=4), st.integers(0, 19))
def test_preferences_are_antisymmetric_for_any_texts(a, b, context):
    problem = PROBLEMS[context]
    assert WORLD.prefer(problem, a, b) + WORLD.prefer(problem, b, a) == pytest.approx(1.0)
    assert WORLD.prefer(problem, a, a) == 0.5
    for r in RESPONSES:
        if a[:2] not in RESPONSES:
            assert WORLD.prefer(problem, r, a) > 0.5
        assert WORLD.score(problem, r + a).reward == WORLD.score(problem, r).reward


def test_problems_meet_every_context_in_turn():
    prompts = [WORLD.problem("train", i).prompt for i in range(40)]
    assert prompts[:20] == prompts[20:] == [p.prompt for p in PROBLEMS]
    assert len(set(prompts)) == 20
    assert WORLD.problem("train", 3).id != WORLD.problem("train", 23).id
    assert WORLD.problem("train", 3) == WORLD.problem("train", 3)
    other = ChoiceWorld(seed=1)
    assert any(good(other, p) != good(WORLD, p) for p in PROBLEMS)


def test_what_it_is_to_others():
    assert isinstance(WORLD, Game)
    assert isinstance(WORLD, Preferring)
    assert not isinstance(ChainWorld(), Preferring)
    with pytest.raises(UserError, match="contexts must be 1 to 676"):
        load_world("choice", contexts=0)
    with pytest.raises(UserError, match="unknown split 'dev'"):
        WORLD.problem("dev", 0)
    with pytest.raises(UserError, match="unknown choice category"):
        WORLD.problem("train", 0, "x")


def test_its_oracle_speaks_by_habit():
    oracle = load_oracle(WORLD)
    problem = PROBLEMS[0]
    habits = oracle.habits(problem)
    said = [oracle.demonstrate(problem, "plain", Keys(0).at(i)) for i in range(3000)]
    assert np.array([said.count(r) for r in RESPONSES]) / 3000 == pytest.approx(habits, abs=0.03)
    assert WORLD.score(problem, oracle.solve(problem)[1]).correct
    assert oracle.explain(problem, "xx") == "no response"
    assert (
        load_oracle(WORLD, rate=0.5).demonstrate(problem, "plain", Keys(0)) in RESPONSES
    )  # there is nothing to get wrong
    with pytest.raises(UserError, match="unknown style"):
        oracle.demonstrate(problem, "verbose", Keys(0))


# --- exploitability ------------------------------------------------------------------------------


def test_exploitability_is_0_at_the_equilibrium_and_04_for_whoever_settles():
    assert exploitability(CYCLE, np.ones(3) / 3) == pytest.approx(0.0)
    assert exploitability(CYCLE, np.array([1.0, 0, 0])) == pytest.approx(0.4)
    assert exploitability(CYCLE, np.array([0.3249, 0.3101, 0.3650])) == pytest.approx(0.0160, abs=1e-4)
    for bad in (CYCLE + 0.1, np.array([[0.5, 1.2], [-0.2, 0.5]])):
        with pytest.raises(ValueError, match="a preference has"):
            exploitability(bad, np.ones(len(bad)) / len(bad))
    with pytest.raises(ValueError, match=r"not one of mass 0\.9"):
        exploitability(CYCLE, np.array([0.3, 0.3, 0.3]))


@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=3))
def test_exploitability_is_never_negative(weights):
    x = np.array(weights) / sum(weights)
    assert -1e-9 <= exploitability(CYCLE, x) <= 0.5


def test_a_policys_strategy_is_how_likely_it_begins_with_each_response():
    policy = small_lm()
    found = strategies(policy, WORLD, PROBLEMS[:3])
    assert found.shape == (3, 7)
    assert found.sum(1) == pytest.approx([1.0] * 3, abs=1e-6)
    first = policy.tokenizer.prompt(PROBLEMS[1].prompt)
    tokens = policy.tokenizer.encode("10")
    logp = float(policy.logp(pack([example(first, tokens)])).sum())
    assert found[1, RESPONSES.index("10")] == pytest.approx(np.exp(logp), rel=1e-5)
    p = preference_of(WORLD, PROBLEMS[1])
    assert p.shape == (7, 7)
    assert (p[:6, 6] > 0.5).all()
    assert mean_exploitability(WORLD, PROBLEMS[:3], np.eye(7)[[6, 6, 6]]) == pytest.approx(p[:, 6].max() - 0.5)


# --- mixtures ------------------------------------------------------------------------------------


def two():
    return [small_lm(1), small_lm(2)]


def written(policy, texts, prompt="ab="):
    context = policy.tokenizer.prompt(prompt)
    return pack([example(context, policy.tokenizer.encode(t)) for t in texts])


def test_a_mixture_gives_every_answer_the_mean_of_its_members_probabilities():
    a, b = two()
    texts = ["01", "1", "3210", "01"]
    batch = written(a, texts)
    each = [batch.per_row(p.logp(batch)).exp() for p in (a, b)]
    mixed = Mixture([a, b]).logp(batch)
    assert torch.allclose(batch.per_row(mixed).exp(), (each[0] + each[1]) / 2, rtol=1e-4)
    assert torch.allclose(Mixture([a]).logp(batch), a.logp(batch), atol=1e-5)
    found = strategies(Mixture([a, b]), WORLD, PROBLEMS[:2])
    mean = (strategies(a, WORLD, PROBLEMS[:2]) + strategies(b, WORLD, PROBLEMS[:2])) / 2
    assert found == pytest.approx(mean, rel=1e-4)


def test_it_writes_as_one_of_its_members_drawn_for_every_answer():
    """Each token's log-probability is that of the mixture given what was written before, so that a whole answer has the
    mean probability."""
    a, b = two()
    mixture = Mixture([a, b])
    agent = PolicyAgent(mixture, limits=Limits(4))
    contexts = [a.tokenizer.prompt("ab="), a.tokenizer.prompt("c=")] * 40
    calls = agent.generate(contexts, [Keys(0).at(i) for i in range(80)])
    batch = pack([example(c.context, c.out) for c in calls])
    given = torch.cat([torch.from_numpy(c.logp_raw) for c in calls])
    assert torch.allclose(given, mixture.logp(batch), atol=1e-4)
    member = torch.stack([batch.per_row(p.logp(batch)) for p in (a, b)])
    # Answers that one member finds likelier are written about as often as it says: half of them by each.
    mass = (member[0] - member[1]).sigmoid().mean()
    assert 0.35 < float(mass) < 0.65
    assert len({c.out.tobytes() for c in calls}) > 20


def test_two_that_never_agree_write_no_answer_of_both():
    """Members that say only 00 and only 11: a mixture of tokens would say 01 half of the time."""
    pair = []
    for digit in "01":
        policy = load_policy("table:order=1,rows=64")
        ids = policy.tokenizer.encode(digit).tolist()
        with torch.no_grad():
            for context in range(policy.tokenizer.size):
                if len(policy.contexts) < 64:
                    policy.logits[policy.place([context]), ids] = 30.0
        pair.append(policy)
    mixture = Mixture(pair)
    agent = PolicyAgent(mixture, limits=Limits(2))
    said = [
        mixture.tokenizer.decode(c.out.tolist())
        for c in agent.generate([pair[0].tokenizer.prompt("a=")] * 60, [Keys(0).at(i) for i in range(60)])
    ]
    assert set(said) == {"00", "11"}
    assert 15 < said.count("00") < 45


def test_a_mixture_is_saved_and_loaded_and_does_not_learn(tmp_path):
    a, b = two()
    mixture = Mixture([a, b])
    save_policy(mixture, tmp_path / "m")
    again = load_policy(str(tmp_path / "m"))
    batch = written(a, ["01", "22"])
    assert isinstance(again, Mixture)
    assert torch.allclose(again.logp(batch), mixture.logp(batch), atol=1e-6)
    assert again.fingerprint() == mixture.fingerprint() != Mixture([b, a]).fingerprint()
    assert list(mixture.parameters()) == []
    with pytest.raises(UserError, match="does not learn"):
        mixture.forward(batch, frozenset({"logp"}))
    with pytest.raises(UserError, match="at least one policy"):
        Mixture([])
    with pytest.raises(UserError, match="cannot take back"):
        mixture.decoder().rewind(torch.tensor([1]))
    (tmp_path / "m" / "members" / "0001").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="0001 of its 2 members is missing"):
        load_policy(str(tmp_path / "m"))
