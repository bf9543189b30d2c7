"""Pruners: how weights are removed. Every file here is one method."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Self

from modelops.core.component import Component
from modelops.core.registry import Registry
from modelops.core.workbench import Done, Workbench
from modelops.errors import UsageError

#: Where a method that cuts leaves what proves the cut, in the workbench's scratch directory: the source in which
#: nothing reads the same channels any more, and the cut before weights were refitted. Both must give the same outputs.
ZEROED: Final = "zeroed.onnx"
CUT: Final = "cut.onnx"


class Pruner(Component):
    """One method."""

    def prune(self, source: Path, target: Path, workbench: Workbench) -> Done:
        """Read the model at ``source``, write the new one to ``target``, and say what was done.

        ``details["asked"]`` holds what was asked for (``what``, ``removed``: a share) and how much of it was reached
        (``reached``). StageFailed names the node and op that could not be treated.
        """
        raise TypeError(f"{type(self).__name__} does not define prune")

    @property
    def targeted(self) -> bool:
        """Whether its options say how much to remove; else the stage may say so."""
        return True

    def aimed(self, removed: float) -> Self:
        """The same method, asked to remove this share of what it counts; UsageError when it can't be told."""
        raise UsageError(
            f"--method {self.name} can't be told how much to remove", hint="leave the target to its options"
        )


REGISTRY: Registry[Pruner] = Registry("modelops.pruners", lambda: Pruner)
