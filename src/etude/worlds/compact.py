"""Compact notation: the same problems in a few characters, for policies that read characters.

A prompt ends with "=". A completion is segments parted by ";" (or newlines): any number of steps and,
last, the answer. Where the answer is a number or a word, a last segment "a=b" answers b, so that a
step may be the answer too; in countdown, where it is an expression, "expression=value" answers the
expression. `read` gives the answer in the form that the task's own verifier expects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Entry = Mapping[str, Any]  # question, answer, metadata


@dataclass(frozen=True)
class Notation:
    """`render` writes the prompt without its "="; `write` the reference answer; `read` turns the last
    segment into the verifier's form; `content` is the same for problems that are the same."""

    render: Callable[[Entry], str]
    write: Callable[[Entry], str] = lambda entry: entry["answer"]
    read: Callable[[str], str] = lambda segment: segment.rpartition("=")[2].strip()
    content: Callable[[Entry], str] | None = None


def render(entry: Entry) -> str:
    """The compact prompt, which ends with "="."""
    return NOTATIONS[_task(entry)].render(entry) + "="


def write(entry: Entry) -> str:
    """The reference answer in compact notation."""
    return NOTATIONS[_task(entry)].write(entry)


def read(text: str, entry: Entry) -> str:
    """The answer in a compact completion, as the task's verifier expects it; "" if there is none."""
    return NOTATIONS[_task(entry)].read(last_segment(text))


def content(entry: Entry) -> str:
    """What makes the problem: the same for two entries that differ only in wording or in order."""
    notation = NOTATIONS[_task(entry)]
    return (notation.content or notation.render)(entry)


def last_segment(text: str) -> str:
    """The last segment of a completion that is not blank."""
    segments = [s.strip() for s in re.split(r"[;\n]", text) if s.strip()]
    return segments[-1] if segments else ""


def _task(entry: Entry) -> str:
    return str(entry["metadata"]["source_dataset"])


def _field(name: str) -> Callable[[Entry], str]:
    """A text in the metadata, without blanks."""
    return lambda entry: "".join(str(entry["metadata"][name]).split())


def _list(name: str) -> Callable[[Entry], str]:
    return lambda entry: ",".join(map(str, entry["metadata"][name]))


def _unordered(entry: Entry) -> str:
    return ",".join(map(str, sorted(entry["metadata"]["numbers"])))


def _factors(entry: Entry) -> str:
    return "*".join(sorted(_field("expression")(entry).split("*")))


def _countdown(entry: Entry) -> str:
    return f"{_list('numbers')(entry)}>{entry['metadata']['target']}"


def _equation(entry: Entry) -> str:
    """The equation in x, and what is asked for: "10*x+12=82,x"."""
    equation = re.sub(rf"\b{entry['metadata']['variable']}\b", "x", _field("equation")(entry))
    return f"{equation},x"


def _sorting(entry: Entry) -> str:
    """ "<" asks for ascending, ">" for descending order."""
    sign = "<" if entry["metadata"]["direction"] == "ascending" else ">"
    return sign + ",".join(map(short, entry["metadata"]["original_numbers"]))


def _sorted(entry: Entry) -> str:
    return ",".join(map(short, entry["metadata"]["sorted_numbers"]))


def _read_sorted(segment: str) -> str:
    return str([n.strip() for n in segment.rpartition("=")[2].split(",")])


def short(number: str) -> str:
    """A whole number without its ".0"."""
    return number.removesuffix(".0")


def _puzzle(entry: Entry) -> str:
    """Sudoku rows parted by "/", empty cells as "."."""
    return "/".join("".join(str(n or ".") for n in row) for row in entry["metadata"]["puzzle"])


def _solved(entry: Entry) -> str:
    return "/".join("".join(map(str, row)) for row in entry["metadata"]["solution"])


def _read_solved(segment: str) -> str:
    return "\n".join(" ".join(row.strip()) for row in segment.rpartition("=")[2].split("/"))


def _maze(entry: Entry) -> str:
    """The maze without its outer wall: "#" wall, "." passage, S start, G goal."""
    m = entry["metadata"]
    sign = {m["wall"]: "#", m["path"]: ".", m["start"]: "S", m["goal"]: "G"}
    return "/".join("".join(sign[c] for c in row[1:-1]) for row in m["grid"][1:-1])


def _grid(entry: Entry) -> str:
    sign = {"X": "#", "O": ".", "*": "S", "#": "G"}
    return "/".join("".join(sign[c] for c in row) for row in entry["metadata"]["matrix"])


_WAYS = {"u": "up", "d": "down", "l": "left", "r": "right", "x": "infeasible"}


def _path(entry: Entry) -> str:
    """The moves by their first letters; "x" where there is no way."""
    return "".join(w[0] for w in entry["metadata"]["solution"] or ()) or "x"


def _read_path(segment: str) -> str:
    return " ".join(_WAYS.get(c, c) for c in segment.rpartition("=")[2].strip())


def _letters(entry: Entry) -> str:
    m = entry["metadata"]
    return f"{m['target_letter']}:{' '.join(m['span'])}"


NOTATIONS: dict[str, Notation] = {
    "basic_arithmetic": Notation(_field("expression")),
    "chain_sum": Notation(_field("expression")),
    "countdown": Notation(
        _countdown,
        write=_field("expression"),
        read=lambda segment: segment.partition("=")[0].strip(),
        content=lambda entry: f"{_unordered(entry)}>{entry['metadata']['target']}",
    ),
    "gcd": Notation(lambda entry: f"gcd({_list('numbers')(entry)})", content=_unordered),
    "lcm": Notation(lambda entry: f"lcm({_list('numbers')(entry)})", content=_unordered),
    "letter_counting": Notation(_letters),
    "maze": Notation(_maze),
    "mini_sudoku": Notation(_puzzle, _solved, _read_solved),
    "number_sorting": Notation(_sorting, _sorted, _read_sorted),
    "products": Notation(_field("expression"), content=_factors),
    "shortest_path": Notation(_grid, _path, _read_path),
    "simple_equations": Notation(_equation),
    "spell_backward": Notation(_field("word")),
    "sudoku": Notation(_puzzle, _solved, _read_solved),
}
