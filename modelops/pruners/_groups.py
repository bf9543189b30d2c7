"""Groups of channels that can be cut alike, and what can't be cut, with its reason."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelops.pruners._axes import Axes, Axis, Place, Spreading, reasons
from modelops.pruners._network import Network, label

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray


_ATTENTION = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention"})


@dataclass(frozen=True)
class Group:
    """Channels that are alike: each may be removed without the others, and all of them touch the same axes.

    ``classes`` are the numbers of the channels' classes, ``makers`` the nodes whose weights make them; ``width`` is
    how many positions of such a weight one channel takes; ``heads`` whether each is a head of attention.
    """

    classes: NDArray[np.int64]
    makers: tuple[str, ...]
    width: int = 1
    heads: bool = False

    @property
    def size(self) -> int:
        return len(self.classes)


@dataclass(frozen=True)
class Skipped:
    """Channels that stay: how many of which node, and why. ``interface`` when the model's outputs ask for them."""

    node: str
    channels: int
    reason: str
    interface: bool

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Anatomy:
    """What can be cut in a network: ``class_of`` gives every label's class, ``owner_of`` its axis."""

    network: Network
    axes: Axes
    class_of: NDArray[np.int64]
    owner_of: NDArray[np.int64]
    groups: tuple[Group, ...]
    skipped: tuple[Skipped, ...]
    seeds: tuple[Axis, ...]

    @property
    def classes(self) -> int:
        return int(self.class_of.max()) + 1 if len(self.class_of) else 0

    def removed(self, gone: NDArray[np.bool_]) -> NDArray[np.int64]:
        """How many positions every axis loses when these classes go."""
        import numpy as np

        return np.bincount(self.owner_of[gone[self.class_of]], minlength=len(self.axes.axes))

    def kept(self, axis: Axis, gone: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which positions of an axis stay."""
        kept: NDArray[np.bool_] = ~gone[self.class_of[axis.labels]]
        return kept

    def kept_positions(self, gone: NDArray[np.bool_]) -> dict[str, dict[int, NDArray[np.bool_]]]:
        """For every value that loses something, and for each of its axes that does, which positions stay."""
        counts = self.removed(gone)
        found: dict[str, dict[int, NDArray[np.bool_]]] = {}
        for axis in self.axes.axes:
            if counts[axis.number] and axis.place.use is None:
                found.setdefault(str(axis.place.value.name), {})[axis.place.axis] = self.kept(axis, gone)
        return found

    def hidden_channels(self) -> int:
        """All channels that weights make, those of the model's own outputs left out."""
        outside = sum(item.channels for item in self.skipped if item.interface)
        return sum(axis.size for axis in self.seeds) - outside

    def removed_channels(self, gone: NDArray[np.bool_]) -> int:
        counts = self.removed(gone)
        return int(sum(counts[axis.number] for axis in self.seeds))


def examine(network: Network) -> Anatomy:
    """Find every group of channels that can be cut, and the reason for each one that can't."""
    import numpy as np

    spreading = Spreading(network)
    seeds = list(_seeds(network))
    axes = spreading.start(seeds)
    class_of = axes.classes()
    owner_of = axes.owners()
    why = reasons(axes, class_of)
    places = [Place(node.outputs[0], axis) for node, axis in seeds]
    seed_axes = [axes.by_place[place] for place in dict.fromkeys(places) if place in axes.by_place]
    count = int(class_of.max()) + 1 if len(class_of) else 0
    free, interface = np.ones(count, bool), np.zeros(count, bool)
    free[list(why)] = False
    for labels, _, outside in axes.pinned:
        if outside:
            interface[class_of[labels]] = True
    return Anatomy(
        network,
        axes,
        class_of,
        owner_of,
        tuple(_grouped(network, axes, class_of, owner_of, free)),
        tuple(_skipped(seed_axes, class_of, why, interface)),
        tuple(seed_axes),
    )


def _seeds(network: Network) -> Iterator[tuple[ir.Node, int]]:
    """The output axes along which weights make channels."""
    for node in network.nodes:
        shape = network.shape(node.outputs[0]) if node.outputs else None
        if shape is None or len(node.inputs) < 2:
            continue
        if (node.op_type in ("Conv", "ConvTranspose") and network.weight(node.inputs[1])) or (
            node.op_type == "Gemm" and network.weight(node.inputs[1])
        ):
            yield node, 1
        elif node.op_type == "MatMul" and len(shape) >= 2:
            if network.weight(node.inputs[1]):
                yield node, len(shape) - 1
            elif network.weight(node.inputs[0]):
                yield node, len(shape) - 2


def _grouped(
    network: Network, axes: Axes, class_of: NDArray[np.int64], owner_of: NDArray[np.int64], free: NDArray[np.bool_]
) -> Iterator[Group]:
    """Free classes with the same footprint: the axes that each of them touches, and how often."""
    import numpy as np

    if not len(class_of):
        return
    pairs, counts = np.unique(np.stack([class_of, owner_of]), axis=1, return_counts=True)
    starts = np.flatnonzero(np.diff(pairs[0], prepend=-1))
    found: dict[bytes, list[int]] = {}
    touching: dict[bytes, NDArray[np.int64]] = {}
    for start, end in zip(starts, [*starts[1:], pairs.shape[1]], strict=True):
        number = int(pairs[0, start])
        if free[number]:
            footprint = pairs[1, start:end].tobytes() + b"|" + counts[start:end].tobytes()
            found.setdefault(footprint, []).append(number)
            touching[footprint] = np.stack([pairs[1, start:end], counts[start:end]], axis=1)
    for footprint, classes in found.items():
        touched = [(axes.axes[int(number)], int(count)) for number, count in touching[footprint]]
        makers = {
            label(axis.place.use[0]): count
            for axis, count in touched
            if axis.role == "out" and axis.place.use is not None
        }
        if makers:
            heads = any(_attends(network, axis) for axis, _ in touched)
            width = math.gcd(*makers.values())
            if heads and width == 1:  # a table of biases has one entry for a head
                width = max(makers.values())
            yield Group(np.array(classes), tuple(makers), width, heads)


def _attends(network: Network, axis: Axis) -> bool:
    """Whether an axis counts products of two activations, as heads count those of queries and keys."""
    if axis.place.use is not None:
        return False
    before_last = axis.place.axis < len(network.shape(axis.place.value) or ()) - 2
    return any(
        use.node.op_type in _ATTENTION
        or (
            before_last
            and use.node.op_type == "MatMul"
            and all(value.const_value is None for value in use.node.inputs if value is not None)
        )
        for use in axis.place.value.uses()
    )


def _skipped(
    seeds: Sequence[Axis], class_of: NDArray[np.int64], why: Mapping[int, str], interface: NDArray[np.bool_]
) -> Iterator[Skipped]:
    for axis in seeds:
        stuck = [int(number) for number in class_of[axis.labels] if int(number) in why]
        if stuck:
            node = axis.place.value.producer()
            name = label(node) if node is not None else str(axis.place.value.name)
            yield Skipped(name, len(stuck), why[stuck[0]], bool(interface[stuck[0]]))
