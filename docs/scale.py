"""Prints what crosses the network in a step, for three sizes of model and eight processes."""

from __future__ import annotations

from etude.lab.bench.engine import weights
from etude.policies.transformer import Shape

PROCESSES, RANK = 8, 16
ANSWERS, TOKENS = 256, 256  # of a step
FLOAT, TOKEN = 4, 13  # bytes of a weight, and of a token with its author and two log-probabilities
MODELS = {
    "135M (SmolLM2)": Shape(vocab=49152, width=576, depth=30, heads=9, kv_heads=3, head_dim=64, ffn=1536),
    "7B (Qwen2.5)": Shape(
        vocab=152064, width=3584, depth=28, heads=28, kv_heads=4, head_dim=128, ffn=18944, tie_embeddings=False
    ),
    "70B (Llama 3)": Shape(
        vocab=128256, width=8192, depth=80, heads=64, kv_heads=8, head_dim=128, ffn=28672, tie_embeddings=False
    ),
}


def linear(s: Shape) -> list[tuple[int, int]]:
    """(inputs, outputs) of every matrix of a layer."""
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    attention = [(s.width, queries), (s.width, keys), (s.width, keys), (queries, s.width)]
    return [*attention, (s.width, s.ffn), (s.width, s.ffn), (s.ffn, s.width)]


def adapter(s: Shape) -> int:
    """Numbers in an adapter of rank RANK on every matrix of the layers."""
    return s.depth * RANK * sum(i + o for i, o in linear(s))


def rows() -> list[tuple[str, ...]]:
    """The table, with its head."""
    share = (PROCESSES - 1) / PROCESSES
    out = [("model", "weights", "adapter", "torchrun: rollout", "torchrun: update", "Ray: all weights", "Ray: adapter")]
    for name, shape in MODELS.items():
        embedding = 0 if shape.tie_embeddings else shape.vocab * shape.width
        full, lora = (weights(shape) + embedding) * FLOAT, adapter(shape) * FLOAT
        sizes = (full, lora, full * share, 3 * full * share, full, lora)
        out.append((name, *(_size(n) for n in sizes)))
    return out


def _size(n: float) -> str:
    return f"{n / 1e9:.3g} GB" if n >= 1e9 else f"{n / 1e6:.3g} MB"


if __name__ == "__main__":
    head, *body = rows()
    for row in (head, tuple("---" for _ in head), *body):
        print(f"| {' | '.join(row)} |")
    print(f"\nanswers of a step: {ANSWERS} x {TOKENS} tokens, {_size(ANSWERS * TOKENS * TOKEN)}")
