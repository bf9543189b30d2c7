"""Fused graphs are published where they hold and are fast; rows that are wholly masked stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from modelops.core.artifact import Artifact, drafting
from modelops.core.report import Metric, Report
from modelops.errors import Inconclusive
from modelops.graphs.describe import summary
from modelops.graphs.wrap import wrap
from modelops.simplifiers import REGISTRY, Pace
from modelops.stages._engine import EngineBench
from modelops.stages.simplify import Simplify

TEXT = """<ir_version: 8, opset_import: ["" : 18]>
net (float[n, t, 32] x, int64[n, t] attention_mask) => (float[n, t, 32] y) {
    keep0 = Cast <to = 9> (attention_mask)
    keep = Unsqueeze (keep0, axes)
    mask = Where (keep, zero, hidden)
    q0 = MatMul (x, wq)
    q1 = Add (q0, bq)
    q2 = Reshape (q1, heads)
    q = Transpose <perm = [0, 2, 1, 3]> (q2)
    k0 = MatMul (x, wk)
    k1 = Add (k0, bk)
    k2 = Reshape (k1, heads)
    k3 = Transpose <perm = [0, 2, 1, 3]> (k2)
    k = Transpose <perm = [0, 1, 3, 2]> (k3)
    v0 = MatMul (x, wv)
    v1 = Add (v0, bv)
    v2 = Reshape (v1, heads)
    v = Transpose <perm = [0, 2, 1, 3]> (v2)
    qs = Mul (q, root)
    ks = Mul (k, root)
    scores = MatMul (qs, ks)
    masked = Add (scores, mask)
    share = Softmax <axis = -1> (masked)
    nan = IsNaN (share)
    sure = Where (nan, zero, share)
    mixed = MatMul (sure, v)
    m1 = Transpose <perm = [0, 2, 1, 3]> (mixed)
    m2 = Reshape (m1, flat)
    o0 = MatMul (m2, wo)
    o1 = Add (o0, bo)
    sum = Add (o1, x)
    y = LayerNormalization <axis = -1> (sum, gamma, beta)
}"""


@pytest.fixture
def source(tmp_path: Path) -> Artifact:
    """A layer of an encoder as torch's exporter writes it: softmax is guarded against rows that are wholly masked."""
    rng = np.random.default_rng(0)
    weights: dict[str, Any] = {name: rng.normal(size=(32, 32)) * 0.2 for name in ("wq", "wk", "wv", "wo")}
    weights |= {name: rng.normal(size=32) * 0.3 for name in ("bq", "bk", "bv", "bo", "gamma", "beta")}
    weights = {name: value.astype(np.float32) for name, value in weights.items()}
    weights |= {"heads": np.array([0, 0, 2, 16]), "flat": np.array([0, 0, 32]), "root": np.float32(0.5)}
    weights |= {"zero": np.float32(0), "hidden": np.float32(-np.inf), "axes": np.array([1, 2])}
    model = parser.parse_model(TEXT)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items())
    onnx.save(model, tmp_path / "encoder.onnx")
    return wrap(tmp_path / "encoder.onnx", tmp_path / "source")


def simplified(source: Artifact, engine: Any, **options: Any) -> tuple[Report, dict[str, int]]:
    with drafting(source.path.parent / "out") as publication:
        report = Simplify.parse({"engine": engine, **options}).run(source, publication.draft)
        return report, dict(summary(publication.draft.path / "model.onnx")["operators"])


FUSING = {"name": "auto", "engines": ["onnxscript"], "fuse": "onnxruntime", "speed_budget": 0.0}


def test_attention_is_fused_and_wholly_masked_rows_stay_what_they_were(source: Artifact) -> None:
    report, operators = simplified(source, FUSING, expect=["*Attention==1", "Softmax==0"])
    assert report, report.worst()
    assert operators["Sum"] == operators["LayerNormalization"] == operators["IsNaN"] == 1
    assert any("needs onnxruntime" in note for note in report.notes)
    y = next(check for check in report.checks if check.name == "y.finite")
    assert y.verdict == "pass" and y.n and y.n > 32


def test_without_asking_the_graph_keeps_to_standard_operators(source: Artifact) -> None:
    report, operators = simplified(source, {"name": "auto", "engines": ["onnxscript"]})
    assert report and not any(":" in op for op in operators)


