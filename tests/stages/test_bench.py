"""The bench stage: figures, verdicts, evidence, and what it refuses."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_records import records

from modelops.core.artifact import Artifact, drafting
from modelops.core.manifest import Manifest
from modelops.core.report import Check, Report
from modelops.core.tensors import Signature, TensorSpec
from modelops.errors import InputRefused, StageFailed, UsageError
from modelops.graphs import reference
from modelops.graphs.wrap import wrap
from modelops.measures.verdicts import Rules
from modelops.stages import REGISTRY, _baseline, _launches, _preflight
from modelops.stages._evidence import BLOCKS, MEASUREMENTS, Evidence
from modelops.stages._feed import sizes_of, timing_feed


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short blocks and no waiting for steady times: what is tested here is not the timing."""
    plan = _launches.Plan(rounds=6, most_rounds=6, block_seconds=0.002, warm_seconds=0.01, warm_most_seconds=0.0)
    for module in (_launches, importlib.import_module("modelops.stages.bench")):
        monkeypatch.setattr(module, "Plan", lambda: plan)


@pytest.fixture
def artifact(perceptron: Path, tmp_path: Path) -> Artifact:
    return wrap(perceptron, tmp_path / "wrapped")


def referenced(perceptron: Path, place: Path, *, shift: float = 0.0) -> Artifact:
    """The perceptron with a reference whose outputs are off by ``shift``."""
    import onnxruntime as ort

    x = np.random.default_rng(1).standard_normal((32, 8)).astype(np.float32)
    y = ort.InferenceSession(str(perceptron)).run(None, {"x": x})[0] + np.float32(shift)
    plain = wrap(perceptron, place / "plain")
    with drafting(place / "referenced") as publication:
        publication.draft.copy(plain.model, "model.onnx")
        reference.write(publication.draft.file("reference.npz"), [reference.Case("rows", {"x": x}, {"y": y})])
        return publication.publish(dataclasses.replace(plain.manifest, files=publication.files()))


def bench(source: Artifact, out: Path, **options: Any) -> tuple[Report, Path]:
    with drafting(out) as publication:
        report = REGISTRY.load("bench").parse({"budget": 20, "launches": 1, **options}).run(source, publication.draft)
        return report, Path(shutil.copytree(publication.draft.path, out.with_suffix(".kept")))


def test_alone_a_model_gets_figures_and_no_verdict(artifact: Artifact, tmp_path: Path, quick: None) -> None:
    report, _ = bench(artifact, tmp_path / "out", batch=4, concurrency="1,2")

    assert (report.verdict, report.exit_code) == ("not-evaluated", 0)
    names = {metric.name for metric in report.metrics}
    assert {"latency_mean", "latency_p50", "throughput", "load", "first_inference", "peak_memory"} <= names
    assert {"throughput_1_at_once", "throughput_2_at_once"} <= names
    assert report.details["setup"]["feed"] == {"x": {"dtype": "float32", "shape": [4, 8]}}
    assert report.details["measured"] == {"model": artifact.id}
    memory, latency = report.metric("peak_memory"), report.metric("latency_mean")
    assert memory is not None and 20e6 < float(memory.value or 0) < 1e9
    assert latency is not None and report.metric("throughput").value == pytest.approx(4000 / float(latency.value or 0))


@pytest.mark.skipif(not importlib.util.find_spec("openvino"), reason="openvino is not installed")
def test_every_backend_that_is_here_is_timed_and_checked(artifact: Artifact, tmp_path: Path, quick: None) -> None:
    report, kept = bench(artifact, tmp_path / "out", backend={"name": "all", "threads": 1})

    assert Evidence.read(kept).report().metrics == report.metrics
    [table] = report.details["tables"]
    assert [row[0] for row in table["rows"]][:2] == ["onnxruntime-cpu", "openvino-cpu"]
    setup = report.details["setup"]["models"].values()
    assert {model["backend"]["threads"] for model in setup if "threads" in model["backend"]} == {1}
    assert report.verdict == "pass" and {check.name.partition(".")[0] for check in report.checks} >= {"openvino-cpu"}
    assert report.metric("openvino_cpu_speedup") is not None
    assert any(note.startswith("not timed: onnxruntime-cuda") for note in report.notes) or (
        report.metric("onnxruntime_cuda_speedup") is not None
    )


