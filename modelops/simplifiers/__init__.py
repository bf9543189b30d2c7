"""Simplifiers: how a graph is made simpler. Every file here is one engine.

Engines change outputs, hang and crash now and then. The stage therefore runs each in a process of its own, writes the
result anew, and holds it against the source before anything is published.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Protocol

from modelops.core.component import Component
from modelops.core.registry import Registry
from modelops.core.report import Check
from modelops.core.workbench import Done, Workbench


class Arena(Workbench, Protocol):
    """The workbench of an engine that tries others: it runs them apart, and judges what they made."""

    def attempt(self, engine: Simplifier, source: Path, target: Path) -> Done:
        """Run an engine in a worker of its own; ResourceExhausted beyond its limits, StageFailed when it crashed."""

    def judge(self, candidate: Path) -> list[Check]:
        """Whether a candidate still does what the source does, and is not larger."""


class Simplifier(Component):
    """One engine."""

    arranges: ClassVar[bool] = False
    """Whether it does nothing itself but try other engines; only such a one runs in the stage's own process."""

    def simplify(self, source: Path, target: Path, workbench: Arena) -> Done:
        """Read the model at ``source``, write the new one to ``target``, and say what was done.

        An engine that finds nothing better writes nothing, and says so in its notes. StageFailed names the node and op
        that could not be treated.
        """
        raise TypeError(f"{type(self).__name__} does not define simplify")


REGISTRY: Registry[Simplifier] = Registry("modelops.simplifiers", lambda: Simplifier)
