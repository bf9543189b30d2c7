"""A sample of onnx's own backend suite keeps its shipped outputs; benchmarks/onnx_suite.py runs all of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from modelops.core.artifact import drafting
from modelops.graphs.wrap import wrap
from modelops.stages.simplify import Simplify

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from _onnx_cases import Case, load

SAMPLE = ("simple/test_single_relu_model", "simple/test_shrink", "simple/test_sign_model")


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {case.name: case for case in load(("simple",))}


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.parametrize("engine", ["onnxscript", "onnxruntime"])
def test_what_the_suite_ships_still_comes_out(name: str, engine: str, cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases[name]
    onnx.save(case.model, tmp_path / "case.onnx")
    source = wrap(tmp_path / "case.onnx", tmp_path / "source")
    with drafting(tmp_path / "out") as publication:
        report = Simplify.parse({"engine": engine}).run(source, publication.draft)
        assert report.exit_code in (0, 3), report.worst()
        assert case.problem(publication.draft.path / "model.onnx") == ""


def test_the_suite_notices_a_model_that_changed(cases: dict[str, Any], tmp_path: Path) -> None:
    case = cases["simple/test_single_relu_model"]
    changed = onnx.ModelProto()
    changed.CopyFrom(case.model)
    changed.graph.node[0].op_type = "Neg"
    onnx.save(changed, tmp_path / "changed.onnx")
    assert "differs by up to" in case.problem(tmp_path / "changed.onnx")
