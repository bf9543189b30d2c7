"""What should not change a model's outputs, and what does: batch-mates, threads, optimisation, and values at the edges.

Figures are SQNR in dB of the model against itself, and say nothing about right or wrong: dynamic int8 takes ranges over
the whole batch, and a sample then depends on the others in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelops.core import machine
from modelops.core.artifact import Artifact
from modelops.core.progress import progress
from modelops.core.tensors import Signature
from modelops.errors import ModelOpsError, StageFailed
from modelops.graphs.batches import BatchAxis
from modelops.graphs.matching import noise
from modelops.stages._measuring import Given, Side

_LARGEST = 512 << 20  # bytes of a model; a larger one is not loaded four times over
_ROWS = 8
_STEADY = 1e-4  # noise over signal of float32 sums in another order, and then some
_INT8 = frozenset({"QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearConv"})


@dataclass(frozen=True)
class _Way:
    """One other way to run the same model on the same inputs."""

    name: str
    options: Mapping[str, Any]
    text: str


def invariance(source: Artifact, given: Mapping[str, Any]) -> dict[str, Any]:
    """How far the model is off from itself in other ways to run it: ``figures`` and ``notes`` as JSON values."""
    if source.size > _LARGEST:
        return {"figures": [], "notes": ["the model is too large to be run again in other ways"]}
    axis = BatchAxis.of(source.signature)
    feed = _rows(given, axis, 0, axis.size or _ROWS)
    figures: list[dict[str, Any]] = []
    notes: list[str] = []
    try:
        base = _outputs(source.model, feed)
        for way in _ways(source):
            progress(f"running it again: {way.name}")
            _note(figures, notes, way.name, _off(base, _outputs(source.model, feed, **way.options)), way.text)
        rows = axis.rows(feed)
        if axis.symbol is not None and rows > 1:
            progress("running it again: one sample at a time")
            error = _alone(source.model, feed, axis, base, rows)
            text = f"outputs of a sample depend on the others in its batch ({rows} against 1)"
            _note(figures, notes, "batch", error, text)
    except ModelOpsError as error:
        notes.append(f"it could not be run in other ways: {error.message[:200]}")
    return {"figures": figures, "notes": notes}


def _ways(source: Artifact) -> Iterator[_Way]:
    many = max(2, machine.usable_cpus())
    yield _Way("threads", {"threads": many}, f"outputs differ between 1 thread and {many}")
    yield _Way("optimization", {"optimization": "disabled"}, "outputs differ with onnxruntime's optimisations off")
    if _INT8 & set(source.manifest.model.get("operators", {})) and machine.cpu_model():
        config = {"session.x64quantprecision": "1"}
        text = "8-bit products saturate where they are not computed precisely: safe only on CPUs with VNNI"
        yield _Way("precise_int8", {"config": config}, text)


def _outputs(model: Path, feed: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    from modelops.graphs import runs

    with runs.session(model, trusted=True, **options) as opened:
        return runs.run(opened, feed)


def _alone(model: Path, feed: Mapping[str, Any], axis: BatchAxis, base: Mapping[str, Any], rows: int) -> float:
    """How far the rows of one batch are off from the same rows alone, over the outputs that have rows."""
    import numpy as np

    from modelops.graphs import runs

    with runs.session(model, trusted=True) as opened:
        parts = [runs.run(opened, _rows(feed, axis, row, 1)) for row in range(rows)]
    joined = {}
    for name, whole in base.items():
        pieces = [part[name] for part in parts]
        if np.ndim(whole) and len(whole) == rows and all(piece.shape == (1, *whole.shape[1:]) for piece in pieces):
            joined[name] = np.concatenate(pieces)
    return _off({name: base[name] for name in joined}, joined)


def _off(base: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    return max((noise(base[name], other[name]) for name in base), default=0.0)


def _rows(feed: Mapping[str, Any], axis: BatchAxis, start: int, count: int) -> dict[str, Any]:
    return {name: array[start : start + count] if name in axis.inputs else array for name, array in feed.items()}


def _note(figures: list[dict[str, Any]], notes: list[str], name: str, error: float, text: str) -> None:
    sqnr = None if error == 0 else -20 * math.log10(error) if math.isfinite(error) else -math.inf
    figures.append({"name": f"{name}_invariance", "sqnr": sqnr if sqnr is None or math.isfinite(sqnr) else -999.0})
    if error > _STEADY:
        notes.append(f"{text}: {sqnr:.3g} dB" if sqnr is not None and math.isfinite(sqnr) else f"{text}: NaN or shapes")


def edges(before: Side, after: Side, given: Given, signature: Signature) -> tuple[dict[str, Any], Given | None]:
    """Both models on zeros, denormals, the largest values, NaN and infinity: ``notes`` on what only one of them makes.

    ``failures`` are those that only the reference runs, and the first of them comes beside. What comes out is no gate:
    a fused operator may rightly turn an overflow into another NaN.
    """
    import numpy as np

    axis = BatchAxis.of(signature)
    if axis.symbol is not None:
        few = _rows(given.feed, axis, 0, _ROWS)
        given = Given(few, axis.rows(few), given.name)
    floats = [
        spec.name
        for spec in signature.inputs
        if spec.dtype in ("float32", "float16", "float64") and np.asarray(given.feed[spec.name]).dtype.kind == "f"
    ]
    compared, notes, failures = [], [], []
    broken: Given | None = None
    for name, value in _EDGES if floats else ():
        feed = {key: np.array(array, copy=True) for key, array in given.feed.items()}
        for key in floats:
            feed[key][...] = value(np.finfo(feed[key].dtype))
            if name == "signed zeros":
                feed[key].reshape(-1)[::2] *= -1
        try:
            one = before.run(Given(feed, given.rows, name))
        except ModelOpsError as error:
            notes.append(f"fed with nothing but {name}, the reference fails: {error.message[:200]}")
            continue
        try:
            other = after.run(Given(feed, given.rows, name))
        except StageFailed as error:
            failures.append({"inputs": f"nothing but {name}", "error": error.message[:200]})
            broken = broken or Given(feed, given.rows, name)
            continue
        except ModelOpsError as error:
            notes.append(f"fed with nothing but {name}, it could not be run: {error.message[:200]}")
            continue
        masks = all(_same_mask(one[key], other[key]) for key in one if key in other)
        compared.append({"name": name, "masks_agree": masks})
    if unlike := [str(one["name"]) for one in compared if not one["masks_agree"]]:
        values = " or ".join([", ".join(unlike[:-1]), unlike[-1]] if len(unlike) > 1 else unlike)
        notes.append(f"fed with nothing but {values}, it gives NaN or infinity in other places than the reference")
    return {"compared": compared, "notes": notes, "failures": failures}, broken


def _same_mask(one: Any, other: Any) -> bool:
    import numpy as np

    if one.dtype.kind != "f" or other.dtype.kind != "f":
        return True
    return bool(one.shape == other.shape and np.array_equal(np.isfinite(one), np.isfinite(other)))


_EDGES: tuple[tuple[str, Callable[[Any], float]], ...] = (
    ("zeros", lambda _info: 0.0),
    ("signed zeros", lambda _info: 0.0),
    ("denormal values", lambda info: float(info.smallest_subnormal)),
    ("half the largest value", lambda info: float(info.max) / 2),
    ("NaN", lambda _info: math.nan),
    ("infinity", lambda _info: math.inf),
)
