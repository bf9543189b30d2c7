"""A dozen model types of transformers, of all sorts, from directory to validated ONNX; more of them when asked for."""

from __future__ import annotations

import pytest
from _tiny_models import NotBuilt, build

from modelops.core.artifact import Draft
from modelops.stages import REGISTRY

FAST = [
    "bert", "clip", "gpt2", "m2m_100", "olmo2", "phi3", "regnet", "resnet", "smolvlm", "t5", "vaultgemma",
    "videoprism_vision_model",
]  # fmt: skip
MORE = [
    "flex_olmo", "hy_v4", "led", "llava_onevision", "longformer", "nllb-moe", "openai_privacy_filter", "qwen2_vl",
    "qwen3_5_text", "qwen3_moe",
]  # fmt: skip


def _converted(model_type, folder):
    tiny = build(model_type)
    tiny.model.save_pretrained(folder / "model")
    (folder / "out").mkdir()
    return REGISTRY.load("convert").parse({}).run(str(folder / "model"), Draft(folder / "out"))


@pytest.mark.parametrize("model_type", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_model_type_converts_with_dynamic_shapes(model_type, tmp_path):
    report = _converted(model_type, tmp_path)
    assert report, [check for check in report.checks if not check]
    assert "batch" in report.details["dimensions"]
    assert sum(row["verdict"] == "pass" for row in report.details["shapes"]) >= 3


def test_a_tiny_model_that_can_not_be_made_says_why():
    with pytest.raises(NotBuilt):
        build("encoder-decoder")
