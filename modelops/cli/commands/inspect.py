"""Show what an artifact is: signature, operators, weights, history and checks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import typer

from modelops.cli.options import COMMON, argument, shaped, shell_from
from modelops.cli.shell import plain
from modelops.core.artifact import Artifact
from modelops.core.manifest import Step
from modelops.core.wording import size_text
from modelops.errors import ModelOpsError
from modelops.pipeline import opened

_DOC = """Show what an artifact is: signature, operators, weight bytes by dtype, history and checks.

Sizes and digests are checked on the way; --verify reads every byte again, whatever the cache remembers.
"""


def command() -> Callable[..., int]:
    """The function that Typer turns into ``modelops inspect``."""
    info = typer.Option("--verify", help="Hash every file again.")
    verify = inspect.Parameter(
        "verify", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, info]
    )
    shared = [item for name, item in COMMON.items() if name not in ("force", "advisory", "report")]
    return shaped(
        _body, "inspect", _DOC, [argument("artifact", "ARTIFACT", "An artifact, or an .onnx file."), verify, *shared]
    )


def _body(values: dict[str, Any]) -> int:
    shell = shell_from("inspect", values)
    try:
        with shell.surroundings() as surroundings, opened(values["artifact"], surroundings, evidence=True) as artifact:
            if values["verify"]:
                artifact.verify(remembered=False)
            return shell.show_value(
                facts(artifact), "\n".join(_lines(artifact, str(values["artifact"]), values["verify"]))
            )
    except ModelOpsError as error:
        return shell.fail(error)


def facts(artifact: Artifact) -> dict[str, Any]:
    """Everything that the manifest says, as the JSON document of this command."""
    manifest = artifact.manifest
    return {
        "schema": "modelops.inspect/1",
        "path": str(artifact.path),
        "id": artifact.id,
        "kind": manifest.kind,
        "created": manifest.created,
        "files": [file.to_dict() for file in manifest.files],
        "graphs": dict(manifest.graphs),
        "model": dict(manifest.model),
        "history": [step.to_dict() for step in manifest.history],
        "environment": dict(manifest.environment),
        "code_executed": list(manifest.code_executed),
        "parents": list(manifest.parents),
        "measured": dict(manifest.measured),
    }


def _lines(artifact: Artifact, name: str, verified: bool) -> Iterator[str]:
    manifest = artifact.manifest
    yield f"{plain(name)}: {manifest.kind} artifact {artifact.id[:16]}, made {manifest.created or 'on the fly'}"
    yield f"files: {'all digests hold, every byte read again' if verified else 'sizes and digests hold'}"
    for file in manifest.files:
        yield f"  {plain(file.path):<28} {size_text(file.size):>10}  {file.role:<14} {file.sha256[:16]}"
    if manifest.graphs:
        yield "signature"
        for label, specs in (("in", artifact.signature.inputs), ("out", artifact.signature.outputs)):
            for spec in specs:
                yield f"  {label:<4}{plain(str(spec))}"
        yield from _model(manifest.model)
    for number, step in enumerate(manifest.history, 1):
        yield from _step(number, step)
    for entry in manifest.code_executed:
        yield f"code executed: {plain(str(entry['path']))} ({str(entry['sha256'])[:16]})"


def _model(model: Any) -> Iterator[str]:
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in model["opsets"].items())
    yield f"model: {model['nodes']} nodes, {model['parameters']:,} parameters, opset {opsets}"
    yield f"  made by: {plain(str(model['producer']))}"
    operators = sorted(model["operators"].items(), key=lambda entry: (-entry[1], entry[0]))
    yield (
        "  operators: "
        + ", ".join(f"{plain(op)} {count}" for op, count in operators[:12])
        + (" …" if len(operators) > 12 else "")
    )
    yield "  weights: " + ", ".join(f"{dtype} {size_text(count)}" for dtype, count in model["weight_bytes"].items())
    if model["custom_domains"]:
        yield f"  needs operators of: {plain(', '.join(model['custom_domains']))}"


def _step(number: int, step: Step) -> Iterator[str]:
    memory = f", {size_text(step.peak_memory_bytes)} at most" if step.peak_memory_bytes else ""
    yield f"step {number}: {step.stage} ({step.report.verdict}, {step.seconds:.1f} s{memory})"
    yield f"  options: {plain(', '.join(_given(step.options)))}"
    for check in step.report.checks:
        yield f"  {check.verdict:<13} {plain(check.name)}: {plain(check.message)}"


def _given(options: Mapping[str, Any]) -> list[str]:
    """The options that have a value; one that is left to the stage says nothing."""
    return [f"{name}={_short(value)}" for name, value in options.items() if value is not None and value != []]


def _short(value: Any) -> str:
    if isinstance(value, dict):
        inner = ", ".join(_given({key: entry for key, entry in value.items() if key != "name"}))
        return f"{value.get('name', '')}({inner})" if inner else str(value.get("name", ""))
    return str(value)
