"""Does bench tell the truth: its latencies beside a plain loop's, and beside onnxruntime's own profiler.

    python benchmarks/agreement.py [--rounds 8] [MODEL.onnx …]

Every round is three fresh processes, one after another in random order: a launch of bench, a loop of ten lines that
calls onnxruntime and nothing else, and the same loop with onnxruntime's profiler on, which times whole runs itself.
What is compared is the median of single runs; the ratio's interval is taken over rounds. Without a model, a small one
and a larger one are made.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from modelops.backends import REGISTRY
from modelops.graphs.describe import signature
from modelops.graphs.seeded import index_bounds, random_feed
from modelops.measures.distributions import t_quantile
from modelops.stages import _speed
from modelops.stages._launch import write_arrays
from modelops.stages._launches import measuring
from modelops.stages._race import Contender

RESULTS = Path(__file__).with_name("results") / "agreement.json"
LOOP = """
import json, statistics, sys, time
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.enable_profiling = sys.argv[3] == "profiled"
options.profile_file_prefix = sys.argv[4]
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feed = {name[1:]: array for name, array in np.load(sys.argv[2]).items()}
spans, end = [], time.perf_counter() + 1.0
while time.perf_counter() < end:
    started = time.perf_counter()
    session.run(None, feed)
    spans.append(time.perf_counter() - started)
found = spans[len(spans) // 3:]
if options.enable_profiling:
    events = json.load(open(session.end_profiling()))
    found = [event["dur"] * 1e-6 for event in events if event.get("name") == "model_run"]
    found = found[len(found) // 3:]
print(1e3 * statistics.median(found))
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


def bench_ms(model: Path, feed: dict[str, Any], seed: int) -> float:
    backend = REGISTRY.load("onnxruntime-cpu").parse({"threads": 1})
    with measuring([Contender("model", backend, model)], feed, seed=seed) as measurement:
        measurement.launch(2.0)
    return _speed.latency(measurement.records, "model").values["p50"]


def loop_ms(model: Path, feed: Path, kind: str, folder: Path) -> float:
    command = [sys.executable, "-c", LOOP, str(model), str(feed), kind, str(folder / "profile")]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def compare(model: Path, rounds: int, folder: Path) -> dict[str, Any]:
    """One row: medians of all three, and bench's ratio to each of the others with its 95 % interval."""
    feed = random_feed(signature(model), 8, 0, bounds=index_bounds(model))
    path = folder / "feed.npz"
    write_arrays(path, feed)
    rng = random.Random(0)
    found: dict[str, list[float]] = {"bench": [], "loop": [], "profiled": []}
    for number in range(rounds):
        for kind in rng.sample(list(found), 3):
            found[kind].append(bench_ms(model, feed, number) if kind == "bench" else loop_ms(model, path, kind, folder))
    row: dict[str, Any] = {"model": model.name, "rounds": rounds}
    row |= {f"{kind}_ms": statistics.median(values) for kind, values in found.items()}
    for kind in ("loop", "profiled"):
        ratios = [math.log(a / b) for a, b in zip(found["bench"], found[kind], strict=True)]
        half = t_quantile(0.975, rounds - 1) * statistics.stdev(ratios) / math.sqrt(rounds)
        mean = statistics.fmean(ratios)
        row[f"to_{kind}"] = [math.exp(x) for x in (mean - half, mean, mean + half)]
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = options.models
        if not models:
            models = [folder / "small.onnx", folder / "larger.onnx"]
            for path, width in zip(models, (128, 1024), strict=True):
                write_model(path, width)
        for model in models:
            rows.append(compare(model, max(3, options.rounds), folder))
    print(f"{'model':<14} {'bench ms':>9} {'loop ms':>9} {'profiler ms':>11}  bench / loop           bench / profiler")
    for row in rows:
        shown = [f"{row[key][1]:.3f} ({row[key][0]:.3f} to {row[key][2]:.3f})" for key in ("to_loop", "to_profiled")]
        print(f"{row['model']:<14} {row['bench_ms']:>9.4f} {row['loop_ms']:>9.4f} {row['profiled_ms']:>11.4f}  "
              f"{shown[0]:<22} {shown[1]}")  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
