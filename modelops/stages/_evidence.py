"""Evidence of a measurement: its raw records and what was asked, and the report that follows from them alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modelops.core.report import Check, Metric, Report
from modelops.errors import InputRefused
from modelops.measures.verdicts import Rules, SpeedVerdict, order_effect
from modelops.stages import _baseline, _preflight, _profile, _speed
from modelops.stages._speed import Record

BLOCKS = "blocks.jsonl"
MEASUREMENTS = "measurements.json"
SCHEMA = "modelops.measurements/1"


@dataclass(frozen=True)
class Evidence:
    """One measurement. ``judged`` and ``against`` name sides of the records; without ``against`` there is no verdict.

    ``setup`` says what was measured and on what: models, backends, feed, seed. ``checks`` are those of the outputs,
    made before the timing. ``profile`` holds the time of every node, ``others`` further sides that were timed beside
    the judged one, by the name of their backend, ``baseline`` the summary of an earlier measurement. ``rows`` is how
    many samples one inference takes.
    """

    judged: str
    against: str | None
    rules: Rules
    rows: int
    records: Sequence[Record]
    budget_seconds: float = 0.0
    setup: Mapping[str, Any] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()
    profile: Sequence[Mapping[str, Any]] | None = None
    others: Mapping[str, str] = field(default_factory=dict)
    baseline: Mapping[str, Any] | None = None

    def verdict(self) -> SpeedVerdict | None:
        """The speed verdict, derived from the records; None where nothing was asked."""
        if self.against is None:
            return None
        return _speed.judge(self.records, self.judged, self.against, self.rules)

    def report(self) -> Report:
        """Figures of both sides, checks of outputs and speed, and what a person should know."""
        metrics = list(_speed.metrics(self.records, self.judged, self.rows))
        checks, notes = list(self.checks), [*self.notes, *self._notes()]
        if self.baseline is not None:
            checks += _baseline.checks(self.baseline, self.summary())
            notes += _baseline.notes(self.baseline, self.summary())
        details: dict[str, Any] = {"setup": dict(self.setup), "clock": _speed.clock(self.records)}
        if self.profile is not None:
            peak = self.setup.get("peak")
            details["operators"] = _profile.operators(self.profile)
            details["work"] = _profile.work(self.profile, peak)
            notes += _profile.sentences(self.profile, peak)
        for backend, side in self.others.items():
            metrics += self._beside(backend.replace("-", "_"), side)
        verdict = self.verdict()
        if verdict is not None and self.against is not None:
            metrics += _speed.metrics(self.records, self.against, self.rows, prefix="against_")
            metrics += _ratio(verdict)
            checks.append(verdict.check())
            details["verdict"] = verdict.to_dict()
            details["order_effect"] = order_effect(_speed.launches(self.records, self.judged, self.against))
            if verdict.verdict == "inconclusive":
                details["hint"] = self._hint(verdict)
        return Report(tuple(metrics), tuple(checks), tuple(notes), details)

    def summary(self) -> dict[str, Any]:
        """What a later measurement is held against: figures of the judged model, its latency, and where it ran."""
        found = {metric.name: metric.value for metric in _speed.metrics(self.records, self.judged, self.rows)}
        return {
            "figures": {**self.setup["figures"], "memory_of_model_bytes": found["memory_of_model"]},
            "backend": self.setup["models"][self.judged]["backend"],
            "latency_p50_ms": found["latency_p50"],
            "machine": self.setup["machine"],
        }

    def _beside(self, prefix: str, side: str) -> list[Metric]:
        """The figures of another side that matter beside the judged one, and how many times as fast it is."""
        wanted = ("latency_p50", "throughput", "load", "peak_memory", "device_memory")
        found = [
            metric
            for metric in _speed.metrics(self.records, side, self.rows, prefix=f"{prefix}_")
            if metric.name.removeprefix(f"{prefix}_") in wanted
        ]
        ratio, interval = _speed.speedup(self.records, self.judged, side)
        count = len(_speed.headers(self.records))
        return [*found, Metric(f"{prefix}_speedup", ratio, "x", interval, 0.95 if interval else None, count)]

    def _notes(self) -> list[str]:
        found = []
        for record in self.records:
            if record["kind"] == "preflight":
                found += _preflight.warnings(record)
        if self.against is not None and _speed.clock(self.records) == "cpu":
            found.append(
                "the verdict goes by CPU time, since other work kept the CPUs busy and the models have one thread"
            )
        headers = _speed.headers(self.records)
        for name in filter(None, (self.judged, self.against)):
            rough = sum(header["sides"][name]["warm"]["steady"] is False for header in headers)
            if rough:
                found.append(f"{name} did not come to rest in {rough} of {len(headers)} launches")
            needs = _speed.latency(self.records, name).needs
            if needs:
                wanted = ", ".join(f"{key} needs {count}" for key, count in needs.items())
                found.append(f"{name}: too few latencies for some percentiles ({wanted})")
        return found

    def _hint(self, verdict: SpeedVerdict) -> str:
        if verdict.would_need is None or not verdict.launches:
            return "quieten the machine, or move --ignore and --detect further apart"
        if verdict.would_need > self.rules.looks[-1]:
            return f"quieten the machine: at most {self.rules.looks[-1]} launches are made"
        seconds = self.budget_seconds / verdict.launches * verdict.would_need
        return f"give it more time: --budget {math.ceil(1.2 * seconds)}s"

    def write(self, folder: Path) -> None:
        """Write the raw records as ``blocks.jsonl`` and everything else as ``measurements.json``."""
        with open(folder / BLOCKS, "x", encoding="utf-8") as file:
            for record in self.records:
                file.write(json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n")
        values = {
            "schema": SCHEMA,
            "judged": self.judged,
            "against": self.against,
            "rules": asdict(self.rules),
            "rows": self.rows,
            "budget_seconds": self.budget_seconds,
            "setup": dict(self.setup),
            "checks": [check.to_dict() for check in self.checks],
            "notes": list(self.notes),
            "others": dict(self.others),
            "baseline": None if self.baseline is None else dict(self.baseline),
            "profile": None if self.profile is None else list(self.profile),
        }
        with open(folder / MEASUREMENTS, "x", encoding="utf-8") as file:
            json.dump(values, file, allow_nan=False, indent=2)
            file.write("\n")

    @classmethod
    def read(cls, folder: Path) -> Evidence:
        """The evidence that ``write`` wrote there; InputRefused when it is anything else."""
        try:
            values = json.loads((folder / MEASUREMENTS).read_text(encoding="utf-8"))
            records = [json.loads(line) for line in (folder / BLOCKS).read_text(encoding="utf-8").splitlines()]
            if values["schema"] != SCHEMA:
                raise InputRefused(f"{folder} holds measurements of the schema {values['schema']!r}, not {SCHEMA!r}")
            rules = {**values["rules"], "looks": tuple(values["rules"]["looks"])}
            return cls(
                judged=values["judged"],
                against=values["against"],
                rules=Rules(**rules),
                rows=values["rows"],
                records=records,
                budget_seconds=values["budget_seconds"],
                setup=values["setup"],
                checks=tuple(Check.parse(check) for check in values["checks"]),
                notes=tuple(values["notes"]),
                profile=values["profile"],
                others=values["others"],
                baseline=values["baseline"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputRefused(
                f"{folder} holds no measurements that can be read: {error}", hint="give what bench wrote"
            ) from error


def _ratio(verdict: SpeedVerdict) -> list[Metric]:
    if verdict.ratio is None or verdict.low is None or verdict.high is None:
        return []
    interval = (1 / verdict.high, 1 / verdict.low)
    return [Metric("speedup", 1 / verdict.ratio, "x", interval, verdict.confidence, verdict.launches)]
