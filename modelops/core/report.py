"""What a stage found out: figures, and checks with a verdict.

Verdicts, from best to worst: ``pass``, ``inconclusive``, ``fail``. ``not-evaluated`` says that a check had nothing to
judge; it never makes a report pass, and never spoils one that other checks have decided.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["pass", "fail", "inconclusive", "not-evaluated"]
VERDICTS: tuple[Verdict, ...] = ("pass", "inconclusive", "fail", "not-evaluated")
_WORST_FIRST: tuple[Verdict, ...] = ("fail", "inconclusive", "pass")


@dataclass(frozen=True)
class Metric:
    """One figure. ``unit`` is what the value counts ("ms", "bytes", "dB", "x", ""); ``interval`` is (low, high)."""

    name: str
    value: float | int | str | None
    unit: str = ""
    interval: tuple[float, float] | None = None
    confidence: float | None = None
    n: int | None = None

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {"name": self.name, "value": self.value, "unit": self.unit}
        if self.interval is not None:
            values["interval"] = list(self.interval)
        if self.confidence is not None:
            values["confidence"] = self.confidence
        if self.n is not None:
            values["n"] = self.n
        return values

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Metric:
        interval = values.get("interval")
        return cls(
            values["name"],
            values["value"],
            values.get("unit", ""),
            (interval[0], interval[1]) if interval else None,
            values.get("confidence"),
            values.get("n"),
        )


@dataclass(frozen=True)
class Check:
    """One claim with its verdict: ``value`` was held against ``threshold`` (written as text, such as ">= 100 dB").

    ``message`` is one sentence for a person. Only a pass is truthy.
    """

    name: str
    verdict: Verdict
    message: str = ""
    value: float | int | str | None = None
    threshold: str = ""
    n: int | None = None

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"a verdict is one of {VERDICTS}, not {self.verdict!r}")

    def __bool__(self) -> bool:
        return self.verdict == "pass"

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "verdict": self.verdict,
            "message": self.message,
            "value": self.value,
            "threshold": self.threshold,
            "n": self.n,
        }

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Check:
        return cls(**{key: values.get(key) for key in ("name", "verdict", "message", "value", "threshold", "n")})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Report:
    """Metrics, checks and remarks of one stage. Only a report whose verdict is a pass is truthy.

    ``notes`` are sentences that a person should read (a decision taken, a warning). ``details`` holds further
    JSON-able findings that no renderer needs to understand.
    """

    metrics: tuple[Metric, ...] = ()
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """The worst verdict among the checks that were evaluated; ``not-evaluated`` when none was."""
        found = {check.verdict for check in self.checks}
        for verdict in _WORST_FIRST:
            if verdict in found:
                return verdict
        return "not-evaluated"

    @property
    def exit_code(self) -> int:
        """0 on a pass, or when nothing was asked; 1 on a failed check; 3 when nothing could be decided."""
        if self.verdict == "fail":
            return 1
        if self.verdict == "inconclusive" or (self.verdict == "not-evaluated" and self.checks):
            return 3
        return 0

    def __bool__(self) -> bool:
        return self.verdict == "pass"

    def metric(self, name: str) -> Metric | None:
        """The metric of that name, if there is one."""
        return next((metric for metric in self.metrics if metric.name == name), None)

    def worst(self) -> Check | None:
        """The first check that has the report's verdict."""
        return next((check for check in self.checks if check.verdict == self.verdict), None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "metrics": [metric.to_dict() for metric in self.metrics],
            "checks": [check.to_dict() for check in self.checks],
            "notes": list(self.notes),
            "details": dict(self.details),
        }

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Report:
        return cls(
            tuple(Metric.parse(item) for item in values.get("metrics", ())),
            tuple(Check.parse(item) for item in values.get("checks", ())),
            tuple(values.get("notes", ())),
            dict(values.get("details", {})),
        )
