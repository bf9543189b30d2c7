"""ONNX files in and out: checked on the way in, and written anew, whole and the same every time, on the way out."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from modelops import errors
from modelops.graphs import lean as lean_files
from modelops.graphs import normalise, tensors
from modelops.graphs.lean import ExternalFile, Lean, Span
from modelops.graphs.safety import check_parsed

if TYPE_CHECKING:
    import onnx
    import onnx_ir

#: Models with more bytes of weights than this keep them in a second file; smaller ones are one file.
EXTERNAL_ABOVE: Final = 256 * 1024 * 1024
#: Weights below this stay in the .onnx file, where shape inference finds them.
_LEAST_EXTERNAL: Final = 1024
#: Constants inside nodes go to the second file only when they are large: fewer tools read them from there.
_LEAST_EXTERNAL_CONSTANT: Final = 1024 * 1024
#: Larger weights start at a page, so that a runtime can map them.
_PAGE: Final = 4096
_LEAST_ALIGNED: Final = 64 * 1024


def rewrite(source: Path, target: Path, *, external_above: int = EXTERNAL_ABOVE) -> list[str]:
    """Check a model, normalise it, and write it to ``target``; what was changed, in words.

    This is how a model gets in: other tools are only ever given the copy. Nothing is read twice, so that what is
    written is what was checked. Raises InputRefused for a file that may not get in.
    """
    with lean_files.opened(source) as lean:
        notes = normalise.normalise(lean, check_parsed(lean))
        write(lean, target, external_above=external_above)
    return notes


def copied(source: Path, folder: Path) -> Path:
    """A copy of a model's files into a new folder, as they came; gives the path of the graph.

    It is checked first, and to be checked again where it is used, since files can change while they are copied. Of
    external data only what the model speaks of is copied. Raises InputRefused for a file that may not get in.
    """
    folder.mkdir()
    with lean_files.opened(source) as lean:
        check_parsed(lean)
        ends: dict[ExternalFile, int] = {}
        for place in tensors.tensors(lean.proto):
            span = lean.span(place.tensor)
            if span and isinstance(span.file, ExternalFile):
                ends[span.file] = max(ends.get(span.file, 0), span.offset + span.length)
        try:
            for file, end in ends.items():
                (folder / file.location).parent.mkdir(parents=True, exist_ok=True)
                with (folder / file.location).open("xb") as out:
                    Span(file, 0, end).copy(out)
            shutil.copyfile(source, folder / source.name)
        except OSError as error:
            raise errors.from_os_error(error, f"copying {source}") from error
    return folder / source.name


def size_of(model: Path) -> int:
    """Bytes of a graph and its external data."""
    data = model.with_name(f"{model.name}.data")
    return model.stat().st_size + (data.stat().st_size if data.is_file() else 0)


def load(path: Path) -> onnx_ir.Model:
    """The model in an .onnx file, checked first; weights that lie in a file stay there until they are used.

    Sparse weights become dense. Raises InputRefused for a file that may not get in, StageFailed for one that onnx_ir
    can't represent (maps, sparse attributes).
    """
    import onnx_ir

    with lean_files.opened(path) as lean:
        normalise.rank_outputs(lean.proto, check_parsed(lean))
        normalise.dense(lean)
        for place in tensors.tensors(lean.proto):
            span = lean.span(place.tensor)
            if span and place.role == "initializer" and isinstance(span.file, ExternalFile):
                _refer(place.tensor, span.file.location, span.offset, span.length)
            elif span and place.role == "initializer" and _is_plain(path):
                _refer(place.tensor, path.name, span.offset, span.length)
            else:
                _inline(place.tensor, lean)
        with errors.tool("onnx_ir", hint="simplify the model's inputs, outputs and attributes to plain tensors"):
            model = onnx_ir.serde.deserialize_model(lean.proto)
            onnx_ir.external_data.set_base_dir(model.graph, path.absolute().parent)
    return model


def load_proto(path: Path) -> onnx.ModelProto:
    """The model in an .onnx file as one message with all its weights, checked first.

    Raises InputRefused for a file that may not get in, ResourceExhausted when it would not fit into one message.
    """
    with lean_files.opened(path) as lean:
        check_parsed(lean)
        _refuse_large(_weight_bytes(lean.proto), path)
        for place in tensors.tensors(lean.proto):
            _inline(place.tensor, lean)
    return lean.proto


def save(model: onnx_ir.Model, path: Path, *, external_above: int = EXTERNAL_ABOVE) -> None:
    """Write a model to ``path``, and its weights to ``<path>.data`` when they take more than ``external_above`` bytes.

    Both files are new and replace what was there once they are complete; tensors that this or another model reads from
    the old ones must not be used any more. The same model gives the same bytes wherever it is written. Weights are
    copied one at a time. Raises ResourceExhausted when the disk is full.
    """
    import onnx_ir

    with errors.tool("onnx_ir", hint="the graph is not well formed"), _placeholders(model) as weights:
        proto = onnx_ir.serde.serialize_model(model)
    lean = Lean(path, proto, {})
    for place in tensors.tensors(proto):
        for entry in place.tensor.external_data:
            if entry.key == "location" and entry.value in weights:
                token = entry.value.encode()
                lean.spans[token] = weights[entry.value]
                place.tensor.raw_data = token
                place.tensor.ClearField("data_location")
                place.tensor.ClearField("external_data")
                break
    normalise.normalise(lean)
    write(lean, path, external_above=external_above)


@dataclass(frozen=True)
class _Weight(Span):
    """A tensor of onnx_ir, read like a span of a file."""

    tensor: Any = None

    def chunks(self) -> Iterator[bytes]:
        if self.length:  # onnx_ir can't read an empty tensor from a file
            yield self.tensor.tobytes()

    def copy(self, out: BinaryIO) -> None:
        if self.length:
            self.tensor.tofile(out)


@contextlib.contextmanager
def _placeholders(model: onnx_ir.Model) -> Iterator[dict[str, _Weight]]:
    """A model whose large weights are references, for as long as the block lasts: to the tensors that are yielded."""
    import onnx_ir

    nonce, weights, held = secrets.token_hex(16), {}, []
    _load_attributes(model)
    try:
        for graph in model.graphs():
            for value in graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.dtype == onnx_ir.DataType.STRING:
                    continue
                external = isinstance(tensor, onnx_ir.ExternalTensor)
                if tensor.nbytes < _LEAST_EXTERNAL and not external:
                    continue
                key = f"{nonce}-{id(tensor)}"
                weights[key] = _Weight(_Unopened(key), 0, tensor.nbytes, tensor)
                held.append((value, tensor))
                value.const_value = onnx_ir.ExternalTensor(
                    key, 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=value.name or "",
                    doc_string=tensor.doc_string, metadata_props=dict(tensor.metadata_props),
                )  # fmt: skip
        yield weights
    finally:
        for value, tensor in held:
            value.const_value = tensor


def _load_attributes(model: onnx_ir.Model) -> None:
    """Read tensors of attributes into memory, where they lie in a file: a reference would not outlive the file."""
    import onnx_ir

    bodies = [model.graph, *model.functions.values()]
    for node in (node for body in bodies for node in body.all_nodes()):
        for name, attribute in list(node.attributes.items()):
            if attribute.is_ref() or attribute.type != onnx_ir.AttributeType.TENSOR:
                continue
            if isinstance(attribute.value, onnx_ir.ExternalTensor):
                tensor = attribute.value
                loaded = onnx_ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)
                node.attributes[name] = onnx_ir.AttrTensor(name, loaded)


@dataclass(frozen=True)
class _Unopened:
    """Stands for the file of a weight that is in memory."""

    key: str

    def descriptor(self) -> int:
        raise AssertionError(f"{self.key} is not a file")


def write(lean: Lean, path: Path, *, external_above: int = EXTERNAL_ABOVE) -> None:
    """Write a parsed model, whose weights are copied from wherever they lie; the message is changed on the way.

    Raises ResourceExhausted when the disk is full or the message too large.
    """
    data_path = path.with_name(f"{path.name}.data")
    external = _weight_bytes(lean.proto) > external_above
    try:
        with _new(data_path) as data, _new(path) as main:
            wrote = external and _externalise(lean, data_path.name, data)
            if not external:
                for place in tensors.tensors(lean.proto):
                    _inline(place.tensor, lean)
            _refuse_large(_inline_bytes(lean.proto), path)
            main.write(lean.proto.SerializeToString(deterministic=True))
            main.flush()
            data.flush()
            if wrote:
                os.replace(data.name, data_path)
            else:
                data_path.unlink(missing_ok=True)
            os.replace(main.name, path)
    except OSError as error:
        raise errors.from_os_error(error, f"writing {path}") from error


@contextlib.contextmanager
def _new(path: Path) -> Iterator[BinaryIO]:
    """A new hidden file beside ``path``, gone at the end of the block unless it was moved."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            yield file
    finally:
        temporary.unlink(missing_ok=True)