def test_the_report_follows_from_the_evidence_alone(artifact: Artifact, tmp_path: Path, quick: None) -> None:
    options = {"backend": {"name": "null", "microseconds": 2000}, "against_backend": {"name": "null"}}

    report, kept = bench(artifact, tmp_path / "out", **options)

    assert [(check.name, check.verdict) for check in report.checks] == [("speed", "fail")]
    assert "surely more than 2 % slower" in report.checks[0].message
    again = Evidence.read(kept).report()
    assert (again.checks, again.metrics, again.notes) == (report.checks, report.metrics, report.notes)
    sides = {json.loads(line).get("side") for line in (kept / BLOCKS).read_text().splitlines()}
    assert sides == {None, "wrapped", "wrapped on null"}


def test_replay_judges_evidence_anew_and_takes_nothing_else(tmp_path: Path) -> None:
    made = Evidence("a", "b", Rules(), 1, records(1.2, 1.0), checks=(Check("y.finite", "pass"),), notes=("a remark",))
    with drafting(tmp_path / "evidence") as publication:
        made.write(publication.draft.path)
        manifest = Manifest("evidence", publication.files(), {}, "", measured={"model": "some id"})
        source = publication.publish(manifest)

    report, again = bench(source, tmp_path / "out", budget=60, launches=5, replay=True)

    assert report.exit_code == 1 and report.checks == made.report().checks
    assert report.notes[0] == "a remark"
    assert (again / BLOCKS).read_bytes() == source.file(BLOCKS).read_bytes()
    with pytest.raises(UsageError, match="takes everything from the evidence"):
        bench(source, tmp_path / "other", replay=True, ignore=0.01)


def test_an_inconclusive_verdict_says_what_would_settle_it() -> None:
    noisy = records(1.03, 1.0)
    for record in noisy:
        if record["kind"] == "block" and record["side"] == "a":
            record["wall_ns"] = round(record["wall_ns"] * (1 + 0.02 * record["launch"]))

    report = Evidence("a", "b", Rules(), 1, noisy, budget_seconds=30.0).report()

    [check] = report.checks
    assert check.verdict == "inconclusive" and report.exit_code == 3
    assert "launches would settle it; " in check.message
    assert "--budget" in check.message or "quieten the machine" in check.message


def test_records_that_bench_did_not_write_are_refused(tmp_path: Path) -> None:
    odd = Evidence("a", "b", Rules(), 1, [*records(1.2, 1.0), {"kind": "launch", "launch": 99}])
    with drafting(tmp_path / "evidence") as publication:
        odd.write(publication.draft.path)
        source = publication.publish(Manifest("evidence", publication.files(), {}, ""))

    with pytest.raises(InputRefused, match="did not write"):
        bench(source, tmp_path / "out", budget=60, launches=5, replay=True)


def test_a_model_that_grew_beyond_its_baseline_fails(
    artifact: Artifact, tmp_path: Path, quick: None, write_perceptron: Callable[..., Path]
) -> None:
    _, kept = bench(artifact, tmp_path / "first")
    with drafting(tmp_path / "baseline") as publication:
        for file in kept.iterdir():
            publication.draft.copy(file, file.name)
        publication.publish(Manifest("evidence", publication.files(), {}, ""))
    larger = wrap(write_perceptron(tmp_path / "larger.onnx", classes=40), tmp_path / "larger")

    same, _ = bench(artifact, tmp_path / "same", baseline=str(tmp_path / "baseline"))
    file = tmp_path / "baseline.json"
    grown, _ = bench(larger, tmp_path / "grown", baseline=str(tmp_path / "baseline"), save_baseline=str(file))

    assert same.verdict == "pass"
    names = {check.name for check in same.checks}
    assert names >= {f"baseline.{name}" for name in ("size_bytes", "nodes", "parameters", "macs")}
    failed = {check.name for check in grown.checks if check.verdict == "fail"}
    assert failed >= {"baseline.size_bytes", "baseline.parameters", "baseline.macs"} and grown.exit_code == 1
    assert not file.exists() and any("was not written" in note for note in grown.notes)


