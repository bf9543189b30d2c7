"""Made-up inputs at other scales: around one, a wrong epsilon hides behind the variance, a wrong bound is not met.

Each scale is judged for itself: pooled, the largest values would set the scale that all the others are held to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from modelops.core.report import Check
from modelops.core.tensors import Signature
from modelops.graphs.batches import BatchAxis
from modelops.measures.differences import Difference
from modelops.measures.gates import Gate
from modelops.measures.judging import judge
from modelops.stages._measuring import Findings, Given, Side, compare_models

FACTORS: Final = (0.1, 3.0)
_ROWS = 8
_FLOATS = ("float32", "float64")


def measure(
    before: Side, after: Side, given: Given, signature: Signature
) -> tuple[list[dict[str, Any]], list[Findings]]:
    """Both models on the first rows of these inputs at other scales: as JSON values, and what was found at each.

    Empty where the model takes no floats; a scale that the reference itself can't run is left out.
    """
    import numpy as np

    floats = {
        spec.name for spec in signature.inputs if spec.dtype in _FLOATS and _scalable(spec.name, given.feed[spec.name])
    }
    axis = BatchAxis.of(signature)
    values: list[dict[str, Any]] = []
    all_found = []
    for factor in FACTORS if floats else ():
        feed = {name: np.asarray(array) for name, array in given.feed.items()}
        if axis.symbol is not None:
            feed = {name: array[:_ROWS] if name in axis.inputs else array for name, array in feed.items()}
        feed = {name: array * array.dtype.type(factor) if name in floats else array for name, array in feed.items()}
        scaled = Given(feed, axis.rows(feed), f"inputs ×{factor:g}", made_up=True, corner=True)
        found = compare_models(before, after, [scaled])
        if found.first is not None:
            outputs = {name: difference.to_dict() for name, difference in found.differences.items()}
            values.append({"factor": factor, "rows": found.rows, "outputs": outputs, "failures": found.failures})
            all_found.append(found)
    return values, all_found


def checks(values: list[dict[str, Any]], gates: tuple[Gate | str, ...]) -> list[Check]:
    """What fails at a scale, or that nothing does; nothing where no other scale was tried."""
    judged = [(one, _judged(one, gates)) for one in values]
    found = [failed(one["factor"], check) for one, asked in judged for check in asked if check.verdict == "fail"]
    held = [one for one, asked in judged if any(check.verdict == "pass" for check in asked)]
    if found or not held:
        return found
    texts = " and ".join(f"×{one['factor']:g}" for one in held)
    return [Check("scales", "pass", f"the gates hold on inputs {texts} too", n=sum(one["rows"] for one in held))]


def failed(factor: float, check: Check) -> Check:
    """A failed check, named by its scale."""
    text = f"on inputs ×{factor:g}: {check.message}"
    return Check(f"scale_{factor:g}.{check.name}", "fail", text, check.value, check.threshold, check.n)


def unscaled(check: Check, factor: float) -> str:
    """The name that a check had before it was named by its scale; empty for the checks of others."""
    prefix = f"scale_{factor:g}."
    return check.name.removeprefix(prefix) if check.name.startswith(prefix) else ""


def _scalable(name: str, array: Any) -> bool:
    """Whether values of an input mean an amount: not a mask, a factor, or whole numbers that may stand for kinds."""
    import numpy as np

    values = np.asarray(array)
    return not any(word in name.lower() for word in ("mask", "scale")) and not bool((values == np.rint(values)).all())


def _judged(one: Mapping[str, Any], gates: tuple[Gate | str, ...]) -> list[Check]:
    failures = [
        Check(f"runs.{failure['inputs']}", "fail", f"the model does not run: {failure['error']}")
        for failure in one["failures"]
    ]
    differences = {name: Difference.parse(values) for name, values in one["outputs"].items()}
    if not differences:
        return failures
    # Absolute errors grow with the inputs: a bound on them was asked for at the scale of the user's own.
    relative = tuple(
        gate
        for gate in (Gate.parse(gate) if isinstance(gate, str) else gate for gate in gates)
        if not gate.figure.endswith("_abs")
    )
    return failures + judge(differences, "structural", agreement_evaluated=False, rows_min=1, overrides=relative)
