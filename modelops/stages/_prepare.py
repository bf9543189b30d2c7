"""What a source gave, made ready to be run and exported: example inputs, names, and dimensions that may vary."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modelops.core.tensors import Signature, TensorSpec
from modelops.errors import StageFailed, UsageError, unknown_name
from modelops.graphs.seeded import random_feed
from modelops.sources import Loaded
from modelops.sources._first_run import FirstRun, first_run
from modelops.sources._user_code import summary, told
from modelops.stages._eager import Eager, parameters
from modelops.stages._effort import Effort, settle_threads
from modelops.stages._given import Given, Samples
from modelops.stages._shapes import Envelope, by_batch, declared, from_specs, parse_bounds, parse_input

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from modelops.stages.convert import Convert

log = logging.getLogger(__name__)

Bounds = Mapping[str, tuple[int, int | None]]
_STATIC_SIZES = {"batch": 1, "sequence": 128}


@dataclass(frozen=True)
class Prepared:
    """A module that has run on its example inputs, and the shapes that its conversion must take.

    ``examples`` are the inputs that the user gave, to draw others like them; empty where they were made up.
    ``outputs`` are what came out of the first run, on the inputs ``probed``. ``samples`` are those of ``--data``, to be
    run as they are.
    """

    eager: Eager
    envelope: Envelope
    examples: Mapping[str, NDArray[Any]]
    ranges: Mapping[str, int]
    probed: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[Any]]
    effort: Effort = field(default_factory=Effort)
    samples: Samples | None = None


def prepare(loaded: Loaded, stage: Convert, given: Given | None = None) -> Prepared:
    """Run the module on its example inputs, with a batch of two or more; the errors name what to change."""
    asked = tuple(parse_input(text) for text in stage.input)
    bounds = {**loaded.bounds, **parse_bounds(stage.dim)}
    if stage.static and (stage.dim or any(spec.dynamic for spec in asked)):
        raise UsageError("--static leaves no dimension to vary", hint="leave out --static, or give sizes in --input")
    own = bool(loaded.args or loaded.kwargs)
    if given is not None and not own and not asked:
        asked = given.specs(double=_computes_in_float64(loaded.module), static=stage.static)
    if own:
        eager = Eager(loaded.module, loaded.args, loaded.kwargs, loaded.input_names)
        if not eager.input_names:
            raise StageFailed("there is no tensor among the example inputs", hint="give the module's inputs as tensors")
    else:
        eager = _from_description(loaded, asked, bounds)
    made_up = loaded.drawn or not own
    specs = _named(eager, loaded, asked, bounds, static=stage.static)
    _refuse_unknown(stage, specs)
    examples = {} if made_up else eager.feed()
    samples = given.samples(Signature(specs, ())) if given is not None else None
    if samples is not None:
        examples = next(samples.feeds(len(samples)))
        if not own:
            eager.tensors = _tensors(eager, next(samples.feeds(2)))
    hint = "write a function that gives inputs of your own, and convert file.py:function" if loaded.drawn else ""
    with told(None, "running the module on its example inputs", hint=hint):
        probed = eager.feed()
        first = loaded.first or first_run(lambda: eager.call(probed))
        outputs = eager.named(first.outputs)
    effort = _effort(first, probed)
    envelope = _settled(eager, specs, bounds, loaded, redraw=loaded.drawn and bool(asked or stage.static))
    return Prepared(eager, envelope, examples, loaded.ranges, probed, outputs, effort, samples)


def _effort(first: FirstRun, feed: Mapping[str, NDArray[Any]]) -> Effort:
    return Effort.of(first, next((len(array) for array in feed.values() if array.ndim), 1))


def _computes_in_float64(module: Any) -> bool:
    return any(str(tensor.dtype) == "torch.float64" for tensor in (*module.parameters(), *module.buffers()))


def _tensors(eager: Eager, feed: Mapping[str, NDArray[Any]]) -> list[torch.Tensor]:
    import torch

    return [torch.from_numpy(feed[name]) for name in eager.input_names]


def _from_description(loaded: Loaded, asked: Sequence[TensorSpec], bounds: Bounds) -> Eager:
    """The module with inputs made up from what --input says, by name where forward has these names."""
    import torch

    if not asked:
        raise UsageError(
            "the source gives no example inputs",
            hint='say what the module takes: --input "x:float32[batch,3,224,224]", or give samples with --data',
        )
    envelope = from_specs(asked, bounds)
    feed = random_feed(envelope.signature, 2, 0, envelope.traced, loaded.ranges)
    tensors = {name: torch.from_numpy(array) for name, array in feed.items()}
    names = parameters(loaded.module)
    if set(tensors) <= set(names):
        tensors = {name: tensors[name] for name in names if name in tensors}
        if list(tensors) != names[: len(tensors)]:
            return Eager(loaded.module, (), tensors)
    return Eager(loaded.module, tuple(tensors.values()), {}, tuple(tensors))


def _named(
    eager: Eager, loaded: Loaded, asked: Sequence[TensorSpec], bounds: Bounds, *, static: bool
) -> tuple[TensorSpec, ...]:
    """The inputs with their dynamic dimensions by name."""
    fixed = eager.specs()
    if loaded.dynamic is not None:
        dynamic = loaded.dynamic
        specs = tuple(
            TensorSpec(s.name, s.dtype, tuple(dynamic.get(s.name, {}).get(axis, n) for axis, n in enumerate(s.shape)))
            for s in fixed
        )
        if loaded.drawn:
            if static:
                specs = tuple(TensorSpec(s.name, s.dtype, tuple(_static(d, bounds) for d in s.shape)) for s in specs)
            return _overridden(specs, asked)
        return _agreed(fixed, fixed if static else specs, asked)
    if not (loaded.args or loaded.kwargs):
        by_name = {spec.name: spec for spec in asked}
        return tuple(by_name[spec.name] for spec in fixed)
    return _agreed(fixed, fixed if static else by_batch(fixed), asked)


def _agreed(
    fixed: Sequence[TensorSpec], default: Sequence[TensorSpec], asked: Sequence[TensorSpec]
) -> tuple[TensorSpec, ...]:
    """The inputs as --input names their dimensions, and as they are by default where it says nothing."""
    named = {spec.name for spec in asked}
    agreed = declared(fixed, asked)
    return tuple(one if one.name in named else other for one, other in zip(agreed, default, strict=True))


def _static(dim: int | str, bounds: Bounds) -> int:
    if isinstance(dim, int):
        return dim
    size = _STATIC_SIZES.get(dim, 128)
    high = bounds.get(dim, (1, None))[1]
    return min(size, high) if high else size


def _overridden(specs: Sequence[TensorSpec], asked: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Inputs whose shapes the source made up, with those that the user wants."""
    known = {spec.name: spec for spec in specs}
    for wanted in asked:
        if wanted.name not in known:
            raise unknown_name("input in --input", wanted.name, known)
        given = known[wanted.name]
        if (wanted.dtype, len(wanted.shape)) != (given.dtype, len(given.shape)):
            raise UsageError(f"--input says {wanted}, the model takes {given}", hint="make the two agree")
        known[wanted.name] = wanted
    return tuple(known.values())


