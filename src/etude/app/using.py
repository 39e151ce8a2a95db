"""`etude eval`, `etude chat` and `etude export`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from etude.app.flags import parse
from etude.app.progress import in_parts
from etude.experience.endpoint import Server
from etude.experience.errors import UserError

PolicyName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="POLICY")]
RunName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Target = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]


@dataclass(frozen=True)
class EvalFlags:
    """Held-out accuracy of a policy on a world."""

    policy: PolicyName  # a name of the zoo, a checkpoint, or a run directory; of a served model, for its tokenizer
    world: str = "chain_sum"  # a world's name, or a data file; see `etude list --worlds`
    world_options: tuple[str, ...] = ()  # name=value, e.g. min_terms=2
    problems: int = 100  # of the held-out split
    samples: int = 1  # answers a problem
    temperature: float = 1.0  # of sampling; 0: greedy
    max_tokens: int = 256  # longest answer
    seed: int = 0  # of every random stream
    server: Server = field(default_factory=Server)
    json: bool = False  # print the result for a program


def eval(argv: Sequence[str]) -> None:
    """Evaluates on the held-out problems of a world."""
    flags = parse(EvalFlags, argv, "eval")
    for name in ("problems", "samples", "max_tokens"):
        if getattr(flags, name) < 1:
            raise UserError(f"{name} must be at least 1, not {getattr(flags, name)}")
    from etude.acting.agent import PolicyAgent
    from etude.acting.sample import sample
    from etude.acting.server import connect
    from etude.audits.evaluate import evaluate
    from etude.experience.keys import Keys
    from etude.experience.protocols import Agent, Limits
    from etude.experience.types import Law
    from etude.learning.setting import acting_for, parse_options
    from etude.policies.zoo import load_policy
    from etude.worlds.registry import load_world

    keys = Keys(flags.seed)
    law, limits = Law(temperature=flags.temperature), Limits(max_tokens=flags.max_tokens)
    actor: Agent
    if flags.server.url is None:
        actor = PolicyAgent(load_policy(checkpoint_of(flags.policy), keys.at("init")), "actor", law, limits)
    else:
        actor = connect(flags.server, _tokenizer(flags.policy), law=law, limits=limits)
    world = load_world(flags.world, notation=actor.tokenizer.notation, **parse_options(flags.world_options))
    with in_parts(acting_for(world, sample, room=flags.max_tokens), flags.world) as act:
        found = evaluate({"actor": actor}, world, "test", flags.problems, flags.samples, act, keys.at("evaluate"))
    print(json.dumps(found.to_json()) if flags.json else found)


@dataclass(frozen=True)
class ChatFlags:
    """Talk to a policy; an empty line or end of input ends it."""

    policy: PolicyName  # a name of the zoo, a checkpoint, or a run directory
    temperature: float = 0.7  # of sampling; 0: greedy
    max_tokens: int = 256  # longest answer
    seed: int = 0  # of every random stream


def chat(argv: Sequence[str]) -> None:
    """Answers line by line. The conversation is kept as tokens and cut from its start when it is full."""
    flags = parse(ChatFlags, argv, "chat")
    import numpy as np

    from etude.acting.agent import PolicyAgent
    from etude.acting.sample import said
    from etude.experience.keys import Keys
    from etude.experience.protocols import Limits
    from etude.experience.types import Law
    from etude.policies.zoo import load_policy

    keys = Keys(flags.seed)
    policy = load_policy(checkpoint_of(flags.policy), keys.at("init"))
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
        print(said(agent, call).strip(), flush=True)
        context = np.concatenate([context, call.out])
        turn += 1


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


@dataclass(frozen=True)
class ExportFlags:
    """A run's policy (or any other) as a Hugging Face folder, or its log as a file."""

    run: RunName  # a run directory; for a folder also a name of the zoo or a checkpoint
    path: Target  # a new folder, or a file that ends in .jsonl or .parquet


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
        _export_policy(flags.run, target)
    print(f"wrote {target}")


def _export_policy(name: str, target: Path) -> None:
    """A folder that `transformers` loads; an adapter is added into the weights."""
    if target.exists():
        raise UserError(f"{target} exists: name a new folder")
    from etude.policies.adapters import adapted, merged
    from etude.policies.table import TablePolicy
    from etude.policies.zoo import load_policy, save_policy

    policy: Any = load_policy(checkpoint_of(name))
    if isinstance(policy, TablePolicy):
        raise UserError(f"{name} is a table, not a model that Hugging Face has: export its log (.jsonl, .parquet)")
    save_policy(merged(policy) if adapted(policy) else policy, target)


def _tokenizer(name: str) -> Any:
    """A policy's tokenizer, without its weights where it is a folder or file."""
    from etude.policies.tokenizers import load_tokenizer
    from etude.policies.zoo import load_policy

    path = checkpoint_of(name)
    return load_tokenizer(path) if Path(path).exists() else load_policy(path).tokenizer


def checkpoint_of(name: str) -> str:
    """A run directory stands for the policy it ended with."""
    inside = Path(name) / "policy"
    if (Path(name) / "store.sqlite").is_file():
        if not inside.is_dir():
            raise UserError(f"{name} holds no policy yet: finish it with `etude resume {name}`")
        return str(inside)
    return name
