"""The shapes that a model is asked to take: which dimensions may vary, how far, and which sizes are tried."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelops.core.tensors import Signature, TensorSpec
from modelops.errors import UsageError, unknown_name
from modelops.graphs.batches import BatchAxis

_DTYPES = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
_INPUT = re.compile(r"\s*(?P<name>[\w.]+)\s*:\s*(?P<dtype>\w+)\s*\[(?P<dims>[^\[\]]*)\]\s*")
_DIM = re.compile(r"\s*(?P<name>[A-Za-z_]\w*)\s*=\s*(?P<low>\d+)\s*\.\.\s*(?P<high>\d+)?\s*")
_BATCH = "batch"
# Sizes to trace dimensions with where nobody gave an example; odd corners differ from all of them.
_FIRST_SIZES = (12, 20, 28, 36, 44, 52)
_LARGE = 4


def parse_input(text: str) -> TensorSpec:
    """What a user writes as "x:float32[batch,3,224,224]"; UsageError when it is not of that form."""
    found = _INPUT.fullmatch(text)
    if found is None:
        raise UsageError(f"--input can't be {text!r}", hint='write it as "x:float32[batch,3,224,224]"')
    if found["dtype"] not in _DTYPES:
        raise unknown_name("dtype in --input", found["dtype"], _DTYPES)
    dims: list[int | str] = []
    for part in (part.strip() for part in found["dims"].split(",") if found["dims"].strip()):
        if not re.fullmatch(r"[1-9]\d{0,8}|[A-Za-z_]\w*", part):
            raise UsageError(f"--input {found['name']}: a dimension is a size or a name, not {part!r}")
        dims.append(int(part) if part.isdecimal() else part)
    return TensorSpec(found["name"], found["dtype"], tuple(dims))


def parse_bounds(texts: Iterable[str]) -> dict[str, tuple[int, int | None]]:
    """What a user writes as "batch=1..64", or "batch=1.." without an end."""
    bounds: dict[str, tuple[int, int | None]] = {}
    for text in texts:
        found = _DIM.fullmatch(text)
        low = int(found["low"]) if found else 0
        high = int(found["high"]) if found and found["high"] else None
        if found is None or low < 1 or (high is not None and high < low):
            raise UsageError(f"--dim can't be {text!r}", hint='write it as "batch=1..64"')
        bounds[found["name"]] = (low, high)
    return bounds


@dataclass(frozen=True)
class Envelope:
    """The inputs with their dynamic dimensions by name; the sizes to trace with; and how far each may go."""

    specs: tuple[TensorSpec, ...]
    traced: Mapping[str, int] = field(default_factory=dict)
    bounds: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)

    @property
    def signature(self) -> Signature:
        return Signature(self.specs, ())

    @property
    def dims(self) -> tuple[str, ...]:
        """The names of the dynamic dimensions."""
        return self.signature.dynamic

    @property
    def batch(self) -> str | None:
        """The dynamic dimension that counts samples."""
        return BatchAxis.of(self.signature).symbol

    @property
    def axes(self) -> dict[str, dict[int, str]]:
        """By input: its dynamic axes and their names; inputs without any are left out."""
        found = {s.name: {axis: dim for axis, dim in enumerate(s.shape) if isinstance(dim, str)} for s in self.specs}
        return {name: axes for name, axes in found.items() if axes}

    def sizes(self, feed: Mapping[str, Any]) -> dict[str, int]:
        """The size of every dynamic dimension in a feed."""
        axes = self.axes
        return {dim: int(feed[name].shape[axis]) for name, found in axes.items() for axis, dim in found.items()}

    def low(self, dim: str) -> int:
        return self.bounds.get(dim, (1, None))[0]

    def high(self, dim: str) -> int | None:
        return self.bounds.get(dim, (1, None))[1]

    def corners(self) -> dict[str, dict[str, int]]:
        """Sizes to try beside the traced ones: all dimensions at their least, one more, odd, and large."""
        if not self.dims:
            return {}
        found = {
            "minimum": {dim: self.low(dim) for dim in self.dims},
            "minimum+1": {dim: self._clamped(dim, self.low(dim) + 1) for dim in self.dims},
            "odd": {dim: self._clamped(dim, _odd(self.traced[dim])) for dim in self.dims},
        }
        if self.dims != (self.batch,):  # a batch alone is large in the sample rows
            factors = {dim: 1 if dim == self.batch else _LARGE for dim in self.dims}
            found["large"] = {dim: self._clamped(dim, factors[dim] * self.traced[dim]) for dim in self.dims}
        distinct: dict[str, dict[str, int]] = {}
        for name, sizes in found.items():
            if sizes not in distinct.values():
                distinct[name] = sizes
        return distinct

    def _clamped(self, dim: str, size: int) -> int:
        high = self.high(dim)
        return max(self.low(dim), size if high is None else min(size, high))


def _odd(traced: int) -> int:
    """An odd size that was not traced with, and no divisor or multiple of it."""
    return 3 if traced <= 2 else (traced // 2) | 1 if traced > 5 else 7


def from_specs(specs: Sequence[TensorSpec], bounds: Mapping[str, tuple[int, int | None]]) -> Envelope:
    """The envelope of inputs that only a description is known of; sizes to trace with are chosen."""
    dims = Signature(tuple(specs), ()).dynamic
    traced, free = {}, list(_FIRST_SIZES)
    for dim in dims:
        low, high = bounds.get(dim, (1, None))
        size = 2 if dim == _BATCH else free.pop(0) if free else 12
        traced[dim] = max(low, min(size, high or size))
    return Envelope(tuple(specs), traced, bounds)


def by_batch(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Inputs of fixed shapes with a dynamic batch: axis 0 of every input whose size there is that of the first one."""
    size = next((spec.shape[0] for spec in specs if spec.shape), None)
    return tuple(
        TensorSpec(spec.name, spec.dtype, (_BATCH, *spec.shape[1:])) if spec.shape and spec.shape[0] == size else spec
        for spec in specs
    )


def declared(specs: Sequence[TensorSpec], asked: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The example inputs, with the dimensions that the user named; UsageError where the two contradict."""
    known = {spec.name: spec for spec in specs}
    for wanted in asked:
        if wanted.name not in known:
            raise unknown_name("input in --input", wanted.name, known)
        given = known[wanted.name]
        fits = len(given.shape) == len(wanted.shape) and all(
            isinstance(dim, str) or dim == size for dim, size in zip(wanted.shape, given.shape, strict=True)
        )
        if given.dtype != wanted.dtype or not fits:
            raise UsageError(f"--input says {wanted}, the example input is {given}", hint="make the two agree")
        known[wanted.name] = wanted
    return tuple(known[spec.name] for spec in specs)
