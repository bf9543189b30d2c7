"""onnxruntime on an NVIDIA GPU, with inputs and outputs bound to device memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from modelops.backends import Backend, Call, Module, NodeTime, require_usable
from modelops.backends._cuda import Cuda
from modelops.backends._node_times import node_times
from modelops.backends._sessions import (
    OpenSession,
    check_names,
    onnx_path,
    onnxruntime_options,
    onnxruntime_session,
    onnxruntime_signature,
)
from modelops.core.component import option
from modelops.errors import EnvironmentMissing, tool
from modelops.measures.gates import TransitionName

_INSTALL = "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"


class OnnxruntimeCuda(Backend):
    """onnxruntime with its CUDA execution provider; what it can't run falls back to the CPU, and is counted."""

    tools = ("onnxruntime-gpu",)
    library = "onnxruntime"
    profiles = True

    device: int = option(default=0, help="Number of the GPU.", min=0)
    optimization: Literal["none", "basic", "extended", "all"] = option(
        default="all", help="Level of graph optimisation."
    )
    tf32: bool = option(default=False, help="Let float32 products be computed with 10 bits of mantissa.")

    def loses(self) -> TransitionName:
        return "float16" if self.tf32 else "structural"

    def missing(self) -> str:
        from importlib.util import find_spec

        if not find_spec("onnxruntime"):
            return f"onnxruntime-gpu is not installed; {_INSTALL}"
        import onnxruntime as ort

        if "CUDAExecutionProvider" not in ort.get_available_providers():
            return f"this onnxruntime was built without CUDA; {_INSTALL}"
        found = Cuda.devices()
        if found <= self.device:
            return f"CUDA finds {found} devices, and device {self.device} was asked for; look at nvidia-smi"
        return ""

    def open(self, model: Path | Module) -> OpenSession:
        import onnxruntime as ort

        require_usable(self)
        if hasattr(ort, "preload_dlls"):  # finds CUDA and cuDNN where pip put them
            ort.preload_dlls()
        cuda = Cuda(self.device)
        provider = (
            "CUDAExecutionProvider",
            {
                "device_id": str(self.device),
                "user_compute_stream": str(cuda.stream),
                "use_tf32": "1" if self.tf32 else "0",
                "cudnn_conv_algo_search": "EXHAUSTIVE",
            },
        )
        before = cuda.used_bytes()
        session = onnxruntime_session(onnx_path(self, model), self._options(), [provider, "CPUExecutionProvider"])
        if "CUDAExecutionProvider" not in session.get_providers():
            raise EnvironmentMissing(
                "onnxruntime could not start its CUDA provider: a library of CUDA or cuDNN is missing", hint=_INSTALL
            )
        return _Session(session, cuda, before)

    def profile(self, model: Path, feed: Mapping[str, Any], scratch: Path, runs: int) -> list[NodeTime]:
        require_usable(self)
        provider = ("CUDAExecutionProvider", {"device_id": str(self.device), "use_tf32": "1" if self.tf32 else "0"})
        return node_times(model, feed, scratch, runs, self._options(), [provider, "CPUExecutionProvider"])

    def _options(self) -> Any:
        return onnxruntime_options(threads=1, optimization=self.optimization, spinning=False, arena=True)


class _Session(OpenSession):
    def __init__(self, session: Any, cuda: Cuda, used_before_bytes: int) -> None:
        super().__init__(onnxruntime_signature(session))
        self._session = session
        self._cuda = cuda
        self._used_before = used_before_bytes

    def prepare(self, feed: Mapping[str, Any]) -> Call:
        import onnxruntime as ort

        check_names(self.signature, feed)
        binding = self._session.io_binding()
        # The inputs must outlive the binding, which keeps only their addresses.
        held = {
            name: ort.OrtValue.ortvalue_from_numpy(array, "cuda", self._cuda.device) for name, array in feed.items()
        }
        for name, value in held.items():
            binding.bind_ortvalue_input(name, value)
        names = [spec.name for spec in self.signature.outputs]
        for name in names:
            binding.bind_output(name, "cuda", self._cuda.device)
        binding.synchronize_inputs()
        session, wait = self._session, self._cuda.synchronize

        def once() -> Any:
            session.run_with_iobinding(binding)
            wait()
            return held

        def outputs(_: Any) -> dict[str, Any]:
            return dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))

        return Call(once, outputs, self._cuda.timer)

    def run(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        with tool("onnxruntime"):
            return super().run(feed)

    def facts(self) -> dict[str, Any]:
        return {"threads": 1, "providers": self._session.get_providers(), "device": self._cuda.described()}

    def device_memory_bytes(self) -> int | None:
        # Whoever else is on the device is paused meanwhile, so that what was added is this session's.
        return max(0, self._cuda.used_bytes() - self._used_before)
