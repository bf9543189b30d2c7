"""How far a model can be pruned within what its accuracy may drop by: bisection, with all looks accounted for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelops.core.artifact import Artifact
from modelops.core.progress import progress
from modelops.core.report import Check
from modelops.core.workbench import Done
from modelops.errors import StageFailed, UsageError
from modelops.pruners import Pruner
from modelops.stages._losses import Losses

#: Cuts that are tried; each is judged on the same rows, so that the bounds of all have to hold together.
LOOKS = 6
_MOST = 0.95


@dataclass
class Search:
    """What was tried, and the largest share that may go; None when not even the smallest may."""

    share: float | None = None
    trials: list[dict[str, Any]] = field(default_factory=list)

    def check(self, done: Done | None, max_drop: float) -> Check:
        """Whether anything could be removed, and how much."""
        allowed = f"a drop of {max_drop:.3g}"
        if self.share is None or done is None:
            least = min(trial["removed"] for trial in self.trials)
            return Check("removed", "fail", f"not even {least:.1%} can go within {allowed}", 0.0, "> 0")
        asked = done.details["asked"]
        text = f"removed {asked['reached']:.1%} of the {asked['what']}, as far as {allowed} lets it go"
        return Check("removed", "pass", f"{text} ({len(self.trials)} cuts were judged)", asked["reached"], "> 0")


def search(
    method: Pruner, source: Artifact, bench: Any, judge: Callable[[Path], Losses], max_drop: float, folder: Path
) -> Search:
    """The largest share that ``method`` may remove, by bisection; ``judge`` tells what a candidate loses.

    UsageError when there are no labels to tell a drop by.
    """
    found = Search()
    low, high = 0.0, _MOST
    folder.mkdir()
    for number in range(LOOKS):
        progress("looking for the largest cut", number, LOOKS)
        share = round((low + high) / 2, 4)
        place = folder / f"{number}" / "model.onnx"
        place.parent.mkdir()
        try:
            done = method.aimed(share).prune(source.model, place, bench)
        except StageFailed as error:
            if number == 0:
                raise
            found.trials.append({"removed": share, "error": error.message, "fits": False})
            high = share
            continue
        losses = judge(place)
        if losses.drop is None:
            raise UsageError(
                "--max-drop can only be the target where samples have labels", hint="give labelled ones with --eval"
            )
        fits = losses.drop.bound <= max_drop and not losses.failed
        reached = float(done.details["asked"]["reached"])
        row = {"removed": share, "reached": reached, "drop": losses.drop.drop, "surely_below": losses.drop.bound}
        found.trials.append({**row, "fits": fits})
        for leftover in place.parent.iterdir():
            leftover.unlink()
        if fits:
            found.share = low = share
        else:
            high = share
        if fits and reached < share - 0.1:
            break  # nothing more can be cut
    progress("looking for the largest cut", LOOKS, LOOKS)
    return found
