"""Tiny random-weight models of transformers' model types, with inputs that they run on: no download, no network.

``build("bert")`` shrinks the type's default configuration, makes the model that ``AutoModel`` would, gives it weights
that its outputs really depend on, and finds inputs by trying what its forward takes. A type that can't be built, does
not run, or whose outputs do not move with its inputs and with the batch raises ``NotBuilt``.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Kwargs = dict[str, torch.Tensor]
BATCH, SEQUENCE = 2, 12
MOST_PARAMETERS = 20_000_000


class NotBuilt(Exception):
    """No tiny model of this type could be made, or it does not run."""


@dataclass(frozen=True)
class Tiny:
    """A model in eval mode, and inputs by name with their dynamic axes.

    ``module`` is what is converted: the model, or the encoder alone of one that makes text from something else.
    """

    model_type: str
    family: str
    model: torch.nn.Module
    module: torch.nn.Module
    inputs: Kwargs
    dynamic: dict[str, dict[int, str]]

    def feed(self, batch: int, sequence: int, seed: int) -> Kwargs:
        """Other inputs of these sizes."""
        sizes = {"batch": batch, "sequence": sequence}
        random = torch.Generator().manual_seed(seed)
        return {name: _like(name, value, self.dynamic[name], sizes, random) for name, value in self.inputs.items()}


# By a part of the name of a number in a configuration: the most that it may be. The first that matches counts.
_CLAMPS: tuple[tuple[str, int], ...] = (
    (r"(kv_heads|key_value_heads|num_key_heads|num_value_heads|multi_query_group_num|num_kv_shared)", 2),
    # Scores of a few heads after a ReLU are zero together now and then, and a top-k among equals is nobody's.
    (r"^index_n_heads$", 16),
    (r"(attention_heads|num_heads|n_heads?$|^num_attention|^attention_heads|^heads$|_heads$)", 4),
    (r"(experts?_per_tok|moe_topk|top_k_experts|moe_k|num_experts_per|^top_k$|experts_top_k)", 2),
    (r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts)", 4),
    (r"(^n_group$|topk_group|num_shared_experts|n_shared_experts|num_mtp|nextn_predict|first_k_dense)", 1),
    (r"^(num_hidden_layers|n_layers?|num_layers|depth|.*_layers|num_.*_layers|.*num_layers|.*_depth|num_blocks|"
     r"num_attention_blocks|n_blocks|resampler_depth|decoder_blocks)$", 2),
    (r"(qk_rope_head_dim|qk_nope_head_dim|v_head_dim|^head_dim$|attention_head_dim|qk_head_dim|global_head_dim|"
     r"head_dim$|^d_kv$|rotary_dim|attention_head_size|^head_size$|_head_dim$)", 8),
    (r"(lora_rank|low_rank)", 16),
    (r"(intermediate|ffn|^n_inner|^d_ff$|mlp_dim|feed_forward|inner_dim|d_inner|mlp_hidden|expert_dim)", 48),
    (r"(vocab)", 128),
    (r"(position_embeddings|n_positions|max_seq|n_ctx|max_target_positions|context_length$|seq_length$|max_len|"
     r"max_position|max_2d)", 64),
    (r"(max_source_positions)", 32),
    (r"^(image_size|img_size|pretrain_image_size|input_size|eval_size|crop_size|visual_size)$", 64),
    (r"(num_queries|num_object_queries|num_query_tokens|num_latents|num_denoising|resampler_n_latents)", 10),
    (r"(chunk_size|block_size|window_attention_size)", 8),
    (r"(sliding_window|attention_window|local_window|local_attention)", 8),
    (r"(index_topk)", 4),
    (r"(num_codevectors|codebook_size|num_embeddings|codevector)", 32),
    (r"(num_mel_bins|n_mels|feature_size|input_feat)", 16),
    (r"(d_model|hidden_size|hidden_dim|n_embd|embed_dim|embedding_size|embedding_dim|projection_dim|proj_dim|"
     r"output_dim|proj_size|encoder_hidden|text_hidden|fusion_hidden|query_dim|^dim$|_dim$|channels_?out|mask_feature_"
     r"size|feature_dim|out_hidden|width|conv_dim|d_latents|bottleneck|neck_.*size|pooler_output_size|lru_width)", 32),
)  # fmt: skip
_KEPT = re.compile(
    r"(num_channels|in_channels|type_vocab|patch|stride|kernel|dropout|token_id|token_index|merge|num_labels)"
)
_TOKEN = re.compile(r"(token_id|token_index|_id)$")
_WIDTHS = re.compile(
    r"(hidden_sizes|embed_dims?|channels|conv_dim|tdnn_dim|neck_hidden_sizes|dims|widths|_dim|filters)$"
)
_DEPTHS = re.compile(r"(depths?|num_layers|layers|num_blocks|blocks|repeats)$")
_HEADS = re.compile(r"(num_heads|num_attention_heads|heads)$")

# Other ways to shrink, for what the first one breaks.
_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"pairs": 4},  # as many keys as queries, which latent attention needs
    {"wide": 2},
    {"lists": False},
    {"kept": r"image_size|input_size|mel|feature_size|window|chunk_size|position|block_size|source_positions"},
    {"kept": r"heads|head_dim|hidden|d_model|dim$|embd|channels|lora|width|size$|experts|topk|group", "lists": False},
    {"kept": r"^(?!num_hidden_layers|n_layer|num_layers|depth|encoder_layers|decoder_layers|vocab).*", "lists": False},
)


def model_types() -> list[str]:
    """Every type that transformers has a configuration and a base model for."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return sorted(name for name in MODEL_MAPPING_NAMES if name in CONFIG_MAPPING_NAMES)


