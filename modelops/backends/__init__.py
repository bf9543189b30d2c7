"""Backends: where a model runs. Every file here is one runtime on one sort of device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from modelops.core.component import Component
from modelops.core.registry import Registry
from modelops.core.tensors import Signature


class Session(Protocol):
    """A model that is loaded and ready to run. Use it in a ``with`` block."""

    @property
    def signature(self) -> Signature: ...

    def run(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs (name → numpy array) for these inputs (name → numpy array with its batch axis)."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Backend(Component):
    """One runtime on one sort of device."""

    def missing(self) -> str:
        """Why this backend can't be used here, with what would help; an empty string when it can."""
        raise TypeError(f"{type(self).__name__} does not define missing")

    def open(self, model: Path | str) -> Session:
        """The model loaded: the path of an ONNX file, or the text of a source for backends that run source models.

        EnvironmentMissing when the backend is not usable here.
        """
        raise TypeError(f"{type(self).__name__} does not define open")


REGISTRY: Registry[Backend] = Registry("modelops.backends", lambda: Backend)
