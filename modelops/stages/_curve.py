"""The trade-off of a method: accuracy against latency at several cuts, as data and as a picture."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.core.artifact import Artifact
from modelops.core.progress import progress
from modelops.errors import UsageError
from modelops.pruners import CUT, Pruner
from modelops.stages import _pictures
from modelops.stages._pictures import DARK, MAIN, PALE, SPAN, drawing

if TYPE_CHECKING:
    from modelops.stages._gain import Timing
    from modelops.stages._losses import Losses

POINTS = 7
DATA, PICTURES = "curve.json", ("curve.svg", "curve.png")
_SCHEMA = "modelops.curve/1"


def shares(text: str) -> list[float]:
    """The shares that "0.1..0.7" stands for: seven, evenly spaced, with both ends; UsageError when it is no range."""
    match = re.fullmatch(r"\s*(\d*\.?\d+)(%?)\s*\.\.\s*(\d*\.?\d+)(%?)\s*", text)
    if match is None:
        raise UsageError(f"--curve can't be {text!r}", hint="give a range of shares to remove, such as 0.1..0.7")
    first, last = (float(match[k]) * (0.01 if match[k + 1] else 1.0) for k in (1, 3))
    if not 0.01 <= first < last <= 0.95:
        raise UsageError(
            f"--curve goes from {first:g} to {last:g}", hint="shares to remove rise from 0.01 to 0.95 at most"
        )
    return [round(first + (last - first) * k / (POINTS - 1), 4) for k in range(POINTS)]


def require_plots() -> None:
    """EnvironmentMissing, with the pip command, where there is nothing to draw with."""
    _pictures.require_plots("--curve")


@dataclass(frozen=True)
class Quality:
    """What a curve shows upwards: the name of a figure, its value in the source, and how it is found in losses."""

    name: str
    source: float | None


def cut(
    method: Pruner,
    cuts: Sequence[float],
    source: Artifact,
    bench: Any,
    judge: Callable[[Path], Losses],
    folder: Path,
) -> list[dict[str, Any]]:
    """Prune at every cut, into a folder of its own: what was removed, and what it cost."""
    points = []
    folder.mkdir()
    for number, share in enumerate(cuts):
        progress("drawing the curve", number, len(cuts))
        name = f"cut-{share:g}"
        (folder / name).mkdir()
        done = method.aimed(share).prune(source.model, folder / name / "model.onnx", bench)
        point: dict[str, Any] = {"name": name, "removed": share, "reached": float(done.details["asked"]["reached"])}
        point["what"] = done.details["asked"]["what"]
        point["metrics"] = {
            metric.name: metric.value for metric in (*done.metrics, *judge(folder / name / "model.onnx").metrics)
        }
        bare = bench.scratch / CUT
        if bare.is_file():
            point["metrics_unrefitted"] = {metric.name: metric.value for metric in judge(bare).metrics}
        points.append(point)
    progress("drawing the curve", len(cuts), len(cuts))
    return points


def finished(points: Sequence[dict[str, Any]], found: Timing) -> Quality:
    """Give every point its speed and its quality; tells what that quality is.

    It is the task metric where there are labels, else how near outputs are to the source's.
    """
    names = list(points[0]["metrics"])
    task = next((name.removesuffix("_before") for name in names if f"{name.removesuffix('_before')}_drop" in names), "")
    name = task or next(name for name in ("cosine_mean", "agreement", "sqnr") if name in names)
    for point in points:
        standing = found.of(point["name"])
        point |= {"speedup": standing.speedup, "interval": standing.interval, "latency_ms": standing.latency_ms}
        point["quality"] = point["metrics"][name]
        point["unrefitted"] = point.get("metrics_unrefitted", {}).get(name)
    before = points[0]["metrics"].get(f"{task}_before") if task else None
    return Quality(name, before if before is not None else 1.0 if name != "sqnr" else None)


def write(place: Callable[[str], Path], quality: Quality, points: Sequence[dict[str, Any]]) -> None:
    """Write the points and their pictures; ``place`` says where a file of a name goes."""
    document = {"schema": _SCHEMA, "quality": quality.name, "source": quality.source, "points": list(points)}
    place(DATA).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for name in PICTURES:
        draw(place(name), quality, points)


def draw(place: Path, quality: Quality, points: Sequence[dict[str, Any]]) -> None:
    """Quality against the time of one inference, as a share of the source's; before and after refitting."""
    across, up = "time of one inference, as a share of the source's", quality.name.replace("_", " ")
    with drawing(place, across=across, up=up) as axes:
        times = [1 / point["speedup"] for point in points]
        values = [point["quality"] for point in points]
        refitted = any(point.get("unrefitted") is not None for point in points)
        if refitted:
            bare = [point.get("unrefitted") for point in points]
            axes.plot(times, bare, "o--", color=PALE, markersize=4, linewidth=1, label="cut alone")
        spans = [point["interval"] or (point["speedup"], point["speedup"]) for point in points]
        errors = [
            [max(0.0, time - 1 / span[1]) for time, span in zip(times, spans, strict=True)],
            [max(0.0, 1 / span[0] - time) for time, span in zip(times, spans, strict=True)],
        ]
        axes.errorbar(
            times,
            values,
            xerr=errors,
            fmt="o-",
            color=MAIN,
            ecolor=SPAN,
            markersize=5,
            linewidth=1.6,
            capsize=2,
            label="refitted" if refitted else "pruned",
        )
        below = False
        for k, (time, value, point) in enumerate(zip(times, values, points, strict=True)):
            # Labels of points that lie close together take turns above and below.
            below = not below and k > 0 and abs(time - times[k - 1]) < 0.06
            place_of = (0, -14) if below else (0, 7)
            axes.annotate(
                f"−{point['removed']:.0%}",
                (time, value),
                place_of,
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        if quality.source is not None:
            axes.plot([1.0], [quality.source], "D", color=DARK, markersize=6, label="source")
        axes.set_xlim(left=0)
