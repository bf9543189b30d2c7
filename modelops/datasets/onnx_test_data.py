"""ONNX test data: folders test_data_set_0, test_data_set_1 … with a tensor per input in input_0.pb, input_1.pb …"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modelops.datasets import Context, Dataset, Sample
from modelops.errors import InputRefused, from_os_error
from modelops.graphs import tensors

_HINT = "write it with onnx.numpy_helper.from_array(...).SerializeToString()"


class OnnxTestData(Dataset):
    """A folder of ONNX test data: test_data_set_0/input_0.pb and so on, or one such set."""

    @classmethod
    def reads(cls, path: Path) -> bool:
        return path.is_dir() and bool(_sets(path))

    def samples(self, path: Path, context: Context, limit: int | None = None) -> Iterator[Sample]:
        folders = _sets(path)
        if not folders:
            raise InputRefused(f"{path} holds no test_data_set_* folders", hint="each holds input_0.pb, input_1.pb …")
        names = [spec.name for spec in context.signature.inputs]
        for folder in folders[:limit]:
            yield Sample(_feed(folder, names), key=str(folder))


def _sets(path: Path) -> list[Path]:
    if (path / "input_0.pb").is_file():
        return [path]
    return _numbered(path.glob("test_data_set_*"))


def _numbered(paths: Any) -> list[Path]:
    """The paths in the order of the number that they end with."""
    found = ((re.search(r"(\d+)$", path.stem), path) for path in paths)
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def _feed(folder: Path, names: list[str]) -> dict[str, Any]:
    feed: dict[str, Any] = {}
    for number, file in enumerate(_numbered(folder.glob("input_*.pb"))):
        tensor = _tensor(file)
        # Files are in the order of the graph's inputs; a name inside, where it is one, says more.
        name = tensor.name if tensor.name in names else names[number] if number < len(names) else file.stem
        if name in feed:
            raise InputRefused(f"{file}: a second tensor for the input {name!r}", hint="give one file per input")
        feed[name] = _array(tensor, file)
    return feed


def _tensor(file: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        tensor = onnx.TensorProto.FromString(file.read_bytes())
    except OSError as error:
        raise from_os_error(error, f"reading {file}") from error
    except DecodeError as error:
        raise InputRefused(f"{file} holds no tensor, or was cut short", hint=_HINT) from error
    return tensor


def _array(tensor: Any, file: Path) -> Any:
    from onnx import numpy_helper

    if tensor.data_location == tensors.EXTERNAL:
        raise InputRefused(f"{file} points to external data", hint=_HINT)
    if tensor.data_type not in tensors.TYPES:
        raise InputRefused(f"{file} has no known element type; sequences can't be read", hint=_HINT)
    if any(dim < 0 for dim in tensor.dims):
        raise InputRefused(f"{file} has a negative dimension", hint=_HINT)
    if problem := tensors.missing_elements(tensor, len(tensor.raw_data)):
        raise InputRefused(f"{file} {problem}", hint=_HINT)
    array = numpy_helper.to_array(tensor)
    return array.astype(str) if tensor.data_type == tensors.STRING else array
