"""Error rates of whole claims, by simulation: how often a claim that is false comes out as reproduced.

Each of SIMULATIONS worlds draws five seeds of every arm from known laws and is judged as a claim is. A seed's
base model helps or harms all arms alike; each arm adds noise of its own seed, and, where problems are scored,
an effect of its own on each problem and a residual.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from scipy.stats import nct, t

from etude.experience.claims import Arm, Claim, Endpoint, Metric
from etude.lab.judge import Verdict, judge, verdict
from etude.lab.readings import Reading

SIMULATIONS = 2000
SEEDS = 5
NOISE = 0.02  # of an arm's accuracy, from seed to seed

CLAIM = Claim(
    says="the method beats its baseline and plain training, writes no longer answers, and not without its mechanism",
    world="chain_sum",
    policy="tiny",
    arms=tuple(Arm(name, "grpo") for name in ("method", "baseline", "plain", "ablation")),
    metrics={
        "accuracy": Metric("evaluation", "accuracy", unit="%"),
        "tokens": Metric("log", "length", better="lower"),
        "steps": Metric("evaluation", "accuracy", "steps", threshold=0.5, better="lower"),
    },
    endpoints=(
        Endpoint("better", "effect", "accuracy", ("method", "baseline")),
        Endpoint("worth it", "effect", "accuracy", ("method", "plain"), 0.03),
        Endpoint("short", "guard", "tokens", ("method", "baseline"), 5.0),
        Endpoint("mechanism", "vanish", "accuracy", ("method", "ablation")),
        Endpoint("every seed", "effect", "accuracy", ("method", "plain"), every=True),
    ),
    tune="accuracy",
)
# Everything the claim says is true, by a wide margin; each scenario makes one thing false.
ACCURACY = {"method": 0.8, "baseline": 0.6, "plain": 0.5, "ablation": 0.6}
TOKENS = {"method": 40.0, "baseline": 40.0, "plain": 40.0, "ablation": 40.0}

Law = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape)


def heavy(df: int) -> Law:
    return lambda rng, shape: rng.standard_t(df, shape)


def only(*endpoints: Endpoint) -> Claim:
    return replace(CLAIM, endpoints=endpoints)


def world(rng, law: Law, items: int, accuracy: dict, tokens: dict) -> dict[str, list[Reading]]:
    """Readings of every arm at SEEDS seeds, with `items` scored problems, or none."""
    ids = [str(i) for i in range(items)]
    base = 0.05 * rng.standard_normal(SEEDS)
    hardness = 0.2 * rng.standard_normal(items)
    arms = {}
    for arm, mean in accuracy.items():
        right = mean + base + NOISE * law(rng, (SEEDS,))
        length = tokens[arm] + law(rng, (SEEDS,))
        own = 0.1 * rng.standard_normal(items) + 0.1 * rng.standard_normal((SEEDS, items))
        scores = right[:, None] + hardness + own
        if items:
            right = scores.mean(1)
        arms[arm] = [
            Reading(
                s,
                {"accuracy": right[s], "tokens": length[s]},
                items={"accuracy": dict(zip(ids, scores[s].tolist(), strict=True))} if items else {},
            )
            for s in range(SEEDS)
        ]
    return arms


def shares(claim: Claim, law: Law = normal, items: int = 0, accuracy=ACCURACY, tokens=TOKENS) -> dict[str, float]:
    """The share of each verdict over SIMULATIONS worlds."""
    rng = np.random.default_rng(0)
    found = Counter(
        verdict([judge(e, readings, claim.metrics) for e in claim.endpoints], SEEDS)
        for readings in (world(rng, law, items, accuracy, tokens) for _ in range(SIMULATIONS))
    )
    return {name: found[name] / SIMULATIONS for name in get_args(Verdict)}


ITEMS = pytest.mark.parametrize("items", [0, 24])


@ITEMS
def test_a_true_claim_is_reproduced(items):
    """So that the rates below are of the one thing that is false in them."""
    assert shares(CLAIM, items=items)["reproduced"] >= 0.9


@ITEMS
def test_method_no_better_than_its_baseline(items):
    found = shares(CLAIM, items=items, accuracy={**ACCURACY, "baseline": ACCURACY["method"]})
    assert found["reproduced"] <= 0.05
    assert found["opposite"] <= 0.05


@ITEMS
def test_ablation_as_good_as_the_method(items):
    found = shares(CLAIM, items=items, accuracy={**ACCURACY, "ablation": ACCURACY["method"]})
    assert found["reproduced"] <= 0.05


@pytest.mark.parametrize("excess", [5.0, 8.0])
def test_guard_broken(excess):
    """Answers longer by the guard's whole margin, and by more."""
    found = shares(CLAIM, tokens={**TOKENS, "method": TOKENS["baseline"] + excess})
    assert found["reproduced"] <= 0.05


@ITEMS
@pytest.mark.parametrize("df", [2, 3])
def test_heavy_tailed_seeds(df, items):
    found = shares(CLAIM, heavy(df), items, accuracy={**ACCURACY, "baseline": ACCURACY["method"]})
    assert found["reproduced"] <= 0.07


def test_power_for_three_standard_deviations():
    """As Student's t has it: a noncentral t of 3 / sqrt(2) * sqrt(5) against its 97.5% quantile."""
    accuracy = {**ACCURACY, "baseline": ACCURACY["method"] - 3 * NOISE}
    found = shares(only(CLAIM.endpoints[0]), accuracy=accuracy)
    assert found["reproduced"] >= 0.9
    expected = nct.sf(t.ppf(0.975, SEEDS - 1), SEEDS - 1, 3 / np.sqrt(2) * np.sqrt(SEEDS))
    assert found["reproduced"] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("accuracy", [{"baseline": 0.8}, {"plain": 0.6}])
def test_an_order_with_two_equal_neighbours(accuracy):
    order = Endpoint("order", "effect", "accuracy", ("method", "baseline", "plain"))
    assert shares(only(order), accuracy={**ACCURACY, **accuracy})["reproduced"] <= 0.05


@pytest.mark.parametrize("sign", [1, -1])
@ITEMS
def test_arms_that_differ_by_the_equivalence_margin(items, sign):
    equal = Endpoint("equal", "vanish", "accuracy", ("baseline", "ablation"), 0.2, equal=True)
    accuracy = {**ACCURACY, "ablation": ACCURACY["baseline"] + sign * 0.2}
    assert shares(only(equal), items=items, accuracy=accuracy)["reproduced"] <= 0.05


def test_a_shorter_axis_does_not_look_faster():
    """Both arms need as many steps; one was stopped at 100, the other at 200."""
    faster = only(Endpoint("faster", "effect", "steps", ("method", "baseline")))
    rng = np.random.default_rng(0)
    reproduced = 0
    for needed in rng.uniform(50, 200, (SIMULATIONS, 2, SEEDS)):
        readings = {
            arm: [Reading(s, {"steps": min(x, end)}, ("steps",) if x > end else ()) for s, x in enumerate(steps)]
            for arm, end, steps in zip(("method", "baseline"), (100, 200), needed, strict=True)
        }
        reproduced += verdict([judge(e, readings, faster.metrics) for e in faster.endpoints], SEEDS) == "reproduced"
    assert reproduced / SIMULATIONS <= 0.05
