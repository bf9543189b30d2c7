"""The state of the machine before a measurement: who else uses it, and what of it we may use."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from modelops.core import machine

_LOOK_SECONDS = 0.25


def look() -> dict[str, Any]:
    """The record of a look at the machine for a quarter of a second.

    ``busy`` is the share of the CPUs we may use that others used meanwhile, ``steal`` the share that the hypervisor
    took; each is None where the system does not tell. ``pressure`` holds the lines of /proc/pressure/cpu.
    """
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    before, own = _jiffies(cpus), time.process_time()
    time.sleep(_LOOK_SECONDS)
    after, own = _jiffies(cpus), time.process_time() - own
    busy = steal = None
    if before and after and (total := sum(after.values()) - sum(before.values())) > 0:
        idle = after["idle"] + after["iowait"] - before["idle"] - before["iowait"]
        steal = (after["steal"] - before["steal"]) / total
        busy = min(1.0, max(0.0, 1 - idle / total - own / (_LOOK_SECONDS * max(1, len(cpus)))))
    return {
        "kind": "preflight",
        "busy": busy,
        "steal": steal,
        "load": list(os.getloadavg()),
        "pressure": _text("/proc/pressure/cpu").splitlines(),
        "cpus": cpus,
        "quota": machine.cpu_quota(),
        "usable_cpus": machine.usable_cpus(),
        "host_cpus": os.cpu_count(),
        "siblings": {str(cpu): _text(f"{_CPU}/cpu{cpu}/topology/thread_siblings_list") for cpu in cpus},
        "numa_nodes": _text("/sys/devices/system/node/online"),
        "governor": sorted({_text(f"{_CPU}/cpu{cpu}/cpufreq/scaling_governor") for cpu in cpus} - {""}),
        "megahertz": [int(text) / 1000 for cpu in cpus if (text := _text(f"{_CPU}/cpu{cpu}/cpufreq/scaling_cur_freq"))],
    }


def warnings(record: dict[str, Any]) -> list[str]:
    """What of a preflight record a person should know before trusting a figure."""
    found = []
    if record["busy"] is not None and record["busy"] > 0.5:
        found.append(
            f"other work used {record['busy']:.0%} of the CPUs before the measurement: single figures are too high"
        )
    if record["steal"] is not None and record["steal"] > 0.05:
        found.append(f"the hypervisor took {record['steal']:.0%} of the CPU time")
    if record["governor"] and record["governor"] != ["performance"]:
        found.append(f"CPU frequency is governed by {', '.join(record['governor'])}: it may change while timing")
    if record["host_cpus"] and record["usable_cpus"] < record["host_cpus"]:
        found.append(
            f"{record['usable_cpus']} of the host's {record['host_cpus']} CPUs may be used; threads follow that"
        )
    return found


_CPU = "/sys/devices/system/cpu"
_FIELDS = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")


def _jiffies(cpus: list[int]) -> dict[str, int]:
    """Clock ticks by use, summed over these CPUs; empty where there is no /proc/stat."""
    wanted = {f"cpu{cpu}" for cpu in cpus}
    total = dict.fromkeys(_FIELDS, 0)
    seen = False
    for line in _text("/proc/stat").splitlines():
        name, *values = line.split()
        if name in wanted:
            seen = True
            for field, value in zip(_FIELDS, values, strict=False):
                total[field] += int(value)
    return total if seen else {}


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
