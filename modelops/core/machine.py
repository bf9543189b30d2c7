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


def cpu_quota() -> float | None:
    """How many CPUs the control group allows, or None when it sets no quota (cgroup v2, then v1)."""
    for folder in _cgroup_folders():
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                return int(quota) / int(period)
        except (OSError, ValueError):
            continue
    try:
        base = Path("/sys/fs/cgroup/cpu")
        quota_us = int((base / "cpu.cfs_quota_us").read_text())
        return quota_us / int((base / "cpu.cfs_period_us").read_text()) if quota_us > 0 else None
    except (OSError, ValueError):
        return None


def _cgroup_folders() -> Iterable[Path]:
    base = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return [base]
    own = next((line.split("::", 1)[1] for line in lines if line.startswith("0::")), "/")
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
