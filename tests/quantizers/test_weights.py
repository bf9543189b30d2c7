from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantizer_models import Bench, arrays, constant_graph, model_of, outputs, sqnr, weights

from modelops.errors import GateFailed, UsageError
from modelops.quantizers.weights import Weights, blocked


def quantized(source: Path, target: Path, **options: Any) -> tuple[Path, Any]:
    return target, Weights(**options).quantize(source, target, Bench(target.parent))


def product(path: Path, inner: int, outer: int) -> Path:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    net (float[n, {inner}] x) => (float[n, {outer}] y) {{ y = Gemm <transB = 1> (x, w, b) }}"""
    return model_of(text, {"w": weights(outer, inner), "b": weights(outer, seed=1)}, path)


def restored(matrix: Any, bits: int, block_size: int) -> Any:
    """The K×N floats that the stored integers stand for, worked out element by element."""
    parts = blocked(matrix, bits, block_size)
    integers, scales = parts[0], parts[1]
    inner, outer = matrix.shape
    result = np.empty((inner, outer))
    for n in range(outer):
        for k in range(inner):
            block, place = divmod(k, block_size)
            if bits == 8:
                value, zero = int(integers[n, block, place]), 128
            else:
                value = int(integers[n, block, place // 2]) >> (4 * (place % 2)) & 15
                zero = int(parts[2][n, block // 2]) >> (4 * (block % 2)) & 15
            result[k, n] = (value - zero) * scales[n, block]
    return result


@pytest.mark.parametrize(("bits", "steps"), [(8, 254), (4, 15)])
@pytest.mark.parametrize("inner", [64, 50, 7])
def test_no_weight_moves_by_more_than_one_step(bits: int, steps: int, inner: int) -> None:
    matrix = weights(inner, 5)
    found = restored(matrix, bits, 16)
    reach = np.ptp(np.concatenate([matrix, np.zeros((1, 5))]), axis=0) if bits == 4 else 2 * np.abs(matrix).max(axis=0)
    assert (np.abs(found - matrix) <= 1.001 * reach / steps).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("inner", [64, 50])
def test_the_runtime_reads_the_blocks_as_they_were_meant(tmp_path: Path, bits: int, inner: int) -> None:
    source = product(tmp_path / "gemm.onnx", inner, 24)
    target, _ = quantized(source, tmp_path / "out.onnx", bits=bits, block_size=16)
    x = np.random.default_rng(0).normal(size=(40, inner)).astype(np.float32)
    stored = arrays(source)
    meant = x @ restored(stored["w"].T, bits, 16) + stored["b"]
    assert sqnr(meant, outputs(target, {"x": x})) > 38


def test_eight_bits_lose_less_than_four_and_weigh_more(attention: Path, tokens: Any, tmp_path: Path) -> None:
    wanted = outputs(attention, tokens)
    eight, done = quantized(attention, tmp_path / "8.onnx")
    four, _ = quantized(attention, tmp_path / "4.onnx", bits=4)
    assert done.details["quantized"] == {"products": 4, "tables": 1}
    assert sqnr(wanted, outputs(eight, tokens)) > 30 > sqnr(wanted, outputs(four, tokens)) > 10
    assert four.stat().st_size < eight.stat().st_size < 0.5 * attention.stat().st_size


def test_the_same_source_gives_the_same_bytes(attention: Path, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    one, _ = quantized(attention, tmp_path / "one.onnx")
    two, _ = quantized(attention, tmp_path / "deep" / "two.onnx")
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("options", [{"bits": 5}, {"block_size": 48}, {"block_size": 8}])
def test_what_the_kernel_can_not_read_is_refused_at_once(options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        Weights(**options)


def test_a_graph_without_weights_has_nothing_to_quantize(tmp_path: Path) -> None:
    source = constant_graph(tmp_path / "sum.onnx")
    with pytest.raises(GateFailed, match="nothing to quantize"):
        quantized(source, tmp_path / "out.onnx")
