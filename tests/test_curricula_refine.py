"""Refined schedules: the numbers of the theory, its bound, the median, traps, and schedules read from a run's log."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.curricula.gradient_log import logged_norms
from etude.curricula.refine import bound, decayed, effective, refine, running_median
from etude.curricula.schedules import from_array, lr_schedule, norm_for
from etude.experience.errors import UserError
from etude.experience.plugs import check, plug
from etude.experience.store import Store

FLAT, EARLY, LATE = (1.0, 1.0, 1.0, 1.0), (2.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 2.0)


def optimizer(kind=torch.optim.SGD, lr=0.5):
    return kind([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(scheduler, steps):
    out = []
    for _ in range(steps):
        out.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return out


# --- the closed form -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.0, 1e-200, 1e200])
def test_equal_norms_give_linear_decay(scale):
    found = refine(np.multiply(scale, FLAT), "l2")
    assert found.shape == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert (found.fallback, found.peak) == ("", 0.25)
    steps = found.weights * np.append(np.cumsum(found.weights[::-1])[-2::-1], 0) / found.weights.sum()
    assert steps == pytest.approx([0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize(
    ("norms", "norm", "wanted"),
    [
        (EARLY, "l2", (0.375, 1, 0.5, 0)),  # a warm-up
        (EARLY, "l1", (0.75, 1, 0.5, 0)),
        (LATE, "l2", (1, 0.5556, 0.1111, 0)),  # a faster anneal
    ],
)
def test_large_gradients_get_small_steps(norms, norm, wanted):
    assert refine(norms, norm).shape == pytest.approx(wanted, abs=1e-4)


def test_the_steps_before_they_are_scaled():
    weights = np.array(EARLY) ** -2.0
    later = np.append(np.cumsum(weights[::-1])[-2::-1], 0.0)
    assert weights * later / weights.sum() == pytest.approx([0.230769, 0.615385, 0.307692, 0], abs=1e-6)
    assert decayed(weights) == pytest.approx([0.375, 1, 0.5, 0])


def test_the_bound():
    norms = np.array([10.0] * 10 + [1.0] * 90)
    assert bound(np.ones(100), norms) == pytest.approx(0.3302, abs=1e-4)
    assert bound(norms**-2, norms) == pytest.approx(0.1054, abs=1e-4)
    assert bound(7 * norms**-2, norms, distance=3.0) == pytest.approx(3 * 0.1054, abs=3e-4)
    found = refine(norms, "l2", smoothing=0.0)
    assert bound(found.weights, norms) == pytest.approx(0.1054, abs=1e-4)


@given(
    st.lists(st.floats(0.1, 10.0), min_size=2, max_size=30), st.lists(st.floats(0.1, 10.0), min_size=30, max_size=30)
)
def test_no_weights_have_a_smaller_bound_than_the_norms_to_the_power_of_minus_two(norms, others):
    norms, others = np.array(norms), np.array(others[: len(norms)])
    assert bound(norms**-2, norms) <= bound(others, norms) * (1 + 1e-12)
    assert bound(norms**-2, norms) == pytest.approx((norms**-2).sum() ** -0.5)


def test_linear_decay_keeps_its_promise_on_the_absolute_value():
    x, total = 1.0, 100
    for t in range(1, total + 1):
        x -= (1 - t / total) / math.sqrt(total) * np.sign(x)
    assert abs(x) <= 1 / math.sqrt(total)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.37, 1.0])
@pytest.mark.parametrize("total", [2, 3, 50, 601])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_constant_norms_are_linear_decay_whatever_the_smoothing(smoothing, total, norm):
    t = np.arange(1, total + 1)
    assert refine(np.full(total, 3.0), norm, smoothing).shape == pytest.approx((total - t) / (total - 1))


NORMS = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=80)


@settings(deadline=None)
@given(NORMS, st.sampled_from(["l2", "l1"]), st.floats(0, 1))
def test_a_shape_lies_in_zero_to_one_and_ends_at_zero(norms, norm, smoothing):
    found = refine(norms, norm, smoothing)
    assert len(found.shape) == len(norms)
    assert ((found.shape >= 0) & (found.shape <= 1)).all()
    assert found.shape.max() == 1.0
    assert found.shape[-1] == 0.0
    assert 1 - 1e-9 <= effective(found.weights) <= len(norms) + 1e-6
    if not found.fallback:
        assert found.peak <= 0.9
        assert effective(found.weights) >= 0.1 * len(norms)


@settings(deadline=None)
@given(NORMS, st.floats(1e-6, 1e6), st.sampled_from(["l2", "l1"]))
def test_the_scale_of_the_norms_does_not_matter(norms, scale, norm):
    a, b = refine(norms, norm), refine(np.multiply(scale, norms), norm)
    assert a.shape == pytest.approx(b.shape, abs=1e-9)
    assert a.fallback == b.fallback


# --- the median and its traps ----------------------------------------------------------------------


def test_the_median_is_padded_by_the_first_norm_and_by_reflection():
    norms = np.array([5.0, 1.0, 2.0, 9.0, 3.0, 7.0])
    assert running_median(norms, 1) == pytest.approx([5, 2, 2, 3, 7, 3])  # last: of 3, 7 and 3 again
    assert running_median(norms, 2) == pytest.approx([5, 5, 3, 3, 3, 7])  # last: 9 3 7 3 9
    plain = [np.median(norms[i - 2 : i + 3]) for i in (2, 3)]
    assert running_median(norms, 2)[2:4] == pytest.approx(plain)


@pytest.mark.parametrize("at", [1, 5, 20, 37])
def test_one_spike_within_changes_nothing(at):
    norms = np.full(40, 2.0)
    spiked = norms.copy()
    spiked[at] = 1e6
    assert refine(spiked, "l2").shape == pytest.approx(refine(norms, "l2").shape)


def test_with_a_window_of_three_the_last_but_one_survives():
    norms = np.ones(20)
    norms[-2] = 1e6
    assert running_median(norms, 1)[-1] == 1e6  # reflection shows it twice to the last
    assert running_median(norms, 2)[-1] == 1.0


@pytest.mark.parametrize("spike", [1e-6, 1e6])
def test_a_first_norm_out_of_line_is_brought_into_it(spike):
    norms = np.linspace(1.0, 2.0, 40)
    spiked = norms.copy()
    spiked[0] = spike
    assert running_median(spiked, 2)[0] == spike  # no median helps
    found = refine(spiked, "l2")
    assert found.fallback == ""
    assert found.shape == pytest.approx(refine(norms, "l2").shape, abs=0.05)
    assert effective(found.weights) > 30


def test_norms_that_cannot_be_used_are_filled_in():
    norms = np.linspace(1.0, 3.0, 40)
    holes = norms.copy()
    holes[[3, 4, 11, 20, 39]] = [0.0, math.nan, math.inf, -1.0, math.nan]
    found = refine(holes, "l2", 0.0)
    wanted = norms.copy()
    wanted[39] = wanted[38]
    assert found.shape == pytest.approx(decayed(wanted**-2))
    assert found.fallback == ""


# --- degenerate shapes -----------------------------------------------------------------------------


def linear(total):
    return np.linspace(1.0, 0.0, total)


def test_vanishing_gradients_fall_back_to_linear_decay():
    """As on separable data: the raw shape is a spike at the end."""
    norms = np.exp(-np.linspace(0, 20, 200))
    spike = decayed(norms**-2.0)
    assert spike.argmax() > 0.9 * 200
    found = refine(norms, "l2")
    assert "peak at 9" in found.fallback
    assert "gradients vanish" in found.fallback
    assert found.shape == pytest.approx(linear(200))


def test_a_few_quiet_updates_do_not_get_all_the_weight():
    norms = np.full(200, 100.0)
    norms[50:65] = 0.1
    found = refine(norms, "l2", smoothing=0.05)
    assert found.fallback.startswith("the weight would lie on ")
    assert found.shape == pytest.approx(linear(200))
    assert refine(norms, "l2", smoothing=0.2).fallback == ""  # a longer median does not see them


def test_most_norms_must_be_usable():
    norms = np.zeros(20)
    norms[:9] = np.linspace(1, 5, 9)
    assert refine(norms, "l2").fallback == "only 45% of the gradient norms are numbers above 0"
    assert refine(norms, "l2").shape == pytest.approx(linear(20))


def test_weights_beyond_what_a_float_holds_fall_back():
    found = refine([1e300, 1e300, 1e-300], "l2", 0.0)
    assert found.fallback
    assert found.shape == pytest.approx([1, 0.5, 0])


@pytest.mark.parametrize(
    ("norms", "smoothing", "said"),
    [
        ([1.0], 0.1, "at least 2 updates, not 1"),
        ([], 0.1, "at least 2 updates, not 0"),
        ([0.0, math.nan], 0.1, "none of 2 gradient norms is a number above 0"),
        ([1.0, 1.0], 1.5, "smoothing is a share"),
    ],
)
def test_norms_that_say_nothing_are_refused(norms, smoothing, said):
    with pytest.raises(UserError, match=said):
        refine(norms, "l2", smoothing)


# --- schedulers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "warmup"), [(20, 0), (20, 5), (7, 7), (1, 0)])
def test_inverse_schedules(total, warmup):
    s = max(1, warmup)
    rise = [0.5 * t / s for t in range(warmup)]
    n = np.arange(total - warmup)
    assert rates(lr_schedule("inverse", optimizer(), total, warmup), total) == pytest.approx(
        [*rise, *0.5 * s / (s + n)]
    )
    root = rates(lr_schedule("inverse-sqrt", optimizer(), total, warmup), total)
    assert root == pytest.approx([*rise, *0.5 * np.sqrt(s / (s + n))])
    if warmup:
        from transformers.optimization import get_inverse_sqrt_schedule

        theirs = rates(get_inverse_sqrt_schedule(optimizer(), warmup), total)
        assert root == pytest.approx(theirs)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_an_array_is_the_schedule(shape):
    scheduler = from_array(optimizer(), shape)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    assert rates(scheduler, len(shape) + 2) == pytest.approx([0.5 * x for x in (*shape, shape[-1], shape[-1])])


def test_an_array_schedule_goes_on_after_a_checkpoint():
    shape = np.linspace(1, 0, 10)
    first = from_array(optimizer(), shape)
    head = rates(first, 4)
    state, inner = json.loads(json.dumps(first.state_dict())), first.optimizer.state_dict()
    second = from_array(optimizer(), shape)
    second.optimizer.load_state_dict(inner)
    second.load_state_dict(state)
    assert head + rates(second, 6) == pytest.approx(0.5 * shape)


@pytest.mark.parametrize("shape", [[], [1.2], [-0.1, 0.5], [math.nan], [[1.0, 0.0]]])
def test_arrays_that_are_no_schedule(shape):
    with pytest.raises(UserError, match="one or more numbers from 0 to 1"):
        from_array(optimizer(), shape)


def test_the_norm_goes_with_the_optimiser():
    assert norm_for(optimizer()) == "l2"
    assert norm_for(optimizer(torch.optim.AdamW)) == "l1"
    with pytest.raises(UserError, match="both own the learning rate"):
        check([plug("schedule", "refined"), plug("schedule", "linear")])


def log(folder, norms, l1=None, clip=None, stage="train", options=None, **extra):
    """A run's folder with these norms in its log."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {**(options or {}), **({} if clip is None else {"optim": {"clip": clip}})}
    (folder / "config.json").write_text(json.dumps({"options": options}))
    with Store(folder) as store:
        for step, value in enumerate(norms):
            metrics = {"grad_norm": value} | ({} if l1 is None else {"grad_norm_l1": l1[step]})
            store.commit(stage, step, metrics=extra if value is None else metrics)
    return folder


