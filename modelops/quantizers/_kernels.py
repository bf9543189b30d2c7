"""What the integer kernels of this machine can do, found by running them: signs, overflow, from which size they pay.

One thread, tiny graphs, a second or two in all; remembered by CPU and version of onnxruntime.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from modelops.core import cache, machine

if TYPE_CHECKING:
    import onnx

_KIND = "kernels"
_ROWS, _SIZE = 64, 384
_WIDTHS = (16, 32, 64, 128, 256, 512)
_REPEATS, _BLOCK = 7, 5
# Signed activations must be this much faster before they are chosen: both are right, and noise should not decide.
_CLEARLY = 1.25


@dataclass(frozen=True)
class Kernels:
    """``gops`` by the dtypes of activations and weights; ``overflows`` where uint8 times int8 is not exact.

    ``matmul_pays`` and ``conv_pays`` are the multiplications from which int8 is faster than float, None where it never
    was.
    """

    gops: dict[str, float]
    overflows: bool
    matmul_pays: int | None
    conv_pays: int | None

    @property
    def signed(self) -> bool:
        """Whether int8 activations are the faster ones here."""
        return self.gops["int8 int8"] > _CLEARLY * self.gops["uint8 int8"]


@functools.cache
def probed() -> Kernels:
    """What this machine's kernels can do."""
    key = f"{fingerprint()} onnxruntime {machine.installed('onnxruntime')}"
    found = cache.get(_KIND, key)
    fields = {field.name for field in dataclasses.fields(Kernels)}
    if isinstance(found, dict) and set(found) == fields:
        return Kernels(**found)
    kernels = _probe()
    cache.put(_KIND, key, dataclasses.asdict(kernels))
    return kernels


def fingerprint() -> str:
    """The CPU that timings belong to: its name, its features, and how many of its cores this process may use."""
    return f"{machine.cpu_model()} {' '.join(machine.cpu_features())} {machine.usable_cpus()}"


def _probe() -> Kernels:
    import numpy as np

    rng = np.random.default_rng(0)
    work = 2e-9 * _ROWS * _SIZE * _SIZE
    gops = {}
    for dtypes in ("uint8 int8", "int8 int8", "uint8 uint8"):
        x, w = (_integers(rng, dtype, shape) for dtype, shape in zip(dtypes.split(), _SHAPES, strict=True))
        gops[dtypes] = work / _seconds(_integer_product(x, w), {"x": x})
    return Kernels(gops, _overflows(), _pays(_matmul, _WIDTHS), _pays(_conv, _WIDTHS[:-2]))


_SHAPES = ((_ROWS, _SIZE), (_SIZE, _SIZE))


def _integers(rng: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    import numpy as np

    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max + 1, size=shape, dtype=dtype)


def _overflows() -> bool:
    """Whether the largest products of uint8 and int8 come out wrong."""
    import numpy as np

    x = np.full((4, 64), 255, dtype=np.uint8)
    w = np.full((64, 64), 127, dtype=np.int8)
    found = _opened(_integer_product(x, w)).run(None, {"x": x})[0]
    return not np.array_equal(found, x.astype(np.int64) @ w.astype(np.int64))


def _pays(build: Any, widths: tuple[int, ...]) -> int | None:
    """The multiplications of the narrowest layer from which on every wider one is faster in int8 than in float."""
    least = None
    for width in reversed(widths):
        multiplications, feed, floating, integer = build(width)
        if _seconds(integer, feed) >= _seconds(floating, feed):
            break
        least = multiplications
    return least


def _matmul(width: int) -> tuple[int, dict[str, Any], onnx.ModelProto, onnx.ModelProto]:
    """A product of 32 rows, in float and with activations that are quantized on the way."""
    import numpy as np
    from onnx import helper

    rows = 32
    rng = np.random.default_rng(width)
    x = rng.normal(size=(rows, width)).astype(np.float32)
    weights = {"w": rng.normal(size=(width, width)).astype(np.float32)}
    floating = _model([helper.make_node("MatMul", ["x", "w"], ["y"])], weights, {"x": x}, "y", 1)
    integers = {
        "w": _integers(rng, "int8", (width, width)) // 2,
        "ws": np.full(width, 0.01, np.float32),
        "wz": np.zeros(width, np.int8),
    }
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z", "wz"], ["i"]),
        helper.make_node("Cast", ["i"], ["c"], to=1),
        helper.make_node("Mul", ["s", "ws"], ["f"]),
        helper.make_node("Mul", ["c", "f"], ["y"]),
    ]
    return rows * width * width, {"x": x}, floating, _model(nodes, integers, {"x": x}, "y", 1)


def _conv(width: int) -> tuple[int, dict[str, Any], onnx.ModelProto, onnx.ModelProto]:
    """A convolution of 3 by 3 on 8 by 8 pixels, in float and between conversions from and to float."""
    import numpy as np
    from onnx import helper

    side = 8
    rng = np.random.default_rng(width)
    x = rng.normal(size=(1, width, side, side)).astype(np.float32)
    shape = (width, width, 3, 3)
    pads = [1, 1, 1, 1]
    weights = {"w": rng.normal(size=shape).astype(np.float32)}
    floating = _model([helper.make_node("Conv", ["x", "w"], ["y"], pads=pads)], weights, {"x": x}, "y", 1)
    integers = {
        "w": _integers(rng, "int8", shape) // 2,
        "s": np.float32(0.05),
        "z": np.uint8(128),
        "ws": np.full(width, 0.01, np.float32),
        "wz": np.zeros(width, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("QLinearConv", ["q", "s", "z", "w", "ws", "wz", "s", "z"], ["i"], pads=pads),
        helper.make_node("DequantizeLinear", ["i", "s", "z"], ["y"]),
    ]
    multiplications = width * width * 9 * side * side
    return multiplications, {"x": x}, floating, _model(nodes, integers, {"x": x}, "y", 1)


def _integer_product(x: Any, w: Any) -> onnx.ModelProto:
    from onnx import helper

    return _model([helper.make_node("MatMulInteger", ["x", "w"], ["y"])], {"w": w}, {"x": x}, "y", 6)


def _model(nodes: list[Any], weights: dict[str, Any], feed: dict[str, Any], output: str, dtype: int) -> onnx.ModelProto:
    import numpy as np
    from onnx import helper, numpy_helper

    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feed.items()
    ]
    graph = helper.make_graph(
        nodes,
        "probe",
        inputs,
        [helper.make_tensor_value_info(output, dtype, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _opened(model: onnx.ModelProto) -> Any:
    """A session on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _seconds(model: onnx.ModelProto, feed: dict[str, Any]) -> float:
    """The median time of one inference, of several short blocks."""
    session = _opened(model)
    for _ in range(3):
        session.run(None, feed)
    found = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        for _ in range(_BLOCK):
            session.run(None, feed)
        found.append((time.perf_counter() - started) / _BLOCK)
    return float(median(found))
