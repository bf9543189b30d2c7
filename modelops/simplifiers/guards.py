"""guards: what torch's exporter puts behind every Softmax against rows that are masked wholly, where none can be."""

from __future__ import annotations

from pathlib import Path

from modelops.core.workbench import Done
from modelops.errors import tool
from modelops.simplifiers import Arena, Simplifier


class Guards(Simplifier):
    """Remove the guards against NaN behind Softmax where no row can be masked wholly."""

    tools = ("onnx-ir",)
    appetite = 3.0
    saves = True

    def simplify(self, source: Path, target: Path, workbench: Arena) -> Done:
        from modelops.graphs import files, guards

        model = files.load(source)
        with tool("onnx_ir"):
            import onnx_ir.passes.common as passes

            passes.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=16)(model)
            found = guards.drop_dead(model)
            passes.RemoveUnusedNodesPass()(model)
        if not found:
            return Done(notes=("no guard is provably dead",))
        files.save(model, target)
        return Done(details={"guards": found})
