"""Judges differences by the table of gates: pass, fail, or why nothing can be said.

A gate that is broken fails on however few rows; a gate that holds passes only on enough rows of a reference that moves
with its input. Agreement of decisions is judged on real data alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from modelops.core.report import Check, Verdict
from modelops.errors import unknown_name
from modelops.measures.differences import DEGENERATE, Difference
from modelops.measures.distributions import wilson
from modelops.measures.gates import FIGURES, TRANSITIONS, Gate, Transition, TransitionName, at_least

ROWS_MIN = 32
AGREEMENT_MIN = 256
# Of an exact rewrite, expensive models are checked on fewer rows, which must hold as many numbers as 32 rows of 128.
# What int8 or pruning loses differs from row to row: there, rows alone count.
_FEW_ROWS, _MANY_NUMBERS = 16, 4096
_SHARES = frozenset({"top1", "top5", "equal", "nearest"})
_FLOAT64_RATIO = 4.0  # a step may err four times as much as its source does
_FLOAT64_FLOOR = 1e-7  # … or this share of the scale, about one rounding of a float32


@dataclass(frozen=True)
class Float64Errors:
    """Differences from the source's float64 outputs: of the source in its own precision, and of the model judged."""

    source: Mapping[str, Difference]
    actual: Mapping[str, Difference]


def judge(
    differences: Mapping[str, Difference],
    transition: TransitionName,
    *,
    agreement_evaluated: bool,
    rows_min: int = ROWS_MIN,
    agreement_min: int = AGREEMENT_MIN,
    task_metric: bool = False,
    overrides: Sequence[Gate | str] = (),
    float64: Float64Errors | None = None,
) -> list[Check]:
    """The verdict on every gate of the transition, for every output, in their order.

    ``agreement_evaluated`` says that the rows are real data, on which agreement means something. ``task_metric`` says
    that a task metric is judged elsewhere: agreement with the model before is then only reported. A gate of
    ``overrides`` takes the place of the table's on the same figure and outputs. UsageError for an override that matches
    no output.
    """
    if transition not in TRANSITIONS:
        raise unknown_name("transition", transition, get_args(TransitionName))
    if not differences:
        return [Check("outputs", "inconclusive", "nothing was compared")]
    asked = tuple(Gate.parse(gate) if isinstance(gate, str) else gate for gate in overrides)
    lively = any(d.varies for d in differences.values())
    judges = [
        _Judge(d, TRANSITIONS[transition], rows_min, agreement_min, agreement_evaluated, lively)
        for d in differences.values()
    ]
    checks: list[Check] = []
    for one in judges:
        checks += one.checks(asked, task_metric, float64)
    return checks + [check for gate in asked for check in _unmet(gate, differences)]


def unjudged(checks: Sequence[Check]) -> list[Check]:
    """That no figure of any output could be judged, where that is so: what is left proves nothing about values."""
    if any(check.verdict in ("fail", "inconclusive") for check in checks):
        return []
    if any(check.verdict == "pass" and check.name.rpartition(".")[2] in (*FIGURES, "float64") for check in checks):
        return []
    text = "nothing was judged but form: no gate applies to these outputs on these inputs"
    return [Check("judged", "inconclusive", f"{text}; give data, with labels where there are some, or --gate")]


def warnings(differences: Mapping[str, Difference], transition: TransitionName) -> list[str]:
    """Sentences on figures that pass but are worse than this transition usually gives."""
    found = []
    for name, difference in differences.items():
        for gate in TRANSITIONS[transition].warn:
            value: float | None = getattr(difference, gate.figure)
            if value is not None and math.isfinite(value) and not gate.holds(value) and difference.scale > 0:
                figure = FIGURES[gate.figure]
                found.append(f"{name}: {figure.label} {figure.text(value)}, usually {gate.demand} for {transition}")
    return found


def _unmet(gate: Gate, differences: Mapping[str, Difference]) -> Iterator[Check]:
    """A gate that was asked for and fits no output: refused when no output has the name, else told."""
    matched = {name: d for name, d in differences.items() if gate.matches(name)}
    if not matched:
        raise unknown_name(f"output in gate {gate}:", gate.output, differences)
    if all(getattr(d, gate.figure) is None for d in matched.values()):
        label = FIGURES[gate.figure].label
        seen = ", ".join(f"{name} ({d.dtype or 'missing'}, rank {d.rank}, {d.head})" for name, d in matched.items())
        yield Check(
            f"{gate.output}.{gate.figure}", "inconclusive", f"no output has a {label}: {seen}", None, gate.demand
        )


