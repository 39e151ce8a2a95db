import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from etude.curation.examples import Examples, completion
from etude.experience.batch import normalise
from etude.experience.claims import BaseRecipe
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.protocols import Clock, Limits
from etude.learning.base import PROBES, _Search, base, demonstrations, pass_at_1
from etude.learning.learner import Optim, Seat, Term, update
from etude.learning.weights import Weights
from etude.objectives.nll import NLL
from etude.policies.zoo import load_policy
from etude.worlds.oracles import load_oracle
from etude.worlds.registry import load_world
from small import small_lm, weights_of

OPTIONS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
SHAPE = {"width": 32, "depth": 1, "heads": 2, "ffn": 64, "limit": 64}
RECIPE = BaseRecipe(
    "chain_sum", OPTIONS, policy="tiny", shape=SHAPE, until=(0.07, 0.10), batch=32, lr=5e-3, max_steps=150,
    check_every=10, check_problems=64, max_tokens=8,
)  # fmt: skip


class Cut(Exception):
    """Ends the teaching, as a kill would."""


class Reporter:
    """Hears the looks at pass@1, and cuts after a step."""

    def __init__(self, cut=None):
        self.cut = cut
        self.looks = []
        self.steps = 0

    def step(self, clock, metrics, run):
        self.steps += 1
        if "pass@1" in metrics:
            self.looks.append(metrics["pass@1"])
        if clock.step == self.cut:
            raise Cut


@pytest.fixture
def cache(tmp_path, monkeypatch):
    def use(name):
        monkeypatch.setenv("ETUDE_CACHE", str(tmp_path / name))
        return tmp_path / name

    use("cache")
    return use


def test_a_base_is_taught_into_its_range_once_and_a_cut_changes_nothing(cache):
    said = Reporter()
    folder = base(RECIPE, 0, said)
    weights = load_file(folder / "model.safetensors")
    low, high = RECIPE.until
    assert low <= said.looks[-1] <= high

    policy = load_policy(str(folder))
    world = load_world("chain_sum", notation="compact", **OPTIONS)
    probe = Keys(0).at("probe")  # the problems and streams of the last look
    found = pass_at_1(world, policy, RECIPE.check_problems, probe, Limits(max_tokens=RECIPE.max_tokens))
    assert found == said.looks[-1]

    again = Reporter()
    assert base(RECIPE, 0, again) == folder
    assert again.steps == 0  # found in the cache
    assert sorted(p.name for p in folder.parent.iterdir()) == [f".{folder.name}.lock", folder.name]

    cache("other")
    for cut in (4, said.steps // 2, said.steps - 5):
        with pytest.raises(Cut):
            base(RECIPE, 0, Reporter(cut))
    resumed = base(RECIPE, 0)
    assert resumed.name == folder.name
    assert resumed != folder
    taught = load_file(resumed / "model.safetensors")
    assert all(torch.equal(weights[n], taught[n]) for n in weights)


def test_a_base_that_does_not_get_there_says_so_and_says_the_same_again(cache):
    recipe = replace(RECIPE, until=(0.95, 1.0), max_steps=61)
    said = []
    for _ in range(2):
        with pytest.raises(UserError, match=r"pass@1 is 0\.\d+ after 61 steps, not in 0\.95 to 1\.0") as error:
            base(recipe, 0)
        said.append(str(error.value))
    assert said[0] == said[1]
    assert "pass@1 is 0.00" not in said[0]
    assert not (cache("cache") / "base" / recipe.digest(0)).exists()


def test_a_world_without_an_oracle_cannot_teach(cache, tmp_path):
    data = tmp_path / "mine.jsonl"
    data.write_text(json.dumps({"prompt": "a", "answer": "b"}) + "\n")
    with pytest.raises(UserError, match=r"world 'mine' has no oracle .* base=false"):
        base(BaseRecipe(str(data), policy="tiny", shape=SHAPE), 0)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ETUDE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write to the cache"):
        base(RECIPE, 0)


def test_the_recipe_and_the_seed_name_the_base():
    names = {
        RECIPE.digest(0),
        RECIPE.digest(1),
        replace(RECIPE, noise=0.1).digest(0),
        replace(RECIPE, lr=1.0).digest(0),
    }
    assert len(names) == 4
    assert RECIPE.digest(0) == replace(RECIPE).digest(0)


def test_demonstrations_are_a_mixture_of_styles_on_problems_that_pass_at_1_never_asks():
    asked = []
    world = load_world("chain_sum", notation="compact", **OPTIONS)

    class Watched:
        name, categories = world.name, world.categories

        def problem(self, split, index, category=None):
            asked.append((split, index))
            return world.problem(split, index, category)

    policy, oracle = load_policy("tiny", Keys(0), **SHAPE), load_oracle(world)
    styles = oracle.styles
    assert len(styles) > 1
    recipe = replace(RECIPE, styles={styles[0]: 1.0, styles[1]: 3.0}, batch=200)
    batch = demonstrations(Watched(), oracle, recipe, policy, Clock(2, 10), Keys(0))
    assert batch.size == 200
    assert asked == [("train", i) for i in range(400, 600)]
    assert max(i for _, i in asked) + RECIPE.max_steps * recipe.batch < PROBES
    texts = {}
    for i, row in enumerate(range(400, 600)):
        problem = world.problem("train", row)
        for style in styles[:2]:
            texts[i, style] = oracle.demonstrate(problem, style, Keys(0).at("demonstrate", i))
    starts = batch.starts.tolist()
    found = {styles[0]: 0, styles[1]: 0}
    told_apart = 0
    for i in range(200):
        ids = batch.inputs[starts[i] : starts[i] + int(batch.lengths[i])].tolist()
        text = policy.tokenizer.decode(ids)
        matches = [s for s in styles[:2] if text.endswith("=" + texts[i, s])]
        assert matches
        if len(matches) == 1:
            told_apart += 1
            found[matches[0]] += 1
    if told_apart:
        assert found[styles[1]] / told_apart == pytest.approx(0.75, abs=0.12)


def test_the_search_goes_back_and_looks_twice_as_often():
    recipe = replace(RECIPE, until=(0.2, 0.4), check_every=4)
    policy = small_lm()
    weights, seat = Weights(policy), Seat(policy, Optim(lr=1e-2), 99)
    search = _Search(recipe, weights, seat)
    data = Examples([completion(policy.tokenizer, f"{i}=", str(i), 32) for i in range(8)])
    step = 0

    def learn():
        nonlocal step
        update(seat, [Term(normalise(data.draw(step, 4, Keys(0)), "token"), NLL())], Keys(0), Meter())
        step += 1

    def state():
        return weights_of(policy), {
            k: {n: v.clone() for n, v in s.items()} for k, s in seat.state_dict()["optimizer"]["state"].items()
        }

    def same(a, b):
        return all((a[0][n] == b[0][n]).all() for n in a[0]) and all(
            torch.equal(a[1][k][n], b[1][k][n]) for k in a[1] for n in a[1][k]
        )

    learn()
    low = state()
    assert not search.hear(0.1, 4)  # too low: this is where to come back to
    assert search.next == 8
    for k, (at, every) in enumerate([(8, 2), (10, 1)]):
        learn()
        assert not same(state(), low)
        assert not search.hear(0.9, at)
        assert same(state(), low), k  # weights and moments, each time
        assert (search.every, search.next) == (every, at + every)
    assert search.hear(0.2, 11)
    assert search.hear(0.4, 11)
    with pytest.raises(UserError, match=r"one update takes pass@1 from below 0.2 to 0.90: lower the recipe's lr"):
        search.hear(0.9, 12)
