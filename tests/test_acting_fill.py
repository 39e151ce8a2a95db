"""Filling canvases: against plain loops over the policy, orders, blocks, what is recorded, charged and refused."""

import numpy as np
import pytest
import torch

from etude.acting.agent import PolicyAgent
from etude.acting.fill import Fill, Filler, fill
from etude.acting.sample import sample
from etude.experience.batch import pack
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.protocols import Clock, Limits
from etude.experience.rows import example
from etude.experience.types import GREEDY, RAW, Author, Law
from etude.policies.lm import LM
from etude.policies.tokenizers import CharTokenizer
from etude.policies.transformer import Shape
from etude.policies.zoo import load_policy, save_policy
from small import LIMITS, Echo, small_lm

TOKENS = CharTokenizer()
PROMPTS = ["1+2=", "a longer prompt", "?", "1+2="]
CONTEXTS = [TOKENS.prompt(p) for p in PROMPTS]
KEYS = [Keys(5, ("row", i)) for i in range(4)]
M = 6
CANVAS = Limits(max_tokens=M)


def both_ways(seed=0, stops=False) -> LM:
    """A policy that looks both ways, far from uniform, which all but never ends an answer; with `stops` close to
    uniform, so that it now and then does."""
    shape = Shape(
        TOKENS.size, width=32, depth=2, heads=2, kv_heads=1, head_dim=16, ffn=64, limit=40, tie_embeddings=False
    )
    policy = LM(shape, TOKENS, torch.Generator().manual_seed(seed)).look_both_ways()
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(5 if p.ndim > 1 else 1)
        policy.lm_head.weight.mul_(0.1 if stops else 8.0)
        if not stops:
            policy.lm_head.weight[[TOKENS.eos, TOKENS.mask]] = 0
    return policy


POLICY = both_ways()


def logits_of(policy, context, canvas, at):
    """f32[len(at), V]: of places of a canvas after a context, by the plain forward pass."""
    row = example(context, canvas)
    batch = pack([row])
    where = torch.tensor([len(context) + i for i in at])
    batch.actions = {name: torch.zeros(len(at), dtype=torch.int64) for name in batch.actions}
    batch.at = where
    with torch.no_grad():
        return policy.forward(batch, frozenset({"logits"})).map_logits(lambda logits, part: logits)


def greedy(policy, context, score, at_once=1, length=M):
    """Fills the places with the highest score(logits) first, one after another or several in a pass."""
    canvas, hidden, order = np.full(length, TOKENS.mask), list(range(length)), []
    while hidden:
        logits = logits_of(policy, context, canvas, hidden)
        best = sorted(range(len(hidden)), key=lambda i: -score(hidden[i], logits[i]))[:at_once]
        for i in best:
            canvas[hidden[i]] = int(logits[i].argmax())
        order.append([hidden[i] for i in best])
        hidden = [p for p in hidden if canvas[p] == TOKENS.mask]
    return canvas.tolist(), order


def test_left_to_right_is_a_plain_loop_over_the_policy():
    calls = fill(POLICY, CONTEXTS, KEYS, CANVAS, GREEDY)
    wanted = [greedy(POLICY, c, lambda place, _: -place)[0] for c in CONTEXTS]
    assert [c.out.tolist() for c in calls] == wanted
    assert len({tuple(w) for w in wanted}) == 3  # equal prompts alone say the same
    assert all(c.tags["passes"] == tuple(range(M)) and c.stop == "length" for c in calls)


@pytest.mark.parametrize("at_once", [1, 2, 4, M])
@pytest.mark.parametrize("rule", ["confidence", "margin"])
def test_any_order_is_a_plain_loop_over_the_policy(rule, at_once):
    def score(place, logits):
        first, second = logits.softmax(-1).topk(2).values.tolist()
        return first if rule == "confidence" else first - second

    counts = {1: [1] * 6, 2: [2, 2, 2], 4: [3, 3], 6: [6]}[at_once]  # 6 in passes of at most 4: 3 and 3
    calls = fill(POLICY, CONTEXTS, KEYS, CANVAS, GREEDY, Fill(block=0, at_once=at_once, rule=rule))
    for context, call in zip(CONTEXTS, calls, strict=True):
        canvas, order = greedy(POLICY, context, score, counts[0])
        assert call.out.tolist() == canvas
        assert [sorted(np.flatnonzero(np.array(call.tags["passes"]) == i)) for i in range(len(counts))] == [
            sorted(o) for o in order
        ]
        assert call.law.tilt == (("confidence",) if rule == "confidence" else ())
    assert any(call.tags["passes"] != tuple(range(M)) for call in calls)


@pytest.mark.parametrize("rule", ["confidence", "margin", "random"])
def test_blocks_of_one_are_left_to_right_whatever_the_rule(rule):
    plain = fill(POLICY, CONTEXTS, KEYS, CANVAS, GREEDY)
    other = fill(POLICY, CONTEXTS, KEYS, CANVAS, GREEDY, Fill(block=1, at_once=3, rule=rule))
    assert [c.out.tolist() for c in other] == [c.out.tolist() for c in plain]
    assert other[0].law == GREEDY


