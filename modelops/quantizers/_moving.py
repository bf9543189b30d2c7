"""Products whose activations are quantized as they come, from their own range.

::

    MatMul(x, W)   →   Mul(Cast(MatMulInteger(DynamicQuantizeLinear(x), int8 W)), scale of x · scales of W)

onnxruntime fuses these nodes into one kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from modelops.quantizers._weights import Product


class Writer:
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
