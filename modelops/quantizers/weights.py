"""Weights in blocks of 8 or 4 bits, activations in float: the smallest file for the least loss, seldom the fastest.

A matrix product becomes onnxruntime's MatMulNBits; every ``block_size`` weights of one output share a scale, and with
4 bits a zero point. Weights are rounded to the nearest step.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.core.component import option
from modelops.core.workbench import Done, Workbench
from modelops.errors import UsageError, tool
from modelops.quantizers._options import Fusing
from modelops.quantizers._scope import chosen_ops, refuse_quantized

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from modelops.quantizers._weights import Product

_OPS = ("Gather", "Gemm", "MatMul")
_DOMAIN = "com.microsoft"
_BLOCK_SIZES = (16, 32, 64, 128, 256)
# MatMulNBits computes with int8 activations at level 4, its fastest, and with float ones at level 1.
_INT8_COMPUTE = 4


class Weights(Fusing):
    """Weights alone in blocks of 8 or 4 bits; activations stay float."""

    tools = ("onnx", "onnx-ir", "onnxscript")

    bits: int = option(default=8, help="Bits of a weight: 8 or 4.")
    block_size: int = option(default=32, help="Weights that share a scale: 16, 32, 64, 128 or 256.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (4, 8):
            raise UsageError(f"--bits is 8 or 4, not {self.bits}")
        if self.block_size not in _BLOCK_SIZES:
            listed = f"{', '.join(map(str, _BLOCK_SIZES[:-1]))} or {_BLOCK_SIZES[-1]}"
            raise UsageError(f"--block-size is {listed}, not {self.block_size}", hint="32 is a good choice")

    def quantize(self, source: Path, target: Path, workbench: Workbench) -> Done:
        from modelops.quantizers._tables import quantize_tables
        from modelops.quantizers._weights import opened

        refuse_quantized(source)
        ops = chosen_ops(self.op_types, _OPS, "weights")
        with tool("weight quantization"):
            work = opened(source, workbench.scratch, ops=ops, exclude=self.exclude, fuse=self.fuse)
            stored: dict[tuple[str, bool], list[ir.Value]] = {}
            for product in work.products:
                self._replace(work.model.graph, product, stored)
            if work.products:
                work.model.graph.opset_imports[_DOMAIN] = 1
            tables = quantize_tables(work.model, excluded=work.excluded) if "Gather" in ops else []
            return work.written(target, tables, f"{self.bits} bits in blocks of {self.block_size}")

    def _replace(self, graph: ir.Graph, product: Product, stored: dict[tuple[str, bool], list[ir.Value]]) -> None:
        import onnx_ir as ir

        node, base = product.node, product.node.name
        if product.key not in stored:
            stored[product.key] = self._store(graph, product)
        inner, outer = product.shape
        attributes = {
            "K": inner,
            "N": outer,
            "bits": self.bits,
            "block_size": self.block_size,
            "accuracy_level": _INT8_COMPUTE,
        }
        new = [
            ir.node(
                "MatMulNBits",
                [node.inputs[0], *stored[product.key]],
                attributes,
                domain=_DOMAIN,
                name=f"{base}_{self.bits}bits",
            )
        ]
        if product.bias is not None:
            new.append(ir.node("Add", [new[-1].outputs[0], product.bias], name=f"{base}_bias"))
        ir.convenience.replace_nodes_and_values(graph, node, [node], new, node.outputs, new[-1].outputs)

    def _store(self, graph: ir.Graph, product: Product) -> list[ir.Value]:
        import onnx_ir as ir

        arrays = blocked(product.matrix(), self.bits, self.block_size)
        values = []
        for suffix, array in zip(("blocks", "scales", "zero_points"), arrays, strict=False):
            name = f"{product.key[0]}{'_t' if product.transposed else ''}_{suffix}"
            value = ir.val(name, const_value=ir.tensor(array, name=name))
            graph.register_initializer(value)
            values.append(value)
        return values


def blocked(matrix: NDArray[Any], bits: int, block_size: int) -> tuple[NDArray[Any], ...]:
    """A K×N matrix as MatMulNBits keeps it: (integers, scales), and zero points with 4 bits.

    Integers are N × blocks × bytes, scales N × blocks. With 8 bits the zero point is 128 and a block is symmetric; with
    4 bits a block reaches from its least to its largest weight, zero included.
    """
    import numpy as np

    inner, outer = matrix.shape
    blocks = -(-inner // block_size)
    padded = np.zeros((outer, blocks * block_size), dtype=np.float32)
    padded[:, :inner] = matrix.T
    grouped = padded.reshape(outer, blocks, block_size)
    if bits == 8:
        scales = _nonzero(np.abs(grouped).max(axis=2) / 127)
        integers = np.rint(grouped / scales[:, :, None]) + 128
        return np.clip(integers, 1, 255).astype(np.uint8), scales
    low, high = np.minimum(grouped.min(axis=2), 0), np.maximum(grouped.max(axis=2), 0)
    scales = _nonzero((high - low) / 15)
    zeros = np.clip(np.rint(-low / scales), 0, 15).astype(np.uint8)
    integers = np.clip(np.rint(grouped / scales[:, :, None]) + zeros[:, :, None], 0, 15).astype(np.uint8)
    return _packed(integers), scales, _packed(zeros)


def _nonzero(scales: NDArray[Any]) -> NDArray[np.float32]:
    """The scales as float32, with 1 for a block of zeros."""
    import numpy as np

    return np.where(scales > np.finfo(np.float32).tiny, scales, 1.0).astype(np.float32)


def _packed(integers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pairs along the last axis in one byte, the first in the low half; an odd one out gets a zero beside it."""
    import numpy as np

    if integers.shape[-1] % 2:
        integers = np.concatenate([integers, np.zeros_like(integers[..., :1])], axis=-1)
    low, high = integers[..., 0::2], integers[..., 1::2]
    return (low | (high << 4)).astype(np.uint8)
