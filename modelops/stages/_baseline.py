"""A baseline: what an earlier bench found, held against what is found now.

Figures that do not depend on the machine's mood gate hard, on any machine. Timings never do: a separate measurement
moves by more than any change worth finding, and only ``--against`` can tell.

===============  ===============================
figure           may grow by
===============  ===============================
size             1 %
nodes            nothing
parameters       nothing
memory of model  10 % or 4 MiB, on one backend
===============  ===============================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelops.core import machine
from modelops.core.artifact import Artifact
from modelops.core.report import Check

_ALLOWED = {"size_bytes": 0.01, "nodes": 0.0, "parameters": 0.0, "memory_of_model_bytes": 0.10}
_PAGES = 4 << 20  # what an allocator may take more or less of, whatever the model


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


def checks(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Check]:
    """One check for every figure that both have; both are what ``Evidence.summary`` gives."""
    found = []
    for name, allowed in _ALLOWED.items():
        old, new = before["figures"].get(name), now["figures"].get(name)
        if old is None or new is None or (name.startswith("memory") and before["backend"] != now["backend"]):
            continue
        most = old * (1 + allowed)
        if name.startswith("memory"):
            most = max(most, old + _PAGES)
        grown = f"{new:,} where the baseline has {old:,}"
        verdict = "pass" if new <= most else "fail"
        found.append(Check(f"baseline.{name}", verdict, grown, new, f"<= {most:,.0f}"))  # type: ignore[arg-type]
    return found


def notes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What may be said of the timings."""
    if before["machine"] != now["machine"]:
        return ["the baseline's timings are of another machine, or other versions: they are not compared"]
    old, new = before["latency_p50_ms"], now["latency_p50_ms"]
    return [
        f"the median latency was {old:.4g} ms in the baseline and is {new:.4g} ms; measured apart, this is no verdict: "
        "--against gives one"
    ]
