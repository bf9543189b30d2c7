"""A model's signature and summary are told without its weights."""

from __future__ import annotations

from pathlib import Path

import hostile_models as build
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from modelops.core.tensors import Signature, TensorSpec
from modelops.errors import InputRefused
from modelops.graphs.describe import ANY_SHAPE, signature, summary


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_signature_has_numpy_dtypes_and_named_dimensions(tmp_path: Path) -> None:
    info = helper.make_tensor_value_info
    inputs = [
        info("ids", TensorProto.INT64, ["batch", None]),
        info("mask", TensorProto.BOOL, ["batch", -1, 3]),
        info("half", TensorProto.BFLOAT16, []),
        info("text", TensorProto.STRING, None),
        info("weight", TensorProto.FLOAT, [2]),
        info("clash", TensorProto.FLOAT16, ["ids_dim1"]),
    ]
    of_maps = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(1, None))
    outputs = [
        info("y", TensorProto.FLOAT8E4M3FN, [None]),
        helper.make_value_info("z", helper.make_sequence_type_proto(of_maps)),
    ]
    model = build.model([], [build.constant("weight", [1, 2], np.float32)], inputs=inputs, outputs=outputs)
    found = signature(saved(model, tmp_path))
    assert found == Signature(
        inputs=(
            TensorSpec("ids", "int64", ("batch", "ids_dim1_")),
            TensorSpec("mask", "bool", ("batch", "mask_dim1", 3)),
            TensorSpec("half", "bfloat16", ()),
            TensorSpec("text", "object", ANY_SHAPE),
            TensorSpec("clash", "float16", ("ids_dim1",)),
        ),
        outputs=(
            TensorSpec("y", "float8_e4m3fn", ("y_dim0",)),
            TensorSpec("z", "sequence(map(int64,float32))", ANY_SHAPE),
        ),
    )


def test_summary_counts_nodes_and_weights_everywhere(tmp_path: Path) -> None:
    model = build.in_subgraph(build.constant("t", np.ones((3, 5)), np.float32))
    model.functions.append(build.function("f", helper.make_node("Relu", ["a"], ["b"])))
    model.graph.node.append(build.own("f", "x", "unused"))
    model.graph.node.append(helper.make_node("QuickGelu", ["x"], ["unused2"], domain="com.microsoft"))
    four_bit = onnx.TensorProto(name="q", dims=[5], data_type=TensorProto.INT4, raw_data=b"123")
    model.graph.node.append(helper.make_node("Constant", [], ["unused3"], value=four_bit))
    model.producer_name, model.producer_version = "tests", "1"
    found = summary(saved(model, tmp_path))
    assert found == {
        "ir_version": 10,
        "opsets": {"": 21, "own": 1},
        "producer": "tests 1",
        "nodes": 9,
        "operators": {
            "Add": 1,
            "Constant": 1,
            "Identity": 2,
            "If": 1,
            "ReduceSum": 1,
            "Relu": 1,
            "com.microsoft:QuickGelu": 1,
            "own:f": 1,
        },
        "parameters": 36,
        "weight_bytes": {"bool": 1, "float32": 120, "int4": 3},
        "custom_domains": ["com.microsoft"],
        "functions": 1,
        "external_data": False,
    }


def test_external_weights_are_counted_without_being_there(tmp_path: Path) -> None:
    model = build.in_initializer(build.external("t", "gone", shape=(10**6, 10**6)))
    found = summary(saved(model, tmp_path))
    assert found["external_data"]
    assert found["parameters"] == 10**12
    assert found["weight_bytes"] == {"float32": 4 * 10**12}


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a model")
    for function in (signature, summary):
        with pytest.raises(InputRefused, match=r"text\.onnx"):
            function(tmp_path / "text.onnx")
