"""Transformers fused for onnxruntime before they are quantized: the integer kernels are not all that takes time.

Around the products of a transformer, softmax, normalization and masks take most of the time that int8 leaves. Fused,
MiniLM runs 1.1 to 1.4 times as fast again. The fused graph is held against the source before it is used. Where the
projections are packed into one Attention node, whose int8 form takes no additive mask, the product is taken out again,
so that it can be quantized.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.errors import ModelOpsError

if TYPE_CHECKING:
    import onnx_ir as ir

log = logging.getLogger(__name__)

_ROWS = 16
# Fusing changes the order of a few sums: 126 dB on MiniLM.
_LEAST_SQNR = 80.0


def fused(source: Path, scratch: Path, keep: set[str]) -> tuple[Path, dict[str, int], str]:
    """(the fused model, how many fusions of each sort, a remark); the source itself where nothing is gained.

    ``keep`` names nodes that the user spoke of: a graph that would lose one of them stays as it is.
    """
    from modelops.graphs import files
    from modelops.graphs.fusions import attends
    from modelops.quantizers._weights import read

    model = read(source)
    if not attends(model.graph):
        return source, {}, ""
    target = scratch / "fused.onnx"
    try:
        counts = _fuse(model)
        if not counts:
            return source, {}, ""
        if lost := sorted(keep - {str(node.name) for node in model.graph}):
            return source, {}, f"attention was not fused, since that would swallow {lost[0]!r} of --exclude"
        files.save(model, target)
        found = _sqnr(source, target)
    except ModelOpsError as error:
        log.debug("fusing failed", exc_info=True)
        return source, {}, f"attention was not fused: {error.message}"
    except Exception as error:
        log.debug("fusing failed", exc_info=True)
        return source, {}, f"attention was not fused: onnxscript's rewriter failed ({type(error).__name__})"
    if not found >= _LEAST_SQNR:
        return source, {}, f"attention was not fused: the fused graph differs from the source ({found:.0f} dB)"
    return target, counts, "fused for onnxruntime before it was quantized: other runtimes may not know these operators"


def _fuse(model: ir.Model) -> dict[str, int]:
    """Fuse in place; the fusions that happened, by name."""
    from modelops.graphs.fusions import fuse

    return fuse(model, apart=True)


def _sqnr(source: Path, candidate: Path) -> float:
    """The least ratio of signal to noise among the outputs, on a few made-up rows."""
    from modelops.graphs import runs
    from modelops.graphs.batches import row_axes
    from modelops.measures.comparison import Comparison

    with runs.session(source, trusted=True) as before, runs.session(candidate) as after:
        comparison = Comparison(axes=row_axes(before.signature))
        for feed in _feeds(source, before.signature):
            comparison.add(runs.run(before, feed), runs.run(after, feed))
    values = [difference.sqnr for difference in comparison.differences().values() if not difference.problem]
    found = [value for value in values if value is not None]
    return min(found) if found and len(values) == len(comparison.differences()) else float("nan")


def _feeds(source: Path, signature: Any) -> Iterator[dict[str, Any]]:
    from modelops.graphs.seeded import index_bounds, masked_feeds, random_feeds

    bounds = index_bounds(source)
    yield from random_feeds(signature, _ROWS, bounds=bounds)
    yield from masked_feeds(signature, bounds=bounds)
