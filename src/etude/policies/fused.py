"""The transformer in fewer, larger operations, for decoding: the same function on copies of its weights.

A decoding step of a small model costs more in calls than in arithmetic. Here queries, keys and values are one
product, gate and up another, and residuals are added by the product that makes them. The gains of norms and the
scale of the attention scores are in the weights. The two halves of a head are interleaved, so that a rotation is one
complex product; scores do not feel it, because queries and keys are interleaved alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude.policies.transformer import (
    MLP,
    Attention,
    Embed,
    Layer,
    Linear,
    Mix,
    Shape,
    Transformer,
    rotary_angles,
)

PLAIN = (Transformer, Embed, nn.ModuleList, Layer, Attention, MLP, Linear, nn.RMSNorm)
LARGEST = 2**24  # weights; beyond, arithmetic and memory dwarf the calls, and a copy would cost more than it saves


@dataclass(frozen=True)
class _Layer:
    """One layer's weights: `qkv` [(H + 2 Hk) d, D], `out` [H d, D], `gate_up` [2 F, D], `down` [F, D], `gain`
    [H + Hk, d] of normed heads."""

    qkv: Tensor
    bias: Tensor | None
    out: Tensor
    gate_up: Tensor
    down: Tensor
    gain: Tensor | None

    @classmethod
    def of(cls, layer: Layer, shape: Shape) -> _Layer:
        attn, mlp = layer.self_attn, layer.mlp
        scale = attn.head_dim**-0.5
        projections = (attn.q_proj, attn.k_proj, attn.v_proj)
        parts = [p.weight * layer.input_layernorm.weight for p in projections]
        biases: list[Tensor] = [p.bias for p in projections if p.bias is not None]
        gain = None
        if attn.qk_norm:  # scaled after the norm, not before
            gains = (attn.q_norm.weight * scale).repeat(shape.heads), attn.k_norm.weight.repeat(shape.kv_heads)
            gain = _interleave(torch.cat(gains), attn.head_dim).unflatten(0, (-1, attn.head_dim))
        else:
            for x in (parts, biases):
                x[:1] = [p * scale for p in x[:1]]
        for x in (parts, biases):
            x[:2] = [_interleave(p, attn.head_dim) for p in x[:2]]
        mlp_gain = layer.post_attention_layernorm.weight
        return cls(
            torch.cat(parts),
            torch.cat(biases) if biases else None,
            attn.o_proj.weight.t(),
            torch.cat((mlp.gate_proj.weight * mlp_gain, mlp.up_proj.weight * mlp_gain)),
            mlp.down_proj.weight.t(),
            gain,
        )


class Fused:
    """Called like a `Transformer`, whose weights it holds as they are now; queries come out scaled. Nothing here has
    a gradient."""

    @torch.no_grad()
    def __init__(self, model: Transformer) -> None:
        self.model, self.shape = model, model.shape
        self.layers = [_Layer.of(cast(Layer, layer), model.shape) for layer in model.layers]
        angle = rotary_angles(model.shape, model.norm.weight.device)
        self.turn = torch.polar(torch.ones_like(angle), angle)  # complex64[limit, d / 2]

    def __call__(self, inputs: Tensor, positions: Tensor, mix: Mix) -> Tensor:
        """int64[T], int64[T] -> f32[T, D]."""
        s = self.shape
        rotated = (s.heads + s.kv_heads) * s.head_dim  # queries and keys
        x = F.embedding(inputs, self.model.embed_tokens.weight)
        turn = self.turn[positions].unsqueeze(1)  # [T, 1, d / 2]
        for i, w in enumerate(self.layers):
            heads = F.linear(_unit(x, s.norm_eps), w.qkv, w.bias)
            qk = heads[:, :rotated].view(len(heads), -1, s.head_dim)
            if w.gain is not None:
                qk = _unit(qk, s.norm_eps) * w.gain
            turned = torch.view_as_complex(qk.unflatten(-1, (-1, 2))) * turn
            qk = torch.view_as_real(turned).flatten(-2)
            v = heads[:, rotated:].view(len(heads), -1, s.head_dim)
            x = torch.addmm(x, mix(i, qk[:, : s.heads], qk[:, s.heads :], v).flatten(1), w.out)
            gate, up = F.linear(_unit(x, s.norm_eps), w.gate_up).chunk(2, -1)
            x = torch.addmm(x, F.silu(gate).mul_(up), w.down)
        return F.rms_norm(x, (s.width,), self.model.norm.weight, s.norm_eps)


def fused(model: Transformer) -> Fused | None:
    """The model, fused, if it is small, plain and in float32: adapters and whatever listens to modules need them."""
    plain = all(type(m) in PLAIN and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    small = sum(p.numel() for p in model.layers.parameters()) <= LARGEST
    return Fused(model) if plain and small and model.norm.weight.dtype == torch.float32 else None


def _unit(x: Tensor, eps: float) -> Tensor:
    """[..., n] at a root mean square of 1."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt_()


def _interleave(x: Tensor, head_dim: int) -> Tensor:
    """[n d, ...]: of each head (x_1 ... x_d) -> (x_1, x_{1 + d/2}, x_2, ...)."""
    return x.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
