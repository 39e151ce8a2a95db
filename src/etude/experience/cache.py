"""Where what can be made again is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$ETUDE_CACHE, or ~/.cache/etude."""
    return Path(os.environ.get("ETUDE_CACHE") or Path.home() / ".cache" / "etude")
