"""Evidence of a measurement: its raw records and what was asked, and the report that follows from them alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from modelops.backends._cuda import HELD_DOWN
from modelops.core.report import Check, Metric, Report
from modelops.errors import InputRefused
from modelops.measures.verdicts import Rules, SpeedVerdict, order_effect
from modelops.stages import _baseline, _preflight, _profile, _speed
from modelops.stages._speed import Record

BLOCKS = "blocks.jsonl"
MEASUREMENTS = "measurements.json"
SCHEMA = "modelops.measurements/2"
_BEYOND = 1.1  # of the peak, which one large product need not reach quite
_LAUNCHES_MIN = 3  # for an interval that can be held against another measurement's


@dataclass(frozen=True)
class Beside:
    """The judged model at another batch, on another backend, or both; ``side`` names it in the records."""

    side: str
    backend: str
    rows: int

    def prefix(self, judged: Beside) -> str:
        """What its figures' names start with: what differs from the judged side."""
        batch = f"batch_{self.rows}_" if self.rows != judged.rows else ""
        return batch + (f"{self.backend.replace('-', '_')}_" if self.backend != judged.backend else "")


@dataclass(frozen=True)
class Evidence:
    """One measurement. ``judged`` and ``against`` name sides of the records; without ``against`` there is no verdict.

    ``setup`` says what was measured and on what: models, backends, feed, seed. ``checks`` are those of the outputs,
    made before the timing. ``profile`` holds the time of every node, ``beside`` further sides that were timed beside
    the judged one, ``baseline`` the summary of an earlier measurement. ``rows`` is how many samples one inference
    takes.
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
    beside: tuple[Beside, ...] = ()
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
        tables = []
        if self.beside:
            tables.append(self._table())
            for one in self.beside:
                metrics += self._figures_beside(one)
        metrics += self._achieved()
        if self.profile is not None:
            details["operators"] = _profile.operators(self.profile)
            details["work"] = self._work(self.profile)
            notes += _profile.sentences(self.profile)
            tables.append(_profile.table(details["work"]))
            if any((row["share_of_peak"] or 0.0) > _BEYOND for row in details["work"]):
                notes.append(
                    "more than the peak: the machine was busy when doctor --peak measured it; measure it again"
                )
        if tables:
            details["tables"] = tables
        verdict = self.verdict()
        if verdict is not None and self.against is not None:
            metrics += _speed.metrics(self.records, self.against, self.rows, prefix="against_")
            metrics += _ratio(verdict)
            check = verdict.check()
            if verdict.verdict == "inconclusive":
                check = replace(check, message=f"{check.message}; {self._hint(verdict)}")
            checks.append(check)
            details["verdict"] = verdict.to_dict()
            details["order_effect"] = order_effect(_speed.launches(self.records, self.judged, self.against))
        return Report(tuple(metrics), tuple(checks), tuple(notes), details)

    def summary(self) -> dict[str, Any]:
        """What a later measurement is held against: figures of the judged model, its latency, and where it ran."""
        found = {metric.name: metric for metric in _speed.metrics(self.records, self.judged, self.rows)}
        median = found["latency_p50"]
        several = len(_speed.headers(self.records)) >= _LAUNCHES_MIN
        low, high = median.interval if median.interval and several else (None, None)
        busy = next((record["busy"] for record in self.records if record["kind"] == "preflight"), None)
        return {
            "figures": {**self.setup["figures"], "memory_of_model_bytes": found["memory_of_model"].value},
            "feed": self.setup["feed"],
            "backend": self.setup["models"][self.judged]["backend"],
            "latency_ms": {"p50": median.value, "low": low, "high": high, "busy": busy},
            "machine": self.setup["machine"],
        }

    def _own(self) -> Beside:
        return Beside(self.judged, self.setup["models"][self.judged]["backend"]["name"], self.rows)

    def _figures_beside(self, one: Beside) -> list[Metric]:
        """The figures of another side that matter beside the judged one's."""
        prefix = one.prefix(self._own())
        wanted = ("latency_p50", "throughput", "load", "peak_memory", "device_memory")
        found = [
            metric
            for metric in _speed.metrics(self.records, one.side, one.rows, prefix=prefix)
            if metric.name.removeprefix(prefix) in wanted or metric.name.endswith("_at_once")
        ]
        if one.rows == self.rows:
            ratio, interval = _speed.speedup(self.records, self.judged, one.side)
            count = len(_speed.headers(self.records))
            found.append(Metric(f"{prefix}speedup", ratio, "x", interval, 0.95 if interval else None, count))
        return found

    def _table(self) -> dict[str, Any]:
        """All sides below one another."""
        rows = []
        for one in (self._own(), *self.beside):
            found = {metric.name: metric for metric in _speed.metrics(self.records, one.side, one.rows)}
            at_once = [metric for name, metric in found.items() if name.endswith("_at_once")]
            speedup, interval = (
                _speed.speedup(self.records, self.judged, one.side)
                if one.rows == self.rows and one.side != self.judged
                else (None, None)
            )
            median = found["latency_p50"]
            cells: dict[str, Any] = {
                "backend": one.backend,
                "batch": one.rows,
                "latency": median.value,
                "its interval": median.interval,
                "samples/s": found["throughput"].value,
                **{f"{metric.name.split('_')[1]} at once": metric.value for metric in at_once},
                "memory": found["peak_memory"].value,
                "load": found["load"].value,
                "speed-up": speedup,
                "interval": interval,
            }
            rows.append(cells)
        columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
        return {"columns": columns, "rows": [[row[name] for name in columns] for row in rows]}

    def _achieved(self) -> list[Metric]:
        """How much the model computes, and how much of it in a second."""
        macs = self.setup["figures"].get("macs") if "figures" in self.setup else None
        if not macs:
            return []
        rate = 2e-6 * macs / _speed.block_ms(self.records, self.judged)
        return [Metric("macs", macs), Metric("achieved", rate, "Gop/s")]

    def _work(self, profile: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        seconds = 1e-3 * _speed.block_ms(self.records, self.judged)
        return _profile.work(profile, self.setup.get("peak"), macs=self.setup["figures"].get("macs"), seconds=seconds)

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
            if held := _held_down(headers, name):
                found.append(f"{name}: the GPU's clocks were held down ({held}): figures are those of a slower device")
            needs = _speed.latency(self.records, name).needs
            if needs:
                wanted = ", ".join(f"{key} needs {count}" for key, count in needs.items())
                found.append(f"{name}: too few latencies for some percentiles ({wanted})")
        return found

    def _hint(self, verdict: SpeedVerdict) -> str:
        if verdict.would_need is None or not verdict.launches:
            return "a quieter machine may settle it, or --ignore and --detect further apart"
        if verdict.would_need > self.rules.looks[-1]:
            return f"quieten the machine, since at most {self.rules.looks[-1]} launches are made"
        seconds = self.budget_seconds / verdict.launches * verdict.would_need
        return f"give it --budget {math.ceil(1.2 * seconds)}s"

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
            "beside": [asdict(one) for one in self.beside],
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
                beside=tuple(Beside(**one) for one in values["beside"]),
                baseline=values["baseline"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputRefused(
                f"{folder} holds no measurements that can be read: {error}", hint="give what bench wrote"
            ) from error


# Bits of nvidia-smi's clocks_event_reasons.active that slow a device down (NVML API reference, nvmlClocksEventReasons).
_HELD = {0x04: "power cap", 0x08: "hardware slowdown", 0x20: "heat", 0x40: "heat", 0x80: "power brake"}


def _held_down(headers: Sequence[Record], name: str) -> str:
    """Why the device's clocks were held down when a launch ended, in words; empty where they were not."""
    found = []
    for header in headers:
        device = header["sides"][name].get("device_after")
        text = device.get(HELD_DOWN, "") if isinstance(device, dict) else ""
        bits = int(text, 16) if re.fullmatch(r"0x[0-9a-fA-F]{1,16}", text) else 0
        found += [word for bit, word in _HELD.items() if bits & bit]
    return ", ".join(dict.fromkeys(found))


def _ratio(verdict: SpeedVerdict) -> list[Metric]:
    if verdict.ratio is None or verdict.low is None or verdict.high is None:
        return []
    interval = (1 / verdict.high, 1 / verdict.low)
    return [Metric("speedup", 1 / verdict.ratio, "x", interval, verdict.confidence, verdict.launches)]
