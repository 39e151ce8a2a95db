"""The rules of endpoints and verdicts, one by one, on numbers made by hand."""

import math

import pytest

from etude.experience.claims import Endpoint, Metric
from etude.experience.errors import UserError
from etude.lab.judge import Judged, judge, verdict
from etude.lab.readings import Reading
from etude.lab.statistics import Interval, crossed, paired, ratio

METRICS = {
    "accuracy": Metric("evaluation", "accuracy", unit="%"),
    "hard": Metric("evaluation", "accuracy/hard", unit="%"),
    "tokens": Metric("log", "length", better="lower", unit="tokens"),
    "steps": Metric("evaluation", "accuracy", "steps", threshold=0.5, better="lower"),
    "survival": Metric("log", "entropy", "steps", threshold=0.5),
}
BASE = (0.40, 0.42, 0.38, 0.41, 0.39)


def run(metric: str, values, censored=(), items=None) -> list[Reading]:
    """An arm's readings of one metric at seeds 0, 1, ...; `censored` are seeds."""
    return [
        Reading(s, {metric: v}, (metric,) if s in censored else (), {metric: items[s]} if items else {})
        for s, v in enumerate(values)
    ]


def above(gains) -> dict[str, list[Reading]]:
    """Arm a better than arm b by `gains`."""
    return {
        "a": run("accuracy", [b + g for b, g in zip(BASE, gains, strict=True)]),
        "b": run("accuracy", BASE),
    }


def effect(margin=0.0, metric="accuracy", arms=("a", "b"), **more) -> Endpoint:
    return Endpoint("e", "effect", metric, arms, margin, **more)


def guard(margin, metric="accuracy", **more) -> Endpoint:
    return Endpoint("g", "guard", metric, ("a", "b"), margin, **more)


def same(margin, metric="accuracy", **more) -> Endpoint:
    return Endpoint("s", "vanish", metric, ("a", "b"), margin, equal=True, **more)


GOOD = (0.03, 0.05, 0.04, 0.05, 0.04)  # mean 0.042, interval 0.0316 to 0.0524
LOOSE = (0.09, -0.02, 0.05, 0.10, -0.01)  # mean 0.042, interval -0.0270 to 0.1110
BAD = tuple(-g for g in GOOD)


# --- the rules -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("endpoint", "gains", "holds", "why"),
    [
        (effect(), GOOD, True, "estimate 4.2 points is at least 0.0 and the interval 3.2 to 5.2 lies above 0.0"),
        (effect(0.03), GOOD, True, "estimate 4.2 points is at least 3.0 and the interval 3.2 to 5.2 lies above 0.0"),
        (effect(0.05), GOOD, False, "estimate 4.2 points is less than 5.0"),
        (effect(), LOOSE, False, "the interval reaches down to -2.7, which is not above 0.0"),
        (effect(), BAD, False, "the interval -5.2 to -3.2 lies below 0.0"),
        (effect(), (0.0,) * 5, False, "the interval reaches down to 0.0, which is not above 0.0"),
        (guard(0.03), LOOSE, True, "the interval -2.7 to 11.1 lies above the guard's -3.0"),
        (guard(0.02), LOOSE, False, "the interval reaches down to -2.7, which is not above the guard's -2.0"),
        (guard(0.06), BAD, True, "the interval -5.2 to -3.2 lies above the guard's -6.0"),
        (guard(0.03), BAD, False, "the interval -5.2 to -3.2 lies below the guard's -3.0"),
        (same(0.06), GOOD, True, "the interval 3.2 to 5.2 lies within -6.0 to 6.0"),
        (same(0.05), GOOD, False, "the interval 3.2 to 5.2 does not lie within -5.0 to 5.0"),
        (same(0.05), BAD, False, "the interval -5.2 to -3.2 does not lie within -5.0 to 5.0"),
        (same(0.0), (0.0,) * 5, True, "the interval 0.0 to 0.0 lies within 0.0 to 0.0"),
    ],
)
def test_rules_of_differences(endpoint, gains, holds, why):
    found = judge(endpoint, above(gains), METRICS)
    assert (found.holds, found.why) == (holds, why)
    assert found.values == pytest.approx(gains)
    assert found.interval.estimate == pytest.approx(sum(gains) / 5)
    assert found.pair == ("a", "b")


