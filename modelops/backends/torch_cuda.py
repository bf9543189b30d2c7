"""PyTorch on an NVIDIA GPU, eager or compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelops.backends import Backend, Module, require_usable
from modelops.backends._cuda import smi
from modelops.backends._sessions import OpenSession
from modelops.backends._torch import TorchSession, torch_module
from modelops.core.component import option
from modelops.core.extras import pip_hint
from modelops.measures.gates import TransitionName


class TorchCuda(Backend):
    """PyTorch on an NVIDIA GPU; it runs the source model, not an ONNX file."""

    opens = "module"
    requires = ("torch",)
    tools = ("torch",)
    library = "torch"

    device: int = option(default=0, help="Number of the GPU.", min=0)
    compile: bool = option(default=False, help="Compile the model with torch.compile.")
    tf32: bool = option(default=False, help="Let float32 products be computed with 10 bits of mantissa.")

    def loses(self) -> TransitionName:
        return "float16" if self.tf32 else "structural"

    def missing(self) -> str:
        from importlib.util import find_spec

        if not find_spec("torch"):
            return f"torch is not installed; {pip_hint(['torch'])}"
        import torch

        if torch.version.cuda is None:
            return f"torch {torch.__version__} was built without CUDA; pip install torch --index-url {_index()}"
        if torch.cuda.device_count() <= self.device:
            count = torch.cuda.device_count()
            return f"torch finds {count} CUDA devices, and device {self.device} was asked for; look at nvidia-smi"
        return ""

    def open(self, model: Path | Module) -> OpenSession:
        require_usable(self)
        import torch

        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        torch.backends.cudnn.allow_tf32 = self.tf32
        torch.backends.cudnn.benchmark = True
        torch.cuda.set_device(self.device)
        device = f"cuda:{self.device}"
        return _Session(torch_module(self, model), device, compiled=self.compile, wait=torch.cuda.synchronize)


def _index() -> str:
    return "https://download.pytorch.org/whl/cu128"


class _Session(TorchSession):
    def timer(self) -> Callable[[], Callable[[], float]]:
        """Events around whatever is run on the current stream."""
        import torch

        def started() -> Callable[[], float]:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()

            def elapsed() -> float:
                stop.record()
                stop.synchronize()
                return float(start.elapsed_time(stop)) * 1e6

            return elapsed

        return started

    def facts(self) -> dict[str, Any]:
        import torch

        device = torch.cuda.current_device()
        properties = torch.cuda.get_device_properties(device)
        # nvidia-smi counts all devices, torch those that CUDA_VISIBLE_DEVICES leaves: the UUID is the same for both.
        uuid = getattr(properties, "uuid", None)
        shown = smi(f"GPU-{uuid}" if uuid else str(device))
        return {"threads": 1, "compiled": self.compiled, "device": {"name": properties.name, **shown}}

    def device_memory_bytes(self) -> int | None:
        import torch

        return int(torch.cuda.max_memory_reserved())
