"""Compositions that cannot be right are refused in one line that says why; the rest pass."""

import pytest

from etude.experience.errors import UserError
from etude.experience.plugs import Plug, check, names, plug, register


def made(kind, name, **kwargs):
    sets = ("needs", "gives", "owns", "refuses")
    return Plug(kind, name, dict, **{k: frozenset(v) if k in sets else v for k, v in kwargs.items()})


SAMPLE = made("acting", "sample", gives={"group", "logp_old"})
BEST = made("acting", "best-of-n", gives={"group", "logp_old"}, law="tilted")
GRPO = made("credit", "grpo", needs={"group"}, gives={"advantage"}, owns={"advantage"})
CLIP = made("objective", "clipped-pg", needs={"advantage", "logp_old"}, law="raw")
NLL = made("objective", "nll")


def test_what_fits_passes():
    check([SAMPLE, GRPO, CLIP])
    check([BEST, NLL], law_raw=False)
    check([GRPO, made("objective", "pg", needs={"advantage"})], present={"group"})
    check([])


@pytest.mark.parametrize(
    ("plugs", "law_raw", "present", "message"),
    [
        (
            [GRPO, made("credit", "rloo", owns={"advantage"})], True, {"group"},
            "credit 'grpo' and credit 'rloo' both own the advantage column: keep one",
        ),
        (
            [made("schedule", "cosine", owns={"learning-rate"}), made("schedule", "autolrs", owns={"learning-rate"})],
            True, (), "schedule 'cosine' and schedule 'autolrs' both own the learning rate: keep one",
        ),
        ([GRPO], True, (), "credit 'grpo' needs group, which nothing here gives"),
        (
            [made("credit", "igpo", needs={"answer"}, why="it scores the reference answer")], True, (),
            "credit 'igpo' needs answer, which nothing here gives: it scores the reference answer",
        ),
        (
            [made("policy", "diffusion", gives={"canvas"}), made("acting", "prefix", refuses={"canvas"})], True, (),
            "acting 'prefix' cannot be used with canvas, which policy 'diffusion' gives",
        ),
        (
            [made("objective", "x", refuses={"pairs"}, why="it reads single rows")], True, {"pairs"},
            "objective 'x' cannot be used with pairs, which this loop gives: it reads single rows",
        ),
        (
            [BEST, GRPO, CLIP], True, (),
            "objective 'clipped-pg' takes ratios of log-probabilities, but acting 'best-of-n' selects or bends its "
            "samples: their law is no longer the one they were scored under",
        ),
        (
            [SAMPLE, GRPO, CLIP], False, (),
            "objective 'clipped-pg' takes ratios of log-probabilities at temperature 1: sample with temperature 1 "
            "and without top-k, top-p or min-p",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused(plugs, law_raw, present, message):
    with pytest.raises(UserError) as error:
        check(plugs, law_raw, present)
    assert str(error.value) == message


def test_registered_plugs_are_found_and_names_are_unique():
    @register("selector", "test-half", needs={"group"}, law="raw", why="halves")
    def half():
        return None

    found = plug("selector", "test-half")
    assert (found.kind, found.build, found.needs, found.law, found.why) == (
        "selector", half, {"group"}, "raw", "halves",
    )  # fmt: skip
    assert "test-half" in names("selector")
    with pytest.raises(ValueError, match="two selector plugs are called 'test-half'"):

        @register("selector", "test-half")
        def other():
            return None

    with pytest.raises(UserError, match="unknown selector 'test-hal': did you mean test-half"):
        plug("selector", "test-hal")
