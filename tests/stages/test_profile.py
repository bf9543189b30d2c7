"""Profiles: which operators take the time, and what the runtime could not do well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelops.backends import REGISTRY
from modelops.errors import UsageError
from modelops.stages import _peak
from modelops.stages._profile import operators, profiled, sentences, work
from modelops.stages._runner import Contender

FEED = {"x": np.ones((1, 8), np.float32)}


def node(op: str, microseconds: float, provider: str = "CPUExecutionProvider") -> dict[str, Any]:
    return {
        "name": op.lower(),
        "op": op,
        "provider": provider,
        "microseconds": microseconds,
        "macs": 1_000_000 if op == "MatMul" else 0,
        "moved_bytes": 1000,
        "int8": False,
    }


def test_every_node_of_the_model_has_a_time(perceptron: Path, tmp_path: Path) -> None:
    backend = REGISTRY.load("onnxruntime-cpu").parse({"threads": 1, "optimization": "none"})

    nodes = profiled(Contender("a", backend, perceptron), FEED, tmp_path)

    assert sorted(one["op"] for one in nodes) == ["Add", "MatMul", "MatMul", "Relu"]
    assert all(one["microseconds"] >= 0 for one in nodes)


def test_a_backend_without_a_profiler_is_refused(perceptron: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no profiler"):
        profiled(Contender("a", REGISTRY.load("null").parse({}), perceptron), FEED, tmp_path)


def test_operators_add_up_to_all_of_the_time() -> None:
    rows = operators([node("MatMul", 60), node("Relu", 10), node("MatMul", 30)])

    assert [(row["op"], row["nodes"], row["share"]) for row in rows] == [("MatMul", 2, 0.9), ("Relu", 1, 0.1)]


def test_the_share_of_the_peak_is_the_least_time_over_the_time() -> None:
    peak = {"float32_gflops": 100.0, "int8_gops": 400.0, "bandwidth_gb_per_s": 10.0}

    whole, slowest, *_ = work([node("MatMul", 40), node("Relu", 10)], peak)

    assert whole["gops"] == pytest.approx(2e6 / 50e-6 * 1e-9)
    assert whole["share_of_peak"] == pytest.approx(20 / 50)  # 2 million operations take 20 µs at the peak
    assert slowest["share_of_peak"] == pytest.approx(20 / 40)
    assert work([node("MatMul", 40)], None)[0]["share_of_peak"] is None
    assert work([{**node("MatMul", 40), "macs": None}], peak)[0]["gops"] is None


def test_the_peak_of_the_machine_is_measured_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_peak, "_SECONDS", 0.05)
    monkeypatch.setattr(_peak, "_FLOATS", 1 << 16)
    monkeypatch.setattr(_peak, "_SIDE", 128)

    found = _peak.measure()

    assert all(found[name] > 0 for name in ("float32_gflops", "int8_gops", "bandwidth_gb_per_s"))
    assert _peak.remembered() == found
    assert found["bfloat16_gflops"] is None or found["bfloat16_gflops"] > 0
    for kind in ("_float32", "_int8", "_bandwidth"):  # as on a machine that is busy now
        monkeypatch.setattr(_peak, kind, lambda folder, *_: 1e-9)
    assert {**_peak.measure(), "busy": None} == {**found, "busy": None}


def test_what_was_not_fused_and_what_went_back_to_the_cpu_is_said() -> None:
    cuda = "CUDAExecutionProvider"
    on_device = [node("MatMul", 50, cuda), node("DequantizeLinear", 20, cuda), node("MemcpyToHost", 5, cuda)]

    text = "\n".join(sentences([*on_device, node("NonZero", 25)]))

    assert "MatMul 50%" in text
    assert "1 QuantizeLinear and DequantizeLinear nodes were not fused: 20%" in text
    assert "handed back to the CPU, 25% of the time: NonZero (1)" in text
    assert "1 copies between CPU and device" in text
