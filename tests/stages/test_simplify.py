"""simplify publishes what is proven to do the same; engines that crash, hang or err cost nothing but themselves."""

from __future__ import annotations

import time
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
from modelops.pipeline import Surroundings, run_stage
from modelops.simplifiers import REGISTRY
from modelops.stages import _opset
from modelops.stages._engine import EngineBench
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
TOO_SHORT = """
import onnx
model = onnx.load(source)
for node in list(model.graph.node)[1:]:
    model.graph.node.remove(node)
model.graph.node[0].CopyFrom(onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="all"))
return model
"""
GROWN = """
import onnx, numpy
from onnx import numpy_helper
model = onnx.load(source)
model.graph.initializer.append(numpy_helper.from_array(numpy.ones((300, 300), "float32"), "copy"))
return model
"""
RENAMED = """
import onnx
model = onnx.load(source)
for number, node in enumerate(model.graph.node):
    node.name = f"n{number}"
    for names in (node.input, node.output):
        for place, name in enumerate(names):
            names[place] = name if name in "xy" else "_" + name
for tensor in model.graph.initializer:
    tensor.name = "_" + tensor.name
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
    fake("onnxslim", TOO_SHORT)
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


def test_auto_takes_the_same_graph_with_other_names_for_no_better_one(
    source: Artifact, fake: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("onnxslim", RENAMED)
    monkeypatch.setattr(EngineBench, "judge", lambda *_: pytest.fail("there is nothing to judge"))
    with simplified(source, engine={"name": "auto", "engines": ["onnxslim"]}) as (report, _):
        assert report and report.details["kept_source"]
        assert report.details["attempts"][0]["reason"] == "the same graph"


def test_auto_takes_the_same_graph_in_a_smaller_file(tmp_path: Path, fake: Callable[[str, str], None]) -> None:
    model = onnx.load(wordy(tmp_path / "source.onnx"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones((300, 300), np.float32), "unused"))
    onnx.save(model, tmp_path / "source.onnx")
    fake("onnxslim", "import onnx\nmodel = onnx.load(source)\ndel model.graph.initializer[-1]\nreturn model")
    with simplified(
        wrap(tmp_path / "source.onnx", tmp_path / "source"), engine={"name": "auto", "engines": ["onnxslim"]}
    ) as (report, result):
        assert report and report.details["chosen"] == "onnxslim"
        assert result.stat().st_size < 10_000


@pytest.mark.parametrize("engine", [name for name in REGISTRY.names() if name != "auto"])
def test_an_engine_leaves_nothing_beside_its_model(source: Artifact, engine: str) -> None:
    with simplified(source, engine=engine) as (_, model):
        assert {place.name for place in model.parent.iterdir()} == {"model.onnx"}


@pytest.mark.parametrize(
    ("body", "error", "text"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", StageFailed, r"onnxslim crashed \(SIGSEGV\)"),
        ("import time; time.sleep(100)", ResourceExhausted, "onnxslim took longer than 4 s"),
        ("while True: pass", ResourceExhausted, r"onnxslim took (more than 1 s of CPU time|longer)"),
        ("raise ValueError('bad graph')", StageFailed, "onnxslim failed: ValueError: bad graph"),
        ("import os; os._exit(0)", StageFailed, "onnxslim crashed"),
        ("hog = b'1' * (3 << 30); import time; time.sleep(9)", ResourceExhausted, "more than 1.0 GiB of memory"),
    ],
    ids=["segfault", "hang", "busy loop", "exception", "quiet exit", "memory"],
)
def test_broken_engine_is_one_clear_error(
    body: str, error: type[ModelOpsError], text: str, source: Artifact, fake: Callable[[str, str], None]
) -> None:
    fake("onnxslim", body)
    seconds = 1.0 if "took" in text else 30.0
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


def test_an_engine_is_held_to_what_the_pipeline_allows(source: Artifact, fake: Callable[[str, str], None]) -> None:
    fake("onnxslim", "import time; time.sleep(100)")
    stage = Simplify.parse({"engine": {"name": "auto", "engines": ["onnxslim", "onnxscript"]}})
    started = time.monotonic()
    outcome = run_stage(stage, str(source.path), source.path.parent / "out", surroundings=Surroundings(time_limit=20.0))
    assert outcome.exit_code == 0 and time.monotonic() - started < 20
    found = {item["engine"]: item for item in outcome.report.details["attempts"]}
    assert found["onnxslim"]["outcome"] == "resource-exhausted" and found["onnxscript"]["outcome"] == "valid"


def test_an_engine_that_would_not_fit_is_named_and_not_run(source: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REGISTRY.load("onnxslim"), "appetite", 1e9)
    with simplified(source, engine={"name": "auto", "engines": ["onnxslim", "onnxscript"]}) as (report, _):
        assert report.details["attempts"][0]["outcome"] == "resource-exhausted"
        assert "onnxslim would need about" in report.notes[0]
        assert report.details["chosen"] == "onnxscript"


def test_engines_run_side_by_side(source: Artifact, fake: Callable[[str, str], None], tmp_path: Path) -> None:
    wait = f"""
