"""A folder of .npy files, named after the model's inputs; read piece by piece, so that it may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from modelops.datasets import Context, Dataset, Sample
from modelops.datasets._rows import rows
from modelops.errors import InputRefused
from modelops.graphs.arrays import read_npy


class NpyFolder(Dataset):
    """A folder with one .npy file per input; the first axis counts samples, labels.npy holds labels."""

    names_inputs = True

    @classmethod
    def reads(cls, path: Path) -> bool:
        return path.is_dir() and any(path.glob("*.npy"))

    def samples(self, path: Path, context: Context, limit: int | None = None) -> Iterator[Sample]:
        # An input named "a/b" lies in the file a/b.npy.
        files = {file.relative_to(path).with_suffix("").as_posix(): file for file in sorted(path.rglob("*.npy"))}
        if not files:
            raise InputRefused(f"{path} holds no .npy files", hint="give one file per input of the model")
        arrays = {name: read_npy(file, mapped=True) for name, file in files.items()}
        yield from rows(arrays, context, str(path), limit)
