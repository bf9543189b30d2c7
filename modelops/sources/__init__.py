"""Sources: where a model comes from. Every file here reads one form of model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelops.core.component import Component
from modelops.core.registry import Registry


@dataclass(frozen=True)
class Loaded:
    """A model as a source gives it: a torch module with example inputs, or the path of an ONNX file.

    ``dynamic`` maps an input's name to its dynamic axes and their names. Example inputs of dynamic dimensions are
    never of size 1. ``files`` are carried into the artifact under their keys (tokenizer, preprocessor).
    """

    module: Any = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    onnx: Path | None = None
    code_executed: tuple[Mapping[str, str], ...] = ()
    notes: tuple[str, ...] = ()


class Source(Component):
    """One form of model."""

    @classmethod
    def reads(cls, spec: str) -> bool:
        """Whether this text names a model of this form; cheap, imports nothing heavy, opens no untrusted file."""
        raise TypeError(f"{cls.__name__} does not define reads")

    def inputs(self, spec: str) -> Mapping[str, Path]:
        """The files and folders that the model is made of, for the digest of the step."""
        raise TypeError(f"{type(self).__name__} does not define inputs")

    def open(self, spec: str) -> Loaded:
        """The model, in eval mode where it is a torch module."""
        raise TypeError(f"{type(self).__name__} does not define open")


REGISTRY: Registry[Source] = Registry("modelops.sources", lambda: Source)