@pytest.mark.parametrize(("part", "name"), [("figures", "size_bytes"), ("latency_ms", "p50")])
def test_a_baseline_that_lacks_what_every_model_has_is_refused(part: str, name: str, tmp_path: Path) -> None:
    whole = {**summary(), "figures": {"size_bytes": 10}}
    _baseline.save(tmp_path / "whole.json", whole)
    assert _baseline.load(tmp_path / "whole.json")["figures"] == {"size_bytes": 10}
    _baseline.save(tmp_path / "part.json", {**whole, part: {**whole[part], name: None}})
    with pytest.raises(InputRefused, match="no baseline"):
        _baseline.load(tmp_path / "part.json")


def test_figures_of_other_inputs_are_named_as_not_compared() -> None:
    before = {**summary(), "figures": {"size_bytes": 10, "macs": 5, "memory_of_model_bytes": 7}}
    now = {**before, "feed": {"x": {"dtype": "float32", "shape": [8, 64]}}}
    assert [check.name for check in _baseline.checks(before, now)] == ["baseline.size_bytes"]
    assert any(note.endswith(": macs, memory of model") for note in _baseline.notes(before, now))


def test_a_saved_baseline_is_held_against_later(artifact: Artifact, tmp_path: Path, quick: None) -> None:
    file = tmp_path / "baseline.json"
    bench(artifact, tmp_path / "first", save_baseline=str(file))

    again, _ = bench(artifact, tmp_path / "again", baseline=str(file), save_baseline=str(file))

    assert again.verdict == "pass" and json.loads(file.read_text())["figures"]["macs"] == 8 * 16 + 16 * 4
    assert f"wrote {file}" in again.notes[-1]
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    with pytest.raises(UsageError, match="is no baseline"):
        _baseline.save(tmp_path / "notes.json", json.loads(file.read_text()))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "[" * 100_000, '{"schema": "modelops.baseline/1"}', '{"schema": "modelops.baseline/2"}'],
)
def test_a_file_that_is_no_baseline_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "baseline.json").write_text(text)
    with pytest.raises(InputRefused, match="baseline"):
        _baseline.load(tmp_path / "baseline.json")


def summary(p50: float = 1.0, **other: Any) -> dict[str, Any]:
    latency = {"p50": p50, "low": 0.95 * p50, "high": 1.05 * p50, "busy": 0.0}
    return {"figures": {}, "feed": {}, "backend": {}, "latency_ms": latency, "machine": {"cpu": "this"}, **other}


def test_timings_of_another_machine_or_a_busy_one_judge_nothing() -> None:
    here, slow = summary(), summary(3.0)
    busy = summary(3.0, latency_ms={**slow["latency_ms"], "busy": 0.6})
    for before, why in (
        (summary(machine={"cpu": "that"}), "another machine"),
        (summary(backend={"name": "other"}), "another backend"),
        (summary(latency_ms={**here["latency_ms"], "high": None}), "too few launches"),
    ):
        assert _baseline.checks(before, slow) == []
        assert why in _baseline.notes(before, slow)[0]
    assert _baseline.checks(here, busy) == [] and "busy" in _baseline.notes(here, busy)[0]


def test_on_the_same_machine_a_gross_slow_down_fails() -> None:
    [check] = _baseline.checks(summary(), summary(3.0))
    assert check.verdict == "fail" and _baseline.notes(summary(), summary(3.0)) == []
    [check] = _baseline.checks(summary(), summary(1.2))
    assert check.verdict == "pass"


def test_memory_is_compared_on_one_backend_and_one_feed() -> None:
    def found(before: dict[str, Any]) -> list[str]:
        now = summary(figures={"memory_of_model_bytes": 200 << 20}, machine={"cpu": "that"})
        return [check.verdict for check in _baseline.checks(before, now)]

    assert found(summary(figures={"memory_of_model_bytes": 100 << 20})) == ["fail"]
    assert found(summary(figures={"memory_of_model_bytes": 190 << 20})) == ["pass"]
    assert found(summary(figures={"memory_of_model_bytes": 1}, backend={"name": "other"})) == []
    assert found(summary(figures={"memory_of_model_bytes": 1}, feed={"x": [2]})) == []


