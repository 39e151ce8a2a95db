"""Estimators against closed forms, enumeration and simulated coverage; evaluation end to end."""

import json
import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from etude.audits.estimators import (
    accuracy,
    accuracy_by_category,
    entropy,
    length,
    majority_at_k,
    pass_at_k,
    ratio,
    share,
    wilson,
)
from etude.audits.evaluate import evaluate, measure
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Clock
from etude.experience.store import Store
from etude.experience.types import Author, Call, Group, Law, Outcome, Problem, Trajectory


def group(correct, parsed=None, category="") -> Group:
    """A group from its members' verdicts and parsed answers."""
    problem = Problem("p", "?", category=category)
    parsed = parsed or [None] * len(correct)
    outcomes = [Outcome(float(c), bool(c), a) for c, a in zip(correct, parsed, strict=True)]
    return Group(problem, tuple(Trajectory(problem, (), outcome=o) for o in outcomes))


# --- closed forms ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "n"), [(0, 1), (0, 20), (3, 17), (10, 20), (40, 40)])
def test_accuracy_of_single_samples_is_wilsons_interval(right, n):
    found = accuracy([group([i < right]) for i in range(n)])
    expected = binomtest(right, n).proportion_ci(0.95, "wilson")
    assert (found.value, found.n) == (right / n, n)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_samples_of_one_problem_are_not_taken_for_independent():
    """Copies of a sample tell nothing new; as many samples of problems that are all alike do."""
    copies = accuracy([group([i < 5] * 8) for i in range(20)])
    single = accuracy([group([i < 5]) for i in range(20)])
    assert (copies.low, copies.high) == pytest.approx((single.low, single.high))
    alike = accuracy([group([1, 0, 0, 0]) for _ in range(20)])
    assert (alike.low, alike.high) == pytest.approx(wilson(0.25, 80))


def test_problems_count_the_same_whatever_their_samples():
    assert accuracy([group([1]), group([0, 0, 0])]).value == 0.5
    assert accuracy([group([1]), group([])]).value == 1.0


@given(st.integers(1, 12), st.integers(0, 12), st.integers(1, 12))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(n, c, k):
    c, k = min(c, n), min(k, n)
    verdicts = [i < c for i in range(n)]
    exact = np.mean([any(subset) for subset in combinations(verdicts, k)])
    assert pass_at_k([group(verdicts)], k).value == pytest.approx(exact, abs=1e-12)


def test_pass_at_k_is_stable_for_large_numbers():
    verdicts = [i < 1 for i in range(3000)]
    assert pass_at_k([group(verdicts)], 1500).value == pytest.approx(0.5, abs=1e-9)
    assert pass_at_k([group(verdicts)], 1).value == pytest.approx(1 / 3000, rel=1e-9)
    assert pass_at_k([group([0] * 3000)], 3000).value == 0


def vote(answers, right) -> float:
    counts = Counter(a for a in answers if a is not None)
    if not counts:
        return 0.0
    winners = [a for a, c in counts.items() if c == max(counts.values())]
    return sum(a in right for a in winners) / len(winners)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=9), st.data())
def test_majority_is_the_mean_over_all_subsets(answers, data):
    right = data.draw(st.sets(st.sampled_from("abc")))
    k = data.draw(st.integers(1, len(answers)))
    found = majority_at_k([group([a in right for a in answers], answers)], k).value
    exact = np.mean([vote(subset, right) for subset in combinations(answers, k)])
    assert found == pytest.approx(exact, abs=1e-12)


def test_majority_of_many_samples():
    answers = ["7"] * 30 + [f"x{i % 20}" for i in range(98)]
    assert majority_at_k([group([a == "7" for a in answers], answers)], 128).value == 1.0
    one = majority_at_k([group([a == "7" for a in answers], answers)], 1).value
    assert one == pytest.approx(30 / 128)
    assert one < majority_at_k([group([a == "7" for a in answers], answers)], 16).value < 1


