"""Models above 2 GB: only the engines that fit are run, the others are named, and memory stays within the limit."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from modelops.graphs import files, runs
from modelops.graphs.describe import summary
from modelops.pipeline import Surroundings, run_stage
from modelops.stages import _opset
from modelops.stages.simplify import Simplify

_LIMIT = 16 << 30


@pytest.fixture
def script() -> ModuleType:
    place = Path(__file__).parents[2] / "benchmarks" / "large_model.py"
    spec = importlib.util.spec_from_file_location("large_model", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_model_above_2_gb_goes_through_the_engines_that_fit(tmp_path: Path, script: ModuleType) -> None:
    source = tmp_path / "large.onnx"
    size = script.write_model(source, 2.5)
    stage = Simplify.parse({"engine": "auto", "opset": 21})
    outcome = run_stage(stage, str(source), tmp_path / "out", surroundings=Surroundings(memory_limit=_LIMIT))
    found = {one["engine"]: one for one in outcome.report.details["attempts"]}
    print(outcome.seconds, outcome.peak_memory_bytes / size, found)
    assert outcome.exit_code == 0
    assert "would need about" in found["onnxslim"]["reason"] and "would need about" in found["onnxsim"]["reason"]
    assert all(found[name].get("seconds") for name in ("onnxscript", "onnxruntime"))
    assert outcome.peak_memory_bytes < _LIMIT
    assert summary(tmp_path / "out" / "model.onnx")["opsets"][""] == 21


def test_large_weights_stay_out_of_the_converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).normal(size=(8, 200)).astype(np.float32)
    bias = np.arange(200, dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["m"]),
            helper.make_node("Add", ["m", "b"], ["h"]),
            helper.make_node("ReduceSum", ["h"], ["y"], axes=[1]),
        ],
        "old",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )
    plain, old, new = tmp_path / "plain.onnx", tmp_path / "old.onnx", tmp_path / "new.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7), plain)
    files.save(files.load(plain), old, external_above=1)
    assert (tmp_path / "old.onnx.data").is_file()
    monkeypatch.setattr(_opset, "_LARGE", 0)
    monkeypatch.setattr(_opset, "_ASIDE", 1000)
    proto, aside = _opset._without_large_weights(old)
    assert list(aside) == ["w"] and [tensor.name for tensor in proto.graph.initializer] == ["b"]
    assert not proto.graph.initializer[0].external_data
    assert _opset.convert(str(old), str(new), 17)["before"] == 11
    made = onnx.load(new)
    assert [value.name for value in made.graph.input] == ["x"] and made.opset_import[0].version == 17
    feed = {"x": np.ones((3, 8), np.float32)}
    with runs.session(old) as before, runs.session(new) as after:
        np.testing.assert_array_equal(runs.run(before, feed)["y"], runs.run(after, feed)["y"])
