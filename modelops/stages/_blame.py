"""Whom validate blames: the inputs to look at, the search for the node, and the piece of the model that shows it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.core.artifact import Artifact, Draft, drafting
from modelops.core.manifest import Manifest
from modelops.core.report import Check
from modelops.core.tensors import Signature
from modelops.errors import ModelOpsError
from modelops.graphs.batches import BatchAxis
from modelops.stages._locate import Locator, Suspect
from modelops.stages._measuring import Findings, Given

if TYPE_CHECKING:
    from modelops.measures.gates import TransitionName

REPRO = "repro"
_ROWS = 8
_LARGE = 20_000  # elements of one sample of inputs, from where fewer rows are looked at
_REPRO_BYTES = 512 << 20


def blame(
    source: Artifact,
    reference: Artifact,
    findings: Findings,
    checks: Iterable[Check],
    transition: TransitionName,
    scratch: Path,
    draft: Draft,
) -> dict[str, Any]:
    """Who is to blame, as JSON values; the first one is saved as ``repro``, with inputs and expected outputs.

    A search that can't be made says why, and is no failure of its own.
    """
    feed = looked_at(findings, checks, reference.signature)
    if feed is None:
        return {"sentence": "there were no inputs to look at", "suspects": []}
    folder = scratch / "values"
    folder.mkdir()
    loose = transition not in ("structural", "export")
    try:
        with Locator(reference.model, source.model, feed, folder, loose=loose) as locator:
            located = locator.run()
            saved = False
            if located.suspects:
                saved = _save(locator, located.suspects[0], scratch, draft)
        return {**located.to_dict(), "sentence": located.sentence(), "repro": REPRO if saved else ""}
    except ModelOpsError as error:
        return {"sentence": f"the first wrong node can't be told: {error.message[:300]}", "suspects": []}


def looked_at(findings: Findings, checks: Iterable[Check], signature: Signature) -> dict[str, Any] | None:
    """A few rows, the worst one of an output that failed among them; those that a model can't run, where it can't."""
    import numpy as np

    broken = [check.name for check in checks if check.verdict == "fail"]
    failed = [name.rpartition(".")[0] for name in broken]
    names = [name for name in failed if name in findings.worst] or list(findings.worst)
    given: Given | None
    given, row = findings.worst[names[0]] if names else (findings.first, 0)
    if findings.broken is not None and any(name.startswith("runs.") or name.endswith(".form") for name in broken):
        given, row = findings.broken, 0
    if given is None:
        return None
    axis = BatchAxis.of(signature)
    held = axis.rows(given.feed)
    sample = sum(np.size(array) for array in given.feed.values()) / max(1, held)
    wanted = axis.size or min(held, _ROWS if sample < _LARGE else 2)
    rows = (min(row, held - 1) + np.arange(wanted)) % max(1, held)
    return {name: np.asarray(a)[rows] if name in axis.inputs else np.asarray(a) for name, a in given.feed.items()}


def _save(locator: Locator, suspect: Suspect, scratch: Path, draft: Draft) -> bool:
    """Write the blamed nodes as an artifact whose reference is what they should have given; whether it was done."""
    from modelops.graphs import reference
    from modelops.graphs.files import rewrite
    from modelops.graphs.wrap import describe

    model, feed, expected = locator.repro(suspect)
    if model.ByteSize() > _REPRO_BYTES:
        return False
    bare = scratch / "repro.onnx"
    bare.write_bytes(model.SerializeToString())
    with drafting(draft.path / REPRO) as publication:
        rewrite(bare, publication.draft.file("model.onnx"))
        case = reference.Case(reference.ROWS, _whole(feed), _whole(expected))
        reference.write(publication.draft.file(reference.FILE_NAME), [case])
        graphs, summary = describe(publication.draft.path)
        manifest = Manifest(kind="model", files=publication.files(), graphs=graphs, created="", model=summary)
        publication.publish(manifest)
    return True


def _whole(arrays: Mapping[str, Any]) -> dict[str, Any]:
    import numpy as np

    return {name: np.array(array, order="C") for name, array in arrays.items()}
