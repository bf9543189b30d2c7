"""Pickled modules: what torch.save(model, path) wrote, a program that builds the module from importable classes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from modelops.core.worker import Limits
from modelops.errors import StageFailed, missing_path
from modelops.sources import Loaded, Request, Source
from modelops.sources._programs import executed, loading, trusted
from modelops.sources.python_function import code_limits, in_eval_mode

_SAFER = "save its state dict, and convert file.py:function with --weights"


class PickledModule(Source):
    """A .pth or .pkl file that torch.save(model) wrote, with a whole module in it. It is a program; say its --input."""

    requires = ("torch",)
    tools = ("torch",)
    takes = frozenset({"allow_code"})

    @classmethod
    def reads(cls, spec: str) -> bool:
        return spec.endswith((".pth", ".pkl", ".pickle"))

    def inputs(self, spec: str) -> Mapping[str, Path]:
        path = Path(spec)
        if not path.is_file():
            raise missing_path("file", path)
        return {"source": path}

    def limits(self, model_bytes: int) -> Limits | None:
        return code_limits(model_bytes)

    def open(self, spec: str, request: Request) -> Loaded:
        runs = str.endswith
        path = trusted(spec, request, what="a pickle", runs=lambda name: runs(name, ".pkl"), safer=_SAFER)
        import torch

        # The classes of the module are imported by name, most often from beside the file or from here.
        for folder in (str(Path.cwd()), str(path.absolute().parent)):
            if folder not in sys.path:
                sys.path.insert(0, folder)
        with loading(path, "torch"):
            module = torch.load(path, map_location="cpu", weights_only=False)
        if not isinstance(module, torch.nn.Module):
            raise StageFailed(f"{path} holds {type(module).__name__}, not a torch module", hint=_SAFER)
        return Loaded(module=module, notes=in_eval_mode(module, None), code_executed=executed(path))