def test_blocks_are_filled_from_left_to_right():
    for call in fill(POLICY, CONTEXTS, KEYS, CANVAS, RAW, Fill(block=2, rule="random")):
        passes = np.array(call.tags["passes"]).reshape(3, 2)
        assert [sorted(p) for p in passes.tolist()] == [[0, 1], [2, 3], [4, 5]]


def test_random_orders_differ_by_row_and_are_keyed():
    how = Fill(block=0, rule="random")
    first, again = (fill(POLICY, CONTEXTS, KEYS, CANVAS, RAW, how) for _ in range(2))
    assert [c.tags["passes"] for c in first] == [c.tags["passes"] for c in again]
    assert len({c.tags["passes"] for c in first}) == 4
    assert all(sorted(c.tags["passes"]) == list(range(M)) for c in first)


def test_how_many_tokens_a_pass_fills():
    assert [n for _, n in Fill(block=0, at_once=3).passes(10)] == [3, 3, 2, 2]
    for size, blocks, each in ((8, 32, 4), (128, 2, 64)):  # 256 tokens in 128 passes
        passes = Fill(block=size, at_once=2).passes(256)
        assert len(passes) == 128 == blocks * each
        assert {n for _, n in passes} == {2}
        assert [p.start for p, _ in passes[::each]] == list(range(0, 256, size))
    assert Fill(block=4).passes(6) == [(slice(0, 4), 1)] * 4 + [(slice(4, 6), 1)] * 2  # a last block that is shorter


def test_a_policy_that_reads_no_context_says_the_same_in_every_order():
    policy = both_ways()
    with torch.no_grad():
        for layer in policy.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    said = {
        tuple(fill(policy, CONTEXTS, KEYS, CANVAS, GREEDY, Fill(b, k, r))[i].out.tolist())
        for b, k, r in ((1, 1, "confidence"), (0, 1, "confidence"), (3, 2, "random"), (0, 6, "margin"))
        for i in range(4)
    }
    assert len(said) == 1


@pytest.mark.parametrize("how", [Fill(), Fill(block=3, at_once=2, rule="random"), Fill(block=0, at_once=M)])
@pytest.mark.parametrize("law", [RAW, Law(0.7, top_k=9), GREEDY])
def test_log_probabilities_are_those_of_the_pass_that_chose_the_token(law, how):
    for context, call in zip(CONTEXTS, fill(POLICY, CONTEXTS, KEYS, CANVAS, law, how), strict=True):
        passes, raw = np.array(call.tags["passes"]), []
        for i, token in enumerate(call.out):
            canvas = np.where(passes < passes[i], call.out, TOKENS.mask)
            raw.append(float(logits_of(POLICY, context, canvas, [i])[0].log_softmax(-1)[token]))
        assert call.logp_raw == pytest.approx(raw, abs=1e-4)
        assert (call.author == Author.SELF).all()
        wanted = {1.0: call.logp_raw, 0.0: np.zeros(M)}.get(law.temperature)
        assert wanted is None or call.logp_sampled == pytest.approx(wanted, abs=1e-5)
        assert (call.logp_sampled >= call.logp_raw - 1e-4).all() or law.temperature == 0.7


def test_one_token_is_drawn_from_the_law():
    n, law = 4000, Law(temperature=1.5)
    calls = fill(POLICY, [CONTEXTS[0]] * n, [Keys(1, ("r", i)) for i in range(n)], Limits(1), law, max_rows=4000)
    counts = np.bincount([int(c.out[0]) for c in calls], minlength=TOKENS.size) / n
    p = (logits_of(POLICY, CONTEXTS[0], np.array([TOKENS.mask]), [0])[0] / 1.5).softmax(-1).numpy()
    assert 0.1 < p.max() < 0.95
    assert np.abs(counts - p).sum() < 0.1


def test_rows_do_not_depend_on_the_batch_around_them():
    how = Fill(block=3, at_once=2)
    for law in (RAW, GREEDY):
        whole = fill(POLICY, CONTEXTS, KEYS, CANVAS, law, how)
        waves = fill(POLICY, CONTEXTS, KEYS, CANVAS, law, how, max_rows=3)
        alone = [fill(POLICY, [c], [k], CANVAS, law, how)[0] for c, k in zip(CONTEXTS, KEYS, strict=True)]
        for a, b, c in zip(whole, waves, alone, strict=True):
            assert a.out.tolist() == b.out.tolist() == c.out.tolist()
            assert a.logp_raw == pytest.approx(c.logp_raw, abs=1e-4)


