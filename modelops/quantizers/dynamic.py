"""Int8 weights, and activations quantized as they come: no data needed, and the usual choice for transformers.

::

    MatMul(x, W)   →   Mul(Cast(MatMulInteger(DynamicQuantizeLinear(x), int8 W)), scale of x · scales of W)

onnxruntime fuses these nodes into one kernel. Convolutions stay float: their dynamic kernel runs at a fifth of the
speed of the float one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from modelops.core.component import option
from modelops.core.workbench import Done, Workbench
from modelops.errors import UsageError, tool
from modelops.quantizers import Quantizer
from modelops.quantizers._budget import Grounds
from modelops.quantizers._int8 import ReducedRange, reduces
from modelops.quantizers._rounding import Scheme
from modelops.quantizers._scope import chosen_ops, refuse_quantized
from modelops.quantizers._targets import TargetName, resolve

if TYPE_CHECKING:
    import onnx_ir as ir

    from modelops.quantizers._weights import Product

_OPS = ("Gather", "Gemm", "MatMul")
# DynamicQuantizeLinear came with opset 11.
_OPSET = 11


class Dynamic(Quantizer):
    """8-bit weights; activations are quantized at run time, from their own range."""

    tools = ("onnx", "onnx-ir", "onnxscript")

    per_channel: bool = option(default=True, help="Give every output channel of a weight its own scale.")
    op_types: tuple[str, ...] = option(default=(), help="Operators to quantize (default: all that the method knows).")
    fuse: bool = option(
        default=True, help="Fuse attention and normalization for onnxruntime first, where that is found right."
    )
    exclude: tuple[str, ...] = option(
        default=(), help="Nodes to leave in float, by name or by what they write; * and ? match."
    )
    reduce_range: ReducedRange = option(
        default="auto", help="Keep weights to 7 bits, as CPUs without VNNI need to stay exact; auto asks the target."
    )
    target: TargetName = option(
        default="auto", help="The kernels to make it for: signs, 7 bits and symmetry follow; auto asks this machine's."
    )

    migrate: bool = option(
        default=True, help="With --data, move the spread of activations into weights where that lowers the error."
    )
    outliers: bool = option(
        default=True, help="With --data, multiply the few columns that stand out in float, where they cost precision."
    )
    compensate: bool = option(default=True, help="With --data, round weights so that errors cancel on the samples.")
    correct_bias: bool = option(
        default=True, help="With --data, take mean errors off biases where that lowers the error."
    )

    explain: bool = option(default=False, help="Measure what every node costs, and list it in the report.")
    least_sqnr: float = option(
        default=0.0, help="Signal over noise of outputs to keep, in dB: nodes go back to float for it.", min=0, max=120
    )
    search_time: float = option(default=60.0, help="Time for measuring nodes.", min=1, unit="seconds")

    def quantize(self, source: Path, target: Path, workbench: Workbench) -> Done:
        from modelops.quantizers._budget import within

        refuse_quantized(source)
        if (self.explain or self.least_sqnr) and not workbench.has_data:
            asked = "--explain" if self.explain else "--least-sqnr"
            raise UsageError(f"{asked} needs --data, to measure on", hint="give a folder or file of samples")

        def make(kept: frozenset[str]) -> tuple[Done, Grounds | None]:
            with tool("dynamic quantization"):
                return self._made(source, target, workbench, kept)

        return within(make, source, target, least_sqnr=self.least_sqnr, explain=self.explain, seconds=self.search_time)

    def _made(
        self, source: Path, target: Path, workbench: Workbench, kept: frozenset[str]
    ) -> tuple[Done, Grounds | None]:
        """Quantize once, with these nodes left in float."""
        import onnx

        from modelops.graphs import files
        from modelops.quantizers._improvements import Improve, Improved, improved
        from modelops.quantizers._memory import Memory
        from modelops.quantizers._tables import quantize_tables
        from modelops.quantizers._weights import opened

        ops, reduced = chosen_ops(self.op_types, _OPS, "dynamic"), reduces(self.reduce_range, resolve(self.target))
        scheme = Scheme(self.per_channel, reduced)
        wanted = Improve(self.migrate, self.outliers, self.compensate, self.correct_bias)
        memory: Memory | None = None

        def improve(model: Path, names: list[str]) -> Improved:
            nonlocal memory
            memory = Memory(onnx.load(str(model)), workbench.batches, workbench.scratch)
            return improved(model, names, scheme, wanted, memory) if wanted.anything else Improved(model, [], {})

        work = opened(
            source,
            workbench.scratch,
            ops=ops,
            exclude=self.exclude,
            kept=kept,
            fuse=self.fuse,
            opset=_OPSET,
            improve=improve if workbench.has_data else None,
        )
        grounds = None
        if memory is not None and (self.explain or self.least_sqnr):
            names = tuple(product.name for product in work.products)
            place = workbench.scratch / "float.onnx"
            files.save(work.model, place)
            grounds = Grounds(onnx.load(str(place)), names, {}, scheme, memory)
        writer = _Writer(work.model.graph, per_channel=self.per_channel, reduced=reduced)
        for product in work.products:
            writer.replace(product)
        tables = quantize_tables(work.model, excluded=work.excluded) if "Gather" in ops else []
        return work.written(target, tables, "int8, 7 bits" if reduced else "int8"), grounds


class _Writer:
    """Replaces products one by one; inputs and weights that several share are quantized once."""

    def __init__(self, graph: ir.Graph, *, per_channel: bool, reduced: bool) -> None:
        self.graph = graph
        self.per_channel = per_channel
        self.reduced = reduced
        self._weights: dict[tuple[str, bool], tuple[ir.Value, ir.Value, ir.Value]] = {}
        self._inputs: dict[str, ir.Node] = {}

    def replace(self, product: Product) -> None:
        import onnx_ir as ir

        node, base = product.node, product.node.name
        x = node.inputs[0]
        assert x is not None
        integers, scales, zero = self._weight(product)
        quantize = self._input(node, x)
        rows, scale, shift = quantize.outputs
        multiply = ir.node("MatMulInteger", [rows, integers, shift, zero], name=f"{base}_integer")
        cast = ir.node("Cast", [multiply.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{base}_float")
        factor = ir.node("Mul", [scale, scales], name=f"{base}_scale")
        new = [multiply, cast, factor, ir.node("Mul", [cast.outputs[0], factor.outputs[0]], name=f"{base}_scaled")]
        if product.bias is not None:
            new.append(ir.node("Add", [new[-1].outputs[0], product.bias], name=f"{base}_bias"))
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], new, node.outputs, new[-1].outputs)

    def _input(self, before: ir.Node, x: ir.Value) -> ir.Node:
        import onnx_ir as ir

        name = str(x.name)
        if name not in self._inputs:
            node = ir.node("DynamicQuantizeLinear", [x], num_outputs=3, name=f"{name}_quantize")
            for value, suffix in zip(node.outputs, ("quantized", "scale", "zero_point"), strict=True):
                value.name = f"{name}_{suffix}"
            self.graph.insert_before(before, node)
            self._inputs[name] = node
        return self._inputs[name]

    def _weight(self, product: Product) -> tuple[ir.Value, ir.Value, ir.Value]:
        if product.key not in self._weights:
            import numpy as np
            import onnx_ir as ir

            from modelops.quantizers._int8 import quantized

            integers, scales = quantized(product.matrix(), axis=1 if self.per_channel else None, reduced=self.reduced)
            arrays = {"int8": np.ascontiguousarray(integers), "scales": scales, "zero": np.zeros_like(scales, np.int8)}
            values = []
            for suffix, array in arrays.items():
                name = f"{product.key[0]}{'_t' if product.transposed else ''}_{suffix}"
                value = ir.val(name, const_value=ir.tensor(array, name=name))
                self.graph.register_initializer(value)
                values.append(value)
            self._weights[product.key] = (values[0], values[1], values[2])
        return self._weights[product.key]
