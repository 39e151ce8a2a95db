"""The masked objective: how many tokens are in sight, what leaks (nothing), and what it is the mean of."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from etude.acting.fill import hidden_token
from etude.experience.batch import normalise, pack, split
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.rows import example
from etude.learning.learner import Optim, Seat, Term, update
from etude.objectives.masked import MaskedLM, canvas, hide
from etude.objectives.nll import NLL
from etude.policies.tokenizers import CharTokenizer
from small import small_lm

TOKENS = CharTokenizer()
ROWS = [
    canvas(TOKENS, prompt, text, 32, 6) for prompt, text in (("1+2=", "3"), ("ab", "cde"), ("?", "12345"), ("x", ""))
]
KEYS = Keys(3)


def policy(seed=0, depth=1):
    return small_lm(seed, depth=depth).look_both_ways()


def sets(length, count, rates=(0.0, 1.0)):
    """bool[count, length]: what is in sight, `count` times over."""
    hidden = hide(torch.full((count,), length), rates, Keys(0).numpy())
    return ~hidden.view(count, length).numpy()


# --- what is in sight ---------------------------------------------------------------------------


def test_the_number_of_tokens_in_sight_is_uniform():
    """1/5 each for L = 4; the fifth that would hide nothing hides one, so that 3 are in sight twice as often."""
    counts = np.bincount(sets(4, 200_000).sum(1), minlength=5) / 200_000
    assert counts == pytest.approx([0.2, 0.2, 0.2, 0.4, 0.0], abs=0.004)


def test_how_often_exactly_the_first_tokens_are_in_sight():
    """i! (L - i)! / (L + 1)!: .2, .05, .0333, .05; the last with a fourth of the rows that hide one token."""
    seen = sets(4, 400_000)
    for i, wanted in enumerate((0.2, 0.05, 0.0333, 0.05 + 0.2 / 4)):
        exactly = seen[:, :i].all(1) & ~seen[:, i:].any(1)
        assert exactly.mean() == pytest.approx(wanted, abs=0.002)
        formula = math.factorial(i) * math.factorial(4 - i) / math.factorial(5)
        assert wanted == pytest.approx(formula + (0.05 if i == 3 else 0), abs=1e-4)


def test_the_share_is_one_of_a_sequence_not_of_a_token_or_a_batch():
    counts = sets(40, 4000).sum(1)
    assert counts.std() == pytest.approx(math.sqrt(40 * 42 / 12), rel=0.05)  # uniform on 0 .. 40; by token it is 3.2
    assert sets(40, 4000, (0.85, 0.85)).mean() == pytest.approx(0.85, abs=0.01)


@pytest.mark.parametrize("rates", [(0.0, 1.0), (0.9, 1.0), (1.0, 1.0)])
def test_something_is_always_hidden(rates):
    for length in (1, 2, 5):
        assert not sets(length, 3000, rates).all(1).any()


def test_limits_of_the_share():
    assert not sets(5, 1000, (0.0, 0.0)).any()  # all hidden
    cloze = sets(5, 20_000, (1.0, 1.0))  # one hidden, each as often
    assert (cloze.sum(1) == 4).all()
    assert (~cloze).mean(0) == pytest.approx([0.2] * 5, abs=0.01)


# --- prepare ------------------------------------------------------------------------------------


def test_hidden_tokens_become_the_mask_and_what_is_in_sight_leaves_the_batch():
    batch = MaskedLM().prepare(policy(), pack(ROWS), KEYS)
    plain = pack(ROWS)
    assert (batch.inputs[batch.at] == TOKENS.mask).all()
    changed = batch.inputs != plain.inputs
    assert changed.nonzero().flatten().tolist() == batch.at.tolist()
    assert (batch.actions["target"] == plain.inputs[batch.at]).all()
    assert set(batch.row_of.tolist()) == set(range(4))
    assert 4 <= len(batch.at) < 24
    for r, row in enumerate(ROWS):  # prompts are never hidden
        start = int(plain.starts[r])
        assert (batch.inputs[start : start + len(row) - 6] == plain.inputs[start : start + len(row) - 6]).all()


def test_what_is_hidden_depends_on_the_keys_alone():
    drawn = [
        MaskedLM().prepare(policy(seed), pack(ROWS), k).at.tolist() for seed, k in ((0, KEYS), (1, KEYS), (0, Keys(4)))
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_prefix_in_sight_is_next_token_training_with_a_prompt_that_is_seen_both_ways():
    lm, objective, seen = policy(), MaskedLM(visible="prefix"), np.zeros(6)
    for trial in range(200):
        batch = objective.prepare(lm, pack(ROWS[1:2]), Keys(trial))
        prompt = len(ROWS[1]) - 6
        k = int(batch.at[0]) - prompt
        seen[k] += 1 / 200
        assert len(batch.at) == 1
        assert (batch.inputs[: prompt + k] == pack(ROWS[1:2]).inputs[: prompt + k]).all()
        assert (batch.inputs[prompt + k :] == TOKENS.mask).all()
        assert int(batch.actions["target"][0]) == ROWS[1].ids[prompt + k]
        assert float(batch.actions["weight"][0]) == 1.0
    assert seen == pytest.approx([1 / 6] * 6, abs=0.09)


def test_with_one_token_to_hide_all_settings_are_the_same():
    rows = [canvas(TOKENS, p, "", 32, 1) for p in ("a", "bc", "def")]
    prepared = [
        o.prepare(policy(), pack(rows), KEYS)
        for o in (MaskedLM(), MaskedLM(visible="prefix"), MaskedLM(rates=(1.0, 1.0)), MaskedLM(by="sequence"))
    ]
    for one in prepared[1:]:
        assert torch.equal(one.inputs, prepared[0].inputs)
        assert torch.equal(one.at, prepared[0].at)
        assert torch.equal(one.actions["weight"], prepared[0].actions["weight"])


def test_the_mean_is_over_hidden_tokens_of_the_batch_or_of_each_sequence_first():
    token, sequence = (MaskedLM(by=by).prepare(policy(), pack(ROWS), KEYS) for by in ("token", "sequence"))
    assert torch.equal(token.at, sequence.at)
    hidden = torch.bincount(token.row_of).double()
    assert len(set(hidden.tolist())) > 1
    assert token.actions["weight"].tolist() == pytest.approx([1 / len(token.at)] * len(token.at))
    assert sequence.actions["weight"].tolist() == pytest.approx((1 / (4 * hidden[token.row_of])).tolist())


def test_microbatches_add_up_to_the_whole():
    lm, objective = policy().double(), MaskedLM()
    batch = objective.prepare(lm, pack(ROWS * 3), KEYS)
    grads = []
    for parts in ([batch], list(split(batch, 20))):
        lm.zero_grad()
        for part in parts:
            objective.loss(lm.forward(part, objective.needs), part).total.backward()
        grads.append(torch.cat([p.grad.flatten() for p in lm.parameters() if p.grad is not None]))
    assert len(list(split(batch, 20))) > 3
    torch.testing.assert_close(grads[0], grads[1])


# --- loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective", [MaskedLM(), MaskedLM(visible="prefix"), MaskedLM(rates=(1.0, 1.0), by="sequence")]
)
def test_a_uniform_predictor_loses_the_logarithm_of_the_vocabulary(objective):
    lm = policy()
    with torch.no_grad():
        lm.model.embed_tokens.weight.zero_()
    batch = objective.prepare(lm, pack(ROWS), KEYS)
    loss = objective.loss(lm.forward(batch, objective.needs), batch)
    assert float(loss.total.detach()) == pytest.approx(math.log(TOKENS.size), abs=1e-5)
    total, count = loss.metrics["nll"]
    assert (total / count, count) == (pytest.approx(math.log(TOKENS.size), abs=1e-5), len(batch.at))


def test_the_loss_is_pure_and_the_step_repeats():
    results = []
    for _ in range(2):
        lm = policy()
        seat = Seat(lm, Optim(lr=1e-2), 3)
        losses = [update(seat, [Term(pack(ROWS), MaskedLM())], Keys(i), Meter())["loss"] for i in range(3)]
        results.append((losses, lm.fingerprint()))
    assert results[0] == results[1]
    assert len(set(results[0][0])) == 3


def states(lm, ids, positions=None):
    row = example(ids[:1], ids[1:])
    batch = pack([replace(row, pos=positions)])
    with torch.no_grad():
        return lm.lm_head(lm.states(batch))


def test_the_id_of_a_hidden_token_changes_no_logit_and_one_in_sight_may():
    lm, row = policy(), ROWS[1]
    start = len(row) - 6
    logits = {}
    for place in (start + 1, start + 4):
        for token in ("q", "w"):
            ids = row.ids.copy()
            ids[place] = TOKENS.encode(token)[0]
            target = replace(row, ids=ids, columns={**row.columns, "target": ids[start:].astype(np.int64)})
            batch = MaskedLM(visible="prefix").prepare(lm, pack([target]), Keys(0))
            k = int(batch.at[0]) - start
            with torch.no_grad():
                logits[place, token] = lm.forward(batch, frozenset({"logits"})).map_logits(lambda x, at: x)
    assert 1 < k < 4  # the first place is in sight, the second hidden
    assert torch.equal(logits[start + 4, "q"], logits[start + 4, "w"])
    assert (logits[start + 1, "q"] - logits[start + 1, "w"]).abs().max() > 1e-4


def test_permuting_the_prompt_with_its_positions_changes_no_logit_of_the_answer():
    lm = policy()
    ids = np.concatenate([TOKENS.prompt("a1b2c3"), np.full(5, TOKENS.mask)]).astype(np.int32)
    order = np.concatenate([Keys(0).numpy().permutation(7), np.arange(7, 12)])
    plain = states(lm, ids, np.arange(12, dtype=np.int32))
    moved = states(lm, ids[order], order.astype(np.int32))
    assert (plain[7:] - moved[7:]).abs().max() < 1e-5
    assert (plain[7:] - states(lm, ids[order], np.arange(12, dtype=np.int32))[7:]).abs().max() > 1e-4
    causal = small_lm(depth=2)
    gone = states(causal, ids[order], order.astype(np.int32))
    assert (states(causal, ids, np.arange(12, dtype=np.int32))[7:] - gone[7:]).abs().max() > 1e-4


# --- canvases and refusals ----------------------------------------------------------------------


def test_a_canvas_is_the_answer_its_end_and_more_of_its_end():
    for row, text in zip(ROWS, ("3", "cde", "12345", ""), strict=True):
        answer = row.ids[-6:]
        assert answer.tolist() == [*TOKENS.encode(text), *[TOKENS.eos] * (6 - len(text))]
        assert row.at.tolist() == list(range(len(row) - 6, len(row)))
        assert row.columns["target"].tolist() == answer.tolist()


def test_what_does_not_fit_is_one_line():
    with pytest.raises(UserError, match="an answer of 4 tokens does not fit a canvas of 3: raise max_tokens: 'abc'"):
        canvas(TOKENS, "x", "abc", 32, 3)
    with pytest.raises(UserError, match="a prompt of 6 tokens and 4 to fill are longer than the policy's context of 9"):
        canvas(TOKENS, "abcde", "abc", 9, 4)


def test_a_row_with_nothing_to_hide_is_refused():
    empty = replace(ROWS[0], at=ROWS[0].at[:0], columns={n: c[:0] for n, c in ROWS[0].columns.items()})
    with pytest.raises(UserError, match="row 1 of the batch has nothing to hide: its answer is empty"):
        MaskedLM().prepare(policy(), pack([ROWS[1], empty]), KEYS)


def test_policies_that_cannot_are_refused():
    with pytest.raises(UserError, match="a masked objective needs a policy that looks both ways; this one sees only"):
        MaskedLM().prepare(small_lm(), pack(ROWS), KEYS)
    lm = policy()
    lm.tokenizer.mask = None
    with pytest.raises(
        UserError, match="a masked objective needs a mask token, which this policy's tokenizer does not"
    ):
        MaskedLM().prepare(lm, pack(ROWS), KEYS)
    assert hidden_token(policy(), "x") == TOKENS.mask


def test_a_policy_that_looks_both_ways_says_nothing_of_tokens_in_sight():
    lm, batch = policy(), normalise(pack([example(TOKENS.prompt("1="), TOKENS.completion("2"))]), "token")
    for objective in (NLL(), MaskedLM()):
        with pytest.raises(
            UserError, match="looks both ways and predicts hidden tokens alone, but 2 of 2 are in sight"
        ):
            objective.loss(lm.forward(batch, objective.needs), batch)
    with pytest.raises(UserError, match="in sight"):
        lm.logp(pack(ROWS))
    assert lm.forward(batch, frozenset({"hidden"})).hidden.shape == (2, 16)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"rates": (0.5, 0.2)}, "rates must be the smallest and largest share"),
        ({"rates": (-0.1, 1.0)}, "rates must be"),
        ({"rates": (0.0, 1.1)}, "rates must be"),
        ({"rates": (0.5,)}, "rates must be"),
        ({"visible": "suffix"}, "visible must be one of any, prefix, not 'suffix'"),
    ],
)
def test_bad_options_are_refused(option, said):
    with pytest.raises(UserError, match=said):
        MaskedLM(**option)
