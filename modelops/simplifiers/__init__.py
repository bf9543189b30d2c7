"""Simplifiers: how a graph is made simpler. Every file here is one engine.

Engines change outputs, hang and crash now and then. The stage therefore runs each in a process of its own, writes the
result anew, and holds it against the source before anything is published.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from modelops.core.component import Component
from modelops.core.registry import Registry
from modelops.core.report import Check, Metric, Verdict
from modelops.core.workbench import Done, Workbench


@dataclass(frozen=True)
class Pace:
    """How fast a candidate is beside another model: ``verdict`` fails when it is surely slower."""

    verdict: Verdict
    text: str
    speedup: float
    metric: Metric


class Arena(Workbench, Protocol):
    """The workbench of an engine that tries others: it runs them apart, and judges what they made."""

    def attempt(self, engine: Simplifier, source: Path, target: Path, beside: Path | None = None) -> Done:
        """Run an engine in a worker of its own; ResourceExhausted beyond its limits, StageFailed when it crashed.

        With ``beside``, the model that the result is to be simpler than, ``details["made"]`` tells what it is: its
        ``nodes``, ``bytes``, ``operators``, whether it is the ``same`` computation, and its ``cost``, None where it has
        the operators that the other has.
        """

    def side_by_side(self, works: Sequence[Callable[[], None]], needs: Sequence[int]) -> None:
        """Do all of these works, several at a time where CPUs and memory allow; ``needs`` are bytes, by work."""

    def cost(self, model: Path) -> float:
        """What onnxruntime has left to do once it has loaded a model: nodes, those that move no data counted little."""

    def judge(self, candidate: Path) -> list[Check]:
        """Whether a candidate still does what the source does, and is not larger."""

    def pace(self, candidate: Path, than: Path, seconds: float) -> Pace:
        """How fast a candidate is beside another model, timed by turns for so many seconds."""


class Simplifier(Component):
    """One engine."""

    arranges: ClassVar[bool] = False
    """Whether it does nothing itself but try other engines; only such a one runs in the stage's own process."""
    appetite: ClassVar[float] = 8.0
    """How many times the model's size it needs in memory at most."""
    fuses: ClassVar[bool] = False
    """Whether it brings in operators that only one runtime knows."""
    saves: ClassVar[bool] = False
    """Whether it writes its result with ``graphs.files``, so that it needs not be written anew."""

    def simplify(self, source: Path, target: Path, workbench: Arena) -> Done:
        """Read the model at ``source``, write the new one to ``target``, and say what was done.

        An engine that finds nothing better writes nothing, and says so in its notes. StageFailed names the node and op
        that could not be treated.
        """
        raise TypeError(f"{type(self).__name__} does not define simplify")


REGISTRY: Registry[Simplifier] = Registry("modelops.simplifiers", lambda: Simplifier)
