import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from acting_fakes import Fake, Letters, same, streams
from etude.acting.agent import PolicyAgent
from etude.acting.engine import generate
from etude.acting.text import completes
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.protocols import Limits
from etude.experience.rows import rows
from etude.experience.types import GREEDY, RAW, Author, Law, Problem, Trajectory

CONTEXTS = [[1, 3], [1, 4, 5, 6, 3], [1], [1, 3], [1, 8, 8, 8], [1, 3]]


def ids(contexts):
    return [np.array(c, np.int32) for c in contexts]


def one_by_one(policy, context, keys, limits, law):
    """What the engine must do, written plainly."""
    row, out, uniform = list(map(int, context)), [], keys.at("tokens").numpy().random(len(context) + 99)
    while len(out) < limits.max_tokens and len(row) < policy.limit:
        p = (policy.logits(row) / law.temperature).softmax(-1).double().cumsum(0)
        token = int((p <= float(uniform[len(row)] * p[-1])).sum())
        row.append(token)
        out.append(token)
        if token in policy.tokenizer.stops:
            break
    return out


contexts_of = st.lists(st.lists(st.integers(3, 10), max_size=6).map(lambda c: [1, *c]), max_size=7)


@settings(max_examples=60, deadline=None)
@given(contexts_of, st.integers(1, 12), st.sampled_from([1.0, 0.6]), st.integers(1, 8), st.randoms())
def test_rows_are_what_a_plain_loop_writes_whatever_is_around_them(contexts, most, temperature, max_rows, order):
    policy, limits, law = Fake(limit=12, stop_bias=0.5), Limits(most), Law(temperature)
    keys, contexts = streams(len(contexts)), ids(contexts)
    meter = Meter()
    calls = generate(policy, contexts, keys, limits, law, meter=meter)
    for call, context, key in zip(calls, contexts, keys, strict=True):
        assert call.out.tolist() == one_by_one(policy, context, key, limits, law)
        assert call.context.tolist() == context.tolist()
        text = call.context.tolist()
        for token, raw, sampled in zip(call.out, call.logp_raw, call.logp_sampled, strict=True):
            logits = policy.logits(text)
            assert raw == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-5)
            assert sampled == pytest.approx(float((logits / temperature).log_softmax(-1)[token]), abs=1e-5)
            text.append(int(token))
        ended = "stop" if text[-1] == 2 else "context" if len(text) == 12 and len(call.out) < most else "length"
        assert call.stop == ended
    assert meter["sampled"] == sum(len(c.out) for c in calls)
    assert meter["prefilled"] == sum(map(len, {tuple(c) for c in contexts}))
    shuffled = list(range(len(contexts)))
    order.shuffle(shuffled)
    again = generate(
        policy, [contexts[i] for i in shuffled], [keys[i] for i in shuffled], limits, law, max_rows=max_rows
    )
    assert all(same(calls[i], call) for i, call in zip(shuffled, again, strict=True))


@pytest.mark.parametrize("law", [RAW, Law(0.7), Law(top_k=3), Law(top_p=0.7), Law(min_p=0.2)])
def test_first_tokens_are_distributed_as_the_law_says(law):
    from etude.acting.law import log_law

    policy, n = Fake(scale=1.0), 6000
    calls = generate(policy, ids([[1, 3, 4]]) * n, streams(n), Limits(1), law, max_rows=n)
    p = log_law(policy.logits([1, 3, 4])[None], law)[0].double().exp().numpy()
    counts = np.bincount([c.out[0] for c in calls], minlength=len(p))
    assert counts[p == 0].sum() == 0
    assert chisquare(counts[p > 0], n * p[p > 0] / p.sum()).pvalue > 1e-3


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_a_row_cut_anywhere_and_continued_under_its_keys_is_the_same_row(cut):
    policy = Fake(stop_bias=-9)
    keys = streams(6)
    whole = generate(policy, ids(CONTEXTS), keys, Limits(10))
    begun = generate(policy, ids(CONTEXTS), keys, Limits(cut))
    ended = generate(policy, [np.append(c.context, c.out) for c in begun], keys, Limits(10 - cut))
    for a, b, c in zip(whole, begun, ended, strict=True):
        assert a.out.tolist() == [*b.out, *c.out]


def test_members_of_a_group_share_one_prefill_and_differ():
    policy, meter = Fake(stop_bias=-9), Meter()
    calls = generate(policy, ids([[1, 3, 4]] * 8), streams(8), Limits(6), meter=meter)
    assert policy.prefilled == [1]
    assert meter["prefilled"] == 3
    assert meter["sampled"] == 48
    assert len({tuple(c.out) for c in calls}) == 8


