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
from modelops.graphs.files import copied, rewrite
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
    """Write model.onnx and reference.npz into the draft; the reference is what the file gives as it came."""
    assert loaded.onnx is not None
    target = draft.file("model.onnx")
    with tempfile.TemporaryDirectory(prefix="modelops-") as scratch:
        came, original = copied(loaded.onnx, Path(scratch) / "came"), Path(scratch) / "original.onnx"
        notes = [*loaded.notes, *rewrite(came, original)]
        before = summary(original)["opsets"].get("", 0)
        given = stage.given(loaded)
        samples = given.samples(signature(original)) if given is not None else None
        feeds = _Feeds(original, samples, rows=stage.rows or MOST_ROWS, seed=stage.seed)
        cases, refused, unlike = _observed(came, original, feeds)
        notes += unlike
        if cases and refused is None:
            reference.write(draft.file(reference.FILE_NAME), cases)
        same = stage.opset is None or stage.opset == before
        if stage.opset is None or same:
            rewrite(original, target)
        else:
            notes += _upgrade(original, target, stage.opset, Path(scratch))
        if refused is not None or (same and not stage.gates and (unlike or _equal(target, cases))):
            checks = [_runs(cases, refused, as_it_came=not unlike)]
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


class _Feeds:
    """What to run a model on: samples or seeded rows, and the corners of its shapes; each with the name of its case."""

    def __init__(self, model: Path, samples: Samples | None, *, rows: int, seed: int) -> None:
        bounds, form = index_bounds(model), signature(model)
        self.own = samples is not None
        feeds = list(samples.feeds(rows)) if samples is not None else []
        left = rows - (len(samples) if samples is not None else 0)
        feeds += random_feeds(form, left, seed, bounds) if left > 0 else []
        names = [ROWS] if len(feeds) == 1 else [f"{ROWS}-{number:02}" for number in range(len(feeds))]
        self.rows = list(zip(names, feeds, strict=True))
        self.corners = list(zip(_CORNERS, corner_feeds(form, seed, bounds), strict=False))


def _observed(came: Path, original: Path, feeds: _Feeds) -> tuple[list[Case], str | None, list[str]]:
    """What the file as it came makes of the feeds, or why it does not run; remarks where its copy had to run instead.

    The user's own samples must run.
    """
    try:
        cases, refused = _cases(came, feeds)
    except StageFailed as error:
        refused = error.message
    if refused is None:
        return cases, None, []
    cases, refused_too = _cases(original, feeds)
    if refused_too is not None:
        return [], refused_too, []
    reason = refused.replace(str(came), came.name)
    return cases, None, [f"the reference is what the rewritten model gives: as the file came, {reason}"]


def _cases(model: Path, feeds: _Feeds) -> tuple[list[Case], str | None]:
    """What the model makes of the rows, and of the corners that it takes; or why it does not run."""
    found = []
    with running(model) as session:
        try:
            found += [Case(name, feed, session.run(feed)) for name, feed in feeds.rows]
        except StageFailed as error:
            if feeds.own:
                raise
            return [], error.message
        for name, feed in feeds.corners:
            try:
                found.append(Case(name, feed, session.run(feed)))
            except StageFailed:
                continue  # a corner that the model itself refuses says nothing about the copy
    if any(array.dtype.kind in "OV" for case in found for array in (*case.feed.values(), *case.outputs.values())):
        return [], "it has inputs or outputs that can't be stored as plain arrays"
    kept, stored, _ = trimmed(found)
    return [case for case in kept if case.name in stored], None


def _equal(model: Path, cases: list[Case]) -> bool:
    """Whether the model runs all cases and gives what they hold, bit for bit."""
    import numpy as np

    with running(model) as session:
        for case in cases:
            try:
                outputs = case.take(session.run(case.feed))
            except StageFailed:
                return False
            for name, wanted in case.outputs.items():
                if not np.array_equal(wanted, outputs[name], equal_nan=wanted.dtype.kind == "f"):
                    return False
    return True


def _runs(cases: list[Case], refused: str | None, *, as_it_came: bool) -> Check:
    if refused is not None:
        return Check("runs", "inconclusive", f"the model could not be tried on made-up inputs: {refused}")
    said = ", with the very outputs of the file as it came" if as_it_came else ""
    return Check("runs", "pass", f"onnxruntime runs the model at {len(cases)} shapes{said}", n=len(cases))


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
