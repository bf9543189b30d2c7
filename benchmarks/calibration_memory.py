"""How much memory and time calibration takes as samples grow: ResNet-50, every ranges method, 32 and 512 images.

    python benchmarks/calibration_memory.py [--samples 32 128 512] [--methods minmax auto …] [--peer] [--seconds 3600]

Each case is a process of its own that quantizes one and the same model (random weights, written once below results/)
with made-up images, drawn as they are needed. Its peak is the resident size that the kernel reports; no other process
takes part. Every method needs the extremes of all tensors first: the first case of so many images finds them; they are
remembered in results/calibration_cache for the others, whose peak counts as that case's where it is lower.
``--peer`` adds onnxruntime's own quantize_static, which may take at most 18 GiB of address space. Finished cases are
kept in results/calibration_memory.jsonl and not run again (delete both for that); the exit code is 1 when a peak of
ours at 512 images is above 1.1 times that at 32, or above 1.3 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results")
RECORDS = RESULTS / "calibration_memory.jsonl"
CACHE = RESULTS / "calibration_cache"
METHODS = ("minmax", "average", "percentile", "entropy", "mse", "auto")
PEER = ("MinMax", "Percentile", "Entropy")
PEER_BYTES = 18 << 30
MOST_GROWTH, MOST_BYTES = 1.1, 1.3 * (1 << 30)


def resnet50(place: Path) -> Path:
    """ResNet-50 with random weights, opset 17, any batch."""
    if not place.is_file():
        import torch
        from transformers import ResNetConfig, ResNetForImageClassification

        torch.manual_seed(0)
        model = ResNetForImageClassification(ResNetConfig()).eval()
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = place.with_suffix(".part")
        torch.onnx.export(
            model,
            (torch.zeros(2, 3, 224, 224),),
            str(fresh),
            dynamo=False,
            opset_version=17,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "n"}, "logits": {0: "n"}},
        )
        fresh.rename(place)
    return place


def images(count: int, batch: int) -> Iterator[dict[str, Any]]:
    """Smooth random images, as natural ones are, the same in every run."""
    rng = np.random.default_rng(0)
    for start in range(0, count, batch):
        coarse = rng.normal(size=(min(batch, count - start), 3, 14, 14)).astype(np.float32)
        fine = np.repeat(np.repeat(coarse, 16, axis=2), 16, axis=3)
        yield {"image": fine + 0.1 * rng.standard_normal(fine.shape, dtype=np.float32)}


class Bench:
    """The workbench of a quantizer, over images drawn as they are needed."""

    has_data = True

    def __init__(self, scratch: Path, count: int) -> None:
        self.scratch, self.count = scratch, count

    def batches(self) -> Iterator[dict[str, Any]]:
        return images(self.count, 8)


class Reader:
    """The same images for onnxruntime's own calibration, one at a time as its users write it."""

    def __init__(self, count: int) -> None:
        self._images = images(count, 1)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._images, None)


def one(tool: str, method: str, samples: int, model: Path, folder: Path) -> None:
    """Quantize once, here."""
    if tool == "modelops":
        from modelops.quantizers.static import Static

        Static(ranges=method).quantize(model, folder / "out.onnx", Bench(folder, samples))  # type: ignore[arg-type]
        return
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static

    resource.setrlimit(resource.RLIMIT_AS, (PEER_BYTES, PEER_BYTES))
    quantize_static(
        str(model),
        str(folder / "out.onnx"),
        Reader(samples),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        calibrate_method=getattr(CalibrationMethod, method),
    )


def measured(tool: str, method: str, samples: int, model: Path) -> dict[str, Any]:
    """One case in a process of its own: its seconds, CPU seconds and peak bytes, or why it failed."""
    with tempfile.TemporaryDirectory(prefix="modelops-calibration-") as folder:
        words = [sys.executable, __file__, "--one", tool, method, str(samples), str(model), folder]
        started = time.perf_counter()
        with tempfile.TemporaryFile("w+") as log:
            env = os.environ | {"MODELOPS_CACHE": str(CACHE)}
            child = subprocess.Popen(words, cwd=ROOT, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            status, usage = _wait(child)
            log.seek(0)
            tail = log.read()[-300:].strip()
    record: dict[str, Any] = {"tool": tool, "method": method, "samples": samples}
    record |= {"seconds": time.perf_counter() - started, "cpu_seconds": usage.ru_utime + usage.ru_stime}
    record |= {"peak_bytes": usage.ru_maxrss * 1024, "problem": "" if status == 0 else f"exit {status}: {tail}"}
    return record


def _wait(child: subprocess.Popen[bytes]) -> tuple[int, resource.struct_rusage]:
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, usage


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[32, 512])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no case after this time")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        tool, method, samples, model, folder = options.one
        one(tool, method, int(samples), Path(model), Path(folder))
        return 0
    RESULTS.mkdir(exist_ok=True)
    model = resnet50(RESULTS / "models" / "resnet50.onnx")
    done = [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.is_file() else []
    cases = [("modelops", method, count) for count in options.samples for method in options.methods]
    cases += [("onnxruntime", method, count) for count in options.samples for method in PEER if options.peer]
    started = time.perf_counter()
    for case in cases:
        known = {(item["tool"], item["method"], item["samples"]) for item in done}
        if case in known or time.perf_counter() - started > options.seconds:
            continue
        done.append(measured(*case, model))
        with RECORDS.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
    return _report(done)


def _report(done: list[dict[str, Any]]) -> int:
    problems = 0
    found = {(item["tool"], item["method"], item["samples"]): item for item in done}
    for samples in {samples for tool, _, samples in found if tool == "modelops"}:
        # The first case of so many images looked for the extremes as well, which the others were told.
        ours = [item for (tool, _, count), item in found.items() if (tool, count) == ("modelops", samples)]
        for item in ours:
            item["peak_bytes"] = max(item["peak_bytes"], ours[0]["peak_bytes"])
    print(f"{'tool':12} {'ranges':11} {'images':>6} {'seconds':>8} {'CPU s':>7} {'GiB':>6}")
    for (tool, method, samples), item in sorted(found.items()):
        size = item["peak_bytes"]
        text = item["problem"]
        small = found.get((tool, method, 32))
        if tool == "modelops" and small is not None and not text:
            growth = size / small["peak_bytes"]
            text = f"{growth:.2f} times its peak at 32" if samples != 32 else ""
            problems += growth > MOST_GROWTH or size > MOST_BYTES
        problems += tool == "modelops" and bool(item["problem"])
        print(
            f"{tool:12} {method:11} {samples:6} {item['seconds']:8.1f} {item['cpu_seconds']:7.1f} "
            f"{size / 2**30:6.2f}  {text}"
        )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
