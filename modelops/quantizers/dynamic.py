"""Int8 weights, and activations quantized as they come: no data needed, and the usual choice for transformers.

Convolutions stay float: their dynamic kernel runs at a fifth of the speed of the float one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from modelops.core.workbench import Done, Workbench
from modelops.errors import UsageError, tool
from modelops.quantizers._budget import Grounds, Left
from modelops.quantizers._int8 import reduces
from modelops.quantizers._moving import Writer
from modelops.quantizers._options import Integer
from modelops.quantizers._rounding import Scheme
from modelops.quantizers._scope import chosen_ops, refuse_quantized
from modelops.quantizers._targets import known, resolve

_OPS = ("Gather", "Gemm", "MatMul")
# DynamicQuantizeLinear came with opset 11.
_OPSET = 11


class Dynamic(Integer):
    """8-bit weights; activations are quantized at run time, from their own range."""

    tools = ("onnx", "onnx-ir", "onnxscript")

    def quantize(self, source: Path, target: Path, workbench: Workbench) -> Done:
        from modelops.quantizers._budget import within

        refuse_quantized(source)
        if (kernels := known(self.target)) is not None and kernels.pairs:
            raise UsageError(
                f"--target {self.target} takes QuantizeLinear and DequantizeLinear alone", hint="use --method static"
            )
        if (self.explain or self.least_sqnr) and not workbench.has_data:
            asked = "--explain" if self.explain else "--least-sqnr"
            raise UsageError(f"{asked} needs --data, to measure on", hint="give a folder or file of samples")

        def make(left: Left) -> tuple[Done, Grounds | None]:
            with tool("dynamic quantization"):
                return self._made(source, target, workbench, left.floats)

        return within(make, source, target, least_sqnr=self.least_sqnr, explain=self.explain, seconds=self.search_time)

    def _made(
        self, source: Path, target: Path, workbench: Workbench, kept: frozenset[str]
    ) -> tuple[Done, Grounds | None]:
        """Quantize once, with these nodes left in float."""
        import onnx

        from modelops.graphs import files
        from modelops.quantizers._attention import rewritten
        from modelops.quantizers._improvements import Improve, Improved, improved
        from modelops.quantizers._memory import Memory
        from modelops.quantizers._tables import quantize_tables
        from modelops.quantizers._weights import opened

        ops, kernels = chosen_ops(self.op_types, _OPS, "dynamic"), resolve(self.target)
        reduced = reduces(self.reduce_range, kernels)
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
            fuse=self.fuse and kernels.fuses,
            opset=_OPSET,
            improve=improve if workbench.has_data else None,
        )
        grounds = None
        if memory is not None and (self.explain or self.least_sqnr):
            names = tuple(product.name for product in work.products)
            place = workbench.scratch / "float.onnx"
            files.save(work.model, place)
            grounds = Grounds(onnx.load(str(place)), names, {}, scheme, memory, exact=kernels.exact)
        writer = Writer(work.model.graph, per_channel=self.per_channel, reduced=reduced)
        for product in work.products:
            writer.replace(product)
        tables = quantize_tables(work.model, excluded=work.excluded) if "Gather" in ops else []
        cheaper = rewritten(work.model, fuse=self.fuse and kernels.fuses, approximate=self.approximate)
        done = work.written(target, tables, "int8, 7 bits" if reduced else "int8")
        return replace(done, notes=(*done.notes, *cheaper)), grounds
