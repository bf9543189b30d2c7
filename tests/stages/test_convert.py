from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from modelops.core.artifact import Draft
from modelops.core.report import Report
from modelops.errors import InputRefused, StageFailed, UsageError
from modelops.graphs import reference
from modelops.graphs.describe import signature
from modelops.stages import REGISTRY

NETS = Path(__file__).with_name("nets.py")


@dataclass(frozen=True)
class Result:
    report: Report
    path: Path

    @property
    def form(self) -> str:
        found = signature(self.path / "model.onnx")
        return " ".join(map(str, found.inputs)) + " -> " + " ".join(map(str, found.outputs))

    @property
    def model(self) -> onnx.ModelProto:
        return onnx.load(self.path / "model.onnx")

    def session(self) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(self.path / "model.onnx")


def convert(folder: Path, source: str, **options) -> Result:
    stage = REGISTRY.load("convert").parse(options)
    folder.mkdir(exist_ok=True)
    return Result(stage.run(source, Draft(folder)), folder)


@pytest.fixture
def quick(tmp_path) -> Callable[..., Result]:
    """Converts a function of nets.py with the exporter that takes a second, not ten."""
    return lambda name, **options: convert(tmp_path / "out", f"{NETS}:{name}", **{"exporter": "torchscript", **options})


@pytest.fixture(scope="module")
def nested(tmp_path_factory) -> Result:
    return convert(tmp_path_factory.mktemp("nested"), f"{NETS}:nested")


@pytest.fixture(scope="module")
def tagger(tmp_path_factory) -> Result:
    source = f"{NETS}:tagger"
    return convert(tmp_path_factory.mktemp("tagger"), source, input=["tokens:int64[batch,time]"], dim=["time=1..40"])


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> Result:
    """A tiny BERT of sentence-transformers, its weights large enough that outputs depend on inputs."""
    import transformers

    path = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.BertModel(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    kinds = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
    (path / "modules.json").write_text(json.dumps([{"path": folder, "type": f"x.{kind}"} for kind, folder in kinds]))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (path / "tokenizer.json").write_text("{}")
    return convert(tmp_path_factory.mktemp("sentences"), str(path))


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_nested_inputs_and_outputs_have_the_same_names_from_both_exporters(exporter, nested, quick):
    result = nested if exporter == "dynamo" else quick("nested")
    assert result.report.details["rung"] == exporter
    assert result.form == (
        "image:float32[batch,6] boxes:float32[batch,5] scale:float32[batch] -> logits:float32[batch,5] "
        "top_0:float32[batch,2] top_1:int64[batch,2] boxes_kept:float32[batch,2]"
    )
    assert {tensor.name for tensor in result.model.graph.initializer} >= {"head.weight", "head.bias"}


def test_a_conversion_is_held_against_the_source_at_every_shape(nested):
    report = nested.report
    assert report.verdict == "pass" and report.metric("sqnr").value > 100
    names = {check.name for check in report.checks if check}
    assert {"logits.sqnr", "logits.max_scaled", "logits.float64", "top_1.equal"} <= names
    assert {f"shapes.{corner}" for corner in ("minimum", "minimum+1", "odd")} <= names
    assert [row["inputs"]["image"][0] for row in report.details["shapes"]] == [32, 1, 2, 7]
    assert report.details["opset"] == 20 and report.details["failed_rungs"] == []
    assert str(NETS) in {entry["path"] for entry in report.details["code_executed"]}


def test_the_reference_holds_what_eager_torch_gives(nested):
    from nets import Nested

    cases = reference.read(nested.path / "reference.npz")
    assert [case.name for case in cases] == ["rows", "minimum", "minimum+1", "odd"]
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in nested.model.graph.initializer}
    module = Nested().eval()
    module.load_state_dict({name: torch.from_numpy(weights[name].copy()) for name in ("head.weight", "head.bias")})
    for case in cases:
        with torch.no_grad():
            outputs = module({name: torch.from_numpy(array) for name, array in case.feed.items()})
        np.testing.assert_allclose(case.outputs["logits"], outputs["logits"].numpy(), rtol=1e-5, atol=1e-6)
        assert case.outputs64 is not None and case.outputs64["logits"].dtype == np.float64
        assert "top_1" not in case.outputs64  # integers have no float64


def test_no_trace_of_this_machine_is_left(nested, sentences):
    for result in (nested, sentences):
        content = (result.path / "model.onnx").read_bytes()
        assert str(NETS.parent).encode() not in content and b"site-packages" not in content and b"_eager" not in content
    scopes = {p.value for node in sentences.model.graph.node for p in node.metadata_props if "name_scopes" in p.key}
    assert any("encoder.layer.0.attention" in scope for scope in scopes)


