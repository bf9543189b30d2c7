"""Ranks channels by what can't be made up for: one after another goes, and those that are left stand in for it.

A weight that reads channels and is refitted after a cut loses only what the others can't tell. With H the inverse of
the inputs' second moments, taking the inputs S away costs tr(W_Sᵀ (H_SS)⁻¹ W_S) at best (the Optimal Brain Surgeon,
Hassibi and Stork 1993; for whole structures ZipLM, Kurtic et al. 2023). After every round the weight is refitted and H
updated, so that of two channels that say the same only one is cheap.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modelops.core.ahead import ahead
from modelops.core.blas import invert_triangle, one_blas_thread
from modelops.core.progress import progress
from modelops.graphs.batches import BatchAxis
from modelops.pruners._activations import Moments
from modelops.pruners._allocation import MOST
from modelops.pruners._equations import Sums
from modelops.pruners._flight import Feed, Flight, small
from modelops.pruners._groups import Anatomy, Group
from modelops.pruners._refits import MOST_UNKNOWNS, Refit, Rows, refits, rows_wanted
from modelops.pruners._segments import Parts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Scores = NDArray[np.float64]

# Rounds in which a group is taken apart; in each, the channels that cost least go together.
_ROUNDS = 48
# Added to the second moments, as a share of each: what few samples tell is not relied on.
_DAMPING = 1e-2
# Weights whose moments are collected in one go, and groups that are taken apart side by side: each holds matrices.
_AT_ONCE = 4
_GROUPS_AT_ONCE = 2


def reconstruction(
    anatomy: Anatomy, fallback: Scores, batches: Iterable[Feed], axis: BatchAxis, scratch: Path
) -> Scores:
    """The share of the variance of its readers' outputs that is lost for good with each class, in the order of loss.

    Groups that no weight reads that could be refitted keep their ``fallback``.
    """
    score = fallback.copy()
    readers = _readers(anatomy)
    used = {reader for row in readers for reader in row}
    moments = _Moments(
        anatomy, [refit for refit in refits(Parts(anatomy.network.model)) if str(refit.node.name) in used]
    )
    with one_blas_thread():
        moments.collect(batches, axis, scratch)

        def taken_apart(item: tuple[Group, list[str]]) -> Scores | None:
            group, names = item
            states = [state for name in names if (state := moments.state(name, group)) is not None]
            return _taken_apart(group, states) if states and group.size > 1 else None

        found = ahead(taken_apart, zip(anatomy.groups, readers, strict=True), _GROUPS_AT_ONCE)
        for number, (group, costs) in enumerate(zip(anatomy.groups, found, strict=True)):
            progress("ranking by reconstruction", number, len(anatomy.groups))
            if costs is not None:
                score[group.classes] = costs
    progress("ranking by reconstruction", len(anatomy.groups), len(anatomy.groups))
    moments.close()
    return score


def _readers(anatomy: Anatomy) -> list[list[str]]:
    """By group, the names of the nodes whose weights are summed over its channels."""
    import numpy as np

    group_of = np.full(anatomy.classes, -1)
    for number, group in enumerate(anatomy.groups):
        group_of[group.classes] = number
    found: list[list[str]] = [[] for _ in anatomy.groups]
    for axis in anatomy.axes.axes:
        if axis.role == "in" and axis.place.use is not None and axis.place.use[1] == 1:
            for number in np.unique(group_of[anatomy.class_of[axis.labels]]):
                if number >= 0:
                    found[number].append(str(axis.place.use[0].name))
    return found


def _taken_apart(group: Group, states: list[State]) -> Scores:
    """What each class of a group costs when its turn comes; never less than those before it."""
    import numpy as np

    score = np.zeros(group.size)
    left = np.arange(group.size)
    least = max(1, math.ceil((1 - MOST) * group.size))
    block = max(1, group.size // _ROUNDS)
    level = 0.0
    while True:
        costs = np.sum([state.costs(left) for state in states], axis=0)
        order = np.argsort(costs, kind="stable")
        count = len(left) if len(left) <= least else min(block, len(left) - least)
        for place in order[:count]:
            level = max(level, float(costs[place]))
            score[left[place]] = level
        if count == len(left):
            return score
        for state in states:
            state.remove(left[order[:count]])
        left = np.delete(left, order[:count])


@dataclass
class State:
    """A weight that reads a group: the inverse moments of its inputs, itself, and which inputs each class takes."""

    inverse: NDArray[np.float64]
    weight: NDArray[np.float64]
    inputs: NDArray[np.int64]
    variance: float

    def costs(self, classes: NDArray[np.int64]) -> Scores:
        """The share of the output's variance that is lost when one of these classes goes, each by itself."""
        import numpy as np

        taken = self.inputs[classes]
        blocks = self.inverse[taken[:, :, None], taken[:, None, :]]
        mine = self.weight[taken]
        found: Scores = np.einsum("cio,cio->c", mine, np.linalg.solve(blocks, mine)) / self.variance
        return found

    def remove(self, classes: NDArray[np.int64]) -> None:
        """Take the classes out, and refit what is left."""
        import numpy as np

        taken = self.inputs[classes].reshape(-1)
        rest = np.delete(np.arange(len(self.inverse)), taken)
        cross = self.inverse[np.ix_(taken, rest)]
        solved = np.linalg.solve(self.inverse[np.ix_(taken, taken)], np.hstack([self.weight[taken], cross]))
        outputs = self.weight.shape[1]
        self.weight = self.weight[rest] - cross.T @ solved[:, :outputs]
        self.inverse = self.inverse[np.ix_(rest, rest)]
        self.inverse -= cross.T @ solved[:, outputs:]
        places = np.zeros(len(taken) + len(rest), np.int64)
        places[rest] = np.arange(len(rest))
        self.inputs = places[self.inputs]


