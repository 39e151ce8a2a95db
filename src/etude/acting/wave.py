"""One wave of the engine: rows that run together until each has ended.

Control lives on the host in vectors over rows; logits, draws and log-probabilities stay on the
policy's device until the wave ends, and nothing grows with a token. Shapes: `R` rows of the wave, `A`
rows still in the decoder, `C` the longest context, `M` the most tokens a row may write, `L` tokens,
`V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from etude.acting import law as laws
from etude.acting.hooks import Action, Force, Go, Hook, Inject, Rewind, Stop, Writing
from etude.acting.text import completes
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.protocols import Limits, Policy
from etude.experience.types import NOTHING, RAW, Author, Call, Ids, Law

Processor = Callable[[Tensor, Tensor], Tensor]  # (input_ids int64[A, L], scores f32[A, V]) -> scores
SHRINK = 0.75  # finished rows leave the batch once at most this share is alive


@dataclass(frozen=True)
class Task:
    """What all rows of one `generate` share."""

    policy: Policy
    limits: Limits
    law: Law
    hooks: Sequence[Hook]
    processors: Sequence[Processor]
    meter: Meter
    agent: str


@dataclass
class _Pen:
    """What hooks have done to one row, and what they were last asked about."""

    queue: list[int] = field(default_factory=list)  # tokens to write, last first
    author: Author = Author.SELF  # of the queue
    asked: int = -1  # the length at which hooks were last asked
    injected: list[tuple[int, int, str]] = field(default_factory=list)  # (first token, how many, tag)
    rewinds: int = 0

    @property
    def own(self) -> int:
        """Where the text after the last injection begins."""
        return sum(self.injected[-1][:2]) if self.injected else 0


class Wave:
    """Rows that run together. Vectors `[R]` are over rows, `[A]` over the rows still in the decoder
    (`live` names them), of which those not `alive` have ended but were not dropped yet."""

    def __init__(self, task: Task, rows: Sequence[int], contexts: Sequence[Ids], keys: Sequence[Keys]) -> None:
        self.task, self.rows = task, rows
        self.contexts = [np.asarray(contexts[i], np.int32) for i in rows]
        self.keys = [keys[i] for i in rows]
        self.device = task.policy.device
        n = len(rows)
        self.start = np.array([len(c) for c in self.contexts])  # [R]
        self.cap = np.minimum(task.limits.max_tokens, task.policy.limit - self.start)  # [R]
        self.C, self.M = int(self.start.max()), int(self.cap.max())
        self.ids = np.full((n, self.C + self.M), task.policy.tokenizer.pad, np.int64)  # contexts end at C
        for row, context in zip(self.ids, self.contexts, strict=True):
            row[self.C - len(context) : self.C] = context
        self.out = self.ids[:, self.C :]  # int64[R, M]
        self.author = np.zeros((n, self.M), np.int8)
        self.uniform = torch.from_numpy(np.stack([self._draws(r, 0) for r in range(n)])).to(self.device)
        self.logp_raw = torch.zeros(n, self.M, device=self.device)
        self.logp_sampled = torch.zeros(n, self.M, device=self.device)
        self.live = np.arange(n)  # [A]
        self.col = np.zeros(n, np.int64)  # [A], the column each writes next
        self.alive = np.ones(n, bool)  # [R]
        self.length = np.zeros(n, np.int64)  # [R], of rows that have ended
        self.stop = [""] * n
        self.pens = [_Pen() for _ in rows]
        self.sampled = self.fed = self.discarded = 0

    def run(self) -> list[Call]:
        """Writes all rows to their ends."""
        unique = {c.tobytes(): c for c in self.contexts}
        self.fed += sum(map(len, unique.values()))
        self.decoder = self.task.policy.decoder()
        logits = self.decoder.prefill(list(unique.values()), self.M)
        if len(unique) < len(self.contexts):
            index = {key: i for i, key in enumerate(unique)}
            repeat = torch.tensor([index[c.tobytes()] for c in self.contexts], device=self.device)
            self.decoder.select(repeat)
            logits = logits[repeat]
        self.is_stop = np.zeros(logits.shape[-1], bool)
        ends = [i for i in self.task.policy.tokenizer.stops | self.task.limits.stop_ids if i < len(self.is_stop)]
        self.is_stop[ends] = True
        if self.task.hooks:
            self._ask({})
        while self.alive.any():
            token = self._write(logits)
            token = self._settle(token)
            if self.alive.any():
                logits = self.decoder.step(token)
        return self._calls()

    def _draws(self, row: int, rewinds: int) -> NDArray[np.float64]:
        """f64[M]: the row's uniforms, by position in the row."""
        keys = self.keys[row].at("tokens", rewinds) if rewinds else self.keys[row].at("tokens")
        start = int(self.start[row])
        return keys.numpy().random(start + self.M)[start:]

    def _write(self, logits: Tensor) -> Tensor:
        """f32[A, V] -> int64[A]: one token a row, drawn or from its queue."""
        law, scores = self.task.law, logits
        if self.task.processors:
            seen = torch.from_numpy(self._seen()).to(self.device)
            for processor in self.task.processors:
                scores = processor(seen, scores)
        where = (torch.from_numpy(self.live).to(self.device), torch.from_numpy(self.col).to(self.device))
        token, logp = laws.choose(scores, law, self.uniform[where])
        self.logp_sampled[where] = logp
        self.logp_raw[where] = logp if law == RAW else laws.at(logits, token) - logits.logsumexp(-1)
        written = token.cpu().numpy()
        author = np.zeros(len(written), np.int8)
        if self.task.hooks:
            for i, r in enumerate(self.live.tolist()):
                pen = self.pens[r]
                if pen.queue:
                    written[i], author[i] = pen.queue.pop(), pen.author
            token = torch.from_numpy(written).to(self.device)
        self.out[self.live, self.col] = written
        self.author[self.live, self.col] = author
        self.col += 1
        own = int((self.alive[self.live] & (author == Author.SELF)).sum())
        self.sampled += own
        self.fed += int(self.alive[self.live].sum()) - own
        return token

    def _seen(self) -> NDArray[np.int64]:
        """int64[A, L]: contexts and outputs, padded on the left."""
        end = self.C + self.col
        at = np.arange(end.max()) - (end.max() - end)[:, None]
        return np.where(at < 0, self.task.policy.tokenizer.pad, self.ids[self.live[:, None], at])

    def _settle(self, token: Tensor) -> Tensor:
        """Ends rows, asks hooks, drops finished rows; int64[A] -> the tokens to feed, int64[A]."""
        live, last = self.live, self.col - 1
        ends: NDArray[np.bool_] = self.is_stop[self.out[live, last]]
        if self.task.hooks:
            ends &= self.author[live, last] != Author.INJECTED
        if self.task.limits.stop:
            for i in np.flatnonzero(self.alive[live] & ~ends).tolist():
                ends[i] = self._completes(i, self.task.limits.stop)
        ended: dict[int, str] = dict.fromkeys(np.flatnonzero(ends & self.alive[live]).tolist(), "stop")
        rewound = bool(self.task.hooks) and self._ask(ended)
        for i in np.flatnonzero((self.col >= self.cap[live]) & self.alive[live]).tolist():
            ended.setdefault(i, "length" if self.cap[live[i]] == self.task.limits.max_tokens else "context")
        for i, reason in ended.items():
            self._end(i, reason)
        if not self.alive.any():
            return token
        if rewound:
            lengths = torch.from_numpy(self.start[self.live] + self.col - 1).to(self.device)
            self.decoder.rewind(lengths)
            token = torch.from_numpy(self.ids[self.live, self.C + self.col - 1]).to(self.device)
        return self._shrink(token)

    def _completes(self, i: int, strings: Sequence[str]) -> bool:
        """Whether the token just written completes one of `strings`, in text since the last injection."""
        r, n = self.live[i], self.col[i]
        text = self.out[r, self.pens[r].own : n]
        return len(text) > 0 and completes(self.task.policy.tokenizer.decode, text, strings)

    def _ask(self, ended: dict[int, str]) -> bool:
        """Asks the hooks that are due, and changes `ended` (live row -> reason) by their answers.
        Returns whether any row was rewound."""
        rewound = False
        for i, r in enumerate(self.live.tolist()):
            pen, n = self.pens[r], int(self.col[i])
            if not self.alive[r] or (pen.queue and i not in ended):
                continue
            action = self._action(i, r, n, pen)
            pen.asked = n
            if isinstance(action, Stop):
                ended[i] = "hook"
            elif isinstance(action, Rewind):
                if not 0 <= action.offset <= n:
                    raise ValueError(f"a hook rewinds a row of {n} tokens to {action.offset}")
                ended.pop(i, None)
                self._rewind(i, r, action.offset)
                rewound = True
            elif not isinstance(action, Go):
                self._queue(i, r, action, ended)
            if n == 0 and i in ended:
                self._end(i, ended.pop(i))
        return rewound

    def _action(self, i: int, r: int, n: int, pen: _Pen) -> Action:
        """The first answer other than `Go` of the hooks that are due."""
        mine = n > 0 and self.author[r, n - 1] == Author.SELF
        for k, hook in enumerate(self.task.hooks):
            when = hook.when
            due = when.due(pen.asked, n)
            due = due or (mine and int(self.out[r, n - 1]) in when.ids)
            if due or (mine and when.strings and self._completes(i, when.strings)):
                keys = self.keys[r].at("hook", k, pen.rewinds, n)
                out = self.out[r, :n].astype(np.int32)
                decode = self.task.policy.tokenizer.decode
                action = hook(Writing(self.rows[r], self.contexts[r], out, pen.rewinds, keys, decode))
                if not isinstance(action, Go):
                    return action
        return Go()

    def _queue(self, i: int, r: int, action: Force | Inject, ended: dict[int, str]) -> None:
        """Has the row write the action's tokens next, as far as there is room."""
        pen, n = self.pens[r], int(self.col[i])
        ids = [int(t) for t in action.ids][: int(self.cap[r]) - n]
        if not ids:
            return
        ended.pop(i, None)
        pen.queue = ids[::-1]
        pen.author = Author.GIVEN if isinstance(action, Force) else Author.INJECTED
        if isinstance(action, Inject):
            pen.injected.append((n, len(ids), action.tag))

    def _rewind(self, i: int, r: int, offset: int) -> None:
        """Cuts the row back and gives it fresh draws."""
        pen, n = self.pens[r], int(self.col[i])
        self.discarded += int((self.author[r, offset:n] == Author.SELF).sum())
        self.col[i] = offset
        pen.rewinds += 1
        pen.asked = offset
        pen.queue = []
        pen.injected = [(at, min(size, offset - at), tag) for at, size, tag in pen.injected if at < offset]
        self.uniform[r] = torch.from_numpy(self._draws(r, pen.rewinds)).to(self.device)

    def _end(self, i: int, reason: str) -> None:
        r = self.live[i]
        self.alive[r], self.length[r], self.stop[r] = False, self.col[i], reason

    def _shrink(self, token: Tensor) -> Tensor:
        """Drops ended rows if enough have, or if one has used up its room."""
        alive = self.alive[self.live]
        full = (~alive & (self.col >= self.cap[self.live])).any()
        if alive.all() or (not full and alive.sum() > SHRINK * len(alive)):
            return token
        keep = torch.from_numpy(np.flatnonzero(alive)).to(self.device)
        self.decoder.select(keep)
        self.live, self.col = self.live[alive], self.col[alive]
        return token[keep]

    def _calls(self) -> list[Call]:
        """One call a row, and the charges."""
        task = self.task
        for kind, count in (("prefilled", self.fed), ("sampled", self.sampled), ("discarded", self.discarded)):
            task.meter.charge(kind, count)
        raw, sampled = self.logp_raw.cpu().numpy(), self.logp_sampled.cpu().numpy()
        calls = []
        for r, pen in enumerate(self.pens):
            n = int(self.length[r])
            author = self.author[r, :n].copy()
            own = author == Author.SELF
            logp_raw = np.where(own, raw[r, :n], np.nan).astype(np.float32)
            logp_sampled = np.where(own, sampled[r, :n], np.nan).astype(np.float32)
            if np.isnan(logp_raw[own]).any() or np.isnan(logp_sampled[own]).any():
                bent = f" after {', '.join(task.law.tilt)}" if task.law.tilt else ""
                raise FloatingPointError(f"row {self.rows[r]}: a next-token distribution{bent} is not finite")
            tags = {"injected": tuple(pen.injected)} if pen.injected else NOTHING
            law = replace(task.law, tilt=(*task.law.tilt, "rewind")) if pen.rewinds else task.law
            out = self.out[r, :n].astype(np.int32)
            context, stop = self.contexts[r], self.stop[r]
            calls.append(Call(task.agent, context, out, author, logp_raw, logp_sampled, law, stop=stop, tags=tags))
        return calls
