"""Show what this machine offers: CPU features, limits, backends, versions, and what is missing."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from modelops import __version__
from modelops.cli.options import COMMON, Flag, parameter, shaped, shell_from
from modelops.core import cache, machine, worker
from modelops.core.component import Component, option, options_of
from modelops.core.extras import pip_hint
from modelops.core.wording import size_text
from modelops.errors import ModelOpsError

_DOC = """Show what this machine offers: CPU features that matter, cores and limits, backends, versions.

What is missing is shown with the command that installs it. Always exits with 0: it judges nothing.
"""


def command() -> Callable[..., int]:
    """The function that Typer turns into ``modelops doctor``."""
    shared = [item for name, item in COMMON.items() if name not in ("force", "advisory", "report")]
    return shaped(
        _body, "doctor", _DOC, [*(parameter(Flag(item.name, item)) for item in options_of(Measuring)), *shared]
    )


class Measuring(Component):
    """What doctor measures, beyond looking."""

    peak: bool = option(default=False, help="Measure what this machine can do at most, and remember it for bench.")


def _body(values: dict[str, Any]) -> int:
    shell = shell_from("doctor", values)
    try:
        found = facts()
        found["peak"] = _peak(worker.Limits(shell.time_limit, shell.memory_limit), measure=bool(values.get("peak")))
        return shell.show_value(found, "\n".join(_lines(found)))
    except ModelOpsError as error:
        return shell.fail(error)


def facts() -> dict[str, Any]:
    """What was found, as the JSON document of this command."""
    features = machine.cpu_features()
    return {
        "schema": "modelops.doctor/1",
        "modelops": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {
            "model": machine.cpu_model(),
            "features": {label: name in features for name, label in machine.FEATURES.items()},
            "int8": "fast" if machine.has_vnni() else "slow",
            "host": os.cpu_count(),
            "usable": machine.usable_cpus(),
            "quota": machine.cpu_quota(),
        },
        "memory_bytes": machine.memory_bytes(),
        "cache": str(cache.root()),
        "backends": _backends(),
        "libraries": {name: machine.installed(name) for name in machine.LIBRARIES},
        "missing": _missing(),
        "warnings": _warnings(),
    }


def _peak(limits: worker.Limits, *, measure: bool) -> dict[str, Any] | None:
    """The machine's peaks: measured now, or those remembered; None where they were never measured."""
    from modelops.stages import _peak

    if not measure:
        return _peak.remembered()
    found: dict[str, Any] = worker.call(
        "modelops.stages._peak:measure", {}, limits=limits, what="measuring the peak"
    ).value
    return found


def _backends() -> dict[str, str]:
    """By name, why a backend can't be used; an empty string when it can."""
    from modelops.backends import REGISTRY

    found = {}
    for name in REGISTRY.names():
        try:
            cls = REGISTRY.load(name)
            if not cls.for_tests:
                found[name] = cls().missing()
        except ModelOpsError as error:
            found[name] = error.message
    return found


def _missing() -> dict[str, str]:
    """The optional packages that are not installed, with the command that brings them."""
    from importlib.util import find_spec

    wanted = (
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "PIL",
        "sklearn",
        "skl2onnx",
        "openvino",
        "matplotlib",
    )
    return {name: pip_hint([name]) for name in wanted if find_spec(name) is None}


def _warnings() -> list[str]:
    found = []
    if machine.installed("onnxruntime") and machine.installed("onnxruntime-gpu"):
        found.append(
            "onnxruntime and onnxruntime-gpu are both installed: they are one module and break each other; "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install the one you need"
        )
    if sys.platform == "darwin":
        found.append("macOS: workers have no memory limit here, and die less surely with their parent; Linux is tested")
    host = os.cpu_count() or 1
    if machine.usable_cpus() < host:
        found.append(f"this process may use {machine.usable_cpus()} of the host's {host} CPUs: threads follow that")
    if platform.machine() in ("x86_64", "AMD64") and not machine.has_vnni():
        found.append(
            "no VNNI: 8-bit kernels are slower and can saturate here; quantize reduces the range of weights by one bit"
        )
    return [*found, *_broken_plugins()]


def _broken_plugins() -> Iterator[str]:
    """What is wrong with installed plugins: other commands leave them out until they are asked for by name."""
    kinds = ("stages", "sources", "datasets", "simplifiers", "quantizers", "pruners", "backends", "renderers")
    for kind in kinds:
        registry = importlib.import_module(f"modelops.{kind}").REGISTRY
        for name in registry.plugins():
            try:
                registry.load(name)
            except ModelOpsError as error:
                yield f"{error.message}; {error.hint}" if error.hint else error.message


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    cpu = found["cpu"]
    yield f"modelops {found['modelops']}, Python {found['python']}, {found['platform']}"
    yield f"CPU: {cpu['model']}"
    yield "  " + ", ".join(f"{label} {'yes' if there else 'no'}" for label, there in cpu["features"].items())
    quota = f"{cpu['quota']:g} CPUs" if cpu["quota"] is not None else "none"
    yield f"  usable CPUs {cpu['usable']} of {cpu['host']}, control-group quota {quota}"
    if peak := found["peak"]:
        yield (
            f"peak on {peak['threads']} threads: float32 {peak['float32_gflops']:.0f} GFLOP/s, "
            + (f"bfloat16 {peak['bfloat16_gflops']:.0f} GFLOP/s, " if peak.get("bfloat16_gflops") else "")
            + f"int8 {peak['int8_gops']:.0f} Gop/s, memory {peak['bandwidth_gb_per_s']:.1f} GB/s"
        )
        if (peak.get("busy") or 0.0) > 0.25:
            yield f"  other work used {peak['busy']:.0%} of the CPUs meanwhile: measure it again on a quiet machine"
    yield f"memory: {size_text(found['memory_bytes'])}"
    yield f"cache: {found['cache']}"
    yield "backends"
    for name, reason in found["backends"].items():
        yield f"  {name:<18} {'ready' if not reason else 'not here: ' + reason}"
    yield "libraries"
    for name, version in found["libraries"].items():
        yield f"  {name:<18} {version or 'not installed'}"
    for name, hint in found["missing"].items():
        yield f"missing: {name}: {hint}"
    for warning in found["warnings"]:
        yield f"warning: {warning}"
