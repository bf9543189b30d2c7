"""Weights from files that hold nothing but weights, loaded strictly: none missing, none left over."""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.errors import InputRefused, from_os_error, missing_path

if TYPE_CHECKING:
    import torch

_LARGEST_HEADER = 100 << 20
_AGAIN = "get the file again, or write it anew"


def check_safetensors(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The (dtype, shape) of every tensor in the file; InputRefused when it is cut short, too long or ambiguous.

    The safetensors library takes the last of two entries with one name; here they are refused.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if len(start) < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise InputRefused(f"{path} is truncated, or no safetensors file", hint=_AGAIN)
            text = file.read(length)
    except FileNotFoundError as error:
        raise missing_path("file", path) from error
    except OSError as error:
        raise from_os_error(error, f"reading {path}") from error
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        tensors = {str(name): (str(entry["dtype"]), tuple(entry["shape"])) for name, entry in header.items()}
        ends = [int(entry["data_offsets"][1]) for entry in header.values()]
    except _Duplicate as error:
        raise InputRefused(f"{path} names {error} twice", hint="write it anew with save_file") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise InputRefused(f"{path} has no valid safetensors header: {error}", hint=_AGAIN) from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        state = "is truncated" if size < expected else "is longer than its header says"
        raise InputRefused(f"{path} {state}: {size} bytes, the header says {expected}", hint=_AGAIN)
    return tensors


class _Duplicate(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise _Duplicate(repr(name))
        values[name] = value
    return values


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of a .pt or .pth checkpoint that holds nothing but tensors.

    InputRefused says what is wrong with the file; nothing in it is ever executed.
    """
    if not path.is_file():
        raise missing_path("weights file", path)
    if path.suffix == ".safetensors":
        check_safetensors(path)
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            loaded: dict[str, torch.Tensor] = load_file(path)
        except (SafetensorError, ValueError) as error:
            raise InputRefused(f"{path} is not a valid safetensors file: {error}", hint=_AGAIN) from error
        return loaded
    if path.suffix in (".pt", ".pth", ".ckpt", ".bin"):
        return _checkpoint(path)
    raise InputRefused(f"{path} is no form of weights that can be read", hint="give a .safetensors or .pt file")


def _checkpoint(path: Path) -> dict[str, torch.Tensor]:
    import pickle

    import torch

    check_stored(path)
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()
        raise InputRefused(
            f"{path} holds more than weights, or is broken: {reason[0][:200] if reason else type(error).__name__}",
            hint="save the state dict alone: safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')",
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(values, Mapping) and isinstance(values.get(key), Mapping):
            values = values[key]
            break
    if not isinstance(values, Mapping) or not all(isinstance(value, torch.Tensor) for value in values.values()):
        raise InputRefused(f"{path} holds no state dict", hint="save model.state_dict()")
    return dict(values)


def check_stored(path: Path) -> None:
    """Refuse a torch archive that would grow when read: torch stores members as they are, bombs are compressed."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError) as error:
        raise InputRefused(f"{path} is not a whole archive: {error}", hint=_AGAIN) from error
    packed = next((info for info in infos if info.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise InputRefused(f"{path}: {packed.filename} is compressed, which torch never does", hint=_AGAIN)
    if sum(info.file_size for info in infos) > 1.1 * path.stat().st_size:
        raise InputRefused(f"{path} claims more bytes than it has", hint=_AGAIN)


def load_strictly(module: torch.nn.Module, path: Path) -> tuple[str, ...]:
    """Put the file's weights into the module; gives remarks. InputRefused names what is missing, left over or unfit."""
    import torch

    state = read_state(path)
    own = module.state_dict()
    held = {_storage(own[name]) for name in state if name in own}
    missing = [name for name, tensor in own.items() if name not in state and _storage(tensor) not in held]
    unexpected = [name for name in state if name not in own]
    if missing or unexpected:
        found = [
            f"{what}: {listed(names)}" for what, names in (("missing", missing), ("unexpected", unexpected)) if names
        ]
        raise InputRefused(f"{path} does not fit the module; {'; '.join(found)}", hint="use the weights of this module")
    unfit = [
        f"{name} has shape {list(tensor.shape)}, the module {list(own[name].shape)}"
        for name, tensor in state.items()
        if tensor.shape != own[name].shape
    ]
    if unfit:
        raise InputRefused(f"{path} does not fit the module: {listed(unfit)}", hint="use the weights of this module")
    cast = sorted({str(t.dtype).removeprefix("torch.") for n, t in state.items() if t.dtype != own[n].dtype})
    with torch.no_grad():
        module.load_state_dict(state, strict=False)
    return (f"weights of type {', '.join(cast)} were converted to the module's own type",) if cast else ()


def _storage(tensor: torch.Tensor) -> Any:
    """What tied tensors have in common."""
    if tensor.device.type == "meta" or not math.prod(tensor.shape):
        return id(tensor)
    return (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape))


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
