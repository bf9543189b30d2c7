"""Models above 2 GB go by path, never through one message; weights get a file of their own above a stated size only."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import hostile_models as hostile
import numpy as np
import pytest

from modelops.graphs import files
from modelops.graphs.wrap import wrap


@pytest.fixture
def script() -> ModuleType:
    place = Path(__file__).parents[2] / "benchmarks" / "large_model.py"
    spec = importlib.util.spec_from_file_location("large_model", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_model_above_2_gb_is_converted_shown_and_validated(tmp_path: Path, script: ModuleType) -> None:
    result = script.measure(tmp_path, 2.5)
    assert result["model_bytes"] > 2**31 and result["problems"] == []


@pytest.mark.parametrize("above", [False, True])
def test_weights_get_their_own_file_above_the_stated_size_only(
    above: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = hostile.constant("w", np.zeros((512, 1024)), np.float32)
    monkeypatch.setitem(files.rewrite.__kwdefaults__, "external_above", (2 << 20) - above)
    source = tmp_path / "model.onnx"
    source.write_bytes(hostile.in_initializer(weight).SerializeToString())
    made = wrap(source, tmp_path / "made")
    assert made.has("model.onnx.data") == above
    assert sorted(os.listdir(made.path)) == ["manifest.json", "model.onnx", *(["model.onnx.data"] if above else [])]


def test_the_stated_size_is_256_mib() -> None:
    assert files.EXTERNAL_ABOVE == 256 << 20
    assert files.rewrite.__kwdefaults__["external_above"] == files.EXTERNAL_ABOVE


@pytest.mark.parametrize("verb", ["convert", "simplify"])
def test_external_data_of_a_small_model_moves_into_its_one_file(
    verb: str, tmp_path: Path, modelops: Callable[..., object]
) -> None:
    (tmp_path / "weights.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    source = tmp_path / "model.onnx"
    source.write_bytes(hostile.in_initializer(hostile.external("t", "weights.bin")).SerializeToString())
    done = modelops(verb, source, tmp_path / "made", *(["--engine", "onnxruntime"] if verb == "simplify" else []))
    assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
    assert "model.onnx.data" not in os.listdir(tmp_path / "made")
