"""simplify publishes what is proven to do the same; engines that crash, hang or err cost nothing but themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from modelops.core.artifact import Artifact, drafting
from modelops.core.report import Report
from modelops.errors import ModelOpsError, ResourceExhausted, StageFailed, UsageError
from modelops.graphs.describe import signature, summary
from modelops.graphs.wrap import wrap
from modelops.stages.simplify import Simplify


def wordy(path: Path, *, width: int = 8) -> Path:
    """A two-layer perceptron with weights that are turned around at run time."""
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(width, width)).astype(np.float32) for name in ("w", "v")}
    nodes = [
        helper.make_node("Transpose", ["w"], ["w1"], name="turn", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "w1"], ["h"], name="first"),
        helper.make_node("Identity", ["h"], ["h1"], name="same"),
        helper.make_node("Relu", ["h1"], ["h2"], name="relu"),
        helper.make_node("MatMul", ["h2", "v"], ["y"], name="second"),
    ]
    graph = helper.make_graph(
        nodes,
        "wordy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", width])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Artifact:
    return wrap(wordy(tmp_path / "source.onnx"), tmp_path / "source")


@contextmanager
def simplified(source: Artifact, **options: Any) -> Iterator[tuple[Report, Path]]:
    with drafting(source.path.parent / "out") as publication:
        report = Simplify.parse(options).run(source, publication.draft)
        yield report, publication.draft.path / "model.onnx"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a library of that name, with this body of its main function, in front of the real one."""

    def write(name: str, body: str) -> None:
        folder = tmp_path / "fake"
        folder.mkdir(exist_ok=True)
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        verb = {"onnxsim": "simplify", "onnxslim": "slim"}[name]
        (folder / f"{name}.py").write_text(f"def {verb}(source, **options):\n{lines}\n")
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("PYTHONPATH", str(folder))

    return write


CHANGED = """
import onnx
from onnx import numpy_helper
model = onnx.load(source)
array = numpy_helper.to_array(model.graph.initializer[0]) * 1.001
model.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "w"))
model.graph.node.remove(model.graph.node[2])
model.graph.node[2].input[0] = "h"
return model
"""
GROWN = """
import onnx, numpy
from onnx import numpy_helper
model = onnx.load(source)
model.graph.initializer.append(numpy_helper.from_array(numpy.ones((300, 300), "float32"), "copy"))
return model
"""
FIXED_BATCH = """
import onnx
model = onnx.load(source)
model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
return model
"""


def test_result_is_smaller_and_proven(source: Artifact) -> None:
    with simplified(source, engine="onnxslim") as (report, model):
        assert report, report.worst()
        assert summary(model)["nodes"] < summary(source.model)["nodes"]
        assert {"signature", "y.sqnr", "size"} <= {check.name for check in report.checks}
        assert report.details["operators"]["Transpose"] == [1, 0]
        assert signature(model) == source.signature


def test_same_source_gives_same_bytes(source: Artifact) -> None:
    with simplified(source, engine="onnxscript") as (_, model):
        one = model.read_bytes()
    with simplified(source, engine="onnxscript") as (_, model):
        assert one == model.read_bytes()


def test_auto_keeps_the_simplest_valid_result(source: Artifact, fake: Callable[[str, str], None]) -> None:
    fake("onnxslim", CHANGED)
    with simplified(source, engine={"name": "auto", "engines": ["onnxslim", "onnxscript"]}) as (report, model):
        assert report
        outcomes = {item["engine"]: item["outcome"] for item in report.details["attempts"]}
        assert outcomes == {"onnxslim": "refused", "onnxscript": "valid"}
        assert report.details["chosen"] == "onnxscript"
        assert summary(model)["nodes"] < summary(source.model)["nodes"]


def test_auto_keeps_the_source_when_nothing_is_better(source: Artifact, fake: Callable[[str, str], None]) -> None:
    fake("onnxslim", "import os; os.abort()")
    with simplified(source, engine={"name": "auto", "engines": ["onnxslim"]}) as (report, model):
        assert report
        assert report.details["kept_source"]
        assert "StageFailed" not in report.notes[0] and "crashed (SIGABRT)" in report.notes[0]
        assert report.notes[-1].endswith("the source is kept as it is")
        assert model.read_bytes() == source.model.read_bytes()


@pytest.mark.parametrize(
    ("body", "error", "text"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", StageFailed, r"onnxslim crashed \(SIGSEGV\)"),
        ("import time; time.sleep(100)", ResourceExhausted, "onnxslim took longer than 3 s"),
        ("raise ValueError('bad graph')", StageFailed, "onnxslim failed: ValueError: bad graph"),
        ("import os; os._exit(0)", StageFailed, "onnxslim crashed"),
        ("hog = b'1' * (3 << 30); import time; time.sleep(9)", ResourceExhausted, "more than 1.0 GiB of memory"),
    ],
    ids=["segfault", "hang", "exception", "quiet exit", "memory"],
)
def test_broken_engine_is_one_clear_error(
    body: str, error: type[ModelOpsError], text: str, source: Artifact, fake: Callable[[str, str], None]
) -> None:
    fake("onnxslim", body)
    seconds = 3.0 if "longer" in text else 30.0
    with (
        pytest.raises(error, match=text),
        simplified(source, engine="onnxslim", engine_time=seconds, engine_memory=1 << 30),
    ):
        pass
    assert not list(source.path.parent.glob(".out*"))


@pytest.mark.parametrize(
    ("body", "check"),
    [(CHANGED, "y.sqnr"), (GROWN, "size"), (FIXED_BATCH, "signature")],
    ids=["changed outputs", "grew", "fixed a dynamic dimension"],
)
def test_result_that_is_not_the_same_fails_its_gate(
    body: str, check: str, source: Artifact, fake: Callable[[str, str], None]
) -> None:
    fake("onnxslim", body)
    with simplified(source, engine="onnxslim") as (report, _):
        assert report.exit_code == 1
        assert check in {found.name for found in report.checks if found.verdict == "fail"}


def test_unknown_engine_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="onnxslm"):
        Simplify.parse({"engine": "onnxslm"})


def test_auto_refuses_to_try_an_engine_that_does_not_exist(source: Artifact) -> None:
    with pytest.raises(UsageError), simplified(source, engine={"name": "auto", "engines": ["onnxslim+onnxsin"]}):
        pass
