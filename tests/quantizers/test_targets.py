from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from quantizer_models import Bench, arrays

from modelops.core import machine
from modelops.quantizers import _kernels, _targets
from modelops.quantizers.static import Static


def made(source: Path, data: Any, folder: Path, **options: Any) -> Path:
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    target = folder / "model.onnx"
    Static(**options).quantize(source, target, Bench(scratch, data, 8))
    return target


def largest_weight(model: Path) -> int:
    return max(int(np.abs(a.astype(int)).max()) for a in arrays(model).values() if a.dtype == np.int8 and a.ndim > 1)


def activation_types(model: Path) -> set[str]:
    """The integers that QuantizeLinear nodes make, by their zero points."""
    graph = onnx.load(model).graph
    zeros = {tensor.name: onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name for tensor in graph.initializer}
    return {zeros[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"}


@pytest.mark.parametrize(
    ("options", "levels", "activations"),
    [
        ({"target": "x86-vnni"}, 127, "uint8"),
        ({"target": "x86-avx2"}, 64, "uint8"),
        ({"target": "portable"}, 64, "uint8"),
        ({"target": "arm"}, 127, "int8"),
        ({"target": "gpu-qdq"}, 127, "int8"),
        ({"target": "portable", "reduce_range": "no"}, 127, "uint8"),
        ({"target": "arm", "reduce_range": "yes"}, 64, "int8"),
    ],
)
def test_a_target_decides_signs_and_bits(
    conv_net: Path, images: Any, tmp_path: Path, options: dict[str, str], levels: int, activations: str
) -> None:
    model = made(conv_net, images, tmp_path / "out", **options)
    assert largest_weight(model) == levels
    assert activation_types(model) == {activations}


def test_a_gpu_gets_zero_points_of_zero_and_biases_in_float(conv_net: Path, images: Any, tmp_path: Path) -> None:
    model = made(conv_net, images, tmp_path / "out", target="gpu-qdq")
    stored = arrays(model)
    graph = onnx.load(model).graph
    assert all(not stored[node.input[2]].any() for node in graph.node if node.op_type == "QuantizeLinear")
    assert not any(array.dtype == np.int32 for array in stored.values())


def test_this_machine_is_asked_for_its_kernels_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _kernels.probed.cache_clear()
    found = _kernels.probed()
    assert set(found.gops) == {"uint8 int8", "int8 int8", "uint8 uint8"} and all(v > 0 for v in found.gops.values())
    _kernels.probed.cache_clear()
    monkeypatch.setattr(_kernels, "_probe", lambda: pytest.fail("it was probed again"))
    assert _kernels.probed() == found


@pytest.mark.skipif(machine.has_vnni() or "avx2" not in machine.cpu_features(), reason="AVX2 without VNNI")
def test_avx2_without_vnni_is_seen_to_overflow() -> None:
    assert _kernels.probed().overflows
    assert _targets.resolve("auto").name == "x86-avx2"


@pytest.mark.parametrize(
    ("kernels", "name"),
    [
        ({"signed": 1.0, "overflows": True}, "x86-avx2"),
        ({"signed": 1.0, "overflows": False}, "x86-vnni"),
        ({"signed": 9.0, "overflows": False}, "arm"),
        ({"signed": 9.0, "overflows": True}, "x86-avx2"),
    ],
)
def test_auto_follows_what_the_kernels_did(monkeypatch: pytest.MonkeyPatch, kernels: Any, name: str) -> None:
    gops = {"uint8 int8": 2.0, "int8 int8": 2.0 * kernels["signed"], "uint8 uint8": 1.0}
    monkeypatch.setattr(_kernels, "probed", lambda: _kernels.Kernels(gops, kernels["overflows"], None, None))
    assert _targets.resolve("auto").name == name
    foreign = {"x86-vnni", "x86-avx2", "arm", "gpu-qdq", "openvino"} - {name}
    assert not any(_targets.resolve(other).here for other in foreign)
    assert _targets.resolve("portable").here and _targets.resolve(name).here
