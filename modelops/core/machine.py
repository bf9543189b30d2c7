"""The machine: its CPU, what of it this process may use, and the versions that a result depends on."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# The instruction sets that decide which kernels a runtime picks, by the names of /proc/cpuinfo.
FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512-VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512_bf16": "AVX512-BF16",
    "amx_int8": "AMX-INT8",
    "amx_bf16": "AMX-BF16",
    "asimddp": "NEON dot product",
    "i8mm": "NEON I8MM",
    "sve": "SVE",
}


@functools.cache
def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    block = text.split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in block.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_model() -> str:
    """The CPU's name as it gives it."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_features() -> tuple[str, ...]:
    """The features among FEATURES that this CPU has."""
    info = _cpuinfo()
    present = set((info.get("flags") or info.get("Features") or "").split())
    return tuple(name for name in FEATURES if name in present)


def has_vnni() -> bool:
    """Whether 8-bit dot products accumulate in 32 bits, without saturating on the way."""
    return bool({"avx512_vnni", "avx_vnni", "amx_int8"} & set(cpu_features()))


_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def cpu_quota() -> float | None:
    """How many CPUs the control groups allow (version 2 or 1), or None when none sets a quota; the tightest counts."""
    quotas = []
    for folder in _cgroup_folders():
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                quotas.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    for folder in _cgroup_folders("cpu"):
        try:
            quota_us = int((folder / "cpu.cfs_quota_us").read_text())
            if quota_us > 0:
                quotas.append(quota_us / int((folder / "cpu.cfs_period_us").read_text()))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return min(quotas, default=None)


def _cgroup_folders(controller: str = "") -> Iterable[Path]:
    """This process's control group and all above it: version 2's, or those of one of version 1's controllers."""
    base = _CGROUPS / controller
    try:
        entries = [line.split(":", 2) for line in _OWN_CGROUPS.read_text().splitlines()]
    except OSError:
        return [base]
    # Version 2 has an empty list of controllers; version 1 may mount several together, such as "cpu,cpuacct".
    own = next((entry[2] for entry in entries if len(entry) == 3 and controller in entry[1].split(",")), "/")
    folder = base / own.lstrip("/")
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(base))]


def usable_cpus() -> int:
    """How many CPUs this process may really use: the least of affinity and control-group quota, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return max(1, min(allowed, int(quota)) if quota is not None else allowed)


def memory_bytes() -> int:
    """The machine's memory, or the control group's limit when that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in _cgroup_folders():
        try:
            total = min(total, int((folder / "memory.max").read_text()))
        except (OSError, ValueError):
            continue
    return total


@functools.cache
def installed(distribution: str) -> str | None:
    """The installed version of a distribution, or None; imports nothing."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Installed versions, by distribution; those that are not installed are left out."""
    return {name: found for name in sorted(set(distributions)) if (found := installed(name))}


LIBRARIES = (
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxscript",
    "onnxsim",
    "onnxslim",
    "openvino",
    "torch",
    "transformers",
    "safetensors",
    "scikit-learn",
    "tokenizers",
    "pillow",
)


def environment() -> dict[str, Any]:
    """Where an artifact was made: python, platform, CPU and libraries. It lies outside the artifact's id."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"model": cpu_model(), "features": list(cpu_features()), "machine": platform.machine()},
        "threads": usable_cpus(),
        "memory_bytes": memory_bytes(),
        "libraries": versions(LIBRARIES),
    }
