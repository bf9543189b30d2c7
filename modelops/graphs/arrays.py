"""Arrays in .npy and .npz files, read without pickle, and never more than the file can hold or the limit allows.

A header of 80 bytes may claim terabytes, and half a megabyte of zip may hold half a gigabyte: what a header claims is
held against the size of the file before anything is allocated.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from modelops.errors import InputRefused, ResourceExhausted, StageFailed, from_os_error, missing_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Bytes of arrays that one .npz may hold; a folder of .npy files has no such limit, since it is read piece by piece.
LIMIT_BYTES: Final = 2 << 30
#: A compressed .npz that holds more than this, and grows more than so many times, is refused as a bomb.
_BOMB_BYTES: Final = 256 << 20
_BOMB_RATIO: Final = 200
_MEMBERS: Final = 4096
#: Arrays larger than this are left in their file where that is possible; so much of them is read at a time.
_LARGE: Final = 32 << 20
_BLOCK_BYTES: Final = 4 << 20
_PLAIN = "biufcUSV"  # kinds of elements that are plain bytes; V is how numpy stores bfloat16


def read_npz(path: Path, *, limit_bytes: int = LIMIT_BYTES, by_rows: bool = False) -> dict[str, Any]:
    """Every array of a .npz file, by name; ``by_rows`` leaves large ones in it as StoredRows, unless compressed.

    InputRefused names the member that is malformed, pickled or not what its header says; ResourceExhausted says that
    they take more than ``limit_bytes`` together. NaN is allowed.
    """
    _regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(path, archive, limit_bytes)
            return {
                name: (by_rows and _stored(path, archive, info, limit_bytes))
                or _read_member(path, archive, info, limit_bytes)
                for name, info in members.items()
            }
    # What zipfile and numpy raise for a file that is cut, has an unknown compression, name or header.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeError, ValueError) as error:
        raise InputRefused(f"{path} is not a whole .npz file: {error}", hint=_REWRITE) from error
    except OSError as error:
        raise from_os_error(error, f"reading {path}") from error


def read_npy(path: Path, *, limit_bytes: int | None = None, mapped: bool = False) -> Any:
    """The array of a .npy file.

    ``mapped`` leaves it in the file, so that only what is used is read; a large one comes as StoredRows. InputRefused
    says that it is malformed, pickled or cut short; ResourceExhausted that it takes more than ``limit_bytes``.
    """
    import numpy as np

    size = _regular(path)
    try:
        with open(path, "rb") as file:
            shape, fortran, dtype = _header(str(path), file, size, limit_bytes)
            offset = file.tell()
            if not mapped or math.prod(shape) == 0:
                file.seek(0)
                result: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
                return result
        if shape and not fortran and size > _LARGE:
            return StoredRows(path, offset, shape, dtype)
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape, order="F" if fortran else "C")
    except ValueError as error:
        raise InputRefused(f"{path} is not a whole .npy file: {error}", hint=_REWRITE) from error
    except OSError as error:
        raise from_os_error(error, f"reading {path}") from error


class StoredRows:
    """An array that stays in its file: a few megabytes of rows at a time are read as they are asked for, in order."""

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.path, self.offset, self.shape, self.dtype = path, offset, shape, dtype
        self.ndim = len(shape)
        self._row = math.prod(shape[1:]) * dtype.itemsize
        self._start = 0
        self._block: NDArray[Any] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, number: int) -> NDArray[Any]:
        count = max(1, _BLOCK_BYTES // self._row)
        block = self._block
        if block is None or not self._start <= number < self._start + len(block):
            block = self._read(number, min(count, len(self) - number))
            self._start, self._block = number, block
        row: NDArray[Any] = block[number - self._start]
        return row

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        import numpy as np

        return np.asarray(self._read(0, len(self)), dtype=dtype)

    def _read(self, start: int, count: int) -> NDArray[Any]:
        import numpy as np

        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset + start * self._row)
                found = np.fromfile(file, dtype=self.dtype, count=count * self._row // self.dtype.itemsize)
            return found.reshape(count, *self.shape[1:])
        except ValueError as error:
            raise InputRefused(f"{self.path} was cut short while it was read", hint=_REWRITE) from error
        except OSError as error:
            raise from_os_error(error, f"reading {self.path}") from error


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype that a signature names, those of ml_dtypes (``bfloat16``, ``float8_e4m3fn`` …) included.

    StageFailed for what is no tensor: sequences, maps, optional values.
    """
    import ml_dtypes
    import numpy as np

    try:
        return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)
    except TypeError as error:
        hint = "make the model's inputs and outputs tensors"
        raise StageFailed(f"values of type {name} are no tensors, and can't be made or compared", hint=hint) from error


def digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    """sha256 over names, dtypes, shapes and elements, in the order of the names."""
    import numpy as np

    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        total.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        if array.dtype.hasobject:
            total.update(repr(array.tolist()).encode())
        else:
            total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


