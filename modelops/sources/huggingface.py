"""Hugging Face directories: config.json and *.safetensors, read offline and without running code of theirs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelops.core.worker import Limits
from modelops.errors import EnvironmentMissing, InputRefused, ModelOpsError, StageFailed, UsageError, missing_path
from modelops.sources import Loaded, Request, Source
from modelops.sources._checkpoint import checked_config, companions
from modelops.sources._weights import listed

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_FILES = (".py", ".onnx", ".pt", ".pth", ".pt2", ".pkl", ".joblib", ".skops", ".safetensors", ".bin", ".toml")


# benchmarks/convert_attention.py measures it.
_PLAIN = "eager"
_KNOWN = (
    "attention is computed in its plain form (eager), known to run faster in onnxruntime than what exporters make of "
    "the fused one (sdpa): 1.07 times on MiniLM, and 1.12 times with --exporter torchscript"
)


class Huggingface(Source):
    """A Hugging Face model directory: config.json, *.safetensors and what else came with them."""

    requires = ("torch", "transformers", "safetensors")
    tools = ("torch", "transformers", "safetensors")
    takes = frozenset({"attention"})

    @classmethod
    def reads(cls, spec: str) -> bool:
        path = Path(spec)
        if path.is_dir():
            return (path / "config.json").is_file() and not (path / "manifest.json").is_file()
        return not path.exists() and _is_hub_id(spec)

    def inputs(self, spec: str) -> Mapping[str, Path]:
        return {"source": _directory(spec)}

    def limits(self, model_bytes: int) -> Limits | None:
        from modelops.core import machine

        # Importing, exporting and checking a small model takes a minute on a slow machine.
        gib = 1 << 30
        memory = min(max(6 * gib, 6 * model_bytes + 3 * gib), int(0.9 * machine.memory_bytes()))
        return Limits(wall_seconds=300.0 + 6.0 * model_bytes / 2**20, memory_bytes=memory)

    def open(self, spec: str, request: Request) -> Loaded:
        directory = _directory(spec)
        config = checked_config(directory)
        from modelops.sources._parts import choose
        from modelops.sources._pooling import pooled, pooling_of

        pooling = pooling_of(directory)
        model, notes = _model(directory, config, request)
        chosen = choose(model, directory)
        module, found = chosen.module, chosen.examples
        notes += chosen.notes
        if pooling is not None:
            module = pooled(module, pooling).eval()
            notes.append(f"sentence embedding by {pooling}")
        return Loaded(
            module=module,
            kwargs={**found.tensors(), **chosen.settings},
            drawn=True,
            dynamic=found.dynamic,
            ranges=found.ranges,
            bounds=found.bounds,
            files=companions(directory),
            notes=tuple(notes),
            first=chosen.first if pooling is None else None,
        )


def _is_hub_id(spec: str) -> bool:
    """Whether a text that names no file looks like a model on the hub: org/name, or a bare name."""
    if not _HUB_ID.fullmatch(spec) or spec.endswith(_FILES):
        return False
    return "/" not in spec or not Path(spec).parent.is_dir()


def _directory(spec: str) -> Path:
    path = Path(spec)
    if path.is_dir():
        return path
    if path.exists():
        raise InputRefused(f"{spec} is not a directory", hint="give the directory that holds config.json")
    if _is_hub_id(spec):
        name = spec.rpartition("/")[2]
        raise UsageError(
            f"{spec} is no directory here; models are not downloaded",
            hint=f"hf download {spec} --local-dir ./{name} && modelops convert ./{name} OUT",
        )
    raise missing_path("model directory", path)


def _model(directory: Path, config: Mapping[str, Any], request: Request) -> tuple[Any, list[str]]:
    """The model in eval mode with all its weights, and remarks."""
    import torch
    import transformers

    _refuse_old(transformers.__version__)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cls = _class(directory, config)
    attention = _PLAIN if request.attention == "auto" else request.attention
    try:
        model, info = cls.from_pretrained(
            str(directory),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            weights_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused by name below
            dtype=torch.float32,
            **_unmapped(cls),
            attn_implementation=attention,
        )
    except ModelOpsError:
        raise
    except MemoryError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        raise InputRefused(
            f"{directory}: transformers can't load it: {type(error).__name__}: {text}",
            hint="check that config.json and the weights belong together",
        ) from error
    _refuse_incomplete(directory, info)
    notes = []
    if request.attention == "auto" and getattr(cls, "_supports_sdpa", False):
        notes.append(_KNOWN)
    stored = config.get("dtype", config.get("torch_dtype"))
    if stored not in (None, "float32"):
        notes.append(f"weights of type {stored} were converted to float32")
    for part in (model.config, *_inner(model.config)):
        part.use_cache = False
    model.config.return_dict = True
    return model.eval(), notes


def _inner(config: Any) -> list[Any]:
    """The configurations inside a configuration."""
    found = (getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())
    return [inner for inner in found if hasattr(inner, "use_cache")]


def _refuse_old(version: str) -> None:
    """Before 5.3 a configuration could make transformers run code although it was told not to (CVE-2026-4372)."""
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (5, 3):
        raise EnvironmentMissing(
            f"transformers {version} is not safe on models from others", hint="pip install 'transformers>=5.3'"
        )


def _unmapped(cls: Any) -> dict[str, bool]:
    """Weights in memory, where transformers can do that: of a mapped file nothing is freed before all of it is."""
    parameters = inspect.signature(cls.from_pretrained).parameters
    return {"disable_mmap": True} if "disable_mmap" in parameters else {}


def _class(directory: Path, config: Mapping[str, Any]) -> Any:
    """The class that the configuration names, else the one that transformers has for its model type."""
    import transformers

    names = config.get("architectures") or []
    name = names[0] if isinstance(names, list) and names else None
    if name is None:
        return transformers.AutoModel
    cls = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise StageFailed(
            f"{directory / 'config.json'} names the architecture {name!r}, which transformers "
            f"{transformers.__version__} does not have",
            hint="install the version that has it, or convert file.py:function",
        )
    return cls


def _refuse_incomplete(directory: Path, info: Mapping[str, Any]) -> None:
    problems = []
    for key, what in (("missing_keys", "missing"), ("unexpected_keys", "unexpected"), ("mismatched_keys", "unfit")):
        names = [name if isinstance(name, str) else str(name[0]) for name in info.get(key) or ()]
        if names:
            problems.append(f"{what}: {listed(names)}")
    if problems or info.get("error_msgs"):
        text = "; ".join([*problems, *map(str, info.get("error_msgs") or ())])
        raise InputRefused(
            f"{directory}: its weights do not fit its config.json; {text}",
            hint="download it again, or correct 'architectures' in config.json",
        )
