"""--data as a source of inputs: real rows are checked, and tell what a module takes where nothing else does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from modelops.core.artifact import Draft
from modelops.core.tensors import Signature, TensorSpec
from modelops.errors import InputRefused, StageFailed, UsageError
from modelops.graphs import reference
from modelops.graphs.describe import signature
from modelops.stages import REGISTRY
from modelops.stages._given import Given, described

NETS = Path(__file__).with_name("nets.py")


def convert(folder: Path, source: str, **options):
    folder.mkdir(exist_ok=True)
    stage = REGISTRY.load("convert").parse({"exporter": "torchscript", **options})
    report = stage.run(source, Draft(folder))
    found = signature(folder / "model.onnx")
    return report, " ".join(map(str, found.inputs))


def _pickled(folder: Path, module: torch.nn.Module) -> str:
    torch.save(module.eval(), folder / "net.pth")
    return str(folder / "net.pth")


def _lines(path: Path, lengths: list[int]) -> Path:
    random = np.random.default_rng(0)
    rows = [{"tokens": random.integers(0, 30, n).tolist()} for n in lengths]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_pickled_module_takes_its_inputs_from_data(tmp_path):
    torch.manual_seed(0)
    source = _pickled(tmp_path, torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh()))
    rows = np.random.default_rng(0).uniform(5, 9, (40, 4))  # numpy's own float64
    np.savez(tmp_path / "d.npz", input=rows, labels=np.arange(40))
    report, form = convert(tmp_path / "out", source, allow_code=True, data=tmp_path / "d.npz")
    assert report.verdict == "pass" and form == "input:float32[batch,4]"
    cases = reference.read(tmp_path / "out" / "reference.npz")
    np.testing.assert_array_equal(cases[0].feed["input"], rows[:32].astype(np.float32))
    assert cases[1].feed["input"].min() >= 5  # corners are made up, like the samples
    assert "the first 32 samples of --data are in reference.npz" in report.notes


def test_dimensions_in_which_samples_differ_are_dynamic(tmp_path):
    data = _lines(tmp_path / "d.jsonl", [5, 5, 9, 7, 7, 12])
    report, form = convert(tmp_path / "out", f"{NETS}:tagger_alone", data=data)
    assert report.verdict == "pass" and form == "tokens:int64[batch,tokens_dim1]"
    rows = [case for case in reference.read(tmp_path / "out" / "reference.npz") if case.is_rows]
    # Without a mask only samples of one length share a feed; the rest of the 32 rows is made up.
    assert [case.feed["tokens"].shape for case in rows[:4]] == [(2, 5), (1, 9), (2, 7), (1, 12)]
    assert sum(len(case.feed["tokens"]) for case in rows) == 32


def test_samples_are_checked_instead_of_what_the_source_gives(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.full((33, 4), 7, np.float32) + np.eye(33, 4, dtype=np.float32))
    report, form = convert(tmp_path / "out", f"{NETS}:linear", data=tmp_path / "d.npz")
    assert report.verdict == "pass" and form == "x:float32[batch,4]"
    assert reference.read(tmp_path / "out" / "reference.npz")[0].feed["x"].min() == 7


def test_static_takes_the_size_of_the_samples(tmp_path):
    data = _lines(tmp_path / "d.jsonl", [5] * 32)
    report, form = convert(tmp_path / "out", f"{NETS}:tagger_alone", data=data, static=True)
    assert report.verdict == "pass" and form == "tokens:int64[1,5]"


def test_a_function_that_gives_samples_is_recorded(tmp_path):
    (tmp_path / "d.py").write_text(
        "import numpy as np\ndef rows():\n    for n in range(32):\n        yield {'x': np.arange(4.0) + n}, n\n"
    )
    data = Path(f"{tmp_path / 'd.py'}:rows")
    report, _ = convert(tmp_path / "out", f"{NETS}:linear", data=data)
    assert str(tmp_path / "d.py") in {entry["path"] for entry in report.details["code_executed"]}
    assert REGISTRY.load("convert").parse({"data": data}).limits_on("m.onnx", 0).wall_seconds == 3600


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"y": np.zeros((32, 4), np.float32)}, "'y' is not an input of the model"),
        ({"x": np.zeros((32, 5), np.float32)}, r"'x' has the shape \[5\], the model takes \[4\]"),
        ({"x": np.full((32, 4), np.nan, np.float32)}, "holds nan"),
        ({"x": np.zeros((0, 4), np.float32)}, "holds no samples"),
    ],
)
def test_samples_that_do_not_fit_are_refused(tmp_path, arrays, said):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(InputRefused, match=said):
        convert(tmp_path / "out", f"{NETS}:linear", data=tmp_path / "d.npz")


def test_samples_that_the_module_refuses_are_told(tmp_path):
    np.savez(tmp_path / "d.npz", tokens=np.full((32, 6), 99))
    with pytest.raises(StageFailed, match="running the module on the samples of --data"):
        convert(tmp_path / "out", f"{NETS}:tagger", data=tmp_path / "d.npz", input=["tokens:int64[batch,time]"])


def test_data_that_names_no_input_needs_the_flag(tmp_path):
    with pytest.raises(UsageError, match="does not tell what the model takes") as caught:
        convert(tmp_path / "out", f"{NETS}:cnn_alone", data=Path("random:32"))
    assert "--input" in caught.value.hint
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InputRefused, match="a text does not tell what the model takes"):
        convert(tmp_path / "out", f"{NETS}:cnn_alone", data=tmp_path / "d.jsonl")
    report, _ = convert(tmp_path / "out", f"{NETS}:cnn_alone", data=Path("random:32"), input=["x:float32[batch,1,8,8]"])
    assert report.verdict == "pass"
    with pytest.raises(UsageError, match="--dataset npz needs --data"):
        convert(tmp_path / "out", f"{NETS}:linear", dataset={"name": "npz"})


def test_onnx_files_are_run_on_samples_too(tmp_path, perceptron):
    rows = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=rows)
    stage = REGISTRY.load("convert").parse({"data": tmp_path / "d.npz", "opset": 21})
    (tmp_path / "out").mkdir()
    assert stage.run(str(perceptron), Draft(tmp_path / "out")).verdict == "pass"
    cases = reference.read(tmp_path / "out" / "reference.npz")
    np.testing.assert_array_equal(cases[0].feed["x"], rows)
    assert sum(len(case.feed["x"]) for case in cases if case.is_rows) == 32


def test_what_varies_alike_is_one_dimension():
    feeds = [{"ids": np.zeros(n), "mask": np.zeros(n, bool), "image": np.zeros((3, 2 * n))} for n in (4, 6)]
    assert described(feeds, "d", double=False, static=False) == (
        TensorSpec("ids", "float32", ("batch", "ids_dim1")),
        TensorSpec("mask", "bool", ("batch", "ids_dim1")),
        TensorSpec("image", "float32", ("batch", 3, "image_dim2")),
    )
    with pytest.raises(InputRefused, match="sample 1 has other inputs than the first one"):
        described([{"a": np.zeros(2)}, {"b": np.zeros(2)}], "d", double=False, static=False)


def test_no_more_samples_are_read_than_are_checked(tmp_path):
    (tmp_path / "d.py").write_text("def rows():\n    for n in range(10**9):\n        yield {'x': [float(n)]}\n")
    given = Given.of(Path(f"{tmp_path / 'd.py'}:rows"), None, 5)
    assert len(given.samples(Signature((TensorSpec("x", "float32", ("batch", 1)),), ()))) == 5
