"""How channels pass through each operator: the links between the axes of its inputs and outputs.

A rule gets the node and the axis that channels arrive at, and says what that axis is tied to. An axis that no link
mentions can't be cut: the operator works across it. ``None`` says that the axis may be cut without more ado, Blocked
says why it may not. Operators that are not here stop the channels that reach them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelops.pruners._axes import Blocked, Link
from modelops.pruners._network import PLAIN_DOMAINS, Network, Slot, label, value_at

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

X: Slot = ("in", 0)
W: Slot = ("in", 1)
Y: Slot = ("out", 0)


@dataclass(frozen=True)
class Visit:
    """Channels that arrive at a node: along one axis of one of its inputs or outputs."""

    network: Network
    node: ir.Node
    slot: Slot
    axis: int
    choices: dict[tuple[ir.Node, Any], int]
    """What rules remember of their own decisions."""

    def shape(self, slot: Slot) -> tuple[int, ...]:
        """The shape of an input or output; Blocked when it was never seen."""
        shape = self.network.shape(value_at(self.node, slot))
        if shape is None:
            raise Blocked(f"a size at {label(self.node)} is not known")
        return shape

    def rank(self, slot: Slot = X) -> int:
        return len(self.shape(slot))

    def given(self, number: int) -> bool:
        """Whether the node has this input."""
        return number < len(self.node.inputs) and self.node.inputs[number] is not None

    def ints(self, number: int) -> NDArray[np.int64] | None:
        """A small constant input in one row; None where it is left out or only a run can tell."""
        return self.network.ints(self.node, number)

    def attribute(self, name: str, default: int) -> int:
        return int(self.node.attributes.get_int(name, default))


Rule = Callable[[Visit], "list[Link] | None"]
RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a rule for these operators, several of which may stand in one text."""

    def register(function: Rule) -> Rule:
        for operator in " ".join(operators).split():
            RULES[operator] = function
        return function

    return register


def links_of(visit: Visit) -> list[Link] | None:
    """What an axis of a node's input or output is tied to; Blocked when the operator can't be followed."""
    from modelops.pruners import _attention, _reshaping  # noqa: F401  (register their rules)

    node = visit.node
    found = RULES.get(node.op_type) if node.domain in (*PLAIN_DOMAINS, "com.microsoft") else None
    if found is None:
        raise Blocked(f"{label(node)} is not followed")
    return found(visit)


@rule(
    "Relu Sigmoid Tanh Erf Gelu FastGelu QuickGelu HardSwish HardSigmoid Swish LeakyRelu Elu Selu Celu Softplus",
    "Softsign Mish ThresholdedRelu Clip Abs Neg Exp Log Sqrt Reciprocal Cast Identity Floor Ceil Round Sign Sin Cos",
    "Not IsNaN IsInf Shrink Atan",
)
def unary(at: Visit) -> list[Link] | None:
    links = [Link(X, number, Y, number) for number in range(at.rank())]
    if at.node.op_type == "FastGelu" and at.given(1):  # onnxruntime's own carries a bias
        links.append(Link(W, 0, Y, at.rank() - 1))
    return links


@rule(
    "Add Sub Mul Div Pow Max Min Mean Sum Where PRelu And Or Xor Equal Greater GreaterOrEqual Less LessOrEqual Mod",
    "BiasGelu",
)
def broadcasting(at: Visit) -> list[Link] | None:
    wanted = at.shape(Y)
    links = []
    for number in range(len(at.node.inputs)):
        if not at.given(number):
            continue
        shape = at.shape(("in", number))
        shift = len(wanted) - len(shape)
        links += [Link(("in", number), k, Y, k + shift) for k, size in enumerate(shape) if size == wanted[k + shift]]
    return links


@rule("Dropout")
def dropout(at: Visit) -> list[Link] | None:
    links = [Link(X, number, Y, number) for number in range(at.rank())]
    if len(at.node.outputs) > 1:
        links += [Link(X, number, ("out", 1), number) for number in range(at.rank())]
    return links


@rule("Conv")
def conv(at: Visit) -> list[Link] | None:
    _needs_weight(at)
    groups = at.attribute("group", 1)
    weight = at.shape(W)
    links = [Link(Y, 1, W, 0, role="out"), Link(X, 0, Y, 0)]
    if at.given(2):
        links.append(Link(Y, 1, ("in", 2), 0))
    if groups == 1:
        return [*links, Link(X, 1, W, 1, role="in")]
    # Groups go as a whole: what a group reads and what it makes is one. For depthwise convolutions that is one channel.
    return [*links, _blocks(X, 1, groups * weight[1], Y, 1, weight[0], groups)]


@rule("ConvTranspose")
def conv_transpose(at: Visit) -> list[Link] | None:
    _needs_weight(at)
    groups = at.attribute("group", 1)
    weight = at.shape(W)
    links = [Link(X, 0, Y, 0)]
    if at.given(2):
        links.append(Link(Y, 1, ("in", 2), 0))
    if groups == 1:
        return [*links, Link(X, 1, W, 0, role="in"), Link(Y, 1, W, 1, role="out")]
    whole = weight[1] * groups
    return [
        *links,
        Link(X, 1, W, 0, role="each"),
        _blocks(X, 1, weight[0], Y, 1, whole, groups),
    ]


def _needs_weight(at: Visit) -> None:
    if not at.network.weight(at.node.inputs[1]):
        raise Blocked(f"the filter of {label(at.node)} is not a constant")


