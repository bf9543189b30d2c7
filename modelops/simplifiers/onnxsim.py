"""onnxsim: constant folding, shape inference and the passes of onnx-optimizer, in C++."""

from __future__ import annotations

from pathlib import Path

from modelops.core.component import option
from modelops.core.workbench import Done
from modelops.errors import StageFailed, tool
from modelops.simplifiers import Arena, Simplifier


class Onnxsim(Simplifier):
    """Fold constants and run the passes of onnx-optimizer."""

    tools = ("onnxsim", "onnx")
    appetite = 6.5

    fold_limit: int = option(default=64 << 20, help="Largest tensor that folding may make.", min=1, unit="bytes")
    subgraphs: bool = option(default=False, help="Simplify the branches of If and the bodies of Loop too.")

    def simplify(self, source: Path, target: Path, workbench: Arena) -> Done:
        with tool("onnxsim", hint="try another --engine"):
            import onnxsim

            # By path: the model never passes through one protobuf message, which could not hold more than 2 GB.
            _, unchanged = onnxsim.simplify(
                str(source),
                check_n=0,
                certify=False,
                include_subgraph=self.subgraphs,
                tensor_size_threshold=f"{self.fold_limit}B",
                output_path=str(target),
            )
        if not unchanged or not target.is_file():
            raise StageFailed("onnxsim gave no model that it trusts", hint="try another --engine")
        return Done()