def test_finished_rows_leave_the_batch():
    """Work is near the tokens that were written, far below rows x longest row."""
    policy, meter = Fake(stop_bias=1.5, limit=500), Meter()
    calls = generate(policy, ids([[1, 3]]) * 200, streams(200), Limits(60), meter=meter)
    written = sum(len(c.out) for c in calls)
    assert policy.fed < 1.35 * (written + 2)
    assert 200 * max(len(c.out) for c in calls) > 3 * written  # else the bound above says nothing


def test_a_prompt_beyond_the_limit_is_refused_and_one_at_it_has_no_room():
    policy = Fake(limit=5)
    with pytest.raises(UserError, match=r"prompt 1 has 6 tokens.*limit is 5"):
        generate(policy, ids([[1], [1] * 6]), streams(2), Limits(3))
    full, nearly, free = generate(Fake(limit=5, stop_bias=-9), ids([[1] * 5, [1] * 4, [1]]), streams(3), Limits(3))
    assert (full.stop, nearly.stop, free.stop) == ("context", "context", "length")
    assert (len(full.out), len(nearly.out), len(free.out)) == (0, 1, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contexts": [np.zeros(0, np.int32)]}, "context 0 is empty"),
        ({"limits": Limits(0)}, "max_tokens 0"),
        ({"limits": Limits(stop=("",))}, "stop string"),
        ({"max_rows": 0}, "max_rows 0"),
        ({"law": Law(-1)}, "temperature -1"),
    ],
)
def test_bad_input_gets_one_line(change, message):
    given = {"policy": Fake(), "contexts": ids([[1]]), "keys": streams(1), "limits": Limits(3)}
    with pytest.raises(UserError, match=message) as error:
        generate(**{**given, **change})
    assert "\n" not in str(error.value)


def test_no_rows_are_no_calls_and_cost_nothing():
    meter = Meter()
    assert generate(Fake(), [], [], Limits(3), meter=meter) == []
    assert set(meter.read().values()) == {0.0}


def test_logits_that_are_not_numbers_are_an_error():
    policy = Fake()
    policy.table[:] = float("nan")
    with pytest.raises(FloatingPointError, match="row 0"):
        generate(policy, ids([[1]]), streams(1), Limits(3))


# --- stops -----------------------------------------------------------------------------------------


def test_stop_ids_besides_the_tokenizers_end_a_row_and_are_kept():
    calls = generate(Fake(stop_bias=-9), ids([[1]]) * 50, streams(50), Limits(30, stop_ids=frozenset({3, 9})))
    assert {c.stop for c in calls} == {"stop"}
    assert all(c.out[-1] in (3, 9) and not {3, 9} & set(c.out[:-1].tolist()) for c in calls)


@pytest.mark.parametrize("stop", [("cab",), ("abc", "\n."), ("bb", "cc")])
def test_a_row_ends_with_the_token_that_first_completes_a_stop_string(stop):
    """Against the whole text of the same row without stop strings, for pieces of several letters."""
    policy, keys = Fake(stop_bias=-9, scale=0.6), streams(80)
    free = generate(policy, ids([[1, 3]]) * 80, keys, Limits(40))
    held = generate(policy, ids([[1, 3]]) * 80, keys, Limits(40, stop=stop))
    met = 0
    for a, b in zip(free, held, strict=True):
        texts = [policy.tokenizer.decode(a.out[: n + 1]) for n in range(40)]
        end = next((n + 1 for n, t in enumerate(texts) if any(s in t for s in stop)), 40)
        assert b.out.tolist() == a.out[:end].tolist()
        assert b.stop == ("stop" if any(s in texts[end - 1] for s in stop) else "length")
        met += b.stop == "stop"
    assert met > 20


def test_a_stop_string_in_the_prompt_does_not_count():
    policy = Fake(stop_bias=-9)
    policy.table[:, 3] = 99  # always "a"
    (call,) = generate(policy, ids([[1, 4]]), streams(1), Limits(3, stop=("ba",)))
    assert call.stop == "length"


def test_stop_strings_are_found_across_the_bytes_of_one_character():
    """Three tokens make one euro sign, and a token may end a character and begin another."""

    class Bytes(Letters):
        def __init__(self):
            super().__init__(pieces=["?"] * 4)
            self.bytes = [b"", b"", b"", b"\xe2", b"\x82", b"\xac", b"x\xe2"]

        def decode(self, ids):
            return b"".join(self.bytes[i] for i in ids).decode(errors="replace")

    tokenizer = Bytes()
    policy = Fake(tokenizer, stop_bias=-99)
    policy.logits = lambda row: torch.nn.functional.one_hot(torch.tensor([3, 4, 5, 6, 4, 5][len(row) - 1]), 7) * 99.0
    for stop, length in [("€", 3), ("€x", 4), ("x€", 6), ("€x€", 6)]:
        (call,) = generate(policy, ids([[1]]), streams(1), Limits(6, stop=(stop,)))
        assert (call.stop, len(call.out)) == ("stop", length)


