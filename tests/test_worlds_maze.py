"""Mazes and their search: shortest ways, traces that A* could have written, strict plans, splits that never meet."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import World
from etude.experience.types import Problem
from etude.policies.tokenizers import CharTokenizer
from etude.worlds.maze import Maze, MazeWorld, maze_of
from etude.worlds.maze_text import MazeText
from etude.worlds.oracles import step_oracle
from etude.worlds.registry import load_world
from etude.worlds.search import AStar, Clause, astar, distances, is_way

# 3 x 3, a wall in the middle and one at the right: ways from a to i go by d, g and h.
#   a b c        start a, goal i
#   d # #        (e and f are walls)
#   g h i
BENT = Maze(3, 0, 8, (4, 5))
WORLDS = {
    "random": MazeWorld(),
    "dfs": MazeWorld(kind="dfs"),
    "natural": MazeWorld(notation="natural"),
    "large": MazeWorld(n=9, notation="compact"),
}


def test_it_is_a_world() -> None:
    assert isinstance(load_world("grid_maze", notation="compact"), World)
    assert load_world("grid_maze").categories == ("random",)


def test_astar_on_a_maze_done_by_hand() -> None:
    clauses, plan = BENT.search()
    text = MazeText(3, "compact")
    assert "".join(map(text.clause, clauses)) == "+a04-a04+b13+d13-b13+c22-d13+g22-c22-g22+h31-h31+i40-i40"
    assert text.plan(plan) == ">a>d>g>h>i"
    assert BENT.shortest == 4


def test_a_node_that_is_found_at_a_lower_cost_is_created_again() -> None:
    graph = {"s": "ab", "a": "x", "x": "c", "b": "c", "c": "g", "g": ""}
    estimate = {"s": 3, "a": 1, "x": 0, "b": 2, "c": 1, "g": 0}
    clauses, plan = astar("s", "g", lambda node: graph[node], lambda node: estimate[node])
    assert [(c.cost, c.estimate) for c in clauses if c.kind == "create" and c.node == "c"] == [(3, 1), (2, 1)]
    assert plan == ("s", "b", "c", "g")


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 6), st.data())
def test_astar_finds_a_shortest_way_whatever_is_drawn(n: int, data: st.DataObject) -> None:
    cells = data.draw(st.permutations(range(n * n)))
    walls = data.draw(st.integers(0, n * n - 2))
    maze = Maze(n, cells[-1], cells[-2], tuple(sorted(cells[:walls])))
    draw = np.random.default_rng(data.draw(st.integers(0, 99)))
    clauses, plan = astar(maze.start, maze.goal, maze.neighbours, maze.estimate, draw)
    reach = distances(maze.start, maze.neighbours)
    assert maze.shortest == reach.get(maze.goal)
    if maze.shortest is None:
        assert plan is None
        assert {c.node for c in clauses if c.kind == "close"} == set(reach)
        return
    assert plan is not None
    assert is_way(plan, maze.start, maze.goal, maze.neighbours)
    assert len(plan) - 1 == maze.shortest
    replay = AStar(maze.start, maze.goal, maze.neighbours, maze.estimate)
    for clause in clauses:
        assert replay.take(clause)
    assert replay.plan() == plan
    closed = [c for c in clauses if c.kind == "close"]
    assert all(reach[c.node] == c.cost for c in closed)  # nothing is closed before its cost is the least
    assert all(a.cost + a.estimate <= b.cost + b.estimate for a, b in itertools.pairwise(closed))


def test_a_clause_that_may_not_come_next_changes_nothing() -> None:
    search = AStar(BENT.start, BENT.goal, BENT.neighbours, BENT.estimate)
    assert not search.take(Clause("close", 0, 0, 4))
    assert search.take(Clause("create", 0, 0, 4))
    assert not search.take(Clause("create", 1, 1, 3))  # before its parent is closed
    assert not search.take(Clause("close", 0, 1, 4))  # another cost
    assert search.options() == [Clause("close", 0, 0, 4)]


def test_ties_and_children_are_drawn_from_the_keys() -> None:
    oracle = step_oracle(WORLDS["random"])
    problem = WORLDS["random"].problem("train", 3)
    texts = {oracle.demonstrate(problem, "plain", Keys(i)) for i in range(30)}
    assert len(texts) > 5
    assert oracle.demonstrate(problem, "plain", Keys(1)) == oracle.demonstrate(problem, "plain", Keys(1))
    empty = Maze(4, 0, 15)  # every order of the two children of the start
    orders = {tuple(c.node for c in empty.search(Keys(i).numpy())[0][2:4]) for i in range(30)}
    assert orders == {(1, 4), (4, 1)}


@pytest.mark.parametrize("name", WORLDS)
def test_problems_depend_on_their_arguments_alone_and_keep_their_promises(name: str) -> None:
    world = WORLDS[name]
    for split, i in itertools.product(("train", "test"), range(40)):
        problem = world.problem(split, i)
        assert problem == MazeWorld(world.n, world.kind, notation=world.notation).problem(split, i)
        maze = maze_of(problem)
        assert maze.shortest == problem.difficulty >= world.least
        assert world.score(problem, problem.answer or "").correct
        if world.kind == "random":
            assert 0.3 - 1 / 25 <= len(maze.walls) / world.n**2 <= 0.5 + 1 / 25
        else:
            assert len(maze.passages or ()) == world.n**2 - 1  # a spanning tree
            assert len(distances(maze.start, maze.neighbours)) == world.n**2


def test_splits_never_meet() -> None:
    world = MazeWorld(n=3, least=2)
    contents = {s: {world.problem(s, i).prompt for i in range(1500)} for s in ("train", "test")}
    assert not contents["train"] & contents["test"]
    assert len(contents["test"]) > 100


def test_compact_problems_are_short_and_every_character_is_a_token() -> None:
    world, tokenizer = WORLDS["random"], CharTokenizer()
    oracle = step_oracle(world)
    lengths = []
    for i in range(100):
        problem = world.problem("train", i)
        text = oracle.demonstrate(problem, "plain", Keys(i))
        assert len(tokenizer.encode(text)) == len(text)
        assert len(problem.prompt) <= 17
        lengths.append(len(text))
    assert 60 < np.mean(lengths) < 150


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (">a>d>g>h>i", {"optimal": 1, "valid": 1, "plan": 4, "trace": 0, "fast": 1, "grammar": 1, "swc": 1}),
        ("+a04-a04>a>d>g>h>i", {"optimal": 1, "trace": 8, "fast": 0, "grammar": 1}),
        ("+a+d>a>d>g>h>i", {"optimal": 1, "trace": 4, "grammar": 1}),  # costs may be left out
        ("+a0-a>a>d>g>h>i", {"optimal": 1, "trace": 5, "grammar": 0}),  # half a clause
        (">a>d>a>d>g>h>i", {"optimal": 0, "valid": 1, "plan": 6, "swc": 4 / 6}),  # a detour
        (">a>b>c>f>i", {"optimal": 0, "valid": 0, "plan": 4, "swc": 0}),  # through the wall f
        (">a>d>g>h", {"valid": 0, "plan": 3}),  # not to the goal
        (">d>g>h>i", {"valid": 0}),  # not from the start
        (">a>e>i", {"valid": 0}),  # a jump
        (">a>d>g>h>i+a04", {"valid": 0, "plan": 0, "trace": 0}),  # a trace opened after the plan
        (">a>d>g>h>i>", {"valid": 0}),
        (">a>d>g>h>z", {"valid": 0}),  # no such cell
        ("+a04-a04", {"valid": 0, "plan": 0, "trace": 8, "grammar": 1}),
        ("", {"valid": 0, "plan": 0, "trace": 0}),
        (">", {"valid": 0}),
    ],
)
def test_plans_are_judged_strictly(text: str, parts: dict[str, float]) -> None:
    world = MazeWorld(n=3)
    meta = {"n": 3, "start": 0, "goal": 8, "walls": (4, 5), "passages": None, "shortest": 4}
    outcome = world.score(Problem("p", "", meta=meta), text)
    assert {k: outcome.parts[k] for k in parts} == pytest.approx(parts)
    assert outcome.correct == bool(outcome.parts["optimal"]) == (outcome.reward == 1)
    assert (outcome.parsed is not None) == bool(outcome.parts["valid"])


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(sorted(WORLDS)), st.text(st.sampled_from("+->acez04Aplancrteos \n019é٣"), max_size=40) | st.text()
)
def test_no_text_raises(name: str, text: str) -> None:
    world = WORLDS[name]
    problem = world.problem("test", 0)
    assert not world.score(problem, text).correct or text
    oracle = step_oracle(world)
    oracle.parse(text)
    assert oracle.explain(problem, text)
    assert not oracle.check_step(problem, (), text) or text.strip() == oracle.plan(problem, ())


def test_natural_notation_is_words_on_lines() -> None:
    text = MazeText(2, "natural")
    assert text.clause(Clause("create", 1, 1, 2)) == "create 0 1 c1 c2"
    assert text.plan((0, 2)) == "plan 0 0\nplan 1 0"
    assert text.read("create 0 0 c0 c1\nplan 0 0\nplan 1 0\n") == ("create 0 0 c0 c1\n", (0, 2))
    assert text.read("plan 0 0 plan 1 0")[1] is None
    problem = WORLDS["natural"].problem("train", 0)
    assert WORLDS["natural"].score(problem, f"create 0 0 c0 c3\nclose 0 0\n{problem.answer}").parts["trace"] == 8


def test_planes_show_where_one_can_go() -> None:
    planes = BENT.planes()
    assert planes.shape == (6, 3, 3)
    up, right, down, left, start, goal = planes
    assert right.tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 0]]
    assert np.array_equal(left[:, 1:], right[:, :-1])  # every step can be taken back
    assert down.tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert np.array_equal(up[1:], down[:-1])
    assert (start[0, 0], goal[2, 2], start.sum(), goal.sum()) == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n": 1}, "n must be 2 to 26"),
        ({"n": 27}, "n must be 2 to 26"),
        ({"kind": "prim"}, "unknown kind of maze"),
        ({"density": (0.5, 0.3)}, "density"),
        ({"density": (0.5,)}, "density"),
        ({"density": (0.0, 1.0)}, "density"),
        ({"least": 0}, "least must be 1 to 24"),
        ({"least": 25}, "least must be 1 to 24"),
        ({"notation": "latin"}, "unknown notation"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        MazeWorld(**options)  # type: ignore[arg-type]


def test_mazes_that_do_not_turn_up_are_refused() -> None:
    with pytest.raises(UserError, match="no train maze of 5 x 5 cells with a way of 24 steps"):
        MazeWorld(least=24).problem("train", 0)
    with pytest.raises(UserError, match="unknown split"):
        MazeWorld().problem("dev", 0)
    with pytest.raises(UserError, match="unknown maze category"):
        MazeWorld().problem("train", 0, "dfs")
