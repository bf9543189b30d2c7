"""computation: equal for one graph under other names, different wherever another number could come out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from modelops.graphs.sameness import computation


def net(scalar: str = "w") -> ModelProto:
    """y = w · x - Relu(x), in a branch of If where the other gives x itself."""
    value = helper.make_tensor_value_info
    then = helper.make_graph(
        [helper.make_node("Mul", [scalar, "x"], ["m"]), helper.make_node("Sub", ["m", "r"], ["t"])],
        "then",
        [],
        [value("t", TensorProto.FLOAT, ["n", 3])],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["e"])], "else", [], [value("e", TensorProto.FLOAT, ["n", 3])]
    )
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="relu"),
        helper.make_node("LeakyRelu", ["x"], ["l"], alpha=0.1),
        helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other),
        helper.make_node("Add", ["y", "l"], ["z"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [value("x", TensorProto.FLOAT, ["n", 3]), value("c", TensorProto.BOOL, [])],
        [value("z", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(np.array([1, 2, 3], np.float32), scalar)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def found(model: ModelProto, folder: Path) -> str:
    onnx.save(model, folder / "model.onnx")
    return computation(folder / "model.onnx")


def _weight(model: ModelProto) -> None:
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.array([1, 2, 4], np.float32), "w"))


def _attribute(model: ModelProto) -> None:
    model.graph.node[1].attribute[0].f = 0.2


def _wiring(model: ModelProto) -> None:
    then = model.graph.node[2].attribute[1].g if model.graph.node[2].attribute[0].name[0] == "e" else None
    graph = then or model.graph.node[2].attribute[0].g
    graph.node[1].input[:] = ["r", "m"]


def _dimension(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def _opset(model: ModelProto) -> None:
    model.opset_import[0].version = 19


def _dead(model: ModelProto) -> None:
    model.graph.node.add(op_type="Neg", input=["x"], output=["unused"])


@pytest.mark.parametrize("change", [_weight, _attribute, _wiring, _dimension, _opset, _dead])
def test_another_computation_has_another_digest(change: Callable[[ModelProto], None], tmp_path: Path) -> None:
    model = net()
    before = found(model, tmp_path)
    change(model)
    assert before and found(model, tmp_path) not in ("", before)


def test_names_order_remarks_and_where_weights_lie_do_not_matter(tmp_path: Path) -> None:
    model, other = net(), net("renamed")
    other.graph.node.insert(0, other.graph.node.pop(1))
    other.graph.node[0].doc_string, other.producer_name = "remark", "somebody"
    other.graph.value_info.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, ["n", 3]))
    (tmp_path / "other").mkdir()
    place = tmp_path / "other" / "model.onnx"
    onnx.save(other, place, save_as_external_data=True, location="data", size_threshold=0)
    assert found(model, tmp_path) == computation(place) != ""


def test_the_counter_of_a_loop_is_not_that_of_the_loop_around_it(tmp_path: Path) -> None:
    def looped(read: str) -> ModelProto:
        text = f"""<ir_version: 10, opset_import: ["" : 18]>
        net (int64 n, bool go, int64 x) => (int64 z) {{
            z = Loop (n, go, x) <body = outer (int64 i, bool c, int64 a) => (bool c1, int64 b) {{
                c1 = Identity (c)
                b = Loop (n, go, a) <body = inner (int64 j, bool d, int64 e) => (bool d1, int64 f) {{
                    d1 = Identity (d)
                    f = Add (e, {read})
                }}>
            }}>
        }}"""
        return onnx.parser.parse_model(text)

    assert found(looped("i"), tmp_path) != found(looped("j"), tmp_path)


@pytest.mark.parametrize("what", ["random", "undefined"])
def test_a_graph_that_can_not_be_told_apart_has_none(what: str, tmp_path: Path) -> None:
    model = net()
    if what == "random":
        model.graph.node.add(op_type="RandomNormalLike", input=["x"], output=["unused"])
    else:
        model.graph.node[3].input[1] = "nowhere"
    assert found(model, tmp_path) == ""