def _blocks(a: Slot, a_axis: int, a_size: int, b: Slot, b_axis: int, b_size: int, groups: int) -> Link:
    """Every position of block k on one side tied to every position of block k on the other."""
    import numpy as np

    left = np.arange(a_size).reshape(groups, -1, 1)
    right = np.arange(b_size).reshape(groups, 1, -1)
    left, right = np.broadcast_arrays(left, right)
    return Link(a, a_axis, b, b_axis, left.reshape(-1), right.reshape(-1))


@rule("Gemm")
def gemm(at: Visit) -> list[Link] | None:
    rows, inner_a = (1, 0) if at.attribute("transA", 0) else (0, 1)
    inner_b, columns = (1, 0) if at.attribute("transB", 0) else (0, 1)
    links = [Link(X, rows, Y, 0, role="out"), Link(W, columns, Y, 1, role="out")]
    if at.given(2):
        shape, wanted = at.shape(("in", 2)), at.shape(Y)
        shift = 2 - len(shape)
        links += [Link(("in", 2), k, Y, k + shift) for k, size in enumerate(shape) if size == wanted[k + shift]]
    return links + _contraction(at, inner_a, inner_b)


@rule("MatMul")
def matmul(at: Visit) -> list[Link] | None:
    a, b, wanted = (at.shape(place) for place in (X, W, Y))
    if len(a) < 2 or len(b) < 2:
        raise Blocked(f"{label(at.node)} multiplies a vector")
    n = len(wanted)
    links = [Link(X, len(a) - 2, Y, n - 2, role="out"), Link(W, len(b) - 1, Y, n - 1, role="out")]
    for place, shape in ((X, a), (W, b)):
        shift = n - len(shape)
        links += [Link(place, k, Y, k + shift) for k in range(len(shape) - 2) if shape[k] == wanted[k + shift]]
    return links + _contraction(at, len(a) - 1, len(b) - 2)


def _contraction(at: Visit, inner_a: int, inner_b: int) -> list[Link]:
    """The link along which a product sums; none between two activations, whose sum is not to be cut."""
    if not any(at.network.weight(at.node.inputs[number]) for number in (0, 1)):
        return []
    return [Link(X, inner_a, W, inner_b, role="in")]


@rule("BatchNormalization")
def batch_normalization(at: Visit) -> list[Link] | None:
    if len([value for value in at.node.outputs if value.name]) > 1 or at.attribute("training_mode", 0):
        raise Blocked(f"{label(at.node)} is in training mode")
    links = [Link(X, number, Y, number) for number in range(at.rank())]
    return links + [Link(("in", number), 0, Y, 1) for number in range(1, 5)]


@rule("InstanceNormalization")
def instance_normalization(at: Visit) -> list[Link] | None:
    passed = [Link(X, k, Y, k) for k in range(min(2, at.rank()))]
    return [*passed, Link(W, 0, Y, 1), Link(("in", 2), 0, Y, 1)]


@rule("GroupNormalization")
def group_normalization(at: Visit) -> list[Link] | None:
    groups, channels = at.attribute("num_groups", 1), at.shape(X)[1]
    if at.shape(W)[0] != channels:
        raise Blocked(f"{label(at.node)} has one scale per group")
    scales = [Link(W, 0, Y, 1), Link(("in", 2), 0, Y, 1)]
    # Statistics are taken over a whole group, so that a group stays or goes.
    return [Link(X, 0, Y, 0), *scales, Link(X, 1, Y, 1), _blocks(X, 1, channels, Y, 1, channels, groups)]


@rule("LayerNormalization RMSNormalization SimplifiedLayerNormalization Softmax LogSoftmax LpNormalization Hardmax")
def across(at: Visit) -> list[Link] | None:
    """What takes statistics over one axis, or over it and all behind it, passes the others."""
    count, operator = at.rank(), at.node.op_type
    first = at.attribute("axis", -1) % count
    behind = operator.endswith("LayerNormalization") or operator == "RMSNormalization"
    taken = set(range(first, count)) if behind else {first}
    if operator in ("Softmax", "LogSoftmax", "Hardmax") and at.network.opset < 13:
        taken = set(range(at.attribute("axis", 1) % count, count))
    if at.axis in taken or (at.slot[0] == "in" and at.slot[1] > 0):
        verb = "normalizes over it" if "Norm" in operator else "works across it"
        raise Blocked(f"{label(at.node)} {verb}")
    return [Link(X, number, Y, number) for number in range(count) if number not in taken]


@rule("MaxPool AveragePool GlobalAveragePool GlobalMaxPool LpPool GlobalLpPool")
def pooling(at: Visit) -> list[Link] | None:
    if len(at.node.outputs) > 1 and at.node.outputs[1].uses():
        raise Blocked(f"{label(at.node)} gives positions, which count channels")
    return [Link(X, 0, Y, 0), Link(X, 1, Y, 1)]


@rule(
    "ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceProd ReduceLogSum ReduceLogSumExp ReduceSumSquare"
)
def reduction(at: Visit) -> list[Link] | None:
    count = at.rank()
    axes = _axes(at)
    if axes is None:
        raise Blocked(f"the axes of {label(at.node)} are not constant")
    if not axes:
        if at.attribute("noop_with_empty_axes", 0):
            return [Link(X, number, Y, number) for number in range(count)]
        axes = list(range(count))
    gone = {number % count for number in axes}
    kept = [number for number in range(count) if number not in gone]
    if at.attribute("keepdims", 1):
        return [Link(X, number, Y, number) for number in kept]
    return [Link(X, number, Y, place) for place, number in enumerate(kept)]


def _axes(at: Visit) -> list[int] | None:
    """The axes of a reduction: an input in new models, an attribute in old ones; None when only a run can tell."""
    if at.given(1):
        found = at.ints(1)
        return None if found is None else [int(number) for number in found]
    return [int(number) for number in at.node.attributes.get_ints("axes", ())]
