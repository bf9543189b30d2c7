"""Models as artifacts: an artifact directory is opened, a bare .onnx file is rewritten safely and wrapped."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from modelops import __version__
from modelops.core import cache
from modelops.core.artifact import Artifact, drafting
from modelops.core.manifest import Manifest
from modelops.errors import InputRefused, missing_path


def open_model(path: Path, scratch: Path) -> Artifact:
    """The artifact at ``path``; a bare .onnx file is checked, rewritten and wrapped below ``scratch`` first.

    InputRefused for evidence (it holds no model), for a hostile or broken file, and for anything else.
    """
    if path.is_dir() or not path.exists():
        if not path.exists():
            raise missing_path("artifact or .onnx file", path)
        return admitted(Artifact.open(path))
    if path.suffix != ".onnx":
        raise not_a_model(path)
    return wrap(path, scratch / f"wrapped-{uuid.uuid4().hex[:8]}")


def not_a_model(path: Path) -> InputRefused:
    """The error for a file that is neither an artifact nor an .onnx file, with the way to make it one."""
    hint = "give an artifact directory or an .onnx file"
    if path.suffix == ".py":
        hint = f"convert it first: modelops convert {path}:FUNCTION OUT"
    elif path.suffix in (".pt2", ".pt", ".pth", ".skops", ".joblib"):
        hint = f"convert it first: modelops convert {path} OUT"
    return InputRefused(f"{path} is neither an artifact directory nor an .onnx file", hint=hint)


def admitted(artifact: Artifact) -> Artifact:
    """The artifact, once its model has passed the check that a bare file passes; InputRefused for evidence too.

    A manifest proves that nothing was changed since it was written, not that who wrote it meant well. What was let in
    is remembered by its id.
    """
    from modelops.graphs.safety import check

    model, key = artifact.model, f"{__version__}:{artifact.id}"
    if cache.get("admitted", key) is not True:
        check(model)
        cache.put("admitted", key, True)
    return artifact


def wrap(path: Path, target: Path) -> Artifact:
    """A bare .onnx file as an artifact without history."""
    from modelops.graphs.files import rewrite

    with drafting(target) as publication:
        rewrite(path, publication.draft.file("model.onnx"))
        graphs, model = describe(publication.draft.path)
        manifest = Manifest(kind="model", files=publication.files(), graphs=graphs, created="", model=model)
        return publication.publish(manifest)


def describe(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ``graphs`` and ``model`` parts of the manifest for the model in this folder."""
    from modelops.graphs.describe import signature, summary

    model = folder / "model.onnx"
    return {"model": {"file": "model.onnx", "signature": signature(model).to_dict()}}, summary(model)
