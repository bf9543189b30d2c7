"""Backends: where a model runs. Every file here is one runtime on one sort of device."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, Protocol, Self

from modelops.core.component import Component
from modelops.core.registry import Registry
from modelops.core.tensors import Signature
from modelops.errors import EnvironmentMissing
from modelops.measures.gates import TransitionName


@dataclass(frozen=True)
class Call:
    """One inference made ready, to be repeated with as little around it as possible.

    ``once()`` is complete when it returns: a device has been waited for. ``outputs`` turns what it returned into arrays
    by name. ``timer``, where there is a device with a clock of its own, starts that clock and gives what stops it and
    returns the nanoseconds between.
    """

    once: Callable[[], Any]
    outputs: Callable[[Any], dict[str, Any]]
    timer: Callable[[], Callable[[], float]] | None = None


@dataclass(frozen=True)
class Module:
    """A model as its own framework runs it, for the backends that open no ONNX file.

    ``call`` runs ``module`` on inputs by name and gives a sequence of outputs.
    """

    module: Any
    call: Callable[[Mapping[str, Any]], Any]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class NodeTime:
    """One node of a model as it ran: its median time, and the part of the runtime that ran it.

    ``macs`` is how many products it adds up, None where that can't be told; ``moved_bytes`` what it reads and writes;
    ``int8`` whether it computes on 8-bit numbers.
    """

    name: str
    op: str
    provider: str
    microseconds: float
    macs: int | None = None
    moved_bytes: int = 0
    int8: bool = False


class Session(Protocol):
    """A model that is loaded and ready to run. Use it in a ``with`` block."""

    @property
    def signature(self) -> Signature: ...

    def run(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs (name → numpy array) for these inputs (name → numpy array with its batch axis)."""

    def prepare(self, feed: Mapping[str, Any]) -> Call:
        """The same inference made ready to be timed, its inputs where the device wants them."""

    def facts(self) -> dict[str, Any]:
        """What the session really uses, as JSON types: threads, providers, precision."""

    def device_memory_bytes(self) -> int | None:
        """The most memory of the device that was held so far, or None where the device is the CPU."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Backend(Component):
    """One runtime on one sort of device."""

    opens: ClassVar[Literal["onnx", "module"]] = "onnx"
    """What ``open`` gets: the path of an ONNX file, or a Module that its caller opened."""
    computes: ClassVar[bool] = True
    """Whether outputs mean anything: False for a backend that only takes its time."""
    library: ClassVar[str] = ""
    """The package that does the work, by its import name; importing it is no part of loading a model."""

    profiles: ClassVar[bool] = False
    """Whether the runtime tells how long each node takes."""

    def loses(self) -> TransitionName:
        """What the backend itself may do to outputs, as a row of the table of gates."""
        return "structural"

    def missing(self) -> str:
        """Why this backend can't be used here, with what would help; an empty string when it can.

        The reason, then after "; " what would help.
        """
        raise TypeError(f"{type(self).__name__} does not define missing")

    @abstractmethod
    def open(self, model: Path | Module) -> Session:
        """The model loaded; EnvironmentMissing when the backend is not usable here."""
        raise TypeError(f"{type(self).__name__} does not define open")

    def profile(self, model: Path, feed: Mapping[str, Any], scratch: Path, runs: int) -> list[NodeTime] | None:
        """How long each node of an ONNX file takes, from that many runs; None where the runtime does not tell.

        ``scratch`` is a directory for files that are not kept.
        """
        del model, feed, scratch, runs
        return None


def require_usable(backend: Backend) -> None:
    """EnvironmentMissing, with what would help, when the backend can't be used here."""
    reason = backend.missing()
    if reason:
        fact, _, hint = reason.partition("; ")
        raise EnvironmentMissing(f"{backend.name} can't be used here: {fact}", hint=hint)


REGISTRY: Registry[Backend] = Registry("modelops.backends", lambda: Backend)
