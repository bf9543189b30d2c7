"""onnxscript-fusions: transformers in onnxruntime's own operators, found by onnxscript's rewriter."""

from __future__ import annotations

from pathlib import Path

from modelops.core.component import option
from modelops.core.workbench import Done
from modelops.errors import tool
from modelops.simplifiers import Arena, Simplifier
from modelops.simplifiers._changes import brought_in


class OnnxscriptFusions(Simplifier):
    """Fuse attention, normalization and activations into onnxruntime's own operators, with onnxscript's rewriter."""

    tools = ("onnxscript", "onnx-ir", "onnx")
    appetite = 4.0
    saves = True
    fuses = True

    projections: bool = option(
        default=False, help="Leave the three projections of attention outside, as one product of their own."
    )

    skips: bool = option(
        default=False, help="Fuse sums with the normalization behind them too: slower on CPUs, faster on GPUs."
    )

    def simplify(self, source: Path, target: Path, workbench: Arena) -> Done:
        from modelops.graphs import files
        from modelops.graphs.describe import summary
        from modelops.graphs.fusions import DOMAIN, fuse

        model = files.load(source)
        with tool("onnxscript", hint="try another --engine"):
            import onnx_ir.passes.common as passes

            passes.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=16)(model)
            passes.RemoveInitializersFromInputsPass()(model)
            counts = fuse(model, apart=self.projections, skips=self.skips)
            passes.RemoveUnusedNodesPass()(model)
            passes.RemoveUnusedOpsetsPass()(model)
        if not counts:
            return Done(notes=("no pattern of a transformer was found",))
        files.save(model, target)
        found = brought_in(summary(source)["operators"], summary(target)["operators"], DOMAIN)
        return Done(details={"fusions": found, "rewritten": counts})
