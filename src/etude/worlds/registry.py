"""Worlds by name. Listing them imports no world."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from etude.experience.errors import UserError, unknown
from etude.experience.protocols import World
from etude.worlds.tasks import TASKS

WORLDS = {
    "chain": "etude.worlds.chain:ChainWorld",
    "choice": "etude.worlds.choice:ChoiceWorld",
    "choice-transitive": "etude.worlds.choice:transitive_choice",
    "data": "etude.worlds.data:DataWorld",
    "grid_maze": "etude.worlds.maze:MazeWorld",
    "lock": "etude.worlds.lock:LockWorld",
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
    `data` (with `path=...`), the path of a .jsonl or .parquet file or of a data folder, or `retry:` and the name of the
    world to retry. `notation` ("natural" or "compact") is for worlds that have several; the others do without it.
    Raises UserError on an unknown name or option, naming the nearest, or on a value that cannot be.
    """
    outer, colon, inner = name.partition(":")
    if colon and outer == "retry":
        own = {k: v for k, v in options.items() if k in _options(_class("retry"))}
        rest = {k: v for k, v in options.items() if k not in own}
        return _class("retry")(load_world(inner, notation=notation, **rest), **own)
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


def _class(name: str) -> Any:
    module, _, attribute = WORLDS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def _options(build: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(build).parameters)
