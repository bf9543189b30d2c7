"""modelops takes a trained model to production: export, simplify, quantize, prune, validate, benchmark.

The layers, each of which may import only those below it::

    cli | testing   the commands, and what authors of plugins call
    pipeline        the only place that drafts, times, hashes and records
    recipe          ordered stages from a TOML file
    stages          the verbs, one file per command
    the kinds       sources datasets simplifiers quantizers pruners backends renderers
    measures        differences between outputs, task metrics, latency statistics, verdicts
    graphs          ONNX files: safe loading and saving, signatures, summaries
    core            artifacts, manifests, reports, components, registries, workers
    errors          every failure, with its exit code
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Artifact": "modelops.core.artifact",
    "Manifest": "modelops.core.manifest",
    "Report": "modelops.core.report",
    "Check": "modelops.core.report",
    "Metric": "modelops.core.report",
    "Signature": "modelops.core.tensors",
    "TensorSpec": "modelops.core.tensors",
    "ModelOpsError": "modelops.errors",
    "run_stage": "modelops.pipeline",
    "run_recipe": "modelops.pipeline",
}

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604 - the names are loaded on first use


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'modelops' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)
