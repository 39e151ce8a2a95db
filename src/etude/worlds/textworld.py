"""TextWorld games: rooms, doors and things, played by typing commands.

Games are made by the package `textworld` (Côté et al. 2018, arXiv 1806.11532) from a seed and options,
compiled once and kept on disk.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any

from etude.experience.cache import cache_folder
from etude.experience.errors import UserError, missing, unknown
from etude.experience.keys import Keys
from etude.experience.types import Outcome, Problem
from etude.worlds.chain import SPLITS
from etude.worlds.textenv import TextEnv, Turn, outcome, replay
from etude.worlds.working import Demonstration, Solution

INSTRUCTION = "You are playing a text game. Answer with one command, such as: {examples}."
TRIES = 40  # seeds looked at until a game falls into its split
_GENERATOR = threading.Lock()  # textworld's generator shares tables between games

# What may be sent to the game; the rest is for the interpreter that runs it, which reads escapes and writes files.
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ,'-]{0,199}")
META = {"save", "restore", "restart", "quit", "q", "script", "transcript", "unscript", "recording", "replay", "verify"}
REFUSED = "That is not something you can do here."


@dataclass(frozen=True)
class TextWorld:
    """Games of `rooms` rooms and `objects` things, whose quest takes as many commands as the category
    says ("quest-2": two). The reward of a step is the change of the game's score as a share of the
    highest, so an episode is worth 1 if won.

    The first game from a seed takes a second or two to make; `prepare` makes many at once. `seed`
    gives another series of games. Raises UserError if the package is missing.
    """

    lengths: tuple[int, ...] = (1, 2, 3, 4)
    rooms: int = 2
    objects: int = 4
    max_turns: int = 20
    seed: int = 0
    name: str = field(default="textworld", init=False)
    notation: str = field(default="natural", init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(self.lengths))
        if not self.lengths or min(self.lengths) < 1:
            raise UserError(f"textworld: quest lengths {self.lengths} must be at least 1")
        if min(self.rooms, self.objects, self.max_turns) < 1:
            raise UserError("textworld: rooms, objects and max_turns must be at least 1")

    @property
    def categories(self) -> tuple[str, ...]:
        """By how many commands the quest takes."""
        return tuple(f"quest-{n}" for n in self.lengths)

    def size(self, split: str) -> int | None:
        """None: games are made for ever."""
        return None

    def problem(self, split: str, index: int, category: str | None = None) -> Problem:
        """Names a game by its options; it is made when it is first played."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        category = category or self.categories[index % len(self.lengths)]
        if category not in self.categories:
            raise unknown("textworld category", category, self.categories)
        length = self.lengths[self.categories.index(category)]
        options = {
            "split": split,
            "seed": Keys(self.seed).at("textworld", split, category, index).digest() % 2**31,
            "quest": length,
            "rooms": self.rooms,
            "objects": self.objects,
        }
        prompt = INSTRUCTION.format(examples="look, inventory, go east, open box, take key from box")
        return Problem(f"{split}/{category}/{index}", prompt, None, category, float(length), options)

    def score(self, problem: Problem, text: str) -> Outcome:
        """Plays a text of one command a line."""
        return outcome(replay(commands(text), self.env(problem)))

    def env(self, problem: Problem) -> TextWorldEnv:
        """The game."""
        return TextWorldEnv(problem, self.max_turns)

    def prepare(self, problems: Sequence[Problem], workers: int | None = None) -> None:
        """Makes the games of many problems at once (compiling is another process's work)."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
            list(pool.map(lambda p: game_file(p.options), problems))


class TextWorldEnv(TextEnv):
    """One game. An action is one command; admissible commands are in `info`."""

    def __init__(self, problem: Problem, max_turns: int) -> None:
        super().__init__(problem, max_turns)
        textworld = _textworld()
        wanted = textworld.EnvInfos(
            admissible_commands=True, score=True, max_score=True, won=True, lost=True, policy_commands=True
        )
        self.game = textworld.start(str(game_file(problem.options)), wanted)
        self.state: Mapping[str, Any] = {}

    def begin(self, seed: int | None) -> tuple[str, dict[str, Any]]:
        """The task and the first room."""
        self.state = self.game.reset()
        return _tidy(self.state["feedback"]), {"admissible": tuple(self.state["admissible_commands"])}

    def act(self, action: str) -> Turn:
        """Sends the first line of `action` to the game. What would talk to the interpreter instead (its
        escapes, saving, quitting) is not sent, and is answered as a command that cannot be."""
        command = (commands(action) or ("",))[0]
        before = self.state
        admissible = tuple(before["admissible_commands"])
        if command and (not PLAIN.fullmatch(command) or META & set(command.lower().split())):
            return REFUSED, 0.0, False, {"correct": False, "valid": False, "events": (), "admissible": admissible}
        valid = command in admissible
        self.state, _, over = self.game.step(command or "wait")
        gain = (self.state["score"] - (before["score"] or 0)) / self.state["max_score"]
        won, lost = bool(self.state["won"]), bool(self.state["lost"])
        events = tuple(name for name, is_so in (("scored", gain > 0), ("won", won), ("lost", lost)) if is_so)
        admissible = () if over else tuple(self.state["admissible_commands"])
        info = {"correct": won, "valid": valid, "events": events, "admissible": admissible}
        return _tidy(self.state["feedback"]), gain, bool(over), info

    def expert(self) -> tuple[str, ...]:
        """The commands that win from here; none if the game is over or cannot be won."""
        return tuple(self.state["policy_commands"] or ())

    def close(self) -> None:
        """Ends the interpreter."""
        self.game.close()


@dataclass(frozen=True)
class TextWorldOracle:
    """Knows the commands that win. Steps are commands; the answer is all of them, one a line."""

    world: TextWorld
    notation: str = "natural"
    kinds: tuple[str, ...] = ("left-out", "format")
    styles: tuple[str, ...] = ("plain", "direct")
    """Both are the winning commands, one a line."""

    def solve(self, problem: Problem) -> Solution:
        """(commands, the commands as one text)."""
        found = self._expert(problem, ())
        return found, "\n".join(found)

    def plan(self, problem: Problem, steps: Sequence[str]) -> str | None:
        """The next command of a way to win from here."""
        found = self._expert(problem, steps)
        return found[0] if found else None

    def check_step(self, problem: Problem, steps: Sequence[str], step: str) -> bool:
        """Whether the command wins or brings winning nearer."""
        before = self._expert(problem, steps)
        return bool(before) and (before == (step,) or 0 < len(self._expert(problem, (*steps, step))) < len(before))

    def parse(self, text: str) -> Solution:
        """Every line is a command."""
        return commands(text), text.strip()

    def explain(self, problem: Problem, text: str) -> str:
        """The first command that does not help."""
        steps = commands(text)
        for i, step in enumerate(steps):
            if not self.check_step(problem, steps[:i], step):
                return f"{step!r} does not help"
        return "the quest is not finished"

    def hints(self, problem: Problem) -> tuple[tuple[str, ...], ...]:
        """How long the quest is, its verbs, then the first command, the first two, ... but not the last."""
        steps, _ = self.solve(problem)
        verbs = ", ".join(step.split()[0] for step in steps)
        shown = tuple(("; ".join(steps[:n]),) for n in range(1, len(steps)))
        return ((f"The quest takes {len(steps)} commands.",), (f"Their verbs: {verbs}.",), *shown)

    def demonstrate(self, problem: Problem, style: str, keys: Keys) -> str:
        """The winning commands."""
        return self.write(problem, self.solve(problem), style, keys).text

    def places(self, problem: Problem, kind: str) -> tuple[int, ...]:
        """Any command."""
        if kind not in self.kinds:
            raise unknown("fault", kind, self.kinds)
        return tuple(range(len(self.solve(problem)[0])))

    def work(self, problem: Problem, faults: Mapping[int, str], keys: Keys) -> Solution:
        """The winning commands; in place of those in `faults` one that does nothing, or is none."""
        steps = list(self.solve(problem)[0])
        for i, kind in faults.items():
            idle = ("look", "inventory")[int(keys.at("slip", i).numpy().integers(2))]
            steps[i] = idle if kind == "left-out" else f"please {steps[i].upper()}?"
        return tuple(steps), "\n".join(steps)

    def write(self, problem: Problem, solution: Solution, style: str, keys: Keys) -> Demonstration:
        """One command a line. Raises UserError for a style that is not one of `styles`."""
        if style not in self.styles:
            raise unknown("style", style, self.styles)
        steps, text = solution
        ends = list(accumulate(len(step) + 1 for step in steps))
        spans = tuple(((end - len(step) - 1, end - 1),) for step, end in zip(steps, ends, strict=True))
        return Demonstration(text, (*spans, ((0, len(text)),)))

    def _expert(self, problem: Problem, steps: Sequence[str]) -> tuple[str, ...]:
        """The commands that win after `steps`."""
        env = self.world.env(problem)
        replay(steps, env)
        found = env.expert()
        env.close()
        return found


def commands(text: str) -> tuple[str, ...]:
    """The commands of a text, one a line; a leading ">" is a prompt."""
    lines = (line.strip().removeprefix(">").strip() for line in text.splitlines())
    return tuple(line for line in lines if line)


def game_file(options: Mapping[str, Any]) -> Path:
    """The compiled game of a problem's options, made if nobody has made it.

    Safe with many threads and processes: a game is made aside and moved into place. Games live under
    $ETUDE_CACHE (else ~/.cache/etude) in `textworld`.
    """
    textworld = _textworld()
    key = json.dumps({**options, "version": textworld.__version__}, sort_keys=True)
    home = cache_folder() / "textworld"
    path = home / f"{blake2b(key.encode(), digest_size=10).hexdigest()}.z8"
    if path.exists():
        return path
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"textworld: games cannot be kept in {home} ({error.strerror}): set ETUDE_CACHE") from None
    with _GENERATOR:
        game, settings = _generate(textworld, options)
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        settings.path = scratch + os.sep
        made = Path(textworld.generator.compile_game(game, settings))
        for suffix in (".json", ".z8"):  # the game last: where it is, its description is too
            os.replace(made.with_suffix(suffix), path.with_suffix(suffix))
    return path


def _generate(textworld: Any, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """(game, settings) of the first seed whose game belongs to the problem's split: half of all games,
    by the hash of their map, things and quest, are test games."""
    for attempt in range(TRIES):
        draw = Keys(options["seed"]).at("game", attempt).numpy()
        settings = textworld.GameOptions()
        settings.kb = _knowledge()
        settings.nb_rooms, settings.nb_objects = options["rooms"], options["objects"]
        settings.quest_length = options["quest"]
        parts = ("map", "objects", "quest", "grammar")
        settings.seeds = {part: int(s) for part, s in zip(parts, draw.integers(2**16, size=4), strict=True)}
        try:
            game = textworld.generator.make_game(settings)
        except textworld.generator.QuestGenerationError:
            continue  # no quest of this length starts from this map
        goals = [str(action) for q in game.quests for event in q.win_events for action in event.actions]
        content = "\n".join(sorted(map(str, game.world.facts)) + goals)
        if SPLITS[blake2b(content.encode(), digest_size=1).digest()[0] % 2] == options["split"]:
            return game, settings
    raise UserError(f"textworld: no game in {TRIES} tries for {dict(options)}: allow more rooms or objects")


@lru_cache(maxsize=1)
def _knowledge() -> Any:
    """The rules and words of games; reading them takes half a second."""
    from textworld.generator.data import KnowledgeBase

    return KnowledgeBase.load()


def _textworld() -> Any:
    try:
        import textworld
        import textworld.generator
    except ImportError:
        raise missing("textworld", "textworld", "the world 'textworld'") from None
    # The interpreter says of every game not in its list of commercial ones that it lacks a score.
    warnings.filterwarnings("ignore", message="Game '.*' is not fully supported")
    return textworld


def _tidy(text: str) -> str:
    """Feedback without the banner, the status line, the closing menu and superfluous blank lines."""
    text = text.partition("Would you like to RESTART")[0]
    lines = [line.strip() for line in text.splitlines()]
    kept = [line for line in lines if not line.startswith(">") and not re.fullmatch(r"[\s|\\/$_>]+", line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()
