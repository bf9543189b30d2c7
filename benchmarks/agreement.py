"""Does bench tell the truth: its latencies beside a plain loop's and beside onnxruntime's own profiler, by turns.

    python benchmarks/agreement.py [--rounds 8] [--seconds 600] [MODEL.onnx …]

Every round is three fresh processes: a launch of bench; a loop that calls onnxruntime and nothing else; and the same
loop with onnxruntime's profiler on, which times whole runs itself. After each of bench's blocks both loops run a block
of as many inferences, while all others stand still, so that whatever else the machine does meets all of them alike.
What is compared is the median inference of a block with that of the block next to it: a round gives the median of
these ratios, and the interval is taken over rounds. Profiling a node costs time of its own (on small models much), so
the profiler is also held against the clock of the very loop that it runs in.

The last line is what bench itself adds to a model of 20 microseconds: the null backend, which is busy for that long
by the clock and does nothing else.

Without a model, a small one and a larger one are made. Each round is added to benchmarks/results/agreement.jsonl at
once, so that the script can be interrupted and run again; --again forgets what is there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from modelops.backends import REGISTRY
from modelops.graphs.describe import signature
from modelops.graphs.seeded import index_bounds, random_feed
from modelops.measures.distributions import t_quantile
from modelops.stages import _speed
from modelops.stages._launch import write_arrays
from modelops.stages._launches import Plan, measuring
from modelops.stages._race import Contender

RESULTS = Path(__file__).with_name("results") / "agreement.jsonl"
OVERHEAD = "null, 20 us"
LOOP = """
import json, sys, time
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.enable_profiling = sys.argv[3] == "profiled"
options.profile_file_prefix = sys.argv[4]
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feed = {name[1:]: array for name, array in np.load(sys.argv[2]).items()}
session.run(None, feed)
print("ready", flush=True)
for line in sys.stdin:
    n = int(line)
    if not n:
        break
    for _ in range(n // 8):  # another process was just here: fill the caches again
        session.run(None, feed)
    spans = []
    for _ in range(n):
        started = time.perf_counter()
        session.run(None, feed)
        spans.append(time.perf_counter() - started)
    print(json.dumps(spans), flush=True)
if options.enable_profiling:
    events = json.load(open(session.end_profiling()))
    print(json.dumps([event["dur"] * 1e-6 for event in events if event.get("name") == "model_run"]), flush=True)
"""


def write_model(path: Path, width: int) -> None:
    """Four square layers of that width."""
    from onnx import TensorProto, helper, numpy_helper, save

    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.normal(0, 0.05, (width, width)).astype(np.float32), f"w{i}") for i in range(4)
    ]
    nodes = [
        helper.make_node("MatMul", [f"h{i}" if i else "x", f"w{i}"], [f"h{i + 1}" if i < 3 else "y"]) for i in range(4)
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name in "xy")
    graph = helper.make_graph(nodes, "layers", [x], [y], weights)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


class Loop:
    """The plain loop in a process of its own; it stands still until it is asked for a block."""

    def __init__(self, model: Path, feed: Path, kind: str, folder: Path) -> None:
        command = [sys.executable, "-c", LOOP, str(model), str(feed), kind, str(folder / "profile")]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin and self._process.stdout
        self._told, self._answers = self._process.stdin, self._process.stdout
        self._answers.readline()
        self.spans: list[list[float]] = []

    def block(self, n: int) -> None:
        print(n, file=self._told, flush=True)
        self.spans.append(json.loads(self._answers.readline()))

    def profiled(self) -> list[list[float]]:
        """What onnxruntime's profiler says of the runs of every block, without those that only filled the caches."""
        print(0, file=self._told, flush=True)
        events = json.loads(self._answers.readline())[1:]
        found = []
        for spans in self.spans:
            events = events[len(spans) // 8 :]
            found.append(events[: len(spans)])
            events = events[len(spans) :]
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def loops(model: Path, feed: Path, folder: Path) -> Iterator[tuple[Loop, Loop]]:
    plain, profiled = Loop(model, feed, "plain", folder), Loop(model, feed, "profiled", folder)
    try:
        yield plain, profiled
    finally:
        plain.close()
        profiled.close()


def medians(blocks: list[list[float]]) -> list[float]:
    return [1e3 * statistics.median(block) for block in blocks]


def between(a: list[float], b: list[float]) -> float:
    """The median over neighbouring blocks of log(a / b)."""
    return statistics.median(math.log(x / y) for x, y in zip(a, b, strict=True))


def once(model: Path, feed: dict[str, Any], path: Path, seed: int, folder: Path) -> dict[str, Any]:
    """One round, as a line of the results."""
    backend, rng = REGISTRY.load("onnxruntime-cpu").parse({"threads": 1}), random.Random(seed)
    with (
        loops(model, path, folder) as (plain, profiled),
        measuring([Contender("model", backend, model)], feed, seed=seed) as measurement,
    ):

        def turns() -> None:
            for loop in rng.sample((plain, profiled), 2):
                loop.block(measurement.n["model"])

        measurement.on_block = turns
        measurement.launch(4.0)
        events = medians(profiled.profiled())
    bench = medians(
        [[ns * 1e-9 for ns in block["latencies_ns"]] for block in _speed.blocks(measurement.records, "model")]
    )
    loop, own = medians(plain.spans), medians(profiled.spans)
    return {
        "model": model.name,
        "blocks": len(bench),
        "bench_ms": statistics.median(bench),
        "loop_ms": statistics.median(loop),
        "profiler_ms": statistics.median(events),
        "bench / loop": between(bench, loop),
        "bench / profiler": between(bench, events),
        "profiler / its loop": between(events, own),
    }


def overhead(seed: int, folder: Path) -> dict[str, Any]:
    """The time of a block over what the null backend was busy for by the clock."""
    path = folder / "null.onnx"
    write_model(path, 8)
    contender = Contender("null", REGISTRY.load("null").parse({"microseconds": 20.0}), path)
    with measuring(
        [contender], {"x": np.ones((1, 8), np.float32)}, seed=seed, plan=Plan(rounds=60, most_rounds=60)
    ) as measurement:
        measurement.launch(4.0)
    found = [block["wall_ns"] / block["n"] / 20_000 for block in _speed.blocks(measurement.records, "null")]
    return {"model": OVERHEAD, "blocks": len(found), "block / model": math.log(statistics.median(found))}


def summary(lines: list[dict[str, Any]], key: str) -> tuple[float, float, float] | None:
    """The mean ratio over rounds with its 95 % interval; None for fewer than three rounds."""
    values = [line[key] for line in lines]
    if len(values) < 3:
        return None
    half = t_quantile(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return math.exp(mean - half), math.exp(mean), math.exp(mean + half)


def show(lines: list[dict[str, Any]]) -> None:
    for model in dict.fromkeys(line["model"] for line in lines):
        mine = [line for line in lines if line["model"] == model]
        times = [
            f"{key[:-3]} {statistics.median(line[key] for line in mine):.4f} ms" for key in mine[0] if "_ms" in key
        ]
        print(f"{model}: {len(mine)} rounds of {mine[0]['blocks']} blocks" + "".join(f", {text}" for text in times))
        for key in (key for key in mine[0] if "/" in key):
            found = summary(mine, key)
            print(
                f"  {key:<20} " + (f"{found[1]:.4f} ({found[0]:.4f} to {found[2]:.4f})" if found else "too few rounds")
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no round after this time")
    parser.add_argument("--again", action="store_true", help="forget the rounds that are there")
    parser.add_argument("--show", action="store_true", help="only print what is there")
    options = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    if options.again:
        RESULTS.unlink(missing_ok=True)
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = options.models or [folder / "small.onnx", folder / "larger.onnx"]
        jobs: dict[str, Callable[[int], dict[str, Any]]] = {}
        for model, width in zip(models, (128, 1024) if not options.models else (0,) * len(models), strict=True):
            if width:
                write_model(model, width)
            feed = random_feed(signature(model), 8 if width else 1, 0, bounds=index_bounds(model))
            path = folder / f"{model.stem}.npz"
            write_arrays(path, feed)
            jobs[model.name] = lambda seed, model=model, feed=feed, path=path: once(model, feed, path, seed, folder)
        jobs[OVERHEAD] = lambda seed: overhead(seed, folder)
        for number in range(0 if options.show else options.rounds):
            for model, job in jobs.items():
                done = sum(line["model"] == model for line in lines)
                if time.monotonic() - started > options.seconds or done > number:
                    continue
                lines.append(job(number))
                with RESULTS.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
    show(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