def test_sequences_of_any_length_work_and_every_named_dimension_is_symbolic(tagger):
    assert tagger.report.verdict == "pass"
    assert tagger.form == "tokens:int64[batch,time] -> logits:float32[batch,time,3] last:float32[1,batch,8]"
    corners = [row["inputs"]["tokens"] for row in tagger.report.details["shapes"][1:]]
    assert corners == [[1, 1], [2, 2], [3, 5], [2, 36]]
    assert tagger.report.details["dimensions"]["time"] == {"traced": 9, "bounds": [1, 40]}
    assert tagger.session().run(None, {"tokens": np.zeros((6, 40), np.int64)})[0].shape == (6, 40, 3)
    assert "LSTM" in {node.op_type for node in tagger.model.graph.node}


def test_a_sentence_model_gives_one_normalised_vector(sentences):
    assert sentences.report.verdict == "pass"
    assert sentences.form == (
        "input_ids:int64[batch,sequence] attention_mask:int64[batch,sequence] token_type_ids:int64[batch,sequence] "
        "-> sentence_embedding:float32[batch,16]"
    )
    assert "sentence embedding by mean pooling, normalised" in sentences.report.notes
    assert any(note.startswith("attention is computed in its plain form (eager)") for note in sentences.report.notes)
    assert {path.name for path in sentences.path.iterdir()} >= {"config.json", "tokenizer.json"}
    rows = reference.read(sentences.path / "reference.npz")[0]
    np.testing.assert_allclose(np.linalg.norm(rows.outputs["sentence_embedding"], axis=1), 1, rtol=1e-5)
    assert len(set(rows.feed["attention_mask"].sum(1).tolist())) > 3  # rows of several lengths


