"""Validate: wrong models fail, right ones never do, and nothing passes that was not shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from modelops.core.artifact import Artifact, drafting
from modelops.core.manifest import Manifest, Step
from modelops.core.report import Check, Report
from modelops.core.tensors import Signature, TensorSpec
from modelops.errors import Inconclusive, InputRefused, UsageError
from modelops.graphs import reference
from modelops.graphs.wrap import describe, wrap
from modelops.stages import _compare, _transitions
from modelops.stages._judgement import judge_measurements
from modelops.stages._workbench import SampleBench
from modelops.stages.validate import Validate, _affordable

FEATURES, CLASSES = 8, 5
RANDOM = np.random.default_rng(7)
WEIGHTS = {
    "c": RANDOM.normal(size=FEATURES),
    "w": RANDOM.normal(size=(FEATURES, 16)) / 3,
    "b": RANDOM.normal(size=16),
    "v": RANDOM.normal(size=(16, CLASSES)) / 4,
    "s": np.array(1.0),
}


def classifier(path: Path, mutation: str = "", *, dtype: type = np.float32, batch: int | str = "batch") -> Path:
    """y = gelu((x - c)·w + b)·v·s, or one of its mutants, or (``gemm``) the same written otherwise."""
    w = {name: array.copy() for name, array in WEIGHTS.items()}
    if mutation == "scale":
        w["s"] *= 1.02
    if mutation == "no-bias":
        w["b"] *= 0
    if mutation == "bit":  # one bit of one weight, the second highest of the mantissa
        w["v"] = w["v"].astype(np.float32)
        w["v"].view(np.uint32)[3, 2] ^= 1 << 21
    if mutation == "transposed":
        w["w"] = w["w"].reshape(16, FEATURES).T.copy()
    first, second = ("c", "x") if mutation == "swap" else ("x", "c")
    node = helper.make_node
    nodes = [node("Sub", [first, second], ["d"])]
    if mutation == "gemm":
        nodes.append(node("Gemm", ["d", "w", "b"], ["h"]))
    else:
        nodes += [node("MatMul", ["d", "w"], ["m"]), node("Add", ["m", "b"], ["h"])]
    approximate = "tanh" if mutation == "tanh" else "none"
    nodes += [
        node("Gelu", ["h"], ["g"], approximate=approximate),
        node("MatMul", ["g", "v"], ["z"]),
        node("Mul", ["z", "s"], ["y" if mutation not in ("axis", "softmax") else "l"]),
    ]
    if mutation in ("axis", "softmax"):
        nodes.append(node("Softmax", ["l"], ["y"], axis=0 if mutation == "axis" else 1))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "classifier",
        [value("x", kind, [batch, FEATURES])],
        [value("y", kind, [batch, CLASSES])],
        [numpy_helper.from_array(np.asarray(array, dtype), name) for name, array in w.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


def run_numpy(x: np.ndarray) -> np.ndarray:
    from math import erf

    h = (x - WEIGHTS["c"]) @ WEIGHTS["w"] + WEIGHTS["b"]
    return (h * 0.5 * (1 + np.vectorize(erf)(h / np.sqrt(2)))) @ WEIGHTS["v"] * WEIGHTS["s"]


def step(stage: str, key: str = "", **options: Any) -> Step:
    return Step(stage, options, key or stage, "source", 0.0, None, Report(), {})


def artifact(
    tmp_path: Path, mutation: str = "", history: Sequence[Step] = (), *, cases: bool = True, **model
) -> Artifact:
    """A model artifact with what its source gave: float32 and float64 outputs for rows and for a batch of one."""
    from modelops.graphs.files import rewrite

    name = f"{mutation or 'plain'}-{len(list(tmp_path.iterdir()))}"
    with drafting(tmp_path / name) as publication:
        draft = publication.draft
        rewrite(classifier(tmp_path / f"{name}.onnx", mutation, **model), draft.file("model.onnx"))
        if cases:
            random = np.random.default_rng(1)
            feeds = {case: random.normal(size=(n, FEATURES)) for case, n in (("rows", 32), ("batch-1", 1))}
            exact = {case: run_numpy(x.astype(np.float32).astype(np.float64)) for case, x in feeds.items()}
            reference.write(
                draft.file("reference.npz"),
                [
                    reference.Case(c, {"x": x.astype(np.float32)}, {"y": exact[c].astype(np.float32)}, {"y": exact[c]})
                    for c, x in feeds.items()
                ],
            )
        graphs, summary = describe(draft.path)
        files = publication.files()
        manifest = Manifest(kind="model", files=files, graphs=graphs, created="", model=summary, history=tuple(history))
        return publication.publish(manifest)


def bare(tmp_path: Path, mutation: str = "", **model: Any) -> Artifact:
    """A model artifact without history and reference."""
    name = f"bare-{mutation}-{len(list(tmp_path.iterdir()))}"
    return wrap(classifier(tmp_path / f"{name}.onnx", mutation, **model), tmp_path / name)


def validate(source: Artifact, **options: Any) -> Report:
    return measure(source, **options)[0]


def measure(source: Artifact, **options: Any) -> tuple[Report, dict[str, Any]]:
    options = {name: str(value.path) if isinstance(value, Artifact) else value for name, value in options.items()}
    target = source.path.parent / f"evidence-{len(list(source.path.parent.iterdir()))}"
    with drafting(target) as publication:
        report = Validate.parse(options).run(source, publication.draft)
        return report, json.loads((publication.draft.path / "measurements.json").read_text())


def data(tmp_path: Path, rows: int, labels: Callable[[np.ndarray], np.ndarray] | None = None) -> str:
    x = np.random.default_rng(3).normal(size=(rows, FEATURES)).astype(np.float32)
    arrays = {"x": x} if labels is None else {"x": x, "labels": labels(x)}
    path = tmp_path / f"data-{len(list(tmp_path.iterdir()))}.npz"
    np.savez(path, **arrays)
    return str(path)


def classes(x: np.ndarray) -> np.ndarray:
    return run_numpy(x).argmax(axis=1)


def verdicts(report: Report) -> dict[str, str]:
    return {check.name: check.verdict for check in report.checks}


MUTATIONS = ["swap", "scale", "no-bias", "tanh", "bit", "transposed"]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_wrong_model_fails_against_its_original(tmp_path: Path, mutation: str) -> None:
    report = validate(artifact(tmp_path, mutation, [step("convert")]))
    assert report.verdict == "fail"
    assert report.exit_code == 1


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_wrong_model_fails_against_the_right_one(tmp_path: Path, mutation: str) -> None:
    assert validate(bare(tmp_path, mutation), against=bare(tmp_path)).verdict == "fail"


def test_wrong_axis_fails(tmp_path: Path) -> None:
    assert validate(bare(tmp_path, "axis"), against=bare(tmp_path, "softmax")).verdict == "fail"


@pytest.mark.parametrize("mutation", ["", "gemm"])
@pytest.mark.parametrize("threads", [1, 2])
def test_right_model_raises_no_alarm(tmp_path: Path, mutation: str, threads: int) -> None:
    right = artifact(tmp_path, mutation, [step("convert")])
    backend = {"name": "onnxruntime-cpu", "threads": threads}
    for options in ({}, {"against": artifact(tmp_path, "", [step("convert")])}, {"against": bare(tmp_path), "seed": 5}):
        report = validate(right, backend=backend, **options)
        assert report.verdict == "pass", verdicts(report)


def test_error_against_float64_is_held_against_the_sources_own(tmp_path: Path) -> None:
    report = validate(artifact(tmp_path, "", [step("convert")]))
    assert verdicts(report)["y.float64"] == "pass"


def test_metrics_of_every_output_have_units_and_counts(tmp_path: Path) -> None:
    report = validate(bare(tmp_path, "scale"), against=bare(tmp_path))
    sqnr, top1 = report.metric("y.sqnr"), report.metric("y.top1")
    assert sqnr is not None and top1 is not None
    assert sqnr.unit == "dB"
    assert sqnr.value == pytest.approx(33.98, abs=0.1)
    assert sqnr.n == 257
    assert top1.value == 1.0
    assert top1.interval is not None
    assert top1.interval[0] > 0.85


def test_identical_outputs_are_reported_as_such(tmp_path: Path) -> None:
    metric = validate(bare(tmp_path), against=bare(tmp_path)).metric("y.sqnr")
    assert metric is not None
    assert metric.value == "identical"


def test_neither_reference_nor_against_is_one_clear_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"reference\.npz") as caught:
        validate(bare(tmp_path))
    assert "--against" in caught.value.hint


def test_against_takes_a_bare_onnx_file(tmp_path: Path) -> None:
    path = classifier(tmp_path / "other.onnx", "scale")
    assert validate(bare(tmp_path), against=str(path)).verdict == "fail"
    with pytest.raises(UsageError):
        validate(bare(tmp_path), against=str(tmp_path / "nothing.onnx"))


# --- what may not pass ---------------------------------------------------------------------------------------------


def test_reference_that_does_not_vary_proves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "constant.onnx"
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "zero"], ["m"]), helper.make_node("Add", ["m", "one"], ["y"])],
        "constant",
        [value("x", TensorProto.FLOAT, ["batch", 3])],
        [value("y", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(np.float32(number), name) for name, number in (("zero", 0), ("one", 1))],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    report = validate(wrap(path, tmp_path / "constant"), against=str(path))
    assert report.exit_code == 3
    assert any("does not vary" in check.message for check in report.checks)


def test_too_few_rows_prove_nothing(tmp_path: Path) -> None:
    report = validate(bare(tmp_path), against=bare(tmp_path), data=data(tmp_path, 31))
    assert report.exit_code == 3
    assert validate(bare(tmp_path), against=bare(tmp_path), data=data(tmp_path, 32)).exit_code == 0


def test_fewer_samples_than_asked_for_are_inconclusive(tmp_path: Path) -> None:
    options = {"against": bare(tmp_path), "data": data(tmp_path, 40)}
    report = validate(bare(tmp_path), **options, samples=50)
    assert report.exit_code == 3
    assert verdicts(report)["samples"] == "inconclusive"
    assert validate(bare(tmp_path), **options, samples=40).exit_code == 0


def test_agreement_is_judged_on_256_rows_of_real_data_only(tmp_path: Path) -> None:
    wrong, right = bare(tmp_path, "no-bias"), bare(tmp_path)
    quick = {"against": right, "transition": "int8", "gate": ["sqnr>=-20"]}
    for options in ({}, {"data": "random:300"}):
        assert verdicts(validate(wrong, **quick, **options))["y.top1"] == "not-evaluated"
    few = {"data": data(tmp_path, 255)}
    assert verdicts(validate(bare(tmp_path, "scale"), **quick, **few))["y.top1"] == "not-evaluated"
    surely = next(check for check in validate(wrong, **quick, **few).checks if check.name == "y.top1")
    assert surely.verdict == "fail" and "surely missed" in surely.message
    report = validate(wrong, **quick, data=data(tmp_path, 256))
    assert verdicts(report)["y.top1"] == "fail"
    report = validate(bare(tmp_path, "scale"), **quick, data=data(tmp_path, 256))
    assert verdicts(report)["y.top1"] == "pass"
    assert any("agreement" in note for note in report.notes)


def test_asking_for_agreement_without_data_is_inconclusive(tmp_path: Path) -> None:
    report = validate(bare(tmp_path), against=bare(tmp_path), gate=["top1>=0.9"])
    assert report.exit_code == 3


def test_model_that_can_not_run_a_corner_fails(tmp_path: Path) -> None:
    report = validate(artifact(tmp_path, "", [step("convert")], batch=32))
    assert report.exit_code == 1
    assert verdicts(report)["runs.case 'batch-1'"] == "fail"


def test_reference_that_can_not_run_made_up_inputs_is_inconclusive(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        "picky",
        [value("x", TensorProto.FLOAT, ["batch", 6]), value("shape", TensorProto.INT64, [2])],
        [value("y", TensorProto.FLOAT, ["a", "b"])],
    )
    path = tmp_path / "picky.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    with pytest.raises(Inconclusive) as caught:
        validate(wrap(path, tmp_path / "picky"), against=str(path))
    assert "--data" in caught.value.hint


# --- task metrics --------------------------------------------------------------------------------------------------


def test_drop_of_the_task_metric_is_judged_with_its_bound(tmp_path: Path) -> None:
    labelled = data(tmp_path, 600, classes)
    report = validate(bare(tmp_path, "scale"), against=bare(tmp_path), data=labelled, transition="int8")
    assert report.exit_code == 0, verdicts(report)
    value, drop = report.metric("top1"), report.metric("top1.drop")
    assert value is not None and drop is not None
    assert value.value == 1.0
    assert drop.value == 0.0
    assert drop.interval is not None
    assert 0 < drop.interval[1] < 0.01
    broken = validate(bare(tmp_path, "swap"), against=bare(tmp_path), data=labelled, transition="prune")
    assert verdicts(broken)["top1.drop"] == "fail"
    lenient = validate(
        bare(tmp_path, "swap"), against=bare(tmp_path), data=labelled, transition="prune", max_drop="100%"
    )
    assert verdicts(lenient)["top1.drop"] == "pass"


def test_too_few_labels_can_not_prove_a_small_drop(tmp_path: Path) -> None:
    options = {"against": bare(tmp_path), "data": data(tmp_path, 64, classes), "transition": "int8"}
    assert verdicts(validate(bare(tmp_path), **options))["top1.drop"] == "inconclusive"


@pytest.mark.parametrize("metric", ["mae", "r2", "spearman"])
def test_figures_have_metrics_too(tmp_path: Path, metric: str) -> None:
    labelled = data(
        tmp_path, 300, lambda x: run_numpy(x) + np.random.default_rng(0).normal(size=(len(x), CLASSES)) / 20
    )
    options = {"against": bare(tmp_path), "data": labelled, "metric": metric, "max_drop": 0.05, "transition": "prune"}
    assert verdicts(validate(bare(tmp_path, "scale"), **options))[f"{metric}.drop"] == "pass"
    assert verdicts(validate(bare(tmp_path, "swap"), **options))[f"{metric}.drop"] == "fail"


def test_labels_without_another_model_give_the_metric_alone(tmp_path: Path) -> None:
    right = artifact(tmp_path, "", [step("convert")])
    report = validate(right, data=data(tmp_path, 64, classes))
    metric = report.metric("top1")
    assert metric is not None
    assert metric.value == 1.0
    assert report.metric("top1.drop") is None
    assert verdicts(report)["top1.drop"] == "inconclusive" and report.exit_code == 3
    report = validate(right, data=data(tmp_path, 64, classes), metric="f1")
    assert verdicts(report)["f1.drop"] == "inconclusive"


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    right = artifact(tmp_path, "", [step("convert")])
    for options, reason in (
        ({"data": data(tmp_path, 64)}, "no labels"),
        ({"samples": 10}, "--samples"),
        ({"dataset": "npz"}, "--data"),
        ({"gate": ["nonsense"]}, "nonsense"),
        ({"gate": ["other.sqnr>=3"]}, "other"),
        ({"backend": "torch-cpu"}, "torch-cpu"),
    ):
        with pytest.raises(UsageError, match=reason):
            validate(right, **options)


def test_asking_for_a_metric_without_labels_is_inconclusive(tmp_path: Path) -> None:
    report = validate(bare(tmp_path), against=bare(tmp_path), data=data(tmp_path, 64), metric="top1")
    assert report.exit_code == 3
    assert verdicts(report)["top1.drop"] == "inconclusive"


def test_labels_on_some_samples_only_are_refused(tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text(
        "".join(json.dumps({"x": [0.5] * FEATURES, **({"label": 1} if n else {})}) + "\n" for n in range(3))
    )
    with pytest.raises(InputRefused, match="no label"):
        validate(bare(tmp_path), against=bare(tmp_path), data=str(tmp_path / "some.jsonl"), batch=2)


def test_labels_of_tokens_may_differ_in_length(tmp_path: Path) -> None:
    """A tagger: one class per token, labels as lists, filled where samples share a batch."""
    value = helper.make_tensor_value_info
    table = np.eye(4, dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["ids", "table"][::-1], ["y"])],
        "tagger",
        [value("ids", TensorProto.INT64, ["batch", "length"]), value("mask", TensorProto.INT64, ["batch", "length"])],
        [value("y", TensorProto.FLOAT, ["batch", "length", 4])],
        [numpy_helper.from_array(table, "table")],
    )
    path = tmp_path / "tagger.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    rows = [[1, 2, 3], [3], [0, 1], [2, 2, 1, 0]] * 10
    lines = [json.dumps({"ids": row, "mask": [1] * len(row), "label": row}) for row in rows]
    (tmp_path / "tags.jsonl").write_text("\n".join(lines))
    options = {"against": str(path), "data": str(tmp_path / "tags.jsonl"), "batch": 3}
    report, saved = measure(wrap(path, tmp_path / "tagger"), **options)
    assert saved["task"]["value"]["value"] == 1.0
    assert saved["inputs"]["rows"] == 40
    assert report.metric("top1.drop") is not None


# --- evidence ------------------------------------------------------------------------------------------------------


def test_verdict_can_be_derived_again_from_the_evidence(tmp_path: Path) -> None:
    for source, options in (
        (artifact(tmp_path, "tanh", [step("convert")]), {}),
        (bare(tmp_path, "scale"), {"against": bare(tmp_path), "data": data(tmp_path, 300, classes)}),
        (bare(tmp_path), {"against": bare(tmp_path)}),
    ):
        report, saved = measure(source, **options)
        assert judge_measurements(saved) == list(report.checks)
        assert saved["model"] == source.id


def test_saved_measurements_can_be_judged_by_other_gates(tmp_path: Path) -> None:
    _, saved = measure(bare(tmp_path, "scale"), against=bare(tmp_path))
    assert any(check.verdict == "fail" for check in judge_measurements(saved))
    assert not any(check.verdict == "fail" for check in judge_measurements(saved, transition="int8"))
    asked = judge_measurements(saved, transition="int8", gates=["y.sqnr>=35"])
    assert [check.name for check in asked if check.verdict == "fail"] == ["y.sqnr"]


def test_report_says_by_what_it_judged(tmp_path: Path) -> None:
    assert any("strictest" in note for note in validate(bare(tmp_path), against=bare(tmp_path)).notes)
    told = validate(artifact(tmp_path, "", [step("convert")])).notes
    assert "held to the gates for an exported model, which lies between the models by their histories" in told


def test_limits_grow_with_the_data_and_small_data_buys_no_time(tmp_path: Path) -> None:
    small, large = tmp_path / "small.npz", tmp_path / "large.npz"
    small.write_bytes(b"x" * 1000)
    with open(large, "wb") as file:
        file.truncate(100 << 20)
    seconds = [Validate.parse({"data": str(path)}).limits(1000).wall_seconds or 0 for path in (small, large)]
    assert seconds[0] < 55
    assert seconds[1] > 1000


def test_large_outputs_are_compared_in_small_batches() -> None:
    small = Signature((), (TensorSpec("y", "float32", ("batch", 1000)),))
    large = Signature((), (TensorSpec("y", "float32", ("batch", "length", 50_257)),))
    assert (_affordable(small, 32), _affordable(large, 32)) == (32, 2)


def test_same_inputs_have_the_same_digest_and_others_not(tmp_path: Path) -> None:
    right, wrong = bare(tmp_path), bare(tmp_path, "scale")
    digests = [
        measure(model, against=right, seed=seed)[1]["inputs"]["digest"]
        for model, seed in ((right, 0), (wrong, 0), (right, 1))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_report_names_the_models_it_measured(tmp_path: Path) -> None:
    source, other = bare(tmp_path), bare(tmp_path, "scale")
    report = validate(source, against=other)
    assert report.details["measured"] == {"model": source.id, "against": other.id}


def test_dataset_that_was_told_from_the_path_is_recorded(tmp_path: Path) -> None:
    report = validate(bare(tmp_path), against=bare(tmp_path), data="random:40")
    assert report.details["dataset"] == {"name": "random", "seed": 0}


def test_gate_of_the_user_replaces_that_of_the_table(tmp_path: Path) -> None:
    options = {"against": bare(tmp_path), "gate": ["y.sqnr>=30", "max_scaled<=0.1"]}
    report = validate(bare(tmp_path, "scale"), **options)
    assert report.exit_code == 0
    assert report.checks[2].threshold == ">= 30 dB"


# --- transitions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "other", "expected"),
    [
        ([], [], "structural"),
        ([step("convert")], [], "export"),
        ([step("convert"), step("simplify")], [step("convert")], "structural"),
        ([step("convert"), step("quantize", method={"name": "static"})], [step("convert")], "int8"),
        ([step("convert"), step("quantize", method={"name": "weights"})], [step("convert")], "weights"),
        ([step("convert"), step("simplify"), step("prune")], [step("convert")], "prune"),
        ([step("convert"), step("simplify")], [step("convert"), step("quantize", method={"name": "dynamic"})], "int8"),
        ([step("convert", "a")], [step("convert", "b"), step("simplify")], "export"),
        ([step("something-new")], [], "structural"),
    ],
)
def test_transition_is_told_from_the_steps_between(model: list[Step], other: list[Step], expected: str) -> None:
    assert _transitions.between(model, other) == expected


def test_a_float_model_that_was_kept_is_held_to_what_changes_nothing() -> None:
    kept = step("quantize", method={"name": "static"})
    kept = replace(kept, report=replace(kept.report, details={"decision": "kept-source"}))
    assert _transitions.between([step("convert"), kept], [step("convert")]) == "structural"


def test_histories_choose_the_gates(tmp_path: Path) -> None:
    converted, quantized = step("convert"), step("quantize", method={"name": "static"})
    report, saved = measure(artifact(tmp_path, "scale", [converted, quantized]))
    assert saved["judged_by"]["transition"] == "int8"
    assert report.exit_code == 0, verdicts(report)
    report = validate(artifact(tmp_path, "scale", [converted, quantized]), transition="structural")
    assert report.exit_code == 1


def test_float16_model_is_held_against_the_float32_one(tmp_path: Path) -> None:
    half = bare(tmp_path, dtype=np.float16)
    options = {"against": bare(tmp_path), "transition": "float16", "data": data(tmp_path, 256)}
    report = validate(half, **options)
    assert report.exit_code == 0, verdicts(report)
    assert any("float32" in note and "float16" in note for note in report.notes)
    assert validate(half, **{**options, "transition": "structural"}).exit_code == 1


def test_fixed_batch_is_held_against_a_dynamic_one(tmp_path: Path) -> None:
    fixed, dynamic = bare(tmp_path, batch=6), bare(tmp_path)
    for options in ({}, {"data": data(tmp_path, 40)}):
        for one, other in ((fixed, dynamic), (dynamic, fixed)):
            report, saved = measure(one, against=other, **options)
            assert report.verdict == "pass", verdicts(report)
            assert saved["inputs"]["rows"] >= 32


def test_models_with_other_inputs_fail_by_name(tmp_path: Path) -> None:
    more = onnx.load(classifier(tmp_path / "more.onnx"))
    more.graph.input.append(helper.make_tensor_value_info("extra", TensorProto.FLOAT, ["batch", 2]))
    onnx.save(more, tmp_path / "more.onnx")
    report = validate(bare(tmp_path), against=str(tmp_path / "more.onnx"))
    assert verdicts(report)["inputs"] == "fail"
    other = onnx.load(classifier(tmp_path / "other.onnx"))
    other.graph.input[0].name = other.graph.node[0].input[0] = "other"
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(UsageError, match=r"other inputs: 'x' here, 'other' in the reference"):
        validate(bare(tmp_path), against=str(tmp_path / "other.onnx"))


# --- what other stages use -----------------------------------------------------------------------------------------


def test_structural_checks_pass_for_a_rewrite_and_fail_for_mutants(tmp_path: Path) -> None:
    for source in (artifact(tmp_path, "", [step("convert")]), bare(tmp_path)):
        checks = _compare.structural_checks(source, classifier(tmp_path / "gemm.onnx", "gemm"))
        assert all(check.verdict == "pass" for check in checks), checks
        for mutation in MUTATIONS:
            checks = _compare.structural_checks(source, classifier(tmp_path / "mutant.onnx", mutation))
            assert any(check.verdict == "fail" for check in checks), mutation


def test_structural_checks_fail_where_a_dimension_became_fixed_or_nothing_runs(tmp_path: Path) -> None:
    source = bare(tmp_path)
    (check,) = _compare.structural_checks(source, classifier(tmp_path / "fixed.onnx", batch=32))
    assert (check.name, check.verdict) == ("signature", "fail")
    broken = onnx.load(classifier(tmp_path / "broken.onnx"))
    broken.graph.initializer[1].dims[:] = [16, FEATURES]
    onnx.save(broken, tmp_path / "broken.onnx")
    checks = _compare.structural_checks(source, tmp_path / "broken.onnx")
    assert checks[-1].name == "runs"
    assert checks[-1].verdict == "fail"


def test_structural_checks_hold_the_original_too(tmp_path: Path) -> None:
    """A source that has drifted from its original gives its rewrite no licence to hide it."""
    drifted = artifact(tmp_path, "scale", [step("convert")])
    checks = _compare.structural_checks(drifted, classifier(tmp_path / "same.onnx", "scale"))
    failed = [check.name for check in checks if check.verdict == "fail"]
    assert failed
    assert all(name.startswith("original.") for name in failed)


def test_feeds_come_from_the_reference_then_the_data_then_a_seed(tmp_path: Path) -> None:
    with_reference, without = artifact(tmp_path, "", [step("convert")]), bare(tmp_path)
    assert [len(feed["x"]) for feed in _compare.feeds(with_reference)] == [32, 1]
    bench = SampleBench(without, tmp_path, Path(data(tmp_path, 100)), batch=16)
    assert [len(feed["x"]) for feed in _compare.feeds(without, bench)] == [16, 16]
    (seeded,) = _compare.feeds(without)
    assert len(seeded["x"]) == 32
    differences = _compare.compare(without.model, classifier(tmp_path / "s.onnx", "scale"), [seeded])
    assert differences["y"].sqnr == pytest.approx(33.98, abs=0.1)


@pytest.mark.gpu
def test_model_is_validated_on_cuda(tmp_path: Path) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    backend = {"name": "onnxruntime-cuda"}
    right = artifact(tmp_path, "", [step("convert")])
    # TensorFloat-32 keeps ten bits of the mantissa.
    report = validate(right, backend=backend, gate=["sqnr>=60", "max_scaled<=1e-3"])
    assert verdicts(report)["y.sqnr"] == "pass"
    assert validate(bare(tmp_path), against=bare(tmp_path), backend=backend).verdict == "pass"
    assert validate(bare(tmp_path, "scale"), against=bare(tmp_path), backend=backend).verdict == "fail"


def test_int8_that_is_far_off_on_made_up_inputs_is_inconclusive_and_on_real_ones_fails(tmp_path: Path) -> None:
    made_up = validate(bare(tmp_path, "swap"), against=bare(tmp_path), transition="int8")
    assert verdicts(made_up)["y.sqnr"] == "inconclusive" and made_up.exit_code == 3
    assert any("judge with --data" in check.message for check in made_up.checks)

    real = validate(bare(tmp_path, "swap"), against=bare(tmp_path), data=data(tmp_path, 64), transition="int8")
    assert verdicts(real)["y.sqnr"] == "fail" and real.exit_code == 1

    asked = validate(bare(tmp_path, "swap"), against=bare(tmp_path), transition="int8", gate=("y.sqnr>=30",))
    assert asked.exit_code == 1
    other = validate(bare(tmp_path, "swap"), against=bare(tmp_path), transition="int8", gate=("cosine_min>=-1",))
    assert verdicts(other)["y.sqnr"] == "inconclusive" and verdicts(other)["y.cosine_min"] == "pass"


def test_where_no_figure_is_judged_nothing_is_proven(tmp_path: Path) -> None:
    made_up = validate(bare(tmp_path, "no-bias"), against=bare(tmp_path), transition="prune")
    assert made_up.exit_code == 3 and verdicts(made_up)["judged"] == "inconclusive"
    real = validate(bare(tmp_path), against=bare(tmp_path), transition="prune", data=data(tmp_path, 300))
    assert real.exit_code == 0 and "judged" not in verdicts(real)


def test_quantized_model_that_does_not_run_fails_on_any_inputs(tmp_path: Path) -> None:
    report = validate(artifact(tmp_path, "", [step("quantize", method={"name": "dynamic"})], batch=32))
    assert report.exit_code == 1 and verdicts(report)["runs.case 'batch-1'"] == "fail"


def rows_of_32(path: Path, batch: int) -> Path:
    """x + 1 by way of a Reshape, whose number of rows may be written into the file (0: as many as there are)."""
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["r"]), helper.make_node("Add", ["r", "one"], ["y"])]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", FEATURES]) for name in "xy"]
    stored = {"shape": np.array([batch, FEATURES]), "one": np.ones(1, np.float32)}
    weights = [numpy_helper.from_array(array, name) for name, array in stored.items()]
    graph = helper.make_graph(nodes, "rows", values[:1], values[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_corners_of_shapes_are_tried_beside_the_users_data(tmp_path: Path) -> None:
    right, wrong = (rows_of_32(tmp_path / f"rows-{batch}.onnx", batch) for batch in (0, 32))
    rows = data(tmp_path, 64)
    report = validate(wrap(wrong, tmp_path / "wrong"), against=str(right), data=rows, batch=32)
    assert report.exit_code == 1 and verdicts(report)["corner.runs.shape corner 0"] == "fail"
    assert report.details["located"]["suspects"][0]["op"] == "Reshape", report.details["located"]
    held = validate(wrap(right, tmp_path / "right"), against=str(right), data=rows, batch=32)
    assert held.exit_code == 0 and verdicts(held)["corners"] == "pass"


def test_gates_of_the_user_hold_at_corners_too(tmp_path: Path) -> None:
    options = {"against": bare(tmp_path), "data": data(tmp_path, 64), "gate": ["sqnr>=10", "max_scaled<=0.5"]}
    report = validate(bare(tmp_path, "scale"), **options)
    assert report.exit_code == 0 and verdicts(report)["corners"] == "pass"


def test_inputs_that_a_model_can_not_run_are_those_to_look_at(tmp_path: Path) -> None:
    from modelops.stages._blame import looked_at
    from modelops.stages._measuring import Findings, Given

    good, bad = (Given({"x": np.full((rows, FEATURES), rows)}, rows, str(rows)) for rows in (32, 1))
    findings = Findings(worst={"y": (good, 3)}, first=good, broken=bad)
    form = wrap(classifier(tmp_path / "form.onnx"), tmp_path / "form").signature
    for name, rows in (("runs.1", 1), ("y.form", 1), ("y.sqnr", 8)):
        assert len(looked_at(findings, [Check(name, "fail")], form)["x"]) == rows


def test_a_declared_size_that_does_not_come_out_fails(tmp_path: Path) -> None:
    source = bare(tmp_path)
    model = onnx.load(source.model)
    dim = model.graph.output[0].type.tensor_type.shape.dim[0]
    dim.Clear()
    dim.dim_value = 32
    onnx.save(model, tmp_path / "declared.onnx")
    (check,) = _compare.structural_checks(source, tmp_path / "declared.onnx")
    assert check.verdict == "fail" and "comes out as [" in check.message


@pytest.mark.parametrize("spoil", ["judged_by", "outputs", "inputs"])
def test_evidence_that_was_tampered_with_is_refused(tmp_path: Path, spoil: str) -> None:
    _, measurements = measure(bare(tmp_path), against=bare(tmp_path))
    del measurements[spoil]
    with drafting(tmp_path / "evidence") as publication:
        publication.draft.file("measurements.json").write_text(json.dumps(measurements))
        manifest = Manifest(kind="evidence", files=publication.files(), graphs={}, created="", model={}, history=())
        evidence = publication.publish(manifest)
    with pytest.raises(InputRefused, match="not what validate writes"):
        validate(evidence, replay=True)
