from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from modelops.stages._naming import publish_names

CLASHING = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[N] modelops_input_0) => (float[N] modelops_output_0) {
    embedding = Neg (modelops_input_0)
    x = Abs (embedding)
    modelops_output_0 = Neg (x)
}
"""
TWICE = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[N] modelops_input_0) => (float[N] y, float[N] y, float[N] modelops_input_0) {
    y = Neg (modelops_input_0)
}
"""


def _published(text, inputs, outputs):
    model = ir.from_proto(onnx.parser.parse_model(text))
    publish_names(model, inputs, outputs)
    return ir.to_proto(model)


def _run(proto, feed):
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feed)


def test_a_value_inside_gives_way_to_the_name_of_an_input_or_output():
    proto = _published(CLASHING, ["x"], ["embedding"])
    onnx.checker.check_model(proto)
    assert [value.name for value in (*proto.graph.input, *proto.graph.output)] == ["x", "embedding"]
    (found,) = _run(proto, {"x": np.array([1.0, -2.0], np.float32)})
    np.testing.assert_array_equal(found, [-1.0, -2.0])


def test_an_output_given_twice_and_one_that_is_an_input_become_values_of_their_own():
    proto = _published(TWICE, ["x"], ["first", "second", "same"])
    onnx.checker.check_model(proto)
    assert [value.name for value in proto.graph.output] == ["first", "second", "same"]
    first, second, same = _run(proto, {"x": np.array([3.0], np.float32)})
    assert first == second == -3 and same == 3


@pytest.mark.parametrize("number", [0, 1])
def test_names_do_not_depend_on_what_the_exporter_called_them(number):
    texts = (CLASHING, CLASHING.replace("modelops_input_0", "a").replace("modelops_output_0", "b"))
    proto = _published(texts[number], ["a"], ["out"])
    assert (proto.graph.input[0].name, proto.graph.output[0].name) == ("a", "out")
