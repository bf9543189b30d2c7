"""Pictures in one style: the same bytes for the same points, as SVG or PNG by the name of the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from modelops.errors import EnvironmentMissing

MAIN, SPAN, PALE, DARK = "#1f5fa8", "#9db8d6", "#b0b0b0", "#333333"


def can_draw() -> bool:
    """Whether matplotlib is here."""
    return find_spec("matplotlib") is not None


def require_plots(flag: str) -> None:
    """EnvironmentMissing, with the pip command, where there is nothing to draw with."""
    from modelops.core.extras import pip_hint

    if not can_draw():
        raise EnvironmentMissing(f"{flag} draws with matplotlib, not installed here", hint=pip_hint(["matplotlib"]))


@contextmanager
def drawing(place: Path, *, across: str, up: str, legend: str = "lower right") -> Iterator[Any]:
    """The axes of one picture, written to ``place`` in the end; ``across`` and ``up`` are what they measure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "modelops", "font.size": 10}):
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        yield axes
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.margins(y=0.15)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.legend(frameon=False, loc=legend)
        metadata = {"Date": None} if place.suffix == ".svg" else {"Software": None}
        figure.savefig(place, dpi=150, metadata=metadata)
        pyplot.close(figure)
