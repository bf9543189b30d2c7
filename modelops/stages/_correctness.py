"""Whether a model's outputs are right on the backend that it is timed on: a fast wrong model fails."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelops.core.artifact import Artifact
from modelops.core.report import Check
from modelops.stages._launch import write_arrays
from modelops.stages._runner import Contender, Runner


def first_run(contender: Contender, feed: Mapping[str, Any], scratch: Path) -> Path:
    """Run the model once, in a process and for a time of its own, and give the file of its outputs.

    ResourceExhausted when loading it and running it takes longer than a model of that size may need.
    """
    folder = Path(tempfile.mkdtemp(prefix="first-", dir=scratch))
    path, expected = folder / "feed.npz", folder / "expected.npz"
    write_arrays(path, feed)
    with Runner(contender, path, scratch, random.Random(0)) as runner:
        runner.ask("open", patience=contender.load_seconds())
        runner.ask("save", patience=contender.load_seconds(), path=str(expected))
    return expected


def output_checks(source: Artifact, contender: Contender) -> tuple[list[Check], list[str]]:
    """The checks of the model's outputs on its backend, and remarks on what could not be checked.

    The reference.npz decides where there is one. Without it, another backend than onnxruntime on the CPU is held
    against that one; there, only NaN and unsteady outputs can be told.
    """
    from modelops.graphs.batches import row_axes
    from modelops.graphs.reference import FILE_NAME, read
    from modelops.measures.comparison import Comparison
    from modelops.measures.judging import judge
    from modelops.stages._compare import feeds, has_batch, reference_differences, running
    from modelops.stages._transitions import between, looser

    backend = contender.backend
    checks: list[Check] = []
    if not backend.computes:
        return [], [f"{backend.name} computes nothing: its outputs are not checked"]
    if source.has(FILE_NAME):
        with running(source.model, backend) as session:
            measured = reference_differences(read(source.file(FILE_NAME)), session, source.signature)
        history = between(source.manifest.history, ())
        transition = looser(history, backend.loses())
        checks = [Check("runs", "fail", f"{item['inputs']}: {item['error']}") for item in measured.failures]
        checks += judge(measured.differences, transition, agreement_evaluated=False, float64=measured.float64)
        if history not in ("structural", "export"):
            return _without_accuracy(checks)
    elif backend.name != "onnxruntime-cpu":
        comparison = Comparison(batched=has_batch(source.signature), axes=row_axes(source.signature))
        with running(source.model, backend) as session, running(source.model) as trusted:
            for feed in feeds(source):
                comparison.add(trusted.run(feed), session.run(feed))
        checks = judge(comparison.differences(), looser("structural", backend.loses()), agreement_evaluated=False)
    else:
        return [], ["the model has no reference: its outputs were checked for NaN and steadiness only"]
    return [check for check in checks if check.verdict != "not-evaluated"], []


def _without_accuracy(checks: list[Check]) -> tuple[list[Check], list[str]]:
    """The checks of a model that was changed on purpose: how far it is off on made-up inputs is a remark, no verdict.

    Ranges were calibrated, and channels chosen, on real data: inputs that are made up may lie outside of it.
    """
    held = [check for check in checks if check or check.name.rpartition(".")[2] in ("form", "finite", "alive", "runs")]
    notes = [
        f"on the reference's made-up inputs {check.message}: judge accuracy with validate --data"
        for check in checks
        if check not in held and check.verdict != "not-evaluated"
    ]
    return [check for check in held if check.verdict != "not-evaluated"], notes
