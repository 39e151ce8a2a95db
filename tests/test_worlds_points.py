"""Labelled points: their laws, splits, flips, and what is said of options that cannot be."""

import builtins

import numpy as np
import pytest

from etude.experience.errors import UserError
from etude.experience.protocols import World
from etude.worlds.points import PointsWorld
from etude.worlds.registry import load_world

KINDS = ("logistic", "gaussian", "digits")


@pytest.mark.parametrize("kind", KINDS)
def test_a_problem_is_a_point_of_its_split(kind):
    world = load_world("points", kind=kind)
    assert isinstance(world, World)
    for split in ("train", "test"):
        x, y = world.arrays(split)
        assert x.dtype == np.float32
        assert len(x) == len(y) == world.size(split)
        for i in (0, 7, len(y) + 3):
            problem = world.problem(split, i)
            assert (problem.meta["point"] == x[i % len(y)]).all()
            assert (np.array(problem.prompt.split(), np.float32) == x[i % len(y)]).all()
            assert problem.answer == problem.category == str(y[i % len(y)])
    assert world.problem("train", 3).id != world.problem("test", 3).id


@pytest.mark.parametrize("kind", KINDS)
def test_no_point_is_in_two_splits(kind):
    world = PointsWorld(kind)
    train, test = ({x.tobytes() for x in world.arrays(split)[0]} for split in ("train", "test"))
    assert not train & test
    assert 0.1 < len(test) / len(train) < 0.6


def test_points_depend_on_the_options_alone():
    def bits(**options):
        return PointsWorld(points=50, **options).arrays("train")[0].tobytes()

    assert bits() == bits() != bits(seed=1)
    assert bits(flips=0.3) == bits()  # flips change labels, not points
    (x, y), (_, z) = PointsWorld().arrays("train"), PointsWorld(test=3).arrays("train")
    assert (y == z).all()
    with pytest.raises(ValueError, match="read-only"):
        x[0] = 0.0


@pytest.mark.parametrize("kind", ["logistic", "gaussian"])
def test_the_covariance_has_the_condition_that_was_asked_for(kind):
    x, _ = PointsWorld(kind, points=20000, condition=1000.0, separation=0.0).arrays("train")
    spectrum = np.linalg.eigvalsh(np.cov(x.T.astype(np.float64)))
    assert spectrum[-1] / spectrum[0] == pytest.approx(1000, rel=0.15)
    assert np.var(x[:, 0]) == pytest.approx(1, rel=0.05)


def test_the_condition_leaves_the_law_of_the_classes():
    a, b = PointsWorld(condition=1.0), PointsWorld(condition=1e4)
    assert (a.arrays("train")[1] == b.arrays("train")[1]).all()


@pytest.mark.parametrize(("kind", "how"), [("logistic", {"sharpness": 50.0}), ("gaussian", {"separation": 8.0})])
def test_classes_can_be_told_by_a_linear_rule(kind, how):
    world = PointsWorld(kind, points=4000, condition=1.0, **how)
    (x, y), (tx, ty) = world.arrays("train"), world.arrays("test")
    weights = np.linalg.lstsq(np.c_[x, np.ones(len(x))], np.eye(4)[y], rcond=None)[0]
    assert ((np.c_[tx, np.ones(len(tx))] @ weights).argmax(1) == ty).mean() > 0.75
    assert np.bincount(y, minlength=4).min() > 300


def test_a_share_of_the_training_labels_is_flipped_and_no_test_label():
    right, flipped = PointsWorld(points=20000), PointsWorld(points=20000, flips=0.1)
    wrong = right.arrays("train")[1] != flipped.arrays("train")[1]
    assert wrong.mean() == pytest.approx(0.1, abs=0.01)
    assert (right.arrays("test")[1] == flipped.arrays("test")[1]).all()
    shift = (flipped.arrays("train")[1] - right.arrays("train")[1])[wrong] % 4
    assert np.bincount(shift, minlength=4) / wrong.sum() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3], abs=0.04)


def test_problems_of_a_class():
    world = PointsWorld(points=100)
    assert world.categories == ("0", "1", "2", "3")
    for c in world.categories:
        ids = [world.problem("train", i, c).id for i in range(10)]
        assert {world.problem("train", i, c).answer for i in range(10)} == {c}
        assert len(set(ids)) == 10


def test_only_the_label_is_right():
    world = PointsWorld()
    problem = world.problem("test", 0)
    assert world.score(problem, f" {problem.answer}\n").correct
    wrong = str((int(problem.answer) + 1) % 4)
    assert (world.score(problem, wrong).reward, world.score(problem, wrong).parsed) == (0.0, wrong)
    for text in ("", "9", "class 1", f"{problem.answer} {problem.answer}"):
        assert world.score(problem, text) == world.score(problem, "?")


def test_digits():
    world = PointsWorld("digits")
    x, _ = world.arrays("train")
    assert (world.features, world.classes, x.shape[1]) == (64, 10, 64)
    assert (x.min(), x.max()) == (0.0, 1.0)
    assert world.size("train") + world.size("test") == 1797


def test_digits_without_scikit_learn(monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(
        builtins, "__import__", lambda n, *a, **k: real(n if not n.startswith("sklearn") else "no_such_module", *a, **k)
    )
    with pytest.raises(UserError, match=r"needs the package scikit-learn: pip install 'etude\[data\]'"):
        PointsWorld("digits").size("train")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "digit"}, "did you mean digits"),
        ({"flips": 1.5}, "flips is a share"),
        ({"points": 0}, "at least 1"),
        ({"classes": 1}, "classes at least 2"),
        ({"condition": 0.5}, "condition must be at least 1"),
        ({"colour": 1}, "unknown option of world points"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(UserError, match=said):
        load_world("points", **options)


def test_splits_and_classes_that_are_not_there():
    world = PointsWorld(points=5)
    with pytest.raises(UserError, match="unknown split 'valid'"):
        world.arrays("valid")
    with pytest.raises(UserError, match="unknown class of points '7'"):
        world.problem("train", 0, "7")
    assert world.size("valid") == 0


@pytest.mark.parametrize("options", [{"flips": 0.2}, {"kind": "gaussian", "condition": 1e4, "flips": 0.1}])
def test_the_least_loss_is_that_of_logistic_regression(options):
    from sklearn.linear_model import LogisticRegression

    world = PointsWorld(points=500, features=5, **options)
    x, y = world.arrays("train")
    x = x / x.std(0)
    model = LogisticRegression(C=np.inf, tol=1e-8, max_iter=2000).fit(x, y)
    logp = model.predict_log_proba(x)[np.arange(len(y)), y]
    assert world.least_loss == pytest.approx(-logp.mean(), abs=1e-5)
