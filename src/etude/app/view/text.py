"""Text and numbers as pages show them."""

from __future__ import annotations

import json
import math
import time
import unicodedata
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from etude.lab.axes import short

BRIEF = 160  # characters of a text in a list
SHARES = ("accuracy", "pass@", "majority@")


def visible(text: str) -> str:
    """Text in which control and direction characters are written out, so that none can disguise the rest."""
    if text.isprintable():
        return text
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in hidden else f"\\u{ord(c):04x}" for c in text)


def plainly_visible(value: Any) -> Any:
    """What every expression of a template passes through, unless it is markup already."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def brief(text: Any) -> str:
    """The beginning of a text, or of a chat, on one line."""
    if not isinstance(text, str):
        text = " / ".join(f"{m['role']}: {m['content']}" for m in text)
    line = " ".join(text[: 2 * BRIEF].split())
    return line if len(line) <= BRIEF else f"{line[: BRIEF - 1]}…"


def is_share(metric: str) -> bool:
    """Whether a metric is a share, shown as a percentage."""
    return metric.startswith(SHARES)


def value(number: float | None, metric: str = "") -> str:
    """A number of a metric."""
    if number is None or math.isnan(number):
        return "–"
    return f"{100 * number:.1f}%" if is_share(metric) else short(number)


def summed(e: Mapping[str, Any] | None) -> str:
    """An evaluation with its interval."""
    if e is None:
        return "–"
    found, low, high = (value(e[k], e["metric"]) for k in ("value", "low", "high"))
    return f"{found} [{low}, {high}]"


def when(seconds: float) -> str:
    """Local time."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def plain(data: Any) -> str:
    """Data as JSON; a text as it is."""
    return data if isinstance(data, str) else json.dumps(data, indent=1, default=str, ensure_ascii=False)


FILTERS = {"brief": brief, "value": value, "summed": summed, "when": when, "plain": plain}
