"""The process that runs one model and times it, and does nothing else: ``python -m modelops.stages._launch``.

It is told what to do by one JSON line at a time on standard input, and answers each with one on a pipe of its own:

========  =============================================================================================
ready     import the runtime, and build the model where it is a source: several processes may do so at a time
open      load the model, run it once; seconds, memory, what the session really uses
warm      run until block times are steady; whether they became so, and how many inferences a block needs
time      run a block of n inferences; wall, CPU and device time, single latencies, whether outputs held
check     run once and compare every output, wholly, with the first inference's
save      write the outputs that are numbers to an .npz file
many      n inferences on each of c threads at once; wall time
profile   how long each node takes, by the runtime's own profiler
========  =============================================================================================

Only the runtime, numpy and the standard library are imported here, so that what is timed is the model.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from modelops.backends import REGISTRY, Call, Session
from modelops.core.worker import die_with_parent
from modelops.errors import ModelOpsError, StageFailed, tool

# Of the single latencies in a block this many are kept, evenly spaced, so that evidence stays small.
_LATENCIES_KEPT = 32
# Outputs are compared after every block as far as that takes no longer than the block.
_QUICK_LOOK = 4096
# How far an output may move from run to run, by its largest value: threads add in changing order.
_DRIFT = 1e-2


class Child:
    """The answers to the commands, for one model on one backend."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.job = job
        self.repeat = 1.0 + float(job["inflate"])
        self.backend = REGISTRY.load(job["backend"]["name"]).parse(
            {key: value for key, value in job["backend"].items() if key != "name"}
        )
        self.feed = read_arrays(Path(job["feed"]))
        self.model: Any = None
        self.import_seconds = 0.0
        self.before: dict[str, int] = {}
        self.session: Session
        self.call: Call
        self.held: Held
        self.code_executed: list[Mapping[str, str]] = []

    def ready(self) -> dict[str, Any]:
        started = time.perf_counter()
        if self.backend.library:
            with tool(self.backend.library):
                importlib.import_module(self.backend.library)
        self.import_seconds = time.perf_counter() - started
        self.before = memory_bytes()
        self.model = self._module() if self.backend.opens == "module" else Path(self.job["model"])
        return {}

    def open(self) -> dict[str, Any]:
        if self.model is None:
            self.ready()
        opened = time.perf_counter()
        self.session = self.backend.open(self.model)
        loaded = time.perf_counter()
        after = memory_bytes()
        with tool(self.backend.name):
            self.call = self.session.prepare(self.feed)
            ready = time.perf_counter()
            outputs = self.call.outputs(self.call.once())
            first = time.perf_counter()
        self.held = Held(outputs)
        if self.job["expected"]:
            self.held = Held(read_arrays(Path(self.job["expected"])))
        changed = self.held.changed(outputs, quick=False)
        gc.collect()
        gc.freeze()
        gc.disable()
        return {
            "import_seconds": self.import_seconds,
            "load_seconds": loaded - opened,
            "first_seconds": first - ready,
            "memory_before_load_bytes": self.before["now"],
            "memory_after_load_bytes": after["now"],
            "facts": self.session.facts(),
            "outputs": self.held.described(),
            "changed": changed,
            "code_executed": self.code_executed,
            "cpus": cpus(),
        }

    def _module(self) -> Any:
        from modelops.stages._source_model import open_module

        module, executed = open_module(self.job["model"])
        self.code_executed = list(executed)
        return module

    def warm(self, least_seconds: float, most_seconds: float, block_seconds: float) -> dict[str, Any]:
        """Run for at least that long and three inferences, then until block times are steady, or the most is over."""
        started = time.perf_counter()
        count, best = 0, math.inf
        while count < 3 or time.perf_counter() - started < least_seconds:
            stamps, _, _ = self._block(1)
            best = min(best, (stamps[-1] - stamps[0]) * 1e-9)
            count += 1
            if time.perf_counter() - started > most_seconds:
                break
        n = max(1, math.ceil(block_seconds / max(best, 1e-9)))
        blocks: list[float] = []
        steady: bool | None = None
        while True:
            expected = (time.perf_counter() - started) + (10 - len(blocks)) * n * best
            if len(blocks) < 10 and expected > 2 * most_seconds:
                break  # too slow a model to tell: neither steady nor unsteady
            stamps, _, _ = self._block(n)
            blocks.append((stamps[-1] - stamps[0]) * 1e-9)
            count += n
            if len(blocks) >= 10:
                late, early = statistics.median(blocks[-5:]), statistics.median(blocks[-10:-5])
                steady = abs(late / early - 1) <= 0.03
                if steady or time.perf_counter() - started > most_seconds:
                    break
        one = statistics.median(blocks[-5:]) / n if blocks else best
        return {
            "n": max(1, math.ceil(block_seconds / max(one, 1e-9))),
            "one_seconds": one,
            "steady": steady,
            "inferences": count,
            "seconds": time.perf_counter() - started,
        }

    def time(self, n: int) -> dict[str, Any]:
        really = round(n * self.repeat)
        for _ in range(n // 8):  # the other model was just here: fill the caches again
            self.call.once()
        stop = self.call.timer() if self.call.timer else None
        stamps, cpu, last = self._block(really)
        device = stop() if stop else None
        step = max(1, really // _LATENCIES_KEPT)
        return {
            "n": n,
            "wall_ns": stamps[-1] - stamps[0],
            "cpu_ns": cpu,
            "device_ns": device,
            "latencies_ns": [stamps[i + 1] - stamps[i] for i in range(0, really, step)][:_LATENCIES_KEPT],
            "outputs": self.held.changed(self.call.outputs(last), quick=True),
            "cpus": cpus(),
        }

    def _block(self, n: int) -> tuple[list[int], int, Any]:
        """When each of n inferences ended (the first entry is the start), CPU time, and the last one's outputs."""
        once, clock = self.call.once, time.perf_counter_ns
        stamps = [0] * (n + 1)
        last = None
        cpu = time.process_time_ns()
        stamps[0] = clock()
        for i in range(1, n + 1):
            last = once()
            stamps[i] = clock()
        return stamps, time.process_time_ns() - cpu, last

    def check(self) -> dict[str, Any]:
        outputs = self.call.outputs(self.call.once())
        return {"outputs": self.held.changed(outputs, quick=False)}

    def end(self) -> dict[str, Any]:
        """What only the end tells: memory, and a device's clocks. The session stays open; the process is killed."""
        memory = memory_bytes()
        return {
            "memory_peak_bytes": memory["peak"],
            "memory_now_bytes": memory["now"],
            "device_memory_bytes": self.session.device_memory_bytes(),
            "device_after": self.session.facts().get("device"),
        }

    def save(self, path: str) -> dict[str, Any]:
        outputs = self.call.outputs(self.call.once())
        write_arrays(Path(path), {name: array for name, array in outputs.items() if array.dtype.kind in "fiub"})
        return {}

    def profile(self, runs: int, scratch: str) -> dict[str, Any]:
        """How long each node takes; ``nodes`` is None where the runtime does not tell."""
        found = self.backend.profile(Path(self.job["model"]), self.feed, Path(scratch), runs)
        return {"nodes": None if found is None else [asdict(node) for node in found]}

    def many(self, n: int, threads: int) -> dict[str, Any]:
        """n inferences on each of several threads that share the session."""
        calls = [self.session.prepare(self.feed) for _ in range(threads)]
        gate = threading.Barrier(threads + 1)
        failures: list[BaseException] = []

        def loop(once: Callable[[], Any]) -> None:
            gate.wait()
            try:
                for _ in range(n):
                    once()
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=loop, args=(call.once,), daemon=True) for call in calls]
        for worker in workers:
            worker.start()
        gate.wait()
        started = time.perf_counter_ns()
        for worker in workers:
            worker.join()
        wall = time.perf_counter_ns() - started
        if failures:
            raise failures[0]
        return {"n": n, "threads": threads, "wall_ns": wall}


