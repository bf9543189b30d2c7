"""Workers: run one function in a child process with limits, because tools below hang, crash and eat memory.

``call("package.module:function", arguments, limits)`` gives back what the function returned, as JSON. The child leads
a session of its own: when it goes beyond a limit, or its parent goes away, everything that it started goes with it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from modelops.core.progress import listen
from modelops.errors import ERRORS, ModelOpsError, ResourceExhausted, StageFailed, from_os_error

log = logging.getLogger(__name__)

# How often a child's memory is looked at: 0.1 ms of work each time, so that it does not disturb a benchmark.
_POLL_SECONDS = 0.05
_LOG_TAIL_BYTES = 4000


@dataclass(frozen=True)
class Limits:
    """What one worker and all its children may use; None means no limit.

    CPU time is the fairer limit where other work shares the machine; wall time ends what only waits.
    """

    wall_seconds: float | None = None
    memory_bytes: int | None = None
    cpu_seconds: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What the function returned, and the most memory that the worker's process tree held at a time."""

    value: Any
    seconds: float
    peak_memory_bytes: int | None


class WorkerBug(Exception):
    """The function raised something that is no ModelOpsError; ``text`` is the child's traceback."""

    def __init__(self, text: str) -> None:
        super().__init__(text.strip().splitlines()[-1] if text.strip() else "unknown")
        self.text = text


def call(
    function: str,
    arguments: Mapping[str, Any],
    *,
    limits: Limits | None = None,
    what: str = "the work",
    on_progress: Callable[[str, int, int | None], None] | None = None,
    log_to: IO[bytes] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Run ``package.module:function(**arguments)`` in a child; ``environment`` is added to what it gets of this one's.

    Raises the ModelOpsError that the function raised; ResourceExhausted beyond a limit; StageFailed when the child
    crashed; WorkerBug for any other exception.
    """
    started = time.monotonic()
    reader, writer = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, reader)
        output = log_to or stack.enter_context(tempfile.TemporaryFile())
        # Temporary files of the child's own: a child that is killed can't remove them.
        private = tempfile.TemporaryDirectory(prefix="modelops-worker-", ignore_cleanup_errors=True)
        scratch = stack.enter_context(private)
        try:
            child = _spawn(
                function, arguments, writer, output, limits or Limits(), {**(environment or {}), "TMPDIR": scratch}
            )
        finally:
            os.close(writer)
        stack.callback(_end, child)
        watch = _Watch(child, limits or Limits(), what, started)
        result = None
        for event in _events(reader, child, watch):
            if event["event"] == "progress" and on_progress is not None:
                on_progress(event["what"], event["done"], event["total"])
            elif event["event"] in ("result", "error", "bug"):
                result = event
        status = child.wait()
        watch.look()
        seconds = time.monotonic() - started
        if result is None:
            raise crashed(status, what, output)
    if result["event"] == "bug":
        raise WorkerBug(result["traceback"])
    if result["event"] == "error":
        raise ERRORS[result["code"]](result["message"], hint=result["hint"])
    return Outcome(result["value"], seconds, watch.peak or None)


def _spawn(
    function: str,
    arguments: Mapping[str, Any],
    writer: int,
    output: IO[bytes],
    limits: Limits,
    environment: Mapping[str, str],
) -> subprocess.Popen[bytes]:
    job = {
        "function": function,
        "arguments": dict(arguments),
        "events": writer,
        "parent": os.getpid(),
        "limits": asdict(limits),
    }
    try:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "modelops.core.worker"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(writer,),
            start_new_session=True,
            env={**child_environment(), **environment},
        )
    except OSError as error:
        raise from_os_error(error, "can't start a worker") from error
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError), child.stdin as stdin:
        stdin.write(json.dumps(job).encode())
    return child


def child_environment() -> dict[str, str]:
    """The parent's environment, made deterministic, offline and free of what a model could use to steer a runtime."""
    env = {
        key: value for key, value in os.environ.items() if key not in ("ORT_LOAD_CONFIG_FROM_MODEL", "PYTHONSTARTUP")
    }
    package_root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(part for part in (package_root, env.get("PYTHONPATH", "")) if part)
    env.setdefault("HF_HUB_OFFLINE", "1")
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    env.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"modelops-inductor-{os.getuid()}"))
    env["PYTHONHASHSEED"] = "0"
    # With more threads, numpy's sums come out in another order, and what is fitted with them in other bits.
    env["OPENBLAS_NUM_THREADS"] = "1"
    env["OMP_DYNAMIC"] = "false"  # as many threads as were asked for, on however busy a machine
    return env


class _Watch:
    """Looks at the tree's memory and at the clock, and raises beyond a limit."""

    def __init__(self, child: subprocess.Popen[bytes], limits: Limits, what: str, started: float) -> None:
        self.child, self.limits, self.what, self.started = child, limits, what, started
        self.peak = 0

    def look(self) -> None:
        now = sum(resident_bytes(pid) for pid in tree(self.child.pid))
        self.peak = max(self.peak, now)
        most = self.limits.memory_bytes
        if most is not None and now > most:
            raise ResourceExhausted(
                f"{self.what} needs more than {most / 2**30:.1f} GiB of memory, the limit",
                hint="raise it with --memory-limit if the model is to be trusted",
            )
        wall = self.limits.wall_seconds
        if wall is not None and time.monotonic() - self.started > wall:
            raise ResourceExhausted(
                f"{self.what} took longer than {wall:.0f} s, the limit",
                hint="raise it with --time-limit if the model is to be trusted",
            )
        cpu = self.limits.cpu_seconds
        if cpu is not None and sum(_cpu_seconds(pid) for pid in tree(self.child.pid)) > cpu:
            raise ResourceExhausted(
                f"{self.what} took more than {cpu:.0f} s of CPU time, the limit",
                hint="raise it with --time-limit if the model is to be trusted",
            )


