"""Task metrics by name, or a function of the user's: ``file.py:function``, called with (outputs, labels)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelops.datasets.python_function import code_of, function_of, user_code
from modelops.errors import InputRefused
from modelops.measures.metrics import METRICS, TaskMetric, task_metric

_HINT = "it must take (outputs, labels), arrays with one row per sample, and return one number"


def is_function(metric: str | None) -> bool:
    """Whether a metric is a function of the user's, and not one of ours by its name."""
    return metric is not None and re.fullmatch(r".+\.py:[A-Za-z_]\w*", metric) is not None


def metric_code(metric: str | None) -> list[dict[str, str]]:
    """The user's files that ran for a metric, with their digests."""
    if metric is None or not is_function(metric):
        return []
    return [
        {"path": str(path.absolute()), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in code_of(Path(metric))
    ]


@contextmanager
def user_metric(metric: str | None) -> Iterator[TaskMetric | None]:
    """The metric of that name, or the user's function, for as long as the block lasts; None for none.

    Higher values are better, unless the function has an attribute ``higher_is_better`` that says False.
    """
    if metric is None or not is_function(metric):
        yield None if metric is None else task_metric(metric)
        return
    path = Path(metric)
    with user_code(path):
        function = function_of(path)
    higher = bool(getattr(function, "higher_is_better", True))
    name = metric.rpartition(":")[2]
    # What is known of a metric of ours by its name, such as its bounds from counts, is not true of the user's.
    yield TaskMetric(path.name if name in METRICS else name, _scored(path, function), higher=higher)


def _scored(path: Path, function: Callable[..., Any]) -> Callable[[Any, Any], float]:
    def score(outputs: Any, labels: Any) -> float:
        with user_code(path, _HINT):
            found = function(outputs, labels)
        try:
            return float(found)
        except (TypeError, ValueError) as error:
            raise InputRefused(f"{path} gave a {type(found).__name__}, not a number", hint=_HINT) from error

    return score
