"""torch modules to ONNX graphs, by one exporter or the other, with the same names in what comes out.

::

    dynamo          torch.export, then torch.onnx.export of the exported program
    dynamo-fixes    the same, with the relations between dimensions that torch suggested after a failure
    dynamo-aided    the same under the patches that transformers has for exporting its own models
    dynamo-strict   the same with torch.export's strict mode, which reads Python's bytecode
    torchscript     torch.onnx.export(dynamo=False), which records one run

A rung of this ladder gives an onnx_ir model, or raises.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modelops.errors import UsageError
from modelops.stages._causes import FrozenDimension, OtherOpset, classify
from modelops.stages._eager import Eager
from modelops.stages._naming import OUTSIDE, named
from modelops.stages._shapes import Envelope
from modelops.stages._transformers import Aid, aid_for, needs_aid

if TYPE_CHECKING:
    import onnx_ir
    import torch

log = logging.getLogger(__name__)

Exporter = Literal["auto", "dynamo", "torchscript"]
OPSET = 20
"""What both exporters can write, and every runtime of the last years reads."""
NEWEST_TORCHSCRIPT = 20
_STAYING = ("unsupported operator", "memory", "other opset")
"""Causes of failure that the way of tracing has no part in."""
_STATIC = re.compile(r"inferred a static shape of (\d+) for dimension inputs\['tensors'\]\[(\d+)\]\.shape\[(\d+)\]")


@dataclass(frozen=True)
class Job:
    """What to export: the module as a flat function, the tensors to trace with, and the shapes that it must take.

    ``observed`` gives for every output what its dimensions are, as running the module at several sizes showed: a size,
    the name of an input's dimension, or None where neither fits. It may have to wait for that.
    """

    eager: Eager
    tensors: Sequence[torch.Tensor]
    envelope: Envelope
    observed: Callable[[], Mapping[str, Sequence[int | str | None]]]
    opset: int | None
    scratch: Path

    @property
    def outputs(self) -> Mapping[str, Sequence[int | str | None]]:
        return self.observed()


Rung = tuple[str, Callable[[Job], "onnx_ir.Model"]]


def ladder(exporter: Exporter, able: Sequence[str]) -> list[Rung]:
    """The rungs to try, in their order; ``able`` are the exporters that can read the source."""
    if exporter != "auto" and exporter not in able:
        raise UsageError(f"the {exporter} exporter can't read this form of source", hint=f"--exporter {able[0]}")
    wanted = able if exporter == "auto" else (exporter,)
    rungs: list[Rung] = []
    if "dynamo" in wanted:
        tries = _Tries()
        rungs += [("dynamo", tries.first), ("dynamo-fixes", tries.again)]
        rungs += [("dynamo-aided", tries.aided), ("dynamo-strict", tries.strict)]
    if "torchscript" in wanted:
        rungs.append(("torchscript", _torchscript))
    return rungs


class NothingSuggested(Exception):
    """This rung has nothing that those before it have not tried: no other shapes, no patches."""


class _Tries:
    """Exports by torch.export, each attempt in the light of how those before it failed."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def first(self, job: Job) -> onnx_ir.Model:
        if needs_aid(job.eager.module) and aid_for(job.eager.module) is not None:
            raise NothingSuggested  # it would fail, or take every step of a loop and fix the length
        return self._made(lambda: _dynamo(job, _dynamic_shapes(job), strict=False))

    def again(self, job: Job) -> onnx_ir.Model:
        from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes

        message = getattr(self.error, "msg", str(self.error or ""))
        if "Suggested fixes" not in message:
            raise NothingSuggested
        shapes = refine_dynamic_shapes_from_suggested_fixes(message, _dynamic_shapes(job, named=True))
        return self._made(lambda: _dynamo(job, shapes, strict=False))

    def aided(self, job: Job) -> onnx_ir.Model:
        aid = aid_for(job.eager.module)
        if aid is None:
            raise NothingSuggested
        return self._made(lambda: _dynamo(job, _dynamic_shapes(job), strict=False, aid=aid))

    def strict(self, job: Job) -> onnx_ir.Model:
        # Another way to trace leads to the same operators, and to the same loops.
        if needs_aid(job.eager.module) or (self.error is not None and classify(self.error).kind in _STAYING):
            raise NothingSuggested
        return _dynamo(job, _dynamic_shapes(job), strict=True)

    def _made(self, export: Callable[[], onnx_ir.Model]) -> onnx_ir.Model:
        try:
            return export()
        except Exception as error:
            self.error = error
            raise


def _dynamic_shapes(job: Job, *, named: bool = False) -> Any:
    """torch.export's form of the envelope: one entry for the one parameter, which takes all tensors."""
    from torch.export import Dim

    dims = {dim: Dim(dim) if named else Dim.DYNAMIC for dim in job.envelope.dims}
    axes = job.envelope.axes
    return (tuple({axis: dims[d] for axis, d in axes.get(spec.name, {}).items()} for spec in job.envelope.specs),)


def _dynamo(job: Job, shapes: Any, *, strict: bool, aid: Aid | None = None) -> onnx_ir.Model:
    import torch

    with _quiet(), contextlib.ExitStack() as stack:
        if aid is not None:
            stack.enter_context(aid.patched())
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
        if aid is not None:
            aid.repair(exported)
        program = torch.onnx.export(
            exported,
            (),
            # Names of its own: torch.onnx does not look whether a value inside has the name of an output.
            input_names=[f"{OUTSIDE}input_{number}" for number in range(len(job.envelope.specs))],
            output_names=[f"{OUTSIDE}output_{number}" for number in range(len(job.eager.output_names))],
            opset_version=job.opset or OPSET,
            custom_translation_table=dict(aid.translations) if aid is not None else None,
            dynamo=True,
            optimize=True,
            verbose=False,
        )
        if aid is not None:
            aid.finish(program)
    # Only here, where no patches are left: what the outputs are may still have to be found out by running the source.
    return named(program.model, job.envelope, job.outputs, job.opset)


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
    return named(load(target), job.envelope, job.outputs, job.opset)


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
