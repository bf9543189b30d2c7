"""onnxscript-fusions: transformers in onnxruntime's own operators, found by onnxscript's rewriter."""

from __future__ import annotations

from pathlib import Path

from modelops.core.component import option
from modelops.core.workbench import Done
from modelops.errors import tool
from modelops.simplifiers import Arena, Simplifier


class OnnxscriptFusions(Simplifier):
    """Fuse attention, normalization and activations into onnxruntime's own operators, with onnxscript's rewriter."""

    tools = ("onnxscript", "onnx-ir", "onnx")
    appetite = 4.0
    fuses = True

    projections: bool = option(
        default=False, help="Leave the three projections of attention outside, as one product of their own."
    )

    def simplify(self, source: Path, target: Path, workbench: Arena) -> Done:
        from modelops.graphs import files
        from modelops.graphs.fusions import fuse

        model = files.load(source)
        with tool("onnxscript", hint="try another --engine"):
            import onnx_ir.passes.common as passes

            passes.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=16)(model)
            passes.RemoveInitializersFromInputsPass()(model)
            counts = fuse(model, apart=self.projections)
            passes.RemoveUnusedNodesPass()(model)
            passes.RemoveUnusedOpsetsPass()(model)
        if not counts:
            return Done(notes=("no pattern of a transformer was found",))
        files.save(model, target)
        return Done(details={"fusions": counts})
