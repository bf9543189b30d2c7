"""Attention and Gelu in the forms that run fastest compute what they did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper
from quantizer_models import operators, outputs

from modelops.graphs import files
from modelops.quantizers._attention import approximated, standard
from modelops.quantizers._weights import cleaned, read

HEADS = """
    masks = Where (keep, zero, least)
    all = MatMul (x, w)
    q, k, v = Split <axis = -1> (all, sizes)
    y = com.microsoft.MultiHeadAttention <num_heads = 2, scale = 0.3> (q, k, v, b, , masks)
"""
APART = """
    masks = Where (keep, zero, least)
    q = MatMul (x, wq)
    k = MatMul (x, wk)
    v = MatMul (x, wv)
    y = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v, b, , masks)
"""
GIVEN = """
    all = MatMul (x, w)
    q, k, v = Split <axis = -1> (all, sizes)
    y = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v, b, , mask)
"""


def model(tmp_path: Path, body: str, opset: int = 20) -> Path:
    rng = np.random.default_rng(0)
    mask = "float[n, 1, t, t] mask" if "mask)" in body else "bool[n, 1, t, t] keep"
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
        f"net (float[n, t, 16] x, {mask}) => (float[n, t, 16] y) {{ {body} }}"
    )
    constants: dict[str, Any] = {
        "w": rng.normal(size=(16, 48)),
        **{name: rng.normal(size=(16, 16)) for name in ("wq", "wk", "wv")},
        "b": rng.normal(size=48),
        "zero": np.zeros(()),
        "least": np.full((), -3.4028235e38),
    }
    tensors = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in constants.items()]
    tensors.append(numpy_helper.from_array(np.array([16, 16, 16]), "sizes"))
    proto.graph.initializer.extend(tensor for tensor in tensors if f"{tensor.name}" in body)
    onnx.save(onnx.shape_inference.infer_shapes(proto), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def feed() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    keep = rng.random((3, 1, 5, 5)) > 0.4
    keep[0] = False  # whole rows that nothing is seen of
    return {"x": rng.normal(size=(3, 5, 16)).astype(np.float32), "keep": keep}


@pytest.mark.parametrize("body", [HEADS, APART], ids=["packed", "apart"])
def test_attention_of_the_standard_gives_what_that_of_onnxruntime_gave(tmp_path: Path, body: str) -> None:
    source, target = model(tmp_path, body), tmp_path / "target.onnx"
    changed = read(source)
    assert standard(changed) == 1
    files.save(cleaned(changed), target)
    assert operators(target)["Attention"] == 1 and "MultiHeadAttention" not in operators(target)
    assert np.abs(outputs(source, feed()) - outputs(target, feed())).max() < 1e-5
    assert {item.domain: item.version for item in onnx.load(target).opset_import} == {"": 23}


def test_a_mask_that_may_hide_rows_with_infinities_and_old_opsets_are_left_alone(tmp_path: Path) -> None:
    assert standard(read(model(tmp_path, GIVEN))) == 0
    assert standard(read(model(tmp_path, HEADS.replace("-1", "2"), opset=17))) == 0


def test_gelu_by_tanh_is_off_by_no_more_than_is_said(tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["" : 20, "com.microsoft" : 1]>
        net (float[n, 4] x) => (float[n, 4] y) {
            a = com.microsoft.BiasGelu (x, b)
            y = Gelu (a)
        }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(numpy_helper.from_array(np.array([0, -1, 1, 2], np.float32), "b"))
    source, target = tmp_path / "model.onnx", tmp_path / "target.onnx"
    onnx.save(proto, source)
    changed = read(source)
    assert approximated(changed) == 2
    files.save(changed, target)
    assert operators(target) == {"Add": 1, "Gelu": 2}
    x = np.linspace(-8, 8, 4000, dtype=np.float32).reshape(-1, 4)
    assert 0 < np.abs(outputs(source, {"x": x}) - outputs(target, {"x": x})).max() < 2 * 0.0005
