from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from quantizer_models import Bench, arrays, constant_graph, model_of, operators, outputs, sqnr, weights

from modelops.errors import GateFailed, InputRefused, UsageError
from modelops.quantizers import _qdq
from modelops.quantizers.dynamic import Dynamic


def quantized(source: Path, target: Path, **options: Any) -> tuple[Path, Any]:
    return target, Dynamic(**options).quantize(source, target, Bench(target.parent))


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    """Products in all forms: MatMul, Gemm with a transposed weight and a bias, one weight used twice, and a Conv."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[n, 2, 32] x) => (float[n, 2, 24] y, float[k, 24] z) {
        c = Conv <kernel_shape = [1]> (x, wc)
        a = MatMul (c, wa)
        b = MatMul (a, wb)
        y = MatMul (b, wy)
        rows = Reshape (a, flat)
        g = Gemm <transB = 1> (rows, wb, bias)
        z = MatMul (g, wy)
    }"""
    constants = {
        "wc": weights(2, 2, 1),
        "wa": weights(32, 16, seed=1),
        "wb": weights(16, 16, seed=2),
        "wy": weights(16, 24, seed=3),
        "bias": weights(16, seed=4),
        "flat": np.array([-1, 16], dtype=np.int64),
    }
    return model_of(text, constants, tmp_path / "layers.onnx")


def test_products_become_integer_and_stay_close(layers: Path, tmp_path: Path) -> None:
    target, done = quantized(layers, tmp_path / "out.onnx")
    feed = {"x": np.random.default_rng(3).normal(size=(9, 2, 32)).astype(np.float32)}
    assert operators(target)["MatMulInteger"] == 5
    assert done.details["quantized"] == {"products": 5, "tables": 0}
    assert sqnr(outputs(layers, feed), outputs(target, feed)) > 28


def test_convolutions_stay_float(layers: Path, tmp_path: Path) -> None:
    target, done = quantized(layers, tmp_path / "out.onnx")
    assert operators(target)["Conv"] == 1 and "ConvInteger" not in operators(target)
    assert done.details["left_float"] == {"Conv": 1}


def test_what_is_shared_is_quantized_once(layers: Path, attention: Path, tmp_path: Path) -> None:
    target, _ = quantized(layers, tmp_path / "out.onnx")
    stored = [array for array in arrays(target).values() if array.dtype == np.int8 and array.ndim == 2]
    assert len(stored) == 4  # wa, wb, wb transposed for the Gemm, wy
    target, _ = quantized(attention, tmp_path / "attention.onnx.new")
    assert operators(target)["DynamicQuantizeLinear"] == 2  # one for query, key and value, one for what they give


def test_each_output_channel_has_its_scale(tmp_path: Path) -> None:
    uneven = weights(32, 8) * np.logspace(-3, 0, 8, dtype=np.float32)
    source = model_of(
        """<ir_version: 8, opset_import: ["" : 17]>
        net (float[n, 32] x) => (float[n, 8] y) { y = MatMul (x, w) }""",
        {"w": uneven},
        tmp_path / "uneven.onnx",
    )
    feed = {"x": np.random.default_rng(3).normal(size=(64, 32)).astype(np.float32)}
    wanted = outputs(source, feed)[:, 0]
    fine, _ = quantized(source, tmp_path / "channel.onnx")
    coarse, _ = quantized(source, tmp_path / "tensor.onnx", per_channel=False)
    assert sqnr(wanted, outputs(fine, feed)[:, 0]) > 30 > 10 > sqnr(wanted, outputs(coarse, feed)[:, 0])


