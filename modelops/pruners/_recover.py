"""Makes up for a cut: weights that lost inputs are refitted, so that they give what the source gives there.

Weights are taken in the order in which the network runs. Each sees what the network before it, cut and refitted, now
gives, and is fitted by least squares to what the source gives at the same place; where it is added to another path, to
the sum (as in ThiNet, Luo et al. 2017, and asymmetric reconstruction, Zhang et al. 2015). Only the normal equations
are kept, and between stretches of the network the values in flight are put on disk, so that memory does not grow with
the number of samples.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modelops.core.blas import one_blas_thread
from modelops.core.progress import progress
from modelops.graphs.batches import BatchAxis
from modelops.pruners._equations import Equations
from modelops.pruners._flight import Feed, Flight, small
from modelops.pruners._refits import MOST_UNKNOWNS, Refit, Rows, refits, rows_wanted
from modelops.pruners._segments import Parts

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    Masks = Mapping[str, Mapping[int, NDArray[np.bool_]]]

# Weights between two times that the values in flight go to disk.
_STRETCH = 4


@dataclass
class Recovery:
    """What was refitted, with the mean square error of its output before and after; and what was not, and why."""

    refitted: list[dict[str, Any]] = field(default_factory=list)
    left: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Twins:
    """The source and the cut network, whose values have the same names; ``kept`` says what is left of a value."""

    source: Parts
    cut: Parts
    kept: Masks

    def cut_like(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """A value of the source, with only those positions that the cut network has."""
        import numpy as np

        for axis, mask in self.kept.get(name, {}).items():
            array = np.compress(mask, array, axis=axis)
        return array


def recover(
    source: ir.Model,
    cut: ir.Model,
    kept: Masks,
    batches: Iterable[Feed],
    axis: BatchAxis,
    scratch: Path,
    method: Literal["bias", "least-squares"],
) -> Recovery:
    """Refit the weights of the cut network, in place, on these samples.

    ``kept`` says for values of the source, and for their axes, which positions the cut network still has; ``axis`` how
    the inputs hold samples.
    """
    twins = Twins(Parts(source), Parts(cut), kept)
    todo = [refit for refit in refits(twins.cut) if str(refit.node.name) in twins.source.by_name]
    refitting = Refitting(twins, scratch, method)
    refitting.start(small(batches, axis))
    progress("refitting", 0, len(todo))
    with one_blas_thread():
        for first in range(0, len(todo), _STRETCH):
            refitting.stretch(todo[first : first + _STRETCH])
            progress("refitting", min(first + _STRETCH, len(todo)), len(todo))
    refitting.close()
    return refitting.found


class Refitting:
    """Two flights side by side: the source is always a stretch ahead, and leaves behind what is to be met."""

    def __init__(self, twins: Twins, scratch: Path, method: Literal["bias", "least-squares"]) -> None:
        self.found = Recovery()
        self._twins = twins
        self._method = method
        self._goals = scratch / "goals"
        self._source = Flight(twins.source, scratch / "source")
        self._cut = Flight(twins.cut, scratch / "cut")

    def start(self, feeds: Iterable[Feed]) -> None:
        """Begin with these inputs."""
        self._source.start(feeds)
        self._cut.start(iter(self._source))

    def close(self) -> None:
        self._source.close()
        self._cut.close()

    def stretch(self, todo: Sequence[Refit]) -> None:
        """Refit these weights, one after the other, and move on behind them."""
        samples, masked = self._source.samples, self._source.masked
        rows = [Rows(refit, -(-rows_wanted(refit) // samples), masked=masked) for refit in todo]
        done = [str(refit.node.name) for refit in todo]
        shapes = self._aim(todo, rows, done)
        for number, (refit, places) in enumerate(zip(todo, rows, strict=True)):
            self._refit(refit, places, number, [shape[number] for shape in shapes])
        for _ in self._cut.advance(done):
            pass
        shutil.rmtree(self._goals)

    def _aim(self, todo: Sequence[Refit], rows: Sequence[Rows], done: list[str]) -> list[list[tuple[int, ...]]]:
        """Put on disk what the source makes where the weights are; the shapes of that, batch by batch."""
        import numpy as np

        def stored(batch: int, values: Feed) -> list[tuple[int, ...]]:
            folder = self._goals / f"{batch:06}"
            folder.mkdir(parents=True)
            goals = [self._twins.cut_like(refit.target, values[refit.target]) for refit in todo]
            for number, (goal, places) in enumerate(zip(goals, rows, strict=True)):
                np.save(folder / f"{number}.npy", places.outputs(goal), allow_pickle=False)
            return [goal.shape for goal in goals]

        return list(self._source.advance(done, [refit.target for refit in todo], stored))

    def _refit(self, refit: Refit, rows: Rows, number: int, shapes: Sequence[tuple[int, ...]]) -> None:
        import numpy as np

        weight, bias = refit.matrix(), refit.bias_row()
        solve = self._method == "least-squares"
        if solve and len(weight) > MOST_UNKNOWNS:
            self.found.left.append({"node": str(refit.node.name), "reason": f"{len(weight)} inputs: bias only"})
            solve = False
        if not solve and refit.bias is None:
            return

        def told(batch: int, values: Feed) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.int64]]:
            """What the weight reads, what it fails to make, and of which samples, as rows."""
            shape = shapes[batch]
            x = rows.inputs(values[refit.reads], shape).astype(np.float32)
            goal = np.load(self._goals / f"{batch:06}" / f"{number}.npy", allow_pickle=False)
            missing = goal.astype(np.float32) - x @ weight - bias
            if refit.other is not None:
                missing -= rows.outputs(values[refit.other])
            samples = self._source.firsts[batch] + rows.samples(shape)
            seen = rows.seen(shape, self._source.masks[batch])
            return (x, missing, samples) if seen is None else (x[seen], missing[seen], samples[seen])

        equations = Equations(len(weight) if solve else 0, weight.shape[1])
        for part in self._cut.look([name for name in (refit.reads, refit.other) if name is not None], told):
            equations.add(*part)
        if equations.untouched:
            return
        solution = equations.solve(with_bias=refit.bias is not None)
        if solve:
            refit.write_matrix(weight + solution[:-1])
        if refit.bias is not None:
            refit.write_bias(bias + solution[-1])
        before, after = equations.errors(solution)
        self.found.refitted.append({"node": str(refit.node.name), "error_before": before, "error_after": after})
