from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from quantizer_models import Bench, arrays, constant_graph, model_of, operators, outputs, sqnr, weights

from modelops.core import machine
from modelops.errors import GateFailed, InputRefused, UsageError
from modelops.quantizers._calibration import _without_idle, step_of
from modelops.quantizers.static import Static


def quantized(source: Path, data: Any, folder: Path, batch: int = 8, **options: Any) -> tuple[Path, Any]:
    scratch = folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    target = folder / "model.onnx"
    return target, Static(**options).quantize(source, target, Bench(scratch, data, batch))


def test_every_convolution_runs_as_an_integer_kernel(conv_net: Path, images: Any, tmp_path: Path) -> None:
    target, done = quantized(conv_net, images, tmp_path / "out")
    assert done.details["fused"] == {"QGemm": 1, "QLinearAdd": 1, "QLinearConv": 2, "QLinearGlobalAveragePool": 1}
    assert done.details["unfused"] == {} and done.details["left_float"] == {}
    assert "BatchNormalization" not in operators(target)
    assert sqnr(outputs(conv_net, images), outputs(target, images)) > 25


def test_weights_are_stored_as_int8_once(conv_net: Path, images: Any, tmp_path: Path) -> None:
    target, _ = quantized(conv_net, images, tmp_path / "out", reduce_range="no")
    stored = arrays(target)
    big = {name: array for name, array in stored.items() if array.size >= 16 * 16}
    assert {array.dtype.name for array in big.values()} == {"int8"}
    assert max(np.abs(array).max() for array in big.values()) == 127


def test_scores_leave_the_model_as_floats_of_full_precision(conv_net: Path, images: Any, tmp_path: Path) -> None:
    target, done = quantized(conv_net, images, tmp_path / "out")
    graph = onnx.load(target).graph
    last = next(node for node in graph.node if "logits" in node.output)
    assert last.op_type == "Gemm" and done.details["pairs_dropped"] == 1
    assert [output.type.tensor_type.elem_type for output in graph.output] == [onnx.TensorProto.FLOAT]


@pytest.mark.skipif(machine.has_vnni() or "avx2" not in machine.cpu_features(), reason="saturates on AVX2 alone")
def test_the_default_does_not_saturate_on_this_machine(conv_net: Path, images: Any, tmp_path: Path) -> None:
    bright = {"image": np.abs(images["image"]) + 1}
    wanted = outputs(conv_net, bright)
    safe, full = (
        sqnr(wanted, outputs(quantized(conv_net, bright, tmp_path / choice, reduce_range=choice)[0], bright))
        for choice in ("auto", "no")
    )
    assert safe > full + 3


def test_a_mask_constant_does_not_destroy_attention(attention: Path, tokens: Any, tmp_path: Path) -> None:
    target, done = quantized(attention, tokens, tmp_path / "out")
    assert done.details["quantized"]["MatMul"] == 4 and done.details["left_float"] == {"MatMul": 2}
    assert done.details["fused"]["MatMulIntegerToFloat"] == 4
    assert sqnr(outputs(attention, tokens), outputs(target, tokens)) > 20


