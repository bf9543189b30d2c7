"""What is left after a cut is refitted to what the source makes; memory and disk are given back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from prunable_models import FOLLOWED, Bench, Build, feed_for, outputs

from modelops.core.workbench import Done
from modelops.errors import UsageError
from modelops.pruners import CUT, REGISTRY, ZEROED
from modelops.pruners._refits import Rows, refits
from modelops.pruners._segments import Parts


def prune(model: onnx.ModelProto, folder: Path, **options: Any) -> tuple[Done, Path, Path]:
    """What was done, the pruned file, and the source; refitted on eight batches of eight samples."""
    folder.mkdir(exist_ok=True)
    source = folder / "source.onnx"
    onnx.save(model, source)
    data = [feed_for(source, rows=8, seed=100 + number) for number in range(8)]
    bench = Bench(source, folder / "scratch", data)
    pruner = REGISTRY.load("channels").parse({"round_to": 1, **options})
    done = pruner.prune(source, folder / "pruned.onnx", bench)  # type: ignore[arg-type]
    return done, folder / "pruned.onnx", source


def noise(source: Path, model: Path) -> float:
    """The share of the source's signal that is missing or wrong, on samples that were not fitted."""
    feed = feed_for(source, rows=16, seed=1)
    (wanted,), (found,) = outputs(source, feed), outputs(model, feed)
    return float(np.square(wanted - found).sum() / np.square(wanted - wanted.mean(0)).sum())


def redundant() -> onnx.ModelProto:
    """Every channel comes twice, the second time at a quarter of its size: half of them can go without loss."""
    b = Build()
    half = b.random.normal(size=(8, 3, 3, 3)).astype(np.float32)
    bias = b.random.normal(size=8).astype(np.float32)
    filters, biases = np.concatenate([half, half / 4]), np.concatenate([bias, bias / 4])
    x = b.node("Conv", b.input("batch", 3, 8, 8), b.const(filters), b.const(biases), pads=[1, 1, 1, 1])
    x = b.conv(b.node("Relu", x), 16, 8)
    return b.model(b.head(x, 8))


def test_channels_that_others_can_stand_in_for_leave_no_error(tmp_path: Path) -> None:
    only_first = {"channels": 0.3}
    _, plain, source = prune(redundant(), tmp_path / "plain", recover="none", **only_first)
    done, refitted, _ = prune(redundant(), tmp_path / "refitted", **only_first)
    assert done.details["recovered"]["method"] == "least-squares"
    assert noise(source, plain) > 0.01
    assert noise(source, refitted) < 0.1 * noise(source, plain)


@pytest.mark.parametrize(
    "name",
    ["chain", "residual", "depthwise", "dense_concat", "squeeze_and_excite", "u_net", "feed_forward", "attention"],
)
def test_refitted_is_nearer_to_the_source_than_cut(name: str, tmp_path: Path) -> None:
    _, pruned, source = prune(FOLLOWED[name](), tmp_path)
    assert noise(source, pruned) < 0.9 * noise(source, tmp_path / "scratch" / CUT)


def test_bias_alone_makes_up_for_the_mean(tmp_path: Path) -> None:
    _, pruned, source = prune(FOLLOWED["chain"](), tmp_path, recover="bias")
    feed = feed_for(source, rows=16, seed=1)
    wanted, cut, found = (outputs(p, feed)[0].mean(0) for p in (source, tmp_path / "scratch" / CUT, pruned))
    assert np.abs(wanted - found).max() < 0.2 * np.abs(wanted - cut).max()
    shapes = [{tuple(t.dims) for t in onnx.load(p).graph.initializer} for p in (pruned, tmp_path / "scratch" / CUT)]
    assert shapes[0] == shapes[1]


def test_scratch_holds_no_values_in_flight_afterwards(tmp_path: Path) -> None:
    prune(FOLLOWED["dense_concat"](), tmp_path)
    files = {path.name for path in (tmp_path / "scratch").rglob("*") if path.is_file()}
    assert files == {ZEROED, CUT}


def test_shared_filter_is_not_refitted(tmp_path: Path) -> None:
    _, pruned, _ = prune(FOLLOWED["shared_filter"](), tmp_path)
    filters = [tensor for tensor in onnx.load(pruned).graph.initializer if list(tensor.dims) == [8, 8, 3, 3]]
    assert len(filters) == 1


