"""What a benchmark says: ratios, floors, growth; and that it refuses to time two things that differ."""

import copy
import json
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app_cli import refused, runner
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.lab.bench import engine, grpo, learner, peers
from etude.lab.bench.case import Case, Growth, Machine, alternate
from etude.lab.bench.demo import Stopwatch
from etude.policies.tokenizers import ALPHABET, CharTokenizer
from etude.policies.zoo import load_policy

MACHINE = Machine(flops=1e9, bytes=1e8, threads=1)


@pytest.fixture(scope="module")
def lm():
    return load_policy("tiny:depth=1,width=32", Keys(0))


def test_a_case_compares_medians_and_shows_the_pairs():
    case = Case("w", "p", (1.0, 2.0, 4.0), (4.0, 4.0, 4.0), bar=2.0, floor=0.5)
    assert case.ratio == 2.0
    assert case.spread == (1.0, 4.0)
    assert case.met
    assert not Case("w", "p", (1.0,), (1.9,), bar=2.0).met
    assert Case("w", "p", (1.0,), (1.9,)).met is None
    assert "| 2 s | 4 s | **2.00** (1.00 to 4.00) | 2.0 | 0.5 s (4.0x) |" in case.row()


def test_growth_is_held_against_the_line_through_the_origin():
    assert Growth("w", (1, 4), (2.0, 8.0)).worst == 1.0
    assert Growth("w", (1, 4), (2.0, 5.0)).met  # a fixed part only helps
    assert not Growth("w", (1, 4, 16), (2.0, 8.0, 40.0)).met


def test_a_floor_is_the_slower_of_arithmetic_and_memory():
    assert MACHINE.floor(2e9, 1e7) == 2.0
    assert MACHINE.floor(1e6, 3e8) == 3.0


def test_sides_take_turns_and_each_begins_half_of_the_pairs():
    order = []
    a, b = alternate(lambda: order.append("a"), lambda: order.append("b"), pairs=4, warm=0)
    assert "".join(order) == "abbaabba"
    assert len(a) == len(b) == 4


def test_weights_are_those_of_the_model(lm):
    matrices = [p for n, p in lm.named_parameters() if p.dim() == 2]  # the embedding is the unembedding
    assert engine.weights(lm.shape) == sum(p.numel() for p in matrices)


@given(st.text(st.sampled_from(ALPHABET), max_size=40).filter(lambda text: "<" not in text))
def test_the_peers_tokenizer_agrees(text):
    ids = TOKENIZER(text)["input_ids"]
    assert ids == CharTokenizer().prompt(text).tolist()
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


TOKENIZER = peers.transformers_tokenizer(CharTokenizer())


def test_generation_is_timed_only_where_greedy_answers_are_equal(lm, monkeypatch):
    contexts = [np.array([1, 20, 21 + i], np.int32) for i in range(3)]
    ragged = engine.stopping(lm, range(9, 60))
    case = engine._case("few", ragged, contexts, 8, MACHINE, bar=1.0, pairs=2)
    assert case.same == "all 3 greedy answers"
    assert len(case.ours) == len(case.theirs) == 2
    assert lm.tokenizer.stops == {CharTokenizer.eos}  # the policy itself is as it was
    monkeypatch.setattr(engine, "generator", lambda *_, **__: lambda: [[5]] * 3)
    with pytest.raises(UserError, match="3 of 3 greedy answers differ"):
        engine._case("few", ragged, contexts, 8, MACHINE, bar=1.0)


@pytest.mark.parametrize("gap", [learner.loss_gap, lambda lm, rows: grpo.gradient_gap(lm)])
def test_training_is_timed_only_where_loss_and_gradient_are_equal(gap, lm, monkeypatch):
    rows = learner.ragged(lm.shape.vocab, rows=4, longest=16)
    assert [8 <= len(r) <= 16 for r in rows] == [True] * 4
    assert gap(lm, rows) < 1e-5

    def bent(lm):
        other = copy.deepcopy(lm)
        with torch.no_grad():
            other.model.embed_tokens.weight.mul_(2)
        return peers.transformers_model(other)

    monkeypatch.setattr(learner, "transformers_model", bent)
    monkeypatch.setattr(grpo, "transformers_model", bent)
    with pytest.raises(UserError, match="differ by"):
        gap(lm, rows)


def test_a_stopwatch_leaves_evaluations_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("etude.lab.bench.demo.time", SimpleNamespace(perf_counter=lambda: now[0]))
    answers = iter([0.5, 0.9])

    def accuracy():
        now[0] += 100.0
        return next(answers)

    watch = Stopwatch(accuracy)

    def training():
        for step in range(1, 100):
            now[0] += 1.0
            watch.ended(step)

    assert watch.until(training) == 10.0
    with pytest.raises(UserError, match="80% held-out accuracy was not reached"):
        Stopwatch(lambda: 0.0).until(lambda: None)


def test_the_command_prints_and_keeps_what_it_finds(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr("etude.lab.bench.case.machine", lambda: MACHINE)
    monkeypatch.setattr(engine, "engine", lambda m: iter([Case("w", "p", (1.0,), (3.0,), bar=2.0)]))
    monkeypatch.setattr("etude.lab.bench.scale.scale", lambda m: iter([Growth("g", (1, 16), (1.0, 16.0))]))
    for suite in ("engine", "scale"):
        said = runner(capfd)("bench", suite, "--json", f"{suite}.json")
        assert said.code == 0, said
        (row,) = json.loads((tmp_path / f"{suite}.json").read_text())["suites"][suite]
        assert row["met"]
    assert "| g | 1 s | 16 s | 1.00 | 1.15 |" in said.out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["bench", "engin"], "unknown suite 'engin': did you mean engine"),
        (["bench", "scale", "--json", "taken/new.json"], "cannot write taken/new.json"),
    ],
)
def test_misuse_is_a_line(words, line, capfd, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("")
    monkeypatch.setattr("etude.lab.bench.case.machine", lambda: MACHINE)
    monkeypatch.setattr("etude.lab.bench.scale.scale", lambda m: pytest.fail("it ran"))
    assert line in refused(runner(capfd)(*words))


def test_a_missing_peer_is_a_line(capfd, monkeypatch):
    def version(name):
        if name == "trl":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr("etude.app.bench.version", version)
    line = refused(runner(capfd)("bench", "scale"))
    assert line.endswith("needs the package trl: pip install 'etude[bench]'")
