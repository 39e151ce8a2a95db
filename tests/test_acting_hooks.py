from dataclasses import dataclass, field

import numpy as np
import pytest

from acting_fakes import Fake, same, streams
from etude.acting.engine import generate
from etude.acting.hooks import Force, Go, Inject, Rewind, Stop, When
from etude.experience.meter import Meter
from etude.experience.protocols import Limits
from etude.experience.rows import rows
from etude.experience.types import Author, Problem, Trajectory

CONTEXTS = [np.array(c, np.int32) for c in ([1, 3], [1, 4, 5, 6, 3], [1], [1, 3])]


@dataclass
class Says:
    """Answers with `action` whenever it is asked, and remembers what it saw."""

    when: When
    action: object = Go()
    seen: list = field(default_factory=list)

    def __call__(self, row):
        self.seen.append((row.row, row.out.tolist()))
        return self.action(row) if callable(self.action) else self.action


def run(policy, limits, *hooks, meter=None, contexts=CONTEXTS, **more):
    return generate(policy, contexts, streams(len(contexts)), limits, hooks=hooks, meter=meter, **more)


@pytest.fixture
def free():
    return run(Fake(stop_bias=-9), Limits(12))


def test_a_hook_that_says_go_changes_nothing_and_is_asked_at_its_moments(free):
    counts, every = Says(When(counts=frozenset({0, 3, 12}))), Says(When(every=5))
    token, text = Says(When(ids=frozenset({4}))), Says(When(strings=("ba",)))
    calls = run(Fake(stop_bias=-9), Limits(12), counts, every, token, text)
    assert all(same(a, b) for a, b in zip(free, calls, strict=True))
    decode = Fake().tokenizer.decode
    for r, call in enumerate(calls):
        out = call.out.tolist()
        assert [len(o) for i, o in counts.seen if i == r] == [0, 3, 12]
        assert [len(o) for i, o in every.seen if i == r] == [5, 10]
        assert [o for i, o in token.seen if i == r] == [out[: n + 1] for n in range(12) if out[n] == 4]
        new = [n for n in range(1, 13) if decode(out[:n]).count("ba") > decode(out[: n - 1]).count("ba")]
        assert [len(o) for i, o in text.seen if i == r] == new
    assert token.seen
    assert text.seen


def test_stop_ends_the_row(free):
    calls = run(Fake(stop_bias=-9), Limits(12), Says(When(every=5), lambda row: Stop() if row.row == 1 else Go()))
    assert (calls[1].stop, calls[1].out.tolist()) == ("hook", free[1].out[:5].tolist())
    assert all(same(free[i], calls[i]) for i in (0, 2, 3))
    (call,) = run(Fake(), Limits(12), Says(When(counts=frozenset({0})), Stop()), contexts=CONTEXTS[:1])
    assert (call.stop, len(call.out)) == ("hook", 0)


@pytest.mark.parametrize(
    ("action", "author"), [(Force((5, 6)), Author.GIVEN), (Inject((5, 6), "hint"), Author.INJECTED)]
)
@pytest.mark.parametrize("at", [0, 3])
def test_forced_and_injected_tokens_are_in_the_text_but_are_no_choices(free, action, author, at):
    meter = Meter()
    calls = run(Fake(stop_bias=-9), Limits(12), Says(When(counts=frozenset({at})), action), meter=meter)
    for call, before in zip(calls, free, strict=True):
        assert call.out.tolist()[: at + 2] == [*before.out[:at].tolist(), 5, 6]
        given = call.author == author
        assert given.tolist() == [at <= n < at + 2 for n in range(12)]
        assert np.array_equal(np.isnan(call.logp_raw), given)
        assert np.array_equal(np.isnan(call.logp_sampled), given)
        assert call.weights.tolist() == (~given).astype(float).tolist()
        assert call.tags == ({"injected": ((at, 2, "hint"),)} if author == Author.INJECTED else {})
        (row,) = rows(Trajectory(Problem("p", ""), (call,)))
        assert row.columns["token"].tolist() == np.flatnonzero(~given).tolist()
    assert meter["sampled"] == 4 * 10
    assert meter["prefilled"] == 2 + 5 + 1 + 4 * 2


