from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from quantizer_models import Bench, arrays, model_of, operators, outputs, sqnr, weights

from modelops.core.workbench import Done
from modelops.errors import GateFailed, UsageError
from modelops.quantizers import Quantizer
from modelops.quantizers._budget import Left, within
from modelops.quantizers._captures import Batch, Capture
from modelops.quantizers._rounding import Scheme, compensated, decibels, nearest
from modelops.quantizers._selection import decided
from modelops.quantizers._sensitivity import Cost, _Errors
from modelops.quantizers._shifts import _some
from modelops.quantizers.dynamic import Dynamic
from modelops.quantizers.static import Static


def quantized(method: Quantizer, source: Path, data: Any, folder: Path) -> tuple[Path, Any]:
    (folder / "scratch").mkdir(parents=True, exist_ok=True)
    target = folder / "model.onnx"
    return target, method.quantize(source, target, Bench(folder / "scratch", data))  # type: ignore[arg-type]


@pytest.fixture
def spread(tmp_path: Path) -> tuple[Path, Any]:
    """A feed-forward block whose hidden columns differ in size by a thousand, with a residual sum that reads it too."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[n, t, 64] x) => (float[n, t, 64] y, float[n, t, 256] hidden) {
        h = MatMul (x, w1)
        s = Mul (h, sizes)
        hidden = Relu (s)
        o = MatMul (hidden, w2)
        b = Add (o, bias)
        y = Add (b, x)
    }"""
    sizes = np.exp(np.random.default_rng(1).normal(size=256)).astype(np.float32)
    sizes[:3] = 300
    constants = {"w1": weights(64, 256, seed=2), "w2": weights(256, 64, seed=3) / np.sqrt(sizes)[:, None]}
    source = model_of(text, {**constants, "sizes": sizes, "bias": weights(64, seed=4)}, tmp_path / "spread.onnx")
    return source, {"x": np.random.default_rng(5).normal(size=(64, 4, 64)).astype(np.float32)}


OFF = {"migrate": False, "outliers": False, "compensate": False, "correct_bias": False}


def test_columns_that_stand_out_cost_a_product_no_precision(spread: tuple[Path, Any], tmp_path: Path) -> None:
    source, data = spread
    exact = outputs(source, data)
    plain, _ = quantized(Dynamic(**OFF), source, data, tmp_path / "plain")
    migrated, done = quantized(Dynamic(outliers=False), source, data, tmp_path / "migrated")
    apart, also = quantized(Dynamic(migrate=False), source, data, tmp_path / "apart")
    found = [sqnr(exact, outputs(model, data)) for model in (plain, migrated, apart)]
    assert found[0] + 3 < min(found[1:])
    line = next(line for line in done.details["improvements"] if line["input"] == "hidden")
    assert line["factors"] == "multiply" and line["strength"] > 0 and line["after_db"] > line["before_db"]
    assert next(one for one in also.details["improvements"] if one["input"] == "hidden")["float_columns"] in (4, 8, 16)


def test_without_data_nothing_is_improved(spread: tuple[Path, Any], tmp_path: Path) -> None:
    source, data = spread
    first, done = quantized(Dynamic(), source, None, tmp_path / "without")
    second, _ = quantized(Dynamic(**OFF), source, data, tmp_path / "off")
    assert first.read_bytes() == second.read_bytes() and "improvements" not in done.details


def test_an_improvement_never_reaches_the_float_outputs(spread: tuple[Path, Any], tmp_path: Path) -> None:
    """What else reads the activation that was rescaled, an output of the model even, sees it as it was."""
    source, data = spread
    target, _ = quantized(Dynamic(op_types=("MatMul",), exclude=("h",)), source, data, tmp_path / "out")
    from modelops.graphs import runs

    with runs.session(source) as before, runs.session(target) as after:
        assert np.array_equal(runs.run(before, data)["hidden"], runs.run(after, data)["hidden"])