BYTES = [b"", b"a", b"b", b"ab", b"\xe2", b"\x82\xac", b"a\xe2", b"\x82", b"\xacb"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=40), st.sampled_from([("ab",), ("b€", "aa"), ("€b€",)]))
@example([1, *[0] * 20, 2], ("ab",))
def test_a_string_is_complete_where_the_whole_text_first_holds_it(tokens, strings):
    """Tokens of no text, of several characters, and of parts of one."""

    def decode(ids):
        return b"".join(BYTES[i] for i in ids).decode(errors="replace")

    def count(text):
        return sum(text[i:].startswith(s) for s in strings for i in range(len(text)))

    grown = count(decode(tokens)) > count(decode(tokens[:-1]))
    assert completes(decode, np.array(tokens), strings) == grown


# --- laws, processors ------------------------------------------------------------------------------


def test_processors_bend_the_law_and_are_named_in_it():
    tf = pytest.importorskip("transformers")
    policy = Fake(stop_bias=-9)
    ban = tf.SuppressTokensLogitsProcessor([3, 4, 5])
    calls = generate(policy, ids(CONTEXTS), streams(6), Limits(8), processors=[ban])
    for call in calls:
        assert not {3, 4, 5} & set(call.out.tolist())
        assert call.law == Law(tilt=("SuppressTokensLogitsProcessor",))
        logits = policy.logits(call.context)
        assert call.logp_raw[0] == pytest.approx(float(logits.log_softmax(-1)[call.out[0]]), abs=1e-5)
        logits = logits.clone()
        logits[3:6] = float("-inf")
        assert call.logp_sampled[0] == pytest.approx(float(logits.log_softmax(-1)[call.out[0]]), abs=1e-5)


def test_processors_see_contexts_and_outputs_padded_on_the_left():
    seen = []

    def watch(input_ids, scores):
        seen.append(input_ids.clone())
        return scores

    calls = generate(Fake(stop_bias=-9), ids(CONTEXTS[:3]), streams(3), Limits(4), processors=[watch])
    assert calls[0].law.tilt == ("watch",)
    for n, ids_ in enumerate(seen):
        assert ids_.shape == (3, 5 + n)
        for row, call in zip(ids_.tolist(), calls, strict=True):
            text = [*call.context, *call.out[:n]]
            assert row == [0] * (5 + n - len(text)) + text


def test_a_processor_that_forbids_everything_is_an_error_that_names_it():
    def never(input_ids, scores):
        return torch.full_like(scores, float("-inf"))

    with pytest.raises(FloatingPointError, match="never"):
        generate(Fake(), ids([[1]]), streams(1), Limits(2), processors=[never])


# --- agents ----------------------------------------------------------------------------------------


def test_two_agents_talk_in_one_trajectory_and_each_trains_on_its_own_words():
    meter = Meter()
    ask = PolicyAgent(Fake(seed=1), "ask", limits=Limits(4), meter=meter)
    answer = PolicyAgent(Fake(seed=2), "answer", Law(0.5), Limits(3), meter)
    context, calls = np.array([1, 3], np.int32), []
    for turn, agent in enumerate([ask, answer, ask, answer]):
        (call,) = agent.generate([context], [Keys(0).at("talk", 0, turn)])
        calls.append(call)
        context = np.concatenate([call.context, call.out, [10]]).astype(np.int32)
    talk = Trajectory(Problem("p", "a"), tuple(calls))
    for agent in (ask, answer):
        (row,) = rows(talk, agent.name)
        mine = [c for c in calls if c.agent == agent.name]
        assert row.columns["target"].tolist() == [t for c in mine for t in c.out.tolist()]
        assert np.array_equal(row.ids[row.at + 1], row.columns["target"])
        assert row.laws == (agent.law,)
    assert meter["sampled"] == talk.tokens()


def test_an_agents_own_limits_and_law_give_way_to_those_of_a_call():
    agent = PolicyAgent(Fake(stop_bias=-9), law=Law(0.5), limits=Limits(4))
    (call,) = agent.generate(ids([[1]]), streams(1))
    assert (len(call.out), call.law) == (4, Law(0.5))
    (call,) = agent.generate(ids([[1]]), streams(1), Limits(2), GREEDY)
    assert (len(call.out), call.law, call.logp_sampled.tolist()) == (2, GREEDY, [0.0, 0.0])
    assert set(call.author.tolist()) == {Author.SELF}
