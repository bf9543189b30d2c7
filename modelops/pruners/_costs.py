"""What a network costs when its groups lose channels: channels, multiply-accumulates, or time.

A cost is a sum of terms, each of which depends on few groups, so that what a cut of one group saves is quickly told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelops.pruners._groups import Anatomy, Group
from modelops.pruners._macs import products

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: By group, how many of its channels go.
Removed = Sequence[int]


@dataclass(frozen=True)
class Term:
    """A part of the cost, and the numbers of the groups that it depends on."""

    groups: tuple[int, ...]
    value: Callable[[Removed], float]


class Cost:
    """A sum of terms."""

    def __init__(self, terms: Iterable[Term]) -> None:
        self.terms = tuple(terms)
        self._of: dict[int, list[Term]] = {}
        for term in self.terms:
            for group in term.groups:
                self._of.setdefault(group, []).append(term)

    def total(self, removed: Removed) -> float:
        return sum(term.value(removed) for term in self.terms)

    def gain(self, removed: Removed, group: int, more: int) -> float:
        """What is saved when this group loses so many channels more."""
        after = list(removed)
        after[group] += more
        return sum(term.value(removed) - term.value(after) for term in self._of.get(group, ()))

    def neighbours(self, group: int) -> set[int]:
        """The groups whose gains change when this one is cut."""
        return {other for term in self._of.get(group, ()) for other in term.groups}


class Sizes:
    """The sizes of axes by how many channels every group has lost."""

    def __init__(self, anatomy: Anatomy) -> None:
        import numpy as np

        self.anatomy = anatomy
        self._base = [axis.size for axis in anatomy.axes.axes]
        self._lost: list[list[tuple[int, int]]] = [[] for _ in self._base]
        group_of = np.full(anatomy.classes, -1)
        for number, group in enumerate(anatomy.groups):
            group_of[group.classes[:1]] = number  # all classes of a group touch the same axes as often
        owners = group_of[anatomy.class_of] if len(anatomy.class_of) else np.zeros(0, int)
        mine = owners >= 0
        pairs, counts = np.unique(np.stack([anatomy.owner_of[mine], owners[mine]]), axis=1, return_counts=True)
        for (axis, number), count in zip(pairs.T.tolist(), counts.tolist(), strict=True):
            self._lost[axis].append((number, count))

    def groups(self, axis: int) -> tuple[int, ...]:
        """The groups that an axis loses positions to."""
        return tuple(number for number, _ in self._lost[axis])

    def of(self, axis: int, removed: Removed) -> int:
        """The size of an axis."""
        return self._base[axis] - sum(count * removed[number] for number, count in self._lost[axis])


def channel_cost(anatomy: Anatomy, groups: Iterable[int]) -> Cost:
    """How many channels these groups have."""

    def term(number: int, group: Group) -> Term:
        return Term((number,), lambda removed: channels_of(group, group.size - removed[number]))

    return Cost(term(number, anatomy.groups[number]) for number in groups)


def channels_of(group: Group, count: int | None = None) -> float:
    """How many positions the weights of a group's makers have, for so many of its channels (all)."""
    return (group.size if count is None else count) * group.width * len(group.makers)


def mac_cost(anatomy: Anatomy) -> Cost:
    """Multiply-accumulates per sample."""
    sizes = Sizes(anatomy)
    terms = []
    for product in products(anatomy.network):
        numbers, factor = [], float(product.rest) / anatomy.network.rows
        for place, size in zip(product.places, product.sizes, strict=True):
            axis = anatomy.axes.of(place)
            if axis is None:
                factor *= size
            else:
                numbers.append(axis.number)
        terms.append(_product_term(sizes, factor, numbers))
    return Cost(terms)


def _product_term(sizes: Sizes, factor: float, numbers: Sequence[int]) -> Term:
    def value(removed: Removed) -> float:
        found = factor
        for number in numbers:
            found *= sizes.of(number, removed)
        return found

    return Term(tuple(sorted({group for number in numbers for group in sizes.groups(number)})), value)


def removed_of(anatomy: Anatomy, gone: NDArray[np.bool_]) -> list[int]:
    """By group, how many of its channels are among the classes that go."""
    return [int(gone[group.classes].sum()) for group in anatomy.groups]
