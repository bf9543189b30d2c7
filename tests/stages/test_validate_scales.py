"""What only inputs of other scales show, and what a report says of extreme ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from modelops.core.artifact import Artifact, drafting
from modelops.core.report import Report
from modelops.errors import Inconclusive
from modelops.graphs.wrap import wrap
from modelops.measures.comparison import Comparison
from modelops.stages import _scales
from modelops.stages._compare import structural_checks
from modelops.stages.validate import Validate

WIDTH = 16


def model(place: Path, epsilon: float = 1e-5, bound: float = 12.0) -> Artifact:
    """A normalization of what was clipped, of a product of the input."""
    weight = np.random.default_rng(3).normal(size=(WIDTH, WIDTH)).astype(np.float32) / 4
    weights = {"w": weight, "one": np.ones(WIDTH, np.float32), "low": np.float32(-12.0), "high": np.float32(bound)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Clip", ["h", "low", "high"], ["c"]),
        helper.make_node("LayerNormalization", ["c", "one"], ["y"], axis=-1, epsilon=epsilon),
    ]
    shape = ["batch", WIDTH]
    graph = helper.make_graph(
        nodes,
        "scales",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    bare = place.with_suffix(".onnx")
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), bare)
    return wrap(bare, place)


def judged(tmp_path: Path, candidate: Artifact, reference: Artifact, **options: object) -> Report:
    stage = Validate.parse({"against": str(reference.path), "invariance": False, **options})
    with drafting(tmp_path / "evidence") as publication:
        return stage.run(candidate, publication.draft)


def failed(report: Report) -> list[str]:
    return [check.name for check in report.checks if check.verdict == "fail"]


def test_a_wrong_epsilon_shows_at_small_inputs_alone(tmp_path: Path) -> None:
    report = judged(tmp_path, model(tmp_path / "wrong", epsilon=1.2e-5), model(tmp_path / "right"))
    assert failed(report) and all(name.startswith("scale_0.1.") for name in failed(report)), failed(report)
    assert report.exit_code == 1
    blamed = report.details["located"]["suspects"][0]
    assert blamed["op"] == "LayerNormalization"


def test_a_wrong_bound_shows_at_large_inputs_alone(tmp_path: Path) -> None:
    report = judged(tmp_path, model(tmp_path / "wrong", bound=9.0), model(tmp_path / "right"))
    assert failed(report) and all(name.startswith("scale_3.") for name in failed(report)), failed(report)


@pytest.mark.parametrize(("mistake", "scale"), [({"epsilon": 1.2e-5}, 0.1), ({"bound": 9.0}, 3.0)])
def test_a_rewritten_graph_is_held_to_its_source_at_every_scale(
    tmp_path: Path, mistake: dict[str, float], scale: float
) -> None:
    source, wrong = model(tmp_path / "right"), model(tmp_path / "wrong", **mistake)
    found = [check.name for check in structural_checks(source, wrong.model) if check.verdict == "fail"]
    assert found and all(name.startswith(f"scale_{scale:g}.") for name in found), found
    assert all(check.verdict == "pass" for check in structural_checks(source, source.model))


def test_equal_models_hold_at_every_scale(tmp_path: Path) -> None:
    report = judged(tmp_path, model(tmp_path / "one"), model(tmp_path / "other"))
    assert report.exit_code == 0
    (check,) = [check for check in report.checks if check.name == "scales"]
    assert check.verdict == "pass" and check.n == 16


def test_scales_are_left_alone_where_models_differ_by_more_than_rounding(tmp_path: Path) -> None:
    report = judged(tmp_path, model(tmp_path / "wrong", bound=9.0), model(tmp_path / "right"), transition="float16")
    assert not [check for check in report.checks if check.name.startswith("scale")]


def test_a_source_that_cannot_run_made_up_inputs_is_inconclusive(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        "picky",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [7])],
        [numpy_helper.from_array(np.array([7]), "shape")],
    )
    bare = tmp_path / "picky.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), bare)
    source = wrap(bare, tmp_path / "picky")
    with pytest.raises(Inconclusive, match="can't run the inputs that were made up"):
        structural_checks(source, source.model)


def test_masks_and_whole_numbers_keep_their_values_at_every_scale() -> None:
    rows = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    assert _scales._scalable("x", rows)
    assert not _scales._scalable("attention_mask", rows)
    assert not _scales._scalable("kinds", np.rint(rows))


def test_a_bound_on_absolute_errors_is_held_at_the_scale_that_it_was_asked_for(tmp_path: Path) -> None:
    figures = {"wanted": np.linspace(-3, 3, 4096), "found": np.linspace(-3, 3, 4096) * (1 + 1e-6)}
    comparison = Comparison()
    comparison.add(*({"y": array.reshape(64, 64).astype(np.float32)} for array in figures.values()))
    outputs = {name: difference.to_dict() for name, difference in comparison.differences().items()}
    one = {"factor": 3.0, "rows": 64, "outputs": outputs, "failures": []}
    assert [check.verdict for check in _scales.checks([one], ("y.max_abs<=1e-9",))] == ["pass"]
    assert [check.verdict for check in _scales.checks([one], ("y.max_scaled<=1e-9",))] == ["fail"]
