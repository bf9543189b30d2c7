"""The float graph with its operators fused for onnxruntime: what int8 has to beat."""

from __future__ import annotations

from pathlib import Path

from modelops.core.workbench import Done
from modelops.quantizers._scope import nothing_to_quantize


def write_fused(source: Path, target: Path, scratch: Path) -> Done:
    """Write the model with attention and normalization fused; GateFailed where that finds nothing to fuse."""
    from modelops.graphs import files
    from modelops.quantizers._fusions import fused
    from modelops.quantizers._weights import cleaned, read

    place, fusions, note = fused(source, scratch, set())
    if not fusions:
        raise nothing_to_quantize(note or "no operators to fuse")
    files.save(cleaned(read(place)), target)
    return Done(notes=(note,) if note else (), details={"fusions": fusions})
