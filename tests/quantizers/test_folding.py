from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantizer_models import model_of, operators, outputs, sqnr, weights

from modelops.graphs import files, runs
from modelops.quantizers import _biases, _folding
from modelops.quantizers._fusions import fused
from modelops.quantizers._sums import apart
from modelops.quantizers._weights import Product, cleaned, products, read


def _product(model: Any, place: str) -> Product:
    """The product whose input is folded to that place."""
    for product in products(model.graph):
        if _folding.place_of(product.node.inputs[0], [product.node]) == place:
            return product
    raise AssertionError(f"no product with {place}")


@pytest.fixture
def fused_encoder(encoder: Path, tmp_path: Path) -> Path:
    place, counts, _ = fused(encoder, tmp_path, set())
    assert counts["attention"] == 1
    return place


@pytest.mark.parametrize("place", ["values", "multiply"])
def test_factors_and_their_inverse_leave_the_graph_as_it_was(
    fused_encoder: Path, states: Any, tmp_path: Path, place: str
) -> None:
    model = read(fused_encoder)
    product = _product(model, place)
    factors = np.exp(np.random.default_rng(0).normal(size=32)).astype(np.float32)
    _folding.replace_input(model.graph, product.node, 1, product.matrix() / factors[:, None])
    assert _folding.fold(model.graph, product.node.inputs[0], [product.node], factors) == place
    files.save(cleaned(model), tmp_path / "folded.onnx")
    before, after = operators(fused_encoder), operators(tmp_path / "folded.onnx")
    assert after.get("Mul", 0) == before.get("Mul", 0) + (place == "multiply")
    assert sqnr(outputs(fused_encoder, states), outputs(tmp_path / "folded.onnx", states)) > 110


def test_columns_taken_out_add_up_to_the_same(fused_encoder: Path, states: Any, tmp_path: Path) -> None:
    model = read(fused_encoder)
    product = _product(model, "multiply")
    columns, matrix = np.array([1, 5, 30]), product.matrix()
    factors = np.ones(32, np.float32)
    factors[columns] = 0
    readers = [product.node]
    value = product.node.inputs[0]
    _folding.replace_input(model.graph, product.node, 1, matrix * factors[:, None])
    _folding.take_out(model.graph, value, readers, columns, [matrix[columns]])
    _folding.multiply(model.graph, value, readers, factors)
    files.save(cleaned(model), tmp_path / "apart.onnx")
    assert sqnr(outputs(fused_encoder, states), outputs(tmp_path / "apart.onnx", states)) > 110


def test_a_product_that_is_an_output_keeps_its_name_when_columns_are_taken_out(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> net (float[n, 16] x) => (float[n, 4] y) { y = MatMul (x, w) }'
    matrix = weights(16, 4)
    source = model_of(text, {"w": matrix}, tmp_path / "m.onnx")
    model = read(source)
    (product,) = products(model.graph)
    value = product.node.inputs[0]
    kept = np.ones(16, np.float32)
    kept[:2] = 0
    _folding.replace_input(model.graph, product.node, 1, matrix * kept[:, None])
    _folding.take_out(model.graph, value, [product.node], np.array([0, 1]), [matrix[:2]])
    files.save(cleaned(model), tmp_path / "apart.onnx")
    data = {"x": np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)}
    with runs.session(tmp_path / "apart.onnx") as session:
        assert [spec.name for spec in session.signature.outputs] == ["y"]
    assert sqnr(outputs(source, data), outputs(tmp_path / "apart.onnx", data)) > 110


def test_every_product_of_a_fused_encoder_has_a_bias_to_correct(
    fused_encoder: Path, states: Any, tmp_path: Path
) -> None:
    model = read(fused_encoder)
    shift = {product.name: weights(product.shape[1], seed=9) for product in products(model.graph)}
    assert len(shift) == 2
    for product in products(model.graph):
        assert _biases.shiftable(product)
        _biases.add(model.graph, product, shift[product.name])
    files.save(cleaned(model), tmp_path / "shifted.onnx")
    other = read(fused_encoder)
    import onnx_ir as ir

    for product in list(products(other.graph)):
        result = product.node.outputs[0]
        uses = list(result.uses())
        constant = _folding.initializer(other.graph, f"{product.name}_shift", shift[product.name])
        node = ir.node("Add", [result, constant], name=f"{product.name}_shifted")
        other.graph.insert_after(product.node, node)
        for use in uses:
            use.node.replace_input_with(use.idx, node.outputs[0])
    files.save(other, tmp_path / "added.onnx")
    assert sqnr(outputs(tmp_path / "added.onnx", states), outputs(tmp_path / "shifted.onnx", states)) > 100


def test_a_sum_and_its_normalization_run_apart_and_give_the_same(
    fused_encoder: Path, states: Any, tmp_path: Path
) -> None:
    model = read(fused_encoder)
    assert apart(model) == 1
    files.save(model, tmp_path / "apart.onnx")
    assert "SkipLayerNormalization" not in operators(tmp_path / "apart.onnx")
    runs.session(tmp_path / "apart.onnx", optimized=tmp_path / "optimized.onnx").close()
    assert "SkipLayerNormalization" not in operators(tmp_path / "optimized.onnx")
    assert sqnr(outputs(fused_encoder, states), outputs(tmp_path / "apart.onnx", states)) > 110


def test_values_that_are_kept_for_the_next_token_are_not_scaled(fused_encoder: Path) -> None:
    import onnx_ir as ir

    model = read(fused_encoder)
    product = _product(model, "values")
    attention = product.node.inputs[0].producer()
    assert attention is not None
    attention.resize_outputs(3)
    attention.outputs[2].name, attention.outputs[2].type = "present", ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.append(attention.outputs[2])
    assert _folding.place_of(product.node.inputs[0], [product.node]) == "multiply"
