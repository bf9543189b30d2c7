"""What users get wrong most, and what a converter gets wrong worst: each has its one error, and its exit code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from modelops.core.artifact import Draft
from modelops.errors import ModelOpsError
from modelops.stages import REGISTRY, _from_torch

NETS = Path(__file__).with_name("nets.py")


@pytest.fixture
def convert(tmp_path):
    def run(name, **options):
        (tmp_path / "out").mkdir(exist_ok=True)
        stage = REGISTRY.load("convert").parse({"exporter": "torchscript", **options})
        return stage.run(f"{NETS}:{name}", Draft(tmp_path / "out"))

    return run


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gate": ["output.sqnr>=many"]}, "many"),
        ({"gate": ["output.exactness>=1"]}, "exactness"),
        ({"input": ["x:float32[batch,5]"]}, r"x:float32\[batch,5\], the example input is"),
        ({"input": ["x:float32[batch]"]}, r"x:float32\[batch\], the example input is"),
    ],
)
def test_a_tolerance_or_a_shape_that_is_wrong_is_a_usage_error(convert, options, said):
    with pytest.raises(ModelOpsError, match=said) as caught:
        convert("linear", **options)
    assert (caught.value.exit_code, caught.value.code) == (2, "usage") and caught.value.hint


@pytest.mark.parametrize("gate", ["output.sqnr>=300", "output.max_scaled<=1e-12"])
def test_a_tolerance_that_no_export_meets_fails_with_its_figure(convert, gate):
    report = convert("linear", gate=[gate])
    assert report.exit_code == 1 and "needs" in report.worst().message
    assert sum(check.verdict == "fail" for check in report.checks if check.name.startswith("output.")) == 1


@pytest.mark.parametrize("figure", ["bias", "weight"])
def test_an_export_with_wrong_numbers_fails_and_names_the_output(convert, figure, monkeypatch):
    write = _from_torch._written

    def wrong(model, target):
        value = next(each for name, each in model.graph.initializers.items() if figure in name)
        array = value.const_value.numpy().copy()
        array.flat[0] += 1e-3
        value.const_value = onnx_ir.tensor(array, name=value.name)
        return write(model, target)

    monkeypatch.setattr(_from_torch, "_written", wrong)
    report = convert("linear")
    assert report.exit_code == 1 and report.worst().message.startswith("output: ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("linear.bias"), r"missing: linear\.bias"),
        (lambda state: state.update({"linear.extra": torch.ones(4)}), r"unexpected: linear\.extra"),
        (lambda state: state.update({"linear.bias": torch.ones(5)}), r"linear\.bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(convert, change, said, tmp_path):
    state = {"linear.weight": torch.eye(4), "linear.bias": torch.arange(4.0)}
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ModelOpsError, match=said) as caught:
        convert("linear", weights=tmp_path / "w.safetensors")
    assert (caught.value.exit_code, caught.value.code) == (4, "input-refused")


def test_a_model_with_dropout_in_training_mode_is_converted_as_it_evaluates(convert, tmp_path):
    report = convert("cnn")
    assert report.exit_code == 0
    assert "the module was in training mode: it was put in eval mode" in report.notes
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    feed = {"x": np.ones((3, 1, 8, 8), np.float32)}
    np.testing.assert_array_equal(session.run(None, feed)[0], session.run(None, feed)[0])


def test_dropout_that_stays_on_in_eval_mode_is_one_error(convert):
    with pytest.raises(ModelOpsError, match="differs between two runs on the same input") as caught:
        convert("only_Dropped")
    assert caught.value.exit_code == 5 and "dropout" in caught.value.hint
