"""What every session shares, and what onnxruntime's sessions on any device share."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from modelops.backends import Backend, Call, Module
from modelops.core.tensors import Signature, TensorSpec
from modelops.errors import StageFailed, UsageError, tool

Optimization = Literal["none", "basic", "extended", "all"]
_DTYPES = {
    "float": "float32",
    "double": "float64",
    "string": "str",
}


class OpenSession:
    """A session that needs no closing: its runtime frees everything with the object."""

    def __init__(self, signature: Signature) -> None:
        self._signature = signature

    @property
    def signature(self) -> Signature:
        return self._signature

    def run(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        call = self.prepare(feed)
        return call.outputs(call.once())

    @abstractmethod
    def prepare(self, feed: Mapping[str, Any]) -> Call:
        """The same inference made ready to be timed."""

    def facts(self) -> dict[str, Any]:
        return {}

    def device_memory_bytes(self) -> int | None:
        return None

    def close(self) -> None:
        """Free what the session holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def onnx_path(backend: Backend, model: Path | Module) -> Path:
    """The path that a backend of ONNX files was given; UsageError for anything else."""
    if isinstance(model, Module):
        raise UsageError(f"{backend.name} runs ONNX files, not source models", hint="convert the model first")
    return Path(model)


def check_names(signature: Signature, feed: Mapping[str, Any]) -> None:
    """UsageError unless the feed names exactly the inputs of the signature."""
    wanted = {spec.name for spec in signature.inputs}
    if wanted != set(feed):
        raise UsageError(
            f"the model takes {', '.join(sorted(wanted))}; it was given {', '.join(sorted(feed)) or 'nothing'}",
            hint="name the arrays as the model names its inputs",
        )


def onnxruntime_options(*, threads: int, optimization: str, spinning: bool, arena: bool) -> Any:
    """onnxruntime's SessionOptions: one operator at a time, ``threads`` threads inside each."""
    import onnxruntime as ort

    levels = {
        "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
        "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    }
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = levels[optimization]
    options.enable_cpu_mem_arena = arena
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    return options


def onnxruntime_session(path: Path, options: Any, providers: list[Any]) -> Any:
    """An InferenceSession on these providers alone; StageFailed when onnxruntime can't load the model."""
    import onnxruntime as ort

    with tool("onnxruntime", hint="look at the model with: modelops inspect"):
        return ort.InferenceSession(str(path), sess_options=options, providers=providers)


def onnxruntime_signature(session: Any) -> Signature:
    """Names, dtypes and shapes as onnxruntime gives them; an anonymous dimension is named after its input and axis."""

    def spec(value: Any) -> TensorSpec:
        match = re.fullmatch(r"tensor\((\w+)\)", value.type)
        if match is None:
            raise StageFailed(
                f"{value.name!r} is {value.type}: only tensors can be run and compared",
                hint="make the model's inputs and outputs tensors (for scikit-learn, convert with zipmap=False)",
            )
        dtype = _DTYPES.get(match[1], match[1])
        shape = (
            dim if isinstance(dim, int) else str(dim) if dim else f"{value.name}_dim{axis}"
            for axis, dim in enumerate(value.shape)
        )
        return TensorSpec(value.name, dtype, tuple(shape))

    return Signature(
        tuple(spec(value) for value in session.get_inputs()), tuple(spec(value) for value in session.get_outputs())
    )
