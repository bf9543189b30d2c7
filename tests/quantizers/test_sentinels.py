from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from quantizer_models import Bench, model_of, operators, outputs, sqnr, weights

from modelops.errors import GateFailed
from modelops.quantizers import _preparation
from modelops.quantizers.static import Static


def padded(tmp_path: Path, never: float, last: str) -> tuple[Path, Any]:
    """A net on rows of which some are padding, marked by a sentinel; ``last`` says what becomes of their results."""
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    net (float[n, t, 16] x, bool[n, t, 1] keep) => (float[n, t, 8] y) {{
        e = Exp (x)
        m = Where (keep, e, never)
        h = MatMul (m, w1)
        r = Relu (h)
        o = MatMul (r, w2)
        {last}
    }}"""
    constants = {
        "w1": weights(16, 32, seed=1),
        "w2": weights(32, 8, seed=2),
        "never": np.float32(never),
        "zero": np.float32(0),
    }
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(40, 5, 16)).astype(np.float32), "keep": rng.random((40, 5, 1)) < 0.8}
    return model_of(text, constants, tmp_path / "padded.onnx"), data


def quantized(source: Path, data: Any, folder: Path, **options: Any) -> tuple[Path, Any]:
    folder.mkdir(parents=True)
    target = folder / "model.onnx"
    return target, Static(**options).quantize(source, target, Bench(folder, data))  # type: ignore[arg-type]


@pytest.mark.parametrize("ranges", ["minmax", "mse"])
@pytest.mark.parametrize("never", [-1e9, -3.4028235e38, -np.inf])
def test_sentinels_that_no_output_shows_are_clipped_and_their_nodes_quantized(
    tmp_path: Path, never: float, ranges: str
) -> None:
    source, data = padded(tmp_path, never, "y = Where (keep, o, zero)")
    target, done = quantized(source, data, tmp_path / "out", ranges=ranges)
    assert "m" in done.details["clipped_tensors"] and done.details["left_float"] == {}
    assert operators(target).get("MatMul") == 2 and "Clip" not in operators(target)
    assert any("changed no output" in note for note in done.notes)
    exact, found = outputs(source, data), outputs(target, data)
    assert np.isfinite(found).all() and sqnr(exact, found) > 30


def test_sentinels_that_reach_an_output_stay_as_they_are(tmp_path: Path) -> None:
    source, data = padded(tmp_path, -1e9, "y = Clip (o, zero)")
    with pytest.raises(GateFailed, match="mask values"):
        quantized(source, data, tmp_path / "out")


def test_a_softmax_gets_the_margin_that_it_needs(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[n, 16] x, bool[n, 16] keep) => (float[n, 8] y) {
        h = MatMul (x, w1)
        m = Where (keep, h, never)
        s = MatMul (m, same)
        p = Softmax <axis = -1> (s)
        y = MatMul (p, w2)
    }"""
    constants = {"w1": weights(16, 16, seed=1), "w2": weights(16, 8, seed=2), "never": np.float32(-1e9)}
    constants["same"] = np.eye(16, dtype=np.float32)
    source = model_of(text, constants, tmp_path / "softmax.onnx")
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(40, 16)).astype(np.float32), "keep": rng.random((40, 16)) < 0.8}
    _, done = quantized(source, data, tmp_path / "out")
    assert done.details["clipped_tensors"] == ["m"] and done.details["left_float"] == {}


def test_weights_outlast_a_trial_that_wrote_them_beside_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    monkeypatch.setattr(_preparation, "_EXTERNAL_ABOVE", 0)
    _preparation.save(model, tmp_path / "plain.onnx")
    assert (tmp_path / "plain.onnx.data").is_file()
    np.testing.assert_array_equal(numpy_helper.to_array(model.graph.initializer[0]), weight)
