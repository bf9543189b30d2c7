"""torch modules to ONNX graphs, by one exporter or the other, with the same names in what comes out.

::

    dynamo          torch.export, then torch.onnx.export of the exported program
    dynamo-fixes    the same, with the relations between dimensions that torch suggested after a failure
    dynamo-strict   the same with torch.export's strict mode, which reads Python's bytecode
    torchscript     torch.onnx.export(dynamo=False), which records one run

A rung of this ladder gives an onnx_ir model, or raises.
"""

from __future__ import annotations

import ast
import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modelops.core.tensors import TensorSpec
from modelops.errors import UsageError
from modelops.stages._causes import FrozenDimension, OtherOpset
from modelops.stages._eager import INNER, Eager
from modelops.stages._shapes import Envelope
from modelops.stages._tree import unique

if TYPE_CHECKING:
    import onnx_ir
    import torch

log = logging.getLogger(__name__)

Exporter = Literal["auto", "dynamo", "torchscript"]
OPSET = 20
"""What both exporters can write, and every runtime of the last years reads."""
NEWEST_TORCHSCRIPT = 20
_STATIC = re.compile(r"inferred a static shape of (\d+) for dimension inputs\['tensors'\]\[(\d+)\]\.shape\[(\d+)\]")
_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Job:
    """What to export: the module as a flat function, the tensors to trace with, and the shapes that it must take.

    ``outputs`` holds for every output what its dimensions are, as running the module at several sizes showed: a size,
    the name of an input's dimension, or None where neither fits.
    """

    eager: Eager
    tensors: Sequence[torch.Tensor]
    envelope: Envelope
    outputs: Mapping[str, Sequence[int | str | None]]
    opset: int | None
    scratch: Path


Rung = tuple[str, Callable[[Job], "onnx_ir.Model"]]


def ladder(exporter: Exporter, able: Sequence[str]) -> list[Rung]:
    """The rungs to try, in their order; ``able`` are the exporters that can read the source."""
    if exporter != "auto" and exporter not in able:
        raise UsageError(f"the {exporter} exporter can't read this form of source", hint=f"--exporter {able[0]}")
    wanted = able if exporter == "auto" else (exporter,)
    rungs: list[Rung] = []
    if "dynamo" in wanted:
        suggested = _Suggested()
        rungs += [("dynamo", suggested.first), ("dynamo-fixes", suggested.again), ("dynamo-strict", _strict)]
    if "torchscript" in wanted:
        rungs.append(("torchscript", _torchscript))
    return rungs


class NothingSuggested(Exception):
    """torch suggested no other shapes, so there is nothing to try again."""


class _Suggested:
    """Exports, and where torch suggests how dimensions hang together, exports again with that."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def first(self, job: Job) -> onnx_ir.Model:
        try:
            return _dynamo(job, _dynamic_shapes(job), strict=False)
        except Exception as error:
            self.error = error
            raise

    def again(self, job: Job) -> onnx_ir.Model:
        from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes

        message = getattr(self.error, "msg", str(self.error or ""))
        if "Suggested fixes" not in message:
            raise NothingSuggested
        shapes = refine_dynamic_shapes_from_suggested_fixes(message, _dynamic_shapes(job, named=True))
        return _dynamo(job, shapes, strict=False)


def _strict(job: Job) -> onnx_ir.Model:
    return _dynamo(job, _dynamic_shapes(job), strict=True)


def _dynamic_shapes(job: Job, *, named: bool = False) -> Any:
    """torch.export's form of the envelope: one entry for the one parameter, which takes all tensors."""
    from torch.export import Dim

    dims = {dim: Dim(dim) if named else Dim.DYNAMIC for dim in job.envelope.dims}
    axes = job.envelope.axes
    return (tuple({axis: dims[d] for axis, d in axes.get(spec.name, {}).items()} for spec in job.envelope.specs),)