def test_a_conversion_has_the_same_bytes_elsewhere(nested, tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "nets.py").write_bytes(NETS.read_bytes())
    script = (
        "from pathlib import Path; from modelops.stages import REGISTRY; from modelops.core.artifact import Draft\n"
        "Path('out').mkdir(); REGISTRY.load('convert').parse({}).run('copy/nets.py:nested', Draft(Path('out')))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "4242", "OMP_NUM_THREADS": "2", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, check=True, capture_output=True)
    for name in ("model.onnx", "reference.npz"):
        assert (tmp_path / "out" / name).read_bytes() == (nested.path / name).read_bytes(), name


def test_a_batch_of_one_is_no_reason_for_a_fixed_batch(quick):
    result = quick("cnn")
    assert result.form == "x:float32[batch,1,8,8] -> output:float32[batch,10]"
    assert result.report.details["dimensions"]["batch"]["traced"] == 2
    assert "the module was in training mode: it was put in eval mode" in result.report.notes
    assert not any("Dropout" in node.op_type for node in result.model.graph.node)


def test_static_fixes_every_dimension(quick):
    result = quick("cnn", static=True)
    assert result.form == "x:float32[1,1,8,8] -> output:float32[1,10]"
    assert result.report.verdict == "pass" and result.report.details["static"]
    cases = reference.read(result.path / "reference.npz")
    assert len(cases) == 32 and all(case.is_rows for case in cases)


def test_a_module_without_inputs_takes_them_from_the_flag(quick):
    with pytest.raises(UsageError, match="gives no example inputs") as caught:
        quick("cnn_alone")
    assert "--input" in caught.value.hint
    result = quick("cnn_alone", input=["x:float32[batch,1,8,8]"])
    assert result.form == "x:float32[batch,1,8,8] -> output:float32[batch,10]"


def test_a_size_that_the_source_refuses_is_no_fault_of_the_export(quick):
    result = quick("padded", input=["x:float32[batch,3,time]"])
    assert result.report.verdict == "pass"
    assert any(note.startswith("the source itself takes no time below 5") for note in result.report.notes)
    assert result.report.details["dimensions"]["time"]["bounds"] == [5, None]
    assert result.report.details["outputs"] == {"y": ["batch", 4, None], "mean": []}


def test_an_output_without_a_batch_is_checked_on_32_batches(quick):
    result = quick("padded")
    assert len([case for case in reference.read(result.path / "reference.npz") if case.is_rows]) == 32
    check = next(check for check in result.report.checks if check.name == "mean.sqnr")
    assert check and check.n == 32


def test_an_input_that_is_not_used_stays_an_input(quick):
    result = quick("unused")
    assert result.form.startswith("x:float32[batch,4] ignored:float32[batch,7] -> ")


@pytest.mark.parametrize(
    ("name", "said", "hint"),
    [
        ("Dropped", "differs between two runs on the same input", "dropout"),
        ("Mixed", "output 'output_1' is float, not a tensor", "return tensors alone"),
        ("Empty", "the module returns no tensor", "return the tensors"),
        ("Raising", r"never trained \(nets\.py, line \d+, in after\)", "look at nets.py"),
    ],
)
def test_a_module_that_can_not_be_converted_is_told_why(quick, name, said, hint):
    with pytest.raises(StageFailed, match=said) as caught:
        quick(f"only_{name}")
    assert hint in caught.value.hint


def test_a_module_that_gives_nan_fails_before_it_is_exported(quick):
    result = quick("only_Logarithm")
    assert result.report.exit_code == 1 and not (result.path / "model.onnx").exists()
    assert "the source gives NaN for its own example inputs" in result.report.worst().message


def test_outputs_that_hardly_depend_on_inputs_prove_nothing(quick):
    result = quick("only_Deaf")
    assert result.report.exit_code == 3
    assert "does not vary with the input" in result.report.worst().message


def test_a_dimension_that_can_not_vary_is_named(quick):
    # The exporters are not to blame: the module itself refuses every batch but two.
    with pytest.raises(StageFailed, match="dimension 'batch' can't be dynamic, the module itself refuses") as caught:
        quick("fixed")
    assert "--static" in caught.value.hint
    assert quick("fixed", static=True).report.verdict == "pass"


def test_a_branch_on_values_is_no_silent_success(quick):
    result = quick("only_Branching")
    assert result.report.exit_code == 1
    assert result.report.worst().name == "output.sqnr"
    assert result.report.details["failed_rungs"][0]["cause"] == "wrong numbers"


@pytest.mark.parametrize(
    ("name", "cause", "said"),
    [
        ("Branching", "data-dependent control flow", "torch.where"),
        ("Specialised", "frozen dimension", "x.shape"),
    ],
)
def test_when_every_exporter_fails_the_first_cause_is_told(tmp_path, name, cause, said):
    with pytest.raises(StageFailed, match=f"dynamo: {cause}: .*; torchscript: ") as caught:
        convert(tmp_path / "out", f"{NETS}:only_{name}")
    assert said in caught.value.hint
    if name == "Specialised":
        assert "dimension 'batch' of input 'x' is fixed at 2 by something in forward" in caught.value.message


def test_a_graph_that_works_at_the_traced_size_alone_is_called_frozen(quick):
    result = quick("only_Specialised")
    assert result.report.exit_code == 1
    assert result.report.details["failed_rungs"][0]["cause"] == "frozen dimension"
    assert "at x [32, 4]; it works at x [2, 4]" in result.report.worst().message


def test_a_detection_head_is_converted_with_its_suppression(quick):
    result = quick("detector")
    assert result.report.verdict == "pass", result.report.worst()
    assert result.form.startswith("image:float32[batch,3,32,32] -> boxes:float32[batch,")
    assert [output.name for output in result.model.graph.output] == ["boxes", "scores", "classes", "keep"]
    assert {"TopK", "GatherElements"} <= {node.op_type for node in result.model.graph.node}
    kept = reference.read(result.path / "reference.npz")[0].outputs["keep"]
    assert 0 < kept.mean() < 1  # some boxes are suppressed, others are not


@pytest.mark.parametrize(
    ("gate", "code", "said"),
    [
        ("output.sqnr>=300", 1, "needs >= 300"),
        ("output.max_scaled<=1e-12", 1, "needs <= 1e-12"),
        ("output.sqnr>=60", 0, ""),
    ],
)
def test_a_gate_of_the_users_takes_the_place_of_the_usual_one(quick, gate, code, said):
    report = quick("linear", gate=[gate]).report
    assert report.exit_code == code
    assert said in (report.worst().message if code else "")


@pytest.mark.parametrize(("gate", "said"), [("sqnr", "gate"), ("logits.sqnr>=100", "unknown output in gate")])
def test_a_gate_that_can_not_be_is_a_usage_error(quick, gate, said):
    with pytest.raises(UsageError, match=said):
        quick("linear", gate=[gate])


def test_a_wrong_export_is_caught(quick, monkeypatch):
    from modelops.stages import _from_torch

    save = _from_torch._written

    def wrong(model, target):
        weight = model.graph.initializers["linear.bias"]
        array = weight.const_value.numpy().copy()
        array[0] += 1e-3
        import onnx_ir

        weight.const_value = onnx_ir.tensor(array, name=weight.name)
        return save(model, target)

    monkeypatch.setattr(_from_torch, "_written", wrong)
    assert quick("linear").report.exit_code == 1


def test_a_function_that_trains_gives_the_same_model_each_time(tmp_path):
    for name in ("a", "b"):
        assert convert(tmp_path / name, f"{NETS}:trained", exporter="torchscript").report.verdict == "pass"
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (tmp_path / "b" / "model.onnx").read_bytes()


def test_weights_from_a_file_are_the_converted_ones(quick, tmp_path):
    state = {"linear.weight": torch.eye(4) * 3, "linear.bias": torch.arange(4.0)}
    save_file(state, tmp_path / "w.safetensors")
    result = quick("linear", weights=tmp_path / "w.safetensors")
    (found,) = result.session().run(None, {"x": np.ones((1, 4), np.float32)})
    np.testing.assert_allclose(found, [[3, 4, 5, 6]])
    save_file({"linear.weight": torch.eye(4)}, tmp_path / "short.safetensors")
    with pytest.raises(InputRefused, match=r"missing: linear\.bias"):
        quick("linear", weights=tmp_path / "short.safetensors")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"input": ["x"]}, "--input can't be 'x'"),
        ({"input": ["x:float31[batch]"]}, "unknown dtype"),
        ({"input": ["x:float32[batch,-1]"]}, "a dimension is a size or a name"),
        ({"input": ["z:float32[batch,4]"]}, "unknown input in --input 'z'"),
        ({"input": ["x:float32[batch,5]"]}, "the example input is"),
        ({"dim": ["batch"]}, "--dim can't be 'batch'"),
        ({"dim": ["batch=4..2"]}, "--dim can't be"),
        ({"dim": ["time=1..2"]}, "unknown dimension in --dim 'time'"),
        ({"static": True, "dim": ["batch=1..2"]}, "--static leaves no dimension"),
        ({"attention": "sdpa"}, "--attention means nothing"),
        ({"opset": 23}, "opset 20 at most"),
    ],
)
def test_options_that_do_not_fit_are_refused(quick, options, said):
    with pytest.raises((UsageError, StageFailed), match=said):
        quick("linear", **options)