def build(model_type: str, seed: int = 0) -> Tiny:
    """The tiny model of this type; NotBuilt says why there is none."""
    reasons = []
    for variant in _VARIANTS:
        try:
            return _built(model_type, variant, seed)
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            if text not in reasons:
                reasons.append(text)
    raise NotBuilt(" | ".join(reasons))


def _built(model_type: str, variant: Mapping[str, Any], seed: int) -> Tiny:
    from transformers import CONFIG_MAPPING

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        config = _shrunk(CONFIG_MAPPING[model_type], variant)
        cls = _class(config)
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in cls(config).parameters())
        if count > MOST_PARAMETERS:
            raise NotBuilt(f"{count:,} parameters")
        model = cls._from_config(config, dtype=torch.float32).eval()
        _randomize(model, seed)
        config.use_cache = False
        return _run(model_type, model)


def _class(config: Any) -> Any:
    """What AutoModel makes of it."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    found = MODEL_MAPPING[type(config)]
    cls = found[0] if isinstance(found, (tuple, list)) else found
    if not issubclass(cls, transformers.PreTrainedModel):
        raise NotBuilt(f"{cls.__name__} is no PreTrainedModel")
    return cls


def _shrunk(cls: Any, variant: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> Any:
    """A configuration with every size clamped; what follows from sizes is computed anew."""
    default = cls(**(given or {}))
    ids = itertools.count()
    changes: dict[str, Any] = {}
    inner = getattr(default, "sub_configs", None) or {}
    for field in dataclasses.fields(cls):
        value = getattr(default, field.name, None)
        if getattr(value, "model_type", "") == "timm_backbone":
            changes[field.name] = _backbone(len(getattr(value, "out_indices", None) or [4]))
            continue
        if field.name in inner and value is not None and dataclasses.is_dataclass(value):
            changes[field.name] = _shrunk(type(value), variant, _essentials(cls, field.name))
            continue
        stated = field.default if field.default is not dataclasses.MISSING else None
        if isinstance(stated, dataclasses.Field) or stated is None:
            stated = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
        clamped = _clamped(field.name, stated if stated is not None else None, variant, ids)
        if clamped is not None and clamped != stated:
            changes[field.name] = clamped
    if "mrope_section" in (getattr(cls, "ignore_keys_at_rope_validation", None) or ()):
        changes["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    return cls(**{**(given or {}), **changes})


def _backbone(stages: int) -> Any:
    """A small backbone of transformers itself, in place of one that needs timm."""
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 32, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=[f"stage{number}" for number in range(5 - min(stages, 4), 5)],
    )


def _essentials(cls: Any, key: str) -> dict[str, Any]:
    """What a configuration says of one inside it by default, such as which stages a backbone gives."""
    spec = (getattr(cls, "sub_configs_defaults", None) or {}).get(key)
    said = dict(getattr(spec, "init_kwargs", None) or {})
    return {name: value for name, value in said.items() if not isinstance(value, int) or isinstance(value, bool)}


def _clamped(name: str, value: Any, variant: Mapping[str, Any], ids: Iterator[int]) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int) and _TOKEN.search(name):
        return value if value < 100 else 127 - next(ids) % 27
    kept = variant.get("kept")
    if kept and re.search(kept, name):
        return value
    if isinstance(value, int):
        if name == "patch_size":
            return min(value, 16)
        if _KEPT.search(name):
            return value
        most = next((most for pattern, most in _CLAMPS if re.search(pattern, name)), None)
        if most is None:
            return value
        if "kv_heads" in name or "key_value_heads" in name:
            return min(value, variant.get("pairs", most))
        return min(value, most * (variant.get("wide", 1) if most == 32 else 1))
    if isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
        if not variant.get("lists", True):
            return value
        return type(value)(_list(name, list(value)))
    return value


def _list(name: str, values: list[int]) -> list[int]:
    if _KEPT.search(name) and "channels" not in name:
        return values
    if _HEADS.search(name):
        return [max(1, min(value, 4)) for value in values]
    if _DEPTHS.search(name):
        return [min(value, 1 if len(values) > 2 else 2) for value in values]
    if _WIDTHS.search(name) and max(values) > 64 and name != "in_channels":
        factor = max(1, 2 ** math.floor(math.log2(max(values) / 64)))
        return [max(8, value // factor) if value >= 8 else value for value in values]
    if re.search(r"(image_size|img_size)$", name):
        return [min(value, 64) for value in values]
    return values


def _randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights like N(0, 1/fan_in): with those of training's start, outputs hardly depend on inputs."""
    random = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.ndim >= 2:
                fan_in = max(1, parameter[0].numel()) if "embed" not in name else 1
                if parameter.ndim == 3 and "expert" in name:
                    fan_in = max(1, min(parameter.shape[1:]))
                parameter.copy_(torch.randn(parameter.shape, generator=random) / math.sqrt(fan_in))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
            elif parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                # Norms and layer scales; of scales near nothing, something is left.
                base = float(parameter.flatten()[0])
                base = 1.0 if abs(base) < 1e-2 else base
                parameter.copy_(base * (1 + 0.1 * torch.randn(parameter.shape, generator=random)))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=random))
            elif name.endswith("running_var"):
                buffer.copy_(1 + 0.2 * torch.rand(buffer.shape, generator=random))


