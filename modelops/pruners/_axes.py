"""Which positions of which axes belong together: the dependency graph of structured pruning.

Every axis that matters gets one label per position. A rule says, for one node, which positions of its inputs' axes are
those of its outputs' (see ``_rules``); linked labels are joined, and what is joined can only go together. A label that
nothing may remove is pinned, with a reason, and pins all that is joined to it::

    Conv ──► [c0 c1 c2 c3] ──► Add ──► [c0 c1 c2 c3] ──► Conv          removing c1 cuts the two convolutions before the
    Conv ──► [c0 c1 c2 c3] ───┘                                        Add at their outputs, the third at its input
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from modelops.pruners._network import Network, Slot, label, value_at

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    Index = NDArray[np.int64]

#: What a weight does along an axis: it makes channels, is summed over them, or treats each by itself.
Role = Literal["out", "in", "each"]


@dataclass(frozen=True, eq=False)
class Link:
    """Positions of one axis that are positions of another; None stands for all, in order.

    ``role`` is what the weight among the two does along its axis.
    """

    a: Slot
    a_axis: int
    b: Slot
    b_axis: int
    a_index: Index | None = None
    b_index: Index | None = None
    role: Role = "each"


class Blocked(Exception):
    """Raised by a rule for an axis that can't be followed; the text is the reason."""


@dataclass(frozen=True)
class Place:
    """One axis: of a value, or of one use of a weight (a node and the number of its input)."""

    value: ir.Value
    axis: int
    use: tuple[ir.Node, int] | None = None


@dataclass
class Axis:
    """A labelled axis: ``labels`` are ``start … start + size - 1``."""

    number: int
    place: Place
    start: int
    size: int
    role: Role | None = None

    @property
    def labels(self) -> slice:
        return slice(self.start, self.start + self.size)


@dataclass
class Axes:
    """All labelled axes, and what joins or pins their labels."""

    axes: list[Axis] = field(default_factory=list)
    by_place: dict[Place, Axis] = field(default_factory=dict)
    joined: list[tuple[Index, Index]] = field(default_factory=list)
    pinned: list[tuple[Index, str, bool]] = field(default_factory=list)
    count: int = 0

    def of(self, place: Place) -> Axis | None:
        return self.by_place.get(place)

    def add(self, place: Place, size: int) -> Axis:
        axis = Axis(len(self.axes), place, self.count, size)
        self.axes.append(axis)
        self.by_place[place] = axis
        self.count += size
        return axis

    def owners(self) -> Index:
        """For every label, the number of its axis."""
        import numpy as np

        return np.repeat(np.arange(len(self.axes)), [axis.size for axis in self.axes])

    def classes(self) -> Index:
        """For every label, the number of the class that it is joined into, in order of their first labels."""
        import numpy as np

        if not self.joined:
            return np.arange(self.count)
        a = np.concatenate([pair[0] for pair in self.joined])
        b = np.concatenate([pair[1] for pair in self.joined])
        root = np.arange(self.count)
        while True:
            low = np.minimum(root[a], root[b])
            before = root.copy()
            np.minimum.at(root, root[a], low)
            np.minimum.at(root, root[b], low)
            while True:  # shortcut every chain to its end
                shorter = root[root]
                if np.array_equal(shorter, root):
                    break
                root = shorter
            if np.array_equal(root, before):
                break
        _, classes = np.unique(root, return_inverse=True)
        return classes.reshape(-1)