_REWRITE = "write it again with numpy.savez or numpy.save"
_PICKLED = "save plain arrays (a fixed dtype, one shape for all samples): pickled objects are programs"


def _regular(path: Path) -> int:
    """The size of the file; only regular files are read."""
    try:
        info = os.stat(path)
    except FileNotFoundError as error:
        raise missing_path("file", path) from error
    except OSError as error:
        raise from_os_error(error, f"reading {path}") from error
    if not stat.S_ISREG(info.st_mode):
        raise InputRefused(f"{path} is not a regular file", hint="give a file")
    return info.st_size


def _members(path: Path, archive: zipfile.ZipFile, limit_bytes: int) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    if len(infos) > _MEMBERS:
        raise InputRefused(f"{path} holds {len(infos)} files; the most is {_MEMBERS}", hint=_REWRITE)
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.filename.removesuffix(".npy")
        if name == info.filename or info.flag_bits & 1 or info.is_dir():
            raise InputRefused(f"{path}: {info.filename!r} is not a plain .npy member", hint=_REWRITE)
        if name in members:
            raise InputRefused(f"{path} holds {name!r} twice", hint=_REWRITE)
        members[name] = info
    total = sum(info.file_size for info in infos)
    packed = sum(info.compress_size for info in infos)
    if total > _BOMB_BYTES and total > _BOMB_RATIO * max(1, packed):
        raise InputRefused(
            f"{path} would grow {total // max(1, packed)} times, to {total} bytes: it looks like a zip bomb",
            hint="if it is meant, write it with numpy.savez, which does not compress",
        )
    if total > limit_bytes:
        raise ResourceExhausted(
            f"{path} holds {total} bytes of arrays; the limit is {limit_bytes}",
            hint="store them as a folder of .npy files, which is read piece by piece, or give fewer samples",
        )
    return members


def _stored(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit_bytes: int) -> StoredRows | None:
    """A large member by rows, once its checksum was found right; None for one that has to be read whole."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size <= _LARGE:
        return None
    with archive.open(info) as file:
        shape, fortran, dtype = _header(f"{path}: {info.filename}", file, info.file_size, limit_bytes)
        inside = file.tell()
        while file.read(1 << 22):  # zipfile checks the CRC as it reads to the end
            pass
    if fortran or not shape or math.prod(shape) == 0:
        return None
    with open(path, "rb") as raw:
        raw.seek(info.header_offset + 26)
        lengths = raw.read(4)
    # The header before the data has its own lengths of name and extra field.
    start = info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    return StoredRows(path, start + inside, shape, dtype)


def _read_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit_bytes: int) -> NDArray[Any]:
    import numpy as np

    where = f"{path}: {info.filename}"
    with archive.open(info) as file:
        shape, fortran, dtype = _header(where, file, info.file_size, limit_bytes)
        array: NDArray[Any] = np.empty(math.prod(shape), dtype=dtype)
        view = array.view(np.uint8).data if array.size else memoryview(b"")
        filled = 0
        while filled < len(view):
            piece = file.read(min(1 << 22, len(view) - filled))
            if not piece:
                raise InputRefused(f"{where} is cut short", hint=_REWRITE)
            view[filled : filled + len(piece)] = piece
            filled += len(piece)
        if file.read(1):  # reading on to the end also makes zipfile check the CRC
            raise InputRefused(f"{where} is longer than its header says", hint=_REWRITE)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)


def _header(
    where: str, file: IO[bytes], size: int, limit_bytes: int | None
) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, Fortran order, dtype) as the header says, once that fits ``size`` bytes; the file stands after it."""
    from numpy.lib import format as npy

    try:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"format version {version}")
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except OSError:
        raise
    except Exception as error:  # numpy evaluates the header as a Python literal, which fails in many ways
        text = " ".join(str(error).split())[:200]
        raise InputRefused(f"{where} has no valid .npy header: {text}", hint=_REWRITE) from error
    if dtype.hasobject:
        raise InputRefused(f"{where} holds pickled Python objects", hint=_PICKLED)
    if dtype.kind not in _PLAIN or dtype.fields or dtype.itemsize == 0 or any(dim < 0 for dim in shape):
        raise InputRefused(f"{where} has the dtype {dtype} and shape {shape}, not a plain array", hint=_PICKLED)
    claimed, held = math.prod(shape) * dtype.itemsize, size - file.tell()
    if claimed != held or math.prod(dim or 1 for dim in shape) * dtype.itemsize > max(held, 1 << 40):
        raise InputRefused(f"{where} claims {claimed} bytes for shape {shape}, and holds {held}", hint=_REWRITE)
    if limit_bytes is not None and claimed > limit_bytes:
        raise ResourceExhausted(f"{where} takes {claimed} bytes; the limit is {limit_bytes}", hint="give fewer samples")
    return shape, bool(fortran), dtype
