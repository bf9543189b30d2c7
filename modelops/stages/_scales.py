"""Made-up inputs at other scales: around one, a wrong epsilon hides behind the variance, a wrong bound is not met.

Each scale is judged for itself: pooled, the largest values would set the scale that all the others are held to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
    axis = BatchAxis.of(signature)
    values: list[dict[str, Any]] = []
    all_found = []
    for factor, feed in scaled_feeds(given.feed, signature):
        scaled = Given(feed, axis.rows(feed), f"inputs ×{factor:g}", made_up=True, corner=True)
        found = compare_models(before, after, [scaled])
        if found.first is not None:
            outputs = {name: difference.to_dict() for name, difference in found.differences.items()}
            values.append({"factor": factor, "rows": found.rows, "outputs": outputs, "failures": found.failures})
            all_found.append(found)
    return values, all_found


def scaled_feeds(
    feed: Mapping[str, Any], signature: Signature, rows: int = _ROWS
) -> Iterator[tuple[float, dict[str, Any]]]:
    """(factor, the first rows of these inputs times it); nothing where the model takes no floats."""
    import numpy as np

    floats = {spec.name for spec in signature.inputs if spec.dtype in _FLOATS and _scalable(spec.name, feed[spec.name])}
    axis = BatchAxis.of(signature)
    few = {name: np.asarray(array) for name, array in feed.items()}
    if axis.symbol is not None:
        few = {name: array[:rows] if name in axis.inputs else array for name, array in few.items()}
    for factor in FACTORS if floats else ():
        yield factor, {n: array * array.dtype.type(factor) if n in floats else array for n, array in few.items()}


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
    return Check(f"{prefix(factor)}{check.name}", "fail", text, check.value, check.threshold, check.n)


def prefix(factor: float) -> str:
    """How the names of what is judged at a scale begin."""
    return f"scale_{factor:g}."


def _scalable(name: str, array: Any) -> bool:
    """Whether values of an input mean an amount: not a mask, a factor, or whole numbers that may stand for kinds."""
    import numpy as np

    values = np.asarray(array)
    return not any(word in name.lower() for word in ("mask", "scale")) and not bool((values == np.rint(values)).all())


def relative(gates: Iterable[Gate | str]) -> tuple[Gate, ...]:
    """The user's gates without those on absolute errors, which were asked for at the scale of the user's inputs."""
    parsed = (Gate.parse(gate) if isinstance(gate, str) else gate for gate in gates)
    return tuple(gate for gate in parsed if not gate.figure.endswith("_abs"))


def _judged(one: Mapping[str, Any], gates: tuple[Gate | str, ...]) -> list[Check]:
    failures = [
        Check(f"runs.{failure['inputs']}", "fail", f"the model does not run: {failure['error']}")
        for failure in one["failures"]
    ]
    differences = {name: Difference.parse(values) for name, values in one["outputs"].items()}
    if not differences:
        return failures
    asked = relative(gates)
    return failures + judge(differences, "structural", agreement_evaluated=False, rows_min=1, overrides=asked)
