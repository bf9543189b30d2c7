"""An ONNX file as a small message whose weights stay on disk, reached only through files opened without trust.

Everything in ``modelops.graphs`` reads models through :func:`opened`: the weights of a large file are spans, read when
somebody needs them, and external data is opened component by component without following a link.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, Protocol

from modelops import errors
from modelops.graphs import tensors, wire

if TYPE_CHECKING:
    import onnx

#: The largest message that protobuf reads or writes.
LARGEST_MESSAGE: Final = 2**31 - 1
#: Files below this size are parsed whole.
_SMALL_FILE: Final = 8 * 1024 * 1024
_CHUNK: Final = 8 * 1024 * 1024
#: Why a kernel may decline to copy between two files.
_NO_COPY: Final = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF})
_KEYS: Final = frozenset({"location", "offset", "length", "checksum"})
#: How onnxruntime marks a tensor that lies at an address of its own process.
MEMORY_MARKER: Final = "_ORT_MEM_ADDR_"


class Refusal(ValueError):
    """Why a part of a file is not accepted; the reader of the file adds the file's name."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint or "the file is damaged or hostile: export the model again, or get it from a source you trust"


class DataFile(Protocol):
    """A file that can be opened for reading again and again; the caller closes the descriptor."""

    def descriptor(self) -> int: ...


@dataclass(frozen=True)
class HeldFile:
    """A file that is already open."""

    held: int

    def descriptor(self) -> int:
        return os.dup(self.held)


@dataclass(frozen=True)
class ExternalFile:
    """A file beside a model, opened anew, and checked anew, each time."""

    directory: Path
    location: str

    def descriptor(self) -> int:
        return open_beneath(self.directory, self.location)


@dataclass(frozen=True)
class Span:
    """Bytes of a file that are the elements of a tensor."""

    file: DataFile
    offset: int
    length: int

    def read(self) -> bytes:
        return b"".join(self.chunks())

    def chunks(self) -> Iterator[bytes]:
        """The bytes, a few MiB at a time."""
        descriptor = self.file.descriptor()
        try:
            position, end = self.offset, self.offset + self.length
            while position < end:
                chunk = os.pread(descriptor, min(_CHUNK, end - position), position)
                if not chunk:
                    raise Refusal(f"external data ends {end - position} bytes too early")
                position += len(chunk)
                yield chunk
        finally:
            os.close(descriptor)

    def copy(self, out: BinaryIO) -> None:
        """Append the bytes to a file; where the file system can, without carrying them through memory."""
        out.flush()
        descriptor, done = self.file.descriptor(), 0
        try:
            while done < self.length:
                copied = os.copy_file_range(descriptor, out.fileno(), self.length - done, self.offset + done)
                done += copied
                if not copied:
                    break
        except OSError as error:
            if error.errno not in _NO_COPY:
                raise
        finally:
            os.close(descriptor)
        out.seek(0, os.SEEK_END)
        for chunk in Span(self.file, self.offset + done, self.length - done).chunks():
            out.write(chunk)


@dataclass
class Lean:
    """A parsed model; where ``raw_data`` of a tensor is a key of ``spans``, the bytes are still in the file."""

    path: Path
    proto: onnx.ModelProto
    spans: dict[bytes, Span]

    def raw_length(self, tensor: onnx.TensorProto) -> int:
        """The length of the tensor's ``raw_data`` in the file."""
        raw: bytes = tensor.raw_data
        return self.spans[raw].length if raw in self.spans else len(raw)

    def span(self, tensor: onnx.TensorProto) -> Span | None:
        """The bytes of a tensor that lie in a file; None when they are in memory.

        Raises Refusal where external data is not described as it should be, or its file is not to be opened.
        """
        if tensor.data_location == tensors.EXTERNAL:
            return external_span(self.path.parent, tensor)
        return self.spans.get(tensor.raw_data)

    def packed(self, tensor: onnx.TensorProto) -> bytes:
        """The elements of a tensor of any sort but strings, packed as ``raw_data``."""
        if span := self.span(tensor):
            return span.read()
        if not any(len(getattr(tensor, field)) for field in tensors.TYPED_FIELDS):
            return bytes(tensor.raw_data)
        import onnx_ir

        return bytes(onnx_ir.serde.TensorProtoTensor(tensor).tobytes())


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Lean]:
    """The model in a file; its spans can be read until the block ends.

    Raises InputRefused for a file that is missing, empty, no regular file, too large for protobuf, no ONNX model,
    or not UTF-8, and for any Refusal inside the block, with the file's name in front.
    """
    try:
        descriptor = _open_model(path)
    except OSError as error:
        raise errors.from_os_error(error, f"reading {path}") from error
    try:
        proto, spans = _parse(path, descriptor)
        if where := tensors.garbled(proto):
            raise Refusal(f"a name or text in {where} is not UTF-8")
        held = HeldFile(descriptor)
        yield Lean(path, proto, {token: Span(held, *place) for token, place in spans.items()})
    except Refusal as refusal:
        raise errors.InputRefused(f"{path}: {refusal.reason}", hint=refusal.hint) from refusal
    finally:
        os.close(descriptor)