def test_nodes_that_mask_values_pass_through_stay_float(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[n, 16] x, bool[n, 16] keep) => (float[n, 8] y) {
        h = MatMul (x, w1)
        r = Relu (h)
        m = Where (keep, r, never)
        s = MatMul (m, w2)
        y = Clip (s, low)
    }"""
    constants = {
        "w1": weights(16, 16, seed=1),
        "w2": weights(16, 8, seed=2),
        "never": np.float32(-1e9),
        "low": np.float32(-5),
    }
    source = model_of(text, constants, tmp_path / "masked.onnx")
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(40, 16)).astype(np.float32), "keep": rng.random((40, 16)) < 0.9}
    target, done = quantized(source, data, tmp_path / "out")
    assert done.details["special_tensors"] == ["m", "s", "y"]
    assert done.details["left_float"] == {"MatMul": 1}
    assert any("mask values" in note for note in done.notes)
    assert np.isfinite(outputs(target, data)).all()


def test_the_same_source_gives_the_same_bytes_anywhere(conv_net: Path, images: Any, tmp_path: Path) -> None:
    first, _ = quantized(conv_net, images, tmp_path / "here")
    second, _ = quantized(conv_net, images, tmp_path / "there" / "deeper")
    assert first.read_bytes() == second.read_bytes()


def test_an_older_opset_is_raised_only_as_far_as_needed(conv_net: Path, images: Any, tmp_path: Path) -> None:
    def opset(path: Path) -> int:
        return next(item.version for item in onnx.load(path).opset_import if item.domain == "")

    target, _ = quantized(conv_net, images, tmp_path / "new")
    assert opset(target) == 17
    old = model_of(
        """<ir_version: 6, opset_import: ["" : 11]>
        net (float[n, 3, 8, 8] image) => (float[n, 4, 6, 6] y) { y = Conv (image, w) }""",
        {"w": weights(4, 3, 3, 3)},
        tmp_path / "old.onnx",
    )
    target, _ = quantized(old, images, tmp_path / "old")
    assert opset(target) == 13
    assert sqnr(outputs(old, images), outputs(target, images)) > 25


def test_excluded_nodes_stay_float_by_name_or_by_what_they_write(conv_net: Path, images: Any, tmp_path: Path) -> None:
    _, by_tensor = quantized(conv_net, images, tmp_path / "a", exclude=("c2",))
    assert by_tensor.details["left_float"] == {"Conv": 1}
    _, by_pattern = quantized(conv_net, images, tmp_path / "b", exclude=("Conv_*",))
    assert by_pattern.details["left_float"] == {"Conv": 2}
    with pytest.raises(UsageError) as refusal:
        quantized(conv_net, images, tmp_path / "c", exclude=("Conv_O",))
    assert "matches no node" in refusal.value.message and "Conv_" in refusal.value.hint


def test_samples_are_read_batch_by_batch_and_never_kept(conv_net: Path, images: Any, tmp_path: Path) -> None:
    """The same ranges, hence the same file, from batches of any size."""
    one, _ = quantized(conv_net, images, tmp_path / "one", batch=1)
    all_at_once, _ = quantized(conv_net, images, tmp_path / "all", batch=64)
    close = [
        np.allclose(a, b, rtol=1e-5)
        for (name, a), b in zip(arrays(one).items(), arrays(all_at_once).values(), strict=True)
        if name.endswith("_scale")
    ]
    assert close and all(close)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_data_is_refused_with_the_input_named(conv_net: Path, images: Any, tmp_path: Path, value: float) -> None:
    images["image"][3, 0, 0, 0] = value
    with pytest.raises(InputRefused, match="'image'"):
        quantized(conv_net, images, tmp_path / "out")


def test_static_needs_data(conv_net: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--data"):
        Static().quantize(conv_net, tmp_path / "out.onnx", Bench(tmp_path))


def test_a_quantized_model_is_refused(conv_net: Path, images: Any, tmp_path: Path) -> None:
    target, _ = quantized(conv_net, images, tmp_path / "out")
    with pytest.raises(InputRefused, match="quantized already"):
        quantized(target, images, tmp_path / "again")


def test_a_graph_without_weights_has_nothing_to_quantize(tmp_path: Path) -> None:
    source = constant_graph(tmp_path / "sum.onnx")
    with pytest.raises(GateFailed, match="nothing to quantize"):
        quantized(source, {"x": np.ones((4, 4), np.float32)}, tmp_path / "out")


def test_an_activation_that_never_moves_is_no_problem(tmp_path: Path) -> None:
    source = model_of(
        """<ir_version: 8, opset_import: ["" : 17]>
        net (float[n, 8] x) => (float[n, 4] y) { y = Gemm (x, w, b) }""",
        {"w": weights(8, 4), "b": weights(4)},
        tmp_path / "gemm.onnx",
    )
    data = {"x": np.zeros((3, 8), np.float32)}
    target, _ = quantized(source, data, tmp_path / "out")
    assert np.allclose(outputs(source, data), outputs(target, data), atol=1e-2)


@pytest.mark.parametrize("ranges", ["percentile", "mse", "entropy", "auto"])
def test_ranges_are_the_same_in_one_band_and_in_many(
    conv_net: Path, images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranges: str
) -> None:
    one, _ = quantized(conv_net, images, tmp_path / "one", ranges=ranges)
    monkeypatch.setenv("MODELOPS_CACHE", str(tmp_path / "another cache"))
    monkeypatch.setattr("modelops.quantizers._calibration._BAND_BYTES", 1)
    many, _ = quantized(conv_net, images, tmp_path / "many", ranges=ranges)
    assert one.read_bytes() == many.read_bytes()
    assert sqnr(outputs(conv_net, images), outputs(one, images)) > 20


def test_clipping_rules_shrink_a_range_that_one_outlier_stretched(conv_net: Path, images: Any, tmp_path: Path) -> None:
    images["image"][0, 0, 0, 0] = 200.0

    def scale(ranges: str) -> float:
        target, _ = quantized(conv_net, images, tmp_path / ranges, ranges=ranges)
        return float(arrays(target)["image_scale"])

    assert scale("percentile") < scale("mse") < scale("minmax")


@pytest.mark.parametrize("elements", [1, 262144, 262145, 3 * 224 * 224 * 8, 64 * 112 * 112 * 8, 2048 * 7 * 7 * 64])
def test_a_sample_of_a_large_tensor_runs_through_all_of_its_columns(elements: int) -> None:
    step = step_of(elements)
    assert -(-elements // step) <= 262144 and (step == 1) == (elements <= 262144)
    assert all(elements % factor or step % factor for factor in range(2, step + 1))


def test_an_even_sample_finds_ranges_that_are_as_good(
    conv_net: Path, images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = quantized(conv_net, images, tmp_path / "whole", ranges="mse")
    monkeypatch.setenv("MODELOPS_CACHE", str(tmp_path / "another cache"))
    monkeypatch.setattr("modelops.quantizers._calibration._COUNTED", 1000)
    sampled, _ = quantized(conv_net, images, tmp_path / "sampled", ranges="mse")
    assert whole.read_bytes() != sampled.read_bytes()
    exact = outputs(conv_net, images)
    assert sqnr(exact, outputs(sampled, images)) > sqnr(exact, outputs(whole, images)) - 1.5


def test_weights_that_lie_beside_the_model_are_found(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[n, 64] x) => (float[n, 64] y) { h = MatMul (x, w1)  r = Relu (h)  y = MatMul (r, w2) }"""
    inline = model_of(text, {"w1": weights(64, 64), "w2": weights(64, 64, seed=1)}, tmp_path / "inline.onnx")
    beside = tmp_path / "beside" / "model.onnx"
    beside.parent.mkdir()
    onnx.save_model(onnx.load(inline), beside, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    data = {"x": np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)}
    made = []
    for source in (inline, beside):
        scratch = tmp_path / f"scratch-{source.stem}"
        scratch.mkdir()
        made.append(tmp_path / f"{source.stem}.int8.onnx")
        Static().quantize(source, made[-1], Bench(scratch, data))  # type: ignore[arg-type]
    assert np.array_equal(*(outputs(model, data) for model in made))


def test_looking_at_values_runs_no_more_of_the_graph_than_they_need() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[n] x, bool c) => (float[n] z) {
        a = Relu (x)
        inside = Neg (x)
        y = If (c) <then_branch = t () => (float[n] p) { p = Abs (inside) },
                    else_branch = e () => (float[n] q) { q = Identity (a) }>
        late = Exp (y)
        z = Add (late, inside)
    }"""
    graph = onnx.parser.parse_model(text).graph
    graph.output[0].name = "y"
    _without_idle(graph)
    assert [node.op_type for node in graph.node] == ["Relu", "Neg", "If"]
