"""Runs for the tests of `etude view`: small, hostile, forked and very large ones, without training."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import numpy as np

from etude.experience.store import Measured, Store
from etude.experience.types import Author, Call, Group, Law, Outcome, Problem, StepInfo, Trajectory
from etude.policies.tokenizers import CharTokenizer

CHARS = CharTokenizer()
HOSTILE = (
    "<script>window.hacked=1;alert(1)</script>",
    '"><img src=x onerror="window.hacked=1">',
    "</pre></span><svg onload=window.hacked=1>",
    "{{1237*11}}{% raw %}${1237*11}",
    "javascript:window.hacked=1//",
    "' onfocus=window.hacked=1 autofocus x='",
    "\u202egnp.exe\x1b[31m",
)
ALL = " ".join(HOSTILE)


class Evaluated:
    """A held-out accuracy, with one for each category."""

    split = "test"

    def __init__(self, value: float, categories: tuple[str, ...] = (), world: str = "sums") -> None:
        self.value, self.categories, self.world = value, categories, world
        self.items: dict[str, float] = {}

    def rows(self):
        for name in ("accuracy", *(f"accuracy/{c}" for c in self.categories)):
            yield Measured(self.world, self.split, name, self.value, self.value - 0.05, self.value + 0.05, 100)


def call(text: str, context: str = "1+1=", authors: tuple[int, ...] | None = None, **more: object) -> Call:
    """A call of characters; of the tokens chosen by the agent the i-th has probability 1 / (i + 1)."""
    out = CHARS.encode(text)
    author = np.array(authors if authors is not None else [Author.SELF] * len(out), np.int8)
    logp = np.where(author == Author.SELF, 0.0 - np.log(np.arange(len(out)) + 1.0), np.nan).astype(np.float32)
    return Call("actor", CHARS.prompt(context), out, author, logp, logp, **more)


def config(folder: Path, method: str = "grpo", **more: object) -> None:
    """A config as `etude train` writes it."""
    common = {"world": "sums", "policy": "tiny", **more.pop("common", {})}
    options = {"steps": 10, "credit": "grpo", **more.pop("options", {})}
    made = {"method": method, "name": method, "seed": 3, "common": common, "options": options, **more}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(made))


def step(store: Store, at: int, value: float | None = None, category: str = "easy") -> None:
    """A step of one group of four answers, half of them right; with an evaluation where `value` is given."""
    problem = Problem(f"p{at}", "1+1=", "2", category)
    members = tuple(
        Trajectory(problem, (call(f"{i}"),), outcome=Outcome(float(i % 2), bool(i % 2), f"{i}"), member=i, text=f"{i}")
        for i in range(4)
    )
    store.commit(
        "train", at, seconds=0.5,
        meter={"sampled": 100.0 * (at + 1), "trained": 50.0 * (at + 1), "seconds": 0.5 * (at + 1)},
        metrics={"reward": at / 10, "loss": 1 / (at + 1), "length": 5.0, "entropy": 2.0, "odd": float("nan")},
        groups=[(Group(problem, members), True)],
        evaluations=[] if value is None else [Evaluated(value, ("easy", "hard"))],
    )  # fmt: skip


def plain(folder: Path, steps: int = 6, finished: bool = True, **more: object) -> Path:
    """A run of which every second step is evaluated: 20%, 40%, 60%, ..."""
    config(folder, **more)
    with Store(folder) as store:
        for at in range(steps):
            step(store, at, 0.2 + at / 10 if at % 2 == 0 else None)
        store.event("started", "by a test")
    if finished:
        (folder / "policy").mkdir()
        CHARS.save(folder / "policy")
    return folder


def hostile(folder: Path) -> Path:
    """A run that has hostile text wherever a run can have text."""
    config(folder, method=HOSTILE[0], common={"world": HOSTILE[1], "policy": HOSTILE[2]}, options={HOSTILE[3]: ALL})
    problem = Problem(ALL, ({"role": HOSTILE[0], "content": ALL},), ALL, ALL, meta={ALL: ALL})
    who = tuple(i % 4 for i in range(len(CHARS.encode(ALL))))
    made = call(ALL, ALL, who, law=Law(tilt=(ALL,)), stop=ALL, tags={ALL: ALL})
    said = StepInfo(1.0, True, (ALL,), True, True)
    outcome = Outcome(1.0, True, ALL, {ALL: 1.0})
    t = Trajectory(problem, (made,), (said,), outcome, text=ALL, tags={ALL: ALL})
    with Store(folder) as store:
        store.commit(
            HOSTILE[0], 0, seconds=1.0, meter={"sampled": 1.0, ALL: 2.0}, metrics={ALL: 1.0, HOSTILE[1]: 2.0},
            groups=[(Group(problem, (t,)), True)], evaluations=[Evaluated(0.5, (ALL,), ALL)],
        )  # fmt: skip
        store.event(ALL, ALL)
    return folder


def forked(folder: Path) -> Path:
    """A run whose one group is a tree: 1 with the forks 2 and 3, of which 3 has the fork 4. Trajectory 1 has two
    turns, and entropies."""
    config(folder)
    problem = Problem("p", "1+1=", "2", "easy")
    first = call("1+a", authors=(0, 1, 3), tags={"entropy": [0.05, 0.7, 3.0]})
    second = call("2", "1+1=1+a\nwrong\n")
    steps = (StepInfo(0.0, False, ("bad",), None, call=0), StepInfo(1.0, True, (), True, True, call=1))
    root = Trajectory(problem, (first, second), steps, Outcome(1.0, True, per_call=(0.0, 1.0)), text="2")
    second_child = Trajectory(problem, (call("4"),), outcome=Outcome(0.0, False), parent=(root, 0, 1), member=1)
    third = Trajectory(problem, (call("5"),), outcome=Outcome(0.5, False), parent=(root, 1, 0), member=2)
    fourth = Trajectory(problem, (call("6"),), outcome=Outcome(0.25, False), parent=(third, 0, 0), member=3)
    with Store(folder) as store:
        store.commit("train", 0, groups=[(Group(problem, (root, second_child, third, fourth)), True)])
    return folder


def many(folder: Path, trajectories: int = 100_000, members: int = 100) -> Path:
    """A store of very many trajectories. They are rows copied from one that a run wrote, so they share its arrays."""
    plain(folder, 1)
    db = sqlite3.connect(folder / "store.sqlite")
    names = [row[1] for row in db.execute("PRAGMA table_info(trajectories)")]
    row = dict(zip(names, db.execute("SELECT * FROM trajectories WHERE id = 1").fetchone(), strict=True))
    rows = (
        tuple({
            **row, "id": i, "step": i // members, "grp": i % members // 8, "member": i % 8, "reward": i % 11 / 10,
            "correct": i % 3 == 0, "category": f"kind {i % 7}", "text": f"answer {i} " + "x" * 200,
        }.values())
        for i in range(5, trajectories + 1)
    )  # fmt: skip
    with db:
        db.executemany(f"INSERT INTO trajectories VALUES ({', '.join('?' * len(names))})", rows)
        stepped = (("train", i, 1.0, '{"sampled": 1}') for i in range(1, trajectories // members + 1))
        db.executemany("INSERT INTO steps VALUES (NULL, ?, ?, ?, ?)", stepped)
    db.close()
    return folder
