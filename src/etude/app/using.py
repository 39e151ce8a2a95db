"""`etude eval`, `etude chat` and `etude export`."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from etude.app.flags import parse
from etude.experience.errors import UserError

Word = Annotated[str, tyro.conf.Positional]


@dataclass(frozen=True)
class EvalFlags:
    """Held-out accuracy of a policy on a world."""

    policy: Word  # a name of the zoo, a checkpoint, or a run directory
    world: str = "chain_sum"
    world_options: tuple[str, ...] = ()  # name=value
    problems: int = 100
    samples: int = 1  # answers a problem
    temperature: float = 1.0  # 0: greedy
    max_tokens: int = 256
    seed: int = 0
    json: bool = False  # for a program


def eval(argv: Sequence[str]) -> None:
    """Evaluates on the held-out problems of a world."""
    flags = parse(EvalFlags, argv, "eval")
    for name in ("problems", "samples", "max_tokens"):
        if getattr(flags, name) < 1:
            raise UserError(f"{name} must be at least 1, not {getattr(flags, name)}")
    from etude.acting.agent import PolicyAgent
    from etude.acting.sample import sample
    from etude.audits.evaluate import evaluate
    from etude.experience.keys import Keys
    from etude.experience.protocols import Limits
    from etude.experience.types import Law
    from etude.learning.setting import acting_for, parse_options
    from etude.policies.zoo import load_policy
    from etude.worlds.registry import load_world

    keys = Keys(flags.seed)
    policy = load_policy(_checkpoint(flags.policy), keys.at("init"))
    world = load_world(flags.world, notation=policy.tokenizer.notation, **parse_options(flags.world_options))
    law = Law(temperature=flags.temperature)
    roles = {"actor": PolicyAgent(policy, "actor", law, Limits(max_tokens=flags.max_tokens))}
    found = evaluate(
        roles, world, "test", flags.problems, flags.samples, acting_for(world, sample), keys.at("evaluate")
    )
    print(json.dumps(found.to_json()) if flags.json else found)


@dataclass(frozen=True)
class ChatFlags:
    """Talk to a policy; an empty line or end of input ends it."""

    policy: Word  # a name of the zoo, a checkpoint, or a run directory
    temperature: float = 0.7  # 0: greedy
    max_tokens: int = 256
    seed: int = 0


def chat(argv: Sequence[str]) -> None:
    """Answers line by line. The conversation is kept as tokens and cut from its start when it is full."""
    flags = parse(ChatFlags, argv, "chat")
    import numpy as np

    from etude.acting.agent import PolicyAgent
    from etude.experience.keys import Keys
    from etude.experience.protocols import Limits
    from etude.experience.types import Law
    from etude.policies.zoo import load_policy

    keys = Keys(flags.seed)
    policy = load_policy(_checkpoint(flags.policy), keys.at("init"))
    agent = PolicyAgent(policy, "actor", Law(temperature=flags.temperature), Limits(max_tokens=flags.max_tokens))
    tokenizer, context, turn = policy.tokenizer, None, 0
    while line := _ask():
        fresh = tokenizer.prompt(line)
        context = fresh if context is None else np.concatenate([context, tokenizer.observation(line)])
        if len(context) + flags.max_tokens > policy.limit:
            if len(fresh) >= policy.limit:
                raise UserError(f"the message has {len(fresh)} tokens, the policy's limit is {policy.limit}")
            context = fresh
        call = agent.generate([context], [keys.at("chat", turn)])[0]
        print(tokenizer.decode(call.out).strip(), flush=True)
        context = np.concatenate([context, call.out])
        turn += 1


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


@dataclass(frozen=True)
class ExportFlags:
    """A run's policy as a Hugging Face folder, or its log as a file."""

    run: Word
    path: Word  # a new folder, or a file that ends in .jsonl or .parquet


def export(argv: Sequence[str]) -> None:
    """Writes what other programs read."""
    flags = parse(ExportFlags, argv, "export")
    target = Path(flags.path)
    if target.suffix in (".jsonl", ".parquet"):
        from etude.experience.export import export_run
        from etude.experience.store import Store

        with Store(flags.run, read_only=True) as store:
            export_run(store, target)
    else:
        source = Path(_checkpoint(flags.run))
        if not (source / "config.json").is_file():
            raise UserError(f"{flags.run} holds no policy yet: finish it with `etude resume {flags.run}`")
        if target.exists():
            raise UserError(f"{target} exists: name a new folder")
        partial = target.with_name(f".{target.name}.partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial)
            partial.rename(target)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    print(f"wrote {target}")


def _checkpoint(name: str) -> str:
    """A run directory stands for the policy it ended with."""
    inside = Path(name) / "policy"
    if (Path(name) / "store.sqlite").is_file():
        if not inside.is_dir():
            raise UserError(f"{name} holds no policy yet: finish it with `etude resume {name}`")
        return str(inside)
    return name
