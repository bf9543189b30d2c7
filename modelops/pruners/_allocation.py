"""How many channels every group loses: the same share of each, or more where more is gained for the error.

Errors are told by the scores of channels: those of least score go first, and what a group has spent is the sum of the
scores that it lost. Scores of different groups are compared where the allocation asks for it, so they have to be
shares: of what a weight carries, or of the variance of what its readers make.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from modelops.pruners._costs import Cost
from modelops.pruners._groups import Anatomy, Group

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Mask = NDArray[np.bool_]
    Scores = NDArray[np.float64]

Allocation = Literal["uniform", "global", "latency"]

#: No group loses more than this share: what is left would carry nothing.
MOST = 0.95
_STEPS = 256
# Blocks that a group is cut in, at most, when groups compete.
_BLOCKS = 48


def step_of(group: Group, round_to: int) -> int:
    """How many channels of a group go at a time, so that the sizes that are left are multiples of ``round_to``."""
    return round_to // math.gcd(round_to, group.width)


def kept_of(group: Group, share: float, round_to: int) -> int:
    """How many channels of a group stay when ``share`` of them should go: a multiple of the step, the nearest."""
    step = step_of(group, round_to)
    if group.size <= step:
        return group.size
    wanted = group.size * (1 - share) / step
    return min(group.size, max(step, math.floor(wanted + 0.5) * step))


def gone_of(anatomy: Anatomy, score: Scores, removed: Sequence[int]) -> Mask:
    """The classes that go when every group loses so many channels: those of the least score."""
    import numpy as np

    gone = np.zeros(anatomy.classes, bool)
    for group, count in zip(anatomy.groups, removed, strict=True):
        order = np.argsort(score[group.classes], kind="stable")
        gone[group.classes[order[:count]]] = True
    return gone


def uniform(
    anatomy: Anatomy,
    score: Scores,
    cost: Cost,
    target: float,
    round_to: int,
    among: Sequence[int] | None = None,
    start: Sequence[int] | None = None,
) -> list[int]:
    """By group, how many channels go so that at most ``target`` of the cost is left: the same share of each.

    Where rounding leaves too much in one group, others make up for it. ``among`` are the groups that may be cut; the
    others lose what ``start`` says.
    """
    groups = anatomy.groups
    mine = set(range(len(groups)) if among is None else among)
    others = start or [0] * len(groups)

    def removed(number: int) -> list[int]:
        share = MOST * number / _STEPS
        return [
            group.size - kept_of(group, share, round_to) if k in mine else others[k] for k, group in enumerate(groups)
        ]

    low, high = 0, _STEPS
    while high - low > 1:
        middle = (low + high) // 2
        if cost.total(removed(middle)) <= target:
            high = middle
        else:
            low = middle
    # Between two steps, groups follow one by one, those whose next channels weigh least first.
    current, final = removed(low), removed(high)
    order = sorted(range(len(groups)), key=lambda k: _lost(groups[k], score, current[k], final[k]))
    for k in order:
        if cost.total(current) <= target:
            break
        current[k] = final[k]
    return current


def _lost(group: Group, score: Scores, before: int, after: int) -> float:
    """The share of a group's score that goes with its next channels."""
    import numpy as np

    values = np.sort(score[group.classes])
    return float(values[before:after].sum() / max(values.sum(), 1e-300))


def competing(
    anatomy: Anatomy,
    score: Scores,
    cost: Cost,
    target: float,
    round_to: int,
    among: Sequence[int] | None = None,
    guide: Cost | None = None,
    start: Sequence[int] | None = None,
) -> list[int]:
    """By group, how many channels go so that at most ``target`` of the cost is left, at the least loss of score.

    Block after block goes where it saves most, of the cost or of another one that guides, for the score that it takes.
    ``among`` are the groups that may be cut; the others lose what ``start`` says.
    """
    import numpy as np

    groups = anatomy.groups
    spent = [np.concatenate([[0.0], np.cumsum(np.sort(score[group.classes]))]) for group in groups]
    removed = list(start or [0] * len(groups))
    blocks = [0] * len(groups)
    worth = [-1.0] * len(groups)
    guide = guide or cost
    left, least = cost.total(removed), 1e-6 * abs(guide.total([0] * len(groups)))

    def look(k: int) -> None:
        """The next block of a group, and what it saves for the score that it takes."""
        blocks[k] = _next_block(groups[k], removed[k], round_to)
        if blocks[k] == 0:
            worth[k] = -1.0
            return
        error = float(spent[k][removed[k] + blocks[k]] - spent[k][removed[k]])
        # Where timing saw no gain, error alone decides.
        worth[k] = max(guide.gain(removed, k, blocks[k]), least) / max(error, 1e-12)

    mine = list(range(len(groups)) if among is None else among)
    for k in mine:
        look(k)
    while left > target:
        best = max(mine, key=lambda k: worth[k], default=None)
        if best is None or worth[best] <= 0:
            break
        left -= cost.gain(removed, best, blocks[best])
        removed[best] += blocks[best]
        for k in guide.neighbours(best) & set(mine):
            look(k)
    return removed


def _next_block(group: Group, removed: int, round_to: int) -> int:
    """How many channels go next; 0 when no more may."""
    step = step_of(group, round_to)
    size = step * max(1, -(-group.size // (_BLOCKS * step)))
    left = group.size - removed
    after = (left - 1) // size * size  # the next lower multiple
    least = max(step, math.ceil((1 - MOST) * group.size))
    return left - after if after >= least else 0
