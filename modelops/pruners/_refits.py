"""Which weights can be refitted after a cut, and what each should make: the outputs that the source makes there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from modelops.pruners._segments import Parts

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

# Rows of normal equations: some for every unknown, and no more than what takes little time.
_ROWS_PER_UNKNOWN, _FEWEST_ROWS, _MOST_ROWS = {"conv": 6, "product": 12}, 4096, 24576
_MASKED = 4
#: Inputs of a weight beyond which only its bias is refitted.
MOST_UNKNOWNS = 4608


@dataclass(frozen=True)
class Refit:
    """A convolution or matrix product of a cut network, whose weights are to make up for what it no longer reads.

    ``target`` names the value in the source that it should come to, ``other`` what else is added to reach that value;
    ``bias`` is the node that adds the bias (itself, or an Add behind it), and the number of that input.
    """

    node: ir.Node
    kind: Literal["conv", "product"]
    target: str
    other: str | None
    bias: tuple[ir.Node, int] | None

    @property
    def reads(self) -> str:
        return str(self.node.inputs[0].name)

    @property
    def ends_in(self) -> str:
        """The value that its output becomes: with the bias, and with what it is added to and nowhere else read."""
        end, _ = _bias(self.node)
        add = _only_add(end)
        return str((end if add is None else add.outputs[0]).name)

    @property
    def weight(self) -> ir.Value:
        value = self.node.inputs[1]
        assert value is not None
        return value

    @property
    def _turned(self) -> bool:
        """Whether the weight holds outputs before inputs."""
        return self.kind == "conv" or bool(self.node.attributes.get_int("transB", 0))

    def matrix(self) -> NDArray[np.float32]:
        """The weight as (inputs, outputs); a filter's positions count as inputs."""
        import numpy as np

        array = array_of(self.weight).astype(np.float32)
        flat = array.reshape(len(array), -1)
        return flat.T if self._turned else flat

    def write_matrix(self, matrix: NDArray[Any]) -> None:
        """Give the node a new weight in the form of the old one."""
        import numpy as np
        import onnx_ir as ir

        old = array_of(self.weight)
        array = (matrix.T if self._turned else matrix).reshape(old.shape).astype(old.dtype)
        self.weight.const_value = ir.tensor(np.ascontiguousarray(array), name=self.weight.name)

    def bias_row(self) -> NDArray[np.float32]:
        """The bias of every output; zeros where there is none."""
        import numpy as np

        value = self._bias_value()
        if value is None:
            return np.zeros(self.matrix().shape[1], np.float32)
        return np.broadcast_to(array_of(value).astype(np.float32).reshape(-1), (self.matrix().shape[1],))

    def write_bias(self, row: NDArray[Any]) -> None:
        """Give the node a bias of its own, since others may read the same."""
        import numpy as np
        import onnx_ir as ir

        assert self.bias is not None
        node, number = self.bias
        old = self._bias_value()
        shape = array_of(old).shape if old is not None and array_of(old).size == len(row) else (len(row),)
        array = np.ascontiguousarray(row.reshape(shape).astype(array_of(self.weight).dtype))
        value = ir.val(f"{self.weight.name}_bias_refitted", const_value=ir.tensor(array))
        assert node.graph is not None
        node.graph.register_initializer(value)
        if number >= len(node.inputs):
            node.resize_inputs(number + 1)
        node.replace_input_with(number, value)
        if old is not None and old.name is not None and not old.uses():
            del node.graph.initializers[old.name]
            value.name = old.name

    def _bias_value(self) -> ir.Value | None:
        if self.bias is None:
            return None
        node, number = self.bias
        return node.inputs[number] if number < len(node.inputs) else None


def array_of(value: ir.Value) -> NDArray[Any]:
    """The elements of a constant."""
    assert value.const_value is not None
    array: NDArray[Any] = value.const_value.numpy()
    return array


def refits(parts: Parts) -> list[Refit]:
    """Every weight that can be refitted, in the order in which the network runs."""
    found: list[Refit] = []
    for node in parts.nodes:
        kind = _kind(node)
        if kind is None:
            continue
        end, bias = _bias(node)
        added = _residual(parts, end, [refit.node for refit in found])
        target, other = added if added is not None else (str(end.name), None)
        found.append(Refit(node, kind, target, other, bias))
    return found


def _kind(node: ir.Node) -> Literal["conv", "product"] | None:
    """What sort of weight a node has; None when it has none that can be refitted."""
    if node.domain not in ("", "ai.onnx") or len(node.inputs) < 2 or node.inputs[0] is None:
        return None
    weight = node.inputs[1]
    if weight is None or weight.const_value is None or weight.is_graph_input() or len(weight.uses()) > 1:
        return None
    if weight.const_value.dtype.name not in ("FLOAT", "DOUBLE", "FLOAT16"):
        return None
    attributes = node.attributes
    if node.op_type == "Conv":
        return "conv" if attributes.get_int("group", 1) == 1 else None
    if node.op_type == "MatMul":
        return "product" if len(weight.const_value.shape) == 2 else None
    if node.op_type == "Gemm":
        plain = attributes.get_float("alpha", 1.0) == 1.0 and attributes.get_float("beta", 1.0) == 1.0
        return "product" if plain and not attributes.get_int("transA", 0) else None
    return None


def _bias(node: ir.Node) -> tuple[ir.Value, tuple[ir.Node, int] | None]:
    """(the value with the bias in it, where the bias is added); for a MatMul that is an Add of a constant row."""
    output = node.outputs[0]
    if node.op_type in ("Conv", "Gemm"):
        return output, (node, 2)
    add = _only_add(output)
    if add is not None:
        number = 0 if add.inputs[1] is output else 1
        row, width = add.inputs[number], array_of(node.inputs[1]).shape[1]
        if row is not None and row.const_value is not None:
            shape = array_of(row).shape
            if shape and shape[-1] == width == math.prod(shape):
                return add.outputs[0], (add, number)
    return output, None


