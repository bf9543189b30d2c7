from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from quantizer_models import Bench, arrays, constant_graph, model_of, outputs, sqnr, weights

from modelops.errors import GateFailed
from modelops.quantizers.float16 import Float16


def quantized(source: Path, data: Any = None, **options: Any) -> tuple[Path, Any]:
    scratch = source.parent / f"scratch-{len(list(source.parent.iterdir()))}"
    scratch.mkdir()
    return scratch / "model.onnx", Float16(**options).quantize(source, scratch / "model.onnx", Bench(scratch, data))


def test_weights_are_halved_and_the_signature_is_kept(conv_net: Path, images: Any) -> None:
    from modelops.graphs.describe import signature

    target, _ = quantized(conv_net, images)
    assert signature(target) == signature(conv_net)
    assert {array.dtype.name for array in arrays(target).values() if array.size > 16} == {"float16"}
    assert sqnr(outputs(conv_net, images), outputs(target, images)) > 50


def test_masks_stay_masks_and_nothing_turns_nan(attention: Path, tokens: Any) -> None:
    target, done = quantized(attention, tokens)
    assert done.details["masks_clipped"] == 1 and done.details["overflowing"] == []
    found = outputs(target, tokens)
    assert np.isfinite(found).all() and sqnr(outputs(attention, tokens), found) > 50


@pytest.fixture
def overflowing(tmp_path: Path) -> Path:
    return model_of(
        """<ir_version: 8, opset_import: ["" : 17]>
        net (float[n, 16] x) => (float[n, 4] y) {
            a = MatMul (x, wa)
            b = Mul (a, a)
            c = Sqrt (b)
            y = MatMul (c, wy)
        }""",
        {"wa": weights(16, 16, scale=200.0), "wy": weights(16, 4, scale=0.001)},
        tmp_path / "square.onnx",
    )


def test_nodes_that_overflow_on_the_data_stay_float32(overflowing: Path) -> None:
    data = {"x": np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)}
    target, done = quantized(overflowing, data)
    assert done.details["left_float"] == {"Mul": 1, "Sqrt": 1}
    assert any("stay float32" in note for note in done.notes)
    assert sqnr(outputs(overflowing, data), outputs(target, data)) > 45


def test_without_data_it_is_said_that_activations_were_not_looked_at(overflowing: Path) -> None:
    _, done = quantized(overflowing)
    assert done.details["left_float"] == {}
    assert any("may overflow" in note for note in done.notes)


def test_excluded_nodes_stay_float32(conv_net: Path, images: Any) -> None:
    target, done = quantized(conv_net, images, exclude=("logits",))
    assert done.details["left_float"] == {"Gemm": 1}
    assert any(tensor.data_type == onnx.TensorProto.FLOAT for tensor in onnx.load(target).graph.initializer)


def test_the_same_source_gives_the_same_bytes(conv_net: Path, images: Any) -> None:
    assert quantized(conv_net, images)[0].read_bytes() == quantized(conv_net, images)[0].read_bytes()


def test_a_graph_without_weights_has_nothing_to_quantize(tmp_path: Path) -> None:
    with pytest.raises(GateFailed, match="nothing to quantize"):
        quantized(constant_graph(tmp_path / "sum.onnx"))