def test_after_forced_text_the_policy_goes_on_from_the_new_text():
    policy = Fake(stop_bias=-9)
    calls = run(policy, Limits(8), Says(When(counts=frozenset({3})), Force((5, 6))))
    for call in calls:
        text = [*call.context, *call.out[:5]]
        for token, logp in zip(call.out[5:], call.logp_raw[5:], strict=True):
            assert logp == pytest.approx(float(policy.logits(text).log_softmax(-1)[token]), abs=1e-5)
            text.append(token)


def test_a_hook_may_write_on_where_a_row_would_have_ended():
    """As in budget forcing: the end is put off once by text of its own."""
    policy, limits = Fake(stop_bias=1.0), Limits(40)
    plain = run(policy, limits)
    more = Says(When(ids=frozenset({2})), lambda row: Inject((10,), "wait") if row.out.tolist().count(2) == 1 else Go())
    for a, b in zip(plain, run(policy, limits, more), strict=True):
        assert a.stop == "stop"
        assert b.out.tolist()[: len(a.out) + 1] == [*a.out.tolist(), 10]
        assert b.out.tolist().count(2) == 2
        assert b.stop == "stop"


def test_only_the_agents_own_words_end_a_row():
    limits = Limits(12, stop=("cc",))
    at = When(counts=frozenset({2}))
    for call in run(Fake(stop_bias=-9), limits, Says(at, Inject((2, 5, 5), ""))):
        assert call.out[2:5].tolist() == [2, 5, 5]
        assert len(call.out) > 5
    for call in run(Fake(stop_bias=-9), Limits(12), Says(at, Force((5, 2, 5)))):
        assert (call.stop, len(call.out), call.out[-1]) == ("stop", 4, 2)
    for call in run(Fake(stop_bias=-9), limits, Says(When(counts=frozenset({0})), Force((5, 5, 6)))):
        assert (call.stop, call.out.tolist()) == ("stop", [5, 5])


def test_text_beyond_the_room_is_cut():
    for call in run(Fake(stop_bias=-9), Limits(5), Says(When(counts=frozenset({3})), Inject((5,) * 9, "long"))):
        assert (call.stop, len(call.out)) == ("length", 5)
        assert call.tags["injected"] == ((3, 2, "long"),)


def test_the_first_hook_that_does_anything_wins_and_moments_inside_its_text_come_after_it():
    first, second = Says(When(counts=frozenset({2})), Force((5, 5, 5))), Says(When(counts=frozenset({2, 4})), Go())
    run(Fake(stop_bias=-9), Limits(8), first, second, contexts=CONTEXTS[:1])
    assert [len(out) for _, out in second.seen] == [5]


def test_a_rewound_row_is_redrawn_from_the_shorter_text_and_counted(free):
    policy, meter = Fake(stop_bias=-9), Meter()

    def back(row):
        return Rewind(2) if row.rewinds == 0 and row.row != 2 else Go()

    calls = run(policy, Limits(12), Says(When(counts=frozenset({6})), back), meter=meter, processors=())
    assert same(calls[2], free[2])
    for i in (0, 1, 3):
        call = calls[i]
        assert call.out[:2].tolist() == free[i].out[:2].tolist()
        assert call.out[2:6].tolist() != free[i].out[2:6].tolist()
        assert len(call.out) == 12
        assert call.law.tilt == ("rewind",)
        text = list(call.context)
        for token, logp in zip(call.out, call.logp_raw, strict=True):
            assert logp == pytest.approx(float(policy.logits(text).log_softmax(-1)[token]), abs=1e-5)
            text.append(token)
    assert meter["discarded"] == 3 * 4
    assert meter["sampled"] == 4 * 12 + 3 * 4
    assert policy.limit == 64


