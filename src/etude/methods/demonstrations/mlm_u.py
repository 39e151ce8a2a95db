"""MLM-U: masked language modelling with a uniform masking rate, for planning (arXiv 2412.05117, the section on the
objective and the architecture, and the authors' code).

Problem: a model that is taught the next token of a plan is shown the true plan so far. Every step but the first then
follows from the step before it, so the loss is fitted by walking on, and the decision at the fork, which needs the
whole plan, gets hardly any gradient. Idea: hide any part of the plan and ask for all of it. A step far from what is in
sight can only be predicted by planning, forwards or backwards, and the empty plan is a context like the others.

For a prompt x and an answer y_1 .. y_L, and for each sequence a share r ~ U(0, 1): y_i is in sight with probability r,
else it is hidden, and

    L = - (1 / H) sum over sequences, sum over hidden i  log p(y_i | x, the y_j in sight)

with H the number of hidden tokens in the batch (nats a token). There is no weight 1 / (1 - r), so this is no bound on
log p(y | x). The number of tokens in sight is uniform on 0 .. L, and of all contexts those of left-to-right decoding
are few: exactly the first i are in sight with probability i! (L - i)! / (L + 1)!. They suffice: an answer is filled
from left to right, each token the likeliest given x and those before it, or in any other order (`fill`).

With `visible` = "prefix" it is next-token training with attention both ways: k ~ U{0 .. L-1} tokens are in sight, and
only the next is asked for. With both `rates` at 1 it is a cloze test: all but one token are in sight.

Adds to the shared parts: nothing but this composition of the masked objective. The policy is made to look both ways at
the start, with the weights it has, and stays so when it is saved; any Llama, Qwen2 or Qwen3 checkpoint whose tokenizer
has a mask token will do. Departures: hidden tokens are replaced by a mask token in one stack of ordinary blocks,
instead of being left out of an encoder whose states a decoder of position queries attends to, so that
MLM-U and next-token training differ in nothing but attention and loss; a sequence in which everything is in sight hides
one token instead of teaching nothing; an answer's end is taught and predicted on a canvas of fixed length, where the
authors' evaluation gives the length away; sizes are for a laptop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from etude.acting.fill import Fill, hidden_token
from etude.experience.batch import By
from etude.experience.claims import Arm, Claim, Endpoint, Metric
from etude.experience.errors import UserError
from etude.learning.demonstrations import demonstrations
from etude.learning.learner import Optim, Seat
from etude.learning.loops import examples, fit
from etude.learning.setting import Setting
from etude.methods.method import Method
from etude.objectives.masked import MaskedLM, Visible, canvas
from etude.policies.lm import LM


@dataclass(frozen=True)
class MLMU:
    """MLM-U's hyperparameters."""

    steps: int = 1000  # updates
    batch: int = 64  # demonstrations an update
    rates: tuple[float, float] = (0.0, 1.0)  # smallest and largest share of an answer's tokens in sight
    visible: Visible = "any"  # which may be in sight; prefix: the first k, and only the next is predicted
    data: str | None = None  # .jsonl or .parquet; None: the world's oracle demonstrates
    columns: tuple[str, ...] = ()  # ours=theirs, e.g. prompt=question
    demonstrations: int = 4000  # how many the oracle writes
    style: str = "plain"  # of the oracle's demonstrations
    normalise: By = "token"  # what the loss is a mean over: hidden tokens of the batch, or of each sequence first
    fill: Fill = field(default_factory=Fill)  # how answers are filled in evaluations; left to right by default
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-3, schedule="cosine", warmup=0.05))

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "demonstrations"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")


def train(s: Setting, config: MLMU) -> None:
    """One `fit` of the masked objective over demonstrations on canvases of `max_tokens`."""
    if not isinstance(s.policy, LM) or s.served is not None:
        raise UserError(
            "mlm-u needs a transformer that can be made to look both ways, in this process: tiny, small, or a Llama, "
            "Qwen2 or Qwen3 checkpoint"
        )
    hidden_token(s.policy.look_both_ways(), "mlm-u")  # raises where there is none
    s.act = config.fill
    row = partial(canvas, length=s.common.max_tokens, filler=False)
    data = demonstrations(s, config.data, config.columns, config.demonstrations, config.style, row=row)
    source = examples(data, config.batch, s.run)
    objective = MaskedLM((config.rates[0], config.rates[1]), config.visible, config.normalise)
    seat = Seat(s.policy, config.optim, config.steps)
    fit(s.run, seat, source, objective, config.steps, by=None, watch=s.watch)