def _run(model_type: str, model: torch.nn.Module) -> Tiny:
    """The first inputs that the model, or its encoder, runs on."""
    reasons = []
    seen: list[torch.nn.Module] = []
    for module in _parts(model):
        if any(module is other for other in seen):
            continue
        seen.append(module)
        for family, inputs, dynamic in _candidates(model, module):
            tiny = Tiny(model_type, family, model, module, inputs, dynamic)
            try:
                _refuse_dull(tiny)
                return tiny
            except Exception as error:
                text = " ".join(str(error).split())[:100]
                reasons.append(f"{'+'.join(inputs)}: {type(error).__name__}: {text}")
    raise NotBuilt("; ".join(dict.fromkeys(reasons)) or "no inputs are known")


def _parts(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """What may be converted: where text is made from text or sound, the encoder alone; else the whole model."""
    vision = "pixel_values" in str(getattr(model, "main_input_name", ""))
    if getattr(model.config, "is_encoder_decoder", False) and not vision:
        encoder = model.get_encoder()
        if isinstance(encoder, torch.nn.Module):
            yield encoder
    yield model


def _refuse_dull(tiny: Tiny) -> None:
    """NotBuilt for outputs that are not finite, or hardly depend on the inputs, or not on every row by itself."""
    first = floats(tiny.module, tiny.inputs)
    again = floats(tiny.module, tiny.inputs)
    other = floats(tiny.module, tiny.feed(BATCH, SEQUENCE, 1))
    third = floats(tiny.module, tiny.feed(BATCH + 1, SEQUENCE + 2, 2))
    if not first or not all(bool(torch.isfinite(value).all()) for value in (*first, *other, *third)):
        raise NotBuilt("outputs are not finite" if first else "no float output")
    if any(not torch.equal(one, two) for one, two in zip(first, again, strict=True)):
        raise NotBuilt("two runs on the same input differ")
    moves = [
        float((one - two).norm() / (one.norm() + two.norm() + 1e-30))
        for one, two in zip(first, other, strict=True)
        if one.shape == two.shape
    ]
    if moves and max(moves) < 1e-2:
        raise NotBuilt(f"outputs hardly depend on inputs ({max(moves):.1e})")


def floats(module: torch.nn.Module, inputs: Kwargs) -> list[torch.Tensor]:
    """The floating-point tensors that a module gives, in their order."""
    with torch.no_grad():
        return [value for value in flat(module(**inputs)) if value.is_floating_point()]


def flat(value: Any) -> list[torch.Tensor]:
    """The tensors in nested outputs, in their order; what a cache holds is left out."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [leaf for child in value.values() for leaf in flat(child)]
    if isinstance(value, (list, tuple)):
        return [leaf for child in value for leaf in flat(child)]
    return []


def _candidates(model: torch.nn.Module, module: torch.nn.Module) -> Iterator[tuple[str, Kwargs, dict[str, Any]]]:
    """(family, inputs, dynamic axes), the likeliest first."""
    takes = set(inspect.signature(module.forward).parameters)
    config = model.config
    for family, specs in _forms(config, module, takes):
        inputs, dynamic = {}, {}
        random = torch.Generator().manual_seed(0)
        for name, (kind, shape) in specs.items():
            sizes = [{"batch": BATCH, "sequence": SEQUENCE}.get(dim, dim) for dim in shape]
            dynamic[name] = {axis: dim for axis, dim in enumerate(shape) if isinstance(dim, str)}
            inputs[name] = _drawn(kind, sizes, random)
        yield family, inputs, dynamic


Specs = dict[str, tuple[str, list[Any]]]


def _forms(config: Any, module: Any, takes: set[str]) -> Iterator[tuple[str, Specs]]:
    main = getattr(module, "main_input_name", "input_ids")
    main = main if isinstance(main, str) else main[0]
    text = _text(config, takes)
    image = _image(config)
    joined = {**text, "pixel_values": image}
    encoder = getattr(config, "is_encoder_decoder", False)
    if "pixel_values" in takes and "input_ids" in takes and main != "pixel_values":
        yield "text and image", joined
    if "input_ids" in takes and main in ("input_ids", "pixel_values", "input_features", "input_values"):
        family = "encoder of text" if encoder else "text"
        if main == "input_ids":
            yield family, text
            if "decoder_input_ids" in takes:
                yield "encoder–decoder", {**text, "decoder_input_ids": ("ids", ["batch", "sequence"])}
    if "pixel_values" in takes and main == "pixel_values":
        yield "vision", {"pixel_values": image}
        frames = int(getattr(config, "num_frames", 0) or 0)
        if frames:
            yield "video", {"pixel_values": ("float", ["batch", frames, *image[1][1:]])}
        if "input_ids" in takes:
            yield "text and image", joined
            yield "text", text
    if "pixel_values_videos" in takes:
        frames = int(getattr(config, "frames_per_clip", getattr(config, "num_frames", 4)) or 4)
        yield "video", {"pixel_values_videos": ("float", ["batch", frames, *image[1][1:]])}
    yield from _sounds(config, takes)
    yield from _others(config, takes)
    if "input_ids" in takes and main != "input_ids":
        yield "text", text


def _text(config: Any, takes: set[str]) -> Specs:
    specs: Specs = {"input_ids": ("ids", ["batch", "sequence"])}
    if "attention_mask" in takes:
        specs["attention_mask"] = ("ones", ["batch", "sequence"])
    if "bbox" in takes:
        specs["bbox"] = ("boxes", ["batch", "sequence", 4])
    del config
    return specs


def _image(config: Any) -> tuple[str, list[Any]]:
    for part in (getattr(config, "vision_config", None), config, getattr(config, "backbone_config", None)):
        size = next((getattr(part, n, None) for n in ("image_size", "img_size") if getattr(part, n, None)), None)
        if size is not None:
            size = [size, size] if isinstance(size, int) else list(size)[-2:]
            channels = getattr(part, "num_channels", None) or getattr(part, "in_channels", None) or 3
            return "float", ["batch", channels if isinstance(channels, int) else 3, *size]
    channels = getattr(config, "num_channels", 3)
    return "float", ["batch", channels if isinstance(channels, int) else 3, 64, 64]


def _sounds(config: Any, takes: set[str]) -> Iterator[tuple[str, Specs]]:
    inner = getattr(config, "audio_config", None) or getattr(config, "encoder_config", None) or config
    mels = next((getattr(inner, n) for n in ("num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim",
                                             "input_channels", "n_mels") if getattr(inner, n, None)), 80)  # fmt: skip
    name = next((n for n in ("input_values", "input_features") if n in takes), None)
    if name is None or not isinstance(mels, int):
        return
    positions = int(getattr(inner, "max_source_positions", 0) or 0)
    if name == "input_values":
        if getattr(inner, "num_mel_bins", 0):
            yield "audio", {name: ("float", ["batch", int(getattr(inner, "max_length", 64)), mels])}
        yield "audio", {name: ("float", ["batch", 4000])}
        yield "audio", {name: ("float", ["batch", 1, 4000])}
    if positions:
        yield "audio", {name: ("float", ["batch", mels, 2 * positions])}
    yield "audio", {name: ("float", ["batch", 64, mels])}
    yield "audio", {name: ("float", ["batch", mels, 64])}
    yield "audio", {name: ("float", ["batch", 1, 64, mels])}
    yield "audio", {name: ("float", ["batch", 1, 1001, mels])}


def _others(config: Any, takes: set[str]) -> Iterator[tuple[str, Specs]]:
    """Time series, flat inputs, and what else goes by a name of its own."""
    if "past_values" in takes:
        length = int(getattr(config, "context_length", 32) or 32)
        channels = int(getattr(config, "num_input_channels", 1) or 1)
        yield "time series", {"past_values": ("float", ["batch", length, channels])}
        yield "time series", {"past_values": ("float", ["batch", length])}
    width = getattr(config, "hidden_size", getattr(config, "d_model", 32))
    if "inputs_embeds" in takes and "input_ids" not in takes and isinstance(width, int):
        yield "text", {"inputs_embeds": ("float", ["batch", "sequence", width])}
    if "hidden_states" in takes and isinstance(width, int):
        yield "other", {"hidden_states": ("float", ["batch", "sequence", width])}
    if "spectrogram" in takes:
        bins = int(getattr(config, "model_in_dim", getattr(config, "num_mel_bins", 80)))
        yield "audio", {"spectrogram": ("float", ["batch", 32, bins])}


def _drawn(kind: str, sizes: list[int], random: torch.Generator) -> torch.Tensor:
    if kind == "ids":
        return torch.randint(3, 90, sizes, generator=random)
    if kind == "ones":
        return torch.ones(sizes, dtype=torch.int64)
    if kind == "boxes":
        corner = torch.randint(0, 8, sizes, generator=random)
        corner[..., 2:] += 8
        return corner
    return torch.randn(sizes, generator=random)


def _like(
    name: str, value: torch.Tensor, axes: Mapping[int, str], sizes: Mapping[str, int], random: torch.Generator
) -> torch.Tensor:
    shape = [sizes.get(axes.get(axis, ""), size) for axis, size in enumerate(value.shape)]
    kind = {"input_ids": "ids", "decoder_input_ids": "ids", "attention_mask": "ones", "bbox": "boxes"}.get(
        name, "float"
    )
    return _drawn(kind, shape, random)