def _events(reader: int, child: subprocess.Popen[bytes], watch: _Watch) -> Iterator[dict[str, Any]]:
    """The child's events until it closes its end of the pipe, or dies and leaves children that hold it open."""
    buffer, over = b"", False
    while True:
        ready, _, _ = select.select([reader], [], [], 0 if over else _POLL_SECONDS)
        watch.look()
        if not ready:
            if over:
                return
            # Once more after its end: it may have written between the look at the pipe and the look at it.
            over = child.poll() is not None
            continue
        chunk = os.read(reader, 1 << 16)
        if not chunk:
            return
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            yield json.loads(line)


def crashed(status: int, what: str, output: IO[bytes]) -> ModelOpsError:
    tail = _tail(output)
    if status == -signal.SIGKILL:
        return ResourceExhausted(
            f"{what} was killed from outside, as the kernel does when memory runs out", hint="free some memory"
        )
    if status in (-signal.SIGXCPU, -signal.SIGXFSZ):
        return ResourceExhausted(f"{what} ran into a limit of the system ({signal.Signals(-status).name})")
    if "bad_alloc" in tail or "MemoryError" in tail:
        return ResourceExhausted(f"{what} ran out of memory", hint="raise --memory-limit or free memory")
    name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    last = tail.strip().splitlines()[-1][:300] if tail.strip() else "it printed nothing"
    return StageFailed(f"{what} crashed ({name}): {last}", hint="run it with --debug to see all that it printed")


def _tail(output: IO[bytes]) -> str:
    with contextlib.suppress(OSError):
        output.flush()
        end = output.seek(0, os.SEEK_END)
        output.seek(max(0, end - _LOG_TAIL_BYTES))
        return output.read().decode(errors="replace")
    return ""


def tree(pid: int) -> list[int]:
    """A process and all that descend from it, on Linux; elsewhere the process alone."""
    found, pending = [], [pid]
    while pending:
        current = pending.pop()
        found.append(current)
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{current}/task"):
                with contextlib.suppress(OSError), open(f"/proc/{current}/task/{task}/children") as file:
                    pending.extend(int(child) for child in file.read().split())
    return found


def resident_bytes(pid: int) -> int:
    """The memory that a process holds, pages shared with others included, on Linux; elsewhere 0."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _cpu_seconds(pid: int) -> float:
    """The CPU time of a process and of its children that have ended, on Linux; elsewhere 0."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return 0.0


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill whatever is left of the child's session and tree."""
    for pid in reversed(tree(child.pid)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


_granted: tuple[Limits, float] | None = None


def granted() -> Limits | None:
    """What this worker may still use of what its caller allowed; None outside of workers."""
    if _granted is None:
        return None
    limits, started = _granted
    if limits.wall_seconds is None:
        return limits
    return replace(limits, wall_seconds=max(0.0, limits.wall_seconds - (time.monotonic() - started)))


def main() -> None:
    """The child's side: read a job from standard input, run it, and write events to the pipe that it names."""
    die_with_parent()
    job = json.loads(sys.stdin.buffer.read())
    # The module runs as __main__ here; whoever asks what is granted imports it under its name.
    vars(importlib.import_module("modelops.core.worker"))["_granted"] = (Limits(**job["limits"]), time.monotonic())
    if os.getppid() != job["parent"]:
        os._exit(1)
    with open(job["events"], "wb", buffering=0, closefd=False) as pipe:

        def send(event: Mapping[str, Any]) -> None:
            pipe.write(json.dumps(event, allow_nan=False).encode() + b"\n")

        last = 0.0

        def on_progress(what: str, done: int, total: int | None) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last > 0.1 or done in (0, total):
                last = now
                send({"event": "progress", "what": what, "done": done, "total": total})

        listen(on_progress)
        send(_result(job))
    sys.stdout.flush()
    sys.stderr.flush()
    # Runtimes that are torn down with threads alive crash at exit now and then; the result is already out.
    os._exit(0)


def _result(job: Mapping[str, Any]) -> dict[str, Any]:
    module, _, name = job["function"].partition(":")
    try:
        value = getattr(importlib.import_module(module), name)(**job["arguments"])
        json.dumps(value, allow_nan=False)
    except ModelOpsError as error:
        log.debug("worker failed", exc_info=True)
        traceback.print_exc()
        return {"event": "error", "code": error.code, "message": error.message, "hint": error.hint}
    except MemoryError:
        hint = "raise --memory-limit or free memory"
        return {"event": "error", "code": ResourceExhausted.code, "message": "memory ran out", "hint": hint}
    except OSError as error:
        traceback.print_exc()
        failure = from_os_error(error, "reading or writing")
        return {"event": "error", "code": failure.code, "message": failure.message, "hint": failure.hint}
    except BaseException:
        return {"event": "bug", "traceback": traceback.format_exc()}
    return {"event": "result", "value": value}


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies; elsewhere the parent's own clean-up must do."""
    import ctypes
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    main()
