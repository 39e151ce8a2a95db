"""Importing this registers every plug of the shared parts."""

from etude.acting import modes, sample
from etude.curricula import curriculum, schedules
from etude.feedback import advantage, overlong, truncation
from etude.learning import select
from etude.objectives import clipped_pg, distil, nll, pairs, value

__all__ = [
    "advantage",
    "clipped_pg",
    "curriculum",
    "distil",
    "modes",
    "nll",
    "overlong",
    "pairs",
    "sample",
    "schedules",
    "select",
    "truncation",
    "value",
]