def test_a_schedule_is_read_from_the_log_of_a_run(tmp_path):
    run = log(tmp_path / "run", EARLY, [4.0, 1.0, 1.0, 1.0])
    assert rates(lr_schedule(f"refined:{run}", optimizer(), 4), 4) == pytest.approx([0.1875, 0.5, 0.25, 0])
    wanted = 0.5 * refine([4.0, 1.0, 1.0, 1.0], "l1").shape
    assert rates(lr_schedule(f"refined:{run}", optimizer(torch.optim.AdamW), 4), 4) == pytest.approx(wanted)


def test_what_counts_is_the_gradient_after_clipping(tmp_path):
    run = log(tmp_path / "run", [2.0, 0.5, 4.0], [20.0, 5.0, 40.0], clip=1.0)
    assert logged_norms(run, "l2") == pytest.approx([1.0, 0.5, 1.0])
    assert logged_norms(run, "l1") == pytest.approx([10.0, 5.0, 10.0])


def test_updates_of_one_step_share_its_norm_and_empty_steps_are_holes(tmp_path):
    options = {"epochs": 1, "minibatches": 2}
    run = log(tmp_path / "run", [1.0, None, 3.0, None], options=options, empty_step=1.0)
    assert logged_norms(run, "l2", 8) == pytest.approx(
        [1, 1, math.nan, math.nan, 3, 3, math.nan, math.nan], nan_ok=True
    )


