"""The products with constant weights in a graph: what the weight matrix of a MatMul or Gemm is, and its bias."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Product:
    """``y = x · W (+ bias)``: W is K×N once ``transposed`` is undone, ``bias`` is a value to add."""

    node: ir.Node
    weight: ir.Value
    transposed: bool
    bias: ir.Value | None

    @property
    def key(self) -> tuple[str, bool]:
        """Equal for products that share their weights."""
        return str(self.weight.name), self.transposed

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        assert self.weight.const_value is not None
        rows, columns = (int(size) for size in self.weight.const_value.shape)
        return (columns, rows) if self.transposed else (rows, columns)

    def matrix(self) -> NDArray[Any]:
        """W as float32, K×N."""
        assert self.weight.const_value is not None
        array: NDArray[Any] = self.weight.const_value.numpy()
        return array.T if self.transposed else array


def products(graph: ir.Graph) -> Iterator[Product]:
    """Every MatMul and plain Gemm of the main graph whose second operand is a float32 matrix kept in the file."""
    for node in list(graph):
        if node.domain not in ("", "ai.onnx") or node.op_type not in ("MatMul", "Gemm"):
            continue
        weight = node.inputs[1]
        if weight is None or not _is_matrix(weight):
            continue
        if node.op_type == "MatMul":
            yield Product(node, weight, False, None)
        elif _is_plain(node):
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            yield Product(node, weight, bool(_int(node, "transB", 0)), bias)


def _is_matrix(value: ir.Value) -> bool:
    import onnx_ir as ir

    tensor = value.const_value
    return (
        value.is_initializer()
        and tensor is not None
        and tensor.dtype == ir.DataType.FLOAT
        and len(tensor.shape) == 2
        and tensor.size > 0
    )


def _is_plain(node: ir.Node) -> bool:
    """Whether a Gemm is a product and a sum, with no scaling and no transposed input."""
    return (
        not _int(node, "transA", 0)
        and _float(node, "alpha", 1.0) == 1.0
        and (_float(node, "beta", 1.0) == 1.0 or len(node.inputs) < 3 or node.inputs[2] is None)
    )


def _int(node: ir.Node, name: str, default: int) -> int:
    found = node.attributes.get(name)
    return default if found is None else int(found.as_int())


def _float(node: ir.Node, name: str, default: float) -> float:
    found = node.attributes.get(name)
    return default if found is None else float(found.as_float())


def read(source: Path) -> ir.Model:
    """The model, with constants as initializers, no initializer among the inputs, and a unique name on every node."""
    import onnx_ir.passes.common as passes

    from modelops.graphs import files
    from modelops.quantizers._scope import name_nodes

    model = files.load(source)
    passes.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=16)(model)
    passes.RemoveInitializersFromInputsPass()(model)
    name_nodes(model.graph)
    return model


def cleaned(model: ir.Model) -> ir.Model:
    """The model without nodes, weights and opset imports that nothing uses."""
    import onnx_ir.passes.common as passes

    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    return model