def _refuse_unknown(stage: Convert, specs: Sequence[TensorSpec]) -> None:
    dims = Signature(tuple(specs), ()).dynamic
    for dim in parse_bounds(stage.dim):
        if dim not in dims:
            raise unknown_name("dimension in --dim", dim, dims)


def _settled(eager: Eager, specs: Sequence[TensorSpec], bounds: Bounds, loaded: Loaded, *, redraw: bool) -> Envelope:
    """The envelope, and the module's example inputs brought to sizes that can be traced with: none of them 1."""
    specs = tuple(
        TensorSpec(s.name, s.dtype, tuple(1 if bounds.get(str(dim), (1, None))[1] == 1 else dim for dim in s.shape))
        for s in specs
    )
    if redraw:
        envelope = from_specs(specs, bounds)
        feed = random_feed(envelope.signature, 2, 0, envelope.traced, loaded.ranges)
        eager.tensors = _tensors(eager, feed)
        with told(None, "running the module on inputs of these shapes"):
            eager.run(eager.feed())
        return envelope
    traced: dict[str, int] = {}
    for spec, tensor in zip(specs, eager.tensors, strict=True):
        for dim, size in zip(spec.shape, tensor.shape, strict=True):
            if isinstance(dim, str) and traced.setdefault(dim, int(size)) != size:
                raise UsageError(
                    f"the example inputs have sizes {traced[dim]} and {size} for the dimension {dim!r}",
                    hint="name the dimensions with --input, or give examples that agree",
                )
    envelope = Envelope(
        specs, {dim: _traceable(size, *bounds.get(dim, (1, None))) for dim, size in traced.items()}, bounds
    )
    if envelope.traced != traced:
        eager.tensors = _grown(eager, envelope, envelope.traced)
    return envelope


def _traceable(size: int, low: int, high: int | None) -> int:
    """The size nearest to the example's that is within the bounds, and not 1."""
    return max(2, low, min(size, high or size))


def _grown(eager: Eager, envelope: Envelope, sizes: Mapping[str, int]) -> list[torch.Tensor]:
    """The example inputs brought to these sizes, repeated where they are too short."""
    import torch

    found = []
    for spec, tensor in zip(envelope.specs, eager.tensors, strict=True):
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str):
                tensor = tensor.index_select(axis, torch.arange(sizes[dim]) % tensor.shape[axis])
        found.append(tensor)
    return found


def refuse_fixed(eager: Eager, envelope: Envelope) -> None:
    """StageFailed where the module itself takes a dimension at one size only: no exporter could make it vary."""
    for dim, size in envelope.traced.items():
        high = envelope.high(dim)
        others = [other for other in (size + 1, 2 * size, size - 1) if other >= 1 and (high is None or other <= high)]
        refusals: list[tuple[int, Exception]] = []
        for other in others:
            try:
                eager.flat(*_grown(eager, envelope, {**envelope.traced, dim: other}))
                break
            except Exception as error:
                refusals.append((other, error))
        if others and len(refusals) == len(others):
            refused, why = refusals[0]
            raise StageFailed(
                f"dimension {dim!r} can't be dynamic, the module itself refuses size {refused}: {summary(why)}",
                hint="make forward take any size there, or convert with --static",
            ) from why


def refuse_random(prepared: Prepared, rows: int) -> None:
    """StageFailed where two runs on one input differ: there is then nothing to hold a conversion against.

    Settles on how many threads the module runs for that many rows.
    """
    with told(None, "running the module on its example inputs again"):
        threads = prepared.effort.threads(rows)
        differing = settle_threads(prepared.eager, prepared.probed, prepared.outputs, threads)
    if differing is not None:
        raise StageFailed(
            f"output {differing!r} differs between two runs on the same input",
            hint="is there dropout without training=self.training, or other randomness in forward?",
        )
