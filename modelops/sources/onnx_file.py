"""ONNX files: a model that is converted already, to be checked and rewritten safely."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from modelops.errors import InputRefused, missing_path
from modelops.sources import Loaded, Request, Source


class OnnxFile(Source):
    """An .onnx file, with its external data beside it."""

    framework = "onnx"

    @classmethod
    def reads(cls, spec: str) -> bool:
        return spec.endswith(".onnx")

    def inputs(self, spec: str) -> Mapping[str, Path]:
        from modelops.graphs import lean, tensors

        path = _path(spec)
        with lean.opened(path) as model:
            files = {
                span.file.location
                for place in tensors.tensors(model.proto)
                if place.tensor.data_location == tensors.EXTERNAL
                and isinstance((span := lean.external_span(path.parent, place.tensor)).file, lean.ExternalFile)
            }
        return {"source": path} | {f"source data {name}": path.parent / name for name in sorted(files)}

    def open(self, spec: str, request: Request) -> Loaded:
        del request
        return Loaded(onnx=_path(spec))


def _path(spec: str) -> Path:
    path = Path(spec)
    if not path.exists():
        raise missing_path("model", path)
    if not path.is_file():
        raise InputRefused(f"{path} is not a file", hint="give an .onnx file")
    return path