import pathlib, time
mine, other = pathlib.Path(r"{tmp_path}") / "NAME", pathlib.Path(r"{tmp_path}") / "OTHER"
mine.touch()
for _ in range(200):
    if other.exists():
        break
    time.sleep(0.05)
else:
    raise TimeoutError("the other engine never ran at the same time")
raise ValueError("met")
"""
    fake("onnxslim", wait.replace("NAME", "a").replace("OTHER", "b"))
    fake("onnxsim", wait.replace("NAME", "b").replace("OTHER", "a"))
    with simplified(source, engine={"name": "auto", "engines": ["onnxslim", "onnxsim"]}) as (report, _):
        assert [("met" in item["reason"]) for item in report.details["attempts"]] == [True, True]


@pytest.mark.parametrize(("text", "code"), [("MatMul>=2", 0), ("Transpose==0", 0), ("Mat*>2", 1), ("Attention>=6", 1)])
def test_expectations_are_gates(source: Artifact, text: str, code: int) -> None:
    with simplified(source, engine="onnxscript", expect=[text]) as (report, _):
        assert report.exit_code == code
        assert any(check.name.startswith("expect.") for check in report.checks)


def test_an_expectation_that_can_not_be_read_is_a_usage_error(source: Artifact) -> None:
    with pytest.raises(UsageError, match="Attention~6"), simplified(source, expect=["Attention~6"]):
        pass


def test_opset_is_raised_first_and_the_result_proven(source: Artifact) -> None:
    with simplified(source, engine="onnxscript", opset=21) as (report, model):
        assert report, report.worst()
        assert summary(model)["opsets"][""] == 21
        assert {"signature", "y.sqnr"} <= {check.name for check in report.checks}


def test_an_opset_that_does_not_exist_is_a_usage_error(source: Artifact) -> None:
    with pytest.raises(UsageError, match="opset 999"), simplified(source, opset=999):
        pass


def test_slopes_of_prelu_lie_along_the_channels_after_the_upgrade(tmp_path: Path) -> None:
    slope = np.array([0.1, 0.2, 0.3], np.float32)
    graph = helper.make_graph(
        [helper.make_node("PRelu", ["x", "slope"], ["y"])],
        "old",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 3]),
            helper.make_tensor_value_info("slope", TensorProto.FLOAT, [3]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3, 3])],
        [numpy_helper.from_array(slope, "slope")],
    )
    old, new = tmp_path / "old.onnx", tmp_path / "new.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 6)], ir_version=3), old)
    assert _opset.convert(str(old), str(new), 13)["notes"]
    import onnxruntime as ort

    x = np.random.default_rng(0).normal(size=(2, 3, 3)).astype(np.float32)
    (found,) = ort.InferenceSession(str(new), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    assert np.allclose(found, np.where(x < 0, x * slope[:, None], x))


def test_inputs_that_nothing_reads_are_named(tmp_path: Path) -> None:
    model = onnx.load(wordy(tmp_path / "plain.onnx"))
    model.graph.input.append(helper.make_tensor_value_info("spare", TensorProto.FLOAT, ["batch", 1]))
    onnx.save(model, tmp_path / "spare.onnx")
    artifact = wrap(tmp_path / "spare.onnx", tmp_path / "spare")
    with simplified(artifact, engine="onnxscript") as (report, _):
        assert "nothing reads the input spare" in report.notes
