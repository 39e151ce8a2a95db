"""The `classifier` policy: learning on arrays, where an action is the class of a point.

A point is `D` numbers. A batch holds points as rows of one token (`inputs` f32[T, D]), or, as the engine and packed
text have it, as `D` tokens a point whose ids are the bits of its numbers, so that sampling, groups, pairs and
demonstrations work on points as they do on text. Either way the action at a point is its class, 0 to C - 1.
Shapes: `N` packed actions, `D` features, `W` width, `C` classes, `R` engine rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from etude.experience.batch import Batch
from etude.experience.errors import UserError, unknown
from etude.experience.types import RAW, Floats, Ids, Prompt
from etude.policies.fingerprint import Fingerprint
from etude.policies.outputs import Outputs

NEEDS = frozenset({"logp", "entropy", "logits", "hidden"})
FILE, WEIGHTS = "classifier.json", "classifier.safetensors"


class PointTokenizer:
    """Points as text, numbers parted by spaces, and as ids: a token a number, its id the number's float32 bits.

    What a policy puts out are classes, whose ids are 0 to `size` - 1; their text is the class.

    >>> tokens = PointTokenizer(features=2, classes=4)
    >>> tokens.point(tokens.prompt("0.5 -2")).tolist()
    [0.5, -2.0]
    >>> tokens.decode(tokens.completion("3"))
    '3'
    """

    pad = 0  # the number 0
    notation = "compact"

    def __init__(self, features: int, classes: int) -> None:
        self.features, self.size = features, classes
        self.stops: frozenset[int] = frozenset()  # after its class a row is full

    def encode(self, text: str) -> Ids:
        """int32[D] of a point. Raises UserError for anything else."""
        words = text.split()
        try:
            return np.array(words, np.float32).view(np.int32)
        except ValueError:
            raise UserError(
                f"a classifier reads numbers parted by spaces, not {text!r:.60}: use world points"
            ) from None

    def point(self, ids: Sequence[int] | Ids) -> Floats:
        """f32[D]: the numbers of ids."""
        return np.asarray(ids, np.int32).view(np.float32)

    def decode(self, ids: Sequence[int]) -> str:
        """Classes and numbers, parted by spaces."""
        kept = np.asarray(ids, np.int32)
        return " ".join(str(i) if 0 <= i < self.size else str(x) for i, x in zip(kept, self.point(kept), strict=True))

    def prompt(self, prompt: Prompt) -> Ids:
        """int32[D]: the point. Raises UserError for one of other features, and for a chat."""
        ids = self.encode(prompt) if isinstance(prompt, str) else np.zeros(0, np.int32)
        if len(ids) != self.features:
            what = f"{len(ids)} numbers" if isinstance(prompt, str) else "messages"
            raise UserError(
                f"this classifier reads points of {self.features} numbers, not {what}: give it features=..."
            )
        return ids

    def completion(self, text: str) -> Ids:
        """int32[1]: a class. Raises UserError for what is none."""
        label = text.strip()
        if not (label.isascii() and label.isdecimal() and int(label) < self.size):
            raise UserError(f"this classifier knows the classes 0 to {self.size - 1}, not {text!r:.60}")
        return np.array([int(label)], np.int32)

    def observation(self, text: str) -> Ids:
        """Raises UserError: a point has no second turn."""
        raise UserError("a classifier answers once: it cannot play a world of many turns")

    def save(self, folder: str | Path) -> None:
        """Nothing: the policy's own file says it all."""


