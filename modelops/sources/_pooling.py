"""Sentence embeddings: the pooling and normalising that a sentence-transformers directory asks for, as a module."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.errors import InputRefused, StageFailed
from modelops.sources._checkpoint import read_json

if TYPE_CHECKING:
    import torch

OUTPUT = "sentence_embedding"
# The order in which sentence-transformers joins them where several are asked for.
_MODES = {"cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens", "mean": "pooling_mode_mean_tokens"}
_OWN = "write it as a torch module, and convert file.py:function"


@dataclass(frozen=True)
class Pooling:
    """How token vectors become one vector: ``modes`` in their order, and whether its length is made 1."""

    modes: tuple[str, ...]
    normalize: bool

    def __str__(self) -> str:
        return " and ".join(self.modes) + " pooling" + (", normalised" if self.normalize else "")


def pooling_of(directory: Path) -> Pooling | None:
    """What modules.json asks for, None where there is no such file; StageFailed for what is not supported."""
    path = directory / "modules.json"
    if not path.is_file():
        return None
    modes: tuple[str, ...] = ()
    normalize = False
    for number, (kind, folder) in enumerate(_modules(path)):
        if kind == "Transformer" and number == 0:
            if folder not in ("", "."):
                raise StageFailed(f"{path}: the transformer lies in {folder!r}", hint=f"convert {directory / folder}")
        elif kind == "Pooling":
            modes = _modes(directory / folder / "config.json")
        elif kind == "Normalize":
            normalize = True
        else:
            raise StageFailed(f"{path}: a module of type {kind} is not supported", hint=_OWN)
    return Pooling(modes, normalize) if modes else None


def _modules(path: Path) -> list[tuple[str, str]]:
    """(type, folder) of every module; a folder lies in the directory."""
    try:
        entries = json.loads(path.read_bytes())
        found = [(str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputRefused(f"{path} is malformed: {error}", hint="get the model again") from error
    for _, folder in found:
        if folder != Path(folder).name and folder not in ("", "."):
            raise InputRefused(f"{path} names {folder!r}, not a folder beside it", hint="get the model again")
    return found


def _modes(path: Path) -> tuple[str, ...]:
    config = read_json(path)
    asked = {key for key, value in config.items() if key.startswith("pooling_mode_") and value is True}
    named = config.get("pooling_mode")
    if isinstance(named, str):
        asked |= {_MODES.get(mode, mode) for mode in named.split("+")}
    unknown = sorted(asked - set(_MODES.values()))
    if unknown or not asked:
        raise StageFailed(f"{path}: {unknown[0] if unknown else 'no pooling mode'} is not supported", hint=_OWN)
    return tuple(mode for mode, key in _MODES.items() if key in asked)


def pooled(model: Any, pooling: Pooling) -> torch.nn.Module:
    """A module with the model's inputs, whose one output is the sentence's embedding."""
    import torch

    class SentenceEmbedding(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            hidden = self.model(**inputs)[0]
            mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            parts = []
            for mode in pooling.modes:
                if mode == "cls":
                    parts.append(hidden[:, 0])
                elif mode == "max":
                    parts.append(hidden.masked_fill(mask == 0, torch.finfo(hidden.dtype).min).amax(1))
                else:
                    parts.append((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9))
            vector = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
            if pooling.normalize:
                vector = torch.nn.functional.normalize(vector, p=2.0, dim=1)
            return {OUTPUT: vector}

    return SentenceEmbedding()
