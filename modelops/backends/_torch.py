"""What the torch backends share: a source model called by the names of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from modelops.backends import Backend, Call, Module
from modelops.backends._sessions import OpenSession, check_names
from modelops.core.tensors import Signature, TensorSpec
from modelops.errors import UsageError, tool


def torch_module(backend: Backend, model: Any) -> Module:
    """The module that a torch backend was given; UsageError for an ONNX file."""
    if not isinstance(model, Module):
        raise UsageError(
            f"{backend.name} runs source models, and {model} is an ONNX file",
            hint="give the source: file.py:function, or a Hugging Face directory",
        )
    return model


class TorchSession(OpenSession):
    """A torch module on a device, run without gradients."""

    def __init__(self, model: Module, device: str, *, compiled: bool, wait: Callable[[], None] | None = None) -> None:
        import torch

        # Shapes are known only with the first feed; until then every input is a scalar of an unknown kind.
        inputs = tuple(TensorSpec(name, "unknown", ()) for name in model.input_names)
        super().__init__(Signature(inputs, tuple(TensorSpec(name, "unknown", ()) for name in model.output_names)))
        self._device = device
        self.compiled = compiled
        self._wait = wait
        with tool("torch"):
            model.module.to(device)
            if compiled:
                model.module.compile()
        self._call = torch.inference_mode()(model.call)
        self._names = model.output_names

    def prepare(self, feed: Mapping[str, Any]) -> Call:
        import numpy as np
        import torch

        check_names(self.signature, feed)
        tensors = {name: torch.from_numpy(np.array(array)).to(self._device) for name, array in feed.items()}
        call, wait = self._call, self._wait

        def once() -> Any:
            values = call(tensors)
            if wait is not None:
                wait()
            return values

        def outputs(values: Any) -> dict[str, Any]:
            names = self._names or tuple(f"output_{index}" for index in range(len(values)))
            return {
                name: (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()
                for name, value in zip(names, values, strict=False)
            }

        return Call(once, outputs, self.timer())

    def timer(self) -> Callable[[], Callable[[], float]] | None:
        return None

    def run(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        with tool("torch"):
            return super().run(feed)
