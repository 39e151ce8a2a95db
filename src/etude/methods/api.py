"""Running methods by name: `train` and `resume`, the same from Python and from the command line."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from etude.experience.claims import Claim
from etude.experience.errors import UserError, unknown
from etude.experience.protocols import Policy
from etude.learning.group_rl import GroupRL, compose
from etude.learning.ranks import join
from etude.learning.run import Reporter, Run, open_run
from etude.learning.setting import Common, parse_budget, setting
from etude.learning.sharded import whole
from etude.methods.catalog import entry, load, load_parts
from etude.methods.method import Method
from etude.methods.options import build
from etude.policies.zoo import save_policy

HOME = Path("runs")  # where runs go by default, below the working directory


def method(slug: str) -> Method:
    """A method by its slug. Raises UserError if there is none, or it is not written yet."""
    found: Method = load(slug).METHOD
    load_parts()  # a combination may name what another method brings
    return found


def claims(name: str) -> dict[str, Claim]:
    """The claims of a method, or the one called SLUG.WORD, by name; SLUG.main is the main one alone. Raises UserError
    where there is none."""
    slug, _, word = name.partition(".")
    found = method(slug).claims
    if not found:
        raise UserError(f"method {slug!r} has no claim to verify")
    if word == "main":
        name = slug
    if word and name not in found:
        raise unknown("claim", name, found)
    return {name: found[name]} if word else found


def train(
    slug: str,
    *,
    out: str | Path | None = None,
    name: str | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> Run:
    """Trains with a method and returns its run.

    Options are the method's hyperparameters and those of `Common` (world, policy, seed, ...), nested ones
    as mappings: `train("grpo", world="countdown", world_options={"max_value": 5}, optim={"lr": 1e-3})`.
    `out` is a new or empty directory; by default one under `runs/`. Raises UserError for what cannot be
    run, before anything is written.
    """
    chosen = method(slug)
    shared = {f.name for f in fields(Common)}
    own = {f.name for f in fields(chosen.config)}
    for option in options:
        if option not in shared | own:
            raise unknown("option", option, shared | own)
    if isinstance(given := options.get("world_options"), Mapping):
        options["world_options"] = [f"{k}={json.dumps(v)}" for k, v in given.items()]
    common = build(Common, {k: v for k, v in options.items() if k in shared})
    config = build(chosen.config, {k: v for k, v in options.items() if k in own})
    if isinstance(config, GroupRL):  # before a base model is taught for minutes
        compose(config, law_raw=common.temperature == 1)
    name = name or slug
    if Path(name).name != name:
        raise UserError(f"name {name!r} should be a plain word: say where the run goes with out")
    ranks = join()
    folder = ranks.agree(Path(out) if out is not None else _folder(name, common.seed))
    record = {
        "method": slug,
        "name": name,
        "seed": common.seed,
        "checkpoint_every": common.checkpoint_every,
        "common": asdict(common),
        "options": asdict(config),
        "budget": parse_budget(common.budget),
        "versions": {package: version(package) for package in ("etude", "torch", "numpy")},
    }
    run = Run(folder, record, checkpoint_every=common.checkpoint_every, reporter=reporter, ranks=ranks)
    try:
        return _go(run, chosen, common, config)
    except UserError:
        run.discard()
        if out is None:
            with suppress(OSError):  # it may hold other runs
                HOME.rmdir()
        raise


def resume(folder: str | Path, reporter: Reporter | None = None) -> Run:
    """Goes on with a run that was cut, to the end it would have had. Raises UserError if `folder` holds
    none, if it is in use, or if it is damaged."""
    run = open_run(folder, reporter, join())
    try:
        slug, shared, own = (run.config[k] for k in ("method", "common", "options"))
        chosen = method(slug)
        common, config = build(Common, shared), build(chosen.config, own)
    except KeyError as error:
        run.close()
        raise UserError(f"{folder}/config.json lacks {error}: it was not made by `etude train`") from None
    except UserError:
        run.close()
        raise
    return _go(run, chosen, common, config)


def _go(run: Run, chosen: Method, common: Common, config: Any) -> Run:
    """From the top of the method to its end; the run directory is let go whatever happens."""
    try:
        s = setting(run, common, chosen.start)
        run.stage("train", lambda: chosen.train(s, config))
        with whole(s.policy) as policy:
            run.ranks.first(lambda: _save(policy, run.folder / "policy"))
        return run
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"go on with `etude resume {run.folder}`") from None
    finally:
        run.close()


def _save(policy: Policy, folder: Path) -> None:
    if not folder.exists():
        save_policy(policy, folder)


def _folder(name: str, seed: int) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = HOME / f"{name}-{seed}-{stamp}"
    number = 1
    while folder.exists():
        number += 1
        folder = HOME / f"{name}-{seed}-{stamp}-{number}"
    return folder


def describe(slug: str) -> Mapping[str, Any]:
    """What `etude show` prints: the catalogue row, the docstring, the hyperparameters, the claims by name (empty
    where it is not written yet). Raises UserError if there is no such method."""
    row = entry(slug)
    if not row.works:
        return {**asdict(row), "works": False, "doc": "", "options": {}, "claims": {}}
    module = load(slug)
    chosen: Method = module.METHOD
    return {
        **asdict(row),
        "works": True,
        "doc": (module.__doc__ or "").strip(),
        "options": asdict(chosen.config()),
        "claims": {name: claim.plain() for name, claim in chosen.claims.items()},
    }