def _dynamo(job: Job, shapes: Any, *, strict: bool) -> onnx_ir.Model:
    import torch

    with _quiet(), contextlib.ExitStack() as stack:
        stack.enter_context(torch.fx.experimental._config.patch(backed_size_oblivious=True))
        for patch in _recurrent():
            stack.enter_context(patch)
        stack.enter_context(_naming_dimensions(job.envelope))
        exported = torch.export.export(
            job.eager.flat,
            tuple(job.tensors),
            {},
            dynamic_shapes=shapes if job.envelope.dims else None,
            strict=strict,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        program = torch.onnx.export(
            exported,
            (),
            input_names=[spec.name for spec in job.envelope.specs],
            output_names=list(job.outputs),
            opset_version=job.opset or OPSET,
            dynamo=True,
            optimize=True,
            verbose=False,
        )
    return named(program.model, job)


@contextlib.contextmanager
def _naming_dimensions(envelope: Envelope) -> Iterator[None]:
    """Say by its name which dimension torch found to be fixed: it speaks of places in the wrapper's inputs."""
    try:
        yield
    except Exception as error:
        found = _STATIC.search(str(error))
        if found is None:
            raise
        size, number, axis = (int(group) for group in found.groups())
        spec = envelope.specs[number]
        raise FrozenDimension(
            f"dimension {spec.shape[axis]!r} of input {spec.name!r} is fixed at {size} by something in forward"
        ) from error


def _recurrent() -> Iterator[Any]:
    """What lets LSTM and GRU take sequences of any length, where this version of torch has it."""
    try:
        from torch.export import _patches
    except ImportError:
        return
    for name in ("register_lstm_while_loop_decomposition", "register_gru_while_loop_decomposition"):
        if hasattr(_patches, name):
            yield getattr(_patches, name)()


def _torchscript(job: Job) -> onnx_ir.Model:
    import torch

    from modelops.graphs.files import load

    opset = job.opset or OPSET
    if opset > NEWEST_TORCHSCRIPT:
        raise OtherOpset(f"the TorchScript exporter writes opset {NEWEST_TORCHSCRIPT} at most, not {opset}")
    target = job.scratch / "torchscript.onnx"
    dynamic = {name: dict(axes) for name, axes in job.envelope.axes.items()}
    for name, dims in job.outputs.items():
        found = {axis: dim or f"{name}_dim{axis}" for axis, dim in enumerate(dims) if not isinstance(dim, int)}
        if found:
            dynamic[name] = found
    # A module that is TorchScript already is read as it is: it can't be recorded inside another one.
    scripted = isinstance(job.eager.module, torch.jit.ScriptModule)
    with _quiet():
        torch.onnx.export(
            job.eager.module if scripted else job.eager.flat,
            tuple(job.tensors),
            str(target),
            input_names=[spec.name for spec in job.envelope.specs],
            output_names=list(job.outputs),
            dynamic_axes=dynamic,
            opset_version=opset,
            dynamo=False,
        )
    return named(load(target), job)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn a lot about themselves; what matters is found out by running the result."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def named(model: onnx_ir.Model, job: Job) -> onnx_ir.Model:
    """The model with the inputs, outputs, dimensions and weights named as they were asked for.

    Raises FrozenDimension where a dimension that must vary is fixed or tied to another one, OtherOpset where another
    one was asked for.
    """
    obtained = model.opset_imports.get("", 0)
    if job.opset is not None and obtained != job.opset:
        raise OtherOpset(f"opset {job.opset} was asked for, the exporter wrote {obtained}")
    _complete_inputs(model, job.envelope.specs)
    renamed = _dimensions(model, job.envelope)
    _rename_dimensions(model, renamed)
    for value, spec in zip(model.graph.inputs, job.envelope.specs, strict=True):
        value.shape = _shape(spec.shape)
    for value, dims in zip(model.graph.outputs, job.outputs.values(), strict=True):
        known = (
            list(value.shape.dims) if value.shape is not None and len(value.shape) == len(dims) else [None] * len(dims)
        )
        value.shape = _shape(
            [_output_dim(value.name, axis, *pair) for axis, pair in enumerate(zip(dims, known, strict=True))]
        )
    _rename_weights(model)
    _trim_metadata(model)
    return model


def _complete_inputs(model: onnx_ir.Model, specs: Sequence[TensorSpec]) -> None:
    """Put back inputs that the exporter left out because nothing depends on them: callers give them all the same."""
    import onnx_ir

    found = {value.name: value for value in model.graph.inputs}
    values = [found.get(spec.name) or _input(spec) for spec in specs]
    if len(values) != len(found) or list(found) != [spec.name for spec in specs]:
        model.graph.inputs.clear()
        model.graph.inputs.extend(values)
    assert all(isinstance(value, onnx_ir.Value) for value in values)


def _input(spec: TensorSpec) -> onnx_ir.Value:
    import onnx_ir

    dtype = onnx_ir.DataType.from_numpy(_numpy(spec.dtype))
    return onnx_ir.Value(name=spec.name, shape=_shape(spec.shape), type=onnx_ir.TensorType(dtype))


def _numpy(dtype: str) -> Any:
    import numpy as np

    return np.dtype(dtype)


def _shape(dims: Sequence[int | str | None]) -> onnx_ir.Shape:
    import onnx_ir

    return onnx_ir.Shape(list(dims))


def _dimensions(model: onnx_ir.Model, envelope: Envelope) -> dict[str, str]:
    """By the exporter's symbol: the name of the dimension; raises FrozenDimension."""
    found: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, envelope.specs, strict=True):
        for axis, name in envelope.axes.get(spec.name, {}).items():
            dim = value.shape[axis]
            if isinstance(dim, int):
                raise FrozenDimension(f"dimension {name!r} of input {spec.name!r} came out fixed at {dim}")
            symbol = dim.value or name
            if not re.fullmatch(r"\w+", symbol):
                raise FrozenDimension(f"dimension {name!r} of input {spec.name!r} must be {symbol}")
            if found.setdefault(symbol, name) != name:
                raise FrozenDimension(f"dimensions {found[symbol]!r} and {name!r} must be equal")
    return found


