"""Backends: every one that is here gives the same outputs; those that are not say what would help."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelops.backends import REGISTRY, Backend, Module, Session, require_usable
from modelops.core import machine
from modelops.core.component import options_of
from modelops.errors import EnvironmentMissing, StageFailed, UsageError

X = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)


def backend(name: str, **options: Any) -> Backend:
    return REGISTRY.load(name).parse(options)


def usable(name: str, **options: Any) -> Backend:
    """The backend, or the test is skipped with the reason that it gives."""
    if not all(map(find_spec, REGISTRY.load(name).requires)):
        pytest.skip(f"{name} is not installed")
    found = backend(name, **options)
    if reason := found.missing():
        pytest.skip(reason)
    return found


ONNX_ON_CPU = ["onnxruntime-cpu", "openvino-cpu"]


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory, write_perceptron: Callable[..., Path]) -> tuple[Path, Any]:
    """A model, and its outputs for X by numpy."""
    import onnx
    from onnx import numpy_helper

    path = write_perceptron(tmp_path_factory.mktemp("model") / "model.onnx")
    w = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    return path, np.maximum(X @ w["w1"] + w["b1"], 0) @ w["w2"]


@pytest.mark.parametrize("name", ONNX_ON_CPU)
def test_outputs_are_right(name: str, right: tuple[Path, Any]) -> None:
    with usable(name, threads=1).open(right[0]) as session:
        np.testing.assert_allclose(session.run({"x": X})["y"], right[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ONNX_ON_CPU)
def test_a_prepared_call_gives_the_same_again_and_again(name: str, right: tuple[Path, Any]) -> None:
    with usable(name, threads=1).open(right[0]) as session:
        call = session.prepare({"x": X})
        first = call.outputs(call.once())["y"].copy()
        session.run({"x": -X})
        np.testing.assert_array_equal(call.outputs(call.once())["y"], first)


@pytest.mark.parametrize("name", [*ONNX_ON_CPU, "null"])
def test_inputs_of_other_names_are_refused(name: str, right: tuple[Path, Any]) -> None:
    with usable(name).open(right[0]) as session, pytest.raises(UsageError, match="takes x; it was given z"):
        session.run({"z": X})


@pytest.mark.parametrize("name", [*ONNX_ON_CPU, "null"])
def test_signatures_name_inputs_and_outputs(name: str, right: tuple[Path, Any]) -> None:
    with usable(name).open(right[0]) as session:
        [x], [y] = session.signature.inputs, session.signature.outputs
    assert (x.name, x.dtype, x.shape[1], y.name, y.dtype, y.shape[1]) == ("x", "float32", 8, "y", "float32", 4)
    assert isinstance(x.shape[0], str)


@pytest.mark.parametrize("name", ONNX_ON_CPU)
def test_a_file_that_is_no_model_fails_the_stage(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(StageFailed):
        usable(name).open(tmp_path / "model.onnx")


@pytest.mark.parametrize("name", ONNX_ON_CPU)
@pytest.mark.parametrize("threads", [0, 1])
def test_threads_are_those_asked_for_or_those_that_may_be_used(
    name: str, threads: int, right: tuple[Path, Any]
) -> None:
    with usable(name, threads=threads).open(right[0]) as session:
        assert session.facts()["threads"] == (threads or machine.usable_cpus())


@pytest.mark.parametrize("options", [{"optimization": "none"}, {"spinning": False}, {"arena": False}])
def test_options_of_onnxruntime_reach_it(options: dict[str, Any], right: tuple[Path, Any]) -> None:
    from modelops.backends._sessions import onnxruntime_options

    found = onnxruntime_options(**{"threads": 1, "optimization": "all", "spinning": True, "arena": True, **options})

    assert found.enable_cpu_mem_arena == options.get("arena", True)
    assert found.get_session_config_entry("session.intra_op.allow_spinning") == str(int(options.get("spinning", True)))
    assert found.graph_optimization_level.name.endswith("DISABLE_ALL") == ("optimization" in options)
    with backend("onnxruntime-cpu", threads=1, **options).open(right[0]) as session:
        np.testing.assert_allclose(session.run({"x": X})["y"], right[1], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not find_spec("openvino"), reason="openvino is not installed")
@pytest.mark.parametrize(("precision", "wanted"), [("f32", "float32"), ("bf16", "bfloat16")])
def test_openvino_computes_in_the_precision_asked_for(precision: str, wanted: str, right: tuple[Path, Any]) -> None:
    if precision == "bf16" and not {"avx512_bf16", "amx_bf16"} & set(machine.cpu_features()):
        pytest.skip("this CPU has no bfloat16 instructions")
    chosen = backend("openvino-cpu", precision=precision)
    with chosen.open(right[0]) as session:
        assert wanted in session.facts()["inference_precision_hint"].replace("<Type: '", "")
    assert chosen.loses() == ("structural" if precision == "f32" else "bfloat16")


def test_null_gives_zeros_after_its_time(right: tuple[Path, Any]) -> None:
    import time

    with backend("null", microseconds=3000).open(right[0]) as session:
        call = session.prepare({"x": X})
        started = time.perf_counter()
        outputs = call.outputs(call.once())
        assert time.perf_counter() - started >= 0.003
    assert outputs["y"].shape == (3, 4) and not outputs["y"].any()


@pytest.mark.skipif(not find_spec("torch"), reason="torch is not installed")
@pytest.mark.parametrize("name", ["torch-cpu"])
def test_a_source_model_runs_in_torch(name: str, tmp_path: Path) -> None:
    from modelops.stages._source_model import open_module

    (tmp_path / "net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x, scale):\n"
        "        return {'double': x + x, 'scaled': x * scale}\n"
        "def build():\n"
        "    return Net(), {'x': torch.ones(2, 3), 'scale': torch.ones(1)}\n"
    )
    module, executed = open_module(f"{tmp_path}/net.py:build")
    feed = {"x": X, "scale": np.full(1, 3, np.float32)}

    with usable(name, threads=1).open(module) as session:
        outputs = session.run(feed)

    np.testing.assert_array_equal(outputs["double"], X + X)
    np.testing.assert_array_equal(outputs["scaled"], X * 3)
    assert [Path(entry["path"]).name for entry in executed] == ["net.py"]


def test_torch_refuses_onnx_files_and_onnxruntime_source_models(right: tuple[Path, Any]) -> None:
    if find_spec("torch"):
        with pytest.raises(UsageError, match="runs source models"):
            backend("torch-cpu").open(right[0])
    with pytest.raises(UsageError, match="runs ONNX files"):
        backend("onnxruntime-cpu").open(Module(None, lambda _: (), ()))


@pytest.mark.parametrize("name", ["onnxruntime-cuda", "torch-cuda"])
def test_a_backend_that_is_not_here_says_what_would_help(name: str, right: tuple[Path, Any]) -> None:
    chosen = backend(name)
    if not chosen.missing():
        pytest.skip("there is a CUDA device")
    with pytest.raises(EnvironmentMissing, match="can't be used here") as caught:
        require_usable(chosen)
    assert "pip" in caught.value.hint or "nvidia-smi" in caught.value.hint
    with pytest.raises(EnvironmentMissing):
        chosen.open(right[0])


def test_one_option_means_the_same_in_every_backend() -> None:
    known: dict[str, tuple[Any, ...]] = {}
    for name in REGISTRY.builtin():
        for item in options_of(REGISTRY.load(name)):
            shape = (item.type, item.default, item.choices, item.min, item.max)
            assert known.setdefault(item.name, shape) == shape, f"{name} {item.flag}"


CUDA = ["onnxruntime-cuda", "torch-cuda"]


def opened(name: str, model: Path) -> Session:
    """The perceptron on that backend: torch runs a module of the same weights."""
    chosen = usable(name)
    if chosen.opens == "onnx":
        return chosen.open(model)
    import onnx
    import torch
    from onnx import numpy_helper

    w = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in onnx.load(model).graph.initializer}

    class Perceptron(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for key, value in w.items():
                self.register_buffer(key, value)

        def forward(self, x: Any) -> tuple[Any, ...]:
            return (torch.relu(x @ self.w1 + self.b1) @ self.w2,)

    net = Perceptron()
    return chosen.open(Module(net, lambda feed: net(feed["x"]), ("x",), ("y",)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CUDA)
def test_outputs_on_the_gpu_are_right(name: str, right: tuple[Path, Any]) -> None:
    with opened(name, right[0]) as session:
        np.testing.assert_allclose(session.run({"x": X})["y"], right[1], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CUDA)
def test_the_gpu_has_a_clock_that_agrees_with_the_wall(name: str, right: tuple[Path, Any]) -> None:
    import time

    with opened(name, right[0]) as session:
        call = session.prepare({"x": X})
        assert call.timer is not None
        for _ in range(20):
            call.once()
        started = time.perf_counter_ns()
        stop = call.timer()
        for _ in range(200):
            call.once()
        device = stop()
        wall = time.perf_counter_ns() - started
    assert 0.5 * wall < device < 1.05 * wall


@pytest.mark.gpu
@pytest.mark.parametrize("name", CUDA)
def test_the_gpu_tells_its_memory_and_its_clocks(name: str, right: tuple[Path, Any]) -> None:
    with opened(name, right[0]) as session:
        session.run({"x": X})
        assert (session.device_memory_bytes() or 0) > 0
        assert session.facts()["device"]["name"]


@pytest.mark.parametrize(("op", "inputs", "output", "wanted"), [
    ("MatMul", [[2, 3, 8], [8, 5]], [2, 3, 5], 2 * 3 * 5 * 8),
    ("Gemm", [[4, 8]], [4, 5], 4 * 5 * 8),
    ("Gemm", [[8, 4]], [4, 5], 4 * 5 * 8),  # its input transposed
    ("ConvTranspose", [[1, 4, 9, 9], [4, 6, 3, 3]], [1, 6, 11, 11], 4 * 9 * 9 * 6 * 9),
    ("LSTM", [[7, 2, 3], [1, 20, 3], [1, 20, 5]], [7, 1, 2, 5], 7 * 2 * 20 * (3 + 5)),
    ("LSTM", [[7, 2, 3], [], []], [7, 1, 2, 5], None),
    ("Conv", [[1, 4, 9, 9], [6, 4, 3, 3], [6]], [1, 6, 7, 7], 6 * 7 * 7 * 4 * 9),
    ("Conv", [[1, 4, 9, 9], [4, 1, 3, 3]], [1, 4, 7, 7], 4 * 7 * 7 * 9),
    ("QLinearConv", [[1, 4, 9, 9], []], [1, 6, 7, 7], None),
    ("Relu", [[4, 5]], [4, 5], 0),
    ("MultiHeadAttention", [[4, 5, 6]], [4, 5, 6], None),
])  # fmt: skip
def test_the_work_of_a_node_follows_from_its_shapes(
    op: str, inputs: list[list[int]], output: list[int], wanted: int | None
) -> None:
    from modelops.backends._node_times import macs

    assert macs(op, [("float", shape) for shape in inputs], [("float", output)]) == wanted


def test_macs_are_counted_on_the_graph_as_it_stands(right: tuple[Path, Any], tmp_path: Path) -> None:
    from modelops.backends._counting import counted_macs

    assert counted_macs(right[0], {"x": X}, tmp_path) == 3 * (8 * 16 + 16 * 4)
    assert counted_macs(right[0], {"x": X[:, :5]}, tmp_path) is None  # it can't be run
