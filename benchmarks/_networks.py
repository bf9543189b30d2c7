"""Well-known networks with random weights, for benchmarks of graphs: ResNet-50, MobileNetV2, ViT-B/16, GPT-2.

``modelops convert benchmarks/_networks.py:vit OUT`` writes one. Weights are drawn so that activations keep their
scale: with the libraries' own initial weights the outputs hardly depend on the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn


def _lively(module: nn.Module) -> nn.Module:
    """Weights of variance 1/fan-in, biases and normalisations near their usual values; always the same."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.named_parameters():
            if value.ndim > 1:
                fan = value[0].numel() if "Conv1D" not in type(module).__name__ else value.shape[0]
                value.copy_(torch.randn(value.shape, generator=generator) / fan**0.5)
            elif name.endswith("weight"):
                value.copy_(1 + 0.1 * torch.randn(value.shape, generator=generator))
            else:
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(1 + 0.1 * torch.rand(buffer.shape, generator=generator))
    return module.eval()


def _images(model: Any, size: int = 224) -> tuple[nn.Module, dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return _lively(model), {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}


def resnet50() -> tuple[nn.Module, dict[str, Any]]:
    return _images(transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000)))


def mobilenet_v2() -> tuple[nn.Module, dict[str, Any]]:
    return _images(transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config(num_labels=1000)))


def vit() -> tuple[nn.Module, dict[str, Any]]:
    return _images(transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000)))


def gpt2() -> tuple[nn.Module, dict[str, Any]]:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False))
    ids = torch.randint(0, 50257, (2, 16), generator=torch.Generator().manual_seed(1))
    return _lively(model), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
