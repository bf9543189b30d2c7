"""What this machine can do at most: matrix products in float32, bfloat16 and int8, and memory bandwidth.

Measured once with onnxruntime's own kernels, since they are what a model can hope for, and bfloat16, which it has none
for, with OpenVINO's where the CPU has instructions for it. Remembered in the cache by what identifies the machine.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.core import cache, machine
from modelops.core.progress import tracked
from modelops.stages import _preflight

if TYPE_CHECKING:
    from modelops.backends import Backend

_SIDE = 1024
_FLOATS = 16 << 20
_SECONDS = 1.0


def remembered() -> dict[str, Any] | None:
    """The peaks that were measured on this machine with as many threads, or None."""
    found = cache.get("peaks", _fingerprint())
    return found if isinstance(found, dict) else None


def measure() -> dict[str, Any]:
    """Measure the peaks now and remember the best ever seen: billions of operations in a second (a product and a sum
    are two), and billions of bytes in a second; None for what could not be measured.

    Other work on the machine only ever lowers what is found: a later measurement may raise a peak, and never lowers it.
    """
    kinds: dict[str, Callable[[Path], float | None]] = {
        "float32_gflops": _float32,
        "bfloat16_gflops": _bfloat16,
        "int8_gops": _int8,
        "bandwidth_gb_per_s": _bandwidth,
    }
    found: dict[str, Any] = {"threads": machine.usable_cpus(), "busy": _preflight.look()["busy"]}
    with tempfile.TemporaryDirectory(prefix="modelops-peak-") as folder:
        for name in tracked("measuring the machine's peak", list(kinds), len(kinds)):
            before = (remembered() or {}).get(name)
            found[name] = max(filter(None, (kinds[name](Path(folder)), before)), default=None)
    cache.put("peaks", _fingerprint(), found)
    return found


def _fingerprint() -> str:
    versions = machine.versions(["onnxruntime", "onnxruntime-gpu"])
    return f"{machine.cpu_model()} {machine.cpu_features()} {machine.usable_cpus()} threads {versions}"


def _float32(folder: Path, backend: Backend | None = None) -> float | None:
    import numpy as np

    rng = np.random.default_rng(0)
    weight = rng.standard_normal((_SIDE, _SIDE)).astype(np.float32)
    feed = {"a": rng.standard_normal((_SIDE, _SIDE)).astype(np.float32)}
    return 2 * _SIDE**3 / _best("MatMul", feed, {"b": weight}, folder, backend) * 1e-9


def _bfloat16(folder: Path) -> float | None:
    """None where the CPU has no instructions for it, or OpenVINO is not here."""
    from modelops.backends import REGISTRY

    if not {"avx512_bf16", "amx_bf16"} & set(machine.cpu_features()):
        return None
    backend = REGISTRY.load("openvino-cpu").parse({"precision": "bf16"})
    return None if backend.missing() else _float32(folder, backend)


def _int8(folder: Path) -> float | None:
    """Unsigned by signed, which is what x86's dot products take."""
    import numpy as np

    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (_SIDE, _SIDE), dtype=np.int8)
    feed = {"a": rng.integers(0, 256, (_SIDE, _SIDE), dtype=np.uint8)}
    return 2 * _SIDE**3 / _best("MatMulInteger", feed, {"b": weight}, folder) * 1e-9


def _bandwidth(folder: Path) -> float | None:
    """Two arrays read and one written, each far larger than any cache."""
    import numpy as np

    feed = {"a": np.ones(_FLOATS, np.float32), "b": np.ones(_FLOATS, np.float32)}
    return 3 * 4 * _FLOATS / _best("Add", feed, {}, folder) * 1e-9


def _best(
    op: str, feed: dict[str, Any], weights: dict[str, Any], folder: Path, backend: Backend | None = None
) -> float:
    """The shortest time in seconds of a model of this one node, over about a second."""
    import onnx
    from onnx import helper, numpy_helper

    from modelops.backends import REGISTRY

    def value(name: str, array: Any) -> Any:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)

    graph = helper.make_graph(
        [helper.make_node(op, [*feed, *weights], ["y"])],
        op,
        [value(name, array) for name, array in feed.items()],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    path = folder / f"{op}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    best = float("inf")
    with (backend or REGISTRY.load("onnxruntime-cpu").parse({})).open(path) as session:
        call = session.prepare(feed)
        call.once()
        end = time.perf_counter() + _SECONDS
        while best == float("inf") or time.perf_counter() < end:
            started = time.perf_counter()
            call.once()
            best = min(best, time.perf_counter() - started)
    return best
