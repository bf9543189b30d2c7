"""What every test may use: a cache of its own, a plugin on the path, and the smallest models."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parent / "plugin"
sys.path.insert(0, str(PLUGIN))
os.environ["PYTHONPATH"] = os.pathsep.join(part for part in (str(PLUGIN), os.environ.get("PYTHONPATH", "")) if part)
# Colours and terminal widths of the machine must not change what a command prints.
os.environ["NO_COLOR"] = "1"
os.environ["COLUMNS"] = "120"


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    os.environ["MODELOPS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield


@pytest.fixture(scope="session")
def modelops() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line in a process of its own: ``modelops("inspect", path)``."""

    def call(*words: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "modelops.cli.main", *map(str, words)],
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            timeout=300,
            check=False,
        )

    return call


def linear_onnx(path: Path, *, features: int = 8, classes: int = 4, seed: int = 0) -> Path:
    """A two-layer perceptron with a dynamic batch, written as a bare .onnx file."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper, save

    rng = np.random.default_rng(seed)
    weights = {
        "w1": rng.normal(size=(features, 16)).astype(np.float32),
        "b1": rng.normal(size=16).astype(np.float32),
        "w2": rng.normal(size=(16, classes)).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h0"], name="first"),
        helper.make_node("Add", ["h0", "b1"], ["h1"], name="bias"),
        helper.make_node("Relu", ["h1"], ["h2"], name="relu"),
        helper.make_node("MatMul", ["h2", "w2"], ["y"], name="second"),
    ]
    graph = helper.make_graph(
        nodes,
        "perceptron",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", classes])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@pytest.fixture(scope="session")
def write_perceptron() -> Callable[..., Path]:
    """Writes such a file where it is told to."""
    return linear_onnx


@pytest.fixture
def perceptron(tmp_path: Path) -> Path:
    """A bare .onnx file."""
    return linear_onnx(tmp_path / "perceptron.onnx")