class Held:
    """Outputs that are right, which those of every inference must equal as far as summation order allows."""

    def __init__(self, outputs: Mapping[str, Any]) -> None:
        import numpy as np

        self.first = {name: np.array(array) for name, array in outputs.items()}
        for name, array in self.first.items():
            if array.dtype.kind == "f" and np.isnan(array).any():
                raise StageFailed(
                    f"output {name!r} holds NaN on the input that is timed",
                    hint="modelops validate finds out where from",
                )

    def described(self) -> dict[str, Any]:
        import zlib

        return {
            name: {"dtype": str(array.dtype), "shape": list(array.shape), "crc32": zlib.crc32(array.tobytes())}
            for name, array in self.first.items()
        }

    def changed(self, outputs: Mapping[str, Any], *, quick: bool) -> str:
        """What differs from the right outputs, in words; empty when nothing does.

        ``quick`` looks at no more than some thousand values of each output, evenly spread.
        """
        import numpy as np

        for name, first in self.first.items():
            if name not in outputs:
                return f"{name} is not there"
            now = np.asarray(outputs[name])
            if now.shape != first.shape or now.dtype != first.dtype:
                return f"{name} was {first.dtype}{list(first.shape)} and is {now.dtype}{list(now.shape)}"
            if first.dtype.kind not in "fiub":
                continue
            step = max(1, first.size // _QUICK_LOOK) if quick else 1
            a, b = first.reshape(-1)[::step], now.reshape(-1)[::step]
            if first.dtype.kind != "f":
                if not np.array_equal(a, b):
                    return f"{name} changed from run to run"
                continue
            if np.isnan(b).any():
                return f"{name} turned NaN"
            finite = np.isfinite(a)
            if not np.array_equal(a[~finite], b[~finite]) or not np.isfinite(b[finite]).all():
                return f"{name} turned infinite"
            a, b = a[finite].astype(np.float64), b[finite].astype(np.float64)
            if a.size and float(np.abs(a - b).max()) > _DRIFT * max(float(np.abs(a).max()), 1e-30):
                return f"{name} changed from run to run by {float(np.abs(a - b).max()):.3g}"
        return ""


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays by name as an .npz file that is read without pickle: texts get a fixed width."""
    import numpy as np

    # The sign keeps names apart from the parameters of savez.
    np.savez(path, **{f"={name}": a.astype(str) if a.dtype.kind == "O" else a for name, a in arrays.items()})


def read_arrays(path: Path) -> dict[str, Any]:
    """The arrays that ``write_arrays`` wrote."""
    import numpy as np

    with np.load(path, allow_pickle=False) as arrays:
        return {name[1:]: arrays[name] for name in arrays.files}


def memory_bytes() -> dict[str, int]:
    """This process's resident memory now, and the most it ever was."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"now": most, "peak": most}
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {"now": int(fields["VmRSS"].split()[0]) * 1024, "peak": int(fields["VmHWM"].split()[0]) * 1024}


def cpus() -> list[int]:
    """The CPUs that this process may run on; empty where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def main() -> None:
    """Read the job from the first line of standard input, then obey until it is closed."""
    die_with_parent()
    job = json.loads(sys.stdin.buffer.readline())
    if os.getppid() != job["parent"]:
        os._exit(1)
    with open(job["answers"], "wb", buffering=0, closefd=False) as answers:
        child: Child | None = None
        for line in sys.stdin.buffer:
            command = json.loads(line)
            if child is None:
                child, answer = _started(job)
                if child is None:
                    _send(answers, answer)
                    break
            verb = command.pop("do")
            _send(answers, _answered(getattr(child, verb), command))
    os._exit(0)  # a runtime that is torn down with threads alive crashes now and then


def _started(job: Mapping[str, Any]) -> tuple[Child | None, dict[str, Any]]:
    try:
        return Child(job), {}
    except ModelOpsError as error:
        return None, {"error": error.to_dict()}


def _answered(verb: Callable[..., dict[str, Any]], arguments: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return verb(**arguments)
    except ModelOpsError as error:
        return {"error": error.to_dict()}
    except MemoryError:
        return {"error": {"code": "resource-exhausted", "message": "memory ran out", "hint": "free some memory"}}
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        message = f"the model failed while it was timed: {type(error).__name__}: {text}"
        return {"error": {"code": StageFailed.code, "message": message, "hint": "run it with --debug to see more"}}


def _send(answers: IO[bytes], answer: Mapping[str, Any]) -> None:
    data = json.dumps(answer).encode() + b"\n"
    while data:
        data = data[answers.write(data) :]


if __name__ == "__main__":
    main()
