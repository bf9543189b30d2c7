"""What transformers knows of exporting its own models, lent to this exporter where the installed version has it.

``transformers.exporters`` holds reversible patches of models that torch.export can't read as they are, repairs of the
exported program, and translations that torch.onnx lacks. They speak of models of transformers, and only of these.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from modelops.stages._recurrences import channel_delta_rule, gated_delta_rule, linear_scan, selective_scan
from modelops.stages._windows import STAND_INS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Aid:
    """Patches to trace under, and what torch.onnx is given beside the program."""

    module: Any
    exporter: Any
    utils: Any
    dynamo: Any

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """The patches of models and of torch, for as long as the block runs."""
        self.dynamo.register_cache_pytrees_for_model(self.module)
        with contextlib.ExitStack() as stack:
            for backend in ("dynamo", "onnx"):
                stack.enter_context(self.utils.apply_patches(backend))
            stack.enter_context(self.dynamo.reset_model_state(self.module))
            stack.enter_context(_without_loops())
            stack.enter_context(_with_stand_ins(self.module))
            stack.enter_context(_grouped_experts(self.module))
            yield

    @property
    def translations(self) -> Mapping[Any, Any]:
        table: Mapping[Any, Any] = self.exporter._ONNX_TRANSLATION_TABLE
        return table

    def repair(self, program: Any) -> None:
        """Repair an exported program, in place."""
        self.utils.apply_fx_node_fixes("onnx", program.graph_module)

    def finish(self, program: Any) -> None:
        """Repair an ONNX program, in place."""
        self.exporter.apply_onnx_ir_fixes(program)


def aid_for(module: Any) -> Aid | None:
    """What helps with this module; None where it holds no model of transformers, or that version has no exporters."""
    if not any(type(part).__module__.startswith("transformers.") for part in module.modules()):
        return None
    try:
        from transformers.exporters import exporter_dynamo, exporter_onnx, utils
    except ImportError as error:
        log.debug("transformers has no exporters: %s", error)
        return None
    inner = next(part for part in module.modules() if type(part).__module__.startswith("transformers."))
    aid = Aid(inner, exporter_onnx, utils, exporter_dynamo)
    needed = {
        exporter_onnx: ("_ONNX_TRANSLATION_TABLE", "apply_onnx_ir_fixes"),
        utils: ("apply_patches", "apply_fx_node_fixes"),
        exporter_dynamo: ("register_cache_pytrees_for_model", "reset_model_state"),
    }
    missing = [name for place, names in needed.items() for name in names if not hasattr(place, name)]
    if missing:
        log.debug("transformers.exporters has no %s", ", ".join(missing))
        return None
    return aid


_SCAN = "mamba_selective_scan"
# Functions of the models' modules that go through a sequence in a loop of Python, and what does the same in a graph.
_LOOPS: Mapping[str, Callable[..., Any]] = {
    "torch_chunk_gated_delta_rule": gated_delta_rule,
    "chunk_kimi_delta_attention": channel_delta_rule,
    "mamba2_chunk_scan": selective_scan,
}


def needs_aid(module: Any) -> bool:
    """Whether the module holds what only an aided export can tell: loops over sequences, experts, windows."""
    parts = list(module.modules())
    places = {sys.modules.get(type(part).__module__) for part in parts}
    loops = any(hasattr(place, name) for place in places for name in (_SCAN, *_LOOPS))
    return loops or any(_choice_of_experts(part) is not None or _stand_ins(type(part)) for part in parts)


_BY_LOOP = (None, "eager")


def _choice_of_experts(part: Any) -> str | None:
    """How experts of transformers are run where an export needs aid: ``grouped_mm``, or one after the other, ``eager``.

    None for other modules, and for experts whose weights are gathered, which every exporter reads.
    """
    config = getattr(part, "config", None)
    ours = type(part).__module__.startswith("transformers.") and hasattr(config, "_experts_implementation_internal")
    if not (ours and hasattr(part, "has_gate") and hasattr(part, "is_transposed")):
        return None
    chosen = getattr(config, "_experts_implementation", None)
    return "eager" if chosen in _BY_LOOP else "grouped_mm" if chosen == "grouped_mm" else None


@contextlib.contextmanager
def _grouped_experts(module: Any) -> Iterator[None]:
    """Experts that run one after the other, over the tokens that chose them, run as one grouped product instead."""
    parts = [part for part in module.modules() if _choice_of_experts(part) == "eager"]
    with contextlib.ExitStack() as stack:
        for config in {id(part.config): part.config for part in parts}.values():
            stack.enter_context(_replaced(config, "_experts_implementation_internal", "grouped_mm"))
        yield


def _stand_ins(cls: type) -> Mapping[str, Callable[..., Any]]:
    """What takes the place of methods of this class."""
    ours = cls.__module__.startswith("transformers.")
    return STAND_INS.get(cls.__name__, {}) if ours else {}


@contextlib.contextmanager
def _with_stand_ins(module: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for cls in {type(part) for part in module.modules()}:
            for name, method in _stand_ins(cls).items():
                stack.enter_context(_replaced(cls, name, method))
        yield


@contextlib.contextmanager
def _without_loops() -> Iterator[None]:
    """State space models and linear attention go through a sequence in a loop that a graph of any length can't hold.

    For as long as the block runs, a scan that ONNX has as well takes the place of each: of state space models by the
    form of them that transformers has for torch.compile, with an associative scan.
    """
    # The package gives the function under the name of the module that holds it.
    places = importlib.import_module("torch._higher_order_ops.associative_scan")
    models = [module for name, module in list(sys.modules.items()) if name.startswith("transformers.models.")]
    found = [module for module in models if hasattr(module, _SCAN) and hasattr(module, "is_torchdynamo_exporting")]
    with contextlib.ExitStack() as stack:
        for module in models:
            if module.__name__.endswith(".modeling_llama4") and hasattr(module, "apply_rotary_emb"):
                stack.enter_context(_replaced(module, "apply_rotary_emb", rotated))
        for name, scan in _LOOPS.items():
            for module in models:
                if hasattr(module, name):
                    stack.enter_context(_replaced(module, name, scan))
        if found:
            stack.enter_context(_replaced(places, "associative_scan", linear_scan))
        for module in found:
            stack.enter_context(_replaced(module, _SCAN, _scanning(module, getattr(module, _SCAN))))
        yield


def rotated(query: Any, key: Any, turns: Any) -> tuple[Any, Any]:
    """Queries and keys [batch, length, heads, size] with neighbours turned as complex numbers, in real numbers.

    The same as Llama 4's own, which indexes complex tensors [batch, length, size / 2] as torch.onnx can't.
    """
    import torch

    cos, sin = torch.view_as_real(turns).unsqueeze(2).unbind(-1)

    def turned(value: Any) -> Any:
        real, imaginary = value.float().unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
        return pairs.flatten(3).type_as(value)

    return turned(query), turned(key)


def _scanning(module: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    def scan(*args: Any, **kwargs: Any) -> Any:
        with (
            _replaced(module, "is_torchdynamo_compiling", lambda: True),
            _replaced(module, "is_torchdynamo_exporting", lambda: False),
        ):
            return original(*args, **{**kwargs, "use_associative_scan": True, "use_mambapy": False})

    return scan


@contextlib.contextmanager
def _replaced(place: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)