def test_vanish_is_judged_as_an_effect():
    for gains in (GOOD, LOOSE, BAD):
        found = judge(Endpoint("e", "vanish", "accuracy", ("a", "b")), above(gains), METRICS)
        other = judge(effect(), above(gains), METRICS)
        assert (found.holds, found.opposite, found.why) == (other.holds, other.opposite, other.why)


def test_only_contrasts_that_must_be_positive_can_be_opposite():
    assert [judge(e, above(BAD), METRICS).opposite for e in (effect(), guard(0.01), same(0.01))] == [True, False, False]
    assert not judge(effect(), above([-g for g in LOOSE]), METRICS).opposite


def test_lower_may_be_better():
    runs = {"a": run("tokens", [10, 12, 11, 13, 9]), "b": run("tokens", [20, 23, 20, 24, 19])}
    found = judge(effect(5, "tokens"), runs, METRICS)
    assert found.holds
    assert found.values == (10, 11, 9, 11, 10)
    assert found.why.startswith("estimate 10.2 tokens is at least 5 ")


def test_lower_may_be_better_in_a_ratio():
    runs = {"a": run("tokens", [10, 12, 11]), "b": run("tokens", [20, 25, 21])}
    found = judge(effect(1.5, "tokens", ratio=True), runs, METRICS)
    assert found.interval == ratio([20, 25, 21], [10, 12, 11])
    assert found.values == pytest.approx((2.0, 25 / 12, 21 / 11))
    assert found.holds
    assert found.why.startswith("estimate 1.996 times is at least 1.5 and the interval ")
    assert judge(effect(metric="tokens", ratio=True), {"a": runs["b"], "b": runs["a"]}, METRICS).opposite


@pytest.mark.parametrize(
    ("endpoint", "holds"),
    [
        (guard(0.0, ratio=True), False),
        (guard(1.2, ratio=True), True),  # 0.9 lies above 1 / 1.2
        (guard(1.1, ratio=True), False),
        (same(1.2, ratio=True), True),
        (same(1.1, ratio=True), False),
    ],
)
def test_margins_of_ratios_are_factors_both_ways(endpoint, holds):
    for a, b in ((0.36, 0.40), (0.40, 0.36)):
        runs = {"a": run("accuracy", [a] * 5), "b": run("accuracy", [b] * 5)}
        assert judge(endpoint, runs, METRICS).holds == (holds or (endpoint.role == "guard" and a > b))


@pytest.mark.parametrize(
    ("endpoint", "gains", "why"),
    [
        (effect(0.02, every=True), (0.03, 0.05, 0.04, 0.05, 0.04), None),
        (effect(0.02, every=True), (0.03, 0.05, 0.04, 0.05, 0.01), "seed 4 alone has 1.0"),
        (effect(0.0, every=True), (0.03, 0.05, 0.04, 0.05, 0.0), "seed 4 alone has 0.0"),
        (guard(0.05, every=True), (0.01, 0.01, -0.04, 0.01, 0.0), None),
        (guard(0.03, every=True), (0.01, 0.01, -0.0301, 0.01, 0.0), "seed 2 alone has -3.0"),
    ],
)
def test_every_seed_must_pass(endpoint, gains, why):
    found = judge(endpoint, above(gains), METRICS)
    assert found.holds == (why is None)
    assert found.why.startswith(why or "")


# --- orders, conditions, items ---------------------------------------------------------------------


def three(*means: float) -> dict[str, list[Reading]]:
    return {
        arm: run("accuracy", [m + n for n in noise])
        for arm, m, noise in zip("abc", means, ((0.0, 0.01, 0.02), (0.01, 0.01, 0.01), (0.0, 0.01, 0.015)), strict=True)
    }


@pytest.mark.parametrize(
    ("means", "holds", "opposite", "pair"),
    [
        ((0.9, 0.6, 0.4), True, False, ("b", "c")),  # both hold: the smaller is reported
        ((0.9, 0.6, 0.6), False, False, ("b", "c")),
        ((0.6, 0.6, 0.4), False, False, ("a", "b")),
        ((0.4, 0.6, 0.6), False, True, ("a", "b")),  # what contradicts the order weighs more than a tie
    ],
)
def test_an_order_reports_its_weakest_pair(means, holds, opposite, pair):
    found = judge(effect(arms=("a", "b", "c")), three(*means), METRICS)
    assert (found.holds, found.opposite, found.pair) == (holds, opposite, pair)