@pytest.mark.parametrize("estimator", [pass_at_k, majority_at_k])
@pytest.mark.parametrize("k", [0, 3])
def test_k_must_fit_the_samples(estimator, k):
    with pytest.raises(ValueError, match=f"k must lie between 1 and the 2 samples a problem has, not {k}"):
        estimator([group([1, 0]), group([1, 0, 1])], k)


def test_nothing_measured_is_nan_over_no_problems():
    for found in (accuracy([]), pass_at_k([], 4), majority_at_k([], 2), length([]), entropy([]), share([])):
        assert found.n == 0
        assert math.isnan(found.value)


def test_accuracy_by_category():
    found = accuracy_by_category([group([1], category="a"), group([0], category="a"), group([1], category="b")])
    assert {name: (e.value, e.n) for name, e in found.items()} == {"a": (0.5, 2), "b": (1.0, 1)}


def sampled(logp, law=None, author=None) -> Call:
    logp = np.asarray(logp, np.float32)
    who = np.full(len(logp), Author.SELF, np.int8) if author is None else np.asarray(author, np.int8)
    return Call("actor", np.zeros(1, np.int32), np.zeros(len(logp), np.int32), who, logp, logp, law or Law())


def test_length_and_entropy():
    problem = Problem("p", "?")
    given_ = sampled([-9.0, -1.0], author=[Author.GIVEN, Author.SELF])
    bent = sampled([-5.0] * 4, Law(temperature=0.5))
    one = Group(problem, (Trajectory(problem, (sampled([-1.0, -2.0]), given_)), Trajectory(problem, (bent,))))
    other = Group(problem, (Trajectory(problem, (sampled([-3.0, math.nan]),)),))
    assert length([one, other]).value == pytest.approx((3 + 4 + 2) / 3)
    assert entropy([one, other]).value == pytest.approx((1 + 2 + 1 + 3) / 4)
    assert length([one]).high == math.inf


# --- coverage --------------------------------------------------------------------------------------


def coverage(estimate, truth: float, draw, repeats: int = 600) -> float:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(repeats):
        found = estimate(draw(rng))
        hits += found.low <= truth <= found.high
    return hits / repeats


@pytest.mark.parametrize(("a", "b"), [(0.3, 1.0), (2.0, 5.0), (0.05, 1.0)])
@pytest.mark.parametrize("samples", [1, 8])
def test_intervals_of_shares_cover_the_truth(a, b, samples):
    """Problems differ in difficulty (beta), samples within a problem do not: also near 0, where
    Student's t over problems covers 60%."""
    solved = lambda rng: rng.binomial(samples, rng.beta(a, b, 60)) / samples  # noqa: E731
    assert 0.91 <= coverage(lambda x: share(x, 60 * samples), a / (a + b), solved) <= 0.99


def test_intervals_of_pass_at_k_cover_the_truth():
    table = [1 - math.comb(8 - c, 4) / math.comb(8, 4) for c in range(9)]
    truth = 1 - math.prod((5 + i) / (7 + i) for i in range(4))  # 1 - E[(1-p)^4], p ~ Beta(2, 5)
    draw = lambda rng: [table[c] for c in rng.binomial(8, rng.beta(2, 5, 60))]  # noqa: E731
    assert 0.92 <= coverage(share, truth, draw) <= 0.98


def test_intervals_of_ratios_cover_the_truth():
    """Longer answers are less surprising a token: a mean of means would be off."""

    def draw(rng):
        n = rng.integers(1, 30, 40)
        return n * (2 - n / 30) + rng.normal(size=40) * np.sqrt(n), n

    lengths = np.arange(1, 30)
    truth = float((lengths * (2 - lengths / 30)).sum() / lengths.sum())
    assert 0.92 <= coverage(lambda x: ratio(*x), truth, draw) <= 0.98


