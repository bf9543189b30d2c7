"""A model above 2 GB through quantize: its weights never lie in one protobuf, and seldom in memory twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from under_watch import watch

WIDTH, LAYERS = 8192, 9


@pytest.fixture
def large(tmp_path: Path) -> int:
    """Layers with weights beside the graph, in large.onnx; gives the bytes of both."""
    layer = 4 * WIDTH * WIDTH
    block = np.random.default_rng(0).standard_normal((WIDTH, WIDTH), dtype=np.float32) / np.float32(WIDTH**0.5)
    nodes, weights, last = [], [], "x"
    with (tmp_path / "weights.bin").open("wb") as file:
        for number in range(LAYERS):
            file.write(np.roll(block, 97 * number, axis=number % 2).tobytes())
            weight = TensorProto(name=f"w{number}", dims=[WIDTH, WIDTH], data_type=TensorProto.FLOAT)
            weight.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "weights.bin"), ("offset", number * layer), ("length", layer)):
                weight.external_data.add(key=key, value=str(value))
            weights.append(weight)
            nodes.append(helper.make_node("MatMul", [last, f"w{number}"], [f"h{number}"]))
            last = "y" if number == LAYERS - 1 else f"t{number}"
            nodes.append(helper.make_node("Tanh", [f"h{number}"], [last]))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in ("x", "y")]
    model = helper.make_model(
        helper.make_graph(nodes, "layers", ends[:1], ends[1:], weights),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    (tmp_path / "large.onnx").write_bytes(model.SerializeToString())
    return LAYERS * layer


@pytest.mark.slow
@pytest.mark.parametrize("method", ["weights", "dynamic"])
def test_a_model_above_two_gigabytes_is_quantized_in_three_times_its_size(
    large: int, tmp_path: Path, method: str
) -> None:
    assert large > 2 << 30
    words = ["quantize", "large.onnx", "out", "--method", method, "--speed-budget", "5s", "--if-slower", "publish"]
    seen = watch(words, tmp_path, longest=3600)
    print(f"{method}: {seen.seconds:.0f} s, {seen.peak_bytes / 2**30:.2f} GiB, {seen.peak_bytes / large:.2f} times")
    assert seen.code == 0, seen.output
    assert seen.peak_bytes < 3 * large
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("model.onnx*"))
    assert written < 0.3 * large
    operators = {
        node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.node
    }
    assert operators & {"MatMulNBits", "MatMulInteger"} and "MatMul" not in operators
