"""How much of a task metric a change of the model can have cost.

What a gate asks is not whether the drop that was seen is small, but whether the true one surely is: ``drop`` gives a
one-sided 95 % bound from paired data (both models on the same rows), and ``judge_drop`` holds that bound against what
is allowed. Few rows can't prove a small drop: with not one changed decision, 300 rows still allow for one point, 540
for 0.55.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelops.core.report import Check, Verdict
from modelops.measures.distributions import normal_cdf, proportion_bounds, t_quantile
from modelops.measures.metrics import METRICS, TaskMetric, labelled, prepared, task_metric

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONFIDENCE = 0.95
ROWS_MIN = 32

_RESAMPLES = 1000
_ROWS_MOST = 10_000_000  # beyond this, no number of rows is worth naming


@dataclass(frozen=True, kw_only=True)
class Drop:
    """How much worse ``value`` is than ``reference``, positive when worse, in the metric's own unit (0.01 is a point).

    ``bound`` is what the true drop surely stays below, ``lower`` what it surely exceeds, each at ``confidence``.
    ``lost`` and ``gained`` count the rows that only the reference, or only the model, gets right.
    """

    metric: str
    value: float
    reference: float
    drop: float
    bound: float
    lower: float
    n: int
    method: str
    confidence: float = CONFIDENCE
    decisions: bool = False
    lost: int | None = None
    gained: int | None = None

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Drop:
        """The drop that ``to_dict`` wrote; a figure that was not finite comes back as one that proves nothing."""
        unknown = {"value": math.nan, "reference": math.nan, "drop": math.nan, "bound": math.inf, "lower": -math.inf}
        return cls(**{**values, **{k: v for k, v in unknown.items() if values.get(k) is None}})


def drop(
    reference_outputs: NDArray[Any],
    outputs: NDArray[Any],
    labels: NDArray[Any],
    metric: str | TaskMetric,
    *,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Drop:
    """How much of the metric the second model loses against the first, on the same rows; UsageError when shapes differ.

    First classes are counted by ``paired_bounds``; all else is resampled by rows, both models together, in a seeded
    bootstrap of 1,000 with percentiles widened for small samples (Hesterberg 2015, *What Teachers Should Know About the
    Bootstrap*, §5.3). A bootstrap can't see what its rows don't hold, so a bound on shares is never below that of no
    changed decision in n.
    """
    import numpy as np

    rule = task_metric(metric) if isinstance(metric, str) else metric
    before, labels = prepared(rule, reference_outputs, labels)
    after, _ = prepared(rule, outputs, labels)
    n = len(labels)
    if n == 0:
        return _drop(rule, math.nan, math.nan, (-math.inf, math.inf), 0, "none", confidence)
    value, reference = rule.score(after, labels), rule.score(before, labels)
    if rule.name == "top1" and labels.ndim == 1:
        known = labelled(labels)
        right_before, right_after = (before == labels)[known], (after == labels)[known]
        lost, gained = int((right_before & ~right_after).sum()), int((right_after & ~right_before).sum())
        bounds = paired_bounds(lost, gained, int(known.sum()), confidence)
        counts = {"lost": lost, "gained": gained}
        return _drop(rule, value, reference, bounds, int(known.sum()), "paired counts", confidence, **counts)
    sign = 1.0 if rule.higher else -1.0
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(_RESAMPLES):
        rows = generator.integers(0, n, n)
        found.append(sign * (rule.score(before[rows], labels[rows]) - rule.score(after[rows], labels[rows])))
    finite = np.array(found)[np.isfinite(found)]
    if len(finite) < 0.9 * _RESAMPLES:
        bounds = (-math.inf, math.inf)
    else:
        tail = normal_cdf(-math.sqrt(n / max(1, n - 1)) * t_quantile(confidence, max(1, n - 1)))
        bounds = (float(np.quantile(finite, tail)), float(np.quantile(finite, 1 - tail)))
    if rule.decisions:
        unseen = 1 - (1 - confidence) ** (1 / n)
        bounds = (min(bounds[0], -unseen), max(bounds[1], unseen))
    return _drop(rule, value, reference, bounds, n, "paired bootstrap", confidence)


def paired_bounds(lost: float, gained: float, n: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """One-sided lower and upper bounds of p_lost − p_gained, from paired rows of which some were lost and some gained.

    The method of variance estimates recovery (Zou and Donner 2008; Newcombe 1998, method 10, in its form) with the
    exact one-sided bounds of Clopper and Pearson for each share, and the multinomial's correlation between them. With
    no row lost or gained it is exact: 1 − 0.05^(1/n).
    """
    if n <= 0:
        return -1.0, 1.0
    share_lost, share_gained = lost / n, gained / n
    (low_lost, high_lost), (low_gained, high_gained) = (proportion_bounds(k, n, confidence) for k in (lost, gained))
    odds = share_lost * share_gained / max((1 - share_lost) * (1 - share_gained), 1e-300)
    correlation = -min(1.0, math.sqrt(odds))

    def recovered(a: float, b: float) -> float:
        return math.sqrt(a * a + b * b - 2 * correlation * a * b)

    centre = share_lost - share_gained
    lower = centre - recovered(share_lost - low_lost, high_gained - share_gained)
    upper = centre + recovered(high_lost - share_lost, share_gained - low_gained)
    return max(-1.0, lower), min(1.0, upper)


def judge_drop(found: Drop, max_drop: float, *, rows_min: int = ROWS_MIN) -> Check:
    """Whether the metric surely dropped by at most ``max_drop`` (in the metric's own unit; 0.01 is a point).

    ============================================  =============  ==========================================
    the bound is within what is allowed            pass           also when a little was lost
    the drop that was seen is beyond it            fail           the best guess is that too much was lost
    … on fewer than ``rows_min`` rows              inconclusive   a fail only where it surely is beyond
    the drop is within, the bound is not           inconclusive   says how many rows would settle it
    ============================================  =============  ==========================================
    """
    rule = METRICS.get(found.metric, TaskMetric(found.metric, lambda _a, _b: math.nan, decisions=found.decisions))
    name, allowed = f"{found.metric}.drop", f"<= {rule.text_of_drop(max_drop)}"

    def check(verdict: Verdict, text: str) -> Check:
        value = found.drop if math.isfinite(found.drop) else None
        return Check(name, verdict, f"{found.metric}: {text}", value, allowed, found.n)

    if found.n == 0:
        return check("inconclusive", "no labelled row to judge on")
    if not math.isfinite(found.drop):
        if math.isfinite(found.reference):
            return check("fail", f"not a finite number, against {rule.text(found.reference)} ({found.n} rows)")
        return check("inconclusive", f"the reference itself has no finite value ({found.n} rows)")
    moved = f"loses {rule.text_of_drop(found.drop)}" if found.drop >= 0 else f"gains {rule.text_of_drop(-found.drop)}"
    text = (
        f"{rule.text(found.value)} against {rule.text(found.reference)}, {moved}, surely at most "
        f"{rule.text_of_drop(found.bound)} ({100 * found.confidence:g} %, {found.n} rows), needs {allowed}"
    )
    if found.drop > max_drop and (found.n >= rows_min or found.lower > max_drop):
        return check("fail", text)
    if found.n < rows_min:
        return check("inconclusive", f"{text}, but fewer than {rows_min} rows prove nothing")
    if found.bound <= max_drop:
        return check("pass", text)
    needed = rows_needed(found, max_drop)
    wish = f"about {needed:,} rows like these would settle it" if needed else "more rows like these would not settle it"
    return check("inconclusive", f"{text}; {wish}")


def rows_needed(found: Drop, max_drop: float) -> int | None:
    """How many rows would bring the bound within ``max_drop`` if the rest were like these; None when none would."""
    room = max_drop - found.drop
    if found.n == 0 or not math.isfinite(found.bound) or room <= 0:
        return None
    if found.lost is None or found.gained is None:
        needed = math.ceil(found.n * max(1.0, (found.bound - found.drop) / room) ** 2)
        return needed if needed <= _ROWS_MOST else None
    lost, gained = found.lost / found.n, found.gained / found.n

    def proves(n: int) -> bool:
        return paired_bounds(lost * n, gained * n, n, found.confidence)[1] <= max_drop

    low, high = found.n, found.n
    while not proves(high):
        low, high = high, 2 * high
        if high > _ROWS_MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if proves(middle) else (middle, high)
    return high


def _drop(
    rule: TaskMetric,
    value: float,
    reference: float,
    bounds: tuple[float, float],
    n: int,
    method: str,
    confidence: float,
    **counts: int,
) -> Drop:
    worse = (reference - value) if rule.higher else (value - reference)
    return Drop(
        metric=rule.name,
        value=value,
        reference=reference,
        drop=worse,
        bound=bounds[1],
        lower=bounds[0],
        n=n,
        method=method,
        confidence=confidence,
        decisions=rule.decisions,
        **counts,
    )
