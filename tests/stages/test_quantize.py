from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from modelops.core.artifact import Artifact, Draft
from modelops.core.report import Metric, Report
from modelops.core.workbench import Done
from modelops.errors import Inconclusive, InputRefused, UsageError
from modelops.graphs.wrap import wrap
from modelops.measures.comparison import Comparison
from modelops.measures.drops import Drop, judge_drop, paired_bounds
from modelops.quantizers.dynamic import Dynamic
from modelops.quantizers.float16 import Float16
from modelops.quantizers.static import Static
from modelops.quantizers.weights import Weights
from modelops.stages import _portable, quantize
from modelops.stages._losses import Rows
from modelops.stages._measuring import Findings
from modelops.stages._portable import portability
from modelops.stages.quantize import Pace, Quantize

CENTRES = np.random.default_rng(11).normal(size=(4, 8)).astype(np.float32)


def labelled(path: Path, rows: int, *, seed: int = 0, labels: bool = True) -> Path:
    """Points around four centres, far enough from each other that a float model never errs."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 4, size=rows)
    x = (CENTRES[classes] + 0.05 * rng.normal(size=(rows, 8))).astype(np.float32)
    np.savez(path, x=x, **({"labels": classes} if labels else {}))
    return path


@pytest.fixture
def classifier(tmp_path: Path, write_perceptron: Callable[..., Path]) -> Artifact:
    """A perceptron whose last layer was fitted, so that its classes are those of the data."""
    file = write_perceptron(tmp_path / "model.onnx")
    model = onnx.load(file)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    hidden = np.maximum(CENTRES @ stored["w1"] + stored["b1"], 0)
    solved = np.linalg.lstsq(hidden, 10 * np.eye(4), rcond=None)[0].astype(np.float32)
    for tensor in model.graph.initializer:
        if tensor.name == "w2":
            tensor.CopyFrom(onnx.numpy_helper.from_array(solved, "w2"))
    onnx.save(model, file)
    return wrap(file, tmp_path / "artifact")


@pytest.fixture
def run(classifier: Artifact, tmp_path: Path) -> Callable[..., tuple[Report, Path]]:
    """Runs the stage into a draft; gives the report and where the model is, or would be."""

    def call(stage: Quantize) -> tuple[Report, Path]:
        folder = tmp_path / f"draft-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return stage.run(classifier, Draft(folder)), folder / "model.onnx"

    return call


def pace(verdict: Any, speedup: float) -> Callable[..., Pace]:
    return lambda *_: Pace(verdict, f"runs at {speedup}x the speed of float", (Metric("speedup", speedup, "x"),))


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "timed", pace("pass", 2.0))


@pytest.fixture
def slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "timed", pace("fail", 0.7))


def check(report: Report, name: str) -> Any:
    return next(check for check in report.checks if check.name == name)


def test_a_model_that_loses_nothing_passes_with_its_bound(run: Any, tmp_path: Path, faster: None) -> None:
    data, held_out = labelled(tmp_path / "data.npz", 64), labelled(tmp_path / "eval.npz", 540, seed=1)
    report, model = run(Quantize(method=Static(), data=data, eval=held_out))
    assert report.verdict == "pass" and report.details["decision"] == "published"
    drop = report.metric("top1_drop")
    assert drop is not None and drop.value == 0 and drop.interval is not None and drop.interval[1] < 0.01
    assert report.metric("top1").value == report.metric("top1_before").value == 1
    assert check(report, "speed").verdict == "pass"
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(model).graph.node)


def test_few_labelled_rows_prove_nothing_and_say_how_many_would(run: Any, tmp_path: Path, faster: None) -> None:
    held_out = labelled(tmp_path / "eval.npz", 100, seed=1)
    report, _ = run(Quantize(method=Dynamic(), eval=held_out))
    assert report.exit_code == 3 and report.details["decision"] == "undecided"
    assert "about 299 rows like these would settle it" in check(report, "top1.drop").message


def test_decisions_that_never_change_prove_what_few_labels_can_not(run: Any, tmp_path: Path, faster: None) -> None:
    data = labelled(tmp_path / "data.npz", 500, labels=False)
    held_out = labelled(tmp_path / "eval.npz", 100, seed=1)
    report, _ = run(Quantize(method=Static(), data=data, eval=held_out))
    assert report.exit_code == 0
    assert "accuracy can't drop by more" in check(report, "top1.drop").message


def test_too_few_labelled_rows_decide_nothing_even_when_some_are_lost() -> None:
    def judged(lost: int, n: int) -> str:
        lower, bound = paired_bounds(lost, 0, n)
        found = Drop(metric="top1", value=1 - lost / n, reference=1.0, drop=lost / n, bound=bound, lower=lower, n=n,
                     method="paired counts", lost=lost, gained=0)  # fmt: skip
        return judge_drop(found, 0.01).verdict

    assert judged(1, 8) == "inconclusive"  # one of eight may be chance
    assert judged(8, 8) == "fail"  # all of them is not
    assert judged(4, 40) == "fail"


def test_a_model_that_loses_too_much_is_not_timed_and_not_published(
    run: Any, classifier: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, source: Path, target: Path, workbench: Any) -> Any:
        model = onnx.load(source)
        for tensor in model.graph.initializer:
            if tensor.name == "w2":
                tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), "w2"))
        onnx.save(model, target)
        return Done()

    monkeypatch.setattr(Dynamic, "quantize", broken)
    monkeypatch.setattr(quantize, "timed", lambda *_: pytest.fail("it was timed"))
    report, _ = run(Quantize(method=Dynamic(), eval=labelled(tmp_path / "eval.npz", 540)))
    assert report.exit_code == 1 and report.details["decision"] == "refused"
    assert check(report, "top1.drop").verdict == "fail"


def test_without_labels_agreement_judges_and_says_so(run: Any, tmp_path: Path, faster: None) -> None:
    held_out = labelled(tmp_path / "eval.npz", 300, labels=False)
    report, _ = run(Quantize(method=Dynamic(), eval=held_out))
    assert report.exit_code == 0
    assert check(report, "y.top1").verdict == "pass"
    assert any("not accuracy" in note for note in report.notes)


def test_calibration_samples_do_not_judge(run: Any, tmp_path: Path, faster: None) -> None:
    data = labelled(tmp_path / "data.npz", 500)
    report, _ = run(Quantize(method=Static(), data=data, samples=100))
    assert "judged on samples of --data held out from calibration: 396 rows" in report.notes
    report, _ = run(Quantize(method=Static(), data=data, samples=5000))
    assert any("a quarter of --data" in note for note in report.notes)
    few = labelled(tmp_path / "few.npz", 40)
    report, _ = run(Quantize(method=Static(), data=few))
    assert any("too few to hold any out" in note for note in report.notes)


def test_dynamic_works_without_any_data(run: Any, faster: None) -> None:
    report, model = run(Quantize(method=Dynamic()))
    assert report.exit_code == 0 and model.is_file()
    assert report.details["method"] == "dynamic"


def test_a_slower_model_fails_by_default(run: Any, slower: None) -> None:
    report, _ = run(Quantize(method=Dynamic()))
    assert report.exit_code == 1
    assert "does not pay here" in check(report, "speed").message
    assert any("--if-slower keep-source" in note for note in report.notes)


def test_a_slower_model_is_published_when_asked_with_a_warning(run: Any, slower: None) -> None:
    report, model = run(Quantize(method=Dynamic(), if_slower="publish"))
    assert report.exit_code == 0
    assert any(note.startswith("warning") and "0.7x" in note for note in report.notes)
    assert any(node.op_type == "MatMulInteger" for node in onnx.load(model).graph.node)


def test_a_slower_model_gives_way_to_the_float_one_when_asked(run: Any, classifier: Artifact, slower: None) -> None:
    report, model = run(Quantize(method=Dynamic(), if_slower="keep-source"))
    assert report.exit_code == 0 and report.details["decision"] == "kept-source"
    assert model.read_bytes() == classifier.model.read_bytes()
    assert any("kept unchanged" in note for note in report.notes)


def test_figures_are_those_of_the_model_that_was_kept(run: Any, classifier: Artifact, slower: None) -> None:
    report, _ = run(Quantize(method=Dynamic(), if_slower="keep-source"))
    of_the_model = [metric.name for metric in report.metrics if not metric.name.endswith("_seconds")]
    assert of_the_model == ["model_bytes_before", "model_bytes", "size_ratio"]
    assert report.metric("model_bytes").value == classifier.size and report.metric("size_ratio").value == 1
    rejected = report.details["rejected"]
    assert rejected["bytes"] != classifier.size and "speedup" in {metric["name"] for metric in rejected["metrics"]}
    assert {check["name"] for check in rejected["checks"]} >= {"signature"}
    assert "portable" not in report.details


def test_noise_is_a_warning_and_no_failure(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "timed", pace("inconclusive", 0.9))
    report, _ = run(Quantize(method=Dynamic()))
    assert report.exit_code == 0 and check(report, "speed").verdict == "not-evaluated"
    assert any("did not settle" in note for note in report.notes)

    def no_cpus(*_: Any) -> Pace:
        raise Inconclusive("CPUs went away")

    monkeypatch.setattr(quantize, "timed", no_cpus)
    report, _ = run(Quantize(method=Dynamic()))
    assert report.exit_code == 0 and any("CPUs went away" in note for note in report.notes)


@pytest.mark.parametrize(("speedup", "decision"), [(0.9, "kept-source"), (1.1, "published")])
def test_in_doubt_the_float_model_is_kept_where_that_was_asked(
    run: Any, monkeypatch: pytest.MonkeyPatch, speedup: float, decision: str
) -> None:
    monkeypatch.setattr(quantize, "timed", pace("inconclusive", speedup))
    report, _ = run(Quantize(method=Dynamic(), if_slower="keep-source"))
    assert report.exit_code == 0 and report.details["decision"] == decision


def test_weights_in_blocks_only_report_their_speed(run: Any, slower: None) -> None:
    report, _ = run(Quantize(method=Weights(block_size=16)))
    assert report.exit_code == 0 and all(check.name != "speed" for check in report.checks)
    assert report.metric("speedup").value == 0.7


def test_a_drop_that_is_allowed_needs_labels(run: Any, tmp_path: Path, faster: None) -> None:
    held_out = labelled(tmp_path / "eval.npz", 300, labels=False)
    for given in ({"eval": held_out}, {"data": held_out}, {}):
        with pytest.raises(UsageError, match="--max-drop needs label"):
            run(Quantize(method=Dynamic(), max_drop=0.001, **given))
    report, _ = run(Quantize(method=Dynamic(), eval=held_out))
    assert report.exit_code == 0


def test_few_rows_are_enough_to_see_that_decisions_are_lost(
    run: Any, tmp_path: Path, faster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noisy(self: Any, source: Path, target: Path, workbench: Any) -> Any:
        model = onnx.load(source)
        rng = np.random.default_rng(0)
        for tensor in model.graph.initializer:
            if tensor.name == "w2":
                array = onnx.numpy_helper.to_array(tensor)
                noise = 0.3 * np.abs(array).max() * rng.normal(size=array.shape)
                tensor.CopyFrom(onnx.numpy_helper.from_array((array + noise).astype(np.float32), "w2"))
        onnx.save(model, target)
        return Done()

    monkeypatch.setattr(Dynamic, "quantize", noisy)
    rng = np.random.default_rng(5)
    np.savez(tmp_path / "eval.npz", x=rng.normal(size=(100, 8)).astype(np.float32))
    report, _ = run(Quantize(method=Dynamic(), eval=tmp_path / "eval.npz"))
    assert report.exit_code == 1 and check(report, "y.top1").verdict == "fail"


def test_models_are_timed_on_a_sample_of_middling_size(tmp_path: Path) -> None:
    import json

    from modelops.stages._feed import middling

    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Neg", ["x"], ["y"])],
        "lengths",
        [value("x", onnx.TensorProto.FLOAT, ["n", "length"])],
        [value("y", onnx.TensorProto.FLOAT, ["n", "length"])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "lengths.onnx")
    source = wrap(tmp_path / "lengths.onnx", tmp_path / "lengths")
    lines = [json.dumps({"x": [0.5] * length}) for length in (1, 9, 5, 30, 5)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    assert middling(source, tmp_path / "data.jsonl", None)["x"].shape == (1, 5)


def test_time_to_measure_nodes_is_within_the_limits() -> None:
    def wall(**options: Any) -> float:
        return Quantize(method=Static(**options)).limits(1 << 20).wall_seconds or 0.0

    assert wall(least_sqnr=30.0, search_time=1200.0) >= wall() + 2400.0


@pytest.mark.parametrize("options", [{"percentile": 99.0}, {"search_time": 5.0}])
def test_options_without_effect_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"--ranges percentile or auto|--explain or --least-sqnr"):
        Static(**options)


def test_pairs_alone_suit_a_gpu(run: Any) -> None:
    with pytest.raises(UsageError, match=r"use --method static|QuantizeLinear"):
        run(Quantize(method=Dynamic(target="gpu-qdq")))


def test_nothing_to_quantize_is_one_failed_check(run: Any, faster: None) -> None:
    report, model = run(Quantize(method=Dynamic(exclude=("*",))))
    assert report.exit_code == 1 and not model.exists()
    assert len(report.checks) == 1 and "all 2 nodes with weights were to stay in float" in report.checks[0].message


def test_convolutions_without_data_need_a_choice(tmp_path: Path) -> None:
    graph = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        net (float[n, 1, 4, 4] x) => (float[n, 1, 2, 2] y)
        <float[1, 1, 3, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9}> { y = Conv (x, w) }"""
    )
    onnx.save(graph, tmp_path / "conv.onnx")
    source = wrap(tmp_path / "conv.onnx", tmp_path / "artifact")
    (tmp_path / "draft").mkdir()
    with pytest.raises(UsageError, match="needs --data"):
        Quantize().run(source, Draft(tmp_path / "draft"))


