"""A mixture of policies: for every answer one of them is drawn, each as likely as the others, and writes all of it.

That is itself a policy: with members pi_1..pi_K the next token of an answer has the probability

    pi(a_t | x, a_<t) = sum_k w_k pi_k(a_t | x, a_<t),        w_k proportional to prod_{s<t} pi_k(a_s | x, a_<s)

since what was written tells who is likely to be writing. Sampling so needs no stream beyond that of the tokens, and
log-probabilities are exact. It does not learn. Shapes: `K` members, `R` rows, `V` vocabulary, `N` packed actions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etude.experience.batch import Batch
from etude.experience.errors import UserError
from etude.experience.protocols import Decoder, Policy
from etude.experience.types import Ids

FILE, MEMBERS = "mixture.json", "members"


class Mixture:
    """The uniform mixture of `policies`, which share their tokenizer. Raises UserError for none, or for different
    vocabularies."""

    def __init__(self, policies: Sequence[Policy]) -> None:
        if not policies:
            raise UserError("a mixture needs at least one policy")
        if len({p.tokenizer.size for p in policies}) > 1:
            raise UserError("the policies of a mixture must share one vocabulary")
        self.policies = list(policies)
        self.tokenizer = policies[0].tokenizer
        self.causal = True
        self.limit = min(p.limit for p in policies)
        self.token_bytes = sum(p.token_bytes for p in policies)

    @property
    def device(self) -> torch.device:
        return self.policies[0].device

    def to(self, device: str) -> Mixture:
        """The mixture with all members on a device."""
        moved: list[Any] = list(self.policies)
        self.policies = [p.to(device) for p in moved]
        return self

    def logp(self, batch: Batch) -> Tensor:
        """f32[N] at temperature 1. Actions of one call are one answer."""
        each = torch.stack([p.logp(batch).double() for p in self.policies], 1)  # [N, K]
        out = torch.empty(len(each), dtype=torch.float64, device=each.device)
        answer = torch.stack([batch.row_of, batch.actions["call"].to(batch.row_of)], 1)
        edges = (answer[1:] != answer[:-1]).any(1).nonzero().flatten().add(1).tolist()
        for start, end in zip([0, *edges], [*edges, len(each)], strict=True):
            joint = each[start:end].cumsum(0).logsumexp(1)  # of the answer up to each action, up to 1 / K
            first = torch.full_like(joint[:1], log(len(self.policies)))
            out[start:end] = joint.diff(prepend=first)
        return out.float()

    def forward(self, batch: Batch, needs: frozenset[str]) -> Any:
        """Raises UserError: a mixture does not learn."""
        raise UserError("a mixture of policies does not learn: train one of its members")

    def decoder(self) -> Decoder:
        """A decoder of every member at once."""
        return MixtureDecoder([p.decoder() for p in self.policies])

    def fingerprint(self) -> str:
        """Of all members, in order."""
        return blake2b("".join(p.fingerprint() for p in self.policies).encode(), digest_size=16).hexdigest()

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """None that learn."""
        return iter(())

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """None that learn."""
        return iter(())

    def state_dict(self) -> Mapping[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def save(self, folder: str | Path, save: Callable[[Policy, Path], None]) -> None:
        """Writes mixture.json, and every member with `save` into a folder of its own."""
        folder = Path(folder)
        for i, policy in enumerate(self.policies):
            save(policy, folder / MEMBERS / f"{i:04d}")
        (folder / FILE).write_text(json.dumps({"members": len(self.policies)}) + "\n")


def members(folder: Path) -> list[Path]:
    """The folders of the members of a mixture that was saved. Raises UserError if one is missing."""
    try:
        count = int(json.loads((folder / FILE).read_text())["members"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"no mixture can be read from {folder}: {error}") from None
    found = [folder / MEMBERS / f"{i:04d}" for i in range(count)]
    for member in found:
        if not member.is_dir():
            raise UserError(f"no mixture can be read from {folder}: {member.name} of its {count} members is missing")
    return found


class MixtureDecoder:
    """A decoder of each member, and the log-probability f64[R, K] that each gives to what was written since the context
    ended: who is likely to be writing."""

    def __init__(self, members: Sequence[Decoder]) -> None:
        self.members = list(members)
        self.said = torch.zeros(0, len(self.members), dtype=torch.float64)
        self.next = torch.zeros(0, len(self.members), 0, dtype=torch.float64)  # [R, K, V] log-probabilities

    def prefill(self, contexts: Sequence[Ids], room: int) -> Tensor:
        """f32[R, V]."""
        logits = [m.prefill(contexts, room) for m in self.members]
        self.said = torch.zeros(len(contexts), len(self.members), dtype=torch.float64, device=logits[0].device)
        return self._mixed(logits)

    def step(self, tokens: Tensor) -> Tensor:
        """int64[R] -> f32[R, V]."""
        self.said = self.said + self.next[torch.arange(len(tokens)), :, tokens]
        return self._mixed([m.step(tokens) for m in self.members])

    def select(self, rows: Tensor) -> None:
        """int64[R']."""
        for m in self.members:
            m.select(rows)
        self.said, self.next = self.said[rows], self.next[rows]

    def rewind(self, lengths: Tensor) -> None:
        """Raises UserError: what a row had said is not kept token by token."""
        raise UserError("a mixture of policies cannot take back what it wrote: use a hook that does not rewind")

    def _mixed(self, logits: Sequence[Tensor]) -> Tensor:
        self.next = torch.stack([x.double().log_softmax(-1) for x in logits], 1)
        return (self.said.log_softmax(-1)[..., None] + self.next).logsumexp(1).float()
