"""TorchScript: what torch.jit.save wrote, a module with the code of its methods."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from modelops.core.worker import Limits
from modelops.errors import StageFailed, missing_path
from modelops.sources import Loaded, Request, Source
from modelops.sources._programs import executed, loading, members, trusted
from modelops.sources.python_function import code_limits


class Torchscript(Source):
    """A .pt file of torch.jit. It is a program, and goes through the TorchScript exporter; say its --input."""

    requires = ("torch",)
    tools = ("torch",)
    takes = frozenset({"allow_code"})

    @classmethod
    def reads(cls, spec: str) -> bool:
        return spec.endswith((".pt", ".ts", ".torchscript"))

    def inputs(self, spec: str) -> Mapping[str, Path]:
        path = Path(spec)
        if not path.is_file():
            raise missing_path("file", path)
        return {"source": path}

    def limits(self, model_bytes: int) -> Limits | None:
        return code_limits(model_bytes)

    def open(self, spec: str, request: Request) -> Loaded:
        path = trusted(
            spec,
            request,
            what="TorchScript, or a pickle",
            runs=lambda name: "/code/" in name or name.endswith(".pkl"),
            safer="convert the function that builds the module (file.py:function), with --weights for a state dict",
        )
        if not any("/code/" in name for name in members(path)):
            raise StageFailed(f"{path} is no TorchScript archive", hint="if it holds a module: --source pickled-module")
        import torch

        with loading(path, "torch.jit"):
            module = torch.jit.load(path, map_location="cpu").eval()
        return Loaded(module=module, exporters=("torchscript",), code_executed=executed(path))
