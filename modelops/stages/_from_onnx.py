"""From an .onnx file: checked, written anew, upgraded where another opset is wanted, and run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.core.artifact import Draft
from modelops.core.report import Check, Metric, Report
from modelops.errors import StageFailed
from modelops.graphs import reference
from modelops.graphs.batches import BatchAxis
from modelops.graphs.describe import signature, summary
from modelops.graphs.files import rewrite
from modelops.graphs.reference import ROWS, Case
from modelops.graphs.seeded import corner_feeds, index_bounds, random_feeds
from modelops.sources import Loaded
from modelops.stages._cases import trimmed
from modelops.stages._compare import running
from modelops.stages._effort import ROWS as MOST_ROWS
from modelops.stages._given import Samples
from modelops.stages._trial import Layout, try_out

if TYPE_CHECKING:
    from modelops.stages.convert import Convert

_CORNERS = ("one-row", "minimum", "odd")


def convert(loaded: Loaded, stage: Convert, draft: Draft) -> Report:
    """Write model.onnx and reference.npz into the draft; the reference is what the file gave as it was."""
    assert loaded.onnx is not None
    target = draft.file("model.onnx")
    with tempfile.TemporaryDirectory(prefix="modelops-") as scratch:
        original = Path(scratch) / "original.onnx"
        notes = [*loaded.notes, *rewrite(loaded.onnx, original)]
        before = summary(original)["opsets"].get("", 0)
        given = stage.given(loaded)
        samples = given.samples(signature(original)) if given is not None else None
        cases, refused = _cases(original, samples, rows=stage.rows or MOST_ROWS, seed=stage.seed)
        if cases and refused is None:
            reference.write(draft.file(reference.FILE_NAME), cases)
        same = stage.opset is None or stage.opset == before
        if stage.opset is None or same:
            rewrite(original, target)
        else:
            notes += _upgrade(original, target, stage.opset, Path(scratch))
        if refused is not None or (same and not stage.gates):
            checks = [_runs(cases, refused)]
        else:
            checks = try_out(target, cases, _layout(target), stage.gates).checks()
    notes += _undefined(cases, made_up=samples is None)
    obtained = summary(target)["opsets"].get("", 0)
    shapes = [{"case": c.name, "inputs": {n: list(a.shape) for n, a in c.feed.items()}} for c in cases]
    details: dict[str, Any] = {"opset": obtained, "opset_before": before, "shapes": shapes}
    if given is not None and samples is not None:
        notes += samples.notes
        details["code_executed"] = [dict(entry) for entry in given.code_executed()]
    return Report((Metric("opset", obtained),), tuple(checks), tuple(notes), details)


def _cases(model: Path, samples: Samples | None, *, rows: int, seed: int) -> tuple[list[Case], str | None]:
    """What the model makes of samples or seeded rows, and of the shape corners that it takes; or why it does not run.

    The user's own samples must run.
    """
    bounds, form = index_bounds(model), signature(model)
    feeds = list(samples.feeds(rows)) if samples is not None else []
    left = rows - (len(samples) if samples is not None else 0)
    feeds += random_feeds(form, left, seed, bounds) if left > 0 else []
    names = [ROWS] if len(feeds) == 1 else [f"{ROWS}-{number:02}" for number in range(len(feeds))]
    found = []
    with running(model) as session:
        try:
            found += [Case(name, feed, session.run(feed)) for name, feed in zip(names, feeds, strict=True)]
        except StageFailed as error:
            if samples is not None:
                raise
            return [], error.message
        for name, feed in zip(_CORNERS, corner_feeds(form, seed, bounds), strict=False):
            try:
                found.append(Case(name, feed, session.run(feed)))
            except StageFailed:
                continue  # a corner that the model itself refuses says nothing about the copy
    if any(array.dtype.kind in "OV" for case in found for array in (*case.feed.values(), *case.outputs.values())):
        return [], "it has inputs or outputs that can't be stored as plain arrays"
    kept, stored, _ = trimmed(found)
    return [case for case in kept if case.name in stored], None


def _runs(cases: list[Case], refused: str | None) -> Check:
    if refused is not None:
        return Check("runs", "inconclusive", f"the model could not be tried on made-up inputs: {refused}")
    return Check("runs", "pass", f"onnxruntime runs the model at {len(cases)} shapes", n=len(cases))


def _undefined(cases: list[Case], *, made_up: bool) -> list[str]:
    """A remark on every output where the model itself gives NaN: such elements prove nothing in later steps."""
    import numpy as np

    found = []
    for name in cases[0].outputs if cases else ():
        arrays = [case.outputs[name] for case in cases if case.outputs[name].dtype.kind == "f"]
        share = float(np.mean([np.isnan(array).mean() for array in arrays if array.size] or [0.0]))
        if share > 0:
            told = "made-up inputs: give real ones with --data" if made_up else "the samples of --data"
            found.append(f"warning: {name}: the model itself gives NaN for {share:.0%} of the elements on {told}")
    return found


def _upgrade(source: Path, target: Path, opset: int, scratch: Path) -> list[str]:
    """Write the model with another opset; gives remarks. StageFailed where the converter can't, or gets it wrong."""
    from modelops.stages import _opset

    converted = scratch / "converted.onnx"
    notes = _opset.convert(str(source), str(converted), opset)["notes"]
    rewrite(converted, target)
    return list(notes)


def _layout(model: Path) -> Layout:
    form = signature(model)
    return Layout(BatchAxis.of(form).symbol, {spec.name: spec.shape for spec in form.outputs})
