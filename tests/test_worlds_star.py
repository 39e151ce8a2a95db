"""Path-star graphs: one way to each goal, a first step that nothing local tells, and splits that never meet."""

import math
import re

import numpy as np
import pytest

from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import World
from etude.policies.zoo import load_policy
from etude.worlds.oracles import load_oracle, step_oracle
from etude.worlds.registry import load_world
from etude.worlds.star import StarWorld

WORLD = StarWorld()


def read(prompt):
    """(centre, goal, edges) of a compact prompt."""
    asked, listed = prompt.removesuffix("=").split(":")
    return asked[0], asked[1:], [tuple(listed[i : i + 2]) for i in range(0, len(listed), 2)]


def ways(edges, node, goal):
    """Every path from a node to the goal."""
    if node == goal:
        return [""]
    return [f">{b}{rest}" for a, b in edges if a == node for rest in ways(edges, b, goal)]


@pytest.mark.parametrize("options", [{}, {"arms": 3, "length": 5, "labels": 20}, {"arms": 5, "length": 2}])
def test_the_answer_is_the_only_path(options):
    world = StarWorld(**options)
    assert isinstance(world, World)
    for i in range(50):
        problem = world.problem("test", i)
        centre, goal, edges = read(problem.prompt)
        assert len(edges) == len(set(edges)) == world.arms * (world.length - 1)
        assert ways(edges, centre, goal) == [problem.answer]
        assert sum(a == centre for a, _ in edges) == world.arms
        assert world.score(problem, problem.answer).correct
        assert load_oracle(world).demonstrate(problem, "plain", Keys(0)) == problem.answer


def test_a_problem_depends_on_its_arguments_alone():
    assert StarWorld().problem("train", 7) == WORLD.problem("train", 7) != StarWorld(seed=1).problem("train", 7)
    assert WORLD.problem("train", 7, "2x4") == WORLD.problem("train", 7)
    assert WORLD.problem("train", 7).prompt != WORLD.problem("test", 7).prompt


def test_splits_never_meet_whatever_is_asked_and_however_edges_are_shuffled():
    small = StarWorld(arms=2, length=2, labels=9)
    graphs = {
        split: {frozenset(read(small.problem(split, i).prompt)[2]) for i in range(1500)} for split in ("train", "test")
    }
    assert not graphs["train"] & graphs["test"]
    every = math.comb(8, 2) * 9
    assert len(graphs["train"] | graphs["test"]) == every
    assert 0.12 < len(graphs["test"]) / every < 0.28


def test_neither_labels_nor_order_say_which_arm():
    first = np.zeros((2, 3))
    for i in range(2000):
        problem = WORLD.problem("train", i)
        centre, _, edges = read(problem.prompt)
        begins = [b for a, b in edges if a == centre]
        step = problem.answer[1]
        first[0] += [begins[0] == step, min(begins) == step, problem.meta["goal"]]
    assert first[0] / 2000 == pytest.approx([0.5, 0.5, 0.5], abs=0.04)


def test_what_a_walker_that_guesses_the_first_step_gets():
    """Full paths in 1 of d cases, and a next-token loss of ln(d) / L: .231 with 2 arms of 3 steps."""
    for d, wanted in ((2, 0.231), (3, 0.3662)):
        world = StarWorld(arms=d)
        loss, right, dice = 0.0, 0, np.random.default_rng(0)
        for i in range(1000):
            problem = world.problem("train", i)
            centre, _, edges = read(problem.prompt)
            node = walker = centre
            for step in problem.answer[1::2]:
                loss += math.log(sum(a == node for a, _ in edges)) / 3 / 1000
                node = step
            said = ""
            for _ in range(3):
                walker = dice.choice([b for a, b in edges if a == walker])
                said += f">{walker}"
            right += world.score(problem, said).correct
        assert loss == pytest.approx(math.log(d) / 3) == pytest.approx(wanted, abs=1e-3)
        assert right / 1000 == pytest.approx(1 / d, abs=0.05)


def test_the_verdict_has_parts():
    problem = WORLD.problem("test", 0)
    arms, goal = problem.meta["arms"], problem.meta["goal"]
    right, wrong = (">" + ">".join(arms[i]) for i in (goal, 1 - goal))
    jump = right[:3] + wrong[3] + wrong[4:]
    for text, reward, first, valid in (
        (right, 1, 1, 1),
        (f" {right}\n", 1, 1, 1),
        (wrong, 0, 0, 1),
        (right[:4], 0, 1, 1),
        (right + right[-2:], 0, 1, 0),
        (jump, 0, 1, 0),
        (f">{problem.meta['centre']}{right}", 0, 0, 0),
    ):
        outcome = WORLD.score(problem, text)
        assert (outcome.reward, outcome.parts["first"], outcome.parts["valid"]) == (reward, first, valid), text
        assert outcome.parsed == text.strip()
    for text in ("", ">", "abc", f"{right}!", right[1:], "\ufffd"):
        outcome = WORLD.score(problem, text)
        assert (outcome.reward, outcome.correct, outcome.parsed) == (0, False, None)
        assert outcome.parts == {"first": 0.0, "chance": 0.5, "valid": 0.0}


