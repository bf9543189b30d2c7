"""Models run by onnxruntime on the CPU: opened with nothing left to the file, fed with nothing but what fits."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from modelops import errors
from modelops.core.tensors import Signature, TensorSpec
from modelops.graphs import describe, safety

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime
    from numpy.typing import NDArray

Optimization = Literal["disabled", "basic", "extended", "all"]
_LEVELS: Final = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
#: Threads of sessions whose results are stored: fixed, since on another number of them sums come out in another order.
THREADS: Final = 2
#: A variable by which a model could set the options of the session that loads it.
_CONFIG_FROM_MODEL: Final = "ORT_LOAD_CONFIG_FROM_MODEL"
#: Types of ml_dtypes that onnxruntime runs, but neither takes nor gives as numpy arrays.
_EXOTIC: Final = ("bfloat16", "float8")
#: onnxruntime's exceptions by what they mean while a model is loaded; the rest are failures of the tool.
_REFUSED: Final = frozenset({"InvalidProtobuf", "InvalidGraph", "NoSuchFile", "NoModel"})
_MEMORY: Final = re.compile(r"bad_alloc|[Ff]ailed to allocate memory|out of memory|OrtMemoryInfo")
_UNKNOWN: Final = re.compile(r"No Op registered for|is not a registered function/op")
_NODE: Final = (
    re.compile(r"while running (?P<op>\S+) node\. Name:'(?P<node>[^']*)'"),
    re.compile(r"Node(?: with name)? ?\(?'?(?P<node>[^')]*)'?\)? (?:Op|OpType) ?\(?(?P<op>\w+)\)?"),
    re.compile(r"implementation for (?P<op>[\w.]+)\(\d+\) node with name '(?P<node>[^']*)'"),
    re.compile(r"(?P<op>[\w.:]+)\(-?\d+\) is not a registered function/op"),
    re.compile(r'In Node, \("(?P<node>[^"]*)", (?P<op>\w+)'),
)


@dataclass
class Session:
    """An open model. ``signature`` is the file's; ``handle`` is onnxruntime's InferenceSession."""

    signature: Signature
    handle: onnxruntime.InferenceSession
    path: Path

    def close(self) -> None:
        """Free the weights and the threads."""
        del self.handle

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def session(
    path: Path,
    *,
    threads: int = 1,
    optimization: Optimization = "all",
    trusted: bool = False,
    config: Mapping[str, str] | None = None,
    optimized: Path | None = None,
    profile: Path | None = None,
    frugal: bool = False,
) -> Session:
    """Open a model on the CPU.

    ``threads`` run inside an operator, operators run one after another.
    ``trusted`` leaves out the check of a file that was rewritten or checked just now; ``config`` are session
    configuration entries; ``optimized`` is where onnxruntime saves the graph that it made of the model; ``profile`` is
    how the name of the file begins that ``handle.end_profiling()`` writes; ``frugal`` sessions run nodes in the order
    of the graph and give memory back at once, where others keep it for the next run; their threads wait idly.
    Raises InputRefused for a file that may not get in or that onnxruntime finds malformed, StageFailed with node and
    operator for one that it can't run, ResourceExhausted when memory runs out.
    """
    import onnxruntime

    if not trusted:
        safety.check(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, _LEVELS[optimization])
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.load_model_format", "ONNX")
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if frugal:
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        options.enable_mem_pattern = options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    os.environ.pop(_CONFIG_FROM_MODEL, None)
    try:
        handle = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise _failure(error, path, "loading") from error
    handle.disable_fallback()
    return Session(describe.signature(path), handle, path)


def run(
    opened: Session, feed: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None
) -> dict[str, NDArray[Any]]:
    """The outputs of one run by name, all of them or those asked for.

    Raises InputRefused, in one sentence, for a feed that does not fit the signature; StageFailed with node and
    operator when the run fails, ResourceExhausted when memory runs out.
    """
    refuse_misfit(opened.signature, feed)
    names = [spec.name for spec in opened.signature.outputs] if outputs is None else list(outputs)
    dtypes = [spec.dtype for spec in (*opened.signature.inputs, *opened.signature.outputs)]
    try:
        if any(dtype.startswith(_EXOTIC) for dtype in dtypes):
            results = _run_exotic(opened, names, feed)
        else:
            results = opened.handle.run(names, dict(feed))
    except Exception as error:
        raise _failure(error, opened.path, "running") from error
    return dict(zip(names, results, strict=True))


def _run_exotic(opened: Session, names: list[str], feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """A run with types of ml_dtypes, which cross the border as the unsigned integers of their size."""
    import ml_dtypes
    import numpy as np
    from onnx import TensorProto
    from onnxruntime import OrtValue

    codes = {"bfloat16": TensorProto.BFLOAT16, "float8_e4m3fn": TensorProto.FLOAT8E4M3FN}
    codes |= {"float8_e4m3fnuz": TensorProto.FLOAT8E4M3FNUZ, "float8_e5m2": TensorProto.FLOAT8E5M2}
    codes |= {"float8_e5m2fnuz": TensorProto.FLOAT8E5M2FNUZ}
    values = {}
    for name, array in feed.items():
        if array.dtype.name in codes:
            bits = np.ascontiguousarray(array).reshape(array.shape).view(f"uint{8 * array.dtype.itemsize}")
            values[name] = OrtValue.ortvalue_from_numpy_with_onnx_type(bits, codes[array.dtype.name])
        else:
            values[name] = OrtValue.ortvalue_from_numpy(array)
    results = []
    numbers = {code: name for name, code in codes.items()}
    for value in opened.handle.run_with_ort_values(names, values):
        if value.is_tensor() and value.element_type() in numbers:
            dtype = np.dtype(getattr(ml_dtypes, numbers[value.element_type()]))
            results.append(_bits(value, dtype))
        else:
            results.append(value.numpy())
    return results


def _bits(value: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The elements of one of onnxruntime's values on the CPU, copied."""
    import ctypes

    import numpy as np

    text = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return np.frombuffer(text, dtype=dtype).reshape(value.shape()).copy()