def test_the_mean_of_plain_numbers_has_students_interval():
    from scipy.stats import t

    x = np.array([1.0, 2.0, 4.0, 4.5])
    found = ratio(x, np.ones(4))
    half = t.ppf(0.975, 3) * x.std(ddof=1) / 2
    assert (found.value, found.low, found.high) == pytest.approx((x.mean(), x.mean() - half, x.mean() + half))


# --- evaluation ------------------------------------------------------------------------------------


class Sums:
    name = "sums"
    categories = ("even", "odd")

    def __init__(self, size=None) -> None:
        self._size = size

    def size(self, split):
        return self._size

    def problem(self, split, index, category=None):
        return Problem(f"{split}/{index}", f"{index}+1=", str(index + 1), self.categories[index % 2])

    def score(self, problem, text):
        return Outcome(float(text == problem.answer), text == problem.answer, text)


def act(roles, problems, n, score, clock, keys):
    """Right with probability 0.7, and leaves the judging to others."""
    made = []
    for p in problems:
        texts = [p.answer if keys.of(clock.step, p.id, m, 0, "test").random() < 0.7 else "wrong" for m in range(n)]
        call = sampled([-0.5, -1.5])
        made.append(Group(p, tuple(Trajectory(p, (call,), member=m, text=t) for m, t in enumerate(texts))))
    return made


def test_an_evaluation_repeats_prints_and_serialises(tmp_path):
    found = evaluate({}, Sums(), "test", 40, 4, act, Keys(0).at("evaluate"))
    assert found == evaluate({}, Sums(), "test", 40, 4, act, Keys(0).at("evaluate"))
    assert found != evaluate({}, Sums(), "test", 40, 4, act, Keys(1).at("evaluate"))
    assert list(found.metrics) == ["accuracy", "pass@2", "pass@4", "majority@4", "length", "entropy"]
    assert 0.6 < found.accuracy.value < 0.8
    assert found.accuracy.low < found.accuracy.value < found.metrics["pass@2"].value < found.metrics["pass@4"].value
    assert (found.metrics["length"].value, found.metrics["entropy"].value) == (2.0, 1.0)
    assert set(found.categories) == {"even", "odd"}
    assert sum(e.n for e in found.categories.values()) == 40
    again = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert again["metrics"]["accuracy"]["value"] == found.accuracy.value
    lines = str(found).splitlines()
    assert lines[0] == "sums (test): 40 problems, 4 samples each"
    assert lines[2].split() == [
        "accuracy", f"{100 * found.accuracy.value:.1f}%", f"{100 * found.accuracy.low:.1f}%", "to",
        f"{100 * found.accuracy.high:.1f}%", "40",
    ]  # fmt: skip
    assert len({len(line) for line in lines[1:]}) == 1, "columns line up"
    with Store(tmp_path) as store:
        store.commit("main", 0, evaluations=[found])
        rows = store.evaluations("accuracy/odd")
    assert [r["value"] for r in rows] == [found.categories["odd"].value]


def test_an_evaluation_of_one_sample_has_no_pass_at_k():
    found = evaluate({}, Sums(3), "test", 40, 1, act, Keys(0), Clock(2, 9))
    assert found.problems == 3
    assert list(found.metrics) == ["accuracy", "length", "entropy"]


def test_pass_at_the_number_of_samples_is_measured_too():
    assert [m for m in measure([group([1, 0, 0, 0, 1, 0])], "w", "test", 6).metrics if m.startswith("pass")] == [
        "pass@2",
        "pass@4",
        "pass@6",
    ]


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(UserError, match="at least 1 problem and 1 sample, not 0 and 1"):
        evaluate({}, Sums(), "test", 0, 1, act, Keys(0))
    with pytest.raises(UserError, match="world 'sums' has no problems in its split 'test'"):
        evaluate({}, Sums(0), "test", 5, 1, act, Keys(0))
