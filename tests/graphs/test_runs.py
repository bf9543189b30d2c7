"""Runs take what fits the signature, and failures say which node, or which input, is to blame."""

from __future__ import annotations

import os
from pathlib import Path

import hostile_models as build
import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from modelops.errors import InputRefused, StageFailed
from modelops.graphs.runs import run, session


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def adder(dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    info = helper.make_tensor_value_info
    inputs = [info("left", dtype, ["batch", 3]), info("right", dtype, ["batch", 3])]
    node = helper.make_node("Add", ["left", "right"], ["y"], name="sum")
    return build.model([node], inputs=inputs, outputs=[info("y", dtype, ["batch", 3])])


@pytest.mark.parametrize("optimization", ["disabled", "basic", "extended", "all"])
def test_outputs_come_back_by_name(optimization: str, tmp_path: Path) -> None:
    with session(saved(adder(), tmp_path), threads=2, optimization=optimization) as opened:  # type: ignore[arg-type]
        ones = np.ones((2, 3), np.float32)
        assert run(opened, {"left": ones, "right": ones})["y"].tolist() == [[2, 2, 2]] * 2
        assert opened.signature.inputs[0].shape == ("batch", 3)


def test_misfitting_feeds_are_refused_in_one_sentence(tmp_path: Path) -> None:
    good = np.ones((2, 3), np.float32)
    cases: list[tuple[dict[str, np.ndarray], str, str]] = [
        ({"left": good}, "right:float32[batch,3] is missing", "left"),
        ({"left": good, "right": good, "rihgt": good}, "no input 'rihgt'", "'right'"),
        ({"left": good, "right": good.astype(np.float64)}, "'right' is float64", "float32[batch,3]"),
        ({"left": good, "right": good[0]}, "'right' has 1 dimensions [3]", "[batch,3]"),
        ({"left": good, "right": good[:, :2]}, "'right' has size 2 on axis 1", "[batch,3]"),
    ]
    with session(saved(adder(), tmp_path)) as opened:
        for feed, message, hint in cases:
            with pytest.raises(InputRefused) as caught:
                run(opened, feed)
            assert message in caught.value.message
            assert hint in caught.value.hint


def test_failing_run_names_node_and_operator(tmp_path: Path) -> None:
    with session(saved(adder(), tmp_path)) as opened, pytest.raises(StageFailed, match=r"at node 'sum' \(Add\)"):
        run(opened, {"left": np.ones((2, 3), np.float32), "right": np.ones((5, 3), np.float32)})


def test_unknown_operator_is_a_failure_of_the_tool(tmp_path: Path) -> None:
    model = adder()
    model.graph.node[0].op_type = "Nonsense"
    with pytest.raises(StageFailed, match=r"at node 'sum' \(Nonsense\)"):
        session(saved(model, tmp_path))


def test_hostile_file_is_not_opened_and_a_malformed_one_is_refused(tmp_path: Path) -> None:
    path = saved(build.BOMBS["doubling functions"](), tmp_path)
    with pytest.raises(InputRefused, match="once inlined"):
        session(path)
    path.write_bytes(b"\x08\x01garbage")
    with pytest.raises(InputRefused, match="onnxruntime"):
        session(path, trusted=True)


def test_model_can_not_configure_its_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_LOAD_CONFIG_FROM_MODEL", "1")
    model = adder()
    model.metadata_props.add(key="ort_config", value='{"session_options": {"intra_op_num_threads": 7}}')
    with session(saved(model, tmp_path)) as opened:
        assert opened.handle.get_session_options().intra_op_num_threads == 1
    assert "ORT_LOAD_CONFIG_FROM_MODEL" not in os.environ


@pytest.mark.parametrize("dtype", [TensorProto.BFLOAT16, TensorProto.FLOAT8E5M2, TensorProto.STRING])
def test_types_that_numpy_lacks_cross_the_border(dtype: int, tmp_path: Path) -> None:
    info = helper.make_tensor_value_info
    node = helper.make_node("Identity", ["x"], ["y"])
    path = saved(build.model([node], inputs=[info("x", dtype, ["n"])], outputs=[info("y", dtype, ["n"])]), tmp_path)
    numpy_dtype = {16: ml_dtypes.bfloat16, 19: ml_dtypes.float8_e5m2}.get(dtype, object)
    values = np.array(["a", "ü"] if dtype == TensorProto.STRING else [1.5, -2], dtype=numpy_dtype)
    with session(path) as opened:
        result = run(opened, {"x": values})["y"]
    assert result.dtype == values.dtype
    assert result.tolist() == values.tolist()


def test_optimized_graph_is_saved(tmp_path: Path) -> None:
    with session(saved(adder(), tmp_path), optimization="basic", optimized=tmp_path / "out.onnx"):
        assert len(onnx.load(tmp_path / "out.onnx").graph.node) == 1