def test_refitting_needs_samples(tmp_path: Path) -> None:
    onnx.save(FOLLOWED["chain"](), tmp_path / "source.onnx")
    bench = Bench(tmp_path / "source.onnx", tmp_path / "scratch")
    pruner = REGISTRY.load("channels").parse({"recover": "least-squares"})
    with pytest.raises(UsageError, match="needs samples"):
        pruner.prune(tmp_path / "source.onnx", tmp_path / "pruned.onnx", bench)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "attributes",
    [
        {"pads": [1, 0, 2, 1]},
        {"strides": [2, 3], "pads": [1, 1, 1, 1]},
        {"dilations": [2, 1], "pads": [2, 2, 2, 2]},
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        {"auto_pad": "SAME_LOWER", "strides": [2, 2]},
    ],
)
def test_rows_of_a_convolution_give_its_output(attributes: dict[str, Any], tmp_path: Path) -> None:
    from modelops.graphs import files

    b = Build()
    weight, bias = b.normal(6, 3, 3, 2), b.normal(6)
    onnx.save(b.model(b.node("Conv", b.input("batch", 3, 9, 8), weight, bias, **attributes)), tmp_path / "conv.onnx")
    x = np.random.default_rng(0).normal(size=(4, 3, 9, 8)).astype(np.float32)
    y = outputs(tmp_path / "conv.onnx", {"x": x})[0]
    (refit,) = refits(Parts(files.load(tmp_path / "conv.onnx")))
    rows = Rows(refit, 7)
    assert np.allclose(rows.inputs(x, y.shape) @ refit.matrix() + refit.bias_row(), rows.outputs(y), atol=1e-5)
    assert rows.samples(y.shape).tolist() == [sample for sample in range(4) for _ in range(7)]


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_recover
_, pruned, _ = test_recover.prune(test_recover.FOLLOWED["residual"](), Path({folder!r}))
"""


def test_same_bytes_on_one_and_on_two_threads(tmp_path: Path) -> None:
    import os

    found = []
    for threads in ("1", "2"):
        folder = tmp_path / threads
        script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder))
        env = {**os.environ, "OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        subprocess.run([sys.executable, "-c", script], check=True, env=env)
        found.append((folder / "pruned.onnx").read_bytes())
    assert found[0] == found[1]


def test_refitted_filters_are_others_than_cut_ones(tmp_path: Path) -> None:
    _, pruned, _ = prune(FOLLOWED["chain"](), tmp_path)
    weights = [
        {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
        for path in (pruned, tmp_path / "scratch" / CUT)
    ]
    changed = [name for name in weights[1] if not np.array_equal(weights[0][name], weights[1][name])]
    assert len(changed) >= 2


def test_no_weight_is_left_that_nothing_reads(tmp_path: Path) -> None:
    _, pruned, _ = prune(FOLLOWED["residual"](), tmp_path)
    graph = onnx.load(pruned).graph
    assert {tensor.name for tensor in graph.initializer} <= {name for node in graph.node for name in node.input}


def test_channels_that_never_change_go_first(tmp_path: Path) -> None:
    # The largest filters read an input that is always the same: a bias can stand in for them.
    b = Build()
    x = b.input("batch", 3, 8, 8)
    filters = b.random.normal(size=(8, 3, 3, 3)).astype(np.float32)
    filters[:4, 1:] = 0
    filters[:4, 0] *= 10
    still = b.node("Mul", x, b.const(np.float32([0, 1, 1]).reshape(3, 1, 1)))
    y = b.node("Conv", still, b.const(filters), b.normal(8), pads=[1, 1, 1, 1])
    model = b.model(b.head(b.conv(b.node("Sigmoid", y), 8, 4), 4))
    kept = {}
    for importance in ("l2", "activation"):
        _, pruned, _ = prune(model, tmp_path / importance, importance=importance, recover="none")
        cut = next(numpy_helper.to_array(t) for t in onnx.load(pruned).graph.initializer if t.dims[1:] == [3, 3, 3])
        kept[importance] = [next(k for k in range(8) if np.array_equal(filters[k], row)) for row in cut]
    assert set(kept["activation"]) == {4, 5, 6, 7}
    assert set(kept["l2"]) != {4, 5, 6, 7}


def test_ranking_by_activations_needs_samples(tmp_path: Path) -> None:
    onnx.save(FOLLOWED["chain"](), tmp_path / "source.onnx")
    bench = Bench(tmp_path / "source.onnx", tmp_path / "scratch")
    pruner = REGISTRY.load("channels").parse({"importance": "activation"})
    with pytest.raises(UsageError, match="needs samples"):
        pruner.prune(tmp_path / "source.onnx", tmp_path / "pruned.onnx", bench)  # type: ignore[arg-type]
