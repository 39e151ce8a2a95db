"""Worlds by name. Listing them imports no world."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from etude.experience.errors import UserError, unknown
from etude.experience.protocols import World
from etude.experience.types import NOTHING
from etude.worlds.tasks import TASKS

WORLDS = {
    "chain": "etude.worlds.chain:ChainWorld",
    "choice": "etude.worlds.choice:ChoiceWorld",
    "data": "etude.worlds.data:DataWorld",
    "grid_maze": "etude.worlds.maze:MazeWorld",
    "lock": "etude.worlds.lock:LockWorld",
    "mix": "etude.worlds.mixture:MixWorld",
    "points": "etude.worlds.points:PointsWorld",
    "retry": "etude.worlds.retry:RetryWorld",
    "sections": "etude.worlds.sections:SectionsWorld",
    "star": "etude.worlds.star:StarWorld",
    "textworld": "etude.worlds.textworld:TextWorld",
}
FILES = (".jsonl", ".parquet")


def world_names() -> list[str]:
    """Every name that `load_world` knows; besides these it takes paths of data files."""
    return sorted((*TASKS, *WORLDS))


def load_world(name: str, *, notation: str | None = None, **options: Any) -> World:
    """The world `name` with its options.

    A name is a reasoning-gym task, `chain`, `choice`, `grid_maze`, `lock`, `points`, `sections`, `star`, `textworld`,
    `data` (with `path=...`), the path of a .jsonl or .parquet file or of a data folder, `retry:` and the name of the
    world to retry, or `mix:` and names joined by commas (or `mix` with `parts=...`). `notation` ("natural" or
    "compact") is for worlds that have several; the others do without it.
    Raises UserError on an unknown name or option, naming the nearest, or on a value that cannot be.
    """
    outer, colon, inner = name.partition(":")
    if colon and outer == "retry":
        own = {k: v for k, v in options.items() if k in _options(_class("retry"))}
        rest = {k: v for k, v in options.items() if k not in own}
        return _class("retry")(load_world(inner, notation=notation, **rest), **own)
    if outer == "mix":
        return _mixture(inner.split(",") if colon else [], notation, **options)
    if name in TASKS:
        from etude.worlds.reasoning import ReasoningWorld

        return ReasoningWorld(name, notation=notation or "natural", **options)
    if name not in WORLDS and (name.endswith(FILES) or Path(name).is_dir()):
        name, options = "data", {"path": name, **options}
    if name == "retry":
        raise UserError("world 'retry' needs a world to retry: write retry:countdown")
    if name not in WORLDS:
        raise unknown("world", name, world_names())
    build = _class(name)
    known = _options(build)
    for option in options:
        if option not in known:
            raise unknown(f"option of world {name},", option, known)
    if notation is not None and "notation" in known:
        options = {"notation": notation, **options}
    needed = [k for k, p in known.items() if p.default is inspect.Parameter.empty and k not in options]
    if needed:
        raise UserError(f"world {name!r} needs the option {needed[0]}: give {needed[0]}=...")
    return build(**options)


def _mixture(names: Sequence[str], notation: str | None, parts: Any = NOTHING, **options: Any) -> World:
    """The worlds called `names`, and those of `parts`: options by name, among them `world` where that is not the name.
    The notation is for all."""
    if not isinstance(parts, Mapping) or not all(isinstance(p, Mapping) for p in parts.values()):
        raise UserError('mix: parts are options by name, as in parts={"sums": {"world": "chain_sum"}}')
    for option in options:
        if option not in ("shares", "levels"):
            raise unknown("option of world mix,", option, ("parts", "shares", "levels"))
    worlds = {}
    for name in dict.fromkeys((*names, *parts)):
        given = dict(parts.get(name, NOTHING))
        worlds[name] = load_world(given.pop("world", name), **{"notation": notation, **given})
    return cast(World, _class("mix")(worlds, **options))


def _class(name: str) -> Any:
    module, _, attribute = WORLDS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def _options(build: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(build).parameters)