def test_a_portable_model_is_checked_and_another_says_that_it_is_not(run: Any, tmp_path: Path, faster: None) -> None:
    data = labelled(tmp_path / "data.npz", 200)
    report, _ = run(Quantize(method=Dynamic(target="portable"), data=data))
    assert check(report, "portable").verdict == "pass" and report.details["portable"]["portable"] is True
    report, _ = run(Quantize(method=Dynamic(target="x86-vnni"), data=data))
    assert report.details["portable"]["portable"] is False
    assert any("not portable: 2 of 2 integer weights use all 8 bits" in note for note in report.notes)
    report, _ = run(Quantize(method=Dynamic(target="portable", reduce_range="no"), data=data))
    assert check(report, "portable").verdict == "fail" and report.exit_code == 1


@pytest.mark.parametrize(
    ("plain", "exact", "verdict"),
    [
        (np.arange(64), np.arange(64), "pass"),
        (np.arange(64), np.arange(64)[::-1], "fail"),
        (np.ones((64, 3), np.float32), np.full((64, 3), np.nan, np.float32), "fail"),
        (np.ones((64, 3), np.float32), None, "fail"),
        (None, None, "inconclusive"),
    ],
)
def test_portable_is_only_what_gives_the_same_both_ways(
    classifier: Artifact, monkeypatch: pytest.MonkeyPatch, plain: Any, exact: Any, verdict: str
) -> None:
    comparison = Comparison(batched=True)
    failures = [{"inputs": "batch 0", "error": "no kernel"}] if plain is not None and exact is None else []
    if exact is not None:
        comparison.add({"y": plain}, {"y": exact})
    found = Findings(comparison.differences(), failures)
    monkeypatch.setattr(_portable, "compare_models", lambda *_: found)
    assert _portable.check(classifier, classifier.model, Rows("rows", True)).verdict == verdict


