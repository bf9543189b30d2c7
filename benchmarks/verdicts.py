"""The promise of `modelops bench A --against B`, tried live: does it cry wolf, and does it find a slow-down?

    python benchmarks/verdicts.py [--runs 100] [--experiment identical …] [--seconds 3600]

===============  ======================================================  ========================================
experiment       what is compared                                        the promise, in 100 (30 for others) runs
===============  ======================================================  ========================================
identical        a model and a byte-identical copy                       no FAIL: below 3 % at 95 % confidence
identical-busy   the same, beside a process that keeps one CPU busy      no FAIL
slower-5         A does 5 % more inferences than it reports              FAIL in at least 29 of 30
slower-2         the same with 2 %                                       FAIL in at most 1 of 30
swapped-5        B is the slower one                                     no FAIL, the opposite ratio
identical-20ms   a model of about 20 ms and a copy, all threads          PASS, typically within 30 s
===============  ======================================================  ========================================

Every run is added to benchmarks/results/verdicts.jsonl at once: interrupt it, and go on later with the same command.
Runs of the experiments take turns. A slow-down is made of whole inferences, so block sizes are multiples of 100.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modelops.backends import REGISTRY
from modelops.errors import ModelOpsError
from modelops.measures.distributions import proportion_bounds
from modelops.stages._race import Contender, Plan, race

RESULTS = Path(__file__).with_name("results") / "verdicts.jsonl"
WIDTH = 192
WIDE, ROWS = 1024, 64


@dataclass(frozen=True)
class Experiment:
    """By how much which side is slowed down, and whether there is a busy neighbour.

    ``slow`` takes the model of 20 ms, on as many threads as there are.
    """

    name: str
    runs: int
    a: float = 0.0
    b: float = 0.0
    busy: bool = False
    slow: bool = False


EXPERIMENTS = [
    Experiment("identical", 100),
    Experiment("identical-busy", 100, busy=True),
    Experiment("slower-5", 30, a=0.05),
    Experiment("slower-2", 30, a=0.02),
    Experiment("swapped-5", 30, b=0.05),
    Experiment("identical-20ms", 30, slow=True),
]


def write_model(path: Path, layers: int = 4, width: int = WIDTH) -> None:
    """Square layers: four of the usual width take about a tenth of a millisecond on one thread."""
    from onnx import TensorProto, helper, numpy_helper, save

    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for layer in range(layers):
        array = rng.normal(0, 1.4 / math.sqrt(width), (width, width)).astype(np.float32)
        weights.append(numpy_helper.from_array(array, f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [value, f"w{layer}"], [f"h{layer}"]))
        value = "y" if layer == layers - 1 else f"r{layer}"
        nodes.append(helper.make_node("Relu", [f"h{layer}"], [value]))
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", width])],
        weights,
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def write_slow_model(path: Path) -> None:
    """As many wide layers as take about 20 ms on all threads of this machine, on a feed of ``ROWS`` rows."""
    write_model(path, layers=2, width=WIDE)
    feed = {"x": np.ones((ROWS, WIDE), np.float32)}
    with REGISTRY.load("onnxruntime-cpu").parse({}).open(path) as session:
        once = session.prepare(feed).once
        spans = []
        for _ in range(50):
            started = time.perf_counter()
            once()
            spans.append(time.perf_counter() - started)
    write_model(path, layers=max(2, round(0.020 / (statistics.median(spans) / 2))), width=WIDE)


@contextmanager
def neighbour(busy: bool) -> Iterator[None]:
    """A process that computes without end while the block runs."""
    process = subprocess.Popen([sys.executable, "-c", "while True: sum(range(10000))"]) if busy else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def once(experiment: Experiment, seed: int, models: tuple[Path, Path], budget: float) -> dict[str, Any]:
    """One verdict, as a line of the results."""
    backend = REGISTRY.load("onnxruntime-cpu").parse({"threads": 0 if experiment.slow else 1})
    a = Contender("A", backend, models[0], inflate=experiment.a)
    b = Contender("B", backend, models[1], inflate=experiment.b)
    shape = (ROWS, WIDE) if experiment.slow else (8, WIDTH)
    feed = {"x": np.random.default_rng(seed).normal(size=shape).astype(np.float32)}
    plan = Plan() if experiment.slow else Plan(multiple=100)
    line: dict[str, Any] = {"experiment": experiment.name, "seed": seed}
    started = time.monotonic()
    with neighbour(experiment.busy):
        try:
            result = race(a, b, feed, budget_seconds=budget, seed=seed, plan=plan)
        except ModelOpsError as error:
            return {**line, "verdict": "error", "message": error.message, "seconds": time.monotonic() - started}
    verdict = result.verdict
    return {
        **line,
        "verdict": verdict.verdict,
        "ratio": verdict.ratio,
        "low": verdict.low,
        "high": verdict.high,
        "launches": verdict.launches,
        "seconds": round(result.seconds, 2),
        "busy": result.records[0]["busy"],
    }


def table(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each experiment that has runs."""
    rows = []
    for experiment in EXPERIMENTS:
        mine = [line for line in lines if line["experiment"] == experiment.name]
        if not mine:
            continue
        count = {verdict: sum(line["verdict"] == verdict for line in mine) for verdict in VERDICTS}
        ratios = [math.log(line["ratio"]) for line in mine if line.get("ratio")]
        rows.append(
            {
                "experiment": experiment.name,
                "runs": len(mine),
                **count,
                "fail_low": proportion_bounds(count["fail"], len(mine))[0],
                "fail_high": proportion_bounds(count["fail"], len(mine))[1],
                "ratio": math.exp(statistics.median(ratios)) if ratios else None,
                "launches": statistics.median(line.get("launches", 0) for line in mine),
                "seconds": statistics.median(line["seconds"] for line in mine),
                "within_30_s": sum(line["seconds"] <= 30 for line in mine),
            }
        )
    return rows


