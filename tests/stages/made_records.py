"""Records of launches that were made up: blocks of exactly known times."""

from __future__ import annotations

from typing import Any

Records = list[dict[str, Any]]


def side(ms: float, *, threads: int = 1, steady: bool = True, device: bool = False) -> dict[str, Any]:
    facts = {"threads": threads, **({"device": "a GPU"} if device else {})}
    return {
        "facts": facts,
        "warm": {"steady": steady},
        "load_seconds": 0.5,
        "first_seconds": ms * 2e-3,
        "memory_before_load_bytes": 10,
        "memory_after_load_bytes": 30,
        "memory_peak_bytes": 40,
        "device_memory_bytes": 7 if device else None,
    }


def records(a_ms: float, b_ms: float, *, busy: float = 0.0, launches: int = 5, **more: Any) -> Records:
    """Launches of three rounds of blocks of ten; B's CPU time is twice its wall time."""
    found: Records = [
        {"kind": "preflight", "busy": busy, "steal": 0.0, "governor": [], "usable_cpus": 2, "host_cpus": 2}
    ]
    for launch in range(launches):
        wobble = 1 + 0.001 * launch
        sides = {"a": side(a_ms, **more), "b": side(b_ms, **more)}
        found.append({"kind": "launch", "launch": launch, "order": ["a", "b"], "n": 10, "sides": sides})
        for number in range(3):
            for position, (name, ms) in enumerate([("a", a_ms * wobble), ("b", b_ms)]):
                found.append(
                    {
                        "kind": "block",
                        "launch": launch,
                        "round": number,
                        "side": name,
                        "position": position if number % 2 else 1 - position,
                        "n": 10,
                        "wall_ns": round(ms * 1e7),
                        "cpu_ns": round(ms * 1e7 * (2 if name == "b" else 1)),
                        "device_ns": None,
                        "latencies_ns": [round(ms * 1e6)] * 10,
                    }
                )
    return found