def test_an_answer_ends_with_its_first_stop_token_and_the_rest_is_discarded():
    policy = both_ways(stops=True)
    contexts = [TOKENS.prompt(f"{i}") for i in range(200)]
    keys = [Keys(0, ("r", i)) for i in range(200)]
    whole, left = Meter(), Meter()
    calls = fill(policy, contexts, keys, CANVAS, RAW, Fill(block=0, rule="random"), whole)
    ended = [c for c in calls if c.stop == "stop"]
    assert ended
    for call in calls:
        stops = [i for i, t in enumerate(call.out) if t == TOKENS.eos]
        assert stops == ([len(call.out) - 1] if call.stop == "stop" else [])
        assert call.stop == "stop" or len(call.out) == M
    kept = sum(len(c.out) for c in calls)
    assert whole["sampled"] - whole["discarded"] == kept < whole["sampled"] <= 200 * M
    calls = fill(policy, contexts, keys, CANVAS, RAW, None, left)
    assert left["discarded"] == 0  # nothing is filled after a stop token from left to right
    assert left["sampled"] == sum(len(c.out) for c in calls) < 200 * M
    assert left["prefilled"] == sum(len(c.out) * (len(x) + M) for c, x in zip(calls, contexts, strict=True))
    digit = int(TOKENS.encode("7")[0])
    calls = fill(policy, contexts, keys, Limits(M, stop_ids=frozenset({digit})), RAW)
    assert digit in {int(c.out[-1]) for c in calls}
    assert all(digit not in c.out[:-1] for c in calls)


def test_an_agent_whose_policy_looks_both_ways_fills(tmp_path):
    meter = Meter()
    agent = PolicyAgent(POLICY, "actor", GREEDY, CANVAS, meter)
    calls = agent.generate(CONTEXTS, KEYS)
    plain = fill(POLICY, CONTEXTS, KEYS, CANVAS, GREEDY)
    assert [c.out.tolist() for c in calls] == [c.out.tolist() for c in plain]
    assert meter["sampled"] == 4 * M
    save_policy(POLICY, tmp_path / "saved")
    again = load_policy(str(tmp_path / "saved"))
    assert not again.causal
    assert [c.out.tolist() for c in PolicyAgent(again, "actor", GREEDY, CANVAS).generate(CONTEXTS, KEYS)] == [
        c.out.tolist() for c in plain
    ]
    assert agent.generate(CONTEXTS[:1], KEYS[:1], Limits(2), RAW)[0].law == RAW


def test_as_a_strategy_it_answers_problems():
    world, policy = Echo(), small_lm().look_both_ways()
    roles = {"actor": PolicyAgent(policy, "actor", RAW, LIMITS)}
    problems = [world.problem("train", i) for i in range(3)]
    for act, passes in ((sample, {(0, 1), (0,)}), (Fill(block=0, at_once=2), {(0, 0), (0,)})):
        groups = act(roles, problems, 2, world.score, Clock(0, 1), Keys(0))
        members = [m for g in groups for m in g.members]
        assert [len(g.members) for g in groups] == [2, 2, 2]
        assert all(m.outcome is not None for m in members)
        assert {m.calls[0].tags["passes"] for m in members} <= passes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"policy": small_lm()},
            "filling needs a policy that looks both ways; this one sees only what is before",
        ),
        ({"limits": Limits(30)}, "prompt 1 has 16 tokens, which with 30 to fill is more than the policy's limit of 40"),
        ({"limits": Limits(0)}, "max_tokens 0 is below 1"),
        ({"limits": Limits(4, stop=("x",))}, "stop strings need text that grows from left to right"),
        ({"contexts": [*CONTEXTS[:3], np.zeros(0, np.int32)]}, "context 3 is empty: begin with a start token"),
        ({"law": Law(-1.0)}, "temperature -1.0"),
    ],
)
def test_what_cannot_be_filled_is_one_line(change, said):
    given = {"policy": POLICY, "contexts": CONTEXTS, "keys": KEYS, "limits": CANVAS, **change}
    with pytest.raises(UserError, match=said):
        fill(**given)


def test_a_tokenizer_without_a_mask_token_is_refused():
    policy = small_lm().look_both_ways()
    policy.tokenizer.mask = None
    with pytest.raises(UserError, match="filling needs a mask token, which this policy's tokenizer does not have"):
        fill(policy, CONTEXTS[:1], KEYS[:1], Limits(2))


def test_a_policy_that_is_not_finite_is_not_believed():
    policy = both_ways()
    with torch.no_grad():
        policy.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="hidden token is not finite"):
        fill(policy, CONTEXTS[:1], KEYS[:1], CANVAS, GREEDY)


def test_hooks_servers_and_bad_options_are_refused():
    agent = PolicyAgent(POLICY, "actor", RAW, CANVAS)
    with pytest.raises(UserError, match="hooks and logits processors need text that grows from left to right"):
        agent.generate(CONTEXTS, KEYS, hooks=(object(),))
    with pytest.raises(UserError, match="filling needs the actor's own forward pass"):
        Filler(object())
    for bad in ({"block": -1}, {"at_once": 0}, {"rule": "best"}):
        with pytest.raises(UserError, match="fill: "):
            Fill(**bad)