def test_a_side_may_have_a_metric_of_its_own():
    runs = {
        "a": [Reading(s, {"accuracy": v + 0.2, "hard": v}) for s, v in enumerate(BASE)],
    }
    found = judge(effect(0.1, arms=("a", "a:hard")), runs, METRICS)
    assert found.holds
    assert found.pair == ("a", "a:hard")
    assert found.interval.estimate == pytest.approx(0.2)


def test_sides_that_cannot_be_compared_are_refused():
    runs = {"a": [Reading(0, {"accuracy": 0.5, "tokens": 3.0})]}
    with pytest.raises(UserError, match="'a' and 'a:tokens' differ in direction or unit"):
        judge(effect(arms=("a", "a:tokens")), runs, METRICS)


A_ITEMS = [{"p": 1.0, "q": 0.5, "r": 0.0}, {"r": 0.5, "p": 1.0, "q": 0.75}, {"p": 0.5, "q": 0.5, "r": 0.25}]
B_ITEMS = [{"p": 0.5, "q": 0.5, "r": 0.0}, {"p": 0.5, "q": 0.25, "r": 0.0}, {"p": 0.25, "q": 0.0, "r": 0.25}]


def scored(items) -> list[Reading]:
    return run("accuracy", [sum(x.values()) / len(x) for x in items], items=items)


def test_items_in_common_are_crossed_with_seeds_whatever_their_order():
    table = [[a[i] - b[i] for i in "pqr"] for a, b in zip(A_ITEMS, B_ITEMS, strict=True)]
    found = judge(effect(), {"a": scored(A_ITEMS), "b": scored(B_ITEMS)}, METRICS)
    assert found.interval == crossed(table)
    assert found.values == pytest.approx([sum(row) / 3 for row in table])


@pytest.mark.parametrize("a", [scored([*A_ITEMS[:2], {"p": 0.5, "q": 0.5}]), run("accuracy", (0.5, 0.7, 0.4))])
def test_items_that_differ_are_not_crossed(a):
    found = judge(effect(), {"a": a, "b": scored(B_ITEMS)}, METRICS)
    assert found.interval == paired(found.values)


def test_ratios_are_not_crossed():
    a, b = scored(A_ITEMS), scored(B_ITEMS)
    found = judge(effect(ratio=True), {"a": a, "b": b}, METRICS)
    assert found.interval == ratio([r.values["accuracy"] for r in a], [r.values["accuracy"] for r in b])


# --- what is missing, censored or wrong -----------------------------------------------------------


@pytest.mark.parametrize("endpoint", [effect(), guard(1.0), same(1.0)])
@pytest.mark.parametrize("arm", ["a", "b"])
def test_a_missing_value_is_named_and_never_holds(endpoint, arm):
    runs = above(GOOD)
    runs[arm][3] = Reading(3, {"accuracy": math.nan})
    found = judge(endpoint, runs, METRICS)
    assert (found.holds, found.opposite) == (False, False)
    assert found.why == f"arm {arm!r} has no value of 'accuracy' at seed 3"
    assert [math.isnan(v) for v in found.values] == [False, False, False, True, False]
    assert math.isnan(found.interval.low)


def test_a_missing_item_is_a_missing_value():
    a = scored([*A_ITEMS[:2], {"p": math.nan, "q": 1.0, "r": 1.0}])
    found = judge(effect(), {"a": a, "b": scored(B_ITEMS)}, METRICS)
    assert (found.holds, found.why) == (False, "arm 'a' has no value of 'accuracy' at seed 2")


def test_a_ratio_of_zero_does_not_hold():
    runs = {"a": run("accuracy", [0.4, 0.4]), "b": run("accuracy", [0.1, 0.0])}
    found = judge(effect(ratio=True), runs, METRICS)
    assert (found.holds, found.why) == (False, "arm 'b' has no positive value of 'accuracy' at seed 1")


def test_one_seed_decides_nothing():
    runs = {"a": run("accuracy", [0.9]), "b": run("accuracy", [0.1])}
    for endpoint in (effect(), guard(0.5), same(1.0), effect(1.0, ratio=True)):
        found = judge(endpoint, runs, METRICS)
        assert (found.holds, found.opposite) == (False, False)


