"""How channels pass through operators that move positions about: Reshape, Transpose, Concat, Split, Slice and such."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from modelops.pruners._axes import Blocked, Link
from modelops.pruners._network import Network, label
from modelops.pruners._rules import Visit, X, Y, rule

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

# What may lie between a Shape and the argument of a Reshape that it becomes.
_SIZE_ARITHMETIC = frozenset({"Gather", "Slice", "Concat", "Cast", "Unsqueeze", "Squeeze", "Identity"})
_SIZE_READERS = {"Reshape": 1, "Expand": 1, "Resize": 3}


@rule("Transpose")
def transpose(at: Visit) -> list[Link] | None:
    count = at.rank()
    order = at.node.attributes.get_ints("perm", None) or range(count - 1, -1, -1)
    return [Link(X, int(old), Y, new) for new, old in enumerate(order)]


@rule("Reshape Flatten Squeeze Unsqueeze")
def reshape(at: Visit) -> list[Link] | None:
    """Axes that are merged or split: one of several carries the channels, the others stay as they are."""
    before, after = at.shape(X), at.shape(Y)
    links: list[Link] = []
    for olds, news in _blocks(before, after):
        if len(olds) == 1 and len(news) == 1:
            links.append(Link(X, olds[0], Y, news[0]))
        elif len(olds) == 1:
            chosen = _choice(at, news, at.slot == Y)
            links.append(Link(X, olds[0], Y, chosen, None, _spread(after, news, chosen)))
        elif len(news) == 1:
            chosen = _choice(at, olds, at.slot == X)
            links.append(Link(X, chosen, Y, news[0], _spread(before, olds, chosen), None))
        elif (pairs := _regrouped(before[olds[0]], after[news[0]])) is not None:
            links.append(Link(X, olds[0], Y, news[0], *pairs))
    if (at.slot, at.axis) not in {(X, link.a_axis) for link in links} | {(Y, link.b_axis) for link in links}:
        raise Blocked(f"{label(at.node)} takes it apart")
    return links


def _blocks(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes on both sides that hold the same elements; axes of size 1 are left out."""
    olds = [k for k, size in enumerate(before) if size != 1]
    news = [k for k, size in enumerate(after) if size != 1]
    found: list[tuple[list[int], list[int]]] = []
    i, j = 0, 0
    while i < len(olds) and j < len(news):
        left, right = [olds[i]], [news[j]]
        a, b = before[olds[i]], after[news[j]]
        while a != b:
            if a < b:
                i += 1
                if i == len(olds):
                    return found
                left.append(olds[i])
                a *= before[olds[i]]
            else:
                j += 1
                if j == len(news):
                    return found
                right.append(news[j])
                b *= after[news[j]]
        found.append((left, right))
        i, j = i + 1, j + 1
    return found