def test_an_onnx_file_is_rewritten_and_run(tmp_path, perceptron):
    result = convert(tmp_path / "out", str(perceptron))
    assert result.report.verdict == "pass" and result.report.details["opset"] == 18
    assert result.form == "x:float32[batch,8] -> y:float32[batch,4]"
    assert reference.read(result.path / "reference.npz")[0].name == "rows"


def test_an_onnx_file_that_gives_nan_is_told_so(tmp_path):
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 18]>
        g (float[batch, 4] x) => (float[batch, 4] y) { y = Sqrt(x) }""")
    onnx.save(model, tmp_path / "sqrt.onnx")
    result = convert(tmp_path / "out", str(tmp_path / "sqrt.onnx"))
    assert any("y: the model itself gives NaN" in note for note in result.report.notes)


def test_an_onnx_file_is_upgraded_to_the_opset_that_is_wanted(tmp_path, perceptron):
    result = convert(tmp_path / "out", str(perceptron), opset=21)
    assert result.report.verdict == "pass" and result.report.details["opset"] == 21
    assert result.model.opset_import[0].version == 21
    assert "y.sqnr" in {check.name for check in result.report.checks}


def test_options_for_modules_mean_nothing_for_onnx_files(tmp_path, perceptron):
    for options in ({"static": True}, {"weights": perceptron}, {"exporter": "dynamo"}):
        with pytest.raises(UsageError, match="means nothing for a source of the form onnx-file"):
            convert(tmp_path / "out", str(perceptron), **options)


def test_user_code_gets_more_time_than_a_file(perceptron):
    stage = REGISTRY.load("convert").parse({})
    assert stage.limits_on(f"{NETS}:cnn", 0).wall_seconds == 3600
    assert stage.limits_on(str(perceptron), 0).wall_seconds < 60


def test_the_key_covers_source_and_weights(perceptron, tmp_path):
    stage = REGISTRY.load("convert").parse({"weights": tmp_path / "w.safetensors"})
    assert stage.inputs(f"{NETS}:cnn") == {"source": NETS, "weights": tmp_path / "w.safetensors"}
    assert stage.inputs(str(perceptron))["source"] == perceptron