def test_seeds_that_all_agree_have_an_interval_of_no_width():
    runs = {"a": run("accuracy", [0.75] * 5), "b": run("accuracy", [0.5] * 5)}
    assert judge(effect(0.25), runs, METRICS).interval == Interval(0.25, 0.25, 0.25, 5)
    assert judge(effect(0.25), runs, METRICS).holds


def test_censored_curves_are_contrasted_up_to_their_common_end():
    """Arm b stopped at 100 at seed 1: what either arm does later counts as 100, at every seed."""
    runs = {"a": run("steps", [40, 50, 120]), "b": run("steps", [90, 100, 130], censored=[1])}
    found = judge(effect(metric="steps"), runs, METRICS)
    assert found.values == (50, 50, 0)
    assert found.why.endswith(", up to 100, the common end of the axis")


def test_two_ends_make_the_shorter_one_common():
    runs = {"a": run("steps", [100, 150], censored=[0, 1]), "b": run("steps", [60, 170])}
    assert judge(effect(metric="steps"), runs, METRICS).values == (-40, 0)


def test_a_censored_curve_is_never_equal():
    runs = {"a": run("steps", [100] * 5, censored=range(5)), "b": run("steps", [100] * 5, censored=range(5))}
    found = judge(same(10, "steps"), runs, METRICS)
    assert found.interval == Interval(0, 0, 0, 5)
    assert (found.holds, found.why) == (
        False,
        "curves that stopped at 100, the end of the axis, cannot be shown to be equal",
    )


@pytest.mark.parametrize(("metric", "hides", "fine"), [("steps", "a", "b"), ("survival", "b", "a")])
def test_a_guard_holds_only_where_the_whole_deficit_is_seen(metric, hides, fine):
    """Up to step 100 the arm that never got there is 5 behind; it may be a thousand behind."""
    seen, cut = run(metric, [95.0] * 5), run(metric, [100.0] * 5, censored=range(5))
    found = judge(guard(20, metric), {hides: cut, fine: seen}, METRICS)
    assert (found.holds, found.why) == (
        False,
        f"arm {hides!r} at seed 0 goes on beyond 100, the end of the axis, so how far is not known",
    )
    assert judge(guard(20, metric), {hides: seen, fine: cut}, METRICS).holds


def test_different_seeds_are_refused():
    runs = above(GOOD)
    with pytest.raises(
        UserError, match=r"'e' needs the same seeds .*'a' has \[0, 1, 2, 3\] but 'b' has \[0, 1, 2, 3, 4\]"
    ):
        judge(effect(), {**runs, "a": runs["a"][:4]}, METRICS)
    with pytest.raises(UserError, match="each once"):
        judge(effect(), {arm: [*found, found[0]] for arm, found in runs.items()}, METRICS)
    with pytest.raises(UserError, match="'e' contrasts arm 'b', which has no readings"):
        judge(effect(), {"a": runs["a"]}, METRICS)


def test_seeds_are_paired_whatever_their_order():
    runs = above(GOOD)
    assert judge(effect(), {"a": runs["a"][::-1], "b": runs["b"]}, METRICS) == judge(effect(), runs, METRICS)


# --- verdicts --------------------------------------------------------------------------------------


def judged(role="effect", holds=False, opposite=False) -> Judged:
    return Judged(Endpoint("e", role, "m", ("a", "b")), Interval(0, 0, 0, 5), (), holds, opposite, "", ("a", "b"))


YES, NO, REVERSED = judged(holds=True), judged(), judged(opposite=True)


@pytest.mark.parametrize(
    ("found", "seeds", "expected"),
    [
        ([YES, judged("guard", True)], 5, "reproduced"),
        ([YES, judged("guard")], 5, "not reproduced at this scale"),
        ([YES, NO], 8, "not reproduced at this scale"),
        ([YES, REVERSED, NO], 5, "opposite"),
        ([YES, judged("vanish", opposite=True)], 5, "not reproduced at this scale"),
        ([YES], 4, "undecided"),
        ([REVERSED], 1, "undecided"),
    ],
)
def test_verdicts(found, seeds, expected):
    assert verdict(found, seeds) == expected


def test_a_claim_without_endpoints_has_no_verdict():
    with pytest.raises(UserError, match="without endpoints"):
        verdict([], 5)
