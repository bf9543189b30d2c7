"""The first wrong node is named, saved so that it fails again, and told from its victims; kept in bounded memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from _mutants import KINDS, mutants
from onnx import TensorProto, helper, numpy_helper
from test_validate import bare, measure, validate

from modelops.core.artifact import Artifact, drafting
from modelops.core.manifest import Manifest
from modelops.core.report import Report
from modelops.errors import InputRefused, ModelOpsError, UsageError
from modelops.graphs import pieces
from modelops.graphs.describe import signature
from modelops.graphs.lean import opened
from modelops.graphs.seeded import random_feed
from modelops.graphs.wrap import wrap
from modelops.stages import _locate
from modelops.stages._blame import REPRO
from modelops.stages._locate import Located, Locator
from modelops.stages.validate import Validate

DEPTH = 6


def network(path: Path, change: Callable[[onnx.ModelProto], None] | None = None, prefix: str = "") -> Path:
    """Blocks of a residual MLP with a normalisation, a GELU and a gate; every value has a name."""
    random = np.random.default_rng(3)
    nodes, weights = [], []
    node = helper.make_node

    def weight(name: str, *shape: int) -> str:
        scale = 1 / np.sqrt(shape[0]) if len(shape) > 1 else 0.1
        array = (random.normal(size=shape) * scale + (name.startswith("g"))).astype(np.float32)
        weights.append(numpy_helper.from_array(array, name))
        return name

    x = "x"
    for n in range(DEPTH):
        p = f"{prefix}{n}"
        scale, shift = weight(f"g{p}", 16), weight(f"s{p}", 16)
        nodes += [
            node("LayerNormalization", [x, scale, shift], [f"norm{p}"], name=f"norm{p}"),
            node("MatMul", [f"norm{p}", weight(f"w{p}", 16, 32)], [f"wide{p}"], name=f"wide{p}"),
            node("Add", [f"wide{p}", weight(f"b{p}", 32)], [f"bias{p}"], name=f"bias{p}"),
            node("Gelu", [f"bias{p}"], [f"gelu{p}"], name=f"gelu{p}"),
            node("MatMul", [f"gelu{p}", weight(f"v{p}", 32, 16)], [f"narrow{p}"], name=f"narrow{p}"),
            node("Sub", [f"narrow{p}", x], [f"y{p}"], name=f"rest{p}"),
        ]
        x = f"y{p}"
    nodes.append(node("Softmax", [x], ["y"], name="last", axis=1))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "network",
        [value("x", TensorProto.FLOAT, ["batch", 16])],
        [value("y", TensorProto.FLOAT, ["batch", 16])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if change is not None:
        change(model)
    onnx.save(model, path)
    return path


def scaled(name: str, factor: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name))

    return change


def locate(reference: Path, candidate: Path, folder: Path, *, loose: bool = False) -> Located:
    folder.mkdir()
    feed = random_feed(signature(reference), 8)
    with Locator(reference, candidate, feed, folder, loose=loose) as locator:
        return locator.run()


def test_perturbed_node_is_named_and_its_victims_are_not(tmp_path: Path) -> None:
    good = network(tmp_path / "good.onnx")
    found = locate(good, network(tmp_path / "bad.onnx", scaled("v2", 1.01)), tmp_path / "values")
    assert [suspect.node for suspect in found.suspects] == ["narrow2"]
    assert found.suspects[0].op == "MatMul" and found.suspects[0].inputs == ("gelu2",)
    off = [output for _, output, error in found.curve if error > 0]
    assert off[0] == "narrow2" and "y" in off  # all that comes after is off, and not to blame


def test_twelve_mutants_are_located(tmp_path: Path) -> None:
    good = network(tmp_path / "good.onnx")
    every = list(mutants(onnx.load(good), random.Random(1))) + list(mutants(onnx.load(good), random.Random(2)))
    feed = random_feed(signature(good), 8)
    wrong, count = [], 0
    for number, mutant in enumerate(every):
        path, folder = tmp_path / f"{number}.onnx", tmp_path / f"values{number}"
        path.write_bytes(mutant.model.SerializeToString())
        folder.mkdir()
        with Locator(good, path, feed, folder, loose=False) as locator:
            found = locator.run()
        count += 1
        if not found.suspects or found.suspects[0].node != mutant.node:
            wrong.append((mutant.kind, mutant.node, [s.node for s in found.suspects]))
    assert count >= 12 and not wrong


def test_several_wrong_nodes_are_ranked_by_what_they_do_to_the_outputs(tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        scaled("w1", 1.001)(model)
        scaled("v4", 1.2)(model)

    good = network(tmp_path / "good.onnx")
    found = locate(good, network(tmp_path / "bad.onnx", change), tmp_path / "values")
    assert [suspect.node for suspect in found.suspects] == ["narrow4", "wide1"]
    assert all(suspect.effect is not None for suspect in found.suspects)


def quantized(source: Path, target: Path) -> Path:
    """onnxruntime's own static int8 of a model."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):
        feeds = [random_feed(signature(source), 32, seed) for seed in range(2)]

        def get_next(self) -> Any:
            return self.feeds.pop() if self.feeds else None

    quantize_static(str(source), str(target), Reader(), quant_format=QuantFormat.QDQ, reduce_range=True)
    return target


