"""onnxslim: fusions, eliminations and common subexpressions on a graph of its own, repeated until nothing changes."""

from __future__ import annotations

from pathlib import Path

from modelops.core.component import option
from modelops.core.workbench import Done
from modelops.errors import StageFailed, tool
from modelops.simplifiers import Arena, Simplifier

# What protobuf holds in one message is 2 GB; weights go to a file of their own well before.
_EXTERNAL_ABOVE = 1 << 30


class Onnxslim(Simplifier):
    """Fuse, eliminate and deduplicate until nothing changes any more."""

    tools = ("onnxslim", "onnx")
    appetite = 8.0

    fold_limit: int = option(default=64 << 20, help="Largest tensor that folding may make.", min=1, unit="bytes")
    skip_fusions: tuple[str, ...] = option(
        default=(), help="Fusions to leave out, by onnxslim's names, such as FusionGemm."
    )

    def simplify(self, source: Path, target: Path, workbench: Arena) -> Done:
        with tool("onnxslim", hint="try another --engine"):
            import onnx
            import onnxslim

            model = onnxslim.slim(
                str(source), size_threshold=self.fold_limit, skip_fusion_patterns=list(self.skip_fusions) or None
            )
            if model is None:
                raise StageFailed("onnxslim gave no model", hint="try another --engine")
            large = source.stat().st_size > _EXTERNAL_ABOVE or model.ByteSize() > _EXTERNAL_ABOVE
            onnx.save(model, str(target), save_as_external_data=large, location=f"{target.name}.data")
        return Done()
