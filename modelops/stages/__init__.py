"""Stages: the verbs. Every file here is a command, a step of recipes and an entry of histories.

A stage reads an artifact (``convert`` alone reads the text that names a source), writes into a draft, and reports.
It runs in a worker: it may import what it needs, and must not print.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from modelops.core.artifact import Draft
from modelops.core.component import Component, options_of
from modelops.core.registry import Registry
from modelops.core.report import Report
from modelops.core.worker import Limits


class Stage(Component):
    """One verb of the command line. Its fields are its options; ``run`` does the work.

    The class's docstring is the command's help.
    """

    reads: ClassVar[Literal["source", "model"]] = "model"
    """Whether ``run`` gets the text of a source, or an artifact."""
    writes: ClassVar[Literal["model", "evidence"]] = "model"
    """A model artifact is published only on a pass; evidence whatever the verdict."""
    machine_dependent: ClassVar[bool] = False
    """Whether the result depends on the CPU's features, which then enter the step's key."""

    def run(self, source: Any, draft: Draft) -> Report:
        """Do the work: write files into the draft, and report what was found.

        ``source`` is an Artifact, or a str where the stage reads a source.
        """
        raise TypeError(f"{type(self).__name__} does not define run")

    def inputs(self, source: str) -> Mapping[str, Path]:
        """The files and folders that the result depends on, by the option that names them.

        ``source`` is the text of IN. Every option of type Path counts, unless a stage says otherwise.
        """
        found: dict[str, Path] = {}
        for item in options_of(type(self)):
            value = getattr(self, item.name)
            if item.type is Path and value is not None:
                for number, path in enumerate(value if item.many else (value,)):
                    found[f"{item.name}[{number}]" if item.many else item.name] = path
        return found

    def outputs(self) -> tuple[Path, ...]:
        """The files that the stage writes beside OUT: a result counts as there only when they are too."""
        return ()

    def components(self) -> tuple[Component, ...]:
        """The stage and the components that its options chose; their tools and requirements count."""
        chosen = (getattr(self, item.name) for item in options_of(type(self)) if item.registry is not None)
        return (self, *(component for component in chosen if component is not None))

    def takes_evidence(self) -> bool:
        """Whether IN is evidence to be judged anew, and not a model."""
        return False

    def limits(self, model_bytes: int) -> Limits:
        """What the stage may use by default: a small or hostile model gets little, a large one more.

        ``model_bytes`` is the size of the source model, 0 when it is not known.
        """
        from modelops.stages import _limits

        return _limits.default(model_bytes)

    def limits_on(self, source: str, model_bytes: int) -> Limits:
        """The same for a source, where its form makes a difference: the user's own code is not held short."""
        del source
        return self.limits(model_bytes)


REGISTRY: Registry[Stage] = Registry("modelops.stages", lambda: Stage)