@pytest.mark.parametrize("which", ["QuantizeLinear", "DequantizeLinear", "weight"])
def test_nodes_of_an_int8_model_are_named_one_by_one(tmp_path: Path, which: str) -> None:
    good = network(tmp_path / "good.onnx")
    path = quantized(good, tmp_path / "int8.onnx")
    model = onnx.load(path)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    reads = (
        "w3_quantized" if which == "weight" else "gelu2" if which == "QuantizeLinear" else "gelu2_QuantizeLinear_Output"
    )
    node = next(n for n in model.graph.node if n.input[0] == reads and n.op_type.endswith("uantizeLinear"))
    scale = numpy_helper.to_array(weights[node.input[1]]) * np.float32(0.3)
    model.graph.initializer.append(numpy_helper.from_array(scale, "wrong"))
    node.input[1] = "wrong"
    onnx.save(model, path)
    found = locate(good, path, tmp_path / "values", loose=True)
    assert found.suspects[0].node == node.name
    assert found.suspects[0].effect == max(s.effect or 0.0 for s in found.suspects)


def test_models_without_common_names_are_matched_by_what_they_hold(tmp_path: Path) -> None:
    good = network(tmp_path / "good.onnx")
    found = locate(good, network(tmp_path / "bad.onnx", scaled("vother3", 1.05), "other"), tmp_path / "values")
    assert found.suspects[0].node == "narrowother3"
    assert any("names tell too little" in note for note in found.notes)


def test_memory_stays_bounded_by_bands_and_the_result_is_the_same(tmp_path: Path, monkeypatch: Any) -> None:
    good = network(tmp_path / "good.onnx")
    bad = network(tmp_path / "bad.onnx", scaled("b3", 3.0))
    whole = locate(good, bad, tmp_path / "whole")
    for module, name, value in (
        (pieces, "_FIRST_BAND", 3),
        (pieces, "_BAND_BYTES", 2000),
        (pieces, "_WEIGHT_BYTES", 3000),
        (_locate, "_BAND_BYTES", 2000),
        (_locate, "_IN_MEMORY", 1000),
    ):
        monkeypatch.setattr(module, name, value)
    ran: list[int] = []
    original = pieces.Pieces.run
    monkeypatch.setattr(
        pieces.Pieces,
        "run",
        lambda self, nodes, *a, **k: ran.append(len(list(nodes))) or original(self, nodes, *a, **k),
    )
    banded = locate(good, bad, tmp_path / "banded")
    assert len(ran) > 10 and max(ran) < 8
    assert list((tmp_path / "banded").glob("value*.npy"))
    assert banded == whole


def test_bodies_read_values_of_the_graph_around_them(tmp_path: Path) -> None:
    text = """
      <ir_version: 8, opset_import: ["" : 17]>
      g (float[batch, 4] x) => (float[batch, 4] y) <float[4] w = {1, 2, 3, 4}> {
        m = Mul(x, w)
        s = ReduceSum<keepdims = 0>(m)
        zero = Constant<value_float = 0.0>()
        more = Greater(s, zero)
        y = If(more) <
          then_branch = a () => (float[batch, 4] t) { t = Add(m, w) },
          else_branch = b () => (float[batch, 4] e) { e = Sub(m, w) }>
      }"""
    good = onnx.parser.parse_model(text)
    bad = onnx.parser.parse_model(text.replace("t = Add(m, w)", "t = Sub(w, m)").replace("e = Sub(m", "e = Add(m"))
    paths = [tmp_path / "good.onnx", tmp_path / "bad.onnx"]
    for path, model in zip(paths, (good, bad), strict=True):
        onnx.save(model, path)
    with opened(paths[0]) as lean:
        node = pieces.Pieces(lean).nodes[-1]
    assert set(node.inputs) == {"more", "m", "w"}
    assert [s.op for s in locate(*paths, tmp_path / "values").suspects] == ["If"]


def test_other_shapes_and_nodes_that_can_not_run_are_named(tmp_path: Path) -> None:
    def turned(model: onnx.ModelProto) -> None:
        node = model.graph.node[1]
        node.op_type, node.input[1] = "Concat", node.input[0]
        node.attribute.append(helper.make_attribute("axis", 0))

    good = network(tmp_path / "good.onnx")
    found = locate(good, network(tmp_path / "bad.onnx", turned), tmp_path / "values")
    assert found.suspects[0].node == "wide0" and "shape [16, 16]" in found.suspects[0].problem
    assert "does not run to its end" in " ".join(found.notes)


