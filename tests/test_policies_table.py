"""The table policy: exact laws and gradients, contexts that get rows, and the same loops as any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.acting.engine import generate
from etude.experience.batch import Batch, normalise, pack
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Limits
from etude.experience.rows import example, rows
from etude.experience.types import Problem, Trajectory
from etude.policies.table import TablePolicy
from etude.policies.tokenizers import CharTokenizer
from etude.policies.zoo import load_policy, save_policy

TOKENS = CharTokenizer()
V = TOKENS.size


def text_batch(*pairs: tuple[str, str]) -> Batch:
    return normalise(pack([example(TOKENS.prompt(a), TOKENS.completion(b)) for a, b in pairs]), "token")


def random_table(batch: Batch, seed: int = 0, **sizes: int) -> TablePolicy:
    """A table in float64 that has met `batch`, with normal logits and values."""
    policy = TablePolicy(TOKENS, dtype=torch.float64, **sizes)
    policy(batch, frozenset())
    with torch.no_grad():
        for p in policy.parameters():
            p.normal_(generator=Keys(seed).torch())
    return policy


def test_an_unknown_context_is_uniform_and_takes_no_row_until_it_is_learnt_from() -> None:
    policy, batch = TablePolicy(TOKENS), text_batch(("1+1=", "2"), ("1+2=", "3"))
    assert torch.allclose(policy.logp(batch), torch.full((4,), -np.log(V), dtype=torch.float32))
    assert policy.contexts == []
    policy(batch, frozenset({"logp"}))
    one = TOKENS.prompt("1+1=").tolist()
    assert policy.contexts[:2] == [tuple(one), (*one, *TOKENS.encode("2"))]
    assert len(policy.contexts) == 4
    policy(batch, frozenset({"logp"}))
    assert len(policy.contexts) == 4


def test_logp_entropy_values_and_logits_are_those_of_the_rows() -> None:
    batch = text_batch(("ab", "cd"), ("a", "cd"))
    policy = random_table(batch)
    out = policy(batch, frozenset({"logp", "entropy", "values", "hidden", "logits"}))
    for i, context in enumerate(policy.contexts):  # all contexts differ here: rows are in order of actions
        law = torch.softmax(policy.logits[i], -1)
        torch.testing.assert_close(out.logp[i], law[batch.actions["target"][i]].log(), rtol=0, atol=1e-12)
        torch.testing.assert_close(out.entropy[i], -(law * law.log()).sum(), rtol=0, atol=1e-12)
        torch.testing.assert_close(policy.at([context])[0], policy.logits[i])
    torch.testing.assert_close(out.values, policy.values[: len(out.values)])
    seen = out.map_logits(lambda logits, part: logits)
    torch.testing.assert_close(seen, policy.logits[: len(seen)], rtol=0, atol=1e-12)


def test_gradients_are_probabilities_minus_targets() -> None:
    """d(-sum w log p)/d logits = w (p - onehot), summed over the actions of a context."""
    batch = text_batch(("a", "xy"), ("a", "xz"), ("b", "x"))
    policy = random_table(batch)
    (policy(batch, frozenset({"logp"})).logp * -batch.actions["weight"]).sum().backward()
    expected = torch.zeros_like(policy.logits)
    places = [policy.place(c) for c in policy._contexts(batch)]
    for i, place in enumerate(places):
        p = torch.softmax(policy.logits[place].detach(), -1)
        p[batch.actions["target"][i]] -= 1
        expected[place] += batch.actions["weight"][i] * p
    assert len(set(places)) < len(places)  # "a" is answered twice: its gradient is a sum
    torch.testing.assert_close(policy.logits.grad, expected, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.lists(st.lists(st.integers(0, V - 1), min_size=2, max_size=7), min_size=1, max_size=4),
)
def test_a_context_is_the_last_tokens_of_its_row(order: int, ids: list[list[int]]) -> None:
    batch = pack([example(row[:1], row[1:]) for row in ids])
    policy = random_table(batch, order=order)
    wanted = [tuple(row[: i + 1][-order:]) for row in ids for i in range(len(row) - 1)]
    assert set(policy.contexts) == set(wanted)
    expected = torch.stack([policy.at([c])[0].log_softmax(-1) for c in wanted])
    target = batch.actions["target"]
    torch.testing.assert_close(
        policy.logp(batch).double(), expected.gather(1, target[:, None]).squeeze(1).detach(), rtol=0, atol=1e-5
    )


def test_the_decoder_gives_the_logits_of_the_forward_pass() -> None:
    batch = text_batch(("ab", "cd"), ("ef", "gh"), ("ab", "ch"))
    policy = random_table(batch)
    decoder = policy.decoder()
    a, b = TOKENS.prompt("ab"), TOKENS.prompt("ef")
    torch.testing.assert_close(decoder.prefill([a, b], 8), policy.at([a, b]).float())
    decoder.select(torch.tensor([1, 0, 0]))
    (g,), (c,) = TOKENS.encode("g"), TOKENS.encode("c")
    seen = decoder.step(torch.tensor([g, c, c]))
    torch.testing.assert_close(seen, policy.at([[*b, g], [*a, c], [*a, c]]).float())
    decoder.rewind(torch.tensor([3, 3, 4]))
    seen = decoder.step(torch.tensor([g, c, g]))
    torch.testing.assert_close(seen, policy.at([[*b, g], [*a, c], [*a, c, g]]).float())


def test_what_the_engine_samples_the_forward_pass_scores_alike() -> None:
    batch = text_batch(("1+1=", "2"), ("1+2=", "3"))
    policy = random_table(batch)
    prompts = [TOKENS.prompt(p) for p in ("1+1=", "1+2=", "?")]
    calls = generate(policy, prompts, [Keys(0).at(i) for i in range(3)], Limits(max_tokens=6))
    again = pack([r for c in calls for r in rows(Trajectory(Problem("p", ""), (c,)))])
    torch.testing.assert_close(policy.logp(again).float(), again.actions["logp_raw"], rtol=0, atol=1e-5)


def test_reinforce_solves_a_bandit_through_the_engine() -> None:
    """Eight steps of the policy gradient (baseline: the mean) on one prompt with one right token."""
    policy = TablePolicy(TOKENS)
    optimizer = torch.optim.SGD(policy.parameters(), lr=60.0)
    prompt, right = TOKENS.prompt("?"), int(TOKENS.encode("7")[0])
    for step in range(8):
        keys = [Keys(3).at(step, i) for i in range(256)]
        calls = generate(policy, [prompt] * 256, keys, Limits(max_tokens=1))
        reward = torch.tensor([float(c.out[0] == right) for c in calls])
        packed = [r for c in calls for r in rows(Trajectory(Problem("p", ""), (c,)))]
        batch = normalise(pack(packed), "token")
        loss = -(policy(batch, frozenset({"logp"})).logp * (reward - reward.mean()) * batch.actions["weight"]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert policy.at([prompt]).softmax(-1)[0, right] > 0.9


def test_state_holds_the_contexts_and_goes_back_and_forth(tmp_path: Path) -> None:
    batch = text_batch(("ab", "cd"), ("e", "f"))
    policy = random_table(batch, order=3, rows=16, limit=64).float()
    before = policy.fingerprint()
    state = {n: t.clone() for n, t in policy.state_dict().items()}
    save_policy(policy, tmp_path)
    again = load_policy(str(tmp_path))
    assert isinstance(again, TablePolicy)
    assert (again.order, again.limit, again.contexts) == (3, 64, policy.contexts)
    assert torch.equal(again.logp(batch), policy.logp(batch))
    assert again.fingerprint() == before
    policy(text_batch(("x", "yz")), frozenset())
    assert len(policy.contexts) > len(again.contexts)
    policy.load_state_dict(state)
    assert policy.contexts == again.contexts
    with torch.no_grad():
        policy.logits[0, 0] += 1e-3
    assert policy.fingerprint() != before
    (tmp_path / "table.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="no table can be read"):
        load_policy(str(tmp_path))


def test_what_a_table_cannot_do_is_refused() -> None:
    batch = text_batch(("ab", "cd"))
    with pytest.raises(UserError, match="all taken"):
        TablePolicy(TOKENS, rows=2)(batch, frozenset())
    with pytest.raises(UserError, match="at least 1"):
        TablePolicy(TOKENS, order=0)
    with pytest.raises(UserError, match="unknown need 'value'"):
        TablePolicy(TOKENS)(batch, frozenset({"value"}))
    batch.branch = torch.zeros_like(batch.inputs)
    with pytest.raises(UserError, match="no branches"):
        TablePolicy(TOKENS)(batch, frozenset())
