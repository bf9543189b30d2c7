"""How heads pass through the operators that do a whole attention: they go one by one, with all that makes them.

ONNX's own Attention (opset 23) takes heads as an axis or packed into the width; onnxruntime's MultiHeadAttention takes
them packed. Where several query heads share keys and values, these heads go together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelops.pruners._axes import Blocked, Link
from modelops.pruners._network import Slot, label
from modelops.pruners._rules import Visit, W, X, Y, rule

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

V: Slot = ("in", 2)


@rule("Attention")
def attention(at: Visit) -> list[Link] | None:
    """ONNX's: (query, key, value, mask, past …), the heads an axis of four, or packed into the last of three."""
    if at.node.domain == "com.microsoft":
        raise Blocked(f"{label(at.node)} is not followed")
    if any(at.given(number) for number in (4, 5)) or any(value.name for value in at.node.outputs[1:]):
        raise Blocked(f"{label(at.node)} keeps what it has seen")
    axis = 1 if at.rank() == 4 else 2
    if axis == 1:
        heads, shared = at.shape(X)[1], at.shape(W)[1]
    else:
        heads, shared = at.attribute("q_num_heads", 0), at.attribute("kv_num_heads", 0)
    links = _heads(at, axis, heads, shared)
    if at.given(3):
        links += _per_head(at, 3, axis, heads)
    return links


@rule("MultiHeadAttention")
def multi_head_attention(at: Visit) -> list[Link] | None:
    """onnxruntime's: (query, key, value, bias, padding mask, bias of every position, past …), heads packed."""
    if any(at.given(number) for number in range(6, len(at.node.inputs))) or any(
        value.name for value in at.node.outputs[1:]
    ):
        raise Blocked(f"{label(at.node)} keeps what it has seen")
    if not (at.given(1) and at.given(2)) or {len(at.shape(slot)) for slot in (X, W, V)} != {3}:
        raise Blocked(f"{label(at.node)} takes packed inputs")
    heads = at.attribute("num_heads", 0)
    links = _heads(at, 2, heads, heads)
    if at.given(3):
        start, made = 0, at.shape(Y)[2]
        for slot in (X, W, V):
            size = at.shape(slot)[2]
            ours, theirs = _pairs(made, size, heads)
            links.append(Link(Y, 2, ("in", 3), 0, ours, start + theirs))
            start += size
    if at.given(5):
        links += _per_head(at, 5, 2, heads)
    return links


def _heads(at: Visit, axis: int, heads: int, shared: int) -> list[Link]:
    """What belongs to a head of queries, or to all that share keys, among the operator's main inputs and output."""
    if heads < 1 or shared < 1 or heads % shared:
        raise Blocked(f"{label(at.node)} has {heads} heads of queries for {shared} of keys")
    made = at.shape(Y)[axis]
    links = [Link(X, 0, Y, 0), Link(W, 0, Y, 0), Link(V, 0, Y, 0)]
    for slot in (X, W, V):
        links.append(Link(Y, axis, slot, axis, *_pairs(made, at.shape(slot)[axis], shared)))
    return links


def _per_head(at: Visit, number: int, axis: int, heads: int) -> list[Link]:
    """A mask that has an entry for every head."""
    shape = at.shape(("in", number))
    if len(shape) < 3 or shape[-3] != heads or heads == 1:
        return []
    return [Link(Y, axis, ("in", number), len(shape) - 3, *_pairs(at.shape(Y)[axis], heads, heads))]


def _pairs(one: int, other: int, groups: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Every position of a group on one side, with every position of it on the other."""
    import numpy as np

    left, right = np.broadcast_arrays(np.arange(one).reshape(groups, -1, 1), np.arange(other).reshape(groups, 1, -1))
    return left.reshape(-1), right.reshape(-1)