def refuse_misfit(signature: Signature, feed: Mapping[str, NDArray[Any]]) -> None:
    """InputRefused unless the feed has an array of the right type and shape for every input, and no other."""
    wanted = {spec.name: spec for spec in signature.inputs}
    for name in feed:
        if name not in wanted:
            guess = errors.nearest(name, wanted)
            hint = f"did you mean {guess!r}?" if guess else f"the model takes {', '.join(wanted) or 'no input'}"
            raise errors.InputRefused(f"the model has no input {name!r}", hint=hint)
    for name, spec in wanted.items():
        if name not in feed:
            raise errors.InputRefused(f"input {spec} is missing", hint=f"the feed has {', '.join(feed) or 'nothing'}")
        if problem := _misfit(spec, feed[name]):
            raise errors.InputRefused(f"input {name!r} {problem}", hint=f"the model takes {spec}")


def _misfit(spec: TensorSpec, array: NDArray[Any]) -> str:
    dtype = "object" if array.dtype.kind in "OU" else array.dtype.name
    if "(" in spec.dtype:
        return f"is no tensor but a {spec.dtype}, which can't be fed"
    if dtype != spec.dtype:
        return f"is {dtype} where the model takes {spec.dtype}"
    if spec.shape == describe.ANY_SHAPE:
        return ""
    if array.ndim != len(spec.shape):
        return f"has {array.ndim} dimensions {list(array.shape)} where the model takes {len(spec.shape)}"
    for axis, (size, dim) in enumerate(zip(array.shape, spec.shape, strict=True)):
        if isinstance(dim, int) and size != dim:
            return f"has size {size} on axis {axis} where the model takes {dim}"
    return ""


def _failure(error: Exception, path: Path, doing: str) -> errors.ModelOpsError:
    """What onnxruntime's exception means to a user, with the node and operator where its text names them."""
    if isinstance(error, errors.ModelOpsError):
        return error
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or _MEMORY.search(text):
        return errors.ResourceExhausted(
            f"onnxruntime ran out of memory {doing} {path}: {text[:300]}", hint="raise --memory-limit or free memory"
        )
    where = ""
    for pattern in _NODE:
        if match := pattern.search(text):
            found = match.groupdict()
            where = f" at node {found.get('node') or '(unnamed)'!r} ({found['op']})"
            break
    message = f"onnxruntime failed {doing} {path}{where}: {text[:400]}"
    if doing == "loading" and type(error).__name__ in _REFUSED and not _UNKNOWN.search(text):
        return errors.InputRefused(message, hint="the model is malformed: export it again")
    return errors.StageFailed(message, hint="replace or simplify that operator, or export for another operator set")
