"""Single weights become zero, exactly as many as were asked for, and the report says that this gains nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from prunable_models import Bench, Build, chain

from modelops.core.workbench import Done
from modelops.errors import StageFailed, UsageError
from modelops.pruners import REGISTRY


def prune(model: onnx.ModelProto, folder: Path, **options: Any) -> tuple[Done, dict[str, np.ndarray[Any, Any]]]:
    onnx.save(model, folder / "source.onnx")
    pruner = REGISTRY.load("magnitude").parse(options)
    bench = Bench(folder / "source.onnx", folder / "scratch")
    done = pruner.prune(folder / "source.onnx", folder / "pruned.onnx", bench)  # type: ignore[arg-type]
    return done, {t.name: numpy_helper.to_array(t) for t in onnx.load(folder / "pruned.onnx").graph.initializer}


def test_every_tensor_loses_its_smallest_weights(tmp_path: Path) -> None:
    model = chain()
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    done, after = prune(model, tmp_path, zeros=0.75)
    for name, array in after.items():
        if array.ndim < 2:
            assert np.array_equal(array, before[name])
            continue
        assert (array == 0).sum() == round(0.75 * array.size)
        kept = array != 0
        assert np.array_equal(array[kept], before[name][kept])
        assert np.abs(before[name][~kept]).max() <= np.abs(array[kept]).min()
    assert done.details["asked"]["reached"] == pytest.approx(0.75, abs=0.01)


def test_a_share_of_all_weights_takes_more_of_small_tensors(tmp_path: Path) -> None:
    b = Build()
    small = b.const(b.random.normal(size=(8, 8)).astype(np.float32) * 0.01, "small")
    x = b.node("Relu", b.node("MatMul", b.input("batch", 8), small))
    large = b.const(b.random.normal(size=(8, 8)).astype(np.float32), "large")
    _, after = prune(b.model(b.node("MatMul", x, large)), tmp_path, zeros=0.5, per="model")
    assert (after["small"] == 0).all()
    assert (after["large"] != 0).all()


def test_report_says_that_zeros_gain_nothing(tmp_path: Path) -> None:
    done, _ = prune(chain(), tmp_path)
    assert any("no speed" in note for note in done.notes)


def test_model_without_weights_is_one_clear_failure(tmp_path: Path) -> None:
    b = Build()
    with pytest.raises(StageFailed, match="nothing to prune"):
        prune(b.model(b.node("Relu", b.input("batch", 8))), tmp_path)


@pytest.mark.parametrize("zeros", [0.0, 1.0, "120%"])
def test_share_out_of_range_is_a_usage_error(zeros: Any) -> None:
    with pytest.raises(UsageError):
        REGISTRY.load("magnitude").parse({"zeros": zeros})


def test_warning_comes_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelops.core.progress import listen
    from modelops.graphs import files

    said: list[str] = []

    def save(*_: Any, **__: Any) -> None:
        assert said and "no speed" in said[0]

    monkeypatch.setattr(files, "save", save)
    onnx.save(chain(), tmp_path / "source.onnx")
    bench = Bench(tmp_path / "source.onnx", tmp_path / "scratch")
    listen(lambda what, done, total: said.append(what))
    try:
        REGISTRY.load("magnitude").parse({}).prune(tmp_path / "source.onnx", tmp_path / "x.onnx", bench)  # type: ignore[arg-type]
    finally:
        listen(None)
    assert len(said) == 1
