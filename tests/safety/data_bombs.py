"""Models that look harmless: only the values of their inputs make them ask for memory, or for time."""

from __future__ import annotations

import hostile_models as hostile
import numpy as np
from onnx import NodeProto, TensorProto, helper


def from_its_data(*nodes: NodeProto) -> bytes:
    """A model whose cost only its input tells: ``big`` is a number of some 10^10, as any sample gives."""
    first = [
        helper.make_node("Abs", ["x"], ["size"]),
        helper.make_node("ReduceSum", ["size"], ["sum"], keepdims=0),
        helper.make_node("Add", ["sum", "one"], ["more"]),
        helper.make_node("Mul", ["more", "factor"], ["product"]),
        helper.make_node("Cast", ["product"], ["big"], to=TensorProto.INT64),
    ]
    numbers = [hostile.constant("one", 1, np.float32), hostile.constant("factor", 1e10, np.float32)]
    wide = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    return hostile.model([*first, *nodes], numbers, inputs=[wide]).SerializeToString()


def allocation() -> bytes:
    """A model that asks for tens of gigabytes when it runs."""
    return from_its_data(
        helper.make_node("Constant", [], ["axis"], value=hostile.constant("", [0])),
        helper.make_node("Unsqueeze", ["big", "axis"], ["shape"]),
        helper.make_node("Expand", ["one", "shape"], ["v"]),
        helper.make_node("ReduceSum", ["v"], ["y"], keepdims=0),
    )


def endless() -> bytes:
    """A model that runs for minutes."""
    turns = hostile.loop(0, [helper.make_node("Add", ["a", "one"], ["b"])], start="one")
    turns.input[0] = "big"
    return from_its_data(turns, helper.make_node("Identity", ["v"], ["y"]))