def test_rewinding_does_not_disturb_other_rows_at_their_ends():
    """Rows of different lengths end, are dropped and are cut back while others go on."""
    policy = Fake(stop_bias=1.0, limit=16)
    contexts = [np.array([1, *[3] * (i % 5)], np.int32) for i in range(30)]

    def back(row):
        return (
            Rewind(max(0, len(row.out) - 3)) if row.rewinds < 3 and row.row % 3 == 0 and len(row.context) > 1 else Go()
        )

    plain = run(policy, Limits(14), contexts=contexts)
    calls = run(policy, Limits(14), Says(When(every=2, ids=frozenset({2})), back), contexts=contexts)
    for i, (a, b) in enumerate(zip(plain, calls, strict=True)):
        assert len(b.context) + len(b.out) <= 16
        if i % 3 or len(a.context) == 1:
            assert same(a, b)
        text = list(b.context)
        for token, logp in zip(b.out, b.logp_raw, strict=True):
            assert logp == pytest.approx(float(policy.logits(text).log_softmax(-1)[token]), abs=1e-5)
            text.append(token)


def test_what_a_rewind_cuts_away_is_forgotten():
    """Injected text that is cut is no longer listed nor counted as discarded choices; forced text that
    was still to come is not written; a stop string may lie across the cut."""

    def back(row):
        return Rewind(3) if not row.rewinds else Go()

    meter = Meter()
    hooks = Says(When(counts=frozenset({2})), Inject((7, 7), "hint")), Says(When(counts=frozenset({6})), back)
    (call,) = run(Fake(stop_bias=-9), Limits(9), *hooks, meter=meter, contexts=CONTEXTS[:1])
    assert call.tags["injected"] == ((2, 1, "hint"),)
    assert call.author.tolist() == [0, 0, Author.INJECTED, 0, 0, 0, 0, 0, 0]
    assert meter["discarded"] == 2

    hooks = Says(When(counts=frozenset({2})), Force((5, 2, 5, 5))), Says(When(counts=frozenset({4})), back)
    (call,) = run(Fake(stop_bias=-9), Limits(9), *hooks, contexts=CONTEXTS[:1])
    assert call.author.tolist() == [0, 0, Author.GIVEN, 0, 0, 0, 0, 0, 0]

    always_a = Fake(stop_bias=-9)
    always_a.table[:, 3] = 99

    def once(row):
        return Go() if row.rewinds else Inject((4,)) if len(row.out) == 3 else Rewind(2)

    (call,) = run(
        always_a, Limits(9, stop=("aaaa",)), Says(When(counts=frozenset({3, 5})), once), contexts=CONTEXTS[:1]
    )
    assert (call.stop, call.out.tolist()) == ("stop", [3, 3, 3, 3])


def test_processors_see_a_rewound_row_as_it_is_now():
    seen = []

    def watch(input_ids, scores):
        seen.append(input_ids.tolist())
        return scores

    back = Says(When(counts=frozenset({3})), lambda row: Rewind(1) if row.row == 0 and not row.rewinds else Go())
    calls = run(Fake(stop_bias=-9), Limits(4), back, contexts=CONTEXTS[:2], processors=[watch])
    shown = [[t for t in step[0] if t] for step in seen]
    assert shown[3] == [*calls[0].context, calls[0].out[0]]


def test_a_rewind_to_where_the_row_is_not_is_an_error():
    with pytest.raises(ValueError, match="rewinds a row of 3 tokens to 4"):
        run(Fake(stop_bias=-9), Limits(5), Says(When(counts=frozenset({3})), Rewind(4)))


def test_hooks_and_rows_beyond_one_wave():
    hook = Says(When(counts=frozenset({3})), Force((5, 6)))
    whole = run(Fake(stop_bias=-9), Limits(12), hook)
    parts = run(Fake(stop_bias=-9), Limits(12), hook, max_rows=1)
    assert all(same(a, b) for a, b in zip(whole, parts, strict=True))
    assert sorted(i for i, _ in hook.seen) == [0, 0, 1, 1, 2, 2, 3, 3]