def _rename_dimensions(model: onnx_ir.Model, renamed: Mapping[str, str]) -> None:
    """Use the names wherever the exporter's symbols stand, also inside expressions."""
    import onnx_ir

    changes = {symbol: name for symbol, name in renamed.items() if symbol != name}
    if not changes:
        return
    pattern = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in sorted(changes)))
    for body in (model.graph, *model.functions.values()):
        for node in body.all_nodes():
            for value in node.outputs:
                if value.shape is not None and not value.shape.is_static():
                    value.shape = onnx_ir.Shape(
                        [
                            pattern.sub(lambda m: changes[m[0]], dim.value)
                            if isinstance(dim, onnx_ir.SymbolicDim) and dim.value
                            else dim
                            for dim in value.shape
                        ]
                    )


def _output_dim(name: str | None, axis: int, dim: int | str | None, exported: Any) -> int | str:
    """An output's dimension: as observed, else as the exporter derived it, else a name of its own."""
    if isinstance(dim, str):
        return dim
    symbol = getattr(exported, "value", None)
    if symbol:  # what was the same at every size tried may still depend on values
        return str(symbol)
    return dim if isinstance(dim, int) else f"{name}_dim{axis}"


def _rename_weights(model: onnx_ir.Model) -> None:
    """Call weights as the user's module does, without the wrapper's prefix."""
    prefix = f"{INNER}."
    values = [value for value in model.graph.initializers.values() if (value.name or "").startswith(prefix)]
    taken = {value.name for value in model.graph.initializers.values()} | {
        value.name for node in model.graph.all_nodes() for value in (*node.inputs, *node.outputs) if value is not None
    }
    taken |= {value.name for value in model.graph.inputs}
    for value in values:
        (name,) = unique([str(value.name).removeprefix(prefix)], [str(other) for other in taken])
        taken.add(name)
        value.name = name


def _trim_metadata(model: onnx_ir.Model) -> None:
    """Of what the exporter notes about itself, keep where in the user's module each node comes from."""
    bodies = [model.graph, *model.functions.values()]
    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    for body in bodies:
        body.metadata_props.clear()
        for node in body.all_nodes():
            scopes = _scopes(node.metadata_props.get(_SCOPES, ""))
            node.metadata_props.clear()
            if scopes:
                node.metadata_props[_SCOPES] = scopes
            values += node.outputs
    for value in values:
        value.metadata_props.clear()


def _scopes(text: str) -> str:
    """The modules around a node by their names in the user's module, such as "['', 'encoder', 'encoder.layer.0']"."""
    try:
        names = ast.literal_eval(text) if text else []
    except (ValueError, SyntaxError):
        return ""
    own = [name.removeprefix(f"{INNER}.") for name in names if name not in ("", INNER)]
    return str(["", *own]) if own else ""
