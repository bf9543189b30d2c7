"""How many channels every group loses: the same share of each, as far as rounding lets it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from modelops.pruners._groups import Anatomy, Group
from modelops.pruners._macs import MacCounter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Mask = NDArray[np.bool_]

#: No group loses more than this share: what is left would carry nothing.
MOST = 0.95
_STEPS = 256


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


def by_share(anatomy: Anatomy, score: NDArray[np.float64], share: float, round_to: int) -> Mask:
    """The classes that go when every group loses this share, those of the least score first.

    Where rounding leaves too much in one group, others make up for it.
    """
    wide = [group for group in anatomy.groups if group.size > step_of(group, round_to)]

    def left(gone: Mask) -> float:
        return sum(_channels(group) * float((~gone[group.classes]).mean()) for group in wide)

    return _least(anatomy, score, round_to, left, (1 - share) * sum(map(_channels, wide)))


def by_macs(anatomy: Anatomy, score: NDArray[np.float64], left: float, round_to: int) -> Mask:
    """The classes that go so that at most ``left`` of the multiply-accumulates remain, or as few as can be reached."""
    counter = MacCounter(anatomy)
    return _least(anatomy, score, round_to, counter.count, left * counter.count())


def _channels(group: Group) -> int:
    """How many positions the weights of a group's makers have."""
    return group.size * group.width * len(group.makers)


def _least(
    anatomy: Anatomy, score: NDArray[np.float64], round_to: int, left: Callable[[Mask], float], target: float
) -> Mask:
    """The smallest equal share of every group with which no more than ``target`` is left."""

    def counts(number: int) -> list[int]:
        return [kept_of(group, MOST * number / _STEPS, round_to) for group in anatomy.groups]

    low, high = 0, _STEPS
    while high - low > 1:
        middle = (low + high) // 2
        if left(_gone(anatomy, score, counts(middle))) <= target:
            high = middle
        else:
            low = middle
    # Between two steps, groups follow one by one, those whose next channels weigh least first.
    current, final = counts(low), counts(high)
    order = sorted(range(len(current)), key=lambda k: _lost(anatomy.groups[k], score, current[k], final[k]))
    gone = _gone(anatomy, score, current)
    for k in order:
        if left(gone) <= target:
            break
        current[k] = final[k]
        gone = _gone(anatomy, score, current)
    return gone


def _lost(group: Group, score: NDArray[np.float64], before: int, after: int) -> float:
    """The share of a group's score that goes with its next channels."""
    import numpy as np

    values = np.sort(score[group.classes])
    return float(values[group.size - before : group.size - after].sum() / max(values.sum(), 1e-300))


def _gone(anatomy: Anatomy, score: NDArray[np.float64], kept: Sequence[int]) -> Mask:
    import numpy as np

    gone = np.zeros(anatomy.classes, bool)
    for group, count in zip(anatomy.groups, kept, strict=True):
        order = np.argsort(score[group.classes], kind="stable")
        gone[group.classes[order[: group.size - count]]] = True
    return gone
