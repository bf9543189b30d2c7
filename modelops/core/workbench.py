"""What a stage hands to a method: the model's facts and data to look at; and what the method gives back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from modelops.core.artifact import Artifact
from modelops.core.report import Metric
from modelops.core.tensors import Signature


@dataclass(frozen=True)
class Done:
    """What a method did: remarks for a person, figures for the report, findings for a script."""

    notes: tuple[str, ...] = ()
    metrics: tuple[Metric, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


class Workbench(Protocol):
    """Handed to quantizers, pruners and simplifiers by their stage."""

    @property
    def source(self) -> Artifact:
        """The artifact that the method starts from."""

    @property
    def signature(self) -> Signature: ...

    @property
    def scratch(self) -> Path:
        """A private directory for files that are not kept."""

    @property
    def has_data(self) -> bool:
        """Whether the user gave data."""

    def batches(self) -> Iterator[dict[str, Any]]:
        """The user's samples as feeds with a batch axis (name → array); UsageError when no data was given.

        Each call starts from the first sample again.
        """
