"""OpenVINO on the CPU: on machines with AMX often several times as fast as onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from modelops.backends import Backend, Call, Module, require_usable
from modelops.backends._sessions import OpenSession, check_names, onnx_path
from modelops.core import machine
from modelops.core.component import option
from modelops.core.extras import pip_hint
from modelops.core.tensors import Signature, TensorSpec
from modelops.errors import tool
from modelops.measures.gates import TransitionName


class OpenvinoCpu(Backend):
    """OpenVINO with its CPU plugin, set for low latency."""

    requires = ("openvino",)
    tools = ("openvino",)
    library = "openvino"

    threads: int = option(
        default=0, help="Threads inside one inference; 0 is what the process may use.", min=0, max=1024
    )
    precision: Literal["f32", "bf16", "auto"] = option(
        default="f32",
        help="What float32 layers are computed in; auto lets OpenVINO choose, and it picks bf16 where that is fast.",
    )

    def loses(self) -> TransitionName:
        return "structural" if self.precision == "f32" else "bfloat16"

    def missing(self) -> str:
        from importlib.util import find_spec

        return "" if find_spec("openvino") else f"openvino is not installed; {pip_hint(['openvino'])}"

    def open(self, model: Path | Module) -> OpenSession:
        require_usable(self)
        import openvino as ov

        threads = self.threads or machine.usable_cpus()
        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
        # Pinning would put two processes that are compared on the same cores, and break with a changed affinity.
        config["ENABLE_CPU_PINNING"] = False
        if self.precision != "auto":
            config["INFERENCE_PRECISION_HINT"] = self.precision
        with tool("openvino", hint="run it with --backend onnxruntime-cpu"):
            compiled = ov.Core().compile_model(str(onnx_path(self, model)), "CPU", config)
        return _Session(compiled, threads)


class _Session(OpenSession):
    def __init__(self, compiled: Any, threads: int) -> None:
        super().__init__(Signature(_specs(compiled.inputs), _specs(compiled.outputs)))
        self._compiled = compiled
        self._threads = threads

    def prepare(self, feed: Mapping[str, Any]) -> Call:
        check_names(self.signature, feed)
        # Ports are named by one of the tensor's names, so that a port is found whatever else it is called.
        ports = {spec.name: port for spec, port in zip(self.signature.inputs, self._compiled.inputs, strict=True)}
        values = {ports[name]: array for name, array in feed.items()}
        names = [spec.name for spec in self.signature.outputs]
        request = self._compiled.create_infer_request()
        infer = request.infer

        def outputs(result: Any) -> dict[str, Any]:
            import numpy as np

            return {name: np.array(result[index]) for index, name in enumerate(names)}

        return Call(lambda: infer(values, share_inputs=True, share_outputs=True), outputs)

    def run(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        with tool("openvino"):
            return super().run(feed)

    def facts(self) -> dict[str, Any]:
        wanted = ("INFERENCE_NUM_THREADS", "INFERENCE_PRECISION_HINT", "NUM_STREAMS", "ENABLE_CPU_PINNING")
        return {"threads": self._threads, **{key.lower(): str(self._compiled.get_property(key)) for key in wanted}}


def _specs(ports: Any) -> tuple[TensorSpec, ...]:
    import numpy as np

    def spec(port: Any) -> TensorSpec:
        name = port.get_any_name()
        shape = (
            dim.get_length() if dim.is_static else f"{name}_dim{axis}" for axis, dim in enumerate(port.partial_shape)
        )
        return TensorSpec(name, np.dtype(port.element_type.to_dtype()).name, tuple(shape))

    return tuple(spec(port) for port in ports)
