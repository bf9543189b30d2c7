"""How channels are ranked: what every class of them is worth, as a share of what the weights around it carry."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from modelops.core.workbench import Workbench
from modelops.errors import StageFailed
from modelops.graphs.batches import BatchAxis
from modelops.pruners._axes import Axis
from modelops.pruners._groups import Anatomy
from modelops.pruners._network import label

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    Scores = NDArray[np.float64]

log = logging.getLogger(__name__)

Importance = Literal["l1", "l2", "activation", "reconstruction", "bn-scale", "random"]
#: Those that look at samples.
WITH_DATA: tuple[Importance, ...] = ("activation", "reconstruction")
Use = tuple["ir.Node", int]


def scores(anatomy: Anatomy, ranking: Importance, workbench: Workbench) -> Scores:
    """What every class is worth, by this ranking; the sum over a weight that reads or makes channels is one.

    StageFailed when nothing can be ranked that way.
    """
    from modelops.pruners._activations import variances
    from modelops.pruners._elimination import reconstruction

    if ranking == "l1" or ranking == "l2":
        return norms(anatomy, ranking)
    if ranking == "bn-scale":
        return scales(anatomy)
    if ranking == "random":
        return chances(anatomy)
    axis = BatchAxis.of(workbench.signature)
    found = losses(anatomy, variances(anatomy, workbench.batches(), axis, workbench.scratch))
    if ranking == "activation":
        return found
    return reconstruction(anatomy, found, workbench.batches(), axis, workbench.scratch)


def norms(anatomy: Anatomy, norm: Literal["l1", "l2"]) -> Scores:
    """The L1 or squared L2 norm of the slices of all weights that make or read a class.

    Every weight counts as one, so that a large filter does not drown a small one (as in DepGraph, Fang et al. 2023,
    *Towards Any Structural Pruning*, §3.3).
    """
    import numpy as np

    score = np.zeros(anatomy.classes)
    for axis, array in _weights(anatomy, ("out", "in")):
        others = tuple(k for k in range(array.ndim) if k != axis.place.axis)
        wide = array.astype(np.float64)
        _add(anatomy, score, axis, np.abs(wide).sum(others) if norm == "l1" else np.square(wide).sum(others))
    return score


def losses(anatomy: Anatomy, variances: Mapping[Use, NDArray[np.float64]]) -> Scores:
    """The share of the variance of its readers' outputs that goes with a class.

    That is the squared norm of the weights that read a channel times the channel's variance; its mean can be made up
    for by a bias.
    """
    import numpy as np

    score = np.zeros(anatomy.classes)
    for axis, array in _weights(anatomy, ("in",)):
        others = tuple(k for k in range(array.ndim) if k != axis.place.axis)
        squares = np.square(array.astype(np.float64)).sum(others)
        assert axis.place.use is not None
        variance = variances.get(axis.place.use)
        _add(anatomy, score, axis, squares if variance is None else squares * variance)
    return score


def scales(anatomy: Anatomy) -> Scores:
    """The size of the factors with which batch normalizations scale a class (Liu et al. 2017, *Network Slimming*).

    Groups without a normalization are ranked by the L2 norm. StageFailed when there is none in any group.
    """
    import numpy as np

    score = np.zeros(anatomy.classes)
    for axis in anatomy.axes.axes:
        use = axis.place.use
        if use is None or use[0].op_type != "BatchNormalization" or use[1] != 1:
            continue
        array = anatomy.network.constant(axis.place.value)
        if array is not None:
            _add(anatomy, score, axis, np.abs(array.astype(np.float64)))
    scaled = [bool(score[group.classes].any()) for group in anatomy.groups]
    if not any(scaled):
        raise StageFailed(
            "no group of channels has a batch normalization to rank it by: exporters fold them into convolutions",
            hint="rank by --importance l2, or activation with --data",
        )
    if not all(scaled):
        weights = norms(anatomy, "l2")
        bare = [group for group, has in zip(anatomy.groups, scaled, strict=True) if not has]
        log.info("%d groups without batch normalization are ranked by the L2 norm", len(bare))
        for group in bare:
            score[group.classes] = weights[group.classes]
    return score


def chances(anatomy: Anatomy) -> Scores:
    """Numbers that mean nothing, a control: what a ranking is worth shows beside them. Always the same for a graph."""
    import numpy as np

    names = "|".join(label(axis.place.use[0]) for axis in anatomy.axes.axes if axis.place.use is not None)
    random = np.random.default_rng(zlib.crc32(names.encode()))
    score = np.zeros(anatomy.classes)
    for group in anatomy.groups:
        values = random.uniform(0.5, 1.5, group.size)
        score[group.classes] = values / values.sum()
    return score


def _weights(anatomy: Anatomy, roles: tuple[str, ...]) -> Iterator[tuple[Axis, NDArray[Any]]]:
    """The labelled axes of matrices and filters that have one of these roles; shared weights come once."""
    seen: set[tuple[str, int]] = set()
    for axis in anatomy.axes.axes:
        place = axis.place
        key = (str(place.value.name), place.axis)
        if place.use is None or axis.role not in roles or key in seen:
            continue
        array = anatomy.network.constant(place.value)
        if array is not None and array.ndim >= 2 and array.dtype.kind == "f":
            seen.add(key)
            yield axis, array


def _add(anatomy: Anatomy, score: Scores, axis: Axis, values: NDArray[np.float64]) -> None:
    """Add every position's share of the whole axis to its class."""
    import numpy as np

    whole = values.sum()
    if whole > 0:
        np.add.at(score, anatomy.class_of[axis.labels], values / whole)