STAR = {
    "steps": 2500,
    "batch": 64,
    "demonstrations": 20000,
    "max_tokens": 4,
    "eval_every": 500,
    "eval_problems": 1000,
    "eval_temperature": 0.0,
    "checkpoint_every": 500,
    "optim": {"beta2": 0.98},
}

CLAIM = Claim(
    says="Where the first step of a path can only be told from its end, the same network ends near perfect when any "
    "part of the path may be hidden, and guesses the first step when it is taught the next token.",
    world="star",
    policy="tiny:width=48,depth=4,heads=2,ffn=96,limit=64,nodes=10",
    options=STAR,
    arms=(
        Arm("mlm-u", "mlm-u"),
        Arm("next-token", "sft", role="baseline"),
        Arm("prefixes", "mlm-u", {"visible": "prefix"}, role="ablation"),
        Arm("cloze", "mlm-u", {"rates": (1.0, 1.0)}, role="ablation"),
    ),
    metrics={
        "path": Metric("evaluation", "accuracy", unit="%"),
        "first step": Metric("evaluation", "part/first", unit="%"),
        "on edges": Metric("evaluation", "part/valid", unit="%"),
        "guess": Metric("evaluation", "part/chance", unit="%"),
    },
    endpoints=(
        Endpoint("paths over next-token training", "effect", "path", ("mlm-u", "next-token"), 0.30, every=True),
        Endpoint(
            "next-token training guesses the first step", "vanish", "first step", ("next-token", "next-token:guess"),
            0.08, equal=True,
        ),
        Endpoint("and walks on without fault", "guard", "on edges", ("next-token", "mlm-u"), 0.05),
        Endpoint("prefixes alone do not teach the first step", "vanish", "path", ("mlm-u", "prefixes"), 0.30),
        Endpoint("nor does a cloze test", "vanish", "path", ("mlm-u", "cloze"), 0.30),
    ),
    tune="path",
    grid=(1e-3, 3e-3),
    minutes=2.0,
)  # fmt: skip

TREES = {"world_options": {"n": 4, "kind": "dfs", "least": 4}}

# The paper's ground, at the size of a laptop: one rate for all arms, the best for next-token training in pilots.
MAZES = Claim(
    says="After as many mazes, the same network finds more shortest ways by MLM-U than by next-token training, in "
    "mazes with walls at random and in those where every way is unique.",
    world="grid_maze",
    world_options={"n": 4, "kind": "random", "least": 4},
    policy="tiny:width=48,depth=4,heads=2,ffn=96,limit=64,nodes=16",
    options={
        **STAR, "steps": 1250, "max_tokens": 18, "style": "direct", "eval_every": 250, "eval_problems": 500,
        "optim": {"lr": 3e-3, "beta2": 0.98},
    },
    arms=(
        Arm("mlm-u", "mlm-u"),
        Arm("next-token", "sft", role="baseline"),
        Arm("mlm-u-trees", "mlm-u", TREES),
        Arm("next-token-trees", "sft", TREES, role="baseline"),
    ),
    metrics={
        "optimal": Metric("evaluation", "part/optimal", unit="%"),
        "valid": Metric("evaluation", "part/valid", unit="%"),
    },
    endpoints=(
        Endpoint("walls at random", "effect", "optimal", ("mlm-u", "next-token"), 0.05),
        Endpoint("unique ways", "effect", "optimal", ("mlm-u-trees", "next-token-trees"), 0.05),
    ),
    tune="optimal",
    grid=(),
    minutes=0.8,
)  # fmt: skip

METHOD = Method("mlm-u", MLMU, train, start="random", claim=CLAIM, more={"mazes": MAZES})
