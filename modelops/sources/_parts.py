"""What of a transformers model is converted, and with which inputs: the first that runs."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from modelops.errors import StageFailed
from modelops.sources._first_run import FirstRun, first_run
from modelops.sources._modality import Examples, candidates

log = logging.getLogger(__name__)

OWN_INPUTS = "write a function that returns the model and its inputs, and convert file.py:function"
# Heads on an encoder–decoder that judge a text as a whole: without the decoder nothing is left of them.
_JUDGES = ("ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification", "ForAudioClassification")


@dataclass(frozen=True)
class Chosen:
    """A module that ran on these inputs; ``settings`` are arguments of forward that are no tensors.

    ``first`` is that run, where nothing was done to the module or its inputs since.
    """

    module: Any
    examples: Examples
    settings: Mapping[str, Any]
    notes: tuple[str, ...]
    first: FirstRun | None = None


def choose(model: Any, directory: Path) -> Chosen:
    """The model, or the encoder of one that writes text, with inputs; StageFailed when none that are known will do."""
    tried: list[str] = []
    for part, notes, writes in _parts(model):
        for found, settings in _calls(part, model.config, directory):
            if not writes and any(spec.name == "decoder_input_ids" for spec in found.specs):
                continue
            names = ", ".join(str(spec) for spec in found.specs)
            try:
                first = first_run(partial(_outputs, part, found, settings))
            except MemoryError:
                raise
            except Exception as error:
                log.debug("%s does not run on %s", type(part).__name__, names, exc_info=True)
                tried.append(f"{names}: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
                continue
            found, fixed = _as_free_as_it_runs(part, found, settings)
            kept, left_out = _tensors(first.outputs)
            if left_out and not settings and "use_cache" in inspect.signature(part.forward).parameters:
                continue  # the next call asks for no cache
            if kept is None:
                tried.append(f"{names}: returns no tensor")
                continue
            said = (*notes, *(f"{dim} was fixed: the model itself refuses another size" for dim in fixed))
            if not left_out:
                return Chosen(part, found, settings, said, None if fixed else first)
            return Chosen(_only_tensors(part), found, settings, (*said, f"outputs left out: {', '.join(left_out)}"))
    needs = [each.name for each in inspect.signature(model.forward).parameters.values() if each.default is each.empty]
    wanted = ", ".join(needs[:6]) or str(model.main_input_name)
    raise StageFailed(
        f"no example inputs are known for {type(model).__name__}, which takes {wanted}"
        + (f"; tried {'; '.join(tried[:3])}" if tried else ""),
        hint=OWN_INPUTS,
    )


def _parts(model: Any) -> Iterator[tuple[Any, tuple[str, ...], bool]]:
    """What may be converted, the likeliest first; what is to be said of it; and whether it is given words to go on."""
    encoder = None
    if getattr(model.config, "is_encoder_decoder", False):
        try:
            encoder = model.get_encoder()
        except (AttributeError, TypeError, NotImplementedError, ValueError):  # models without one say so in each way
            log.debug("no encoder", exc_info=True)
    if encoder is None or encoder is model:
        yield model, (), True
        return
    # A detector's decoder runs once, and is a part of what it does; one that writes text runs once for every word.
    if "pixel_values" in str(model.main_input_name) or type(model).__name__.endswith(_JUDGES):
        yield model, (), False
    yield encoder, ("an encoder–decoder model: its encoder alone was converted",), False
    yield model, (), True


def _calls(part: Any, config: Any, directory: Path) -> Iterator[tuple[Examples, dict[str, Any]]]:
    """Ways to call forward: every candidate as it is, then with no cache asked for."""
    for found in candidates(part, config, directory):
        yield found, {}
        if "use_cache" in inspect.signature(part.forward).parameters:
            yield found, {"use_cache": False}


def _outputs(part: Any, found: Examples, settings: Mapping[str, Any], sizes: Mapping[str, int] | None = None) -> Any:
    import torch

    with torch.no_grad():
        return part(**found.tensors(sizes), **settings)


def _as_free_as_it_runs(part: Any, found: Examples, settings: Mapping[str, Any]) -> tuple[Examples, list[str]]:
    """The same with those lengths of sounds fixed that the module takes at one size only; and which these are."""
    fixed = []
    for dim in ("samples", "frames"):
        if any(dim in spec.shape for spec in found.specs):
            size = found.sizes[dim]
            try:
                _outputs(part, found, settings, {dim: size + size // 4 + 3})
            except Exception:  # whatever a model raises at another length: it takes this one alone, and is told so
                log.debug("%s takes %d %s alone", type(part).__name__, size, dim, exc_info=True)
                fixed.append(dim)
    return (found.fixed(fixed) if fixed else found), fixed


def _tensors(value: Any, path: str = "") -> tuple[Any, list[str]]:
    """The same structure with nothing but tensors in it, None where there is none; and the names of what is not."""
    import torch

    if value is None or isinstance(value, torch.Tensor):
        return value, []
    if isinstance(value, Mapping):
        items = [(str(key), child) for key, child in value.items()]
    elif isinstance(value, (list, tuple)):
        names = getattr(value, "_fields", range(len(value)))
        items = [(str(key), child) for key, child in zip(names, value, strict=True)]
    else:
        return None, [path or type(value).__name__]
    kept, left_out = {}, []
    for key, child in items:
        part, missing = _tensors(child, f"{path}.{key}" if path else key)
        left_out += missing
        if part is not None:
            kept[key] = part
    if not kept:
        return None, left_out
    plain = isinstance(value, (list, tuple)) and not hasattr(value, "_fields")
    return (list(kept.values()) if plain else kept), left_out


def _only_tensors(part: Any) -> Any:
    """A module with the same inputs that leaves out of the outputs what is no tensor."""
    import torch

    class OnlyTensors(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = part

        def forward(self, **inputs: Any) -> Any:
            return _tensors(self.model(**inputs))[0]

    return OnlyTensors().eval()