def test_several_batches_are_measured_side_by_side(artifact: Artifact, tmp_path: Path, quick: None) -> None:
    report, kept = bench(artifact, tmp_path / "out", batch="1,8,32", concurrency="2")

    [table] = report.details["tables"]
    assert [row[table["columns"].index("batch")] for row in table["rows"]] == [1, 8, 32]
    names = {metric.name for metric in report.metrics}
    assert {"latency_p50", "batch_8_latency_p50", "batch_32_throughput", "batch_32_throughput_2_at_once"} <= names
    single, many = report.metric("latency_p50"), report.metric("batch_32_throughput")
    assert single is not None and many is not None and many.n
    assert float(many.value or 0) > 0 and float(single.value or 0) > 0
    assert Evidence.read(kept).report().metrics == report.metrics


def test_altered_evidence_is_refused(tmp_path: Path) -> None:
    (tmp_path / MEASUREMENTS).write_text('{"schema": "modelops.measurements/1"}')
    (tmp_path / BLOCKS).write_text("")
    with pytest.raises(InputRefused):
        Evidence.read(tmp_path)


def test_a_fast_wrong_model_fails(perceptron: Path, tmp_path: Path, quick: None) -> None:
    right, _ = bench(referenced(perceptron, tmp_path), tmp_path / "a")
    wrong, _ = bench(referenced(perceptron, tmp_path / "wrong", shift=0.01), tmp_path / "b")

    assert right.verdict == "pass" and right.exit_code == 0
    assert wrong.verdict == "fail" and wrong.exit_code == 1


def test_another_model_needs_the_same_inputs(
    artifact: Artifact, tmp_path: Path, quick: None, write_perceptron: Callable[..., Path]
) -> None:
    import onnx

    other = write_perceptron(tmp_path / "other.onnx")
    model = onnx.load(other)
    model.graph.input[0].name = model.graph.node[0].input[0] = "z"
    onnx.save(model, other)

    with pytest.raises(UsageError, match="takes z; it was given x"):
        bench(artifact, tmp_path / "out", against=str(other))


def test_a_model_that_crashes_while_it_is_timed_fails_the_stage(
    artifact: Artifact, tmp_path: Path, quick: None
) -> None:
    with pytest.raises(StageFailed, match="inference 30 failed"):
        bench(artifact, tmp_path / "out", backend={"name": "null", "fails_at": 30})


