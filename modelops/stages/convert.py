"""convert: a model from its own framework becomes an ONNX model that was held against it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from modelops.core.artifact import Draft
from modelops.core.component import choice, option, options_of
from modelops.core.registry import require
from modelops.core.report import Report
from modelops.core.worker import Limits
from modelops.datasets import REGISTRY as DATASETS
from modelops.datasets import Dataset
from modelops.errors import UsageError
from modelops.measures.gates import Gate
from modelops.sources import REGISTRY, Loaded, Request, Source, detect
from modelops.stages import Stage, _limits
from modelops.stages._effort import ROWS
from modelops.stages._given import Given

# Options that mean something for every form of source, and for every form that is a torch module.
_ALWAYS = frozenset({"source", "opset", "rows", "seed", "data", "dataset", "gate"})
_OF_MODULES = frozenset({"exporter", "static", "input", "dim"})


class Convert(Stage):
    """Turn a model into ONNX, and check it against the original.

    SOURCE is a Hugging Face directory, file.py:function or package.module:function (which returns a torch module, and
    example inputs with it), an .onnx file, a scikit-learn model in .skops, or a .pt2, .pt, .pth or .joblib file that
    you trust. The batch is dynamic unless you say --static, and so is the sequence of text. What comes out is run in
    onnxruntime against the original on seeded inputs and at several shapes, and is kept only when it agrees; those
    inputs and outputs stay with it as reference.npz.
    """

    reads = "source"
    tools: ClassVar[tuple[str, ...]] = (
        "torch", "transformers", "safetensors", "numpy", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "scikit-learn",
        "skl2onnx",
    )  # fmt: skip

    source: Source | None = choice(REGISTRY, help="The form of the source; told from SOURCE when left out.")
    weights: Path | None = option(
        default=None, help="Weights for the module: .safetensors, or a state dict in .pt or .pth."
    )
    input: tuple[str, ...] = option(
        default=(), help='An input with its dynamic dimensions by name, as "x:float32[batch,3,8]".'
    )
    data: Path | None = option(
        default=None, help="Samples to check with, as the rows; and where nothing else does, they tell the inputs."
    )
    dataset: Dataset | None = choice(DATASETS, default=None, help="Form of the data; told from the path by default.")
    dim: tuple[str, ...] = option(default=(), help='The sizes that a dynamic dimension may have, as "sequence=1..512".')
    static: bool = option(default=False, help="Fix every dimension at the size of the example inputs.")
    exporter: Literal["auto", "dynamo", "torchscript"] = option(
        default="auto", help="The exporter; auto tries one by one."
    )
    opset: int | None = option(
        default=None, help="The ONNX opset to write; when left out 20, or for an .onnx file what it has.", min=7, max=25
    )
    attention: Literal["auto", "eager", "sdpa"] = option(
        default="auto", help="How transformers models compute attention."
    )
    gate: tuple[str, ...] = option(
        default=(), help='Gate of your own in the place of the usual one, such as "logits.sqnr>=120".'
    )
    allow_code: bool = option(
        default=False, help="Load files that are programs (.pt2, .pt, .pth); only if you trust them."
    )
    rows: int | None = option(
        default=None,
        help="Rows of inputs to check with; by default 32, and of expensive models 16 or more. "
        "What --data does not give is made up.",
        min=1,
        max=4096,
    )
    seed: int = option(
        default=0, help="Seed for sample inputs, and for weights that the source makes at random.", min=0
    )

    def run(self, source: str, draft: Draft) -> Report:
        form = self.source or detect(source)
        require(type(form))
        self._refuse_unfit(form)
        _ = self.gates
        request = Request(weights=self.weights, attention=self.attention, allow_code=self.allow_code)
        if form.framework == "onnx":
            from modelops.stages._from_onnx import convert as from_onnx

            return from_onnx(form.open(source, request), self, draft)
        if form.framework == "sklearn":
            from modelops.stages._from_sklearn import convert as from_sklearn

            return from_sklearn(form.open(source, request), self, draft)
        from modelops.stages._eager import deterministic
        from modelops.stages._from_torch import convert as from_torch

        started = time.monotonic()
        with deterministic(self.seed):
            loaded = form.open(source, request)
            return from_torch(loaded, self, draft, opening=time.monotonic() - started)

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The user's own gates; UsageError for one that can't be read."""
        return tuple(Gate.parse(text) for text in self.gate)

    def inputs(self, source: str) -> Mapping[str, Path]:
        form = self.source or detect(source)
        return {**super().inputs(source), **form.inputs(source)}

    def limits_on(self, source: str, model_bytes: int) -> Limits:
        form = self.source or detect(source)
        if self.data is not None and ".py:" in self.data.name:
            return _limits.trusted()
        return form.limits(model_bytes) or self.limits(model_bytes)

    def given(self, loaded: Loaded) -> Given | None:
        """The samples of ``--data``; a tokenizer for texts comes from beside the model."""
        tokenizer = loaded.files.get("tokenizer.json")
        return Given.of(self.data, self.dataset, self.rows or ROWS, tokenizer.parent if tokenizer is not None else None)

    def _refuse_unfit(self, form: Source) -> None:
        """UsageError for an option that means nothing for this form of source."""
        takes = _ALWAYS | form.takes | (_OF_MODULES if form.framework == "torch" else frozenset())
        for item in options_of(type(self)):
            if item.name not in takes and getattr(self, item.name) != item.default:
                raise UsageError(f"{item.flag} means nothing for a source of the form {form.name}", hint="leave it out")