def _inverse(moment: NDArray[np.float64]) -> NDArray[np.float64]:
    """That of second moments, damped: more where they are rounded so much that they have none."""
    import numpy as np

    diagonal = np.arange(len(moment))
    plain = np.maximum(moment[diagonal, diagonal], 0.0)
    damping = _DAMPING
    while True:
        moment[diagonal, diagonal] = (1 + damping) * plain + 1e-5 * damping * float(plain.mean())
        try:
            triangle = np.linalg.cholesky(moment)
        except np.linalg.LinAlgError:
            damping *= 10
            continue
        invert_triangle(triangle)
        found: NDArray[np.float64] = triangle.T @ triangle
        return found


class _Moments:
    """Second moments of what weights read, collected in one pass over the samples and kept on disk."""

    def __init__(self, anatomy: Anatomy, todo: list[Refit]) -> None:
        self._anatomy = anatomy
        self._todo = {str(refit.node.name): refit for refit in todo if len(refit.matrix()) <= MOST_UNKNOWNS}
        self._folder = Path()
        self._variances: dict[str, float] = {}

    def collect(self, batches: Iterable[Feed], axis: BatchAxis, scratch: Path) -> None:
        import numpy as np

        self._folder = scratch / "moments"
        self._folder.mkdir()
        flight = Flight(Parts(self._anatomy.network.model), scratch / "activations")
        flight.start(small(batches, axis))
        items = list(self._todo.values())
        for first in range(0, len(items), _AT_ONCE):
            progress("looking at activations", first, len(items))
            some = items[first : first + _AT_ONCE]
            for refit, (moment, variance) in zip(some, _collected(flight, some), strict=True):
                np.save(self._place(str(refit.node.name)), moment, allow_pickle=False)
                self._variances[str(refit.node.name)] = variance
        shutil.rmtree(scratch / "activations")

    def state(self, name: str, group: Group) -> State | None:
        """The weight of this node as a reader of a group; None where it can't be refitted."""
        import numpy as np

        refit = self._todo.get(name)
        if refit is None:
            return None
        moment = np.load(self._place(name), allow_pickle=False).astype(np.float64)
        weight = refit.matrix().astype(np.float64)
        variance = max(self._variances[name], float(np.sum(weight * (moment @ weight))))
        if not (variance > 0 and moment.diagonal().max() > 0 and np.isfinite(moment).all()):
            return None
        return State(_inverse(moment), weight, self._inputs(refit, group), variance)

    def _place(self, name: str) -> Path:
        return self._folder / f"{list(self._todo).index(name)}.npy"

    def _inputs(self, refit: Refit, group: Group) -> NDArray[np.int64]:
        """(classes, inputs of each): which rows of the weight's matrix each class of the group is."""
        import numpy as np

        axis = next(
            found for found in self._anatomy.axes.axes if found.role == "in" and found.place.use == (refit.node, 1)
        )
        classes = self._anatomy.class_of[axis.labels]
        order = np.argsort(classes, kind="stable")
        starts = np.searchsorted(classes[order], group.classes)
        count = int((classes == group.classes[0]).sum())
        channels = order[starts[:, None] + np.arange(count)]
        per = len(refit.matrix()) // axis.size  # the positions of a filter
        taken: NDArray[np.int64] = (channels[:, :, None] * per + np.arange(per)).reshape(group.size, -1)
        return taken

    def close(self) -> None:
        shutil.rmtree(self._folder)