def test_the_last_stage_of_learning_counts(tmp_path):
    log(tmp_path / "run", [9.0, 9.0, 9.0], stage="train/warm")
    run = log(tmp_path / "run", [1.0, 2.0], stage="train/rl")
    assert logged_norms(run, "l2") == pytest.approx([1.0, 2.0])


def test_a_degenerate_log_warns_and_decays_linearly(tmp_path):
    run = log(tmp_path / "run", np.exp(-np.linspace(0, 20, 50)).tolist())
    with pytest.warns(UserWarning, match="is linear decay: the rate would peak at"):
        scheduler = lr_schedule(f"refined:{run}", optimizer(), 50)
    assert rates(scheduler, 50) == pytest.approx(0.5 * linear(50))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lr_schedule(f"refined:{log(tmp_path / 'good', FLAT)}", optimizer(), 4)


def test_runs_that_no_schedule_can_be_read_from(tmp_path):
    def read(run, total=4, warmup=0, kind=torch.optim.SGD):
        return lr_schedule(f"refined:{run}", optimizer(kind), total, warmup)

    with pytest.raises(UserError, match="nowhere holds no run"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="write refined:runs/NAME"):
        lr_schedule("refined", optimizer(), 4)
    with pytest.raises(UserError, match=r"made 4 updates and this run makes 5: .* of the same length"):
        read(log(tmp_path / "short", FLAT), 5)
    with pytest.raises(UserError, match="empty logged no gradient norms"):
        read(log(tmp_path / "empty", [None, None], note=1.0))
    with pytest.raises(UserError, match="none of 4 gradient norms is a number above 0"):
        read(log(tmp_path / "nan", [math.nan] * 4))
    with pytest.raises(UserError, match="logged no grad_norm_l1"):
        read(tmp_path / "short", kind=torch.optim.AdamW)
    with pytest.raises(UserError, match=r"leave out the warm-up \(warmup=0\)"):
        read(tmp_path / "short", warmup=2)
    (tmp_path / "short" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        read(tmp_path / "short")
    with pytest.raises(UserError, match="did you mean linear"):
        lr_schedule("linear:runs/x", optimizer(), 4)
