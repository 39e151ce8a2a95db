"""Metrics read from a store: curves, what they are reduced to, censoring, items, means over runs."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etude.audits.estimators import Estimate
from etude.audits.report import Evaluation
from etude.experience.claims import Metric
from etude.experience.store import Store
from etude.lab.readings import GRID, Curve, mean_curve, read_curve, read_run, reduced


def curve(y, x=None):
    return Curve(np.arange(len(y), dtype=float) if x is None else np.array(x, float), np.array(y, float))


def value(y, x=None, **metric):
    return reduced(curve(y, x), Metric("log", "m", **metric))


@pytest.mark.parametrize(
    ("reduce", "wanted"),
    [("first", 0.2), ("last", 0.4), ("best", 0.8), ("mean", 0.5), ("gain", 0.2), ("dip", 0.4), ("area", 1.7 / 3)],
)
def test_reductions(reduce, wanted):
    assert value([0.2, 0.6, 0.8, 0.4], reduce=reduce) == (pytest.approx(wanted), False)


def test_the_best_of_what_should_be_low_is_the_lowest():
    assert value([3, 1, 2], reduce="best", better="lower") == (1, False)


def test_area_is_the_mean_height_over_the_axis_however_it_was_looked_at():
    dense = np.linspace(0, 10, 101)
    assert value(dense / 10, dense, reduce="area")[0] == pytest.approx(0.5)
    assert value([0, 0.1, 1], [0, 1, 10], reduce="area")[0] == pytest.approx(0.5)
    assert value([0.7], reduce="area") == (0.7, False)


@pytest.mark.parametrize(
    ("y", "wanted"), [([0.6, 0.9], (0, False)), ([0.0, 0.4, 0.8], (1.25, False)), ([0.1, 0.2], (1, True))]
)
def test_steps_to_a_threshold_are_interpolated_and_censored_at_the_end(y, wanted):
    assert value(y, reduce="steps", threshold=0.5) == pytest.approx(wanted)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0, 1))
def test_a_threshold_is_reached_no_later_than_it_is_seen(y, threshold):
    place, censored = value(y, reduce="steps", threshold=threshold)
    seen = [i for i, v in enumerate(y) if v >= threshold]
    assert censored == (not seen)
    assert place <= (seen[0] if seen else len(y) - 1)


def test_an_empty_curve_has_no_value():
    assert math.isnan(value([], reduce="last")[0])


def evaluation(accuracy, items):
    e = Estimate(accuracy, accuracy, accuracy, len(items))
    return Evaluation("w", "test", len(items), 1, {"accuracy": e}, {"easy": e}, items)


@pytest.fixture
def run(tmp_path):
    """Three steps of 100 tokens; looked at before the first, before the third and at the end."""
    with Store(tmp_path / "run") as store:
        for step in range(3):
            looked = [evaluation(0.25 * step, {"a": 0.0, "b": 0.5 * step})] if step != 1 else []
            meter = {"sampled": 100.0 * (step + 1), "updates": step + 1.0}
            store.commit("train", step, meter=meter, metrics={"loss": 1.0 - step / 4}, evaluations=looked)
        last = evaluation(1.0, {"a": 1.0, "b": 1.0})
        store.commit("train", 3, meter={"sampled": 300.0, "updates": 3.0}, evaluations=[last])
    return tmp_path / "run"


def test_an_evaluation_stands_where_the_step_before_it_ended(run):
    by_step = read_curve(run, Metric("evaluation", "accuracy"))
    assert (by_step.x.tolist(), by_step.y.tolist()) == ([0, 2, 3], [0, 0.5, 1])
    by_tokens = read_curve(run, Metric("evaluation", "accuracy", over="sampled"))
    assert by_tokens.x.tolist() == [0, 200, 300]
    loss = read_curve(run, Metric("log", "loss", over="sampled"))
    assert (loss.x.tolist(), loss.y.tolist()) == ([100, 200, 300], [1, 0.75, 0.5])


def test_a_reading_has_values_items_and_cost(run):
    metrics = {
        "end": Metric("evaluation", "accuracy"),
        "start": Metric("evaluation", "accuracy", "first"),
        "easy": Metric("evaluation", "accuracy/easy"),
        "half": Metric("evaluation", "accuracy", "steps", threshold=0.5),
        "never": Metric("log", "loss", "steps", threshold=2.0),
        "updates": Metric("cost", "updates"),
        "absent": Metric("log", "no such"),
    }
    read = read_run(run, metrics, seed=7)
    assert math.isnan(read.values.pop("absent"))
    assert read.values == {"end": 1, "start": 0, "easy": 1, "half": 2, "never": 3, "updates": 3}
    assert read.censored == ("never",)
    assert read.items == {"end": {"a": 1, "b": 1}, "start": {"a": 0, "b": 0}}
    assert (read.seed, read.cost["sampled"]) == (7, 300)


def test_mean_curves_keep_common_places_and_meet_on_a_grid_otherwise():
    alike = mean_curve([curve([0, 1]), curve([1, 3])])
    assert (alike.x.tolist(), alike.mean.tolist()) == ([0, 1], [0.5, 2])
    assert (alike.low < alike.mean).all()
    apart = mean_curve([curve([0, 10], [0, 10]), curve([0, 8], [0, 8])])
    assert len(apart.x) == GRID
    assert (apart.x[0], apart.x[-1]) == (0, 8)
    assert apart.mean == pytest.approx(apart.x)
    assert not len(mean_curve([curve([])]).x)
