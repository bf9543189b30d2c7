"""What lies between two models, told from their histories: which row of the table of gates applies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from modelops.core.manifest import Step
from modelops.measures.gates import POINT, TransitionName

# From the one that may change least to the one that may change most; a chain of steps is judged by its last in here.
_ORDER: tuple[TransitionName, ...] = ("structural", "export", "float16", "bfloat16", "int8", "weights", "prune")
_METHODS: dict[str, TransitionName] = {"static": "int8", "dynamic": "int8", "float": "structural"}


def between(model: Sequence[Step], reference: Sequence[Step]) -> TransitionName:
    """The transition that the steps outside the common beginning of two histories amount to.

    The strictest, ``structural``, where the histories do not tell.
    """
    shared = 0
    for one, other in zip(model, reference, strict=False):
        if one.key != other.key:
            break
        shared += 1
    found = [transition_of(step) for step in (*model[shared:], *reference[shared:])]
    return max(found, key=_ORDER.index, default="structural")


def allowed_drop(model: Sequence[Step], reference: Sequence[Step]) -> tuple[float, str]:
    """The largest drop of a task metric that the steps in between were given, and who says so; one point by default."""
    known = {step.key for step in reference}
    for step in reversed(model):
        if step.key not in known and isinstance(step.options.get("max_drop"), int | float):
            return float(step.options["max_drop"]), f"the {step.stage} step's --max-drop"
    return POINT, "the default"


def transition_of(step: Step) -> TransitionName:
    """What one step may do to outputs."""
    if step.stage == "convert":
        return "export"
    if step.stage == "prune":
        return "prune"
    if step.stage == "quantize":
        if step.report.details.get("decision") == "kept-source":
            return "structural"
        method = step.options.get("method")
        name = str(method.get("name") if isinstance(method, dict) else method)
        if name == "auto":
            name = str(step.report.details.get("method"))
        if name in _ORDER:
            return name
        return _METHODS.get(name, "int8")
    return "structural"


def looser(one: TransitionName, other: TransitionName) -> TransitionName:
    """The one of two rows of the table of gates that allows more."""
    return max(one, other, key=get_args(TransitionName).index)