@pytest.mark.parametrize(("options", "message"), [
    ({"at_least": 1.5}, "nothing to compare with"),
    ({"backend": "torch-cpu"}, "runs source models"),
    ({"against_backend": "torch-cpu"}, "runs source models"),
    ({"against": "net.py:build"}, "is a source"),
    ({"against": "nowhere"}, "no such artifact"),
    ({"dim": ["sequence"]}, "can't be 'sequence'"),
    ({"dim": ["sequence=128"]}, "unknown dynamic dimension"),
    ({"dim": ["batch=4"]}, "counts the samples"),
    ({"ignore": 0.1}, "must lie below"),
    ({"backend": "all", "against_backend": "null"}, "on one backend and one batch"),
    ({"batch": "1,8", "against_backend": "null"}, "on one backend and one batch"),
])  # fmt: skip
def test_what_can_not_be_done_is_refused(
    artifact: Artifact, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        bench(artifact, tmp_path / "out", **options)


def test_the_budget_counts_beside_the_limits() -> None:
    short, long = (REGISTRY.load("bench").parse({"budget": seconds}).limits(0).wall_seconds for seconds in (60, 600))
    assert short is not None and long is not None and long >= short + 540 and short >= 60


def test_sizes_of_dynamic_dimensions_are_those_asked_for() -> None:
    signature = Signature((TensorSpec("ids", "int64", ("batch", "sequence")),), ())
    assert sizes_of(["sequence=128"], signature) == {"sequence": 128}


def test_the_rows_of_the_reference_are_timed_on_and_repeated(perceptron: Path, tmp_path: Path) -> None:
    source = referenced(perceptron, tmp_path)

    feed, origin = timing_feed(source, batch=40, sizes={})

    [case] = reference.read(source.file("reference.npz"))
    np.testing.assert_array_equal(feed["x"][:32], case.feed["x"])
    np.testing.assert_array_equal(feed["x"][32:], case.feed["x"][:8])
    assert "reference" in origin


def test_the_users_samples_are_timed_on(artifact: Artifact, tmp_path: Path) -> None:
    x = np.random.default_rng(2).standard_normal((5, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)

    feed, _ = timing_feed(artifact, batch=3, sizes={}, data=tmp_path / "data.npz")

    np.testing.assert_array_equal(feed["x"], x[:3])


def test_a_fixed_batch_is_kept(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, save

    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "fixed",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [8, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [8, 2])],
    )
    opsets = [helper.make_opsetid("", 18)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "fixed.onnx")
    source = wrap(tmp_path / "fixed.onnx", tmp_path / "fixed")

    assert timing_feed(source, batch=1, sizes={})[0]["x"].shape == (8, 2)
    with pytest.raises(UsageError, match="fixed at 8"):
        timing_feed(source, batch=4, sizes={})


def test_the_preflight_says_who_else_uses_the_machine() -> None:
    record = _preflight.look()

    assert record["usable_cpus"] >= 1 and len(record["load"]) == 3
    assert record["busy"] is None or 0 <= record["busy"] <= 1
    warned = _preflight.warnings({**record, "busy": 0.9, "steal": 0.2, "governor": ["powersave"]})
    assert any("90%" in text for text in warned) and any("20%" in text for text in warned)
    assert any("powersave" in text for text in warned)
    assert (
        _preflight.warnings({**record, "busy": 0.0, "steal": 0.0, "governor": [], "usable_cpus": 2, "host_cpus": 2})
        == []
    )


def test_flags_reach_all_backends_and_the_source_that_is_compiled() -> None:
    from modelops.cli.options import stage_from

    cls = REGISTRY.load("bench")

    stage: Any = stage_from(cls, {"backend": "all", "threads": "2", "batch": ["1,8"]})
    assert (stage.backend.name, stage.backend.threads, stage.batch) == ("all", 2, (1, 8))
    assert cls.parse(stage.to_dict()) == stage
    stage = stage_from(cls, {"against": "net.py:build", "against_backend": "torch-cpu", "compile": True})
    assert stage.against_backend.compile is True
    with pytest.raises(UsageError, match="--compile needs --against-backend torch-cpu"):
        stage_from(cls, {"compile": True})


def test_a_result_whose_baseline_is_gone_is_not_reused(perceptron: Path, tmp_path: Path) -> None:
    from modelops.pipeline import run_stage

    file = tmp_path / "baseline.json"
    options = {"backend": "null", "budget": 1, "launches": 1, "save_baseline": str(file)}
    stage = REGISTRY.load("bench").parse(options)
    run_stage(stage, str(perceptron), tmp_path / "out")
    assert file.is_file() and run_stage(stage, str(perceptron), tmp_path / "out").reused

    file.unlink()

    with pytest.raises(UsageError, match="written with it, is not"):
        run_stage(stage, str(perceptron), tmp_path / "out")


@pytest.mark.gpu
def test_on_a_gpu_bench_tells_device_time_memory_and_clocks(artifact: Artifact, tmp_path: Path, quick: None) -> None:
    from modelops.backends import REGISTRY as BACKENDS

    if reason := BACKENDS.load("onnxruntime-cuda").parse({}).missing():
        pytest.skip(reason)

    report, kept = bench(artifact, tmp_path / "out", backend="onnxruntime-cuda", batch="1,8")

    for name in ("device_time", "device_memory", "batch_8_device_memory"):
        metric = report.metric(name)
        assert metric is not None and float(metric.value or 0) > 0
    [header] = [record for record in Evidence.read(kept).records if record["kind"] == "launch"]
    assert all(side["device_after"]["clocks.sm"] for side in header["sides"].values())
