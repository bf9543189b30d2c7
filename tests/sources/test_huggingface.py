from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelops.errors import EnvironmentMissing, InputRefused, StageFailed, UsageError
from modelops.sources import Request, detect
from modelops.sources._pooling import pooled, pooling_of
from modelops.sources.huggingface import Huggingface

BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A tiny BERT with random weights, as transformers saves it."""
    import transformers

    path = tmp_path_factory.mktemp("hf") / "bert"
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**BERT)).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    (path / "README.md").write_text("# a model")
    return path


@pytest.fixture
def directory(tmp_path):
    """A directory that is right as far as its files can tell."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(BERT))
    save_file({"w": torch.ones(1)}, path / "model.safetensors")
    return path


def _configure(path, **values):
    (path / "config.json").write_text(json.dumps({**BERT, **values}))


def _open(path):
    return Huggingface().open(str(path), Request())


def test_a_text_model_gets_inputs_by_its_config(bert):
    loaded = _open(bert)
    assert type(loaded.module).__name__ == "BertModel" and not loaded.module.training
    assert list(loaded.kwargs) == ["input_ids", "attention_mask", "token_type_ids"]
    assert loaded.kwargs["input_ids"].shape[0] == 2 and loaded.kwargs["input_ids"].max() < 64
    assert loaded.dynamic == {name: {0: "batch", 1: "sequence"} for name in loaded.kwargs}
    assert loaded.bounds == {"sequence": (1, 32)}
    assert sorted(loaded.files) == ["config.json", "tokenizer.json"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("embeddings.word_embeddings.weight"), "missing: embeddings.word_embeddings.weight"),
        (lambda state: state.update(extra=torch.ones(2)), "unexpected: extra"),
        (lambda state: state.update({"pooler.dense.bias": torch.ones(3)}), "pooler.dense.bias"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused_by_name(bert, tmp_path, change, said):
    state = load_file(bert / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((bert / "config.json").read_text())
    with pytest.raises(InputRefused, match=said):
        _open(tmp_path)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map would make transformers run code"),
        ({"vision_config": {"auto_map": {}}}, "vision_config.auto_map"),
        ({"_attn_implementation_internal": "evil/kernel"}, "_attn_implementation_internal"),
        ({"quantization_config": {"bits": 4}}, "quantized weights"),
    ],
)
def test_configs_that_run_code_or_need_other_tools_are_refused(directory, values, said):
    _configure(directory, **values)
    with pytest.raises(InputRefused, match=said):
        _open(directory)


@pytest.mark.parametrize("named", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_code_that_comes_with_a_model_never_runs(bert, tmp_path, named):
    for file in bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n\nclass Model:\n    pass\n")
    parts = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoImageProcessor", "AutoFeatureExtractor")
    values = json.loads((bert / "config.json").read_text()) if named == "config.json" else {}
    (tmp_path / named).write_text(json.dumps({**values, "auto_map": dict.fromkeys(parts, "evil.Model")}))
    if named == "config.json":
        with pytest.raises(InputRefused, match="auto_map would make transformers run code"):
            _open(tmp_path)
    else:  # nothing reads it while converting
        assert _open(tmp_path).kwargs
    assert not canary.exists()


def test_an_unsafe_transformers_is_refused(directory, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "__version__", "5.2.0")
    with pytest.raises(EnvironmentMissing, match=r"transformers 5\.2\.0 is not safe") as caught:
        _open(directory)
    assert "pip install" in caught.value.hint


@pytest.mark.parametrize("name", ["BertMadeUp", "pipeline", "os.system", "PreTrainedConfig"])
def test_an_architecture_that_is_no_model_is_refused(directory, name):
    _configure(directory, architectures=[name])
    with pytest.raises(StageFailed, match="names the architecture"):
        _open(directory)


def test_pickled_weights_are_never_opened(directory):
    (directory / "model.safetensors").unlink()
    canary = directory / "canary"

    class Canary:
        def __reduce__(self):
            return open, (str(canary), "w")

    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Canary()))
    with pytest.raises(InputRefused, match=r"only as pytorch_model\.bin") as caught:
        _open(directory)
    assert "safe_serialization=True" in caught.value.hint and not canary.exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "weights.bin", "missing.safetensors"])
def test_an_index_names_safetensors_files_beside_it_and_nothing_else(directory, name):
    (directory / "model.safetensors").rename(directory / "part-1.safetensors")
    index = {"weight_map": {"a": "part-1.safetensors", "b": name}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputRefused):
        _open(directory)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 10_000])
def test_a_broken_config_is_refused(directory, text):
    (directory / "config.json").write_text(text)
    with pytest.raises(InputRefused, match=r"config\.json"):
        _open(directory)


def test_truncated_weights_and_adapters_are_refused(directory):
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(InputRefused, match="an adapter"):
        _open(directory)
    (directory / "adapter_config.json").unlink()
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(InputRefused, match="truncated"):
        _open(directory)


@pytest.mark.parametrize("spec", ["sentence-transformers/all-MiniLM-L6-v2", "bert-base-uncased"])
def test_a_hub_id_gets_the_download_command(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = detect(spec)
    for ask in (source.inputs, lambda spec: source.open(spec, Request())):
        with pytest.raises(UsageError, match="models are not downloaded") as caught:
            ask(spec)
        assert caught.value.hint.startswith(f"hf download {spec} --local-dir ./{spec.rpartition('/')[2]}")


@pytest.mark.parametrize("spec", ["./my-bert", "/nowhere/model", "models/my-bert", "weights.safetensors"])
def test_a_path_that_is_not_there_is_no_hub_id(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(UsageError, match="no such source"):
        detect(spec)


def _modules(path, *kinds, pooling=None):
    entries = [
        {"idx": n, "name": str(n), "path": folder, "type": f"sentence_transformers.models.{kind}"}
        for n, (kind, folder) in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(entries))
    (path / "1_Pooling").mkdir(exist_ok=True)
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling or {}))


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_pooling_is_that_of_sentence_transformers(directory, mode):
    keys = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens"}
    _modules(
        directory,
        ("Transformer", ""),
        ("Pooling", "1_Pooling"),
        ("Normalize", "2_Normalize"),
        pooling={key: key == keys[mode] for key in keys.values()},
    )
    hidden = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])

    class Model(torch.nn.Module):
        def forward(self, attention_mask):
            return (hidden,)

    wanted = {
        "mean": torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0)]),
        "cls": hidden[:, 0],
        "max": torch.stack([hidden[0].amax(0), hidden[1, :2].amax(0)]),
    }[mode]
    pooling = pooling_of(directory)
    assert pooling is not None and pooling.normalize
    found = pooled(Model(), pooling)(attention_mask=mask)["sentence_embedding"]
    torch.testing.assert_close(found, wanted / wanted.norm(dim=1, keepdim=True))


def test_modules_that_are_not_supported_are_said(directory):
    assert pooling_of(directory) is None
    _modules(directory, ("Transformer", ""), ("Pooling", "1_Pooling"), pooling={"pooling_mode_lasttoken": True})
    with pytest.raises(StageFailed, match="pooling_mode_lasttoken is not supported"):
        pooling_of(directory)
    _modules(directory, ("Transformer", ""), ("Dense", "2_Dense"))
    with pytest.raises(StageFailed, match="type Dense is not supported"):
        pooling_of(directory)
    _modules(directory, ("Transformer", ""), ("Pooling", "../../etc"))
    with pytest.raises(InputRefused, match="not a folder beside it"):
        pooling_of(directory)
