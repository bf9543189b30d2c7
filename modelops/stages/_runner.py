"""Runners: fresh processes that each hold one model, of which no more than one runs at a time."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from modelops.backends import Backend
from modelops.core.component import described
from modelops.core.worker import child_environment, crashed, tree
from modelops.errors import ERRORS, ResourceExhausted, StageFailed

_MIB = 1 << 20


@dataclass(frozen=True)
class Contender:
    """One model on one backend, under the name that results carry.

    ``model`` is the path of an ONNX file, or the text of a source for backends that run source models. ``inflate`` is
    for tests of the measurement itself: a share of extra inferences that each block runs and does not report.
    ``expected`` is an .npz file of the outputs that are right; without it the first inference's are taken for right.
    ``feed`` is an .npz file of inputs of its own; without it the contender gets those that all share.
    """

    name: str
    backend: Backend
    model: Path | str
    inflate: float = 0.0
    expected: Path | None = None
    feed: Path | None = None

    def load_seconds(self) -> float:
        """How long loading and the first inference may take: a hostile model gets little, a large one more."""
        if self.backend.opens == "module":
            return 900.0
        path = Path(self.model)
        data = path.with_name(path.name + ".data")
        size = sum(file.stat().st_size for file in (path, data) if file.exists())
        return 40.0 + 3.0 * size / _MIB


class Runner:
    """A process that holds a contender. Leaving its ``with`` block kills it and whatever it started."""

    def __init__(self, contender: Contender, feed: Path, scratch: Path, noise: random.Random) -> None:
        self.contender = contender
        self._log: IO[bytes] = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - closed by close()
        reader, writer = os.pipe()
        self._answers, self._buffer = reader, b""
        job = {
            "backend": described(contender.backend),
            "model": str(contender.model),
            "feed": str(contender.feed or feed),
            "inflate": contender.inflate,
            "expected": str(contender.expected) if contender.expected else None,
            "answers": writer,
            "parent": os.getpid(),
        }
        # The size of the environment moves the stack, and with it speed (Mytkowicz 2009): let each launch draw its own.
        environment = {
            **child_environment(),
            "MODELOPS_STACK_SHIFT": "x" * noise.randrange(4096),
            "OPENBLAS_NUM_THREADS": "1",
        }
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "modelops.stages._launch"],
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=(writer,),
                start_new_session=True,
                env=environment,
            )
        finally:
            os.close(writer)
        self._tell(job)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, do: str, *, patience: float, **arguments: Any) -> dict[str, Any]:
        """The answer to a command; the error that it carries is raised.

        StageFailed when the process crashed, or gave no answer within ``patience`` seconds and so was killed;
        ResourceExhausted when that happened while the model was loaded.
        """
        self.tell(do, **arguments)
        return self.answer(do, patience=patience)

    def tell(self, do: str, **arguments: Any) -> None:
        """Give a command whose answer is fetched later, so that several processes work on theirs at a time."""
        self._tell({"do": do, **arguments})

    def answer(self, do: str, *, patience: float) -> dict[str, Any]:
        """The answer to the command that was told last; raises what ``ask`` raises."""
        end = time.monotonic() + patience
        while b"\n" not in self._buffer:
            left = end - time.monotonic()
            if left <= 0:
                raise self._too_long(do, patience)
            if not select.select([self._answers], [], [], min(left, 1.0))[0]:
                if self._process.poll() is not None:
                    raise crashed(self._process.returncode, self._what, self._log)
                continue
            chunk = os.read(self._answers, 1 << 16)
            if not chunk:
                raise crashed(self._process.wait(), self._what, self._log)
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            failure = answer["error"]
            kind = ERRORS.get(failure["code"], StageFailed)
            raise kind(f"{self._what}: {failure['message']}", hint=failure["hint"])
        return answer

    @property
    def _what(self) -> str:
        return f"{self.contender.name} on {self.contender.backend.name}"

    def _too_long(self, do: str, patience: float) -> ResourceExhausted | StageFailed:
        self.close()
        if do in ("ready", "open"):
            return ResourceExhausted(
                f"{self._what}: loading and the first inference took longer than {patience:.0f} s",
                hint="the model is too slow, or hostile, to be measured",
            )
        return StageFailed(
            f"{self._what} gave no answer to {do!r} for {patience:.0f} s", hint="was its process stopped? run it again"
        )

    def _tell(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise crashed(self._process.wait(), self._what, self._log) from error

    def pause(self) -> None:
        """Stop the process group: threads that spin for more work would disturb whoever runs next."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def close(self) -> None:
        """Kill the process and all that descends from it; closing twice is no error."""
        if self._answers < 0:
            return
        for pid in reversed(tree(self._process.pid)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        self._signal(signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        os.close(self._answers)
        self._answers = -1
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
