"""Example inputs of a transformers model, told from its configuration and from what its forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelops.core.tensors import Signature, TensorSpec
from modelops.errors import StageFailed
from modelops.sources._checkpoint import read_json

# Sizes to trace with: none is 1, and no two that may vary are equal.
_TRACED = {"batch": 2, "sequence": 12, "samples": 4000, "frames": 96}
_IMAGE_SIZE = 224
OWN_INPUTS = "write a function that returns the model and its inputs, and convert file.py:function"
_SINGLE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Examples:
    """What a model takes: names, dtypes and shapes, and the ranges of what can be counted."""

    specs: tuple[TensorSpec, ...]
    ranges: Mapping[str, int] = field(default_factory=dict)
    bounds: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)

    @property
    def dynamic(self) -> dict[str, dict[int, str]]:
        return {
            spec.name: {axis: dim for axis, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in self.specs
        }

    def tensors(self) -> dict[str, Any]:
        """Seeded example inputs as torch tensors."""
        import torch

        from modelops.graphs.seeded import random_feed

        sizes = {dim: _within(size, self.bounds.get(dim)) for dim, size in _TRACED.items()}
        feed = random_feed(Signature(self.specs, ()), sizes["batch"], 0, sizes, self.ranges)
        return {name: torch.from_numpy(array) for name, array in feed.items()}


def _within(size: int, bounds: tuple[int, int | None] | None) -> int:
    low, high = bounds or (1, None)
    return max(low, min(size, high or size))


def examples(module: Any, directory: Path) -> Examples:
    """The inputs that a transformers model needs; StageFailed when that is not known for its sort."""
    parameters = inspect.signature(module.forward).parameters
    try:
        found = _known(module, set(parameters), directory)
    except (AttributeError, TypeError, ValueError) as error:  # a configuration without what its sort needs
        raise _unknown(module, f"{module.main_input_name} of a size that its config.json does not tell") from error
    known = {spec.name for spec in found.specs}
    needed = [each.name for each in parameters.values() if each.default is each.empty and each.kind in _SINGLE]
    missing = [name for name in needed if name not in known]
    if missing:
        raise _unknown(module, ", ".join(missing))
    return found


def _unknown(module: Any, what: str) -> StageFailed:
    return StageFailed(
        f"no example inputs are known for {type(module).__name__}, which takes {what}",
        hint=OWN_INPUTS,
    )


def _known(module: Any, takes: set[str], directory: Path) -> Examples:
    config, main = module.config, module.main_input_name
    if main == "input_ids":
        found = _text(config, takes, directory)
        # Where images stand for tokens of the text, the model takes text alone as well.
        joined = any(hasattr(config, name) for name in ("image_token_id", "image_token_index"))
        if "pixel_values" in takes and hasattr(config, "vision_config") and not joined:
            found = Examples((*found.specs, _image(config.vision_config, directory)), found.ranges, found.bounds)
        return found
    if main == "pixel_values":
        return Examples((_image(config, directory),))
    if main == "input_values" and hasattr(config, "num_mel_bins"):
        return Examples((TensorSpec(main, "float32", ("batch", int(config.max_length), int(config.num_mel_bins))),))
    if main == "input_values":
        return Examples((TensorSpec(main, "float32", ("batch", "samples")),), bounds={"samples": (400, None)})
    if main == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * int(config.max_source_positions)  # Whisper takes exactly what its positions span
        return Examples((TensorSpec(main, "float32", ("batch", int(config.num_mel_bins), frames)),))
    raise _unknown(module, main)


def _text(config: Any, takes: set[str], directory: Path) -> Examples:
    inner = config.get_text_config()
    shape = ("batch", "sequence")
    specs, ranges = [TensorSpec("input_ids", "int64", shape)], {"input_ids": int(inner.vocab_size)}
    if "attention_mask" in takes:
        specs.append(TensorSpec("attention_mask", "int64", shape))
    kinds = int(getattr(inner, "type_vocab_size", 0) or 0)
    if "token_type_ids" in takes and kinds > 1:
        specs.append(TensorSpec("token_type_ids", "int64", shape))
        ranges["token_type_ids"] = kinds
    return Examples(tuple(specs), ranges, {"sequence": (1, _longest(inner, directory))})


def _longest(config: Any, directory: Path) -> int | None:
    """The most tokens that the positions, or the tokenizer, allow."""
    named = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    found = [int(value) for value in named if isinstance(value, int) and value > 0]
    path = directory / "tokenizer_config.json"
    value = read_json(path).get("model_max_length") if path.is_file() else None
    if isinstance(value, int) and 0 < value < 1 << 20:  # "no limit" is written as 10^30
        found.append(value)
    return min(found, default=None)


def _image(config: Any, directory: Path) -> TensorSpec:
    height, width = _image_size(config, directory)
    return TensorSpec("pixel_values", "float32", ("batch", int(getattr(config, "num_channels", 3)), height, width))


def _image_size(config: Any, directory: Path) -> tuple[int, int]:
    """Height and width: what the model was built for, else what its preprocessor makes, else 224."""
    candidates = [getattr(config, "image_size", None)]
    path = directory / "preprocessor_config.json"
    if path.is_file():
        values = read_json(path)
        candidates += [values.get("crop_size"), values.get("size")]
    for value in candidates:
        if isinstance(value, Mapping):
            value = (value.get("height", value.get("shortest_edge")), value.get("width", value.get("shortest_edge")))
        if isinstance(value, int) and value > 0:
            return value, value
        if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(n, int) and n > 0 for n in value):
            return int(value[0]), int(value[1])
    return _IMAGE_SIZE, _IMAGE_SIZE
