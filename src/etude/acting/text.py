"""Strings in text that is being written, whatever the token boundaries."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

PARTIAL = "\ufffd"  # what the bytes of an unfinished character decode to


def completes(decode: Callable[[Sequence[int]], str], ids: NDArray[np.integer], strings: Sequence[str]) -> bool:
    """Whether the last token of `ids` int32[t], t >= 1, completes one of `strings` in its text.

    Decodes only as much of the end as the longest string can reach back to, so the cost of a token
    does not grow with the text. An occurrence that was complete before does not count.
    """
    reach = max(map(len, strings)) + 3  # a character cut by the window's start decodes to 3 at most
    window = reach
    while len(before := decode(ids[-1 - window : -1].tolist())) < reach and window < len(ids):
        window *= 2
    text = decode(ids[-1 - window :].tolist()).rstrip(PARTIAL)
    known = len(before.rstrip(PARTIAL))
    return any(text.find(s, max(0, known - len(s) + 1)) >= 0 for s in strings)