@pytest.mark.parametrize(("largest", "portable"), [(64, True), (65, False)])
def test_weights_are_found_behind_a_transpose(tmp_path: Path, largest: int, portable: bool) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
        net (float[n, 2] x) => (float[n, 2] y)
        <int8[2, 2] w = {1, -2, 3, LARGEST}, float s = {0.1}, int8 z = {0}>
        { d = DequantizeLinear (w, s, z) t = Transpose (d) y = MatMul (x, t) }"""
    graph = onnx.parser.parse_model(text.replace("LARGEST", str(-largest)))
    onnx.save(graph, tmp_path / "net.onnx")
    assert portability(tmp_path / "net.onnx").portable is portable


def test_validate_repeats_that_a_model_is_not_portable(
    classifier: Artifact, tmp_path: Path, modelops: Callable[..., Any]
) -> None:
    words = ("--method", "dynamic", "--target", "x86-vnni", "--if-slower", "publish", "--speed-budget", "1s")
    modelops("quantize", classifier.path, tmp_path / "int8", *words)
    result = modelops("validate", tmp_path / "int8", tmp_path / "evidence", "--against", classifier.path)
    assert "not portable: 2 of 2 integer weights use all 8 bits" in " ".join(result.stdout.split()), result.stdout


@pytest.mark.parametrize("target", ["arm", "gpu-qdq"])
def test_foreign_targets_only_report_their_speed(run: Any, tmp_path: Path, slower: None, target: str) -> None:
    report, _ = run(Quantize(method=Static(target=target), data=labelled(tmp_path / "data.npz", 500)))
    assert report.exit_code == 0 and all(check.name != "speed" for check in report.checks)
    assert any("speed is only reported" in note for note in report.notes)


def test_an_unknown_metric_is_refused_before_any_work(run: Any) -> None:
    with pytest.raises(UsageError, match="metric"):
        run(Quantize(method=Dynamic(), metric="top2"))


def test_a_real_race_reports_a_ratio(run: Any) -> None:
    report, _ = run(Quantize(method=Dynamic(), if_slower="publish", speed_budget=1.0))
    speedup = report.metric("speedup")
    assert speedup is not None and 0.01 < speedup.value < 100
    assert report.metric("latency_float").value > 0


def test_half_precision_is_held_to_its_own_gates(run: Any, slower: None) -> None:
    report, _ = run(Quantize(method=Float16()))
    assert report.exit_code == 0 and check(report, "y.sqnr").threshold == ">= 40 dB"
    assert all(check.name != "speed" for check in report.checks)


def test_data_that_judges_is_looked_at_before_any_work(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dynamic, "quantize", lambda *_: pytest.fail("quantized before --eval was looked at"))
    wrong, bare = tmp_path / "wrong.npz", labelled(tmp_path / "bare.npz", 8, labels=False)
    np.savez(wrong, x=np.zeros((4, 9), np.float32))
    with pytest.raises(InputRefused, match="x"):
        run(Quantize(method=Dynamic(), eval=wrong))
    with pytest.raises(UsageError, match="--metric top1 needs labels"):
        run(Quantize(method=Dynamic(), eval=bare, metric="top1"))


def test_every_part_tells_its_seconds(run: Any, faster: None) -> None:
    report, _ = run(Quantize(method=Dynamic()))
    clocked = {metric.name: metric.unit for metric in report.metrics if metric.name.endswith("_seconds")}
    assert clocked == {"making_seconds": "s", "accuracy_seconds": "s", "speed_seconds": "s"}


def test_what_every_node_costs_is_a_table_and_a_picture(run: Any, tmp_path: Path, faster: None) -> None:
    pytest.importorskip("matplotlib")
    data = labelled(tmp_path / "data.npz", 64, labels=False)
    report, model = run(Quantize(method=Dynamic(explain=True), data=data))
    (table,) = report.details["tables"]
    assert [row[0] for row in table["rows"]] == [line["node"] for line in report.details["sensitivity"]]
    assert len(table["rows"]) == 2 and table["rows"][0][2] <= table["rows"][1][2]
    drawn = {suffix: (model.parent / f"sensitivity.{suffix}").read_bytes() for suffix in ("svg", "png")}
    assert b"<svg" in drawn["svg"] and drawn["png"].startswith(b"\x89PNG")


def test_without_matplotlib_the_table_alone_is_given(
    run: Any, tmp_path: Path, faster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelops.stages._pictures.can_draw", lambda: False)
    report, model = run(Quantize(method=Dynamic(explain=True), data=labelled(tmp_path / "data.npz", 64, labels=False)))
    assert report.details["tables"] and not (model.parent / "sensitivity.svg").exists()
    assert any("matplotlib" in note for note in report.notes)