@pytest.mark.parametrize(
    ("verdict", "speedup", "fused"), [("pass", 1.3, True), ("pass", 0.9, False), ("inconclusive", 1.01, False)]
)
def test_a_fused_graph_is_kept_where_it_is_measured_faster(
    verdict: Any, speedup: float, fused: bool, source: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pace(self: EngineBench, candidate: Path, than: Path, seconds: float) -> Pace:
        return Pace(verdict, f"{speedup}x the speed", speedup, Metric("speedup", speedup, "x"))

    monkeypatch.setattr(EngineBench, "pace", pace)
    report, operators = simplified(source, {**FUSING, "speed_budget": 5.0})
    assert report and any(":" in op for op in operators) is fused


def test_a_fused_graph_that_could_not_be_timed_is_not_kept(source: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def pace(*_: Any) -> Pace:
        raise Inconclusive("the machine is too noisy")

    monkeypatch.setattr(EngineBench, "pace", pace)
    report, operators = simplified(source, {**FUSING, "speed_budget": 5.0})
    assert report and not any(":" in op for op in operators)
    reasons = [item["reason"] for item in report.details["attempts"] if item["outcome"] == "not faster"]
    assert reasons and all("the machine is too noisy" in reason for reason in reasons)


def test_a_fused_graph_that_differs_is_refused(source: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt: Callable[..., Any] = EngineBench.attempt

    def spoiled(self: EngineBench, engine: Any, source: Path, target: Path, *rest: Any) -> Any:
        done = attempt(self, engine, source, target, *rest)
        if engine.fuses and target.is_file():
            model = onnx.load(target)
            bias = next(one for one in model.graph.initializer if one.name == "bo")
            bias.CopyFrom(numpy_helper.from_array(1.01 * numpy_helper.to_array(bias), "bo"))
            onnx.save(model, target)
        return done

    monkeypatch.setattr(EngineBench, "attempt", spoiled)
    report, operators = simplified(source, FUSING)
    assert report and not any(":" in op for op in operators)
    assert {item["outcome"] for item in report.details["attempts"] if item.get("fusions")} == {"refused"}


def hiding(source: Artifact, hidden: float) -> Artifact:
    """The same layer with another number where a row may not look."""
    model = onnx.load(source.model)
    value = next(one for one in model.graph.initializer if one.name == "hidden")
    value.CopyFrom(numpy_helper.from_array(np.asarray(hidden, np.float32), "hidden"))
    onnx.save(model, source.path.parent / "other.onnx")
    return wrap(source.path.parent / "other.onnx", source.path.parent / "other")


@pytest.mark.parametrize(("hidden", "left"), [(-np.inf, 1), (-3.4028235e38, 0)])
def test_a_guard_goes_where_no_row_can_be_hidden_wholly(hidden: float, left: int, source: Artifact) -> None:
    report, operators = simplified(hiding(source, hidden), "guards")
    assert report, report.worst()
    assert operators.get("IsNaN", 0) == left and operators["Where"] == 1 + left


@pytest.mark.parametrize(("hidden", "chosen"), [(-np.inf, "onnxslim"), (-3.4028235e38, "guards+onnxslim")])
def test_an_engine_does_not_run_twice_where_it_starts_from_less(hidden: float, chosen: str, source: Artifact) -> None:
    with drafting(source.path.parent / "target") as publication:
        stage = Simplify.parse({"engine": {"name": "auto", "engines": ["onnxslim", "guards+onnxslim"]}})
        report = stage.run(hiding(source, hidden), publication.draft)
    attempts = {one["engine"]: one for one in report.details["attempts"]}
    assert report.details["chosen"] == chosen and attempts[chosen]["outcome"] == "valid"
    alone = attempts["onnxslim"]
    assert ("nodes" in alone) == (chosen == "onnxslim")
    assert chosen == "onnxslim" or "guards+onnxslim starts from fewer nodes" in alone["reason"]


def test_a_graph_without_attention_is_left_as_it_is(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["" : 18]> net (float[n, 4] x) => (float[n, 4] y) { y = Relu (x) }'
    onnx.save(parser.parse_model(text), tmp_path / "relu.onnx")
    for name in ("onnxscript-fusions", "onnxruntime-transformers"):
        target = tmp_path / f"{name}.onnx"
        done = REGISTRY.load(name).parse({}).simplify(tmp_path / "relu.onnx", target, None)  # type: ignore[arg-type]
        assert not target.exists() and "no pattern" in done.notes[0]
