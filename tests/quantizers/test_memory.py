from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from quantizer_models import Bench, model_of, weights

from modelops.core import cache
from modelops.errors import InputRefused
from modelops.graphs import runs
from modelops.quantizers import _calibration
from modelops.quantizers._calibration import Extent
from modelops.quantizers._histograms import Histogram
from modelops.quantizers._memory import Memory
from modelops.quantizers.static import Static


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MODELOPS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def runs_counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each calibration looked at."""
    seen: list[int] = []
    for name in ("extents", "histograms"):
        original = getattr(_calibration, name)

        def counting(model: Any, names: Any, *rest: Any, original: Any = original) -> Any:
            seen.append(len(names))
            return original(model, names, *rest)

        monkeypatch.setattr(f"modelops.quantizers._memory.{name}", counting)
    return seen


def make(source: Path, data: Any, folder: Path, **options: Any) -> bytes:
    (folder / "scratch").mkdir(parents=True)
    Static(correct_bias=False, **options).quantize(source, folder / "m.onnx", Bench(folder / "scratch", data))  # type: ignore[arg-type]
    return (folder / "m.onnx").read_bytes()


@pytest.mark.parametrize("ranges", ["minmax", "mse"])
def test_another_choice_of_nodes_never_calibrates_again(
    conv_net: Path, images: Any, tmp_path: Path, runs_counted: list[int], ranges: str
) -> None:
    first = make(conv_net, images, tmp_path / "a", ranges=ranges)
    calibrated = len(runs_counted)
    assert calibrated == (1 if ranges == "minmax" else 2)
    make(conv_net, images, tmp_path / "b", ranges=ranges, exclude=("c2",))
    assert len(runs_counted) == calibrated
    assert make(conv_net, images, tmp_path / "c", ranges=ranges) == first and len(runs_counted) == calibrated


def test_other_samples_and_other_weights_calibrate_again_and_another_rule_does_not(
    conv_net: Path, images: Any, tmp_path: Path, runs_counted: list[int]
) -> None:
    make(conv_net, images, tmp_path / "a", ranges="mse")
    assert len(runs_counted) == 2
    make(conv_net, images, tmp_path / "b", ranges="percentile")
    assert len(runs_counted) == 2  # all rules that clip look at the same counts
    make(conv_net, {"image": images["image"][:-1]}, tmp_path / "c", ranges="mse")
    assert len(runs_counted) == 4
    model = onnx.load(conv_net)
    model.graph.initializer[0].raw_data = weights(16, 3, 3, 3, seed=77).tobytes()
    onnx.save(model, conv_net)
    make(conv_net, images, tmp_path / "d", ranges="mse")
    assert len(runs_counted) == 6


@pytest.mark.parametrize("damage", [b"", b"{", b'{"key": "x", "value": {}}', None])
def test_a_corrupted_entry_is_calibrated_anew(
    conv_net: Path, images: Any, tmp_path: Path, runs_counted: list[int], damage: bytes | None
) -> None:
    first = make(conv_net, images, tmp_path / "a", ranges="mse")
    places = sorted((cache.root() / "ranges").rglob("*.json"))
    assert len(places) == 2
    for place in places:
        if damage is None:  # well-formed, with values that were never written
            place.write_text(place.read_text().replace("[", "[null, ", 1))
        else:
            place.write_bytes(damage)
    assert make(conv_net, images, tmp_path / "b", ranges="mse") == first
    assert len(runs_counted) == 4


def test_percentiles_next_to_each_other_are_told_apart(
    conv_net: Path, images: Any, tmp_path: Path, runs_counted: list[int]
) -> None:
    model = onnx.load(conv_net)
    memory = Memory(model, lambda: iter([images]), tmp_path)
    seen = memory.extents(["image"])
    low = memory.ranges(seen, "percentile", 99.999)
    assert memory.ranges(seen, "percentile", 100.0) != low and runs_counted == [1, 1]


def test_an_extent_comes_back_as_it_was_and_nothing_else_does() -> None:
    found = Extent()
    found.add(-1.5, 2.0, 10)
    found.add(0.0, 4.0, 30)
    assert Extent.of_list(found.to_list()) == found and found.average == (-0.75, 3.0)
    broken = Extent()
    broken.add(float("nan"), 1.0, 3)
    assert not Extent.of_list(broken.to_list()).finite and not broken.finite
    for values in ([], [1, 2], [2.0, 1.0, 3, 1, 0, 0], ["x"] * 6, None, [0, 0, 0, 0, 0, 0]):
        with pytest.raises((TypeError, ValueError)):
            Extent.of_list(values)


def test_no_samples_and_broken_ones_are_refused(conv_net: Path, tmp_path: Path) -> None:
    model = onnx.load(conv_net)
    with pytest.raises(InputRefused, match="no samples"):
        Memory(model, lambda: iter(()), tmp_path)
    with pytest.raises(InputRefused, match="'image'"):
        Memory(model, lambda: iter([{"image": np.full((1, 3, 8, 8), np.nan, np.float32)}]), tmp_path)


def test_one_sample_calibrates_and_says_nothing_wrong(conv_net: Path, images: Any, tmp_path: Path) -> None:
    for rule in ("minmax", "average", "auto"):
        assert make(conv_net, {"image": images["image"][:1]}, tmp_path / rule, ranges=rule)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((4, 3, 8, 8), np.float64), "float64 where the model takes float32"),
        (np.zeros((4, 3, 8), np.float32), "3 dimensions"),
        (np.zeros((4, 4, 8, 8), np.float32), "size 4 on axis 1"),
    ],
)
def test_data_of_the_wrong_type_or_shape_is_told(conv_net: Path, tmp_path: Path, array: Any, said: str) -> None:
    with pytest.raises(InputRefused, match=said):
        make(conv_net, {"image": array}, tmp_path / "out")


def test_infinite_sentinels_in_the_graph_leave_their_nodes_in_float(tmp_path: Path) -> None:
    """A tensor that holds −inf has no range: what reads it stays float, and the rest is quantized."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[n, 16] x, bool[n, 16] keep) => (float[n, 8] y) {
        h = MatMul (x, w1)
        m = Where (keep, h, never)
        e = Exp (m)
        y = MatMul (e, w2)
    }"""
    constants = {"w1": weights(16, 16), "w2": weights(16, 8, seed=1), "never": np.float32(-np.inf)}
    source = model_of(text, constants, tmp_path / "model.onnx")
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(24, 16)).astype(np.float32), "keep": rng.random((24, 16)) < 0.8}
    (tmp_path / "s").mkdir()
    done = Static().quantize(source, tmp_path / "out.onnx", Bench(tmp_path / "s", data))  # type: ignore[arg-type]
    assert done.details["quantized"]["MatMul"] == 2 and done.details["special_tensors"] == []


def test_no_pass_over_the_data_is_repeated_when_nodes_are_excluded(
    conv_net: Path, images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted at the runtime: the model is not run at all for ranges that are known."""
    ran: list[str] = []
    original = runs.run
    monkeypatch.setattr(runs, "run", lambda opened, *rest: ran.append(opened.path.name) or original(opened, *rest))
    make(conv_net, images, tmp_path / "a", ranges="auto")
    assert set(ran) >= {"extents.onnx", "values.onnx"}
    ran.clear()
    make(conv_net, images, tmp_path / "b", ranges="auto", exclude=("c2",))
    make(conv_net, images, tmp_path / "c", ranges="entropy", exclude=("c1",))
    assert ran == []


def test_a_histogram_comes_back_as_it_was_and_nothing_else_does() -> None:
    histogram = Histogram(-1.0, 3.0)
    histogram.add(np.array([-0.5, 0.0, 0.0, 2.0], np.float32))
    again = Histogram.of_list(json.loads(json.dumps(histogram.to_list())))
    assert (again.low, again.high, again.zeros) == (-1.0, 3.0, 2) and (again.counts == histogram.counts).all()
    low, high, zeros, counts = histogram.to_list()
    for broken in ([low, high, zeros], [low, high, -1, counts], [1.0, high, zeros, counts], [low, high, zeros, "eJw="]):
        with pytest.raises(ValueError):
            Histogram.of_list(broken)
