"""Teachers of points: their cosine with the truth, what they share, and how often they are right."""

import numpy as np
import pytest

from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.worlds.oracles import find_oracle, step_oracle
from etude.worlds.points import PointsWorld
from etude.worlds.teachers import SHARED

WORLD = PointsWorld(features=100, classes=2, condition=1, sharpness=1000.0, points=4000, test=100)
ORACLE = step_oracle(WORLD)
TRUTH = WORLD.weights @ (-1.0, 1.0) / np.linalg.norm(WORLD.weights @ (-1.0, 1.0))


def error(style, seed=0):
    """The unit error of a teacher, across the truth."""
    w = ORACLE.teacher(style, seed)
    across = w - (w @ TRUTH) * TRUTH
    return across / np.linalg.norm(across)


@pytest.mark.parametrize("style", ["0.05", "0.35", "0.60", "0.60-apart"])
def test_a_teacher_is_as_aligned_as_its_style_says(style):
    w = ORACLE.teacher(style, 0)
    assert np.linalg.norm(w) == pytest.approx(1.0)
    assert w @ TRUTH == pytest.approx(float(style[:4]))


def test_a_family_shares_most_of_its_errors_and_a_teacher_apart_none():
    inside = np.mean([error("0.35", s) @ error("0.05", s) for s in range(40)])
    outside = np.mean([error("0.35", s) @ error("0.60-apart", s) for s in range(40)])
    other = np.mean([error("0.35", s) @ error("0.35", s + 1) for s in range(40)])
    assert inside == pytest.approx(SHARED, abs=0.03)
    assert abs(outside) < 0.05
    assert abs(other) < 0.05  # every run has teachers of its own


@pytest.mark.parametrize(("alignment", "right"), [(0.05, 0.516), (0.35, 0.614), (0.6, 0.705)])
def test_a_teacher_is_right_as_often_as_its_alignment_says(alignment, right):
    assert 1 - np.arccos(alignment) / np.pi == pytest.approx(right, abs=5e-4)
    problems = [WORLD.problem("train", i) for i in range(4000)]
    said = [ORACLE.demonstrate(p, f"{alignment:.2f}", Keys(0).at(p.id)) for p in problems]
    assert np.mean([WORLD.score(p, text).correct for p, text in zip(problems, said, strict=True)]) == pytest.approx(
        right, abs=0.025
    )
    plain = [ORACLE.demonstrate(p, "plain", Keys(0)) for p in problems[:50]]
    assert plain == [p.answer for p in problems[:50]]


def test_only_points_of_two_classes_alike_in_all_directions_have_teachers():
    assert find_oracle(PointsWorld(classes=3, condition=1)) is None
    assert find_oracle(PointsWorld(classes=2, condition=10)) is None
    assert find_oracle(PointsWorld("gaussian", classes=2, condition=1)) is None
    with pytest.raises(UserError, match=r"unknown style '0\.33'"):
        ORACLE.demonstrate(WORLD.problem("train", 0), "0.33", Keys(0))