def _only_add(value: ir.Value) -> ir.Node | None:
    """The Add that a value goes into and nowhere else."""
    uses = list(value.uses())
    alone = len(uses) == 1 and uses[0].node.op_type == "Add" and not value.is_graph_output()
    return uses[0].node if alone else None


def _residual(parts: Parts, end: ir.Value, earlier: list[ir.Node]) -> tuple[str, str] | None:
    """(the sum, the other summand) when the value only goes into an Add, and all else in it is fitted already.

    Aiming at the sum makes up for what went wrong on the other path too.
    """
    add = _only_add(end)
    if add is None:
        return None
    other = add.inputs[0] if add.inputs[1] is end else add.inputs[1]
    if other is None or other.const_value is not None or other is end or other.name is None:
        return None
    behind = parts.before([other.name], ())
    if any(_kind(node) is not None and node not in earlier for node in behind):
        return None
    return str(add.outputs[0].name), other.name


def rows_wanted(refit: Refit) -> int:
    """How many rows of samples settle a weight."""
    return min(max(_FEWEST_ROWS, _ROWS_PER_UNKNOWN[refit.kind] * len(refit.matrix())), _MOST_ROWS)


class Rows:
    """What a weight reads and makes as rows of matrices, at positions that are the same in every network.

    ``most`` is how many positions of one sample are taken at most; seeds decide which. Of ``masked`` samples more are
    taken, since many of their positions do not count.
    """

    def __init__(self, refit: Refit, most: int, *, masked: bool = False) -> None:
        self._refit = refit
        self._most = _MASKED * most if masked and refit.kind == "product" else most
        self._chosen: dict[int, NDArray[np.int64]] = {}

    def outputs(self, array: NDArray[Any]) -> NDArray[Any]:
        """(rows, channels) of an output."""
        import numpy as np

        if self._refit.kind == "conv":
            array = np.moveaxis(array, 1, -1)
        inner = array.reshape(len(array), -1, array.shape[-1])
        return inner[:, self._positions(inner.shape[1])].reshape(-1, array.shape[-1])

    def inputs(self, array: NDArray[Any], output: tuple[int, ...]) -> NDArray[Any]:
        """(rows, inputs of the weight) of an input, for an output of that shape."""
        import numpy as np

        if self._refit.kind == "product":
            inner = array.reshape(len(array), -1, array.shape[-1])
            return inner[:, self._positions(inner.shape[1])].reshape(-1, array.shape[-1])
        spatial = output[2:]
        kernel, strides, dilations, pads = geometry(self._refit.node, array.shape[2:], spatial)
        padded = np.pad(array, [(0, 0), (0, 0), *pads])
        places = np.unravel_index(self._positions(math.prod(spatial)), spatial)
        rows = np.empty((len(array), array.shape[1], len(places[0]), math.prod(kernel)), array.dtype)
        for number, offset in enumerate(np.ndindex(*kernel)):
            index = tuple(p * s + o * d for p, s, o, d in zip(places, strides, offset, dilations, strict=True))
            rows[..., number] = padded[(slice(None), slice(None), *index)]
        return np.moveaxis(rows, 1, 2).reshape(len(array) * len(places[0]), -1)

    def samples(self, output: tuple[int, ...]) -> NDArray[np.int64]:
        """For every row, the sample of the batch that it is from."""
        import numpy as np

        count = math.prod(output[2:] if self._refit.kind == "conv" else output[1:-1])
        return np.repeat(np.arange(output[0]), len(self._positions(count)))

    def seen(self, output: tuple[int, ...], mask: NDArray[Any] | None) -> NDArray[np.bool_] | None:
        """Which rows are of positions that the model's mask lets through; None where it has none, or tells nothing."""
        if self._refit.kind != "product" or mask is None or len(output) < 3 or output[:-1] != mask.shape:
            return None
        found: NDArray[np.bool_] = (mask[:, self._positions(mask.shape[1])] != 0).reshape(-1)
        return found

    def _positions(self, count: int) -> NDArray[np.int64]:
        """Which of the positions of a sample are taken."""
        import numpy as np

        if count not in self._chosen:
            few = np.random.default_rng(0).choice(count, min(count, self._most), replace=False)
            self._chosen[count] = np.sort(few)
        return self._chosen[count]


def geometry(
    node: ir.Node, before: tuple[int, ...], after: tuple[int, ...]
) -> tuple[list[int], list[int], list[int], list[tuple[int, int]]]:
    """(kernel, strides, dilations, pads of each axis) of a convolution between these spatial sizes."""
    kernel = [int(size) for size in array_of(node.inputs[1]).shape[2:]]
    count = len(kernel)
    strides = [int(s) for s in node.attributes.get_ints("strides", None) or [1] * count]
    dilations = [int(d) for d in node.attributes.get_ints("dilations", None) or [1] * count]
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        pads = []
        for k, s, d, size, out in zip(kernel, strides, dilations, before, after, strict=True):
            total = max(0, (out - 1) * s + (k - 1) * d + 1 - size)
            small, large = total // 2, total - total // 2
            pads.append((small, large) if automatic == "SAME_UPPER" else (large, small))
        return kernel, strides, dilations, pads
    given = [int(p) for p in node.attributes.get_ints("pads", None) or [0] * 2 * count]
    return kernel, strides, dilations, list(zip(given[:count], given[count:], strict=True))
