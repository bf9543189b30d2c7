"""How long it takes to calibrate and write an int8 model, with 128 samples, beside onnxruntime's own quantizers.

    python benchmarks/calibration_time.py [--rounds 1] [--cases "ResNet-50 static" …] [--seconds 200]

Every case is a process of its own, in the environment of a stage's worker, with an empty cache. What is timed is the
method alone, without imports, and without the checks of accuracy and speed, which `modelops quantize` reports as lines
of their own. ResNet-50 has random weights (results/models/resnet50.onnx, written once), MiniLM is examples/minilm
(results/models/minilm, converted once). Results are added to results/calibration_time.jsonl; the exit code is 1 when a
time of ours is above its limit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from calibration_memory import RESULTS, Bench, Reader, resnet50

from modelops.core.worker import child_environment

ROOT = Path(__file__).resolve().parents[1]
RECORDS = RESULTS / "calibration_time.jsonl"
MINILM, SENTENCES = RESULTS / "models" / "minilm", ROOT / "examples" / "minilm" / "data" / "calibration.jsonl"
SAMPLES = 128
# The case, and the seconds that ours may take.
CASES = {
    "ResNet-50 static": 18.0,
    "MiniLM static": 10.0,
    "MiniLM dynamic": 10.0,
    "MiniLM dynamic, plain": 10.0,
    "ResNet-50 onnxruntime static": None,
    "MiniLM onnxruntime dynamic": None,
}


def one(case: str, folder: Path) -> float:
    """The seconds of one case, here."""
    name, _, method = case.partition(" ")
    source = resnet50(RESULTS / "models" / "resnet50.onnx") if name == "ResNet-50" else MINILM / "model.onnx"
    target = folder / "out.onnx"
    if method.startswith("onnxruntime"):
        from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static

        started = time.perf_counter()
        if method.endswith("dynamic"):
            quantize_dynamic(str(source), str(target), per_channel=True)
        else:
            reader = Reader(SAMPLES)
            quantize_static(str(source), str(target), reader, per_channel=True, activation_type=QuantType.QUInt8)
        return time.perf_counter() - started
    from modelops.core.artifact import Artifact
    from modelops.quantizers.dynamic import Dynamic
    from modelops.quantizers.static import Static
    from modelops.stages._workbench import SampleBench

    (folder / "scratch").mkdir()
    bench: Any = Bench(folder / "scratch", SAMPLES)
    if name == "MiniLM":
        bench = SampleBench(Artifact.open(MINILM), folder / "scratch", SENTENCES, None, SAMPLES, 8)
    off: Any = {"migrate": False, "outliers": False, "compensate": False, "correct_bias": False}
    chosen: Any = Static() if method == "static" else Dynamic(**(off if method.endswith("plain") else {}))
    started = time.perf_counter()
    chosen.quantize(source, target, bench)
    return time.perf_counter() - started


def measured(case: str) -> dict[str, Any]:
    """One case in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="modelops-time-") as folder:
        env = child_environment() | {"MODELOPS_CACHE": str(Path(folder) / "cache")}
        words = [sys.executable, __file__, "--one", case, folder]
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    seconds = float(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    return {"case": case, "seconds": seconds, "problem": "" if seconds else done.stderr[-300:]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no case after this time")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(one(options.one[0], Path(options.one[1])))
        return 0
    started = time.perf_counter()
    for case in options.cases * options.rounds:
        if time.perf_counter() - started < options.seconds:
            with RECORDS.open("a") as file:
                file.write(json.dumps(measured(case)) + "\n")
    return report([json.loads(line) for line in RECORDS.read_text().splitlines()])


def report(done: list[dict[str, Any]]) -> int:
    problems = 0
    print(f"{'case':30} {'runs':>4} {'seconds':>8} {'limit':>6}")
    for case, limit in CASES.items():
        times = [item["seconds"] for item in done if item["case"] == case and item["seconds"] is not None]
        broken = [item["problem"] for item in done if item["case"] == case and item["problem"]]
        if times:
            middle = statistics.median(times)
            problems += limit is not None and middle > limit
            print(f"{case:30} {len(times):4} {middle:8.1f} {limit or '':>6}")
        problems += len(broken)
        print(*(f"{case}: {text}" for text in broken), sep="\n", end="\n" if broken else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
