"""The source module run as its own framework runs it: the reference that a conversion is held against."""

from __future__ import annotations

import inspect
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from modelops.core.tensors import TensorSpec
from modelops.errors import StageFailed
from modelops.stages._tree import input_names, leaves, output_names, replaced

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

_DTYPES = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
INNER = "inner"
"""The attribute under which the flat module holds the user's; names of weights in an export start with it."""


class _Slot:
    """Stands for a tensor in the structure of a module's arguments."""


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """torch with seeded random numbers, on one thread unless a run asks for more: results do not depend on load."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


class Eager:
    """A module as a function of flat named tensors.

    ``flat`` is that function as a torch module, for the exporters; ``output_names`` are known once a call is ``named``.
    ``threads`` is on how many it runs.
    """

    def __init__(
        self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Sequence[str] = ()
    ) -> None:
        import torch

        self.module = module
        given = {**dict(zip(_positional(module, len(args)), args, strict=True)), **kwargs}
        found = [(path, leaf) for path, leaf in leaves(given) if isinstance(leaf, torch.Tensor)]
        self.input_names = list(names) or input_names([path for path, _ in found])
        self.tensors: list[torch.Tensor] = [leaf.detach().cpu() for _, leaf in found]
        self.output_names: list[str] = []
        self.threads = 1
        self.flat = _flat(module, args, kwargs)

    def specs(self) -> tuple[TensorSpec, ...]:
        """The example inputs as they are, every dimension fixed; StageFailed for a dtype that can't be fed."""
        return tuple(
            TensorSpec(name, _dtype(tensor, f"input {name!r}"), tuple(tensor.shape))
            for name, tensor in zip(self.input_names, self.tensors, strict=True)
        )

    def feed(self) -> dict[str, NDArray[Any]]:
        """The example inputs as arrays."""
        return {name: tensor.numpy() for name, tensor in zip(self.input_names, self.tensors, strict=True)}

    def call(self, feed: Mapping[str, NDArray[Any]]) -> Any:
        """What the module itself gives for these inputs, in its own structure."""
        return self.flat.call(*self._tensors(feed))

    def named(self, outputs: Any) -> dict[str, NDArray[Any]]:
        """What a call gave, by the names of outputs from now on; StageFailed for one that is no usable tensor."""
        found = list(leaves(outputs))
        names = output_names([path for path, _ in found], self.input_names)
        if not found:
            raise StageFailed("the module returns no tensor", hint="return the tensors that the model computes")
        for name, (_, leaf) in zip(names, found, strict=True):
            _dtype(leaf, f"output {name!r}")
        self.output_names = names
        return self._arrays([leaf for _, leaf in found])

    def probe(self, feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The first run, which finds the names of the outputs; StageFailed for an output that is no usable tensor."""
        return self.named(self.call(feed))

    def run(self, feed: Mapping[str, NDArray[Any]], *, double: bool = False) -> dict[str, NDArray[Any]]:
        """The outputs for these inputs; raises whatever the module raises."""
        import torch

        torch.set_num_threads(self.threads)
        try:
            return self._arrays(self.flat(*self._tensors(feed, double=double)))
        finally:
            torch.set_num_threads(1)

    def _tensors(self, feed: Mapping[str, NDArray[Any]], *, double: bool = False) -> list[torch.Tensor]:
        import torch

        tensors = [torch.from_numpy(feed[name].copy()) for name in self.input_names]
        return [t.double() if t.is_floating_point() else t for t in tensors] if double else tensors

    def _arrays(self, outputs: Any) -> dict[str, NDArray[Any]]:
        return {name: leaf.detach().cpu().numpy() for name, leaf in zip(self.output_names, outputs, strict=True)}

    @property
    def weight_bytes(self) -> int:
        """What the module's weights take in memory."""
        return sum(tensor.nbytes for tensor in (*self.module.parameters(), *self.module.buffers()))

    def to_double(self) -> bool:
        """Turn the module's weights into float64, for good; False where that fails."""
        try:
            self.module.double()
        except Exception as error:
            log.debug("no float64: %s", error)
            return False
        return True


def _flat(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    import torch

    def slot(leaf: Any) -> Any:
        return _Slot if isinstance(leaf, torch.Tensor) else leaf

    template = replaced([list(args), dict(kwargs)], slot)

    class Flat(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            setattr(self, INNER, module)
            self.training = False  # eval() would descend into the module, which some forms refuse

        def call(self, *tensors: torch.Tensor) -> Any:
            rest = iter(tensors)
            args, kwargs = replaced(template, lambda leaf: next(rest) if leaf is _Slot else leaf)
            return self.inner(*args, **kwargs)

        def forward(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
            return tuple(leaf for _, leaf in leaves(self.call(*tensors)))

    return Flat()


def parameters(module: Any) -> list[str]:
    """The names of what forward takes; those of a list of its own, such as ``*xs``, left out."""
    schema = getattr(module.forward, "schema", None)  # a TorchScript method has no Python signature
    if schema is not None:
        return [argument.name for argument in schema.arguments if argument.name != "self"]
    found = inspect.signature(module.forward).parameters.values()
    return [each.name for each in found if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]


def _positional(module: Any, count: int) -> list[str]:
    """A name for each positional argument, numbered where one parameter takes them all."""
    names = parameters(module)[:count]
    return [*names, *(f"input_{number}" for number in range(len(names), count))]


def _dtype(value: Any, what: str) -> str:
    """The numpy name of a tensor's dtype; StageFailed for what is no tensor, or of a dtype that arrays can't hold."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise StageFailed(
            f"{what} is {type(value).__name__}, not a tensor",
            hint="return tensors alone: wrap the module in one that leaves out the rest, or makes it a tensor",
        )
    name = str(value.dtype).removeprefix("torch.")
    if name not in _DTYPES or value.layout != torch.strided or value.is_quantized:
        raise StageFailed(f"{what} is a tensor of {name}", hint=f"use one of {', '.join(_DTYPES)}, such as .float()")
    return name
