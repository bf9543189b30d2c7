"""What transformers knows of exporting its own models, lent to this exporter where the installed version has it.

``transformers.exporters`` holds reversible patches of models that torch.export can't read as they are, repairs of the
exported program, and translations that torch.onnx lacks. They speak of models of transformers, and only of these.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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