def _collected(flight: Flight, some: list[Refit]) -> Iterator[tuple[NDArray[np.float32], float]]:
    """For these weights, the second moments of their inputs, and the variance of the sum that their outputs end in.

    Moments are about the mean where a bias can make up for it. Where what a weight makes is only added to something
    larger, an error in it counts for less.
    """
    import numpy as np

    rows = [Rows(refit, -(-rows_wanted(refit) // flight.samples), masked=flight.masked) for refit in some]
    sums = [Sums(len(refit.matrix()) + 1) for refit in some]
    shifts: list[NDArray[np.float32] | None] = [None] * len(some)
    spreads = [Moments() for _ in some]
    wanted = [name for refit in some for name in (refit.reads, str(refit.node.outputs[0].name), refit.ends_in)]

    def told(batch: int, values: Feed) -> list[tuple[NDArray[np.float32], Moments]]:
        found = []
        for refit, places in zip(some, rows, strict=True):
            shape = values[str(refit.node.outputs[0].name)].shape
            x, ends = places.inputs(values[refit.reads], shape), places.outputs(values[refit.ends_in])
            seen = places.seen(shape, flight.masks[batch])
            if seen is not None:
                x, ends = x[seen], ends[seen]
            wide = np.concatenate([x, np.ones((len(x), 1), x.dtype)], axis=1).astype(np.float32)
            found.append((wide, Moments.of(ends, 1)))
        return found

    for batch in flight.advance([str(refit.node.name) for refit in some], list(dict.fromkeys(wanted)), told):
        for k, (wide, spread) in enumerate(batch):
            if not len(wide):  # nothing but padding
                continue
            if some[k].bias is not None:
                # About a value near the mean, so that nothing is lost where that is far larger than what varies.
                shift = shifts[k]
                if shift is None:
                    shift = shifts[k] = np.append(wide[:, :-1].mean(0), 0).astype(np.float32)
                wide -= shift
            sums[k].add(wide, wide[:, :0])
            spreads[k].add(spread)
    for refit, each, spread in zip(some, sums, spreads, strict=True):
        each.join()
        if not each.rows:  # none of its samples shows anything: it is not ranked by
            yield np.zeros((len(each.xx) - 1,) * 2, np.float32), 0.0
            continue
        mean = each.xx[-1, :-1] / each.rows if refit.bias is not None else np.zeros(len(each.xx) - 1)
        moment = (each.xx[:-1, :-1] / each.rows - np.outer(mean, mean)).astype(np.float32)
        yield moment, float(spread.variance().sum())
