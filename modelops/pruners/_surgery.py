"""Cuts channels out of a network, or sets them to zero: two networks that must then agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from modelops.pruners._axes import Axis, Place
from modelops.pruners._groups import Anatomy
from modelops.pruners._network import Slot, value_at
from modelops.pruners._reshaping import slice_ranges

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    Mask = NDArray[np.bool_]

Use = tuple["ir.Node", int]


@contextmanager
def zeroed(anatomy: Anatomy, gone: Mask) -> Iterator[ir.Model]:
    """The network with its size kept, in which nothing reads the channels that are to go; undone afterwards.

    Every weight that is summed over channels gets zeros where they arrive. Cutting them must give the same outputs.
    """
    network = anatomy.network
    before: dict[Use, ir.Value] = {}
    names = _names(network.model.graph)
    for use, axes in _weight_axes(anatomy, gone).items():
        read = [axis for axis in axes if axis.role == "in"]
        if not read:
            continue
        value = read[0].place.value
        array = network.constant(value)
        assert array is not None
        array = array.copy()
        for axis in read:
            array[_along(array.ndim, axis.place.axis, ~anatomy.kept(axis, gone))] = 0
        before[use] = value
        _replace(network.model.graph, names, use, array, value)
    # Weights that nothing reads for the time being are not written.
    initializers = network.model.graph.initializers
    idle = {value.name: value for value in before.values() if not value.uses() and value.name is not None}
    for name in idle:
        del initializers[name]
    try:
        yield network.model
    finally:
        for value in idle.values():
            network.model.graph.register_initializer(value)
        for use, value in before.items():
            new = use[0].inputs[use[1]]
            use[0].replace_input_with(use[1], value)
            assert new is not None and new.name is not None
            if not new.uses():
                del network.model.graph.initializers[new.name]


def cut(anatomy: Anatomy, gone: Mask) -> None:
    """Take the channels out of the network, for good."""
    Surgeon(anatomy, gone).operate()


class Surgeon:
    """One operation: which classes go, and what every node needs for it."""

    def __init__(self, anatomy: Anatomy, gone: Mask) -> None:
        self.anatomy = anatomy
        self.network = anatomy.network
        self.gone = gone
        self.graph = anatomy.network.model.graph
        self._removed = anatomy.removed(gone)
        self._names = _names(self.graph)
        self._rows: dict[tuple[ir.Node, tuple[tuple[int, int], ...]], ir.Value] = {}

    def operate(self) -> None:
        import onnx_ir.passes.common as passes

        order = list(self.graph.initializers)
        touched = [axis for axis in self.anatomy.axes.axes if self._removed[axis.number]]
        resizing = {node: None for axis in touched for node in _nodes_of(axis) if node.op_type in RESIZES}
        for node in resizing:  # while shapes and weights are as they were
            RESIZES[node.op_type](self, node)
        self._slice_weights()
        for axis in touched:
            if axis.place.use is None:
                self._annotate(axis)
        passes.RemoveUnusedNodesPass()(self.network.model)
        self._restore(order)

    def _restore(self, order: list[str]) -> None:
        """Bring the weights back into the order that they had; new ones follow."""
        held = self.graph.initializers
        ordered = [held[name] for name in order if name in held]
        ordered += [value for name, value in held.items() if name not in set(order)]
        for value in ordered:
            del held[str(value.name)]
            self.graph.register_initializer(value)

    def kept(self, node: ir.Node, slot: Slot, axis: int) -> Mask | None:
        """Which positions of an axis of a node stay; None when all do."""
        found = self._axis(node, slot, axis)
        return None if found is None else self.anatomy.kept(found, self.gone)

    def _axis(self, node: ir.Node, slot: Slot, axis: int) -> Axis | None:
        value = value_at(node, slot)
        if value is None:
            return None
        use = (node, slot[1]) if slot[0] == "in" and self.network.weight(value) else None
        found = self.anatomy.axes.of(Place(value, axis, use))
        return found if found is not None and self._removed[found.number] else None

    def _slice_weights(self) -> None:
        """Every use of a weight gets its own selection; uses that select the same still share one weight."""
        import numpy as np

        made: dict[tuple[ir.Value, tuple[Any, ...]], ir.Value] = {}
        for use, axes in _weight_axes(self.anatomy, self.gone).items():
            value = axes[0].place.value
            kept = [(axis.place.axis, self.anatomy.kept(axis, self.gone)) for axis in axes]
            key = (value, tuple((number, mask.tobytes()) for number, mask in kept))
            if key in made:
                use[0].replace_input_with(use[1], made[key])
                continue
            array = self.network.constant(value)
            assert array is not None
            for number, mask in kept:
                array = np.compress(mask, array, axis=number)
            made[key] = _replace(self.graph, self._names, use, np.ascontiguousarray(array), value)
        for value, new in reversed([(value, new) for (value, _), new in made.items()]):
            name = value.name
            if name is not None and not value.uses() and self.graph.initializers.get(name) is value:
                del self.graph.initializers[name]
                new.name = name

    def _annotate(self, axis: Axis) -> None:
        """Write the new size where the graph states the old one."""
        import onnx_ir as ir

        value, number = axis.place.value, axis.place.axis
        if value.shape is None or len(value.shape) <= number:
            return
        dims = list(value.shape)
        left = axis.size - int(self._removed[axis.number])
        dims[number] = left if isinstance(dims[number], int) else None
        value.shape = ir.Shape(dims)

    def constant(self, node: ir.Node, number: int, array: NDArray[Any]) -> None:
        """Give one input of a node new elements; other nodes that read the same keep the old ones."""
        import onnx_ir as ir

        old = node.inputs[number] if number < len(node.inputs) else None
        base = str(old.name) if old is not None else f"{node.name or node.outputs[0].name}_input{number}"
        value = ir.val(_free_name(self._names, base), const_value=ir.tensor(array))
        self.graph.register_initializer(value)
        if number >= len(node.inputs):
            node.resize_inputs(number + 1)
        node.replace_input_with(number, value)

    def sizes(self, node: ir.Node, number: int, sizes: dict[int, int]) -> None:
        """Rewrite sizes where they are written out; those that a run computes follow by themselves.

        ``sizes`` maps the place in the row to the new size.
        """
        import numpy as np

        value = node.inputs[number]
        found = self.network.constant(value)
        if found is not None:
            row = found.astype(np.int64).copy()
            for place, size in sizes.items():
                if row[place] > 0:
                    row[place] = size
            if not np.array_equal(row, found):
                self.constant(node, number, row)
            return
        producer = value.producer() if value is not None else None
        if producer is None or producer.op_type != "Concat":
            return
        self._pieces(node, number, producer, sizes)

    def _pieces(self, node: ir.Node, number: int, concat: ir.Node, sizes: dict[int, int]) -> None:
        """The same for a row that is put together from pieces, on a copy of the node that does it."""
        import onnx_ir as ir

        key = (concat, tuple(sorted(sizes.items())))
        if key not in self._rows:
            copy = ir.node("Concat", list(concat.inputs), {"axis": 0}, name=f"{concat.name}_cut{len(self._rows)}")
            copy.outputs[0].name = _free_name(self._names, str(concat.outputs[0].name))
            self.graph.insert_after(concat, copy)
            offset = 0
            for place, piece in enumerate(concat.inputs):
                length = (self.network.shape(piece) or (1,))[0]
                mine = {k - offset: size for k, size in sizes.items() if offset <= k < offset + length}
                offset += length
                if mine and self.network.constant(piece) is not None:
                    self.sizes(copy, place, mine)
            self._rows[key] = copy.outputs[0]
        node.replace_input_with(number, self._rows[key])


def _weight_axes(anatomy: Anatomy, gone: Mask) -> dict[Use, list[Axis]]:
    """For every use of a weight, its axes that lose something."""
    counts = anatomy.removed(gone)
    found: dict[Use, list[Axis]] = {}
    for axis in anatomy.axes.axes:
        if axis.place.use is not None and counts[axis.number]:
            found.setdefault(axis.place.use, []).append(axis)
    return found


def _nodes_of(axis: Axis) -> list[ir.Node]:
    """The nodes that an axis touches."""
    if axis.place.use is not None:
        return [axis.place.use[0]]
    producer = axis.place.value.producer()
    readers = [use.node for use in axis.place.value.uses()]
    return readers if producer is None else [producer, *readers]


def _along(rank: int, axis: int, mask: Mask) -> tuple[Any, ...]:
    return tuple(mask if k == axis else slice(None) for k in range(rank))


def _replace(graph: ir.Graph, names: set[str], use: Use, array: NDArray[Any], old: ir.Value) -> ir.Value:
    import onnx_ir as ir

    assert old.const_value is not None
    value = ir.Value(
        name=_free_name(names, str(old.name)),
        shape=ir.Shape(array.shape),
        type=ir.TensorType(old.const_value.dtype),
        const_value=ir.Tensor(array, dtype=old.const_value.dtype),
    )
    assert value.const_value is not None
    value.const_value.name = value.name
    graph.register_initializer(value)
    use[0].replace_input_with(use[1], value)
    return value


def _names(graph: ir.Graph) -> set[str]:
    """Every name that a value of the graph has."""
    outputs = (value.name for node in graph.all_nodes() for value in node.outputs)
    return {str(name) for name in (*graph.initializers, *(value.name for value in graph.inputs), *outputs)}


def _free_name(names: set[str], base: str) -> str:
    """A new name, which counts as taken from now on."""
    number, name = 0, f"{base}_cut"
    while name in names:
        number += 1
        name = f"{base}_cut{number}"
    names.add(name)
    return name


def _groups_left(surgeon: Surgeon, node: ir.Node, attribute: str, slot: Slot, axis: int) -> None:
    """Groups go as a whole: their number shrinks with the channels."""
    import onnx_ir as ir

    groups = int(node.attributes.get_int(attribute, 1))
    kept = surgeon.kept(node, slot, axis)
    if groups > 1 and kept is not None:
        node.attributes[attribute] = ir.AttrInt64(attribute, groups * int(kept.sum()) // len(kept))


def _conv(surgeon: Surgeon, node: ir.Node) -> None:
    _groups_left(surgeon, node, "group", ("in", 0), 1)


def _group_normalization(surgeon: Surgeon, node: ir.Node) -> None:
    _groups_left(surgeon, node, "num_groups", ("in", 0), 1)


def _attention(surgeon: Surgeon, node: ir.Node) -> None:
    for attribute, number in (("q_num_heads", 0), ("kv_num_heads", 1), ("num_heads", 0)):
        if attribute in node.attributes:
            _groups_left(surgeon, node, attribute, ("in", number), 2)


def _row_of_sizes(number: int) -> Callable[[Surgeon, ir.Node], None]:
    """Reshape, Expand and Resize: the sizes are an input, aligned with the last axes of the output."""

    def resize(surgeon: Surgeon, node: ir.Node) -> None:
        shape = surgeon.network.shape(node.outputs[0]) or ()
        if number >= len(node.inputs) or node.inputs[number] is None:
            return
        length = (surgeon.network.shape(node.inputs[number]) or (0,))[0]
        axes = [k % len(shape) for k in node.attributes.get_ints("axes", ())] or range(len(shape) - length, len(shape))
        new = {}
        for place, axis in enumerate(axes):
            kept = surgeon.kept(node, ("out", 0), axis)
            if kept is not None:
                new[place] = int(kept.sum())
        if new:
            surgeon.sizes(node, number, new)

    return resize


def _split(surgeon: Surgeon, node: ir.Node) -> None:
    import numpy as np
    import onnx_ir as ir

    shape = surgeon.network.shape(node.inputs[0]) or ()
    along = int(node.attributes.get_int("axis", 0)) % len(shape)
    if surgeon.kept(node, ("in", 0), along) is None:
        return
    sizes = []
    for number, output in enumerate(node.outputs):
        kept = surgeon.kept(node, ("out", number), along)
        sizes.append((surgeon.network.shape(output) or ())[along] if kept is None else int(kept.sum()))
    if surgeon.network.opset < 13:
        node.attributes["split"] = ir.AttrInt64s("split", sizes)
        return
    node.attributes.pop("num_outputs", None)
    surgeon.constant(node, 1, np.array(sizes, np.int64))


def _slice(surgeon: Surgeon, node: ir.Node) -> None:
    import numpy as np
    import onnx_ir as ir

    ranges = slice_ranges(surgeon.network, node)
    if ranges is None:
        return
    masks = {axis: surgeon.kept(node, ("in", 0), axis) for axis in ranges}
    if all(mask is None for mask in masks.values()):
        return
    starts, ends, axes, steps = [], [], [], []
    for axis, taken in ranges.items():
        mask = masks[axis]
        start, stop = taken.start, taken.stop
        if mask is not None:
            start, stop = int(mask[: taken.start].sum()), int(mask[: taken.stop].sum())
        # Going backwards to the first element has no end that could be written as a position.
        ends.append(stop if stop >= 0 else -(2**62))
        starts.append(start)
        axes.append(axis)
        steps.append(taken.step)
    rows = {"starts": starts, "ends": ends, "axes": axes, "steps": steps}
    if node.attributes.get_ints("starts", None) is not None:
        for name in ("starts", "ends", "axes"):
            node.attributes[name] = ir.AttrInt64s(name, rows[name])
        return
    for number, row in enumerate(rows.values(), 1):
        surgeon.constant(node, number, np.array(row, np.int64))


def _gather(surgeon: Surgeon, node: ir.Node) -> None:
    import numpy as np

    shape = surgeon.network.shape(node.inputs[0]) or ()
    along = int(node.attributes.get_int("axis", 0)) % len(shape)
    mask = surgeon.kept(node, ("in", 0), along)
    taken = surgeon.network.constant(node.inputs[1])
    if mask is None or taken is None:
        return
    places = np.where(taken < 0, taken + shape[along], taken)
    surgeon.constant(node, 1, (np.cumsum(mask) - 1)[places[mask[places]]].astype(taken.dtype))


RESIZES: dict[str, Callable[[Surgeon, ir.Node], None]] = {
    "Conv": _conv,
    "ConvTranspose": _conv,
    "Attention": _attention,
    "MultiHeadAttention": _attention,
    "GroupNormalization": _group_normalization,
    "Reshape": _row_of_sizes(1),
    "Expand": _row_of_sizes(1),
    "Resize": _row_of_sizes(3),
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
}
