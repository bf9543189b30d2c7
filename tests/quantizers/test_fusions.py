from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from quantizer_models import Bench, operators, outputs, sqnr

from modelops.quantizers import Quantizer, _fusions
from modelops.quantizers.dynamic import Dynamic
from modelops.quantizers.static import Static
from modelops.quantizers.weights import Weights


def quantized(method: Quantizer, source: Path, data: Any = None) -> tuple[Path, Any]:
    scratch = source.parent / f"scratch-{len(list(source.parent.iterdir()))}"
    scratch.mkdir()
    return scratch / "model.onnx", method.quantize(source, scratch / "model.onnx", Bench(scratch, data))


@pytest.mark.parametrize("method", [Dynamic(), Static(), Weights(block_size=16)], ids=lambda method: method.name)
def test_attention_is_fused_and_its_products_are_quantized(encoder: Path, states: Any, method: Quantizer) -> None:
    target, done = quantized(method, encoder, states)
    assert done.details["fusions"]["attention"] == done.details["fusions"]["skip_layer_normalization"] == 1
    assert operators(target)["MultiHeadAttention"] == operators(target)["LayerNormalization"] == 1
    assert "Softmax" not in operators(target) and done.details["left_float"] == {}
    assert sum(done.details["quantized"].values()) == 2
    assert sqnr(outputs(encoder, states), outputs(target, states)) > 25
    assert any("other runtimes" in note for note in done.notes)


def test_without_fusing_standard_operators_are_enough(encoder: Path, states: Any) -> None:
    target, done = quantized(Dynamic(fuse=False), encoder)
    assert {node.domain for node in onnx.load(target).graph.node} == {""}
    assert done.details["fusions"] == {} and not done.notes
    assert sqnr(outputs(encoder, states), outputs(target, states)) > 25


def test_the_same_source_gives_the_same_bytes_fused(encoder: Path) -> None:
    one, two = (quantized(Dynamic(), encoder)[0] for _ in range(2))
    assert one.read_bytes() == two.read_bytes()


def test_a_graph_without_attention_is_left_as_it_is(conv_net: Path, images: Any) -> None:
    _, done = quantized(Static(), conv_net, images)
    assert done.details["fusions"] == {}


def test_a_fused_graph_that_differs_is_not_used(encoder: Path, states: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fuse = _fusions._fuse

    def wrong(model: Any) -> dict[str, int]:
        counts = fuse(model)
        import onnx_ir as ir

        value = model.graph.initializers["gamma"]
        value.const_value = ir.tensor(1.01 * value.const_value.numpy(), name="gamma")
        return counts

    monkeypatch.setattr(_fusions, "_fuse", wrong)
    target, done = quantized(Dynamic(), encoder)
    assert done.details["fusions"] == {} and "differs from the source" in done.notes[0]
    assert sqnr(outputs(encoder, states), outputs(target, states)) > 25


def test_a_rewriter_that_fails_costs_the_fusion_alone(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any) -> dict[str, int]:
        raise IndexError("list index out of range")

    monkeypatch.setattr(_fusions, "_fuse", broken)
    target, done = quantized(Dynamic(), encoder)
    assert "IndexError" in done.notes[0] and operators(target)["MatMulInteger"] == 4


def test_a_node_that_the_user_excluded_is_not_swallowed(encoder: Path) -> None:
    _, done = quantized(Dynamic(exclude=("k0",)), encoder)
    assert done.details["fusions"] == {} and "--exclude" in done.notes[0]
    assert done.details["quantized"]["products"] == 3
    _, done = quantized(Dynamic(exclude=("o0",)), encoder)
    assert done.details["fusions"] and done.details["quantized"]["products"] == 1


def test_masked_rows_stay_finite(encoder: Path, states: Any) -> None:
    states["mask"][0] = -3.4028235e38
    target, _ = quantized(Dynamic(), encoder)
    assert np.isfinite(outputs(target, states)).all()
