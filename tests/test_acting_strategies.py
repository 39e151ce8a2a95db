from collections import Counter

import gymnasium
import numpy as np
import pytest

from acting_fakes import Fake, same
from etude.acting.agent import PolicyAgent
from etude.acting.episodes import episodes
from etude.acting.sample import BestOfN, sample
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.plugs import Plug, check, plug
from etude.experience.protocols import Clock, Interactive, Limits
from etude.experience.rows import rows
from etude.experience.types import RAW, Outcome, Problem
from etude.policies.tokenizers import CharTokenizer

CLOCK, KEYS = Clock(0, 1), Keys(3).at(0)
PROBLEMS = [Problem("p1", "1+1="), Problem("p2", "2*3="), Problem("p1", "1+1=")]


def roles(meter=None, limit=200, tokens=12, **more):
    policy = Fake(CharTokenizer(), limit=limit, **more)
    return {"actor": PolicyAgent(policy, limits=Limits(tokens), meter=meter)}


def vowels(problem, text):
    return Outcome(sum(c in "aeiou" for c in text), "a" in text, parsed=text)


# --- sample, best of n -------------------------------------------------------------------------------


def test_sample_gives_n_scored_members_to_each_problem_in_order():
    meter = Meter()
    groups = sample(roles(meter), PROBLEMS, 4, vowels, CLOCK, KEYS)
    assert [g.problem for g in groups] == PROBLEMS
    for group in groups:
        assert [m.member for m in group.members] == [0, 1, 2, 3]
        for m in group.members:
            (call,) = m.calls
            assert call.context.tolist() == CharTokenizer().prompt(group.problem.prompt).tolist()
            assert m.text == CharTokenizer().decode(call.out.tolist())
            assert m.outcome == vowels(group.problem, m.text)
            assert call.law == RAW
    assert meter["sampled"] == sum(m.tokens() for g in groups for m in g.members)
    assert meter["prefilled"] == 5 + 5  # two different prompts


def test_a_members_stream_depends_on_its_problem_and_place_alone():
    groups = sample(roles(), PROBLEMS, 4, vowels, CLOCK, KEYS)
    other = sample(roles(), [PROBLEMS[1], PROBLEMS[0]], 2, vowels, CLOCK, KEYS)
    for a, b in ((groups[1], other[0]), (groups[0], other[1])):
        assert all(same(x.calls[0], y.calls[0]) for x, y in zip(a.members, b.members, strict=False))
    again, first = (g.members[0].calls[0].out.tolist() for g in (groups[2], groups[0]))
    assert again != first  # the same problem for the second time
    assert sample(roles(), PROBLEMS[:1], 1, vowels, CLOCK, KEYS.at(1))[0].members[0].calls[0].out.tolist() != first


def test_the_stop_token_is_not_in_the_text():
    groups = sample(roles(stop_bias=9), PROBLEMS, 2, vowels, CLOCK, KEYS)
    members = [m for g in groups for m in g.members]
    assert any(m.calls[0].stop == "stop" for m in members)
    for m in members:
        assert len(m.text) == len(m.calls[0].out) - (m.calls[0].stop == "stop")


def test_best_of_n_keeps_the_best_and_says_that_its_law_is_bent():
    groups = BestOfN(5)(roles(), PROBLEMS, 3, vowels, CLOCK, KEYS)
    plain = sample(roles(), PROBLEMS, 3, vowels, CLOCK, KEYS)
    for group, drawn in zip(groups, plain, strict=True):
        assert (len(group.members), len(group.discarded)) == (3, 12)
        for m, first in zip(group.members, drawn.members, strict=True):
            rest = [t.reward for t in group.discarded if t.member == m.member]
            assert m.reward >= max(rest)
            assert m.calls[0].law.tilt == ("best-of-5",)
            seen = [t.calls[0].out.tolist() for t in (m, *group.discarded) if t.member == m.member]
            assert first.calls[0].out.tolist() in seen
    with pytest.raises(UserError):
        BestOfN(0)


def test_selected_samples_may_not_feed_a_ratio():
    ratio = Plug("objective", "ratio", object, law="raw", needs=frozenset({"logp_old"}))
    check([plug("acting", "sample"), ratio])
    with pytest.raises(UserError, match="best-of-n"):
        check([plug("acting", "best-of-n"), ratio])
    assert plug("acting", "sample").build() is sample
    assert plug("acting", "best-of-n").build(candidates=2) == BestOfN(2)


# --- episodes ----------------------------------------------------------------------------------------


class Count(gymnasium.Env[str, str]):
    """Says how many turns are over, for as many turns as the problem says; may break at one."""

    def __init__(self, problem, log):
        self.problem, self.log = problem, log

    def reset(self, *, seed=None, options=None):
        self.turn, self.seed = 0, seed
        self.log.append(("reset", self.problem.id, seed))
        if self.problem.options.get("breaks") == 0:
            raise RuntimeError("no such level")
        return "begin", {}

    def step(self, action):
        self.turn += 1
        self.log.append(("step", self.problem.id, action))
        if self.problem.options.get("breaks") == self.turn:
            raise RuntimeError("lost the game")
        over = self.turn == self.problem.options["turns"]
        info = {"valid": len(action) > 3, "correct": True if over else None, "events": ("end",) if over else ()}
        return f"turn {self.turn}", 0.5, over, False, info

    def close(self):
        self.log.append(("close", self.problem.id, None))


def world(n, breaks=None, **more):
    return Problem(f"w{n}", f"play {n}", options={"turns": n, "breaks": breaks, **more})


def play(problems, n=2, log=None, actor=None, **options):
    log = [] if log is None else log
    return episodes(lambda p: Count(p, log), **options)(actor or roles(), problems, n, vowels, CLOCK, KEYS)


