"""A policy whose weights, gradients and optimiser state are shared out over processes: FSDP2.

Every layer is gathered when it computes and let go after; embedding, last norm and unembedding stay gathered from
the forward pass to the end of the backward pass, because logits are made of them after the one and again within the
other. For acting, and to be saved, all weights are gathered at once into a plain policy.

Source: fully sharded data parallel, Zhao et al. 2023 (arXiv 2304.11277), as `torch.distributed.fsdp.fully_shard`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from etude.experience.batch import Batch
from etude.experience.errors import UserError
from etude.experience.protocols import Decoder, Outputs, Policy
from etude.learning.ranks import Ranks
from etude.learning.shares import shares
from etude.policies.fingerprint import Fingerprint
from etude.policies.foreign import ForeignLM
from etude.policies.lm import LM

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def shard(policy: Policy, ranks: Ranks) -> Policy:
    """`policy` shared out over the processes; itself where there is one process, or where it is no language model:
    such a policy is small, and every process learns the whole of it. Adapters and heads must be on it before."""
    if ranks.size > 1 and isinstance(policy, LM | ForeignLM):
        return Sharded(policy, ranks)
    return policy


class Sharded:
    """A `Policy`. It takes over `policy`, which must be the same in all processes; what it does is done in all of
    them alike, but while it is `whole`, when each may do as it likes. Whatever is not of the protocol raises
    UserError."""

    def __init__(self, policy: LM | ForeignLM, ranks: Ranks) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.ranks = ranks
        self.tokenizer, self.limit, self.token_bytes = policy.tokenizer, policy.limit, policy.token_bytes
        self.device, self.causal = policy.device, policy.causal
        self._plain = deepcopy(policy).requires_grad_(False)  # without weights, but while it is asked for
        self._gathered = True
        self._forget()
        self._fingerprint = Fingerprint()
        mesh = init_device_mesh(self.device.type, (ranks.size,))
        for layer in _layers(policy):
            fully_shard(layer, mesh=mesh)
        self._module: FSDPModule = fully_shard(policy, mesh=mesh, reshard_after_forward=False)
        # Kept, because FSDP puts other tensors into the module while it is gathered.
        self._parameters: dict[str, nn.Parameter] = dict(policy.named_parameters())

    def forward(self, batch: Batch, needs: frozenset[str]) -> Outputs:
        """See `Policy`; through the module's hooks, which gather."""
        if self._gathered:
            return self._plain.forward(batch, needs)
        return self._module(batch, needs)  # type: ignore[operator]

    def logp(self, batch: Batch) -> Tensor:
        """f32[N] at temperature 1, without gradient; every process scores a share of the rows."""
        if self._gathered:
            return self._plain.logp(batch)
        mine = shares(replace(batch, links=()), self.ranks.size)[self.ranks.rank]  # without links rows keep their order
        with self.whole() as policy:
            scored = torch.zeros(0) if mine is None else policy.logp(mine.to(self.device)).cpu()
        return torch.cat(self.ranks.together(lambda: scored)).to(self.device)

    def decoder(self) -> Decoder:
        """A decoder of the gathered weights. Raises RuntimeError unless they are gathered (see `whole`)."""
        if not self._gathered:
            raise RuntimeError("this policy is sharded: gather it first, `with whole(policy)`")
        return self._plain.decoder()

    def fingerprint(self) -> str:
        """Differs wherever the weights do, and with the number of processes."""
        own = nn.ParameterList(nn.Parameter(local(p), requires_grad=False) for p in self.parameters())
        digests = self.ranks.together(lambda: self._fingerprint(own))
        return sha256(repr(digests).encode()).hexdigest()[:32]

    def parameters(self) -> Iterator[nn.Parameter]:
        """This process's share of every parameter, as a DTensor."""
        return iter(self._parameters.values())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with their names."""
        return iter(self._parameters.items())

    def state_dict(self) -> dict[str, Tensor]:
        """The parameters, detached: a process's own share of each."""
        return {name: p.detach() for name, p in self._parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies values in place, shares or whole tensors."""
        for name, value in state.items():
            p = self._parameters[name]
            p.copy_(placed(value, p))
        self._module.reshard()  # what is still gathered is out of date

    @contextmanager
    def whole(self) -> Iterator[Policy]:
        """The policy with all of its weights in every process, while open."""
        for name, p in self._plain.named_parameters():
            p.data = full(self._parameters[name]).detach()
        self._gathered = True
        try:
            yield self._plain
        finally:
            self._forget()

    def _forget(self) -> None:
        self._gathered = False
        for p in self._plain.parameters():
            p.data = p.data.new_empty(0)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise UserError(f"this method needs {name!r} of the policy, which one that is sharded has not: use one process")


@contextmanager
def whole(policy: Policy) -> Iterator[Policy]:
    """The plain policy with all of its weights while open: of a sharded one, gathered in every process."""
    if isinstance(policy, Sharded):
        with policy.whole() as gathered:
            yield gathered
    else:
        yield policy


def placed(value: Tensor, like: Tensor) -> Tensor:
    """`value`, cut as the sharded tensor `like` is; itself if it is cut already."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(value, DTensor) or not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def placed_moments(state: Mapping[int, Mapping[str, Any]], params: Sequence[Tensor]) -> dict[int, dict[str, Any]]:
    """An optimiser's state by number of the parameter, cut as the parameters are."""
    return {
        i: {name: placed(v, params[i]) if _moment(v, params[i]) else v for name, v in of.items()}
        for i, of in state.items()
    }


def gathered(tree: Any, ranks: Ranks) -> Any:
    """A state tree with every sharded tensor whole: in the leading process, on the CPU, and None in the others. To
    be called in all of them."""
    if ranks.size == 1:
        return tree
    if isinstance(tree, Mapping):
        return {k: gathered(v, ranks) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gathered(v, ranks) for v in tree)
    if not isinstance(tree, Tensor):
        return tree
    one = full(tree)
    return one.cpu() if ranks.leads else None


def full(value: Tensor) -> Tensor:
    """The whole of a sharded tensor; a plain one as it is."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: Tensor) -> Tensor:
    """This process's share of a sharded tensor; a plain one as it is."""
    from torch.distributed.tensor import DTensor

    return value.to_local() if isinstance(value, DTensor) else value


def _moment(value: Any, like: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == like.shape


def _layers(policy: LM | ForeignLM) -> list[nn.Module]:
    """The layers of its transformer; of a model of `transformers` those that it says should not be split."""
    if isinstance(policy, LM):
        return list(policy.model.layers)
    kinds = policy.model._no_split_modules or ()
    return [m for m in policy.model.modules() if type(m).__name__ in kinds]
