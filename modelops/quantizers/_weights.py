"""The products with constant weights in a graph: what the weight matrix of a MatMul or Gemm is, and its bias."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.core.workbench import Done
from modelops.quantizers._opsets import at_least
from modelops.quantizers._scope import (
    WEIGHTY,
    all_left_out,
    described_nodes,
    excluded_nodes,
    name_nodes,
    nothing_to_quantize,
)
from modelops.quantizers._sums import apart

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from modelops.quantizers._improvements import Improved


_STANDARD = ("", "ai.onnx")
_DOMAINS = {"MatMul": _STANDARD, "Gemm": _STANDARD, "FusedMatMul": ("com.microsoft",)}


@dataclass(frozen=True)
class Product:
    """``y = x · W (+ bias)``: W is K×N once ``transposed`` is undone, ``bias`` is a value to add."""

    node: ir.Node
    weight: ir.Value
    transposed: bool
    bias: ir.Value | None

    @property
    def name(self) -> str:
        return str(self.node.name)

    @property
    def op(self) -> str:
        """The standard's name of the operator."""
        return str(self.node.op_type).removeprefix("Fused")

    @property
    def stored(self) -> bool:
        """Whether the node itself reads the weight transposed, with no other node that turns it."""
        return self.transposed and self.node.op_type != "MatMul"

    @property
    def turns(self) -> tuple[ir.Node, ...]:
        """The node that turns the weight for this one, where there is such a node."""
        maker = self.node.inputs[1].producer() if self.node.inputs[1] is not None else None
        return () if maker is None else (maker,)

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
    """Every product of the main graph whose second operand is a float32 matrix kept in the file.

    That is a MatMul, also of a matrix that a Transpose turns (the tied weights of language models), a plain Gemm, or
    onnxruntime's FusedMatMul of both.
    """
    for node in list(graph):
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        if weight is None or node.domain not in _DOMAINS.get(node.op_type, ()):
            continue
        if node.op_type == "MatMul" and (turned := _turned(weight)) is not None:
            yield Product(node, turned, True, None)
        if not _is_matrix(weight):
            continue
        if node.op_type == "MatMul":
            yield Product(node, weight, False, None)
        elif node.op_type == "Gemm" and _is_plain(node):
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            yield Product(node, weight, bool(_int(node, "transB", 0)), bias)
        elif node.op_type == "FusedMatMul" and _is_plain(node) and not _int(node, "transBatchA", 0):
            yield Product(node, weight, bool(_int(node, "transB", 0)), None)


def _turned(value: ir.Value) -> ir.Value | None:
    """The matrix in the file that a value is the transpose of."""
    node = value.producer()
    if node is None or node.op_type != "Transpose" or node.domain not in _STANDARD:
        return None
    inner, order = node.inputs[0], node.attributes.get("perm")
    turns = order is None or list(order.as_ints()) == [1, 0]
    return inner if turns and inner is not None and _is_matrix(inner) else None


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


@dataclass
class Work:
    """An opened model and what of it is to be quantized; ``fusions`` were made before, ``notes`` say so."""

    model: ir.Model
    products: list[Product]
    excluded: set[str]
    nodes: int
    weighted: list[ir.Node]
    fusions: dict[str, int]
    notes: tuple[str, ...]
    improvements: list[dict[str, Any]]
    left_out: int
    """How many products the method could quantize that were to stay as they are."""

    def written(self, target: Path, tables: Sequence[str], weights: str) -> Done:
        """Write the changed model, and say what was done; GateFailed when that is nothing."""
        from modelops.graphs import files

        names = [product.name for product in self.products]
        if not names and not tables and self.left_out:
            raise nothing_to_quantize(all_left_out(self.left_out))
        if not names and not tables:
            raise nothing_to_quantize(f"no float32 weights of two dimensions to treat among {self.nodes} nodes")
        files.save(cleaned(self.model), target)
        return Done(
            notes=self.notes,
            details={
                "quantized": {"products": len(names), "tables": len(tables)},
                "left_float": described_nodes(node for node in self.weighted if node.name not in set(names)),
                "nodes": sorted([*names, *tables]),
                "weights": weights,
                "fusions": self.fusions,
                **({"improvements": self.improvements} if self.improvements else {}),
            },
        )


def opened(
    source: Path,
    scratch: Path,
    *,
    ops: frozenset[str],
    exclude: Sequence[str],
    fuse: bool,
    opset: int = 0,
    kept: frozenset[str] = frozenset(),
    improve: Callable[[Path, list[str]], Improved] | None = None,
) -> Work:
    """The model ready to be changed, fused first where that is asked for and found right, then improved.

    ``kept`` names nodes of the fused graph that stay as they are.
    """
    from modelops.quantizers._fusions import fused

    model = read(source)
    excluded = excluded_nodes(exclude, {str(n.name): [str(v.name) for v in n.outputs] for n in model.graph})
    place, notes = source, list[str]()
    fusions: dict[str, int] = {}
    if fuse:
        place, fusions, note = fused(source, scratch, excluded)
        notes.append(note)
        model = read(place) if fusions else model
    able = [p for p in products(model.graph) if p.op in ops]
    chosen = [p for p in able if p.name not in excluded | kept]
    names = [product.name for product in chosen]
    improvements: list[dict[str, Any]] = []
    if improve is not None and names:
        better = improve(place, names)
        model, improvements = read(better.model), better.table
        notes.append(better.note)
    model = at_least(model, opset)
    apart(model)
    chosen = [p for p in products(model.graph) if p.name in set(names)]
    weighted = [node for node in model.graph if node.op_type in WEIGHTY]
    told = tuple(note for note in notes if note)
    nodes, left_out = len(list(model.graph)), len(able) - len(names)
    return Work(model, chosen, excluded, nodes, weighted, fusions, told, improvements, left_out)


def read(source: Path) -> ir.Model:
    """The model, with constants as initializers, no initializer among the inputs, and a unique name on every node."""
    import onnx_ir.passes.common as passes

    from modelops.graphs import files

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
