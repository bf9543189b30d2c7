"""Simplifiers: how a graph is made simpler. Every file here is one method."""

from __future__ import annotations

from pathlib import Path

from modelops.core.component import Component
from modelops.core.registry import Registry
from modelops.core.workbench import Done, Workbench


class Simplifier(Component):
    """One method."""

    def simplify(self, source: Path, target: Path, workbench: Workbench) -> Done:
        """Read the model at ``source``, write the new one to ``target``, and say what was done.

        StageFailed names the node and op that could not be treated.
        """
        raise TypeError(f"{type(self).__name__} does not define simplify")


REGISTRY: Registry[Simplifier] = Registry("modelops.simplifiers", lambda: Simplifier)
