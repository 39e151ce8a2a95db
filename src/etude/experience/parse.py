r"""Text that models write, taken apart: tags, answers, verdicts, tool calls.

Nothing here raises on any text, and all of it takes time linear in the text's length. Spans are
character offsets into the text that was parsed: `text[start:end]` is what the field was read from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Span = tuple[int, int]


@dataclass(frozen=True)
class Parsed:
    """What was found. `fields` holds every occurrence of a field in order, `spans` where each stood.

    `ok` says whether the text has the form that was asked for, `why` in one line what it lacks.
    """

    fields: Mapping[str, tuple[Any, ...]]
    spans: Mapping[str, tuple[Span, ...]]
    ok: bool
    why: str = ""

    def last(self, name: str, default: Any = None) -> Any:
        """The last occurrence of a field; `default` if there is none."""
        found = self.fields.get(name)
        return found[-1] if found else default


def parse(text: str, tags: Sequence[str] = ("think", "answer")) -> Parsed:
    """XML-like tags: the text between `<name>` and `</name>` for each of `tags`, stripped of white space.

    `ok` asks for every tag exactly once, closed, and in the order of `tags`, as rewards for format do;
    the fields hold whatever was found all the same. An opening tag that is opened again before it is
    closed is dropped. Attributes are allowed and ignored.
    """
    found: dict[str, list[Span]] = {name: [] for name in tags}
    opened: dict[str, int] = {}
    faults: list[str] = []
    for match in re.finditer(rf"<(/?)({'|'.join(map(re.escape, tags))})(?:\s[^<>]*)?>", text) if tags else ():
        closes, name = match.groups()
        if not closes:
            if name in opened:
                faults.append(f"<{name}> is opened again before it is closed")
            opened[name] = match.end()
        elif name in opened:
            found[name].append(_strip(text, opened.pop(name), match.start()))
        else:
            faults.append(f"</{name}> closes nothing")
    faults += [f"<{name}> is not closed" for name in opened]
    faults += [f"<{name}> is missing" for name in tags if not found[name] and name not in opened]
    faults += [f"<{name}> comes {len(spans)} times" for name, spans in found.items() if len(spans) > 1]
    if not faults:
        ends = [found[name][0] for name in tags]
        faults = [
            f"<{b}> does not follow </{a}>"
            for a, b, (_, end), (start, _) in zip(tags, tags[1:], ends, ends[1:], strict=False)
            if start < end
        ]
    return _parsed(text, found, faults)


def answer(text: str) -> Parsed:
    r"""The final answer, in the field `answer`: the last of `<answer>...</answer>`, else the last
    `\boxed{...}`, else what follows the last "answer:" or "answer is" on its line. A box within the
    tag or line is opened."""
    tagged = parse(text, ("answer",))
    if tagged.spans["answer"]:
        span = tagged.spans["answer"][-1]
        span = _boxed(text, *span) or span
    else:
        marked = _boxed(text, 0, len(text)) or _marked(text)
        if marked is None:
            return Parsed({}, {}, False, r"no <answer>, \boxed{} or 'Answer:'")
        span = marked
    why = "" if span[1] > span[0] else "the answer is empty"
    return _parsed(text, {"answer": [span]}, [why] if why else [])


def verdict(text: str, words: Sequence[str] = ("correct", "wrong")) -> Parsed:
    """A judge's verdict, one of `words`, in the field `verdict`: the last to stand as a whole word (in
    any case) in the answer (see `answer`) or what follows "verdict:", else in the whole text.

    `ok` asks for one verdict only in the place where it was found.
    """
    place = answer(text).spans.get("answer", ((0, len(text)),))[-1]
    for match in re.finditer(r"(?i)\bverdict\b[*_]*(?:[ \t]+is\b|[ \t]*[:=])", text):
        place = (match.end(), len(text))
    known = {w.lower(): w for w in words}
    pattern = rf"(?i)(?<![\w-])(?:{'|'.join(map(re.escape, words))})(?!\w)"
    for start, end in (place, (0, len(text))):
        matches = list(re.compile(pattern).finditer(text, start, end)) if words else []
        if matches:
            values = tuple(known.get(m.group().lower(), m.group()) for m in matches)
            distinct = len(set(values)) == 1
            why = "" if distinct else f"{len(set(values))} different verdicts"
            return Parsed({"verdict": values}, {"verdict": tuple(m.span() for m in matches)}, distinct, why)
    return Parsed({}, {}, False, f"none of {', '.join(words)}")


def tool_calls(text: str) -> Parsed:
    """Calls of tools: JSON objects with a `name` and `arguments` (or `parameters`; an object, or an
    object as a string), wherever they stand: bare, in a fence, in a tag.

    The fields `name` and `arguments` run in parallel. `ok` asks for at least one call and for no
    object that has a name but cannot be called.
    """
    names: list[str] = []
    arguments: list[dict[str, Any]] = []
    spans: list[Span] = []
    faults: list[str] = []
    for start, end in _objects(text):
        value = _json(text[start:end])
        if not isinstance(value, dict) or "name" not in value:
            continue
        given = value.get("arguments", value.get("parameters", {}))
        given = _json(given) if isinstance(given, str) else given
        if not isinstance(value["name"], str) or not isinstance(given, dict):
            faults.append(f"the call at character {start} needs a name and an object of arguments")
            continue
        names.append(value["name"])
        arguments.append(given)
        spans.append((start, end))
    if not names and not faults:
        faults.append("no JSON object with a name and arguments")
    where = tuple(spans)
    return Parsed(
        {"name": tuple(names), "arguments": tuple(arguments)},
        {"name": where, "arguments": where},
        not faults,
        faults[0] if faults else "",
    )


def shows(text: str, answer: str) -> bool:
    """Whether `answer` can be read in `text`, as a word or number of its own: "4" in "c = 4", not in "14" or "-4"."""
    return bool(answer) and re.search(rf"(?<![\w-]){re.escape(answer)}(?!\w)", text) is not None


def _parsed(text: str, found: Mapping[str, Sequence[Span]], faults: Sequence[str]) -> Parsed:
    return Parsed(
        {name: tuple(text[a:b] for a, b in spans) for name, spans in found.items()},
        {name: tuple(spans) for name, spans in found.items()},
        not faults,
        faults[0] if faults else "",
    )


def _strip(text: str, start: int, end: int, chars: str | None = None) -> Span:
    """The span without white space (or `chars`) at its ends."""
    part = text[start:end]
    kept = part.lstrip(chars)
    start += len(part) - len(kept)
    return start, start + len(kept.rstrip(chars))


def _boxed(text: str, start: int, end: int) -> Span | None:
    r"""The inside of the `\boxed{}` that closes last, braces balanced; None if none does."""
    last: Span | None = None
    open_braces: list[int | None] = []  # for each open brace, where a box's inside begins
    for match in re.compile(r"\\boxed\s*\{|\\[{}\\]|[{}]").finditer(text, start, end):
        token = match.group()
        if token.startswith("\\boxed"):
            open_braces.append(match.end())
        elif token == "{":
            open_braces.append(None)
        elif token == "}" and open_braces:
            inside = open_braces.pop()
            if inside is not None:
                last = _strip(text, inside, match.start())
    return last


def _marked(text: str) -> Span | None:
    """What follows the last "answer:" or "answer is", up to the end of its line or of the next one
    that is not empty; without markup and a final full stop."""
    marks = list(re.finditer(r"(?i)\banswer\b[*_]*(?:[ \t]+is\b[ \t]*:?|[ \t]*[:=])[*_]*", text))
    if not marks:
        return None
    start = marks[-1].end()
    start = len(text) - len(text[start:].lstrip())
    newline = text.find("\n", start)
    start, end = _strip(text, start, len(text) if newline < 0 else newline, " \t\r\f\v*_$")
    return (start, end - 1) if text[start:end].endswith(".") else (start, end)


def _objects(text: str) -> list[Span]:
    """The outermost balanced `{...}`, in order. Braces in JSON strings do not count; an opening brace
    that is never closed hides nothing that follows it on a later line."""
    opened: list[int] = []
    found: list[Span] = []
    in_string = False
    for match in re.finditer(r'\\.|["{}\n]', text):
        token = match.group()
        if token == "\n":
            in_string = False  # a JSON string has no line break: this was a quotation mark in prose
        elif token == '"':
            in_string = bool(opened) and not in_string
        elif token == "{" and not in_string:
            opened.append(match.start())
        elif token == "}" and not in_string and opened:
            start = opened.pop()
            while found and found[-1][0] > start:
                found.pop()
            found.append((start, match.end()))
    return found


def _json(text: str) -> Any:
    """The value of a JSON text; None where it is not one."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
