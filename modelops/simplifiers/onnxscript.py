"""onnxscript: the optimizer that torch's exporter ends with: inlining, folding, rewrites, common subexpressions."""

from __future__ import annotations

from pathlib import Path

from modelops.core.component import option
from modelops.core.workbench import Done
from modelops.errors import tool
from modelops.simplifiers import Arena, Simplifier


class Onnxscript(Simplifier):
    """Inline functions, fold constants and apply onnxscript's rewrite rules."""

    tools = ("onnxscript", "onnx-ir", "onnx")
    appetite = 4.0
    saves = True

    iterations: int = option(
        default=4, help="Rounds of folding and rewriting; it stops earlier when nothing changes.", min=1
    )
    fold_limit: int = option(default=64 << 20, help="Largest tensor that folding may make.", min=1, unit="bytes")

    def simplify(self, source: Path, target: Path, workbench: Arena) -> Done:
        from modelops.graphs import files

        model = files.load(source)
        with tool("onnxscript", hint="try another --engine"):
            from onnxscript import optimizer

            # Sizes are elements there; four bytes each, as the weights of nearly every model have.
            elements = max(1, self.fold_limit // 4)
            optimizer.optimize_ir(
                model, self.iterations, input_size_limit=elements, output_size_limit=elements, inline=True
            )
        files.save(model, target)
        return Done()
