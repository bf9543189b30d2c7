"""Unstructured pruning: the smallest weights become zero, and every tensor keeps its size."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from modelops.core.component import option
from modelops.core.progress import progress
from modelops.core.report import Metric
from modelops.core.workbench import Done, Workbench
from modelops.errors import StageFailed
from modelops.pruners import Pruner

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

_WARNING = "warning: zeros give no speed on a CPU, dense runtimes compute with them; --method channels does"
_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# A threshold over the whole model is found on every n-th weight where there are more than this.
_SORTED_AT_ONCE = 1 << 26


class Magnitude(Pruner):
    """Set the smallest weights to zero. Dense runtimes gain nothing from it, in time or in size."""

    tools = ("onnx-ir",)

    zeros: float | None = option(
        default=None, help="Share of the weights to set to zero (default 80%).", min=0.01, max=0.99, unit="fraction"
    )
    per: Literal["tensor", "model"] = option(
        default="tensor", help="Take this share of every tensor, or of all weights together."
    )

    def prune(self, source: Path, target: Path, workbench: Workbench) -> Done:
        import numpy as np
        import onnx_ir as ir

        from modelops.graphs import files
        from modelops.pruners._network import refuse_quantized

        # Before the work starts: who wants speed should not wait for it.
        progress(_WARNING)
        model = files.load(source)
        refuse_quantized(model)
        weights = list(_weights(model))
        if not weights:
            raise StageFailed(
                "nothing to prune: no convolution or matrix product with constant weights",
                hint="magnitude treats Conv, ConvTranspose, Gemm and MatMul",
            )
        level = self._level(weights) if self.per == "model" else None
        rows, zero, total = [], 0, 0
        for value in weights:
            array = _array(value).copy()
            mask = _smallest(array, self._share) if level is None else np.abs(array) <= level
            array[mask] = 0
            tensor = value.const_value
            assert tensor is not None
            value.const_value = ir.Tensor(array, dtype=tensor.dtype, name=value.name)
            count = int((array == 0).sum())
            zero, total = zero + count, total + array.size
            rows.append({"weight": value.name, "zeros": count, "elements": array.size})
        files.save(model, target)
        return Done(
            notes=(
                "zeros give no speed in onnxruntime, OpenVINO or torch on a CPU, which compute with them as with any "
                "number (80 % zeros in ResNet-50 ran at 0.97–1.04 times its speed); the file keeps its size until it "
                "is compressed; use --method channels for a faster model",
            ),
            metrics=(Metric("zeros", zero / total, "fraction"),),
            details={"asked": {"what": "weights", "removed": self._share, "reached": zero / total}, "weights": rows},
        )

    @property
    def _share(self) -> float:
        return 0.8 if self.zeros is None else self.zeros

    @property
    def targeted(self) -> bool:
        return self.zeros is not None

    def aimed(self, removed: float) -> Self:
        return dataclasses.replace(self, zeros=removed)

    def _level(self, weights: list[ir.Value]) -> float:
        """The magnitude up to which weights of the whole model become zero."""
        import numpy as np

        total = sum(_array(value).size for value in weights)
        stride = max(1, total // _SORTED_AT_ONCE)
        sampled = np.concatenate([np.abs(_array(value).reshape(-1)[::stride]).astype(np.float32) for value in weights])
        place = min(len(sampled) - 1, max(0, round(self._share * len(sampled)) - 1))
        return float(np.partition(sampled, place)[place])


def _weights(model: ir.Model) -> Iterator[ir.Value]:
    """Every constant matrix or filter of the graph and its branches, once; vectors such as biases stay."""
    import numpy as np

    seen = set()
    for node in model.graph.all_nodes():
        if node.op_type not in _PRODUCTS:
            continue
        for value in node.inputs[:2]:
            if value is None or value.const_value is None or value.is_graph_input() or value in seen:
                continue
            kind = value.const_value.dtype.numpy()
            if len(value.const_value.shape) >= 2 and (np.issubdtype(kind, np.floating) or kind.name == "bfloat16"):
                seen.add(value)
                yield value


def _array(value: ir.Value) -> NDArray[Any]:
    assert value.const_value is not None
    array: NDArray[Any] = value.const_value.numpy()
    return array


def _smallest(array: NDArray[Any], share: float) -> NDArray[np.bool_]:
    """Exactly that share of the elements, those of the least magnitude; of equal ones the first."""
    import numpy as np

    count = round(share * array.size)
    order = np.argsort(np.abs(array).reshape(-1), kind="stable")
    mask = np.zeros(array.size, bool)
    mask[order[:count]] = True
    return mask.reshape(array.shape)
