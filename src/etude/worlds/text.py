"""What a text says: its final answer, its numbers."""

from __future__ import annotations

import re
from fractions import Fraction

SUFFIX = "Think step by step if you need to, then give only the final answer between <answer> and </answer>."

_TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)
_SAID = re.compile(r"\banswer(?: is)?\s*[:=]\s*(.+)", re.IGNORECASE)
_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?"
_NUMBERS = re.compile(rf"(?P<top>{_NUMBER})(?:\s*/\s*(?P<bottom>\d+(?:\.\d+)?))?")
LONGEST_NUMBER = 400  # characters


def extract_answer(text: str, lines: int = 1, numeric: bool = False) -> str:
    r"""The final answer in `text`: the last of, in this order, <answer>...</answer>, \boxed{...},
    "Answer: ...", or else the last `lines` lines; of these, where the answer is to be `numeric`, the last
    number ("1 + 6 + 4 = 11" answers "11"). Without white space and emphasis around it."""
    tagged = _TAGGED.findall(text)
    if tagged:
        return tagged[-1].strip()
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    said = _SAID.findall(text)
    if said and lines == 1:
        return said[-1].strip().strip("*$`").strip()
    closing = "\n".join(text.strip().splitlines()[-lines:]).strip()
    numbers: list[str] = re.findall(_NUMBER, closing) if numeric else []
    return numbers[-1].rstrip(".") if numbers else closing


def is_number(text: str) -> bool:
    """Whether `text` is a number and nothing else."""
    return re.fullmatch(_NUMBER, text.strip()) is not None


def squash(text: str) -> str:
    """The text with every run of white space as one blank."""
    return " ".join(text.split())


def number(text: str) -> Fraction | None:
    """The number that `text` is, or else the last one in it: "1,234.5", "-3/4", "2e-3", "so 7 apples".
    None if there is none (or it is longer than 400 characters)."""
    matches = list(_NUMBERS.finditer(text.replace("\u2212", "-")))
    if not matches or len(matches[-1].group()) > LONGEST_NUMBER:
        return None
    found = matches[-1]
    value = Fraction(found["top"].replace(",", "").rstrip("."))
    bottom = Fraction(found["bottom"] or 1)
    return value / bottom if bottom else None


def _last_boxed(text: str) -> str | None:
    r"""What stands in the braces of the last \boxed{...}, which may hold braces itself."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    tail = text[start + len(r"\boxed{") :]
    depth = 1
    for i, c in enumerate(tail):
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return tail[:i]
    return tail
