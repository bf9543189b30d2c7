"""How much a model computes, whatever the machine: counted on the graph as it stands, from the shapes of one run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelops.backends._node_times import node_times
from modelops.backends._sessions import onnxruntime_options
from modelops.core import machine
from modelops.errors import ModelOpsError


def counted_macs(model: Path, feed: Mapping[str, Any], scratch: Path) -> int | None:
    """The multiplications with their additions in one inference on this feed.

    None where an operator's can't be told from its shapes, or onnxruntime can't run the graph unoptimised.
    """
    options = onnxruntime_options(threads=machine.usable_cpus(), optimization="none", spinning=False, arena=True)
    # A weight that was packed for a kernel is not among the shapes that the profiler writes.
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        nodes = node_times(model, feed, scratch, 1, options, ["CPUExecutionProvider"])
    except ModelOpsError:
        return None
    counts = [node.macs for node in nodes]
    return None if not counts or None in counts else sum(count for count in counts if count is not None)