def test_factors_go_into_a_normalization_that_nothing_else_reads(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[n, t, 32] x, float[n, t, 32] k) => (float[n, t, t] scores) {
        h = LayerNormalization <axis = -1> (x, gamma, beta)
        q = MatMul (h, w)
        kt = Transpose <perm = [0, 2, 1]> (k)
        scores = MatMul (q, kt)
    }"""
    gamma = np.exp(np.random.default_rng(0).normal(size=32)).astype(np.float32)
    constants = {"gamma": gamma, "beta": weights(32, seed=1), "w": weights(32, 32, seed=2)}
    source = model_of(text, constants, tmp_path / "norm.onnx")
    rng = np.random.default_rng(3)
    data = {name: rng.normal(size=(48, 5, 32)).astype(np.float32) for name in ("x", "k")}
    for method in (Dynamic(outliers=False), Static(outliers=False)):
        target, done = quantized(method, source, data, tmp_path / method.name)
        assert done.details["improvements"][0]["factors"] == "normalization"
        assert operators(target).get("Mul", 0) == (1 if method.name == "static" else 2) - (method.name == "static")
        assert not any(np.array_equal(array, gamma) for array in arrays(target).values())
        plain, _ = quantized(type(method)(**OFF), source, data, tmp_path / f"{method.name}-plain")
        exact = outputs(source, data)
        assert sqnr(exact, outputs(target, data)) > sqnr(exact, outputs(plain, data))


def test_compensated_rounding_beats_the_nearest_on_the_product_and_keeps_the_grid() -> None:
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(512, 8)) @ rng.normal(size=(8, 48)) + 0.1 * rng.normal(size=(512, 48))).astype(np.float32)
    matrix, scheme = weights(48, 20, seed=1), Scheme(per_channel=True, reduced=True)
    plain, better = nearest(matrix, scheme), compensated(matrix, rows.T @ rows, scheme)
    exact = rows @ matrix
    assert sqnr(exact, rows @ better) > sqnr(exact, rows @ plain) + 3
    assert np.allclose(nearest(better, scheme), better, atol=1e-6)
    assert np.allclose(np.abs(better).max(axis=0), np.abs(matrix).max(axis=0), rtol=1e-5)


def test_moments_that_overflowed_leave_every_weight_at_the_nearest_level() -> None:
    matrix, scheme = weights(48, 20, seed=1), Scheme(per_channel=True, reduced=True)
    moments = np.full((48, 48), np.inf, dtype=np.float32)
    assert np.array_equal(compensated(matrix, moments, scheme), nearest(matrix, scheme))


def test_a_bias_is_corrected_only_where_held_out_samples_say_so(tmp_path: Path) -> None:
    """Rounding the weights of a channel up, all of them, shifts its mean for inputs that are all positive."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[n, 8, 6, 6] x) => (float[n, 4, 6, 6] y) { y = Conv (x, w, b) }"""
    w = np.full((4, 8, 1, 1), 0.3, np.float32)
    w[:, 0] = 1.0
    source = model_of(text, {"w": w, "b": weights(4)}, tmp_path / "conv.onnx")
    data = {"x": np.random.default_rng(0).uniform(0.5, 1, size=(64, 8, 6, 6)).astype(np.float32)}
    exact = outputs(source, data)
    corrected, done = quantized(Static(reduce_range="yes"), source, data, tmp_path / "on")
    plain, _ = quantized(Static(reduce_range="yes", **OFF), source, data, tmp_path / "off")
    line = done.details["improvements"][0]
    assert line["bias_corrected"] and line["after_db"] > line["before_db"] + 3
    assert sqnr(exact, outputs(corrected, data)) > sqnr(exact, outputs(plain, data)) + 3

    noise = {"x": np.random.default_rng(1).normal(size=(64, 8, 6, 6)).astype(np.float32)}
    _, done = quantized(Static(reduce_range="yes"), source, noise, tmp_path / "noise")
    assert not done.details["improvements"][0]["bias_corrected"]


@pytest.mark.parametrize("method", [Dynamic, Static])
def test_nodes_go_back_to_float_until_outputs_are_good_enough(
    spread: tuple[Path, Any], tmp_path: Path, method: type[Quantizer]
) -> None:
    source, data = spread
    _, explained = quantized(method(explain=True, **OFF), source, data, tmp_path / "explained")  # type: ignore[call-arg]
    table = explained.details["sensitivity"]
    assert {line["decision"] for line in table} == {"int8"} and len(table) == 2
    assert table[0]["error_db"] < table[1]["error_db"] and 0 < table[0]["time_share"] < 1
    found = explained.metrics[-1].value
    asked = found + 6
    target, done = quantized(method(least_sqnr=asked, **OFF), source, data, tmp_path / "kept")  # type: ignore[call-arg]
    kept = [line["node"] for line in done.details["sensitivity"] if line["decision"] == "float"]
    assert kept == [table[0]["node"]] and done.metrics[-1].value >= asked
    assert sqnr(outputs(source, data), outputs(target, data)) > asked - 1
    assert any("stay float" in note for note in done.notes)


def test_the_table_tells_of_every_node_that_any_round_returned_to_float(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"node_{kind}" for kind in "ab"]
    costs = [Cost(name, "MatMul", 0.1) for name in names]
    int8 = decided(costs, {}, 0.0)
    rounds = iter([int8, [replace(int8[0], becomes="float"), int8[1]], [int8[0], replace(int8[1], becomes="float")]])
    monkeypatch.setattr("modelops.quantizers._budget._costs", lambda *_: costs)
    monkeypatch.setattr("modelops.quantizers._budget._shares", lambda *_: {})
    monkeypatch.setattr("modelops.quantizers._budget.decided", lambda *_: next(rounds))
    losses = iter([1.0, 0.5, 1e-9])
    grounds = SimpleNamespace(
        memory=SimpleNamespace(feeds=lambda: iter([{}])), names=names, scheme=None, movable=frozenset(),
        noise=lambda *_: next(losses),
    )  # fmt: skip
    left: list[Left] = []

    def make(nodes: Left) -> Any:
        left.append(nodes)
        return Done(), grounds

    done = within(make, tmp_path / "in", tmp_path / "out", least_sqnr=20, explain=False, seconds=1)  # type: ignore[arg-type]
    assert left[-1].floats == set(names)
    assert {line["node"]: line["decision"] for line in done.details["sensitivity"]} == dict.fromkeys(names, "float")


