"""An .onnx file is held against itself as it came, byte for byte, and not against our own copy of it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from modelops.core.artifact import Draft
from modelops.errors import InputRefused, StageFailed
from modelops.graphs import reference
from modelops.graphs.files import copied
from modelops.stages import REGISTRY, _from_onnx

GRAPH = """<ir_version: 10, opset_import: ["" : 18]>
g (float[batch, 4] x) => (float[batch, 4] y) <float[4] w = {1, 2, 3, 4}> { y = %s }"""


@pytest.fixture
def convert(tmp_path):
    def converted(body="Mul(x, w)", **options):
        onnx.save(onnx.parser.parse_model(GRAPH % body), tmp_path / "m.onnx")
        (tmp_path / "out").mkdir()
        return REGISTRY.load("convert").parse(options).run(str(tmp_path / "m.onnx"), Draft(tmp_path / "out"))

    return converted


def test_what_is_written_gives_the_very_outputs_of_the_file_as_it_came(convert, tmp_path):
    report = convert()
    assert report.verdict == "pass"
    assert [check.message for check in report.checks] == [
        "onnxruntime runs the model at 2 shapes, with the very outputs of the file as it came"
    ]
    for case in reference.read(tmp_path / "out" / "reference.npz"):
        np.testing.assert_array_equal(case.outputs["y"], case.feed["x"] * np.float32([1, 2, 3, 4]))


@pytest.mark.parametrize("options", [{}, {"opset": 21}, {"gate": ("y.sqnr>=100",)}], ids=["as is", "opset", "gate"])
def test_a_copy_that_is_another_model_fails(convert, monkeypatch, options):
    rewrite = _from_onnx.rewrite

    def wrong(source, target):
        notes = rewrite(source, target)
        model = onnx.load(target)
        model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.float32([1, 2, 3.001, 4]), "w"))
        onnx.save(model, target)
        return notes

    monkeypatch.setattr(_from_onnx, "rewrite", wrong)
    report = convert(**options)
    assert report.exit_code == 1 and report.worst().name in ("y.sqnr", "y.max_scaled")


def test_a_file_that_runs_only_as_we_write_it_says_so(convert, monkeypatch):
    running = _from_onnx.running

    def refusing(model, *rest):
        if model.parent.name == "came":
            raise StageFailed("no kernel")
        return running(model, *rest)

    monkeypatch.setattr(_from_onnx, "running", refusing)
    report = convert()
    assert report.verdict == "pass" and "as it came" not in report.checks[0].message
    assert "as the file came, no kernel" in " ".join(report.notes)


def test_a_copy_has_the_same_bytes_and_of_external_data_what_is_used(tmp_path):
    weight = onnx.TensorProto(name="w", dims=[4], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", "deep/w.bin"), ("offset", "8"), ("length", "16")):
        weight.external_data.add(key=key, value=value)
    model = onnx.parser.parse_model(GRAPH % "Mul(x, w)")
    model.graph.initializer[0].CopyFrom(weight)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "w.bin").write_bytes(bytes(range(24)) + b"unused")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    copy = copied(tmp_path / "m.onnx", tmp_path / "copy")
    assert copy.read_bytes() == (tmp_path / "m.onnx").read_bytes()
    assert (copy.parent / "deep" / "w.bin").read_bytes() == bytes(range(24))


def test_a_file_that_may_not_get_in_is_not_copied(tmp_path):
    weight = onnx.TensorProto(name="w", dims=[4], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="../secret")
    model = onnx.parser.parse_model(GRAPH % "Mul(x, w)")
    model.graph.initializer[0].CopyFrom(weight)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputRefused, match="leaves the model's directory"):
        copied(tmp_path / "m.onnx", tmp_path / "copy")
    assert not list((tmp_path / "copy").iterdir())
