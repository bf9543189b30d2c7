"""Workers forked from a process that has imported the tools, instead of started anew: the same work, sooner.

Of twenty seconds that ``simplify`` takes for a graph of one node, sixteen are imports. A campaign over thousands of
such graphs forks its workers instead; limits, pipes and the end of a worker are worker.call's own.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from typing import IO, Any

from modelops.core import worker

# What engines, the judgement of their results and the writing of files import.
MODULES = ("onnx", "onnx_ir.passes.common", "onnxruntime", "onnxscript.optimizer", "onnxslim", "onnxsim")


class Forked:
    """What worker.call wants to know of a child, of a process that was forked."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._status: int | None = None

    def poll(self) -> int | None:
        return self._reap(os.WNOHANG)

    def wait(self) -> int:
        status = self._reap(0)
        assert status is not None
        return status

    def _reap(self, options: int) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status


def spawn(
    function: str,
    arguments: Mapping[str, Any],
    writer: int,
    output: IO[bytes],
    limits: worker.Limits,
    environment: Mapping[str, str],
) -> Forked:
    job = {
        "function": function,
        "arguments": dict(arguments),
        "events": writer,
        "parent": os.getpid(),
        "limits": asdict(limits),
    }
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return Forked(pid)
    try:
        os.setsid()
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        os.environ.update({**worker.child_environment(), **environment})
        tempfile.tempdir = None
        sys.stdin = io.TextIOWrapper(io.BytesIO(json.dumps(job).encode()))
        worker.main()
    finally:
        os._exit(70)


def warm_up() -> None:
    """Import the tools, and let every worker of this process and of its children be forked from here on."""
    for module in MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    vars(worker)["_spawn"] = spawn
