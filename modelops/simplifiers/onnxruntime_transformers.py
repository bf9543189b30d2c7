"""onnxruntime-transformers: the fusions of onnxruntime.transformers, made for what torch's older exporter writes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

from modelops.core.component import option
from modelops.core.workbench import Done
from modelops.errors import tool
from modelops.simplifiers import Arena, Simplifier
from modelops.simplifiers._changes import brought_in

# What protobuf holds in one message is 2 GB; weights go to a file of their own well before.
_EXTERNAL_ABOVE = 1 << 30


class OnnxruntimeTransformers(Simplifier):
    """Fuse attention, normalization and activations into onnxruntime's own operators, with its own Python scripts."""

    tools = ("onnxruntime", "onnx-ir", "onnx")
    appetite = 8.0
    saves = True
    fuses = True

    family: Literal["bert", "vit", "gpt2", "t5", "bart", "clip"] = option(
        default="bert", help="The family of networks whose patterns are looked for."
    )
    heads: int = option(default=0, help="Attention heads of a layer; 0 tells them from the graph.", min=0)

    def simplify(self, source: Path, target: Path, workbench: Arena) -> Done:
        from modelops.graphs import files
        from modelops.graphs.describe import summary
        from modelops.graphs.fusions import DOMAIN

        with tempfile.TemporaryDirectory(prefix="modelops-transformers-") as folder:
            raw = Path(folder) / "raw.onnx"
            self._fused(source, raw)
            counts = brought_in(summary(source)["operators"], summary(raw)["operators"], DOMAIN)
            if not counts:
                return Done(notes=("no pattern of a transformer was found",))
            files.rewrite(raw, target)
        return Done(details={"fusions": counts})

    def _fused(self, source: Path, raw: Path) -> None:
        """Write what the scripts make."""
        from modelops.graphs import files

        with tool("onnxruntime.transformers", hint="try another --engine"):
            from onnxruntime.transformers import optimizer
            from onnxruntime.transformers.fusion_options import AttentionMaskFormat, FusionOptions

            options = FusionOptions(self.family)
            # The mask as it is: its short form holds for padding on the right alone.
            if self.family == "bert":
                options.attention_mask_format = AttentionMaskFormat.AttentionMask
            model = optimizer.optimize_model(
                str(source),
                model_type=self.family,
                num_heads=self.heads,
                optimization_options=options,
                opt_level=None,
                use_gpu=False,
            )
            model.save_model_to_file(str(raw), use_external_data_format=files.size_of(source) > _EXTERNAL_ABOVE)
