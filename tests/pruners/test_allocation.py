"""Where channels go when groups compete, by channels, by work, and by time; heads apart from the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from prunable_models import FOLLOWED, Bench, Build, attend, attention, chain, feed_for, outputs, residual

from modelops.core.workbench import Done
from modelops.errors import StageFailed, UsageError
from modelops.pruners import REGISTRY, ZEROED, _latency
from modelops.pruners._allocation import competing, uniform
from modelops.pruners._costs import Cost, Term, mac_cost
from modelops.pruners._groups import examine
from modelops.pruners._network import opened


def prune(model: onnx.ModelProto, folder: Path, data: int = 0, **options: Any) -> tuple[Done, Path, Path]:
    """What was done, the pruned file, and the file in which the same channels are zeroed."""
    folder.mkdir(exist_ok=True)
    source = folder / "source.onnx"
    onnx.save(model, source)
    feeds = [feed_for(source, rows=8, seed=100 + number) for number in range(data)]
    bench = Bench(source, folder / "scratch", feeds)
    pruner = REGISTRY.load("channels").parse({"round_to": 1, "recover": "none", **options})
    done = pruner.prune(source, folder / "pruned.onnx", bench)  # type: ignore[arg-type]
    return done, folder / "pruned.onnx", folder / "scratch" / ZEROED


def agree(pruned: Path, zeroed: Path) -> bool:
    feed = feed_for(pruned)
    pairs = zip(outputs(zeroed, feed), outputs(pruned, feed), strict=True)
    return all(float(np.abs(a - b).max()) <= 1e-5 * float(np.abs(a).max()) for a, b in pairs)


def unequal() -> onnx.ModelProto:
    """Two layers, of which the first has nearly nothing in three of four channels."""
    b = Build()
    filters = b.random.normal(size=(16, 3, 3, 3)).astype(np.float32)
    filters[4:] *= 1e-3
    x = b.node("Relu", b.node("Conv", b.input("batch", 3, 8, 8), b.const(filters), pads=[1, 1, 1, 1]))
    x = b.node("Relu", b.conv(x, 16, 16))
    return b.model(b.head(x, 16))


def attention_and_feed_forward() -> onnx.ModelProto:
    b = Build()
    x = attend(b, b.input("batch", "sequence", 16), 16, 4, 4)
    return b.model(b.node("Add", x, b.linear(b.node("Relu", b.linear(x, 16, 64)), 64, 16)))


@pytest.mark.parametrize("importance", ["activation", "reconstruction"])
def test_global_allocation_takes_from_where_least_is_lost(importance: str, tmp_path: Path) -> None:
    options = {"channels": 0.4, "importance": importance, "allocation": "global"}
    done, pruned, zeroed = prune(unequal(), tmp_path, data=4, **options)
    first, second = (group["removed"] for group in done.details["groups"])
    assert first == 12
    assert second < 4
    assert agree(pruned, zeroed)


@pytest.mark.parametrize("importance", ["l1", "l2", "activation", "reconstruction", "bn-scale", "random"])
@pytest.mark.parametrize("name", ["chain", "dense_concat"])
def test_cut_equals_zeroed_for_every_importance(name: str, importance: str, tmp_path: Path) -> None:
    done, pruned, zeroed = prune(FOLLOWED[name](), tmp_path, data=2, importance=importance)
    assert done.details["importance"] == importance
    assert agree(pruned, zeroed)


def test_batch_normalization_ranks_by_its_scale(tmp_path: Path) -> None:
    model = chain()
    norm = next(node for node in model.graph.node if node.op_type == "BatchNormalization")
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == norm.input[1])
    values = np.where(np.arange(16) % 4 == 0, 2.0, 0.1).astype(np.float32)
    scale.CopyFrom(onnx.numpy_helper.from_array(values, scale.name))
    _, pruned, _ = prune(model, tmp_path, importance="bn-scale", channels=0.75)
    found = [onnx.numpy_helper.to_array(t) for t in onnx.load(pruned).graph.initializer if list(t.dims) == [4]]
    assert any(np.array_equal(array, np.full(4, 2.0, np.float32)) for array in found)


def test_no_batch_normalization_is_said(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="no group of channels has a batch normalization"):
        prune(residual(), tmp_path, importance="bn-scale")


def test_chance_is_always_the_same(tmp_path: Path) -> None:
    found = [prune(chain(), tmp_path / str(k), importance="random")[1].read_bytes() for k in range(2)]
    assert found[0] == found[1]
    assert found[0] != prune(chain(), tmp_path / "l2", importance="l2")[1].read_bytes()


def test_of_two_channels_that_say_the_same_reconstruction_spares_one(tmp_path: Path) -> None:
    # Channels 0 and 1 are large and equal, 2 is smaller and alone: without either twin nothing is lost, without both.
    b = Build()
    filters = b.random.normal(size=(4, 3, 3, 3)).astype(np.float32)
    filters[1] = filters[0]
    filters[2] *= 0.6
    filters[3] *= 0.6
    x = b.node("Conv", b.input("batch", 3, 8, 8), b.const(filters), pads=[1, 1, 1, 1])
    model = b.model(b.head(b.conv(b.node("Relu", x), 4, 4), 4))
    options = {"channels": 0.25, "allocation": "global", "importance": "reconstruction"}
    _, pruned, _ = prune(model, tmp_path, data=4, **options)
    kept = next(onnx.numpy_helper.to_array(t) for t in onnx.load(pruned).graph.initializer if t.dims[1:] == [3, 3, 3])
    twins = sum(np.array_equal(row, filters[0]) for row in kept)
    assert (len(kept), twins) == (3, 1)


def test_heads_have_a_share_of_their_own(tmp_path: Path) -> None:
    done, pruned, zeroed = prune(attention(), tmp_path, channels=0.01, heads=0.5)
    (group,) = [group for group in done.details["groups"] if group["kind"] == "heads"]
    assert (group["kept"], group["removed"]) == (2, 2)
    assert done.details["also_asked"] == [{"what": "attention heads", "removed": 0.5, "reached": 0.5}]
    assert agree(pruned, zeroed)


def test_heads_where_there_are_none_are_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no attention heads"):
        prune(chain(), tmp_path, heads=0.5)
    with pytest.raises(UsageError, match="--heads goes with --channels or --macs"):
        REGISTRY.load("channels").parse({"heads": 0.5, "latency": 0.5})


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_heads_keep_their_share_where_work_is_the_target(allocation: str, tmp_path: Path) -> None:
    aimed = REGISTRY.load("channels").parse({"heads": 0.25, "channels": 0.5, "allocation": allocation}).aimed(0.35)  # type: ignore[attr-defined]
    done, pruned, zeroed = prune(attention_and_feed_forward(), tmp_path, **aimed.to_dict() | {"round_to": 1})
    kept = {group["kind"]: (group["kept"], group["removed"]) for group in done.details["groups"]}
    assert kept["heads"] == (3, 1), "a quarter of four heads, whatever the work"
    assert kept["channels"][1] > 0
    assert done.details["asked"]["reached"] >= 0.35
    assert done.details["also_asked"] == [{"what": "attention heads", "removed": 0.25, "reached": 0.25}]
    assert agree(pruned, zeroed)


@pytest.mark.parametrize("allocation", ["global", "latency"])
def test_macs_are_brought_under_the_target_by_every_allocation(allocation: str, tmp_path: Path) -> None:
    done, pruned, zeroed = prune(residual(), tmp_path, macs=0.5, allocation=allocation)
    values = {metric.name: metric.value for metric in done.metrics}
    assert 0.35 < values["macs"] / values["macs_before"] <= 0.5  # type: ignore[operator]
    assert agree(pruned, zeroed)


def wide() -> onnx.ModelProto:
    """Enough work for its time to show."""
    b = Build()
    x = b.node("Relu", b.conv(b.input("batch", 3, 32, 32), 3, 64))
    x = b.node("Relu", b.conv(b.node("Relu", b.conv(x, 64, 64)), 64, 64))
    return b.model(b.head(x, 64))


def test_share_of_the_time_is_measured(tmp_path: Path) -> None:
    done, pruned, zeroed = prune(wide(), tmp_path, latency=0.5, round_to=8)
    asked, trials = done.details["asked"], done.details["plan"]["trials"]
    assert {"work", "by_tables", "timed"} == set(trials[0])
    assert asked["what"] == "time" and asked["timed"]
    assert asked["reached"] == pytest.approx(
        1 - min((t["timed"] for t in trials), key=lambda s: (s > 0.5, abs(s - 0.5)))
    )
    assert 0.2 < asked["reached"] < 0.9
    assert all(group["seconds_saved"] >= 0 for group in done.details["groups"])
    assert agree(pruned, zeroed)


def test_competing_groups_spend_error_where_it_pays() -> None:
    # Removing a channel of the second group saves ten times as much for the same error.
    b = Build()
    x = b.conv(b.input("batch", 3, 8, 8), 3, 8)
    model = b.model(b.head(b.conv(x, 8, 8), 8))
    anatomy = anatomy_of(model)
    score = np.ones(anatomy.classes)
    cost = Cost([Term((0,), lambda removed: 8.0 - removed[0]), Term((1,), lambda removed: 80.0 - 10 * removed[1])])
    assert competing(anatomy, score, cost, 48.0, 1) == [0, 4]
    assert competing(anatomy, score, cost, 1.0, 1) == [7, 7], "one channel of each is left"
    assert uniform(anatomy, score, cost, 44.0, 1) == [4, 4]


def anatomy_of(model: onnx.ModelProto) -> Any:
    import tempfile

    from modelops.graphs.describe import signature
    from modelops.graphs.seeded import random_feed

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        return examine(opened(path, signature(path), random_feed(signature(path), 2), Path(folder)))


@pytest.mark.parametrize("name", sorted(FOLLOWED))
def test_work_of_a_plan_is_that_of_the_cut_graph(name: str, tmp_path: Path) -> None:
    # Counted anew on the graph that was cut: the plan's arithmetic must not be off by a channel.
    done, pruned, _ = prune(FOLLOWED[name](), tmp_path)
    anatomy = anatomy_of(onnx.load(pruned))
    values = {metric.name: metric.value for metric in done.metrics}
    assert mac_cost(anatomy).total([0] * len(anatomy.groups)) == pytest.approx(values["macs"])


def test_noise_in_tables_only_adds_time() -> None:
    assert _latency.falling({(8,): 5.0, (16,): 4.0, (32,): 9.0}) == {(8,): 4.0, (16,): 4.0, (32,): 9.0}


def test_tables_are_linear_between_their_points() -> None:
    table = {(8, 4): 4.0, (8, 8): 8.0, (16, 4): 8.0, (16, 8): 16.0}
    assert _latency.interpolated(table, [[8, 16], [4, 8]], [12, 6]) == pytest.approx(9.0)
    assert _latency.interpolated(table, [[8, 16], [4, 8]], [4, 8]) == pytest.approx(8.0)
    assert _latency.interpolated({(): 3.0}, [], []) == 3.0


def test_a_method_aimed_at_another_share_still_decides_where_in_its_own_way() -> None:
    method = REGISTRY.load("channels").parse({"latency": 0.5, "round_to": 4, "importance": "l1"})
    kept = {**method.to_dict(), "latency": None, "macs": 0.7, "allocation": "latency"}
    assert method.aimed(0.3).to_dict() == kept


@pytest.mark.parametrize("shown", ["first", "nothing"])
def test_samples_that_are_all_padding_do_not_stop_a_ranking(tmp_path: Path, shown: str) -> None:
    b = Build()
    y = b.node("Relu", b.linear(b.input("batch", "sequence", 8), 8, 32))
    mask = b.node("Unsqueeze", b.input("batch", "sequence", name="mask"), b.const(np.array([2])))
    model = b.model(b.node("Mul", b.linear(y, 32, 4), mask))
    onnx.save(model, tmp_path / "model.onnx")
    x = np.random.default_rng(0).normal(size=(1, 300, 8)).astype(np.float32)
    seen, hidden = np.ones((1, 300), np.float32), np.zeros((1, 300), np.float32)
    data = [{"x": x, "mask": hidden}] * 4 + ([{"x": x, "mask": seen}] * 4 if shown == "first" else [])
    bench = Bench(tmp_path / "model.onnx", tmp_path / "scratch", data)
    method = REGISTRY.load("channels").parse({"channels": 0.5, "importance": "reconstruction"})
    done = method.prune(tmp_path / "model.onnx", tmp_path / "out.onnx", bench)  # type: ignore[arg-type]
    assert [(group["kept"], group["removed"]) for group in done.details["groups"]] == [(16, 16)]
