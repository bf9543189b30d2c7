"""PyTorch on the CPU, eager or compiled: the model as its author runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modelops.backends import Backend, Module, require_usable
from modelops.backends._sessions import OpenSession
from modelops.backends._torch import TorchSession, torch_module
from modelops.core import machine
from modelops.core.component import option
from modelops.core.extras import pip_hint


class TorchCpu(Backend):
    """PyTorch on the CPU; it runs the source model, not an ONNX file."""

    opens = "module"
    requires = ("torch",)
    tools = ("torch",)
    library = "torch"

    threads: int = option(
        default=0, help="Threads inside one inference; 0 is what the process may use.", min=0, max=1024
    )
    compile: bool = option(default=False, help="Compile the model with torch.compile.")

    def missing(self) -> str:
        from importlib.util import find_spec

        return "" if find_spec("torch") else f"torch is not installed; {pip_hint(['torch'])}"

    def open(self, model: Path | Module) -> OpenSession:
        require_usable(self)
        import torch

        torch.set_num_threads(self.threads or machine.usable_cpus())
        return _Session(torch_module(self, model), "cpu", compiled=self.compile)


class _Session(TorchSession):
    def facts(self) -> dict[str, Any]:
        import torch

        return {"threads": torch.get_num_threads(), "compiled": self.compiled}