def _open_model(path: Path) -> int:
    # The user named this path, so links on the way to it are fine. O_NONBLOCK: a named pipe must not block.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    status = os.fstat(descriptor)
    problem, hint = "", "give the path of an .onnx file"
    if not stat.S_ISREG(status.st_mode):
        problem = "is not a regular file"
    elif status.st_size == 0:
        problem, hint = "is empty", "the file was cut short: export or download it again"
    elif status.st_size > LARGEST_MESSAGE:
        problem = f"has {status.st_size:,} bytes, and protobuf files end at {LARGEST_MESSAGE:,}"
        hint = "save the model with its weights as external data (onnx.save_model(..., save_as_external_data=True))"
    if problem:
        os.close(descriptor)
        raise errors.InputRefused(f"{path} {problem}", hint=hint)
    return descriptor


def _parse(path: Path, descriptor: int) -> tuple[onnx.ModelProto, dict[bytes, tuple[int, int]]]:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    spans: dict[bytes, tuple[int, int]] = {}
    try:
        size = os.fstat(descriptor).st_size
        if size < _SMALL_FILE:
            data = os.pread(descriptor, size, 0)
        else:
            # Closed when the last view of it goes, which after an error is later than here.
            mapped = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
            data, spans = wire.skeleton(memoryview(mapped))
        return onnx.ModelProto.FromString(data), spans
    except (DecodeError, wire.Malformed) as error:
        raise errors.InputRefused(
            f"{path} is not an ONNX model, or was cut short: {str(error).strip() or 'protobuf can not parse it'}",
            hint="check that it is an .onnx file, and export or download it again",
        ) from error


def external_span(directory: Path, tensor: onnx.TensorProto) -> Span:
    """Where the external data of a tensor lies; raises Refusal for anything but a plain range of a file beside it."""
    values = _entries(tensor)
    location = _location(values)
    offset, length = _number(values, "offset"), _number(values, "length")
    if tensor.data_type not in tensors.TYPES or tensor.data_type == tensors.STRING:
        raise Refusal(f"elements of type {tensors.dtype_name(tensor.data_type)} can't be external data")
    expected = tensors.tensor_bytes(tensor)
    if length is not None and length != expected:
        raise Refusal(f"external data is {length} bytes long where its shape needs {expected}")
    if len(tensor.raw_data) or any(len(getattr(tensor, field)) for field in tensors.TYPED_FIELDS):
        raise Refusal("elements are both external and in the file")
    return Span(ExternalFile(directory, location), offset or 0, expected)


def _entries(tensor: onnx.TensorProto) -> dict[str, str]:
    values: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key not in _KEYS:
            raise Refusal(f"external data has the unknown key {entry.key!r}")
        if entry.key in values:
            raise Refusal(f"external data gives {entry.key!r} twice")
        values[entry.key] = entry.value
    return values


def _location(values: dict[str, str]) -> str:
    location = values.get("location", "")
    problem = ""
    if not location:
        problem = "names no file"
    elif MEMORY_MARKER in location:
        problem = "is an address in memory"
    elif location.startswith(("/", "\\")) or location[1:2] == ":":
        problem = "is an absolute path"
    elif "\0" in location or "\\" in location:
        problem = "holds a NUL or a backslash"
    elif ".." in location.split("/"):
        problem = "leaves the model's directory"
    if problem:
        raise Refusal(f"external data location {location!r} {problem}")
    return location


def _number(values: dict[str, str], key: str) -> int | None:
    text = values.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise Refusal(f"external data {key} {text[:40]!r} is not a whole number of bytes")
    return int(text)


def open_beneath(directory: Path, location: str) -> int:
    """A descriptor of the regular file at ``location`` below ``directory``, reached without following any link.

    Raises Refusal for a link, a second hard link, a missing file, or anything that is no regular file.
    """
    parts = [part for part in location.split("/") if part not in ("", ".")]
    if not parts:
        raise Refusal(f"external data location {location!r} names no file")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        try:
            deeper = os.open(part, flags | (os.O_NONBLOCK if last else os.O_DIRECTORY), dir_fd=descriptor)
        except OSError as error:
            raise _why(error, descriptor, part, location) from error
        finally:
            os.close(descriptor)
        descriptor = deeper
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        os.close(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Refusal(f"external data file {location!r} is not a regular file")
        raise Refusal(
            f"external data file {location!r} has {status.st_nlink} hard links",
            hint="copy the model's directory so that every file is a file of its own (cp -rL)",
        )
    return descriptor


def _why(error: OSError, parent: int, part: str, location: str) -> Refusal:
    if error.errno == errno.ENOENT:
        return Refusal(
            f"external data file {location!r} is missing", hint="put the data file beside the model, where it was saved"
        )
    with contextlib.suppress(OSError):
        if stat.S_ISLNK(os.stat(part, dir_fd=parent, follow_symlinks=False).st_mode):
            return Refusal(
                f"external data file {location!r} is reached through the symbolic link {part!r}",
                hint="copy the model's directory so that links become files (cp -rL)",
            )
    return Refusal(f"external data file {location!r} can't be opened: {error.strerror or error}")
