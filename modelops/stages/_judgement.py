"""Verdicts and figures from saved measurements alone: what ``validate`` judges by, and what can judge it anew later."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from modelops.core.report import Check, Metric, Report
from modelops.graphs.reference import FILE_NAME as REFERENCE
from modelops.measures.differences import Difference
from modelops.measures.distributions import wilson
from modelops.measures.drops import Drop, judge_drop
from modelops.measures.gates import FIGURES, Gate, TransitionName
from modelops.measures.judging import Float64Errors, judge, unjudged, warnings, worst_of
from modelops.stages import _scales

# How the names of what is judged at the corners of shapes, and at values at the edges, begin.
CORNER, EDGE = "corner.", "edge."
# Outputs whose worst element is told where all is well.
_MOST_WORST = 3
# The figures that a report shows of every output, where they apply; measurements.json holds them all.
_ERRORS = ("sqnr", "max_scaled", "max_rms", "max_abs", "mean_abs", "p50_abs", "p99_abs", "p999_abs")
_SHOWN = (*_ERRORS, "cosine_mean", "cosine_min", "ulp_p99", "top1", "top5", "kl_mean", "kl_p99", "nearest", "equal")
# What lies between two models, and how that is known, in words.
_MEANS: Mapping[TransitionName, str] = {
    "structural": "an exact rewrite", "export": "an exported model", "float16": "float16", "bfloat16": "bfloat16",
    "int8": "8-bit quantization", "weights": "quantized weights", "prune": "pruning",
}  # fmt: skip
_TOLD_BY = {
    "the histories": "which lies between the models by their histories",
    "--transition": "as --transition asks",
}
_STRICTEST = "the strictest, since no history tells what was done: choose others with --transition"


def judge_measurements(
    measurements: Mapping[str, Any],
    *,
    transition: TransitionName | None = None,
    gates: Sequence[str] | None = None,
    max_drop: float | None = None,
) -> list[Check]:
    """The verdicts on measurements as ``measurements.json`` holds them.

    What is not given is as it was when they were taken. UsageError for a gate that fits no output.
    """
    asked = measurements["judged_by"]
    row = transition or asked["transition"]
    task = measurements["task"]
    drop = Drop.parse(task["drop"]) if task and task["drop"] else None
    checks = list(_inputs(measurements))
    checks += judge(
        differences_of(measurements),
        row,
        agreement_evaluated=measurements["inputs"]["real"],
        task_metric=drop is not None,
        overrides=asked["gates"] if gates is None else gates,
        float64=_float64(measurements),
    )
    checks += _corners(measurements.get("corners") or {}, row, asked["gates"] if gates is None else gates)
    checks += _edges(measurements.get("edges") or {})
    if row == "structural":
        checks += _scales.checks(measurements.get("scales", []), tuple(asked["gates"] if gates is None else gates))
    if row not in ("structural", "export") and not measurements["inputs"]["real"]:
        own = _asked(differences_of(measurements), asked["gates"] if gates is None else gates)
        checks = [check if check.name in own else _on_made_up_inputs(check) for check in checks]
    if drop is None:
        checks += unjudged(checks)
    if drop is not None:
        checks.append(judge_drop(drop, asked["max_drop"] if max_drop is None else max_drop))
    elif max_drop is not None or asked.get("max_drop_from") == "--max-drop":
        needed = "labels" if task is None else "the model before, to be given with --against"
        checks.append(Check("max-drop", "inconclusive", f"--max-drop can't be judged: it needs {needed}"))
    elif task or asked["metric"]:
        checks.append(_no_drop(task, asked["metric"]))
    return checks


def _edges(edges: Mapping[str, Any]) -> list[Check]:
    """The values at the edges that the reference runs and the model does not."""
    return [
        Check(f"{EDGE}runs.{one['inputs']}", "fail", f"fed with {one['inputs']}, the model fails: {one['error']}")
        for one in edges.get("failures", ())
    ]


def _corners(corners: Mapping[str, Any], row: TransitionName, gates: Sequence[str]) -> list[Check]:
    """What fails at the corners of the dynamic dimensions, or that nothing does: made-up inputs beside the user's own.

    How far outputs move there is judged of exact rewrites alone.
    """
    failed = [
        Check(f"runs.{one['inputs']}", "fail", f"the model does not run on it: {one['error']}")
        for one in corners.get("failures", ())
    ]
    differences = {name: Difference.parse(values) for name, values in corners.get("outputs", {}).items()}
    asked = _scales.relative(gates)
    judged = judge(differences, row, agreement_evaluated=False, rows_min=1, overrides=asked) if differences else []
    exact = row in ("structural", "export")
    failed += [c for c in judged if c.verdict == "fail" and (exact or c.name.rpartition(".")[2] in ("form", "finite"))]
    if failed:
        return [replace(c, name=f"{CORNER}{c.name}", message=f"at a corner of its shapes: {c.message}") for c in failed]
    if not differences:
        return []
    text = "shapes at the corners of the dynamic dimensions come out as the reference's"
    return [Check("corners", "pass", text, n=corners["rows"])]


def report_on(measurements: Mapping[str, Any], **judged_by: Any) -> Report:
    """The whole report on measurements as they were saved; ``judged_by`` is what ``judge_measurements`` takes."""
    checks = judge_measurements(measurements, **judged_by)
    located = measurements.get("located")
    notes = [*_notes(measurements), *measurements.get("notes", ())]
    if located:
        notes += [located["sentence"], *located.get("notes", ())]
    if not any(check.verdict == "fail" for check in checks):
        notes += remarks_on(measurements)
        notes += _worst(differences_of(measurements))
    for part in ("invariance", "edges"):
        notes += measurements.get(part, {}).get("notes", ())
    reference = measurements["reference"]
    measured = {"model": measurements["model"]}
    if reference != REFERENCE:
        measured["against"] = reference
    details: dict[str, Any] = {"measured": measured, "inputs": measurements["inputs"]}
    if located:
        details["located"] = located
    return Report(tuple(metrics_of(measurements)), tuple(checks), tuple(notes), details)


def _notes(measurements: Mapping[str, Any]) -> list[str]:
    """By what was judged, and what the verdict does not say."""
    inputs, judged, task = measurements["inputs"], measurements["judged_by"], measurements["task"]
    notes = [
        f"compared on {inputs['origin']}: {inputs['rows']} rows",
        f"held to the gates for {_MEANS[judged['transition']]}, {_TOLD_BY.get(judged['told_by'], _STRICTEST)}",
    ]
    if task is None:
        notes.append("without labels this is agreement with the model before, not accuracy")
    elif not judged["metric"]:
        notes.append(f"{task['metric']} of {task['output']!r} was chosen to fit the labels; choose with --metric")
    if task and not task["drop"]:
        notes.append(f"{task['metric']} is of this model alone")
    if task and task["drop"] and judged.get("max_drop_from", "").startswith("the "):
        notes.append(f"a drop of {judged['max_drop']:g} is allowed by {judged['max_drop_from']}")
    if not inputs["real"] and judged["transition"] not in ("structural", "export"):
        notes.append("agreement of decisions is not evaluated: it needs 256 rows of --data with --against")
    return notes


def _asked(differences: Mapping[str, Difference], gates: Sequence[str]) -> frozenset[str]:
    """The names of the checks that the user asked for: they say what they say on any inputs."""
    parsed = [Gate.parse(gate) for gate in gates]
    return frozenset(f"{name}.{gate.figure}" for gate in parsed for name in differences if gate.matches(name))


def _worst(differences: Mapping[str, Difference]) -> list[str]:
    """The worst element of the first outputs that moved, where no failed gate tells of it."""
    moved = [difference for difference in differences.values() if not difference.identical and worst_of(difference)]
    return [f"{one.output}: the largest error is in {worst_of(one)}" for one in moved[:_MOST_WORST]]


def _on_made_up_inputs(check: Check) -> Check:
    """A failed figure as inconclusive: ranges were calibrated, and channels chosen, on data that may lie elsewhere."""
    if check.name.startswith((CORNER, EDGE)):
        return check
    formal = check.name.rpartition(".")[2] in ("form", "finite", "alive")
    if check.verdict != "fail" or formal or check.name == "inputs" or check.name.startswith("runs."):
        return check
    return replace(check, verdict="inconclusive", message=f"{check.message}; inputs are made up: judge with --data")


def differences_of(measurements: Mapping[str, Any]) -> dict[str, Difference]:
    """The difference of every output."""
    return {name: Difference.parse(values) for name, values in measurements["outputs"].items()}


def metrics_of(measurements: Mapping[str, Any]) -> list[Metric]:
    """The figures of every output with their units, then those of the task."""
    found = []
    for name, difference in differences_of(measurements).items():
        for figure in _SHOWN:
            value = getattr(difference, figure)
            if value is not None:
                found.append(_metric(name, figure, value, difference))
    for values in measurements.get("invariance", {}).get("figures", ()):
        same = values["sqnr"] is None
        found.append(Metric(values["name"], "identical" if same else values["sqnr"], "" if same else "dB"))
    task = measurements["task"]
    if task:
        found.append(Metric.parse(task["value"]))
        if task["reference"]:
            found.append(Metric.parse({**task["reference"], "name": f"{task['metric']}.reference"}))
        if task["drop"]:
            found.append(_drop_metric(Drop.parse(task["drop"])))
    return found


def remarks_on(measurements: Mapping[str, Any]) -> list[str]:
    """Sentences on figures that pass and are still unusual."""
    return warnings(differences_of(measurements), measurements["judged_by"]["transition"])


def _metric(output: str, figure: str, value: float, difference: Difference) -> Metric:
    name = f"{output}.{figure}"
    if not math.isfinite(value):
        return Metric(name, "identical" if value > 0 and figure == "sqnr" else None, n=difference.rows)
    if figure in ("top1", "top5", "nearest"):
        n = difference.nearest_rows if figure == "nearest" else difference.decisions
        return Metric(name, value, "", wilson(round(value * n), n), 0.95, n)
    unit = FIGURES[figure].unit
    return Metric(name, value, unit if unit != "%" else "", n=difference.rows)


def _drop_metric(drop: Drop) -> Metric:
    name = f"{drop.metric}.drop"
    if not all(map(math.isfinite, (drop.drop, drop.lower, drop.bound))):
        return Metric(name, drop.drop if math.isfinite(drop.drop) else None, n=drop.n)
    # Each bound holds at the drop's confidence on its own side.
    return Metric(name, drop.drop, "", (drop.lower, drop.bound), 2 * drop.confidence - 1, drop.n)


def _inputs(measurements: Mapping[str, Any]) -> list[Check]:
    """Whether both models take the same inputs, ran on all of them, and saw as many as were asked for."""
    inputs, checks = measurements["inputs"], []
    if inputs["names"] != inputs["reference_names"]:
        checks.append(
            Check(
                "inputs",
                "fail",
                f"the model takes {', '.join(inputs['names'])}, the reference {', '.join(inputs['reference_names'])}",
            )
        )
    checks += [
        Check(f"runs.{failure['inputs']}", "fail", f"the model does not run on {failure['inputs']}: {failure['error']}")
        for failure in measurements["failures"]
    ]
    if inputs["asked"] is not None and inputs["rows"] < inputs["asked"]:
        text = f"{inputs['rows']} samples were there, {inputs['asked']} were asked for with --samples"
        checks.append(Check("samples", "inconclusive", text, inputs["rows"], f">= {inputs['asked']}"))
    return checks


def _no_drop(task: Mapping[str, Any] | None, metric: str | None) -> Check:
    if task is None:
        return Check(f"{metric}.drop", "inconclusive", f"{metric} needs labels: give labelled samples with --data")
    name, value = task["metric"], task["value"]["value"]
    shown = f"{value:.4g}" if isinstance(value, int | float) else "not a number"
    text = f"{name} is {shown}; whether it dropped can't be judged without the model before: give it with --against"
    return Check(f"{name}.drop", "inconclusive", text)


def _float64(measurements: Mapping[str, Any]) -> Float64Errors | None:
    saved = measurements["float64"]
    if saved is None:
        return None
    source, actual = (
        {name: Difference.parse(values) for name, values in saved[side].items()} for side in ("source", "actual")
    )
    return Float64Errors(source, actual)