def test_failed_gate_names_the_node_and_saves_what_fails_again(tmp_path: Path) -> None:
    source, target = bare(tmp_path, "tanh"), tmp_path / "evidence"
    with drafting(target) as publication:
        report = Validate.parse({"against": str(bare(tmp_path).path)}).run(source, publication.draft)
        publication.publish(Manifest(kind="evidence", files=publication.files(), graphs={}, created="", model={}))
    assert report.exit_code == 1
    located = report.details["located"]
    assert located["suspects"][0]["op"] == "Gelu" and located["suspects"][0]["inputs"] == ["h"]
    assert any("first to blame" in note and "Gelu" in note for note in report.notes)
    repro = Artifact.open(target / REPRO)
    assert [node.op_type for node in onnx.load(repro.model).graph.node] == ["Gelu"]
    again = validate(repro)
    assert again.exit_code == 1 and {c.name for c in again.checks if c.verdict == "fail"} == {"g.sqnr", "g.max_scaled"}


def test_locate_is_asked_for_where_gates_hold_and_finds_nothing_in_equal_models(tmp_path: Path) -> None:
    report = validate(bare(tmp_path, "gemm"), against=bare(tmp_path), locate=True)
    assert report.exit_code == 0 and "located" in report.details
    same = bare(tmp_path)
    assert any("every node gives" in note for note in validate(same, against=same, locate=True).notes)
    with pytest.raises(UsageError, match="another model"):
        validate(same, locate=True)


def evidence(source: Artifact, target: Path, **options: Any) -> tuple[Report, Artifact]:
    with drafting(target) as publication:
        report = Validate.parse(options).run(source, publication.draft)
        manifest = Manifest(kind="evidence", files=publication.files(), graphs={}, created="", model={})
        return report, publication.publish(manifest)


def test_replay_gives_the_same_report_without_a_model_and_judges_by_other_gates(tmp_path: Path) -> None:
    first, saved = evidence(bare(tmp_path, "tanh"), tmp_path / "one", against=str(bare(tmp_path).path))
    again, copy = evidence(saved, tmp_path / "two", replay=True)
    assert again.exit_code == first.exit_code == 1
    assert again.checks == first.checks and again.metrics == first.metrics and again.notes == first.notes
    assert Artifact.open(copy.path / REPRO).has("reference.npz")
    looser = measure(saved, replay=True, gate=("y.sqnr>=60", "max_scaled<=0.01"))[0]
    assert looser.exit_code == 0
    assert measure(saved, replay=True, transition="float16")[0].exit_code == 0
    with pytest.raises(UsageError, match="--replay takes everything"):
        validate(saved, replay=True, seed=3)
    with pytest.raises(InputRefused, match="holds no measurements"):
        validate(bare(tmp_path), replay=True)


def test_mutants_are_killed_and_unmodified_models_raise_no_alarm(tmp_path: Path) -> None:
    good = wrap(network(tmp_path / "good.onnx"), tmp_path / "good")
    for threads in (1, 2):
        backend = {"name": "onnxruntime-cpu", "threads": threads, "optimization": "none"}
        assert validate(good, against=good, invariance=False, backend=backend).exit_code == 0
    alive, count = [], 0
    for number, mutant in enumerate(mutants(onnx.load(good.model), random.Random(5))):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(mutant.model.SerializeToString())
        count += 1
        try:
            candidate = wrap(path, tmp_path / f"mutant{number}")
            code = validate(candidate, against=good, invariance=False).exit_code
        except ModelOpsError as error:
            code = error.exit_code
        if code in (0, 3):
            alive.append((mutant.kind, mutant.node))
    assert count >= 9 and not alive, alive


def test_mutants_are_of_every_kind_that_fits(tmp_path: Path) -> None:
    kinds = {mutant.kind for mutant in mutants(onnx.load(network(tmp_path / "n.onnx")), random.Random(0))}
    assert {"swapped inputs", "axis - 1", "dropped bias", "epsilon x10", "tanh for erf", "one flipped bit"} <= kinds
    assert kinds <= set(KINDS)


def test_batch_mates_threads_and_optimisation_are_reported(tmp_path: Path) -> None:
    softmax = bare(tmp_path, "axis")  # over the batch: a sample depends on the others
    report = validate(softmax, against=softmax)
    figures = {metric.name: metric.value for metric in report.metrics if metric.name.endswith("_invariance")}
    assert figures["threads_invariance"] == figures["optimization_invariance"] == "identical"
    assert isinstance(figures["batch_invariance"], float) and figures["batch_invariance"] < 20
    assert any("others in its batch" in note for note in report.notes)
    assert not any("others in its batch" in note for note in validate(bare(tmp_path), against=bare(tmp_path)).notes)


def test_edge_values_are_compared_by_mask(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[batch, 4] x) => (float[batch, 4] y) {{ {} }}'
    plain = "a = Abs(x) y = Sqrt(a)"
    guarded = "a = Abs(x) n = IsNaN(a) z = Constant<value_float = 0.0>() b = Where(n, z, a) y = Sqrt(b)"
    models = []
    for name, body in (("plain", plain), ("guarded", guarded)):
        onnx.save(onnx.parser.parse_model(text.format(body)), tmp_path / f"{name}.onnx")
        models.append(wrap(tmp_path / f"{name}.onnx", tmp_path / name))
    report, measurements = measure(models[1], against=models[0], invariance=False)
    assert report.exit_code == 0
    assert [note for note in report.notes if "nothing but NaN" in note]
    assert {e["name"]: e["masks_agree"] for e in measurements["edges"]["compared"]}["zeros"]
