"""Sources: where a model comes from. Every file here reads one form of model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from modelops.core.component import Component
from modelops.core.registry import Registry
from modelops.core.worker import Limits
from modelops.errors import InputRefused, missing_path
from modelops.sources._first_run import FirstRun

Attention = Literal["auto", "eager", "sdpa"]


@dataclass(frozen=True)
class Request:
    """What the user asked of a source, beyond naming it."""

    weights: Path | None = None
    attention: Attention = "auto"
    allow_code: bool = False


@dataclass(frozen=True)
class Loaded:
    """A model as a source gives it: a torch module with example inputs, an estimator, or the path of an ONNX file.

    ``args`` and ``kwargs`` are what the module is called with; without any, the user's ``--input`` says what it takes.
    ``drawn`` says that the source made them up, so that others will do as well. ``input_names`` are the names of the
    tensors in them, where their place does not tell. ``dynamic`` maps such a name to its dynamic axes and their names;
    None leaves that to the stage. ``exporters`` are those that can read the module. ``ranges``
    holds for integer inputs how many values they may take, ``bounds`` the sizes that a dynamic dimension may have.
    ``files`` are carried into the artifact under their keys (tokenizer, preprocessor). ``first`` is what came out when
    the source ran the module on its example inputs, where it did.
    """

    module: Any = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    drawn: bool = False
    input_names: tuple[str, ...] = ()
    exporters: tuple[str, ...] = ("dynamo", "torchscript")
    dynamic: Mapping[str, Mapping[int, str]] | None = None
    ranges: Mapping[str, int] = field(default_factory=dict)
    bounds: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    onnx: Path | None = None
    code_executed: tuple[Mapping[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    first: FirstRun | None = None


class Source(Component):
    """One form of model."""

    framework: ClassVar[Literal["torch", "sklearn", "onnx"]] = "torch"
    """What ``Loaded.module`` is; of an ONNX file there is only the path."""
    takes: ClassVar[frozenset[str]] = frozenset()
    """The options of ``convert`` that mean something for this form, by name."""

    @classmethod
    def reads(cls, spec: str) -> bool:
        """Whether this text names a model of this form; cheap, imports nothing heavy, opens no untrusted file."""
        raise TypeError(f"{cls.__name__} does not define reads")

    def inputs(self, spec: str) -> Mapping[str, Path]:
        """The files and folders that the model is made of, for the digest of the step."""
        raise TypeError(f"{type(self).__name__} does not define inputs")

    def open(self, spec: str, request: Request) -> Loaded:
        """The model, in eval mode where it is a torch module."""
        raise TypeError(f"{type(self).__name__} does not define open")

    def limits(self, model_bytes: int) -> Limits | None:
        """What converting such a model may use, where that is not what every stage may."""
        del model_bytes
        return None


REGISTRY: Registry[Source] = Registry("modelops.sources", lambda: Source)


def detect(spec: str) -> Source:
    """The source that reads this text; UsageError or InputRefused says why none does."""
    for _, cls in REGISTRY.loadable():
        if cls.reads(spec):
            return cls()
    path = Path(spec)
    if not path.exists():
        raise missing_path("source", path)
    if (path / "manifest.json").is_file():
        raise InputRefused(f"{spec} is an artifact: it is converted already", hint="give it to simplify or quantize")
    if path.suffix == ".py":
        raise InputRefused(
            f"{spec} is a Python file: which of its functions makes the model is not said",
            hint=f"name a function that returns a module, or a module and its inputs: {spec}:build",
        )
    raise InputRefused(
        f"{spec} is no form of model that can be read",
        hint="give a Hugging Face directory (with config.json), file.py:function, package.module:function, "
        "or an .onnx, .skops, .joblib, .pt2, .pt or .pth file",
    )