class Spreading:
    """Follows channels from the weights that make them through the whole graph."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.axes = Axes()
        self.choices: dict[tuple[ir.Node, Any], int] = {}  # what rules remember of their own decisions
        self._waiting: deque[Axis] = deque()
        self._seen: set[tuple[ir.Node, Slot, int]] = set()
        self._outside = {*network.model.graph.inputs, *network.model.graph.outputs}

    def start(self, seeds: Iterable[tuple[ir.Node, int]]) -> Axes:
        """Label the given output axes (node, axis) and all that depends on them."""
        for node, axis in seeds:
            place = Place(node.outputs[0], axis)
            shape = self.network.shape(node.outputs[0])
            if shape is not None and shape[axis] > 1 and self.axes.of(place) is None:
                self._waiting.append(self.axes.add(place, shape[axis]))
            while self._waiting:
                self._spread(self._waiting.popleft())
        return self.axes

    def _spread(self, axis: Axis) -> None:
        """Visit every node that touches the axis."""
        place = axis.place
        if place.value in self._outside:
            text = "it is an output of the model" if place.value.is_graph_output() else "it is an input of the model"
            self.pin(axis, text, interface=True)
        if place.use is not None:
            self._visit(place.use[0], ("in", place.use[1]), place.axis, axis)
            for node, number in self._same_weight(place):
                self._visit(node, ("in", number), place.axis, self._labelled(node, ("in", number), place.axis) or axis)
            return
        value = place.value
        producer = value.producer()
        if producer is not None:
            self._visit(producer, ("out", value.index() or 0), place.axis, axis)
        for use in value.uses():
            if use.node.graph is not self.network.model.graph:
                self.pin(axis, f"it is read inside a branch or loop ({label(use.node)})")
            else:
                self._visit(use.node, ("in", use.idx), place.axis, axis)

    def _same_weight(self, place: Place) -> list[tuple[ir.Node, int]]:
        """Other uses of the same matrix or filter, which stay the same: they are joined, axis by axis.

        Vectors are left out: exporters give all zero biases of one size the same weight.
        """
        assert place.use is not None
        shape = self.network.shape(place.value) or ()
        if len(shape) < 2:
            return []
        mine = self.axes.by_place[place]
        found = []
        for use in place.value.uses():
            if (use.node, use.idx) == place.use:
                continue
            if use.node.graph is not self.network.model.graph:
                self.pin(mine, f"its weight is used inside a branch or loop ({label(use.node)})")
                continue
            other = self._labelled(use.node, ("in", use.idx), place.axis)
            if other is not None:
                self.join(mine, other, None, None)
                found.append((use.node, use.idx))
        return found

    def _visit(self, node: ir.Node, slot: Slot, axis_number: int, axis: Axis) -> None:
        from modelops.pruners._rules import Visit, links_of

        key = (node, slot, axis_number)
        if key in self._seen:
            return
        self._seen.add(key)
        try:
            links = links_of(Visit(self.network, node, slot, axis_number, self.choices))
        except Blocked as reason:
            self.pin(axis, str(reason))
            return
        if links is None:
            return
        mine = [link for link in links if (slot, axis_number) in ((link.a, link.a_axis), (link.b, link.b_axis))]
        if not mine and axis.size > 1:
            self.pin(axis, f"{label(node)} works across it")
        for link in mine:
            self._apply(node, link)

    def _apply(self, node: ir.Node, link: Link) -> None:
        a, b = self._labelled(node, link.a, link.a_axis), self._labelled(node, link.b, link.b_axis)
        for axis in (a, b):
            if axis is not None and axis.place.use is not None and axis.role is None:
                axis.role = link.role
        if a is None or b is None:
            known = a or b
            if known is not None:
                self.pin(known, f"a size at {label(node)} is not known")
            return
        self.join(a, b, link.a_index, link.b_index)

    def _labelled(self, node: ir.Node, slot: Slot, axis_number: int) -> Axis | None:
        """The labels of an axis of a node's input or output, made when they are first asked for."""
        value = value_at(node, slot)
        shape = self.network.shape(value)
        if value is None or shape is None or not 0 <= axis_number < len(shape):
            return None
        use = (node, slot[1]) if slot[0] == "in" and self.network.weight(value) else None
        place = Place(value, axis_number, use)
        axis = self.axes.of(place)
        if axis is None:
            axis = self.axes.add(place, shape[axis_number])
            self._waiting.append(axis)
        return axis

    def join(self, a: Axis, b: Axis, a_index: Index | None, b_index: Index | None) -> None:
        import numpy as np

        left = a.start + (np.arange(a.size) if a_index is None else a_index)
        right = b.start + (np.arange(b.size) if b_index is None else b_index)
        if len(left) != len(right):
            self.pin(a, "sizes that should agree do not")
            self.pin(b, "sizes that should agree do not")
            return
        self.axes.joined.append((left, right))

    def pin(self, axis: Axis, reason: str, *, interface: bool = False) -> None:
        import numpy as np

        self.axes.pinned.append((axis.start + np.arange(axis.size), reason, interface))


def reasons(axes: Axes, classes: Index) -> Mapping[int, str]:
    """For every class that must stay, why: that it is part of the model's interface, or what was found first."""
    import numpy as np

    found: dict[int, str] = {}
    for labels, reason, _ in sorted(axes.pinned, key=lambda pin: not pin[2]):
        for number in np.unique(classes[labels]):
            found.setdefault(int(number), reason)
    return found
