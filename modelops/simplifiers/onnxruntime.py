"""onnxruntime: what its graph optimiser does when it loads a model, done once and written down."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

from modelops.core.component import option
from modelops.core.workbench import Done
from modelops.errors import tool
from modelops.simplifiers import Arena, Simplifier

_EXTERNAL_ABOVE = 100 << 20


class Onnxruntime(Simplifier):
    """Write down what onnxruntime's graph optimiser makes of the model."""

    tools = ("onnxruntime", "onnx-ir")
    appetite = 4.0
    saves = True

    level: Literal["basic", "extended"] = option(
        default="basic",
        help="basic keeps to ONNX's own operators; extended fuses into operators that only onnxruntime knows.",
    )

    def simplify(self, source: Path, target: Path, workbench: Arena) -> Done:
        with tempfile.TemporaryDirectory(prefix="modelops-onnxruntime-") as folder:
            self._optimized(source, target, Path(folder) / "raw.onnx")
        if self.level == "extended":
            return Done(notes=("the graph may hold operators that only onnxruntime knows",))
        return Done()

    def _optimized(self, source: Path, target: Path, raw: Path) -> None:
        """Write what the optimiser makes, by way of ``raw``."""
        from modelops.graphs import files

        with tool("onnxruntime", hint="try another --engine"):
            import onnxruntime as ort

            options = ort.SessionOptions()
            options.graph_optimization_level = {
                "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
                "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
            }[self.level]
            options.optimized_model_filepath = str(raw)
            options.intra_op_num_threads = 1
            options.log_severity_level = 3
            data = source.with_name(f"{source.name}.data")
            # Weights that lay beside the source would still be looked for there.
            if data.is_file() or source.stat().st_size > _EXTERNAL_ABOVE:
                for key, value in (
                    ("session.optimized_model_external_initializers_file_name", f"{raw.name}.data"),
                    ("session.optimized_model_external_initializers_min_size_in_bytes", "1024"),
                ):
                    options.add_session_config_entry(key, value)
            ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
        model = files.load(raw)
        with tool("onnx_ir"):
            import onnx_ir.passes.common as passes

            # onnxruntime declares every domain that it knows, used or not.
            passes.RemoveUnusedOpsetsPass()(model)
        files.save(model, target)
