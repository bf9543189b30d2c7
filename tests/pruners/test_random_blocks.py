"""Random stacks of a transformer's blocks: cutting always equals zeroing."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prunable_models import Bench, Build, attend, attend_by_operator, feed_for, outputs

from modelops.errors import StageFailed
from modelops.pruners import REGISTRY, ZEROED

HEADS, SIZES = (2, 3, 4), (2, 4)


@st.composite
def stacks(draw: st.DrawFn) -> onnx.ModelProto:
    """Blocks one upon the other, each with what comes before it added, concatenated, or left behind."""
    b = Build(opset=23, seed=draw(st.integers(0, 1000)))
    width = draw(st.sampled_from((8, 12, 16)))
    x = b.linear(b.input("batch", "sequence", 6), 6, width)
    for _ in range(draw(st.integers(1, 4))):
        x, width = draw(st.sampled_from(BLOCKS))(b, draw, x, width)
    return b.model(b.linear(x, width, 3))


def attention(b: Build, draw: Any, x: str, width: int) -> tuple[str, int]:
    count, size = draw(st.sampled_from(HEADS)), draw(st.sampled_from(SIZES))
    return attend(b, x, width, count, size, fused=draw(st.booleans())), width


def attention_operator(b: Build, draw: Any, x: str, width: int) -> tuple[str, int]:
    shared = draw(st.sampled_from((1, 2)))
    return attend_by_operator(b, x, width, draw(st.sampled_from((2, 4))), draw(st.sampled_from(SIZES)), shared), width


def feed_forward(b: Build, draw: Any, x: str, width: int) -> tuple[str, int]:
    inner = draw(st.sampled_from((8, 10, 24)))
    hidden = b.node(draw(st.sampled_from(["Relu", "Gelu", "Tanh"])), b.linear(x, width, inner))
    return b.node("Add", x, b.linear(hidden, inner, width)), width


def gated_feed_forward(b: Build, draw: Any, x: str, width: int) -> tuple[str, int]:
    """The gate from a product of its own, or from one that makes the gated as well."""
    inner = draw(st.sampled_from((8, 10, 24)))
    if draw(st.booleans()):
        gate, value = b.node("Split", b.linear(x, width, 2 * inner), outputs=2, axis=-1, num_outputs=2)
    else:
        gate, value = b.linear(x, width, inner), b.node("MatMul", x, b.normal(width, inner))
    hidden = b.node("Mul", b.node("Mul", gate, b.node("Sigmoid", gate)), value)
    return b.node("Add", x, b.node("MatMul", hidden, b.normal(inner, width))), width


def normalization(b: Build, draw: Any, x: str, width: int) -> tuple[str, int]:
    scale = b.const(np.abs(b.random.normal(size=width)).astype(np.float32) + 0.5)
    if draw(st.booleans()):
        return b.node("RMSNormalization", x, scale, axis=-1), width
    return b.node("LayerNormalization", x, scale, b.normal(width), axis=-1), width


def widening(b: Build, draw: Any, x: str, width: int) -> tuple[str, int]:
    more = draw(st.sampled_from((4, 8)))
    return b.node("Concat", x, b.node("Relu", b.linear(x, width, more)), axis=-1), width + more


def parting(b: Build, draw: Any, x: str, width: int) -> tuple[str, int]:
    left = draw(st.sampled_from((width // 4, width // 2)))
    parts = b.node("Split", x, b.const(np.array([left, width - left])), outputs=2, axis=-1)
    one = b.linear(b.node("Relu", parts[0]), left, 8)
    return b.node("Add", one, b.linear(parts[1], width - left, 8)), 8


def grouped_convolution(b: Build, draw: Any, x: str, width: int) -> tuple[str, int]:
    """Along the sequence, as encoders of sound have it: channels come before positions for a while."""
    group = 2 if width % 2 == 0 and draw(st.booleans()) else 1
    inner = draw(st.sampled_from((8, 16)))
    y = b.node("Transpose", x, perm=[0, 2, 1])
    y = b.node("Conv", y, b.normal(inner, width // group, 3), b.normal(inner), pads=[1, 1], group=group)
    y = b.node("Transpose", b.node("Gelu", y), perm=[0, 2, 1])
    return b.node("Add", x, b.linear(y, inner, width)), width


BLOCKS = (
    attention,
    attention_operator,
    feed_forward,
    gated_feed_forward,
    normalization,
    widening,
    parting,
    grouped_convolution,
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(stacks(), st.sampled_from([0.3, 0.5, 0.8]))
def test_cut_equals_zeroed_on_random_blocks(model: onnx.ModelProto, share: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, pruned = Path(folder) / "source.onnx", Path(folder) / "pruned.onnx"
        onnx.save(model, source)
        bench = Bench(source, Path(folder) / "scratch")
        pruner = REGISTRY.load("channels").parse({"round_to": 1, "channels": share})
        try:
            done = pruner.prune(source, pruned, bench)  # type: ignore[arg-type]
        except StageFailed as error:
            assert "nothing to prune: no group" in error.message
            return
        assert any(group["removed"] for group in done.details["groups"])
        feed = feed_for(pruned, rows=3)
        (wanted,), (found,) = outputs(bench.scratch / ZEROED, feed), outputs(pruned, feed)
        assert np.abs(wanted - found).max() <= 1e-5 * max(np.abs(wanted).max(), 1e-3)
