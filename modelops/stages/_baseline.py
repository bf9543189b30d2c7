"""A baseline: what an earlier bench found, held against what is found now.

Figures that do not depend on the machine's mood gate hard, on any machine. Timings gate only where machine, versions,
backend and input are the same, and then loosely: a separate measurement moves by more than any change worth finding,
and only ``--against`` can tell a small one. On any other machine they are told, and judge nothing.

===============  =================================================================================
figure           may grow by
===============  =================================================================================
size             1 %
nodes            nothing
parameters       nothing
MACs             nothing, on inputs of the same shapes
memory of model  10 % or 4 MiB, whichever is more, on the same backend and inputs of the same shapes
latency          25 %, beyond the 99 % intervals of both; on the same machine, when neither was busy
===============  =================================================================================
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelops.core import machine
from modelops.core.artifact import Artifact
from modelops.core.report import Check
from modelops.errors import InputRefused, UsageError, from_os_error, missing_path

SCHEMA = "modelops.baseline/1"

_ALLOWED = {"size_bytes": 0.01, "nodes": 0.0, "parameters": 0.0, "macs": 0.0, "memory_of_model_bytes": 0.10}
_ON_ONE_FEED = ("macs", "memory_of_model_bytes")
_PAGES = 4 << 20  # what an allocator may take more or less of, whatever the model
_SLOWER = 0.25
_BUSY = 0.25
_LARGEST_BYTES = 1 << 20
_PARTS = {"figures": dict, "feed": dict, "backend": dict, "latency_ms": dict, "machine": dict}


def fixed_figures(source: Artifact) -> dict[str, int]:
    """What is known of a model without running it: bytes, nodes, parameters."""
    model = source.manifest.model
    known = {"size_bytes": source.size, "nodes": model.get("nodes"), "parameters": model.get("parameters")}
    return {name: int(value) for name, value in known.items() if value is not None}


def fingerprint() -> dict[str, Any]:
    """What makes timings of two machines comparable, as far as anything does."""
    return {
        "cpu": machine.cpu_model(),
        "features": list(machine.cpu_features()),
        "usable_cpus": machine.usable_cpus(),
        "libraries": machine.versions(["onnxruntime", "onnxruntime-gpu", "openvino", "torch"]),
    }


def save(path: Path, summary: Mapping[str, Any]) -> None:
    """Write a baseline file; UsageError where it would replace a file that is none."""
    if path.exists():
        try:
            load(path)
        except InputRefused as error:
            raise UsageError(f"{path} is there already, and is no baseline", hint="choose another name") from error
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(json.dumps({"schema": SCHEMA, **summary}, allow_nan=False, indent=2) + "\n", encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise from_os_error(error, f"writing the baseline {path}") from error


def load(path: Path) -> dict[str, Any]:
    """What ``save`` wrote; InputRefused for anything else."""
    if not path.exists():
        raise missing_path("baseline", path)
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise InputRefused(f"{path} is larger than any baseline", hint="give what --save-baseline wrote")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise from_os_error(error, f"reading the baseline {path}") from error
    except (ValueError, RecursionError) as error:
        raise InputRefused(f"{path} is no baseline: {error}", hint="give what --save-baseline wrote") from error
    if not isinstance(values, dict) or values.get("schema") != SCHEMA or not _whole(values):
        raise InputRefused(f"{path} is no baseline of the schema {SCHEMA}", hint="give what --save-baseline wrote")
    return values


def _whole(values: Mapping[str, Any]) -> bool:
    """Whether every part is there, with what is known of any model, and every figure is a number."""
    if not all(isinstance(values.get(name), kind) for name, kind in _PARTS.items()):
        return False
    latency = values["latency_ms"]
    if None in (values["figures"].get("size_bytes"), latency.get("p50")):
        return False
    numbers = [*values["figures"].values(), *(latency.get(name) for name in ("p50", "low", "high", "busy"))]
    return all(number is None or (type(number) in (int, float) and number >= 0) for number in numbers)


def checks(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Check]:
    """One check for every figure that both have and that can be compared; both are what ``Evidence.summary`` gives."""
    found = []
    for name, allowed in _ALLOWED.items():
        old, new = before["figures"].get(name), now["figures"].get(name)
        if old is None or new is None or _apart(name, before, now):
            continue
        most = old * (1 + allowed)
        if name.startswith("memory"):
            most = max(most, old + _PAGES)
        grown = f"{new:,} where the baseline has {old:,}"
        verdict = "pass" if new <= most else "fail"
        found.append(Check(f"baseline.{name}", verdict, grown, new, f"<= {most:,.0f}"))  # type: ignore[arg-type]
    return [*found, *_latency(before, now)]


def _apart(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a figure depends on what was not the same: inputs, or for memory the backend."""
    other = name in _ON_ONE_FEED and before["feed"] != now["feed"]
    return other or (name.startswith("memory") and before["backend"] != now["backend"])


def why_advisory(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Why the timings can't be judged, in words; empty where they can."""
    if before["machine"] != now["machine"]:
        return "the baseline's timings are of another machine, or other versions"
    if before["backend"] != now["backend"] or before["feed"] != now["feed"]:
        return "the baseline's timings are of another backend or of inputs of other shapes"
    if max(before["latency_ms"].get("busy") or 0.0, now["latency_ms"].get("busy") or 0.0) > _BUSY:
        return "other work kept the CPUs busy, now or when the baseline was measured"
    if None in (before["latency_ms"].get("high"), now["latency_ms"].get("low")):
        return "too few launches for an interval"
    return ""


def _latency(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Check]:
    if why_advisory(before, now):
        return []
    old, new = before["latency_ms"], now["latency_ms"]
    most = (1 + _SLOWER) * old["high"]
    text = (
        f"median {new['p50']:.4g} ms where the baseline has {old['p50']:.4g} ms; measured apart, only a gross "
        "slow-down is told: --against finds a small one"
    )
    verdict = "pass" if new["low"] <= most else "fail"
    return [Check("baseline.latency", verdict, text, new["p50"], f"surely <= {most:.4g} ms")]  # type: ignore[arg-type]


def notes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What may be said of figures and timings that are not judged."""
    found = []
    known = [name for name in _ALLOWED if before["figures"].get(name) is not None]
    if left := [name for name in known if now["figures"].get(name) is None or _apart(name, before, now)]:
        named = ", ".join(name.removesuffix("_bytes").replace("_", " ") for name in left)
        found.append(f"not held against the baseline, whose inputs or backend differ: {named}")
    if not (why := why_advisory(before, now)):
        return found
    old, new = before["latency_ms"]["p50"], now["latency_ms"]["p50"]
    return [*found, f"median latency {new:.4g} ms, baseline {old:.4g} ms: no verdict, since {why}"]
