"""What the closing table of a run measures: the options of a recipe's [table]."""

from __future__ import annotations

from pathlib import Path

from modelops.core.component import Component, choice, option
from modelops.datasets import REGISTRY, Dataset


class Table(Component):
    """What the closing table of a run measures for every model of the chain."""

    data: Path | None = option(default=None, help="Held-out samples, with labels where there are some.")
    dataset: Dataset | None = choice(REGISTRY, default=None, help="How the data is read, when its form does not tell.")
    metric: str | None = option(default=None, help="Task metric on labelled data: top1, f1, mae, r2, spearman.")
    samples: int = option(default=1024, help="Samples to evaluate at most.", min=1)
    budget: float = option(
        default=30.0, help="Seconds for timing all models side by side; 0 leaves it out.", min=0.0, unit="seconds"
    )
