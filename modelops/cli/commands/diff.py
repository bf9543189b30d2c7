"""Show what changed between two artifacts: nodes, size, options and metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from modelops.cli.options import COMMON, argument, shaped, shell_from
from modelops.cli.shell import plain
from modelops.core.artifact import Artifact
from modelops.core.wording import size_text
from modelops.errors import ModelOpsError
from modelops.pipeline import opened
from modelops.renderers._common import figure

_DOC = """Show what changed from artifact A to artifact B: nodes by type, size, signature, options and metrics."""


def command() -> Callable[..., int]:
    """The function that Typer turns into ``modelops diff``."""
    shared = [item for name, item in COMMON.items() if name not in ("force", "advisory", "report")]
    places = [argument("a", "A", "An artifact, or an .onnx file."), argument("b", "B", "The one to compare it with.")]
    return shaped(_body, "diff", _DOC, [*places, *shared])


def _body(values: dict[str, Any]) -> int:
    shell = shell_from("diff", values)
    try:
        with (
            shell.surroundings() as surroundings,
            opened(values["a"], surroundings, evidence=True) as a,
            opened(values["b"], surroundings, evidence=True) as b,
        ):
            found = changes(a, b)
            return shell.show_value(found, "\n".join(_lines(found)) or "no difference")
    except ModelOpsError as error:
        return shell.fail(error)


def changes(a: Artifact, b: Artifact) -> dict[str, Any]:
    """What differs, as the JSON document of this command: every entry is [in A, in B]."""
    first, second = a.manifest, b.manifest
    return {
        "schema": "modelops.diff/1",
        "identical": a.id == b.id,
        "id": [a.id, b.id],
        "size": [a.size, b.size],
        "nodes": [first.model.get("nodes"), second.model.get("nodes")],
        "parameters": [first.model.get("parameters"), second.model.get("parameters")],
        "operators": _differing(first.model.get("operators", {}), second.model.get("operators", {})),
        "weight_bytes": _differing(first.model.get("weight_bytes", {}), second.model.get("weight_bytes", {})),
        "opsets": _differing(first.model.get("opsets", {}), second.model.get("opsets", {})),
        "signature": _differing(_signature(a), _signature(b)),
        "files": _differing(_files(a), _files(b)),
        "options": _differing(_options(a), _options(b)),
        "metrics": _differing(_metrics(a), _metrics(b)),
        "units": {**_units(a), **_units(b)},
        "libraries": _differing(first.environment.get("libraries", {}), second.environment.get("libraries", {})),
    }


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Any]]:
    names = [*first, *(name for name in second if name not in first)]
    return {name: [first.get(name), second.get(name)] for name in names if first.get(name) != second.get(name)}


def _signature(artifact: Artifact) -> dict[str, str]:
    if not artifact.manifest.graphs:
        return {}
    signature = artifact.signature
    return {
        **{f"in {spec.name}": str(spec) for spec in signature.inputs},
        **{f"out {spec.name}": str(spec) for spec in signature.outputs},
    }


def _files(artifact: Artifact) -> dict[str, str]:
    return {file.path: f"{file.size} bytes, {file.sha256[:16]}" for file in artifact.manifest.files}


def _options(artifact: Artifact) -> dict[str, Any]:
    return {
        f"{number}-{step.stage}.{name}": value
        for number, step in enumerate(artifact.manifest.history, 1)
        for name, value in step.options.items()
    }


def _metrics(artifact: Artifact) -> dict[str, Any]:
    return {
        f"{number}-{step.stage}.{metric.name}": metric.value
        for number, step in enumerate(artifact.manifest.history, 1)
        for metric in step.report.metrics
    }


def _units(artifact: Artifact) -> dict[str, str]:
    return {
        f"{number}-{step.stage}.{metric.name}": metric.unit
        for number, step in enumerate(artifact.manifest.history, 1)
        for metric in step.report.metrics
        if metric.unit
    }


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    if found["identical"]:
        yield f"the same model: id {found['id'][0][:16]}"
    first, second = found["size"]
    if first != second:
        yield f"size: {size_text(first)} → {size_text(second)}{f' ({second / first:.2f}x)' if first else ''}"
    for name in ("nodes", "parameters"):
        first, second = found[name]
        if first != second:
            yield f"{name}: {first} → {second}"
    for name in ("operators", "weight_bytes", "opsets", "signature", "files", "options", "metrics", "libraries"):
        if found[name]:
            yield name.replace("_", " ")
            units = {"metrics": found["units"]}.get(name, {})
            for key, (before, after) in found[name].items():
                unit = units.get(key, "bytes" if name == "weight_bytes" else "")
                texts = _text(before, unit), _text(after, unit)
                if texts[0] == texts[1]:  # rounded alike: the digits tell what changed
                    texts = _text(before, ""), _text(after, "")
                yield f"  {plain(str(key))}: {texts[0]} → {texts[1]}"


def _text(value: Any, unit: str) -> str:
    if value is None:
        return "absent"
    return plain(figure(value, unit) if unit else f"{value:.6g}" if isinstance(value, float) else str(value))