VERDICTS = ("pass", "fail", "inconclusive", "error")


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'experiment':<15} {'runs':>4} {'pass':>5} {'fail':>5} {'incl':>5} {'err':>4} "
          f"{'P(fail), 95 % bounds':>21} {'ratio':>7} {'launches':>8} {'seconds':>7} {'<=30 s':>6}")  # fmt: skip
    for row in rows:
        bounds = f"{row['fail_low']:.1%} to {row['fail_high']:.1%}"
        ratio = f"{row['ratio']:.4f}" if row["ratio"] else ""
        print(f"{row['experiment']:<15} {row['runs']:>4} {row['pass']:>5} {row['fail']:>5} {row['inconclusive']:>5} "
              f"{row['error']:>4} {bounds:>21} {ratio:>7} {row['launches']:>8g} {row['seconds']:>7.1f} "
              f"{row['within_30_s']:>6}")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [experiment.name for experiment in EXPERIMENTS]
    parser.add_argument("--runs", type=int, help="runs of each experiment; by default those of the promise")
    parser.add_argument("--experiment", choices=names, action="append", help="only this one; repeatable")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no run after this time")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of each verdict")
    parser.add_argument("--show", action="store_true", help="only print the table of what is there")
    options = parser.parse_args()

    RESULTS.parent.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    chosen = [one for one in EXPERIMENTS if one.name in (options.experiment or names)]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        models = {slow: (Path(folder) / f"a{slow}.onnx", Path(folder) / f"b{slow}.onnx") for slow in (False, True)}
        if not options.show:
            write_model(models[False][0])
            shutil.copyfile(*models[False])
        if not options.show and any(one.slow for one in chosen):
            write_slow_model(models[True][0])
            shutil.copyfile(*models[True])
        for number in range(0 if options.show else max(options.runs or one.runs for one in chosen)):
            for experiment in chosen:
                done = sum(line["experiment"] == experiment.name for line in lines)
                over = time.monotonic() - started > options.seconds
                if over or number >= (options.runs or experiment.runs) or done > number:
                    continue
                line = once(experiment, seed=number, models=models[experiment.slow], budget=options.budget)
                lines.append(line)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{line['experiment']} {number}: {line['verdict']} in {line['seconds']:.0f} s", file=sys.stderr)
    rows = table(lines)
    show(rows)
    RESULTS.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
