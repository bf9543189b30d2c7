"""Datasets: where samples come from. Every file here reads one form of data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from modelops.core.component import Component
from modelops.core.registry import Registry
from modelops.core.tensors import Signature


@dataclass(frozen=True)
class Sample:
    """One sample: an array per input of the model, without the batch axis; its label, if any; and where it is from."""

    feed: Mapping[str, Any]
    label: Any = None
    key: str = ""


@dataclass(frozen=True)
class Context:
    """What a dataset may need to know of the model: its signature, and its directory (for a tokenizer).

    Without ``known`` the signature is empty, because the model does not say what it takes: data that names its arrays
    is given as it is.
    """

    signature: Signature
    directory: Path | None = None
    known: bool = True


class Dataset(Component):
    """One form of data."""

    made_up: ClassVar[bool] = False
    """Whether the samples are invented: agreement of decisions on them says nothing."""
    names_inputs: ClassVar[bool] = False
    """Whether the data names the model's inputs, so that it can be read where the model does not."""

    @classmethod
    def code(cls, path: Path) -> tuple[Path, ...]:
        """The user's own Python files that run to give the samples."""
        return ()

    @classmethod
    def reads(cls, path: Path) -> bool:
        """Whether the path holds data of this form; cheap, imports nothing heavy."""
        raise TypeError(f"{cls.__name__} does not define reads")

    def samples(self, path: Path, context: Context, limit: int | None = None) -> Iterator[Sample]:
        """The samples in order, at most ``limit``; InputRefused names the file and the part that does not fit."""
        raise TypeError(f"{type(self).__name__} does not define samples")


REGISTRY: Registry[Dataset] = Registry("modelops.datasets", lambda: Dataset)