class Classifier(nn.Module):
    """Logits [N, C] of points. `depth` hidden layers of `width` ReLU units; with `depth` 0 it is linear and begins
    at zero, the uniform law, so that logistic regression is convex from a fixed start. Hidden layers draw their
    weights with variance 2 / fan-in from `generator`, the last one with 1 / fan-in; biases begin at zero.

    Raises UserError for sizes that cannot be.
    """

    def __init__(
        self,
        features: int = 20,
        classes: int = 4,
        depth: int = 0,
        width: int = 64,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if features < 1 or classes < 2 or depth < 0 or width < 1:
            raise UserError(
                f"a classifier needs features and width of at least 1, classes of at least 2 and depth of at least 0, "
                f"not features={features}, width={width}, classes={classes}, depth={depth}"
            )
        self.sizes = {"features": features, "classes": classes, "depth": depth, "width": width}
        self.tokenizer = PointTokenizer(features, classes)
        self.causal = True
        self.limit = features + 1  # a point and its class
        self.token_bytes = 4 * (features + depth * width + classes)
        sizes = [features, *[width] * depth]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.head = nn.Linear(sizes[-1], classes)
        with torch.no_grad():
            for layer in (*self.hidden, self.head):
                gain = 0.0 if depth == 0 else 1.0 if layer is self.head else 2.0
                layer.weight.normal_(0.0, (gain / layer.in_features) ** 0.5, generator=generator)
                layer.bias.zero_()
        self.to(dtype)
        self._fingerprint = Fingerprint()

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def represent(self, points: Tensor) -> Tensor:
        """f[N, D] -> f[N, W]: the last hidden layer, or the points themselves where there is none."""
        x = points.to(self.head.weight.dtype)
        for layer in self.hidden:
            x = layer(x).relu()
        return x

    def forward(self, batch: Batch, needs: frozenset[str]) -> Outputs:
        """Raises UserError for unknown needs, branches and positions, and for points of other features."""
        for need in sorted(needs - NEEDS):
            raise unknown("need", need, NEEDS)
        if batch.branch is not None or batch.positions is not None:
            raise UserError("a classifier reads points: no branches or positions")
        hidden = self.represent(self._points(batch).to(self.device))
        target = batch.actions["target"].to(self.device)
        return Outputs(needs, hidden, target, self.head, self.tokenizer.size)

    @torch.no_grad()
    def logp(self, batch: Batch) -> Tensor:
        """f32[N] at temperature 1, without gradient."""
        return self(batch, frozenset({"logp"})).logp

    @torch.no_grad()
    def scores(self, points: NDArray[np.floating]) -> Tensor:
        """f[N, C]: the logits of points [N, D], without gradient."""
        return self.head(self.represent(torch.tensor(points, device=self.device)))

    def decoder(self) -> PointDecoder:
        """A decoder of points."""
        return PointDecoder(self)

    def fingerprint(self) -> str:
        """Differs wherever the weights do."""
        return self._fingerprint(self)

    def _points(self, batch: Batch) -> Tensor:
        """f32[N, D]: the point of each action, the last `D` numbers up to it."""
        features = self.tokenizer.features
        if batch.inputs.is_floating_point():
            if batch.inputs.ndim != 2 or batch.inputs.shape[1] != features:
                shape = tuple(batch.inputs.shape)
                raise UserError(f"this classifier reads points of {features} numbers, not inputs of shape {shape}")
            return batch.inputs[batch.at]
        if bool((batch.at - batch.starts[batch.row_of] < features - 1).any()):
            raise UserError(
                f"this classifier reads points of {features} numbers, and a row here has fewer before an action"
            )
        window = torch.arange(1 - features, 1, device=batch.at.device)
        return batch.inputs.to(torch.int32).view(torch.float32)[batch.at[:, None] + window]

    def save(self, folder: str | Path) -> None:
        """Writes classifier.json and classifier.safetensors."""
        save_file({n: t.detach().cpu().contiguous() for n, t in self.state_dict().items()}, Path(folder) / WEIGHTS)
        (Path(folder) / FILE).write_text(json.dumps(self.sizes) + "\n")

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> Classifier:
        """Reads what `save` wrote. Raises UserError for files that are missing or damaged."""
        try:
            policy = cls(**json.loads((Path(folder) / FILE).read_text()), dtype=dtype)
            policy.load_state_dict(load_file(Path(folder) / WEIGHTS))
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise UserError(f"no classifier can be read from {folder}: {str(error).splitlines()[0]}") from None
        return policy


def labelled(points: NDArray[np.floating], classes: NDArray[np.integer]) -> Batch:
    """The batch that teaches `classes` int[N] at `points` f[N, D], a row and an action each, of weight 1."""
    count = len(points)
    each = torch.arange(count)
    actions = {"target": torch.tensor(classes, dtype=torch.int64), "weight": torch.ones(count), "row": each}
    inputs = torch.tensor(points, dtype=torch.float32)
    return Batch(inputs, torch.ones(count, dtype=torch.int64), each, actions, laws=(RAW,))


class PointDecoder:
    """The points of `R` rows. A row is full once its class is written."""

    def __init__(self, policy: Classifier) -> None:
        self.policy = policy
        self.points = np.zeros((0, policy.tokenizer.features), np.float32)

    def prefill(self, contexts: Sequence[Ids], room: int) -> Tensor:
        """f32[R, C]: logits of each point."""
        self.points = np.stack([self.policy.tokenizer.point(c) for c in contexts])
        return self.policy.scores(self.points).float()

    def step(self, tokens: Tensor) -> Tensor:
        """f32[R, C]: the same logits again, for whoever rewound a row."""
        return self.policy.scores(self.points).float()

    def select(self, rows: Tensor) -> None:
        """int64[R']."""
        self.points = self.points[rows.tolist()]

    def rewind(self, lengths: Tensor) -> None:
        """A row is its point, however far it is cut back."""
