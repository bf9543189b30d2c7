"""A quantizer of a plugin: weights rounded to float16, and kept as float32."""

from __future__ import annotations

from pathlib import Path

from modelops.core.component import option
from modelops.core.workbench import Done, Workbench
from modelops.quantizers import Quantizer


class Halves(Quantizer):
    """Round every float weight to the nearest float16 value."""

    least: int = option(default=1, help="Leave tensors with fewer elements alone.", min=0)

    def quantize(self, source: Path, target: Path, workbench: Workbench) -> Done:
        """Write the model with rounded weights; the arithmetic stays float32."""
        import numpy as np
        import onnx
        from onnx import numpy_helper

        model = onnx.load(source)
        rounded = 0
        for tensor in model.graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.dtype == np.float32 and array.size >= self.least:
                tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float16).astype(np.float32), tensor.name))
                rounded += 1
        onnx.save(model, target)
        return Done(notes=(f"{rounded} tensors rounded to float16 values",))
