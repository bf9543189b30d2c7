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
from typing import TYPE_CHECKING, Any

from modelops.core.blas import one_blas_thread
from modelops.core.progress import progress
from modelops.graphs.batches import BatchAxis
from modelops.pruners._activations import Moments
from modelops.pruners._allocation import MOST
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
_AT_ONCE = 4


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
        for number, (group, names) in enumerate(zip(anatomy.groups, readers, strict=True)):
            progress("ranking by reconstruction", number, len(anatomy.groups))
            states = [state for name in names if (state := moments.state(name, group)) is not None]
            if states and group.size > 1:
                score[group.classes] = _taken_apart(group, states)
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
        columns = self.inverse[:, taken]
        solved = np.linalg.solve(self.inverse[np.ix_(taken, taken)], np.hstack([self.weight[taken], columns.T]))
        outputs = self.weight.shape[1]
        self.weight -= columns @ solved[:, :outputs]
        self.inverse -= columns @ solved[:, outputs:]


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
        if not variance > 0:
            return None
        diagonal = np.arange(len(moment))
        moment[diagonal, diagonal] *= 1 + _DAMPING
        moment[diagonal, diagonal] += 1e-7 * float(moment[diagonal, diagonal].mean())
        return State(np.linalg.inv(moment), weight, self._inputs(refit, group), variance)

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
    sizes = [len(refit.matrix()) for refit in some]
    squares, sums, counts = [np.zeros((n, n)) for n in sizes], [np.zeros(n) for n in sizes], [0] * len(some)
    spreads = [Moments() for _ in some]
    wanted = [name for refit in some for name in (refit.reads, str(refit.node.outputs[0].name), refit.ends_in)]
    for mask, values in zip(
        flight.masks, flight.advance([str(refit.node.name) for refit in some], list(dict.fromkeys(wanted))), strict=True
    ):
        for k, refit in enumerate(some):
            shape = values[str(refit.node.outputs[0].name)].shape
            x: NDArray[Any] = rows[k].inputs(values[refit.reads], shape).astype(np.float32)
            seen = rows[k].seen(shape, mask)
            x = x if seen is None else x[seen]
            squares[k] += x.T @ x
            sums[k] += x.sum(0, dtype=np.float64)
            counts[k] += len(x)
            ends = rows[k].outputs(values[refit.ends_in])
            spreads[k].add(ends if seen is None else ends[seen], 1)
    for k, refit in enumerate(some):
        mean = sums[k] / counts[k] if refit.bias is not None else np.zeros_like(sums[k])
        moment = (squares[k] / counts[k] - np.outer(mean, mean)).astype(np.float32)
        yield moment, float(spreads[k].variance().sum())
