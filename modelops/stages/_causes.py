"""Why an export failed: one of a few causes, and what a person can do about it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from modelops.errors import ModelOpsError, ResourceExhausted

_HINTS: dict[str, str] = {
    "data-dependent control flow": "choose with torch.where or torch.cond in place of an if on values of a tensor",
    "frozen dimension": "compute sizes from x.shape in place of fixed numbers, or allow fixed shapes with --static",
    "unsupported operator": "replace the operator by others, or try another --opset or --exporter",
    "unknown container": "return tensors, tuples or dicts in place of objects of your own",
    "output that is no tensor": "return tensors alone",
    "training mode": "call module.eval(), and pass training=self.training to functional dropout",
    "memory": "raise --memory-limit or free memory",
    "other opset": "ask for another --opset, or leave it to the exporter",
    "graph that onnxruntime refuses": "try another --opset or --exporter",
    "wrong numbers": "look at the checks: the exported graph computes something else",
    "not understood": "run it with --debug to see all that the exporter said",
}
# The first pattern that matches decides.
_PATTERNS: tuple[tuple[str, str], ...] = (
    ("memory", r"MemoryError|bad_alloc|can't allocate|out of memory|DefaultCPUAllocator"),
    (
        "unsupported operator",
        r"UnsupportedOperator|DispatchError|No ONNX function found|No decompositions registered"
        r"|Exporting the operator|unsupported operator|is not implemented for|Unsupported: ONNX export",
    ),
    (
        "data-dependent control flow",
        r"GuardOnDataDependent|data-dependent|[Dd]ynamic control flow|_local_scalar_dense",
    ),
    (
        "frozen dimension",
        r"Constraints violated|ConstraintViolation|inferred a static shape|specialized it to be a constant"
        r"|but your code specialized|must be equal to|is not divisible",
    ),
    (
        "unknown container",
        r"pytree|Unsupported input type|is not a registered|Type .* is not supported in|DynamicCache",
    ),
    ("output that is no tensor", r"Only tuples, lists and Variables|not a tensor|is not an? (?:torch\.)?Tensor"),
    ("training mode", r"training mode|in train mode"),
    ("graph that onnxruntime refuses", r"InvalidGraph|INVALID_GRAPH|ORT_INVALID|NOT_IMPLEMENTED|onnxruntime failed"),
)


@dataclass(frozen=True)
class Cause:
    """What kind of failure it was, and what the tool said."""

    kind: str
    text: str

    @property
    def hint(self) -> str:
        return _HINTS[self.kind]

    def to_dict(self) -> dict[str, str]:
        return {"cause": self.kind, "message": self.text, "hint": self.hint}


class FrozenDimension(Exception):
    """A dimension that was asked to vary came out fixed."""


class OtherOpset(Exception):
    """The export has not the opset that was asked for."""


def classify(error: BaseException) -> Cause:
    """The cause of a failed export, told from the whole chain of exceptions."""
    chain = list(_chain(error))
    for kind, of in (("frozen dimension", FrozenDimension), ("other opset", OtherOpset)):
        for link in chain:
            if isinstance(link, of):
                return Cause(kind, str(link))
    text = _telling(chain)
    if any(isinstance(link, (MemoryError, ResourceExhausted)) for link in chain):
        return Cause("memory", text)
    whole = "\n".join(f"{type(link).__name__}: {link}" for link in chain)
    kind = next((kind for kind, pattern in _PATTERNS if re.search(pattern, whole)), "not understood")
    return Cause(kind, text)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _telling(chain: list[BaseException]) -> str:
    """The first sentences of the innermost exception that says something, on one line."""
    for link in reversed(chain):
        lines = [line.strip() for line in str(link).splitlines() if line.strip()]
        if isinstance(link, ModelOpsError):
            lines = [link.message]
        if lines:
            return f"{type(link).__name__}: {' '.join(lines)[:300]}"
    return type(chain[0]).__name__
