"""Random graphs of everything that is followed: cutting always equals zeroing."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prunable_models import Bench, Build, feed_for, outputs

from modelops.errors import StageFailed
from modelops.pruners import REGISTRY, ZEROED

SIZES = (2, 4, 6, 8)


@st.composite
def networks(draw: st.DrawFn) -> onnx.ModelProto:
    """A graph that grows by picking earlier values and passing them on; every value is a stack of 4 × 4 images."""
    b = Build(seed=draw(st.integers(0, 1000)))
    first = draw(st.sampled_from(SIZES))
    values = [(b.conv(b.input("batch", 3, 4, 4), 3, first, 1), first)]
    for _ in range(draw(st.integers(1, 9))):
        step = draw(st.sampled_from(STEPS))
        found = step(b, draw, values)
        if found is not None:
            values.append(found)
    unread = [pair for pair in values if not any(pair[0] in node.input for node in b.nodes)]
    last = b.node("Concat", *(name for name, _ in unread), axis=1)
    return b.model(b.head(last, sum(channels for _, channels in unread), 3))


def pick(draw: Any, values: list[tuple[str, int]]) -> tuple[str, int]:
    found: tuple[str, int] = draw(st.sampled_from(values))
    return found


def convolve(b: Build, draw: Any, values: list[tuple[str, int]]) -> tuple[str, int]:
    name, channels = pick(draw, values)
    out = draw(st.sampled_from(SIZES))
    group = 2 if draw(st.booleans()) and channels % 2 == 0 else 1
    return b.conv(name, channels, out, 3, group), out


def filter_each(b: Build, draw: Any, values: list[tuple[str, int]]) -> tuple[str, int]:
    name, channels = pick(draw, values)
    return b.conv(name, channels, channels, 3, channels), channels


def activate(b: Build, draw: Any, values: list[tuple[str, int]]) -> tuple[str, int]:
    name, channels = pick(draw, values)
    return b.node(draw(st.sampled_from(["Relu", "Sigmoid", "Tanh", "Elu", "HardSwish"])), name), channels


def normalize(b: Build, draw: Any, values: list[tuple[str, int]]) -> tuple[str, int]:
    name, channels = pick(draw, values)
    return b.norm(name, channels), channels


def combine(b: Build, draw: Any, values: list[tuple[str, int]]) -> tuple[str, int] | None:
    name, channels = pick(draw, values)
    others = [other for other, count in values if count == channels]
    return b.node(draw(st.sampled_from(["Add", "Mul", "Max", "Sub"])), name, draw(st.sampled_from(others))), channels


def join(b: Build, draw: Any, values: list[tuple[str, int]]) -> tuple[str, int]:
    (one, few), (other, more) = pick(draw, values), pick(draw, values)
    return b.node("Concat", one, other, axis=1), few + more


def halve(b: Build, draw: Any, values: list[tuple[str, int]]) -> tuple[str, int] | None:
    name, channels = pick(draw, values)
    if channels == 1:
        return None
    half = channels // 2
    parts = b.node("Split", name, b.const(np.array([half, channels - half])), outputs=2, axis=1)
    return (parts[0], half) if draw(st.booleans()) else (parts[1], channels - half)


def shuffle(b: Build, draw: Any, values: list[tuple[str, int]]) -> tuple[str, int] | None:
    name, channels = pick(draw, values)
    if channels % 2:
        return None
    split = b.node("Reshape", name, b.const(np.array([0, 2, channels // 2, 4, 4])))
    turned = b.node("Transpose", split, perm=[0, 2, 1, 3, 4])
    return b.node("Reshape", turned, b.const(np.array([0, channels, 4, 4]))), channels


def gate(b: Build, draw: Any, values: list[tuple[str, int]]) -> tuple[str, int]:
    name, channels = pick(draw, values)
    weights = b.node("Sigmoid", b.conv(b.node("GlobalAveragePool", name), channels, channels, 1))
    return b.node("Mul", name, weights), channels


STEPS = (convolve, filter_each, activate, normalize, combine, join, halve, shuffle, gate)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(networks(), st.sampled_from([0.3, 0.5, 0.8]))
def test_cut_equals_zeroed_on_random_graphs(model: onnx.ModelProto, share: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, pruned = Path(folder) / "source.onnx", Path(folder) / "pruned.onnx"
        onnx.save(model, source)
        bench = Bench(source, Path(folder) / "scratch")
        pruner = REGISTRY.load("channels").parse({"round_to": 1, "channels": share})
        try:
            pruner.prune(source, pruned, bench)  # type: ignore[arg-type]
        except StageFailed as error:
            assert "nothing to prune: no group" in error.message
            return
        feed = feed_for(pruned, rows=3)
        (wanted,), (found,) = outputs(bench.scratch / ZEROED, feed), outputs(pruned, feed)
        assert np.abs(wanted - found).max() <= 1e-5 * max(np.abs(wanted).max(), 1e-3)