def test_episodes_of_different_lengths_are_played_to_their_ends_in_lockstep():
    meter, log = Meter(), []
    actor = roles()
    groups = play([world(1), world(4), world(2)], 3, log, actor, meter=meter)
    assert [[len(m.calls) for m in g.members] for g in groups] == [[1] * 3, [4] * 3, [2] * 3]
    assert actor["actor"].policy.prefilled[0] == 3  # first turn: all nine rows, three different prompts
    assert len(actor["actor"].policy.prefilled) == 4  # one batch a turn
    assert meter["steps"] == 3 * (1 + 4 + 2)
    assert Counter(kind for kind, _, _ in log)["close"] == 9
    for group in groups:
        for m in group.members:
            assert [s.call for s in m.steps] == list(range(len(m.calls)))
            assert m.steps[-1].terminated
            assert m.outcome == Outcome(0.5 * len(m.calls), True, per_call=(0.5,) * len(m.calls))
            assert ("step", m.problem.id, m.text) in log
    seeds = {(name, seed) for kind, name, seed in log if kind == "reset"}
    assert len(seeds) == 3  # members of a group start alike


def test_contexts_extend_and_merge_into_one_row_an_episode():
    t = CharTokenizer()
    for m in play([world(4)])[0].members:
        context = t.prompt("play 4\n\nbegin").tolist()
        for k, call in enumerate(m.calls):
            assert call.context.tolist() == context
            end = [] if call.stop == "stop" else [t.eos]
            context += [*call.out.tolist(), *end, *t.observation(f"turn {k + 1}").tolist()]
        (row,) = rows(m)
        assert row.columns["call"].tolist() == [k for k, c in enumerate(m.calls) for _ in c.out]


def test_a_window_shows_the_last_turns_only():
    t = CharTokenizer()
    full = play([world(5)], window=None, actor=roles(tokens=3))[0].members[0]
    for m in play([world(5)], window=2, actor=roles(tokens=3))[0].members:
        opening = t.prompt("play 5\n\nbegin").tolist()
        for k, call in enumerate(m.calls):
            shown = t.decode(call.context.tolist())
            assert call.context.tolist()[: len(opening)] == opening
            assert [f"turn {i}\n" in shown for i in range(1, 5)] == [k - 2 < i <= k for i in range(1, 5)]
        assert len(rows(m)) > 1
    assert len(rows(full)) == 1


def test_old_turns_are_dropped_where_contexts_no_longer_fit():
    actor = roles(limit=70, tokens=10)
    for m in play([world(8)], actor=actor, room=10)[0].members:
        assert len(m.calls) == 8
        assert all(len(c.context) <= 60 for c in m.calls)
        assert {c.stop for c in m.calls} <= {"stop", "length"}
    actor = roles(limit=30, tokens=12, stop_bias=-9)
    for m in play([world(8)], actor=actor, room=1)[0].members:
        assert len(m.calls) == 1
        assert m.steps[-1].truncated
        assert m.steps[-1].events == ("context",)
        assert not m.outcome.correct


def test_an_episode_ends_at_max_turns():
    for m in play([world(9)], max_turns=3)[0].members:
        assert len(m.calls) == 3
        assert (m.steps[-1].truncated, m.steps[-1].events) == (True, ("max_turns",))


@pytest.mark.parametrize("breaks", [0, 2])
def test_what_an_environment_raises_ends_its_episode_and_is_counted(breaks):
    good, bad = play([world(3), world(4, breaks)])
    assert dict(good.tags) == {}
    assert bad.tags == {"env_errors": 2}
    for m in bad.members:
        assert len(m.calls) == breaks
        assert not m.steps[-1].valid
        assert m.steps[-1].truncated
        assert m.outcome.correct is False
        assert m.tags["env_error"] == f"RuntimeError: {'no such level' if breaks == 0 else 'lost the game'}"
    assert all(m.correct for m in good.members)


def test_environments_of_which_none_begins_are_an_error():
    with pytest.raises(UserError, match="w4: RuntimeError: no such level"):
        play([world(4, 0), world(5, 0)])


def test_an_episode_does_not_depend_on_those_around_it():
    many = play([world(1), world(4), world(2)], 3)
    (alone,) = play([world(4)], 2)
    for a, b in zip(many[1].members, alone.members, strict=False):
        assert all(same(x, y) for x, y in zip(a.calls, b.calls, strict=True))


def test_a_problem_that_comes_twice_is_played_twice():
    first, second = play([world(2), world(2)], 1)
    assert not same(first.members[0].calls[0], second.members[0].calls[0])


def test_no_problems_are_no_groups():
    assert play([]) == []
    assert sample(roles(), [], 3, vowels, CLOCK, KEYS) == []


@pytest.mark.parametrize("bad", [{"window": 0}, {"room": 0}, {"max_turns": 0}])
def test_options_that_make_no_sense_are_refused(bad):
    with pytest.raises(UserError):
        play([world(1)], **bad)


def test_the_retry_world_is_played_by_a_real_policy():
    registry = pytest.importorskip("etude.worlds.registry")
    retry = pytest.importorskip("etude.worlds.retry")
    inner = registry.load_world("chain_sum", notation="compact")
    w = retry.RetryWorld(inner, attempts=3)
    assert isinstance(w, Interactive)
    problems = [w.problem("train", i) for i in range(3)]
    groups = episodes(w.env)(roles(), problems, 2, w.score, CLOCK, KEYS)
    for g in groups:
        for m in g.members:
            assert 1 <= len(m.calls) <= 3
            assert m.steps[-1].terminated
            assert np.isfinite(m.reward)