class _Judge:
    """Judges one output."""

    def __init__(
        self, d: Difference, row: Transition, rows_min: int, agreement_min: int, real: bool, lively: bool
    ) -> None:
        self.d, self.row = d, row
        self.rows_min, self.agreement_min, self.real = rows_min, agreement_min, real
        self.moves = d.varies is True or (d.exact and lively)  # a constant integer, such as a shape, is no bad sign

    def checks(self, asked: Sequence[Gate], task_metric: bool, float64: Float64Errors | None) -> Iterator[Check]:
        d = self.d
        form = self._form()
        yield form
        if not form:
            return
        if d.elements == 0:
            yield Check(f"{d.output}.compared", "inconclusive", f"{d.output}: there was no element to compare", n=0)
            return
        mine = [gate for gate in asked if gate.matches(d.output) and getattr(d, gate.figure) is not None]
        replaced = {gate.figure for gate in mine}
        yield from (self._masks(),) if not d.exact else ()
        if d.compared == 0:
            yield Check(f"{d.output}.compared", "inconclusive", f"{d.output}: no element is finite", n=d.rows)
            return
        for gate in (*self._hard(), *(() if task_metric else self._agreement())):
            if gate.figure not in replaced:
                yield self._gate(gate)
        yield from (self._gate(gate) for gate in mine)
        if self.row.alive and self.moves and not d.exact:
            yield self._alive()
        if self.row.strict and float64 and d.output in float64.source and d.output in float64.actual:
            yield self._float64(float64.source[d.output], float64.actual[d.output])

    def _hard(self) -> tuple[Gate, ...]:
        if self.d.exact:
            return (at_least("equal", 1.0),) if self.row.strict else ()
        if self.row.strict and self.d.dtype in ("float16", "bfloat16"):
            return TRANSITIONS["float16" if self.d.dtype == "float16" else "bfloat16"].hard
        return self.row.hard

    def _agreement(self) -> tuple[Gate, ...]:
        head: str = "exact" if self.d.exact else self.d.head
        if head == "classes" and self.d.rank > 2:
            head = "tokens"
        return self.row.agreement.get(head, ())

    def _check(self, what: str, verdict: Verdict, text: str, value: float | None = None, demand: str = "") -> Check:
        shown = value if value is None or math.isfinite(value) else ("identical" if value > 0 else None)
        return Check(f"{self.d.output}.{what}", verdict, f"{self.d.output}: {text}", shown, demand, self.d.rows)

    def _form(self) -> Check:
        d = self.d
        if d.problem:
            return self._check("form", "fail", d.problem)
        turned = self.row.dtype and not d.exact and d.actual_dtype == self.row.dtype
        if d.dtype != d.actual_dtype and not turned:
            return self._check("form", "fail", f"dtype {d.actual_dtype}, the reference has {d.dtype}")
        sizes = f" [{', '.join(map(str, d.shape))}]" if d.shape else ""
        return self._check("form", "pass", f"dtype and shape agree: {d.dtype}{sizes}")

    def _masks(self) -> Check:
        d = self.d
        count = d.mask_mismatches if self.row.strict else d.new_nonfinite
        label = "on one side only" if self.row.strict else "where the reference is not"
        if count:
            text = f"{count} elements are NaN or infinite {label} ({_rows(d.rows)}){self._worst()}"
            return self._check("finite", "fail", text, count, "== 0")
        text = f"no element is NaN or infinite {label}"
        if self._too_few():
            return self._check("finite", "inconclusive", f"{text}, but {self._few()}", 0, "== 0")
        return self._check("finite", "pass", f"{text} ({_rows(d.rows)})", 0, "== 0")

    def _gate(self, gate: Gate) -> Check:
        value: float | None = getattr(self.d, gate.figure)
        figure = FIGURES[gate.figure]
        unjudged: Verdict = "inconclusive" if gate.asked else "not-evaluated"
        if gate.agreement or (gate.asked and gate.figure == "equal" and not self.row.strict):
            lacking = self._lacking(gate)
            if lacking and self.real and value is not None and self._surely_missed(gate, value):
                text = f"{figure.label} {figure.text(value)}, needs {gate.demand} ({self._count(gate)}): surely missed"
                return self._check(gate.figure, "fail", text + self._worst(), value, gate.demand)
            if lacking:
                return self._check(gate.figure, unjudged, f"{figure.label} not evaluated: {lacking}", None, gate.demand)
        if value is None:
            return self._check(gate.figure, unjudged, f"{figure.label} does not apply", None, gate.demand)
        if value == math.inf and gate.figure == "sqnr":
            said = "identical"
        else:
            said = f"{figure.label} {figure.text(value)}"
        text = f"{said}, needs {gate.demand} ({self._count(gate)})"
        if gate.holds(value):
            weakness = self._weakness()
            if weakness:
                return self._check(gate.figure, "inconclusive", f"{text}, but {weakness}", value, gate.demand)
            return self._check(gate.figure, "pass", text, value, gate.demand)
        if self.d.scale == 0 and not self.d.exact:
            text += ", but the reference is zero throughout, so no scale is known"
            return self._check(gate.figure, "inconclusive", text, value, gate.demand)
        return self._check(gate.figure, "fail", text + self._worst(), value, gate.demand)

    def _lacking(self, gate: Gate) -> str:
        """What keeps an agreement from meaning anything, and how to get it."""
        rows = self.d.nearest_rows if gate.figure == "nearest" else self.d.rows
        if not self.real:
            return "made-up inputs say nothing about decisions; give real ones with --data"
        if rows < self.agreement_min:
            return f"{_rows(rows)} of data, needs {self.agreement_min}; give more with --data"
        return ""

    def _surely_missed(self, gate: Gate, value: float) -> bool:
        """Whether even the upper end of a share's interval is too little."""
        if gate.figure not in _SHARES or gate.comparison != ">=":
            return False
        n = min(self._counted(gate), self.d.rows)  # what comes from one row is not independent
        return bool(n) and wilson(round(value * n), n)[1] < gate.threshold

    def _counted(self, gate: Gate) -> int:
        """Of how many a share is."""
        d = self.d
        return {"nearest": d.nearest_rows, "equal": d.compared}.get(gate.figure, d.decisions)

    def _weakness(self) -> str:
        """Why a gate that holds proves nothing here; empty when it does."""
        if self._too_few():
            return self._few()
        return "" if self.moves else "the reference does not vary with the input, so the test has no power"

    def _too_few(self) -> bool:
        d = self.d
        enough = self.row.strict and d.rows >= _FEW_ROWS and d.compared >= _MANY_NUMBERS
        return d.rows < self.rows_min and not enough

    def _few(self) -> str:
        return f"{_rows(self.d.rows)} prove nothing: at least {self.rows_min} are needed"

    def _count(self, gate: Gate) -> str:
        if gate.figure in _SHARES and (gate.agreement or gate.figure != "equal"):
            n = self._counted(gate)
            low, high = wilson(round(getattr(self.d, gate.figure) * n), n)
            interval = f"95 % interval {100 * low:.3g}…{100 * high:.3g} %"
            return f"{_rows(self.d.rows)}, {interval}; agreement with the model before, not accuracy"
        return _rows(self.d.rows)

    def _worst(self) -> str:
        text = worst_of(self.d)
        return f", worst in {text}" if text else ""

    def _alive(self) -> Check:
        moved = self.d.actual_variation or 0.0
        if moved < DEGENERATE:
            return self._check(
                "alive", "fail", "the output no longer varies with the input", moved, f">= {DEGENERATE:g}"
            )
        return self._check("alive", "pass", "the output varies with the input", moved, f">= {DEGENERATE:g}")

    def _float64(self, source: Difference, actual: Difference) -> Check:
        if source.max_abs is None or actual.max_abs is None:
            return self._check("float64", "inconclusive", "nothing finite to hold against float64")
        limit = _FLOAT64_RATIO * source.max_abs + _FLOAT64_FLOOR * source.scale
        text = (
            f"error against float64 {actual.max_abs:.3g}, needs <= {limit:.3g}: four times the source's own "
            f"{source.max_abs:.3g} ({_rows(actual.rows)})"
        )
        held, weakness = actual.max_abs <= limit, self._weakness()
        verdict: Verdict = "fail" if not held else "inconclusive" if weakness else "pass"
        text += f", but {weakness}" if held and weakness else ""
        return self._check("float64", verdict, text, actual.max_abs, f"<= {limit:.3g}")


def worst_of(difference: Difference) -> str:
    """Where the worst element of an output is, which input gave it, and both values; empty where there is none."""
    worst = difference.worst
    if worst is None:
        return ""
    index = "".join(f"[{i}]" for i in worst.index)
    origin = f" (row {worst.input_row} of {worst.input})" if worst.input else ""
    return f"row {worst.row}{index}{origin}: {_number(worst.actual)} for {_number(worst.reference)}"


def _rows(n: int) -> str:
    return f"{n} row" if n == 1 else f"{n} rows"


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"
