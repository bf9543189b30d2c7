"""The one table of default limits.

==================  ==============================================================
wall time           50 s, and 3 s for every MiB of model
memory              5 GiB, or four times the model and 3 GiB when that is more,
                    but never more than 90 % of the machine's
==================  ==============================================================

Stages that run user code, or measure for as long as a budget says, add to it.
"""

from __future__ import annotations

from modelops.core import machine
from modelops.core.worker import Limits

_GIB = 1 << 30
_MIB = 1 << 20


def default(model_bytes: int, *, extra_seconds: float = 0.0) -> Limits:
    """The limits for a stage on a model of that size."""
    memory = max(5 * _GIB, 4 * model_bytes + 3 * _GIB)
    return Limits(
        wall_seconds=50.0 + 3.0 * model_bytes / _MIB + extra_seconds,
        memory_bytes=min(memory, int(0.9 * machine.memory_bytes())),
    )


def trusted(extra_seconds: float = 0.0) -> Limits:
    """The limits where the user's own code runs."""
    return Limits(wall_seconds=3600.0 + extra_seconds, memory_bytes=int(0.9 * machine.memory_bytes()))
