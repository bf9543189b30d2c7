"""Every scheme of quantization on every kind of graph at every opset from 13 to 23: what comes out, and how near it is.

    python benchmarks/covering.py [--seconds 1800] [--schemes dynamic "static auto" …]

The graphs are the tiny ones of tests/quantizers/covering_graphs.py. Every case ends in a model that onnxruntime runs,
with its signal over noise, or in a refusal with its reason; anything else is a problem, and makes the exit code 1.
Finished cases are kept in results/covering.jsonl and not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "quantizers"))

from covering_graphs import ALL_OPSETS, KINDS, SCHEMES  # noqa: E402
from quantizer_models import Bench, sqnr  # noqa: E402

from modelops.errors import GateFailed, InputRefused  # noqa: E402
from modelops.graphs import runs  # noqa: E402
from modelops.quantizers import REGISTRY  # noqa: E402

RECORDS = Path(__file__).with_name("results") / "covering.jsonl"


def case(scheme: str, kind: str, opset: int, folder: Path) -> dict[str, Any]:
    """What becomes of one case: its least signal over noise in dB, the reason of a refusal, or a problem."""
    record: dict[str, Any] = {"scheme": scheme, "kind": kind, "opset": opset}
    try:
        source, data = KINDS[kind](opset, folder / "float.onnx")
        name, _, rule = scheme.partition(" ")
        options: dict[str, Any] = {"ranges": rule} if rule else {}
        options |= {"block_size": 16} if name == "weights" else {}
        target = folder / "model.onnx"
        REGISTRY.load(name).parse(options).quantize(source, target, Bench(folder, data, batch=4))
        with runs.session(source) as before, runs.session(target) as after:
            wanted, found = runs.run(before, data), runs.run(after, data)
        finite = all(np.isfinite(array).all() for array in found.values())
        least = min(float(sqnr(array, found[name])) for name, array in wanted.items())
        return {**record, "sqnr": least, "problem": "" if finite else "NaN or infinity"}
    except (GateFailed, InputRefused) as error:
        return {**record, "refused": error.message, "problem": ""}
    except Exception as error:
        return {**record, "problem": f"{type(error).__name__}: {error}"[:300]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800.0, help="start no case after this time")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    options = parser.parse_args()
    RECORDS.parent.mkdir(exist_ok=True)
    done = [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.is_file() else []
    known = {(item["scheme"], item["kind"], item["opset"]) for item in done}
    started = time.perf_counter()
    for one in ((scheme, kind, opset) for scheme in options.schemes for kind in KINDS for opset in ALL_OPSETS):
        if one in known or time.perf_counter() - started > options.seconds:
            continue
        with tempfile.TemporaryDirectory(prefix="modelops-covering-") as folder:
            done.append(case(*one, Path(folder)))
        with RECORDS.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
    return report(done)


def report(done: list[dict[str, Any]]) -> int:
    print(f"{'scheme':20} {'cases':>5} {'refused':>7} {'problems':>8} {'least dB':>8} {'median':>7}")
    for scheme in SCHEMES:
        cases = [item for item in done if item["scheme"] == scheme]
        values = [item["sqnr"] for item in cases if "sqnr" in item]
        figures = f"{min(values):8.1f} {float(np.median(values)):7.1f}" if values else ""
        problems = sum(bool(item["problem"]) for item in cases)
        print(f"{scheme:20} {len(cases):5} {sum('refused' in item for item in cases):7} {problems:8} {figures}")
    for item in done:
        if item["problem"]:
            print(f"{item['scheme']}, {item['kind']}, opset {item['opset']}: {item['problem']}")
    return 1 if any(item["problem"] for item in done) else 0


if __name__ == "__main__":
    sys.exit(main())
