"""Cutting channels out of a graph gives what the graph gives when the same channels are zeroed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from prunable_models import FOLLOWED, Bench, Build, attention, chain, feed_for, outputs, residual, shared_filter

from modelops.core.workbench import Done
from modelops.errors import StageFailed, UsageError
from modelops.pruners import REGISTRY, ZEROED


def prune(model: onnx.ModelProto, folder: Path, **options: Any) -> tuple[Done, Path, Path]:
    """What was done, the pruned file, and the file in which the same channels are zeroed."""
    folder.mkdir(exist_ok=True)
    source = folder / "source.onnx"
    onnx.save(model, source)
    bench = Bench(source, folder / "scratch")
    pruner = REGISTRY.load("channels").parse({"round_to": 1, **options})
    done = pruner.prune(source, folder / "pruned.onnx", bench)  # type: ignore[arg-type]
    return done, folder / "pruned.onnx", folder / "scratch" / ZEROED


def largest_error(one: list[Any], other: list[Any]) -> float:
    """The largest difference as a share of the largest magnitude."""
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", FOLLOWED)
def test_cut_equals_zeroed(name: str, tmp_path: Path) -> None:
    done, pruned, zeroed = prune(FOLLOWED[name](), tmp_path)
    feed = feed_for(pruned)
    before, masked, after = (outputs(model, feed) for model in (tmp_path / "source.onnx", zeroed, pruned))
    assert largest_error(masked, after) < 1e-5
    assert largest_error(before, masked) > 1e-3, "nothing was removed"
    assert sum(group["removed"] for group in done.details["groups"]) > 0
    assert (tmp_path / "source.onnx").stat().st_size > pruned.stat().st_size


@pytest.mark.parametrize("name", ["chain", "residual", "dense_concat", "flattened"])
def test_every_hidden_channel_can_go(name: str, tmp_path: Path) -> None:
    done, _, _ = prune(FOLLOWED[name](), tmp_path)
    assert done.details["asked"] == {"what": "channels", "removed": 0.5, "reached": 0.5}
    assert [item["reason"] for item in done.details["skipped"]] == ["it is an output of the model"]


def test_channels_that_meet_in_an_add_go_together(tmp_path: Path) -> None:
    done, pruned, _ = prune(residual(), tmp_path)
    tied = max(done.details["groups"], key=lambda group: len(group["nodes"]))
    assert len(tied["nodes"]) == 3
    shapes = [list(tensor.dims) for tensor in onnx.load(pruned).graph.initializer if len(tensor.dims) == 4]
    assert shapes == [[8, 3, 3, 3], [4, 8, 3, 3], [8, 4, 3, 3], [8, 8, 1, 1]]


def test_removed_channels_are_those_of_least_norm(tmp_path: Path) -> None:
    model = chain()
    first = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [16, 3, 3, 3])
    array = numpy_helper.to_array(first).copy()
    array[::2] *= 0.01
    first.CopyFrom(numpy_helper.from_array(array, first.name))
    _, pruned, _ = prune(model, tmp_path)
    kept = next(t for t in onnx.load(pruned).graph.initializer if list(t.dims) == [8, 3, 3, 3])
    assert np.array_equal(numpy_helper.to_array(kept), array[1::2])


def test_zeroing_the_makers_agrees_too(tmp_path: Path) -> None:
    # A proof that does not rest on the code that zeroes: without biases and with Relu, a channel whose filter is zero
    # carries zeros, whoever reads it.
    b = Build()
    x = b.input("batch", 3, 8, 8)
    filters = b.random.normal(size=(16, 3, 3, 3)).astype(np.float32)
    filters[4:12] *= 0.01
    x = b.node("Relu", b.node("Conv", x, b.const(filters, "filters"), pads=[1, 1, 1, 1]))
    model = b.model(b.head(x, 16))
    _, pruned, _ = prune(model, tmp_path)
    filters[4:12] = 0
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "filters")
    tensor.CopyFrom(numpy_helper.from_array(filters, "filters"))
    onnx.save(model, tmp_path / "masked.onnx")
    feed = feed_for(pruned)
    assert largest_error(outputs(tmp_path / "masked.onnx", feed), outputs(pruned, feed)) < 1e-5


def test_shared_filter_stays_shared(tmp_path: Path) -> None:
    _, pruned, _ = prune(shared_filter(), tmp_path)
    filters = [tensor for tensor in onnx.load(pruned).graph.initializer if list(tensor.dims) == [8, 8, 3, 3]]
    assert len(filters) == 1


def test_heads_go_whole(tmp_path: Path) -> None:
    done, pruned, _ = prune(attention(), tmp_path)
    group = next(group for group in done.details["groups"] if group["width"] == 8)
    assert (group["kept"], group["removed"]) == (2, 2)
    widths = {tuple(t.dims) for t in onnx.load(pruned).graph.initializer if len(t.dims) == 2}
    assert widths == {(16, 16)}


def test_sizes_are_multiples_of_round_to(tmp_path: Path) -> None:
    _, pruned, _ = prune(chain(), tmp_path, channels=0.3, round_to=8)
    outs = [tensor.dims[0] for tensor in onnx.load(pruned).graph.initializer if len(tensor.dims) == 4]
    assert outs == [8, 16]


@pytest.mark.parametrize("left", [0.75, 0.4])
def test_macs_are_brought_under_the_target(left: float, tmp_path: Path) -> None:
    done, _, _ = prune(residual(), tmp_path, macs=left)
    values = {metric.name: metric.value for metric in done.metrics}
    assert 0.8 * left < values["macs"] / values["macs_before"] <= left  # type: ignore[operator]


def test_macs_count_one_sample(tmp_path: Path) -> None:
    done, _, _ = prune(chain(), tmp_path)
    values = {metric.name: metric.value for metric in done.metrics}
    assert values["macs_before"] == 8 * 8 * 9 * (3 * 16 + 16 * 24) + 24 * 4
    assert values["macs"] == 8 * 8 * 9 * (3 * 8 + 8 * 12) + 12 * 4


def test_interface_keeps_its_shape(tmp_path: Path) -> None:
    _, pruned, _ = prune(chain(), tmp_path)
    before, after = onnx.load(tmp_path / "source.onnx").graph, onnx.load(pruned).graph
    assert [before.input, before.output] == [after.input, after.output]


def test_same_source_gives_same_bytes(tmp_path: Path) -> None:
    _, one, _ = prune(FOLLOWED["split_and_slice"](), tmp_path / "one")
    _, other, _ = prune(FOLLOWED["split_and_slice"](), tmp_path / "other")
    assert one.read_bytes() == other.read_bytes()


def recurrent() -> onnx.ModelProto:
    b = Build()
    x = b.node("MatMul", b.input("time", "batch", 8), b.normal(8, 16))
    y = b.node("LSTM", x, b.normal(1, 32, 16), b.normal(1, 32, 8), outputs=3, hidden_size=8)[0]
    return b.model(b.node("MatMul", b.node("Relu", b.node("MatMul", y, b.normal(8, 16))), b.normal(16, 2)))


def test_what_is_not_followed_is_left_alone_and_said(tmp_path: Path) -> None:
    done, pruned, zeroed = prune(recurrent(), tmp_path)
    feed = feed_for(pruned)
    assert largest_error(outputs(zeroed, feed), outputs(pruned, feed)) < 1e-5
    assert "LSTM 'lstm" in done.details["skipped"][0]["reason"]
    assert any("LSTM" in note for note in done.notes)
    assert [group["removed"] for group in done.details["groups"]] == [8]


def test_weight_of_a_branch_is_left_alone(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    b = Build()
    x = b.node("Relu", b.conv(b.input("batch", 3, 4, 4), 3, 16))
    y = b.head(b.conv(x, 16, 16), 16)
    branch = helper.make_graph(
        [helper.make_node("ReduceSum", [x], ["inner"], keepdims=0, name="inside")],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [])],
    )
    chosen = b.node("If", b.const(np.array(True)), then_branch=branch, else_branch=branch)
    done, pruned, zeroed = prune(b.model(b.node("Add", y, chosen)), tmp_path)
    feed = feed_for(pruned)
    assert largest_error(outputs(zeroed, feed), outputs(pruned, feed)) < 1e-5
    assert "branch or loop" in done.details["skipped"][0]["reason"]


def test_normalized_width_is_left_alone(tmp_path: Path) -> None:
    done, _, _ = prune(FOLLOWED["feed_forward"](), tmp_path)
    assert any("LayerNormalization" in item["reason"] for item in done.details["skipped"])
    assert done.details["asked"]["reached"] < 0.5


def test_quantized_graph_is_refused_with_its_node(tmp_path: Path) -> None:
    b = Build()
    scale, zero = b.const(np.float32(0.1)), b.const(np.uint8(128))
    x = b.node("QuantizeLinear", b.input("batch", 3, 8, 8), scale, zero)
    model = b.model(b.head(b.conv(b.node("DequantizeLinear", x, scale, zero), 3, 8), 8))
    with pytest.raises(StageFailed, match=r"quantized already: QuantizeLinear 'quantizelinear"):
        prune(model, tmp_path)


@pytest.mark.parametrize("build", ["no weights", "only an output"])
def test_nothing_to_prune_is_one_clear_failure(build: str, tmp_path: Path) -> None:
    b = Build()
    x = b.input("batch", 16)
    model = b.model(b.node("Relu", x) if build == "no weights" else b.linear(x, 16, 4))
    with pytest.raises(StageFailed, match="nothing to prune"):
        prune(model, tmp_path)


@pytest.mark.parametrize(
    "options", [{"channels": 0.0}, {"channels": 1.0}, {"macs": 1.5}, {"round_to": 0}, {"channels": 0.5, "macs": 0.5}]
)
def test_target_out_of_range_is_a_usage_error(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        REGISTRY.load("channels").parse(options)
