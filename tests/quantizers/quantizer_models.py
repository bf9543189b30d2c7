"""What the tests of quantizers share: graphs in text form, a workbench over arrays, and looks into files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx import parser as onnx_parser


class Bench:
    """A workbench over arrays in memory."""

    def __init__(self, scratch: Path, data: Mapping[str, Any] | None = None, batch: int = 8) -> None:
        self.scratch, self.data, self.batch = scratch, data, batch

    @property
    def has_data(self) -> bool:
        return self.data is not None

    def batches(self) -> Iterator[dict[str, Any]]:
        assert self.data is not None
        count = len(next(iter(self.data.values())))
        for start in range(0, count, self.batch):
            yield {name: array[start : start + self.batch] for name, array in self.data.items()}


def model_of(text: str, weights: Mapping[str, Any], path: Path) -> Path:
    """A model in onnx's text form, with these initializers, written to ``path``."""
    model = onnx_parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items())
    onnx.save(model, path)
    return path


def weights(*shape: int, seed: int = 0, scale: float = 0.3) -> Any:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def outputs(model: Path, feed: Mapping[str, Any]) -> Any:
    """The first output, by onnxruntime on one thread."""
    from modelops.graphs import runs

    with runs.session(model) as session:
        return next(iter(runs.run(session, feed).values()))


def sqnr(reference: Any, actual: Any) -> float:
    noise = float(((reference - actual) ** 2).sum())
    return 10 * np.log10(float((reference**2).sum()) / noise) if noise else np.inf


def operators(model: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in onnx.load(model, load_external_data=False).graph.node:
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def arrays(model: Path) -> dict[str, Any]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(model).graph.initializer}


def constant_graph(path: Path) -> Path:
    """A model that only adds its input to itself."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "sum",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path
