"""Where answers come from that others wrote: another policy, a file of completions, or the world's own oracle."""

from __future__ import annotations

from collections.abc import Sequence

from etude.acting.agent import PolicyAgent
from etude.acting.sample import sample
from etude.experience.errors import unknown
from etude.experience.protocols import Clock
from etude.experience.rows import Row, example
from etude.experience.types import Problem
from etude.learning.setting import Setting, named
from etude.policies.zoo import load_policy
from etude.worlds.data import as_text, load_examples
from etude.worlds.oracles import load_oracle
from etude.worlds.registry import FILES

ORACLE = "oracle:"  # what the name of a source begins with that is a style of the world's oracle
Texts = Sequence[str | None]  # an answer to each problem; None: there is no finished one


def answers(
    s: Setting, source: str, role: str, asked: Sequence[Problem], columns: Sequence[str] = (), charged: bool = True
) -> Texts:
    """What `source` answers to each problem: oracle:STYLE, a .jsonl or .parquet file of completions (with `columns`,
    ours=theirs), or a policy's name or folder, which is sampled by the law and limits of learning and, but for a probe,
    `charged` to the run. The `role` names its random streams: one source in two roles answers twice, independently.

    Raises UserError for a source that is not there.
    """
    if source.startswith(ORACLE):
        oracle, style = load_oracle(s.world), source.removeprefix(ORACLE)
        if style not in oracle.styles:
            raise unknown(f"style of the oracle of world {s.world.name!r},", style, oracle.styles)
        return [oracle.demonstrate(p, style, s.run.keys.at("demonstrate", role, p.id)) for p in asked]
    if source.endswith(FILES):
        found = {as_text(e.prompt): e.completion for e in load_examples(source, "completion", named(columns, "column"))}
        return [found.get(as_text(p.prompt)) for p in asked]
    policy = load_policy(source, s.run.keys.at("init"), device=s.common.device)
    roles = {"actor": PolicyAgent(policy, role, s.law, s.limits, s.run.meter if charged else None)}
    groups = sample(roles, asked, 1, s.score, Clock(0, 1), s.run.keys.at("answer", role))
    return [m.text if m.calls[-1].stop == "stop" else None for group in groups for m in group.members]


def taught(s: Setting, problem: Problem, text: str | None) -> Row | str:
    """The row that teaches the run's policy an answer that somebody else wrote, in its own tokens; or the word for why
    there is none: absent, empty, or long (more than its context holds)."""
    if text is None:
        return "absent"
    if not text.strip():
        return "empty"
    tokenizer = s.policy.tokenizer
    row = example(tokenizer.prompt(problem.prompt), tokenizer.completion(text))
    return row if len(row) <= s.policy.limit else "long"