def test_the_runtime_fuses_the_pattern(attention: Path, tmp_path: Path) -> None:
    target, _ = quantized(attention, tmp_path / "out.onnx")
    fused = _qdq.kernels(target)["fused"]
    assert sum(fused.get(name, 0) for name in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")) == 4
    assert "MatMulInteger" not in fused


def test_embedding_rows_are_gathered_as_integers_each_with_its_scale(
    attention: Path, tokens: Any, tmp_path: Path
) -> None:
    target, done = quantized(attention, tmp_path / "out.onnx", op_types=("Gather",))
    assert done.details["quantized"] == {"products": 0, "tables": 1}
    table, stored = arrays(attention)["table"], arrays(target)
    assert "table" not in stored and stored["table_rows_int8"].dtype == np.int8
    error = np.abs(stored["table_rows_int8"] * stored["table_row_scales"] - table)
    assert (error <= np.abs(table).max(axis=1, keepdims=True) / 254 + 1e-7).all()
    assert sqnr(outputs(attention, tokens), outputs(target, tokens)) > 35


def test_the_same_source_gives_the_same_bytes(layers: Path, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    one, _ = quantized(layers, tmp_path / "one.onnx")
    two, _ = quantized(layers, tmp_path / "deep" / "two.onnx")
    assert one.read_bytes() == two.read_bytes()


def test_inputs_and_outputs_keep_names_types_and_shapes(layers: Path, tmp_path: Path) -> None:
    from modelops.graphs.describe import signature

    target, _ = quantized(layers, tmp_path / "out.onnx")
    assert signature(target) == signature(layers)
    onnx.checker.check_model(str(target), full_check=True)


def test_weights_listed_as_inputs_are_weights_all_the_same(tmp_path: Path) -> None:
    source = model_of(
        """<ir_version: 8, opset_import: ["" : 17]>
        net (float[n, 32] x, float[32, 8] w) => (float[n, 8] y) { y = MatMul (x, w) }""",
        {"w": weights(32, 8)},
        tmp_path / "listed.onnx",
    )
    target, _ = quantized(source, tmp_path / "out.onnx")
    assert [value.name for value in onnx.load(target).graph.input] == ["x"]


def test_an_unknown_operator_is_refused_with_the_nearest(layers: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refusal:
        quantized(layers, tmp_path / "out.onnx", op_types=("Matmul",))
    assert refusal.value.hint == "did you mean MatMul?"


def test_a_quantized_model_is_refused(layers: Path, tmp_path: Path) -> None:
    target, _ = quantized(layers, tmp_path / "out.onnx")
    with pytest.raises(InputRefused, match="quantized already"):
        quantized(target, tmp_path / "again.onnx")


def test_a_graph_without_weights_has_nothing_to_quantize(tmp_path: Path) -> None:
    source = constant_graph(tmp_path / "sum.onnx")
    with pytest.raises(GateFailed, match="nothing to quantize"):
        quantized(source, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_transpose_that_turns_nothing_is_not_taken_for_one_that_does(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[n, 32] x) => (float[n, 32] y) { same = Transpose <perm = [0, 1]> (w)  y = MatMul (x, same) }"""
    source = model_of(text, {"w": weights(32, 32)}, tmp_path / "same.onnx")
    with pytest.raises(GateFailed, match="nothing to quantize"):
        quantized(source, tmp_path / "out.onnx")


def test_weights_that_only_their_own_transpose_reads_are_improved_and_measured(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[n, 64] x) => (float[n, 48] y) { turned = Transpose (w)  y = MatMul (x, turned) }"""
    source = model_of(text, {"w": weights(48, 64)}, tmp_path / "turned.onnx")
    x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    x[:, :2] *= 50
    (tmp_path / "scratch").mkdir()
    target = tmp_path / "out.onnx"
    done = Dynamic(explain=True).quantize(source, target, Bench(tmp_path / "scratch", {"x": x}))  # type: ignore[arg-type]
    line = done.details["improvements"][0]
    assert line["after_db"] > line["before_db"] + 6
    found = sqnr(outputs(source, {"x": x}), outputs(target, {"x": x}))
    assert found > line["before_db"] + 3
    assert done.details["sensitivity"][0]["error_db"] == pytest.approx(done.metrics[-1].value, abs=1)


@pytest.mark.parametrize("fused", [False, True])
def test_a_head_that_shares_its_weights_with_the_embedding_is_integer_too(tmp_path: Path, fused: bool) -> None:
    """GPT-2 reads one table twice: rows of it for tokens, and all of it, transposed, for logits."""
    head = (
        "y = com.microsoft.FusedMatMul <transB = 1> (h, table)"
        if fused
        else "turned = Transpose <perm = [1, 0]> (table)\n        y = MatMul (h, turned)"
    )
    text = f"""<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    net (int64[n, t] ids) => (float[n, t, 160] y) {{
        rows = Gather (table, ids)
        h = MatMul (rows, w)
        {head}
    }}"""
    constants = {"table": weights(160, 32, seed=1), "w": weights(32, 32, seed=2)}
    source = model_of(text, constants, tmp_path / "tied.onnx")
    (tmp_path / "scratch").mkdir()
    data = {"ids": np.random.default_rng(3).integers(0, 160, size=(32, 8))}
    target = tmp_path / "out.onnx"
    done = Dynamic().quantize(source, target, Bench(tmp_path / "scratch", data))  # type: ignore[arg-type]
    assert operators(target)["MatMulInteger"] == 2 and not {"Transpose", "FusedMatMul"} & set(operators(target))
    assert all(array.size < 160 * 32 for array in arrays(target).values() if array.dtype == np.float32)
    assert done.details["quantized"] == {"products": 2, "tables": 1}
    assert sqnr(outputs(source, data), outputs(target, data)) > 30
