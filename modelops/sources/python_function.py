"""Python functions: the user's own code builds the module, and gives example inputs with it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelops.core.worker import Limits
from modelops.errors import StageFailed
from modelops.sources import Loaded, Request, Source
from modelops.sources._user_code import Place, call, executed, files_of, locate, resolve, told

_SPEC = re.compile(r"(.+\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):[A-Za-z_]\w*")
_RETURNS = "return a torch module, (module, inputs), or (module, args, kwargs)"


class PythonFunction(Source):
    """file.py:function or package.module:function, which returns a module, or the module and its inputs."""

    requires = ("torch",)
    tools = ("torch",)
    takes = frozenset({"weights"})

    @classmethod
    def reads(cls, spec: str) -> bool:
        return _SPEC.fullmatch(spec) is not None

    def inputs(self, spec: str) -> Mapping[str, Path]:
        place = locate(spec)
        files = files_of(place)
        own = place.path.relative_to(place.root).as_posix()
        return {"source": files.pop(own)} | {f"source module {name}": path for name, path in files.items()}

    def limits(self, model_bytes: int) -> Limits | None:
        return code_limits(model_bytes)

    def open(self, spec: str, request: Request) -> Loaded:
        import torch

        place = locate(spec)
        found = resolve(place)
        value = found if isinstance(found, torch.nn.Module) else call(place, found)
        module, args, kwargs = _parts(value, str(place))
        module, notes = _plain(module)
        if request.weights is not None:
            from modelops.sources._weights import load_strictly

            notes += load_strictly(module, request.weights)
        notes += in_eval_mode(module, place)
        return Loaded(module=module, args=args, kwargs=kwargs, code_executed=executed(place), notes=tuple(notes))


def code_limits(model_bytes: int) -> Limits:
    """What the user's own code may use: it is trusted, and stopped only before it takes the machine down."""
    from modelops.core import machine

    del model_bytes
    return Limits(wall_seconds=3600.0, memory_bytes=int(0.9 * machine.memory_bytes()))


def in_eval_mode(module: Any, place: Place | None) -> tuple[str, ...]:
    """Put the module in eval mode; the remark to make when it was not."""
    if not any(part.training for part in module.modules()):
        return ()
    with told(place, "putting the module in eval mode"):
        module.eval()
    return ("the module was in training mode: it was put in eval mode",)


def _parts(value: Any, where: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(module, args, kwargs) of what the function returned."""
    import torch

    parts = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not parts or not isinstance(parts[0], torch.nn.Module):
        kind = type(parts[0]).__name__ if parts else "nothing"
        raise StageFailed(f"{where} returned {kind}, not a torch module", hint=_RETURNS)
    module = parts[0]
    if len(parts) == 1:
        return module, (), {}
    if len(parts) == 2:
        return module, *_called(module, parts[1])
    if len(parts) == 3 and isinstance(parts[1], (tuple, list)) and isinstance(parts[2], dict):
        return module, tuple(parts[1]), dict(parts[2])
    raise StageFailed(f"{where} returned {len(parts)} things that are not understood", hint=_RETURNS)


def _plain(module: Any) -> tuple[Any, list[str]]:
    """The module itself, on the CPU, out of what torch.compile and DataParallel put around it; and remarks."""
    import torch

    notes = []
    for attribute, around in (("_orig_mod", "torch.compile"), ("module", "DataParallel")):
        inner = getattr(module, attribute, None)
        if isinstance(inner, torch.nn.Module) and type(module).__module__.startswith("torch."):
            module = inner
            notes.append(f"the module was taken out of {around}")
    if any(tensor.device.type != "cpu" for tensor in (*module.parameters(), *module.buffers())):
        module = module.cpu()
        notes.append("the module was moved to the CPU")
    return module, notes


def _called(module: Any, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How example inputs are given to forward: a dict by name where forward has these names, else as one argument."""
    if isinstance(inputs, (tuple, list)) and not hasattr(inputs, "_fields"):
        return tuple(inputs), {}
    if isinstance(inputs, Mapping):
        parameters = inspect.signature(module.forward).parameters
        anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        if anything or set(inputs) <= set(parameters):
            return (), dict(inputs)
        return (dict(inputs),), {}
    return (inputs,), {}
