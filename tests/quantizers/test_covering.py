"""Every two values of scheme, kind of graph and opset meet in a case, and each ends in a model that is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from covering_graphs import KINDS, OPSETS, SCHEMES, pairwise
from quantizer_models import Bench, sqnr

from modelops.quantizers import REGISTRY, Quantizer

CASES = list(pairwise(SCHEMES, tuple(KINDS), OPSETS))
# Signal over noise that tiny graphs keep: what is wrong is far below.
LEAST = {"float16": 40.0, "weights": 25.0, "dynamic": 15.0, "static": 12.0}


def method_of(scheme: str) -> Quantizer:
    name, _, rule = scheme.partition(" ")
    options: dict[str, Any] = {"ranges": rule} if rule else {}
    return REGISTRY.load(name).parse({**options, **({"block_size": 16} if name == "weights" else {})})


@pytest.mark.parametrize(("scheme", "kind", "opset"), CASES, ids=[" ".join(map(str, case)) for case in CASES])
def test_every_kind_of_graph_is_quantized_right(scheme: str, kind: str, opset: int, tmp_path: Path) -> None:
    from modelops.graphs import runs

    source, data = KINDS[kind](opset, tmp_path / "float.onnx")
    method, target = method_of(scheme), tmp_path / "model.onnx"
    method.quantize(source, target, Bench(tmp_path, data, batch=4))  # type: ignore[arg-type]
    onnx.checker.check_model(onnx.load(target), full_check=False)
    with runs.session(source) as before, runs.session(target) as after:
        wanted, found = runs.run(before, data), runs.run(after, data)
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].shape == array.shape and np.isfinite(found[name]).all()
        assert sqnr(array, found[name]) > LEAST[scheme.partition(" ")[0]], name


def test_the_cases_cover_all_pairs_and_are_few() -> None:
    assert len(CASES) <= 60
    for scheme in SCHEMES:
        assert {case[1] for case in CASES if case[0] == scheme} == set(KINDS)
        assert {case[2] for case in CASES if case[0] == scheme} == set(OPSETS)
    assert {case[1:] for case in CASES} == {(kind, opset) for kind in KINDS for opset in OPSETS}
