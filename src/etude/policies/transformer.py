"""One readable transformer: RMSNorm, rotary positions, grouped-query attention, gated MLP.

It serves as causal language model, masked-diffusion model, reward model, critic and decision
transformer. Inputs are packed: [T] tokens of all rows end to end, without padding. Who may look at
whom is not its business: it hands queries, keys and values to a `Mix` (a `Layout` over packed rows,
or a key-value cache). Parameter names are those of Hugging Face's Llama, Qwen2 and Qwen3.

Sources: pre-norm RMSNorm (Zhang & Sennrich 2019, eq. 4), rotary positions (Su et al. 2021, eq. 34),
SwiGLU (Shazeer 2020, eq. 6), grouped-query attention (Ainslie et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 256  # rows
# (layer, q [T, H, d], k [T, Hk, d], v [T, Hk, d]) -> [T, H, d]
Mix = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of rotary wavelengths to contexts beyond `original_limit` tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_limit: int


@dataclass(frozen=True)
class Shape:
    """The sizes of a transformer. `limit` is the longest sequence in tokens."""

    vocab: int
    width: int = 128
    depth: int = 4
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 32
    ffn: int = 384
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    tie_embeddings: bool = True
    limit: int = 2048
    rope_scaling: RopeScaling | None = None
    causal: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab", "width", "depth", "heads", "kv_heads", "head_dim", "ffn", "limit"):
            if not isinstance(size := getattr(self, name), int) or size < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {size!r}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key-value heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {self.head_dim}")


class Transformer(nn.Module):
    """[T] token ids or [T, D] embeddings -> [T, D] hidden states after the last norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = Embed(shape.vocab, shape.width)
        self.layers = nn.ModuleList(Layer(shape, i) for i in range(shape.depth))
        self.norm = nn.RMSNorm(shape.width, shape.norm_eps)
        self._rotary: tuple[Tensor, Tensor] | None = None

    def forward(self, inputs: Tensor, positions: Tensor, mix: Mix) -> Tensor:
        """`inputs` int64[T] or float[T, D], `positions` int64[T] below `shape.limit`."""
        x = self.embed_tokens(inputs)
        cos, sin = self.rotary(x)
        rope = (cos[positions].unsqueeze(1), sin[positions].unsqueeze(1))  # [T, 1, d]
        for layer in self.layers:
            x = layer(x, rope, mix)
        return self.norm(x)

    def rotary(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of every position, [limit, d] each, on the device and in the type of `like`."""
        if self._rotary is None or self._rotary[0].device != like.device or self._rotary[0].dtype != like.dtype:
            with torch.inference_mode(False):  # the table outlives whatever mode it is first needed in
                angle = rotary_angles(self.shape, like.device)
                signed = torch.cat((-angle.sin(), angle.sin()), -1)
                self._rotary = (torch.cat((angle, angle), -1).cos().to(like.dtype), signed.to(like.dtype))
        return self._rotary

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights: normal, 1/sqrt(fan-in) for matrices (a further 1/sqrt(2 depth) where they
        write to the residual stream), 0.02 for embeddings; biases 0, norms 1."""
        for name, p in self.named_parameters():
            if p.dim() < 2:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
            elif p is self.embed_tokens.weight:
                p.normal_(0.0, 0.02, generator=generator)
            else:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = p.shape[1] ** -0.5 / (math.sqrt(2 * self.shape.depth) if writes else 1.0)
                p.normal_(0.0, std, generator=generator)


class Linear(nn.Linear):
    """x W^T + b, by the faster of two ways where no gradient is wanted."""

    def forward(self, input: Tensor) -> Tensor:
        """[T, D] -> [T, O]."""
        if torch.is_grad_enabled() or self.bias is not None:
            return super().forward(input)
        return product(input, self.weight)


class Embed(nn.Embedding):
    """Looks token ids up and lets [T, D] embeddings through."""

    def forward(self, input: Tensor) -> Tensor:
        return input if input.is_floating_point() else super().forward(input)


class Layer(nn.Module):
    """Attention and MLP, each on the normed stream and added to it."""

    def __init__(self, shape: Shape, index: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.width, shape.norm_eps)
        self.self_attn = Attention(shape, index)
        self.post_attention_layernorm = nn.RMSNorm(shape.width, shape.norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mix: Mix) -> Tensor:
        """[T, D] -> [T, D]."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mix)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Projections around a `Mix`."""

    def __init__(self, shape: Shape, index: int) -> None:
        super().__init__()
        self.index = index
        self.head_dim = shape.head_dim
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = Linear(shape.width, queries, bias=shape.qkv_bias)
        self.k_proj = Linear(shape.width, keys, bias=shape.qkv_bias)
        self.v_proj = Linear(shape.width, keys, bias=shape.qkv_bias)
        self.o_proj = Linear(queries, shape.width, bias=False)
        if shape.qk_norm:
            self.q_norm = nn.RMSNorm(shape.head_dim, shape.norm_eps)
            self.k_norm = nn.RMSNorm(shape.head_dim, shape.norm_eps)
        self.qk_norm = shape.qk_norm

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mix: Mix) -> Tensor:
        """[T, D] -> [T, D]."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        mixed = mix(self.index, rotate(q, *rope), rotate(k, *rope), v)
        return self.o_proj(mixed.flatten(1))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.width, shape.ffn, bias=False)
        self.up_proj = Linear(shape.width, shape.ffn, bias=False)
        self.down_proj = Linear(shape.ffn, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def product(x: Tensor, weight: Tensor) -> Tensor:
    """[T, D] and [O, D] -> x weight^T, [T, O]; as (weight x^T)^T on a CPU, where MKL is up to six times as fast at that
    for the few rows of a decoding step. A single row is computed twice over: a product with a vector reads the weights
    at less than half the speed."""
    if x.device.type != "cpu" or len(x) > FEW:
        return F.linear(x, weight)
    if len(x) == 1:
        return torch.mm(weight, torch.cat((x, x)).t())[:, :1].t()
    return torch.mm(weight, x.t()).t()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x_i, x_{i + d/2}) of [T, H, d] by its angle; `sin` carries the sign of each half."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def rotary_angles(shape: Shape, device: torch.device | str = "cpu") -> Tensor:
    """f32[limit, d/2]: position times frequency theta^(-2i/d)."""
    exponent = torch.arange(0, shape.head_dim, 2, device=device).float() / shape.head_dim
    frequency = 1.0 / shape.rope_theta**exponent
    if (s := shape.rope_scaling) is not None:
        turns = s.original_limit * frequency / (2 * math.pi)  # over the original context
        keep = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0.0, 1.0)
        frequency = frequency * (keep + (1.0 - keep) / s.factor)
    return torch.outer(torch.arange(shape.limit, device=device).float(), frequency)