def test_without_the_goal_only_the_goal_is_gone():
    bare = StarWorld(goal=False)
    for i in range(20):
        problem, other = WORLD.problem("train", i), bare.problem("train", i)
        assert other.prompt == problem.prompt[0] + problem.prompt[2:]
        assert (other.answer, other.meta) == (problem.answer, problem.meta)


def test_in_natural_notation():
    problem = load_world("star", notation="natural").problem("train", 3)
    centre, goal, edges = read(WORLD.problem("train", 3).prompt)
    assert set(re.findall(r"(\w) -> (\w)", problem.prompt)) == set(edges)
    assert f"from {centre} to {goal} as" in problem.prompt
    assert problem.answer == WORLD.problem("train", 3).answer


def test_an_edge_and_a_step_are_one_token_each():
    tokenizer = load_policy("tiny:width=16,depth=1,heads=2,nodes=10").tokenizer
    assert tokenizer.size == load_policy("tiny:width=16,depth=1,heads=2").tokenizer.size + 90 + 10
    for i in range(20):
        problem = WORLD.problem("train", i)
        assert len(tokenizer.prompt(problem.prompt)) == 1 + 1 + 1 + 6 + 1  # start, ends, colon, edges, equals
        assert len(tokenizer.completion(problem.answer)) == 3 + 1
        assert tokenizer.decode(tokenizer.prompt(problem.prompt)) == problem.prompt


def test_the_oracle_walks_checks_hints_and_errs():
    oracle, problem = step_oracle(WORLD), WORLD.problem("test", 5)
    steps, answer = oracle.solve(problem)
    assert "".join((*steps, answer)) == problem.answer
    for j, step in enumerate(steps):
        assert oracle.plan(problem, steps[:j]) == step
        assert oracle.check_step(problem, steps[:j], step)
        assert not oracle.check_step(problem, steps[:j], f">{problem.meta['centre']}")
    assert oracle.plan(problem, steps) is None
    assert oracle.plan(problem, (">?",)) is None
    assert oracle.hints(problem) == ((steps[0],), (steps[0] + steps[1],))
    assert oracle.parse(problem.answer) == (steps, answer)
    assert oracle.places(problem, "wrong-arm") == (0,)
    assert load_oracle(WORLD, 1.0, ("wrong-arm",)).demonstrate(problem, "plain", Keys(0)) == ">" + ">".join(
        problem.meta["arms"][1 - problem.meta["goal"]]
    )
    broken = load_oracle(WORLD, 1.0, ("format",)).demonstrate(problem, "plain", Keys(0))
    assert broken == steps[0] + steps[1] + "?"
    wrong = ">" + ">".join(problem.meta["arms"][1 - problem.meta["goal"]])
    said = [oracle.explain(problem, text) for text in (problem.answer, broken, wrong, "?", f"{steps[1]}{steps[0]}")]
    assert said == [
        "right", "does not end at the goal", "does not end at the goal", "no path", "not along the edges",
    ]  # fmt: skip
    with pytest.raises(UserError, match="unknown style 'loud'"):
        oracle.demonstrate(problem, "loud", Keys(0))
    with pytest.raises(UserError, match="unknown fault"):
        oracle.places(problem, "lie")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"arms": 1}, "star: arms and length must be at least 2, not 1 and 4"),
        ({"length": 1}, "star: arms and length must be at least 2"),
        ({"labels": 6}, "star: 2 arms of 4 nodes need 7 to 52 labels, not 6"),
        ({"labels": 53}, "star: 2 arms of 4 nodes need 7 to 52 labels, not 53"),
        ({"notation": "loud"}, "unknown notation 'loud'"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        StarWorld(**options)


def test_unknown_splits_and_categories_are_refused():
    with pytest.raises(UserError, match="unknown split"):
        WORLD.problem("dev", 0)
    with pytest.raises(UserError, match="unknown star category '3x4'"):
        WORLD.problem("train", 0, "3x4")


@pytest.mark.parametrize(("nodes", "line"), [(53, "nodes of 'tiny' are letters, at most 52, not 53")])
def test_more_nodes_than_letters_are_refused(nodes, line):
    with pytest.raises(UserError, match=line):
        load_policy(f"tiny:nodes={nodes}")
