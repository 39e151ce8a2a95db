"""Group RL: any registered curriculum, acting strategy, reward, selector, credit rule and objective that fit together.

Not a published method but the loop that many of them share: draw problems, answer each several times, judge, select,
give credit, update. `etude train group-rl --curriculum easy-to-hard --objective dapo --credit rloo` runs a combination;
one that cannot be right is refused in a line before anything runs.
"""

from __future__ import annotations

from etude.learning.group_rl import GroupRL, group_rl
from etude.methods.method import Method

METHOD = Method("group-rl", GroupRL, group_rl)