def test_what_no_choice_of_nodes_reaches_is_refused(spread: tuple[Path, Any], tmp_path: Path) -> None:
    source, data = spread
    with pytest.raises(GateFailed):
        quantized(Dynamic(least_sqnr=110), source, data, tmp_path / "out")
    with pytest.raises(UsageError, match="--data"):
        quantized(Dynamic(explain=True), source, None, tmp_path / "without")


def test_a_capture_judges_by_what_it_was_not_fitted_on() -> None:
    batch = Batch(np.ones((2, 3), np.float32), np.ones(3), np.ones(3))
    assert Capture([batch], []).judging == [batch]
    other = Batch(np.zeros((2, 3), np.float32), np.zeros(3), np.zeros(3))
    assert Capture([batch], [other]).judging == [other]


def test_an_output_that_became_nan_counts_as_lost() -> None:
    errors = _Errors()
    errors.add({"y": np.ones((4, 4), np.float32)}, {"y": np.full((4, 4), np.nan, np.float32)})
    assert errors.worst == np.inf and decibels(errors.worst) == -120


@pytest.fixture
def wandering(tmp_path: Path) -> tuple[Path, Any]:
    """A product that reads values a thousand times as large in one batch as in another, undone behind it."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[n, 64] x, float[n, 1] size) => (float[n, 32] y) {
        h = MatMul (x, w1)
        large = Mul (h, size)
        o = MatMul (large, w2)
        y = Div (o, size)
    }"""
    source = model_of(text, {"w1": weights(64, 128, seed=2), "w2": weights(128, 32, seed=3)}, tmp_path / "w.onnx")
    size = np.repeat(np.geomspace(1, 1000, 8), 8)[:, None].astype(np.float32)
    return source, {"x": np.random.default_rng(5).normal(size=(64, 64)).astype(np.float32), "size": size}


@pytest.mark.parametrize("faster", [True, False])
def test_a_product_finds_its_range_as_it_runs_where_that_keeps_more_and_is_faster_than_float(
    wandering: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faster: bool
) -> None:
    monkeypatch.setattr("modelops.quantizers._budget.faster", lambda *_: faster)
    source, data = wandering
    target, done = quantized(Static(least_sqnr=25, **OFF), source, data, tmp_path / "out")
    decisions = {line["node"]: line["decision"] for line in done.details["sensitivity"]}
    assert sorted(decisions.values()) == (["dynamic", "int8"] if faster else ["float", "int8"])
    assert operators(target).get("MatMulInteger", 0) == faster and done.details["quantized"]["dynamic"] == faster
    batches = [{name: array[start : start + 8] for name, array in data.items()} for start in range(0, 64, 8)]
    least = min(sqnr(outputs(source, batch), outputs(target, batch)) for batch in batches)
    assert done.metrics[-1].value >= 25 and least > 24
    assert any("as they run" in note for note in done.notes) == faster


def test_what_loses_as_much_with_ranges_found_as_it_runs_stays_float(spread: tuple[Path, Any], tmp_path: Path) -> None:
    source, data = spread
    _, explained = quantized(Static(explain=True, **OFF), source, data, tmp_path / "explained")
    asked = explained.metrics[-1].value + 6
    target, done = quantized(Static(least_sqnr=asked, **OFF), source, data, tmp_path / "kept")
    assert {line["decision"] for line in done.details["sensitivity"]} == {"int8", "float"}
    assert "MatMulInteger" not in operators(target)


def test_a_model_for_other_kernels_is_measured_as_they_compute(tmp_path: Path) -> None:
    """On a CPU whose kernels overflow with all 8 bits, what it would lose there says nothing."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[n, 64] x) => (float[n, 8] y) { y = MatMul (x, w) }"""
    w = np.full((64, 8), 0.5, np.float32) + weights(64, 8, scale=0.01)
    source = model_of(text, {"w": w}, tmp_path / "large.onnx")
    data = {"x": np.random.default_rng(0).uniform(0.7, 1, size=(64, 64)).astype(np.float32)}
    _, done = quantized(Static(explain=True, target="x86-vnni", **OFF), source, data, tmp_path / "out")
    assert done.metrics[-1].value > 35


@pytest.mark.parametrize(("dim", "pixels", "sizes"), [("n", 200, [4] * 4), ("n", 8, [8] * 8), ("8", 200, [8] * 4)])
def test_biases_are_measured_on_a_few_of_large_samples(tmp_path: Path, dim: str, pixels: int, sizes: list[int]) -> None:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    net (float[{dim}, 1, {pixels}, {pixels}] x) => (float[{dim}, 1, {pixels}, {pixels}] y) {{ y = Relu (x) }}"""
    model = onnx.load(model_of(text, {}, tmp_path / "model.onnx"))
    feeds = [{"x": np.zeros((8, 1, pixels, pixels), np.float32)}] * 16
    assert [len(feed["x"]) for feed in _some(model, lambda: iter(feeds))] == sizes
