"""Hugging Face directories, looked at before transformers sees them: what runs code or reaches elsewhere is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modelops.core.artifact import role_of
from modelops.errors import InputRefused, from_os_error
from modelops.sources._weights import check_safetensors, listed

_LARGEST_JSON = 16 << 20
_INDEX = "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "tf_model.h5", "flax_model.msgpack")
_SAFER = "convert it where it is trusted: AutoModel.from_pretrained(PATH).save_pretrained(NEW, safe_serialization=True)"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; InputRefused when there is none."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise InputRefused(f"{path} is larger than any configuration", hint="get the model again")
        values = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputRefused(f"{path.parent} has no {path.name}", hint="give a directory with config.json") from error
    except OSError as error:
        raise from_os_error(error, f"reading {path}") from error
    except (ValueError, RecursionError) as error:
        raise InputRefused(f"{path} is not valid JSON: {error}", hint="get the model again") from error
    if not isinstance(values, dict):
        raise InputRefused(f"{path} is not a JSON object", hint="get the model again")
    return values


def checked_config(directory: Path) -> dict[str, Any]:
    """The configuration in a directory whose weights and settings are data, and nothing else.

    InputRefused for remote code (``auto_map``), for settings that only code may make (``*_internal``), for adapters,
    for weights that are pickled, broken, or outside the directory.
    """
    config = read_json(directory / "config.json")
    for where, key in _keys(config):
        if key == "auto_map" or key.endswith("_internal"):
            raise InputRefused(
                f"{directory / 'config.json'}: {where} would make transformers run code that comes with the model",
                hint="convert it with file.py:function, where you write down which code is run",
            )
    if "quantization_config" in config:
        raise InputRefused(
            f"{directory} holds quantized weights (quantization_config)", hint="start from the float model"
        )
    if (directory / "adapter_config.json").exists():
        raise InputRefused(f"{directory} holds an adapter, not a model", hint="merge it into its base model first")
    for path in _weight_files(directory):
        check_safetensors(path)
    return config


def _keys(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every key of nested objects, with its path."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            path = f"{where}.{key}" if where else str(key)
            yield path, str(key)
            yield from _keys(entry, path)
    elif isinstance(value, list):
        for number, entry in enumerate(value):
            yield from _keys(entry, f"{where}[{number}]")


def _weight_files(directory: Path) -> list[Path]:
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    if (directory / _INDEX).is_file():
        names = read_json(directory / _INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise InputRefused(f"{directory / _INDEX} names no weights", hint="get the model again")
        files = sorted({str(name) for name in names.values()})
        outside = [name for name in files if Path(name).name != name or not name.endswith(".safetensors")]
        if outside:
            raise InputRefused(f"{directory / _INDEX} names {outside[0]!r}, not a safetensors file beside it")
        missing = [name for name in files if not (directory / name).is_file()]
        if missing:
            raise InputRefused(f"{directory} lacks the weights {listed(missing)}", hint="download it again")
        return [directory / name for name in files]
    pickled = next((name for name in _PICKLED if (directory / name).exists()), "")
    if pickled:
        raise InputRefused(f"{directory} has its weights only as {pickled}: a pickle is a program", hint=_SAFER)
    raise InputRefused(f"{directory} has no model.safetensors", hint="download it again, with its weights")


def companions(directory: Path) -> dict[str, Path]:
    """The files that go with the model into an artifact: config, tokenizer and preprocessor."""
    return {
        path.name: path
        for path in sorted(directory.iterdir())
        if path.is_file() and role_of(path.name) in ("tokenizer", "preprocessor", "config")
    }
