"""Exported programs: what torch.export.save wrote, a graph with its weights and example inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelops.core.worker import Limits
from modelops.errors import StageFailed, missing_path
from modelops.sources import Loaded, Request, Source
from modelops.sources._programs import executed, loading, trusted
from modelops.sources.python_function import code_limits


class ExportedProgram(Source):
    """A .pt2 file of torch.export. It is a program: torch unpickles parts of it without saying so."""

    requires = ("torch",)
    tools = ("torch",)
    takes = frozenset({"allow_code"})

    @classmethod
    def reads(cls, spec: str) -> bool:
        return spec.endswith(".pt2")

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
            what="an exported program",
            runs=lambda name: name.endswith((".pt", ".so", ".cpp", ".pkl")),
            safer="convert the function that builds the module (file.py:function)",
        )
        import torch

        with loading(path, "torch.export"):
            program = torch.export.load(path)
            module = program.module()
        if program.example_inputs is None:
            raise StageFailed(f"{path} holds no example inputs", hint="export it again, or give file.py:function")
        args, kwargs = program.example_inputs
        names, dynamic, bounds = _shapes(program)
        return Loaded(
            module=module,
            args=tuple(args),
            kwargs=dict(kwargs),
            input_names=names,
            exporters=("dynamo",),
            dynamic=dynamic,
            bounds=bounds,
            code_executed=executed(path),
        )


def _shapes(program: Any) -> tuple[tuple[str, ...], dict[str, dict[int, str]], dict[str, tuple[int, int | None]]]:
    """The names of the tensor inputs, and which of their dimensions the program lets vary, within which bounds."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    tensors = {name: values[name] for name in program.graph_signature.user_inputs if hasattr(values.get(name), "shape")}
    ranges = {str(symbol): found for symbol, found in program.range_constraints.items()}
    called: dict[str, str] = {}
    dynamic: dict[str, dict[int, str]] = {}
    for name, value in tensors.items():
        dynamic[name] = {}
        for axis, dim in enumerate(value.shape):
            symbol = str(dim)
            if isinstance(dim, int) or not symbol.isidentifier():
                continue
            if symbol not in called:
                called[symbol] = "batch" if axis == 0 and "batch" not in called.values() else f"{name}_dim{axis}"
            dynamic[name][axis] = called[symbol]
    bounds = {}
    for symbol, dim_name in called.items():
        found = ranges.get(symbol)
        if found is not None:
            high = int(found.upper) if str(found.upper).isdecimal() and int(found.upper) < 1 << 31 else None
            bounds[dim_name] = (max(1, int(found.lower)), high)
    return tuple(tensors), dynamic, bounds
