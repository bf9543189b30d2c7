"""Example inputs of a transformers model, told from its configuration and from what its forward takes."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelops.core.tensors import Signature, TensorSpec
from modelops.sources._checkpoint import read_json

# Sizes to trace with: none is 1, and no two that may vary are equal.
_TRACED = {"batch": 2, "sequence": 12, "decoder_sequence": 10, "samples": 4000, "frames": 96}
_IMAGE_SIZE = 224
_FRAMES = 8
_SINGLE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
# Configurations inside a configuration that speak of images, and of sound.
_OF_IMAGES = ("vision_config", "backbone_config", "image_config", "vision_tower_config", "encoder")
_OF_SOUND = ("audio_config", "encoder_config", "audio_encoder_config", "speech_config", "encoder")
_PLACEHOLDERS = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index", "video_token_id")


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

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes to trace with."""
        return {dim: _within(size, self.bounds.get(dim)) for dim, size in _TRACED.items()}

    def tensors(self, sizes: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Seeded example inputs as torch tensors."""
        import torch

        from modelops.graphs.seeded import random_feed

        known = {**self.sizes, **(sizes or {})}
        feed = random_feed(Signature(self.specs, ()), known["batch"], 0, known, self.ranges)
        return {name: torch.from_numpy(array) for name, array in feed.items()}

    def fixed(self, dims: Sequence[str]) -> Examples:
        """The same with some dimensions at the sizes that are traced."""
        sizes = self.sizes
        specs = tuple(
            TensorSpec(s.name, s.dtype, tuple(sizes[str(dim)] if dim in dims else dim for dim in s.shape))
            for s in self.specs
        )
        return Examples(specs, self.ranges, {dim: limits for dim, limits in self.bounds.items() if dim not in dims})


def _within(size: int, bounds: tuple[int, int | None] | None) -> int:
    low, high = bounds or (1, None)
    return max(low, min(size, high or size))


@dataclass(frozen=True)
class _Model:
    """What is known of a module before it runs."""

    config: Any
    takes: frozenset[str]
    required: tuple[str, ...]
    main: str
    directory: Path

    def number(self, names: Sequence[str], inner: Sequence[str] = ()) -> int | None:
        """The first of these settings that is a positive number, of the configuration or of one inside it."""
        for config in (*(getattr(self.config, name, None) for name in inner), self.config):
            for name in names:
                value = getattr(config, name, None)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return None

    @property
    def text(self) -> Any:
        return self.config.get_text_config()


def candidates(module: Any, config: Any, directory: Path) -> Iterator[Examples]:
    """Inputs that the module may take, the likeliest first; whether it runs on them is for the caller to try."""
    parameters = inspect.signature(module.forward).parameters
    required = tuple(each.name for each in parameters.values() if each.default is each.empty and each.kind in _SINGLE)
    main = getattr(module, "main_input_name", None) or getattr(config, "main_input_name", None) or "input_ids"
    main = main if isinstance(main, str) else str(main[0])
    model = _Model(config, frozenset(parameters), required, main, directory)
    seen: set[tuple[TensorSpec, ...]] = set()
    for names in _combinations(model):
        wanted = tuple(dict.fromkeys((*names, *required)))
        alternatives = [_alternatives(model, name) for name in wanted]
        for specs in itertools.product(*alternatives):
            if specs and specs not in seen:
                seen.add(specs)
                yield Examples(specs, _ranges(model, specs), _bounds(model, specs))


def _combinations(model: _Model) -> Iterator[tuple[str, ...]]:
    """Which inputs go together."""
    text = _text_names(model) if "input_ids" in model.takes else ()
    seen = ("pixel_values",) if "pixel_values" in model.takes else ()
    # Where images or sounds stand for tokens of the text, the model takes text alone as well.
    joined = any(getattr(model.config, name, None) is not None for name in _PLACEHOLDERS)
    if model.main == "input_ids" and text:
        if seen and not joined:
            yield (*text, *seen)
        yield text
        if "decoder_input_ids" in model.takes:
            yield (*text, "decoder_input_ids")
    elif model.main in model.takes and model.main != "input_ids":
        if joined and text:
            yield text
        yield (model.main,)
        if text:
            yield (*text, model.main)
        if "decoder_input_ids" in model.takes:
            yield (model.main, "decoder_input_ids")
    for name in _INPUTS:
        if name in model.takes and name not in ("attention_mask", "token_type_ids", "bbox", "decoder_input_ids"):
            yield text if name == "input_ids" else (name,)
    if text and seen:
        yield (*text, *seen)


def _text_names(model: _Model) -> tuple[str, ...]:
    names = ["input_ids"]
    if "attention_mask" in model.takes:
        names.append("attention_mask")
    if "token_type_ids" in model.takes and int(getattr(model.text, "type_vocab_size", 0) or 0) > 1:
        names.append("token_type_ids")
    if "bbox" in model.takes and model.number(("max_2d_position_embeddings",)) is not None:
        names.append("bbox")
    return tuple(names)


def _alternatives(model: _Model, name: str) -> list[TensorSpec]:
    """The forms that this input may have; none where it is not known."""
    known = _INPUTS.get(name)
    if known is None:
        return []
    try:
        shapes = known(model)
    except (AttributeError, TypeError, ValueError):  # a configuration without what its sort needs
        return []
    dtype = "int64" if name in _COUNTED else "float32"
    return [TensorSpec(name, dtype, tuple(shape)) for shape in shapes]


Shape = Sequence[int | str]
_COUNTED = frozenset({"input_ids", "attention_mask", "token_type_ids", "bbox", "decoder_input_ids", "codes"})


def _tokens(_model: _Model) -> list[Shape]:
    return [("batch", "sequence")]


def _image(model: _Model) -> list[Shape]:
    channels = model.number(("num_channels", "in_channels", "in_chans"), _OF_IMAGES) or 3
    height, width = _image_size(model)
    found: list[Shape] = [("batch", channels, height, width)]
    frames = model.number(("num_frames",), _OF_IMAGES)
    if frames:
        found.append(("batch", frames, channels, height, width))
    return found


def _video(model: _Model) -> list[Shape]:
    frames = model.number(("frames_per_clip", "num_frames"), _OF_IMAGES) or _FRAMES
    channels = model.number(("num_channels", "in_channels", "in_chans"), _OF_IMAGES) or 3
    return [("batch", frames, channels, *_image_size(model))]


def _waves(model: _Model) -> list[Shape]:
    """Sound as samples; or where the configuration speaks of mel bins, as a spectrogram of one length."""
    found: list[Shape] = []
    bins, length = model.number(("num_mel_bins",)), model.number(("max_length", "spec_size"))
    if bins and length:
        found.append(("batch", length, bins))
    return [*found, ("batch", "samples"), ("batch", 1, "samples")]


def _spectrogram(model: _Model) -> list[Shape]:
    """Frames of mel bins: of the one length that positions span, or of any."""
    named = ("num_mel_bins", "n_mels", "mel_bins", "input_feat_per_channel", "feature_size", "input_dim",
             "feature_projection_input_dim", "input_size", "input_channels")  # fmt: skip
    bins = model.number(named, _OF_SOUND) or 80
    found: list[Shape] = []
    positions = model.number(("max_source_positions",), _OF_SOUND)
    if positions:  # Whisper takes exactly what its positions span
        found.append(("batch", bins, 2 * positions))
    size = model.number(("spec_size",), _OF_SOUND)
    if size:
        found.append(("batch", 1, size * max(1, size // bins), bins))
    return [*found, ("batch", "frames", bins), ("batch", bins, "frames"), ("batch", 1, "frames", bins)]


def _series(model: _Model) -> list[Shape]:
    length = model.number(("context_length",)) or 32
    channels = model.number(("num_input_channels", "input_size")) or 1
    return [("batch", length, channels), ("batch", length)]


def _vectors(model: _Model) -> list[Shape]:
    width = model.number(("hidden_size", "d_model", "n_embd", "embed_dim"))
    return [("batch", "sequence", width)] if width else []


def _mel(model: _Model) -> list[Shape]:
    return [("batch", "frames", model.number(("model_in_dim", "num_mel_bins", "num_mels")) or 80)]


_INPUTS: Mapping[str, Callable[[_Model], list[Shape]]] = {
    "input_ids": _tokens,
    "attention_mask": _tokens,
    "token_type_ids": _tokens,
    "bbox": lambda _: [("batch", "sequence", 4)],
    "decoder_input_ids": lambda _: [("batch", "decoder_sequence")],
    "pixel_values": _image,
    "pixel_values_videos": _video,
    "input_values": _waves,
    "input_features": _spectrogram,
    "spectrogram": _mel,
    "past_values": _series,
    "inputs_embeds": _vectors,
    "hidden_states": _vectors,
}
"""The shapes that an input of this name may have, by what the configuration says."""


def _ranges(model: _Model, specs: Sequence[TensorSpec]) -> dict[str, int]:
    found: dict[str, int] = {}
    for spec in specs:
        if spec.name in ("input_ids", "decoder_input_ids"):
            found[spec.name] = _words(model)
        elif spec.name == "token_type_ids":
            found[spec.name] = int(model.text.type_vocab_size)
        elif spec.name == "bbox":
            found[spec.name] = model.number(("max_2d_position_embeddings",)) or 1
    return found


def _words(model: _Model) -> int:
    """How many tokens there are, those at the end left out that stand for an image or a sound."""
    count = int(model.text.vocab_size)
    ids = (getattr(model.config, name, None) for name in _PLACEHOLDERS)
    special = [value for value in ids if isinstance(value, int) and count // 2 < value < count]
    return min(special, default=count)


def _bounds(model: _Model, specs: Sequence[TensorSpec]) -> dict[str, tuple[int, int | None]]:
    dims = {dim for spec in specs for dim in spec.shape}
    found: dict[str, tuple[int, int | None]] = {}
    if "sequence" in dims:
        found["sequence"] = (1, _longest(model.text, model.directory))
    if "decoder_sequence" in dims:
        found["decoder_sequence"] = (1, _longest(model.text, model.directory))
    if "samples" in dims:
        found["samples"] = (400, None)
    return found


def _longest(config: Any, directory: Path) -> int | None:
    """The most tokens that the positions, or the tokenizer, allow."""
    named = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    found = [int(value) for value in named if isinstance(value, int) and value > 0]
    path = directory / "tokenizer_config.json"
    value = read_json(path).get("model_max_length") if path.is_file() else None
    if isinstance(value, int) and 0 < value < 1 << 20:  # "no limit" is written as 10^30
        found.append(value)
    return min(found, default=None)


def _image_size(model: _Model) -> tuple[int, int]:
    """Height and width: what the model was built for, else what its preprocessor makes, else 224."""
    configs = (model.config, *(getattr(model.config, name, None) for name in _OF_IMAGES))
    found = [getattr(config, name, None) for config in configs for name in ("image_size", "img_size")]
    path = model.directory / "preprocessor_config.json"
    if path.is_file():
        values = read_json(path)
        found += [values.get("crop_size"), values.get("size")]
    for value in found:
        if isinstance(value, Mapping):
            value = (value.get("height", value.get("shortest_edge")), value.get("width", value.get("shortest_edge")))
        if isinstance(value, int) and value > 0:
            return value, value
        if isinstance(value, (list, tuple)) and len(value) >= 2 and all(isinstance(n, int) and n > 0 for n in value):
            return int(value[-2]), int(value[-1])
    return _IMAGE_SIZE, _IMAGE_SIZE
