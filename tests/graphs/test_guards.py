"""A guard goes where its mask is provably finite, and only there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from modelops.graphs import files, guards

LEVELS = 60


def written(path: Path, hidden: np.ndarray, levels: int = 1) -> Path:
    """Softmax with a guard; its mask is chosen from ``hidden`` and zero, as often as there are levels."""
    kind = helper.np_dtype_to_tensor_dtype(hidden.dtype)
    nodes = [
        helper.make_node("MatMul", ["a", "b"], ["scores"]),
        helper.make_node("Where", ["c", "zero", "hid"], ["m0"]),
    ]
    nodes += [helper.make_node("Where", ["c", f"m{n}", f"m{n}"], [f"m{n + 1}"]) for n in range(levels)]
    nodes += [
        helper.make_node("Add", ["scores", f"m{levels}"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["share"], axis=-1),
        helper.make_node("IsNaN", ["share"], ["nan"]),
        helper.make_node("Where", ["nan", "zero", "share"], ["sure"]),
        helper.make_node("Identity", ["sure"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape in (("a", [1, 4]), ("b", [4, 4]))]
    inputs.append(helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [4]))
    weights = [numpy_helper.from_array(hidden, "hid"), numpy_helper.from_array(np.zeros_like(hidden), "zero")]
    output = helper.make_tensor_value_info("y", kind, [1, 4])
    graph = helper.make_graph(nodes, "net", inputs, [output], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


def test_a_mask_of_many_layers_is_looked_through_once(tmp_path: Path) -> None:
    """One value read twice by each of 60 nodes: by every way there, that would be 2^60 steps."""
    model = files.load(written(tmp_path / "deep.onnx", np.asarray(-1e9, np.float32), LEVELS))
    assert guards.drop_dead(model) == 1


@pytest.mark.parametrize(("hidden", "dropped"), [(-65504.0, 0), (-10000.0, 1)])
def test_in_half_precision_a_mask_leaves_room_for_the_scores(tmp_path: Path, hidden: float, dropped: int) -> None:
    place = written(tmp_path / "half.onnx", np.asarray(hidden, np.float16))
    model = files.load(place)
    assert guards.drop_dead(model) == dropped
    files.save(model, tmp_path / "after.onnx")
    feed = {"a": np.full((1, 4), -10, np.float16), "b": np.full((4, 4), 2, np.float16), "c": np.zeros(4, bool)}
    before, after = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feed)[0]
        for path in (place, tmp_path / "after.onnx")
    )
    assert np.isfinite(before).all() and np.array_equal(before, after)
