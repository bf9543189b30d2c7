"""What goes into a model and what comes out: names, dtypes and shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    ``dtype`` is a numpy name (``float32``, ``int64``, ``bfloat16`` …); in ``shape`` an int is fixed and a str is a
    named dynamic dimension.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def dynamic(self) -> tuple[str, ...]:
        """The names of the dynamic dimensions, in order, once each."""
        return tuple(dict.fromkeys(dim for dim in self.shape if isinstance(dim, str)))

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> TensorSpec:
        return cls(values["name"], values["dtype"], tuple(values["shape"]))

    def __str__(self) -> str:
        return f"{self.name}:{self.dtype}[{','.join(str(dim) for dim in self.shape)}]"


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a graph, in the order of the graph."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def dynamic(self) -> tuple[str, ...]:
        """The names of the inputs' dynamic dimensions, once each."""
        return tuple(dict.fromkeys(dim for spec in self.inputs for dim in spec.dynamic))

    def input(self, name: str) -> TensorSpec:
        """The input of that name; KeyError when there is none."""
        for spec in self.inputs:
            if spec.name == name:
                return spec
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        return {"inputs": [s.to_dict() for s in self.inputs], "outputs": [s.to_dict() for s in self.outputs]}

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Signature:
        def specs(items: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec.parse(item) for item in items)

        return cls(specs(values["inputs"]), specs(values["outputs"]))
