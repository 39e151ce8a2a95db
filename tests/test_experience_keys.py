"""Streams are decided by their key alone, and by all of it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from etude.experience.claims import BaseRecipe
from etude.experience.keys import Keys

PARTS = st.integers(-(10**6), 10**6) | st.text(max_size=4)
GOLDEN_DIGEST = 31650610814851529517228496704402386425
GOLDEN_INTEGERS = [3889859564, 1868366509, 1244645650]
GOLDEN_RECIPE = "497895793ea07284f715"
PATHS = st.lists(PARTS, max_size=4).map(tuple)


@given(PATHS, PATHS)
def test_distinct_paths_are_distinct_streams(a, b):
    same = a == b
    assert (Keys(0).at(*a).digest() == Keys(0).at(*b).digest()) is same


@given(PATHS, st.integers(0, 4))
def test_a_path_may_be_walked_in_any_number_of_steps(path, cut):
    assert Keys(3).at(*path[:cut]).at(*path[cut:]).digest() == Keys(3).at(*path).digest()


def test_kinds_and_boundaries_of_parts_count():
    made = [Keys(0).at(*path).digest() for path in ((1,), ("1",), ("1", ""), ("", "1"), (11,), (1, 1), ("a\x1fs1:b",))]
    made += [Keys(1).digest(), Keys(0).digest(), Keys(0).at("a", "b").digest()]
    assert len(set(made)) == len(made)
    assert Keys(0).at(np.int64(1)).digest() == Keys(0).at(1).digest()
    with pytest.raises(TypeError):
        Keys(0).at(1.0).digest()


def test_golden_values():
    """Runs of other machines and versions must draw the same."""
    keys = Keys(7).at(3, "chain/12", 0, 1)
    assert keys.digest() == GOLDEN_DIGEST
    assert keys.numpy().integers(0, 2**32, 3).tolist() == GOLDEN_INTEGERS
    assert keys.numpy().random() == keys.numpy().random()
    assert torch.equal(torch.rand(3, generator=keys.torch()), torch.rand(3, generator=keys.torch()))
    assert Keys(7).of(3, "chain/12", 0, 1, "law").random() == keys.at("law").numpy().random()


def test_draws_do_not_shift_one_another():
    keys = Keys(0)
    alone = keys.at(1).numpy().random(4)
    greedy = keys.at(0).numpy()
    greedy.random(1000)
    assert np.array_equal(keys.at(1).numpy().random(4), alone)


def test_first_draws_over_keys_are_uniform_and_independent():
    """What a run uses: one or a few draws from each of many neighbouring keys."""
    draws = np.array([Keys(5).at(step, "p", member).numpy().random(2) for step in range(150) for member in range(40)])
    assert kstest(draws[:, 0], "uniform").pvalue > 1e-3
    assert chisquare(np.histogram(draws[:, 0], 50, (0, 1))[0]).pvalue > 1e-3
    neighbours = np.histogram2d(draws[:-1, 0], draws[1:, 0], 8, [[0, 1], [0, 1]])[0]
    assert chisquare(neighbours.ravel()).pvalue > 1e-3
    within = np.histogram2d(draws[:, 0], draws[:, 1], 8, [[0, 1], [0, 1]])[0]
    assert chisquare(within.ravel()).pvalue > 1e-3


def test_a_base_recipe_is_known_by_everything_that_decides_its_weights():
    recipe = BaseRecipe("chain_sum")
    assert recipe.digest(0) == BaseRecipe("chain_sum", options={}, styles={"plain": 1.0}).digest(0)
    assert recipe.digest(0) == GOLDEN_RECIPE
    changes = [
        {"world": "countdown"}, {"options": {"terms": 3}}, {"styles": {"plain": 0.5, "terse": 0.5}}, {"noise": 0.1},
        {"faults": ("slip",)}, {"policy": "small"}, {"shape": {"width": 64}}, {"until": (0.2, 0.4)}, {"batch": 32},
        {"lr": 3e-4}, {"max_steps": 10}, {"check_every": 10}, {"check_problems": 64}, {"max_tokens": 32},
    ]  # fmt: skip
    assert {name for change in changes for name in change} == set(BaseRecipe.__dataclass_fields__)
    digests = [BaseRecipe(**{"world": "chain_sum", **change}).digest(0) for change in changes]
    assert len({recipe.digest(0), recipe.digest(1), *digests}) == len(changes) + 2
    a = BaseRecipe("w", styles={"a": 0.5, "b": 0.5}, options={"x": 1, "y": 2})
    assert a.digest(0) == BaseRecipe("w", styles={"b": 0.5, "a": 0.5}, options={"y": 2, "x": 1}).digest(0)