def _externalise(lean: Lean, name: str, data: BinaryIO) -> bool:
    """Copy the weights to the data file and leave references to them; whether there were any."""
    written: dict[object, int] = {}  # tied weights are written once
    end = 0
    for place in tensors.tensors(lean.proto):
        tensor, size = place.tensor, tensors.tensor_bytes(place.tensor)
        least = {"initializer": _LEAST_EXTERNAL, "attribute": _LEAST_EXTERNAL_CONSTANT}.get(place.role)
        if least is None or size < least or tensor.data_type == tensors.STRING:
            _inline(tensor, lean)
            continue
        span = lean.span(tensor)
        identity = (span.file, span.offset, span.length) if span else None
        offset = written.get(identity) if identity else None
        if offset is None:
            offset = -(-end // _PAGE) * _PAGE if size >= _LEAST_ALIGNED else end
            data.write(bytes(offset - end))
            if span:
                span.copy(data)
            else:
                data.write(lean.packed(tensor))
            end = offset + size
            if identity:
                written[identity] = offset
        _refer(tensor, name, offset, size)
    return end > 0


def _refer(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Make the tensor a reference to external data."""
    for field in (*tensors.TYPED_FIELDS, "raw_data", "external_data"):
        tensor.ClearField(field)
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    tensor.data_location = tensors.EXTERNAL


def _inline(tensor: onnx.TensorProto, lean: Lean) -> None:
    """Put the elements of a tensor into the message."""
    span = lean.span(tensor)
    if span:
        tensor.raw_data = span.read()
        tensor.ClearField("data_location")
        tensor.ClearField("external_data")


def _is_plain(path: Path) -> bool:
    """Whether the model's own file may be read again by name: onnx_ir follows no links."""
    return not path.is_symlink() and path.stat().st_nlink == 1


def _weight_bytes(model: onnx.ModelProto) -> int:
    return sum(tensors.tensor_bytes(place.tensor) for place in tensors.tensors(model))


def _inline_bytes(model: onnx.ModelProto) -> int:
    """The size of the message as far as tensors make it."""
    places = tensors.tensors(model)
    return sum(tensors.tensor_bytes(place.tensor) for place in places if place.tensor.data_location != tensors.EXTERNAL)


def _refuse_large(size: int, path: Path) -> None:
    if size > lean_files.LARGEST_MESSAGE - 64 * 1024 * 1024:  # the rest is for nodes and names
        raise errors.ResourceExhausted(
            f"{path}: {size:,} bytes of weights do not fit into one protobuf message",
            hint="keep the weights in external data",
        )
