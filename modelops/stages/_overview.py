"""The closing table of a run: every model of a chain side by side, measured in one go."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modelops.core.artifact import Artifact
from modelops.core.progress import progress
from modelops.graphs.batches import BatchAxis, row_axes
from modelops.measures.comparison import Comparison
from modelops.measures.metrics import evaluate
from modelops.stages._compare import feeds, running
from modelops.stages._losses import made_up
from modelops.stages._measuring import Side, from_data
from modelops.stages._race import Contender, standings
from modelops.stages._table import Table
from modelops.stages._workbench import SampleBench

COLUMNS = ("step", "size", "nodes", "latency", "speed-up", "interval")


def overview(models: list[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """The table over these model artifacts, the first of which is the reference.

    ``options`` are those of a recipe's [table]. Rows hold: the step's name, bytes, nodes, median latency in
    milliseconds at batch 1, speed-up over the first with its 95 % interval, then the task metric on labelled data, or
    the error against the first model.
    """
    table = Table.parse(options)
    artifacts = [Artifact.open(model) for model in models]
    with tempfile.TemporaryDirectory(prefix="modelops-table-") as scratch:
        bench = SampleBench(artifacts[0], Path(scratch), table.data, table.dataset, table.samples, batch=16)
        quality, names = _quality(artifacts, bench, table)
        speed = _speed(artifacts, bench, table)
    rows = [
        [artifact.path.name, artifact.size, artifact.manifest.model.get("nodes"), *timing, *figures]
        for artifact, timing, figures in zip(artifacts, speed, quality, strict=True)
    ]
    return {"title": "the chain", "columns": [*COLUMNS, *names], "rows": rows}


def _speed(artifacts: list[Artifact], bench: SampleBench, table: Table) -> list[list[Any]]:
    """(latency ms, speed-up, interval) per model; models that are the same file share one measurement."""
    if table.budget <= 0:
        return [[None, None, None] for _ in artifacts]
    backend = _backend()
    distinct: dict[str, Artifact] = {}
    for artifact in artifacts:
        distinct.setdefault(_content(artifact), artifact)
    contenders = [Contender(artifact.path.name, backend, artifact.model) for artifact in distinct.values()]
    feed = _one_row(bench)
    found = standings(contenders, feed, budget_seconds=table.budget)
    rows = []
    for artifact in artifacts:
        standing = found.of(distinct[_content(artifact)].path.name)
        interval = list(standing.interval) if standing.interval else None
        rows.append([standing.latency_ms, standing.speedup, interval])
    return rows


def _content(artifact: Artifact) -> str:
    return "".join(file.sha256 for file in artifact.manifest.files if file.role in ("model", "external-data"))


def _backend() -> Any:
    from modelops.backends import REGISTRY

    return REGISTRY.load("onnxruntime-cpu").parse({})


def _one_row(bench: SampleBench) -> dict[str, Any]:
    """One sample, or as few as the model takes: the user's first, else those of the reference or seeded ones."""
    axis = BatchAxis.of(bench.signature)
    feed = next(bench.batches()) if bench.has_data else feeds(bench.source)[0]
    rows = axis.size or 1
    return {name: array[:rows] if name in axis.inputs else array for name, array in feed.items()}


def _quality(artifacts: list[Artifact], bench: SampleBench, table: Table) -> tuple[list[list[Any]], list[str]]:
    """One row of figures per model, and their names: the task metric when there are labels, else the error."""
    labels = bench.labels() if bench.has_data else None
    if labels is not None and table.metric is not None:
        import numpy as np

        first, array = artifacts[0].signature.outputs[0].name, np.asarray(labels)
        values = []
        for artifact in artifacts:
            outputs = np.concatenate([batch[first] for batch in _outputs(artifact, bench)])
            values.append(evaluate(outputs, array, table.metric).value)
        return [[value] for value in values], [f"{table.metric} (n={len(array)})"]
    reference = list(_outputs(artifacts[0], bench))
    rows: list[list[Any]] = []
    for artifact in artifacts:
        comparison = Comparison(axes=row_axes(artifact.signature))
        for before, after in zip(reference, _outputs(artifact, bench), strict=True):
            comparison.add(before, after)
        worst = min(comparison.differences().values(), key=lambda each: math.inf if each.sqnr is None else each.sqnr)
        rows.append(["identical" if worst.identical else worst.sqnr, worst.cosine_mean])
    return rows, ["SQNR dB", "cosine"]


def _outputs(artifact: Artifact, bench: SampleBench) -> Iterator[dict[str, Any]]:
    progress(f"evaluating {artifact.path.name}")
    with running(artifact.model) as session:
        side = Side(session, artifact.signature)
        for given in from_data(bench) if bench.has_data else made_up(bench.source):
            yield side.run(given)