def _regrouped(before: int, after: int) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Positions of the outermost axes on both sides that hold the same elements, where one counts groups of the other.

    Channels × pixels become groups × the rest before a group normalization, and come back after it.
    """
    import numpy as np

    if before % after == 0:
        return np.arange(before), np.arange(before) // (before // after)
    if after % before == 0:
        return np.arange(after) // (after // before), np.arange(after)
    return None


def _choice(at: Visit, axes: list[int], arrived: bool) -> int:
    """Which of several axes carries the channels: the one that was first reached, else the outermost.

    Splitting a width into heads, the outermost axis counts heads. Where the same axes are only swapped and merged
    again, channels are shuffled between groups; then the inner one, since removing whole groups is crude, unless a
    grouped convolution ties each of these groups together already.
    """
    key = (at.node, tuple(axes))
    if key not in at.choices:
        shuffles = any(use.node.op_type == "Transpose" and _merges(use.node) for use in at.node.outputs[0].uses())
        shuffles = shuffles and _groups_before(at.node) != at.shape(Y)[axes[0]]
        at.choices[key] = at.axis if arrived and at.axis in axes else axes[-1] if shuffles else axes[0]
    return at.choices[key]


def _groups_before(node: ir.Node) -> int:
    """The groups of the convolution that the channels come from, by way of what treats each by itself; else 1."""
    for _ in range(4):
        producer = node.inputs[0].producer() if node.inputs[0] is not None else None
        if producer is None:
            break
        if producer.op_type == "Conv":
            return int(producer.attributes.get_int("group", 1))
        if len(producer.inputs) > 1 and producer.op_type != "BatchNormalization":
            break
        node = producer
    return 1


def _merges(transpose: ir.Node) -> bool:
    return any(use.node.op_type == "Reshape" for use in transpose.outputs[0].uses())


def _spread(shape: tuple[int, ...], axes: list[int], chosen: int) -> NDArray[np.int64]:
    """For every position of the merged axes, the position along the chosen one."""
    import numpy as np

    sizes = [shape[k] for k in axes]
    place = axes.index(chosen)
    inner, outer = math.prod(sizes[place + 1 :]), math.prod(sizes[:place])
    return np.tile(np.repeat(np.arange(shape[chosen]), inner), outer)


@rule("Expand")
def expand(at: Visit) -> list[Link] | None:
    before, after = at.shape(X), at.shape(Y)
    shift = len(after) - len(before)
    if at.slot == Y and (at.axis < shift or before[at.axis - shift] != after[at.axis]):
        raise Blocked(f"{label(at.node)} repeats one element along it")
    return [Link(X, k, Y, k + shift) for k, size in enumerate(before) if size == after[k + shift]]


@rule("Concat")
def concat(at: Visit) -> list[Link] | None:
    import numpy as np

    count = at.rank()
    along = at.attribute("axis", 0) % count
    links, offset = [], 0
    for number in range(len(at.node.inputs)):
        size = at.shape(("in", number))[along]
        links += [Link(("in", number), k, Y, k) for k in range(count) if k != along]
        links.append(Link(("in", number), along, Y, along, None, np.arange(offset, offset + size)))
        offset += size
    return links


@rule("Split")
def split(at: Visit) -> list[Link] | None:
    import numpy as np

    count = at.rank()
    along = at.attribute("axis", 0) % count
    links, offset = [], 0
    for number in range(len(at.node.outputs)):
        size = at.shape(("out", number))[along]
        links += [Link(X, k, ("out", number), k) for k in range(count) if k != along]
        links.append(Link(X, along, ("out", number), along, np.arange(offset, offset + size), None))
        offset += size
    return links


@rule("Slice")
def slices(at: Visit) -> list[Link] | None:
    import numpy as np

    before, after = at.shape(X), at.shape(Y)
    ranges = slice_ranges(at.network, at.node)
    if ranges is None:
        axes = at.ints(3)
        if axes is None:
            raise Blocked(f"what {label(at.node)} takes is not constant")
        cut = {int(k) % len(before) for k in axes}
        return [Link(X, k, Y, k) for k in range(len(before)) if k not in cut]
    links = []
    for k, size in enumerate(before):
        taken = ranges.get(k, range(size))
        if len(taken) == after[k] and taken.step == 1:
            links.append(Link(X, k, Y, k, np.array(taken), None))
    return links


def slice_ranges(network: Network, node: ir.Node) -> dict[int, range] | None:
    """For every axis that a Slice cuts, the positions that it takes; None when only a run can tell."""
    before = network.shape(node.inputs[0])
    if before is None:
        return None
    if node.attributes.get_ints("starts", None) is not None:  # before opset 10
        starts, ends = node.attributes.get_ints("starts"), node.attributes.get_ints("ends")
        axes = node.attributes.get_ints("axes", None) or range(len(starts))
        steps = [1] * len(starts)
    else:
        found = [network.ints(node, number) for number in range(1, 5)]
        given = [number < len(node.inputs) and node.inputs[number] is not None for number in range(1, 5)]
        if found[0] is None or found[1] is None or any(g and f is None for g, f in zip(given, found, strict=True)):
            return None
        starts, ends = found[0].tolist(), found[1].tolist()
        axes = found[2].tolist() if found[2] is not None else range(len(starts))
        steps = found[3].tolist() if found[3] is not None else [1] * len(starts)
    ranges = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        k = int(axis) % len(before)
        ranges[k] = range(*slice(int(start), int(end), int(step)).indices(before[k]))
    return ranges


@rule("Gather")
def gather(at: Visit) -> list[Link] | None:
    import numpy as np

    data, indices = at.shape(X), at.shape(("in", 1))
    along = at.attribute("axis", 0) % len(data)
    links = [Link(X, k, Y, k, role="out") for k in range(along)]
    links += [Link(X, k, Y, k + len(indices) - 1, role="out") for k in range(along + 1, len(data))]
    links += [Link(("in", 1), k, Y, along + k) for k in range(len(indices))]
    taken = at.ints(1)
    if taken is not None and len(indices) == 1:
        # Which positions are taken is written in the node, and is renumbered when some of them go.
        links = [link for link in links if link.a != ("in", 1)]
        links.append(Link(X, along, Y, along, np.where(taken < 0, taken + data[along], taken), np.arange(len(taken))))
    return links


@rule("Pad")
def pad(at: Visit) -> list[Link] | None:
    count = at.rank()
    pads = at.ints(1) if at.given(1) else None
    if pads is None:
        old = at.node.attributes.get_ints("pads", None)
        if old is None:
            raise Blocked(f"the widths of {label(at.node)} are not constant")
        sizes = [int(size) for size in old]
    else:
        sizes = [int(size) for size in pads]
    axes = at.ints(3)
    padded = [int(k) % count for k in axes] if axes is not None else list(range(count))
    half = len(sizes) // 2
    widths = {k: (sizes[place], sizes[place + half]) for place, k in enumerate(padded)}
    return [Link(X, k, Y, k) for k in range(count) if widths.get(k, (0, 0)) == (0, 0)]


@rule("Resize Upsample")
def resize(at: Visit) -> list[Link] | None:
    before, after = at.shape(X), at.shape(Y)
    return [Link(X, k, Y, k) for k in range(min(2, len(before))) if before[k] == after[k]]


@rule("Shape Size")
def shape(at: Visit) -> list[Link] | None:
    """A size that is read may change where it only becomes the argument of another Reshape."""
    if at.slot != X:
        return []
    if at.node.op_type == "Shape":
        read = slice(at.attribute("start", 0), at.node.attributes.get_int("end", None))
        start, end, _ = read.indices(at.rank())
        if not start <= at.axis < end or _only_sizes(at.network, at.node, at.axis - start):
            return None
    raise Blocked(f"its size is read by {label(at.node)}")


def _only_sizes(network: Network, node: ir.Node, place: int | None) -> bool:
    """Whether element ``place`` of a node's output (None: some element) is used for nothing but sizes of axes."""
    if node.outputs[0].is_graph_output():
        return False
    for use in node.outputs[0].uses():
        reader = use.node
        if reader.graph is not network.model.graph:
            return False
        if _SIZE_READERS.get(reader.op_type) == use.idx:
            continue
        if reader.op_type not in _SIZE_ARITHMETIC or (use.idx != 0 and reader.op_type != "Concat"):
            return False
        later = _element_after(network, reader, place)
        if later != -1 and not _only_sizes(network, reader, later):
            return False
    return True


def _element_after(network: Network, node: ir.Node, place: int | None) -> int | None:
    """Where an element of a row of sizes is after Gather or Slice; -1 when it is not taken, None when unclear."""
    if place is None:
        return None
    if node.op_type == "Gather":
        taken = network.ints(node, 1)
        if taken is None:
            return None
        length = (network.shape(node.inputs[0]) or (1,))[0]
        found = [int(k) % length for k in taken]
        return found.index(place) if found.count(place) == 1 else -1 if place not in found else None
    if node.op_type == "Slice":
        ranges = slice_ranges(network, node)
        if ranges is None:
            return None
        kept = ranges.get(0)
        return place if kept is None else kept.index(place) if place in kept else -1
    return place if node.op_type in ("Cast", "Identity") else None
