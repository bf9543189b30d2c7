"""All backends beside torch, eager and compiled: speed, share of the machine's peak, agreement of outputs.

    python benchmarks/backends.py [--models minilm resnet50 …] [--launches 5] [--seconds 3600] [--show]

=============  ==================================================================  ==========================
model          what it is                                                          one inference
=============  ==================================================================  ==========================
minilm         all-MiniLM-L6-v2 as examples/minilm/prepare.py brings it            1 sentence of 128 tokens
resnet50       ResNet-50, random weights                                           1 image of 224 × 224
mobilenetv2    MobileNetV2, random weights                                         1 image of 224 × 224
vit            ViT-base/16, random weights                                         1 image of 224 × 224
gpt2           GPT-2 of 124 M parameters without a cache, random weights           1 text of 64 tokens
=============  ==================================================================  ==========================

A model is converted once, by ``modelops convert`` (kept in benchmarks/results/models). Then every launch starts a fresh
process for each backend that is here and times them by turns, block by block; its ratios to onnxruntime in float32 are
added to benchmarks/results/backends.jsonl at once: interrupt the script, and go on later with the same command.
Intervals are taken over launches. The share of the peak is what the model multiplies and adds in a second over what
the machine does in one large float32 product (as ``modelops doctor --peak`` measures it, which is done first); a
backend that computes in bfloat16 or with better kernels may exceed 100 %. Agreement is the worst cosine over outputs
with onnxruntime's, and the largest difference over the largest value.
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
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
LINES = RESULTS / "backends.jsonl"
MINILM = Path(__file__).parents[1] / "examples" / "minilm" / "model"
FIRST = "onnxruntime"


def _transformer(config: Any, cls: str, inputs: dict[str, Any], **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """A model of transformers with seeded weights that gives its logits alone, and inputs to run it on."""
    import torch
    import transformers

    class Logits(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, value: Any) -> Any:
            return self.model(value, **kwargs).logits

    torch.manual_seed(0)
    return Logits(getattr(transformers, cls)(config).eval()).eval(), inputs


def _image() -> dict[str, Any]:
    import torch

    return {"value": torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))}


def resnet50() -> tuple[Any, dict[str, Any]]:
    from transformers import ResNetConfig

    return _transformer(ResNetConfig(num_labels=1000), "ResNetForImageClassification", _image())


def mobilenetv2() -> tuple[Any, dict[str, Any]]:
    from transformers import MobileNetV2Config

    return _transformer(MobileNetV2Config(num_labels=1000), "MobileNetV2ForImageClassification", _image())


def vit() -> tuple[Any, dict[str, Any]]:
    from transformers import ViTConfig

    return _transformer(ViTConfig(num_labels=1000), "ViTForImageClassification", _image())


def gpt2() -> tuple[Any, dict[str, Any]]:
    import torch
    from transformers import GPT2Config

    tokens = torch.randint(0, 50257, (2, 64), generator=torch.Generator().manual_seed(0))
    return _transformer(GPT2Config(use_cache=False), "GPT2LMHeadModel", {"value": tokens}, use_cache=False)


MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "minilm": (str(MINILM), {"sequence": 128}),
    **{
        function.__name__: (f"{Path(__file__)}:{function.__name__}", {})
        for function in (resnet50, mobilenetv2, vit, gpt2)
    },
}


def converted(name: str) -> Path | None:
    """The artifact of that model, made where it is missing; None where that fails, with the reason printed."""
    target = RESULTS / "models" / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        print(f"{name}: convert", file=sys.stderr)
        command = [sys.executable, "-m", "modelops.cli.main", "convert", MODELS[name][0], str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not target.exists():
            print(f"{name}: {done.stderr.strip()}", file=sys.stderr)
            return None
    return target


def contenders(name: str) -> list[Any]:
    """Every backend that is here, onnxruntime first."""
    from modelops.backends import REGISTRY
    from modelops.core import machine
    from modelops.core.artifact import Artifact
    from modelops.stages._race import Contender

    spec, _ = MODELS[name]
    model = converted(name)
    if model is None:
        return []
    onnx = Artifact.open(model).model
    wanted: list[tuple[str, str, dict[str, Any], Any]] = [
        (FIRST, "onnxruntime-cpu", {}, onnx),
        ("openvino", "openvino-cpu", {}, onnx),
        ("torch eager", "torch-cpu", {}, spec),
        ("torch.compile", "torch-cpu", {"compile": True}, spec),
        ("onnxruntime cuda", "onnxruntime-cuda", {}, onnx),
        ("torch cuda", "torch-cuda", {}, spec),
    ]
    if {"avx512_bf16", "amx_bf16"} & set(machine.cpu_features()):
        wanted.insert(2, ("openvino bf16", "openvino-cpu", {"precision": "bf16"}, onnx))
    found = []
    for label, backend, options, path in wanted:
        chosen = REGISTRY.load(backend).parse(options)
        if reason := chosen.missing():
            print(f"{name}: no {label}: {reason}", file=sys.stderr)
        else:
            found.append(Contender(label, chosen, path))
    return found


def feed_of(name: str) -> dict[str, Any]:
    from modelops.core.artifact import Artifact
    from modelops.stages._feed import timing_feed

    artifact = Artifact.open(RESULTS / "models" / name)
    return timing_feed(artifact, batch=1, sizes=MODELS[name][1])[0]


def agreement(sides: list[Any], feed: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """For every side the worst cosine with the first's outputs, and the largest difference over the largest value."""
    import numpy as np

    from modelops.stages._launch import read_arrays, write_arrays
    from modelops.stages._runner import Runner

    outputs = []
    write_arrays(scratch / "feed.npz", feed)
    for number, side in enumerate(sides):
        path = scratch / f"{number}.npz"
        with Runner(side, scratch / "feed.npz", scratch, random.Random(0)) as runner:
            runner.ask("open", patience=side.load_seconds())
            runner.ask("save", patience=side.load_seconds(), path=str(path))
        outputs.append(list(read_arrays(path).values()))
    found = {}
    for side, mine in zip(sides, outputs, strict=True):
        cosine, worst = 1.0, 0.0
        for right, here in zip(outputs[0], mine, strict=True):
            a, b = right.astype(np.float64).ravel(), here.astype(np.float64).ravel()
            cosine = min(cosine, float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))))
            worst = max(worst, float(np.abs(a - b).max() / np.abs(a).max()))
        found[side.name] = {"cosine": cosine, "difference": worst}
    return found


def launch(name: str, sides: list[Any], feed: dict[str, Any], number: int, seconds: float) -> dict[str, Any]:
    """One launch of all sides by turns, as a line of the results."""
    from modelops.stages import _speed
    from modelops.stages._race import measure

    started = time.monotonic()
    records = measure(sides, feed, budget_seconds=seconds, launches=1, seed=number)
    return {
        "model": name,
        "kind": "launch",
        "number": number,
        "seconds": time.monotonic() - started,
        "busy": records[0]["busy"],
        "ms": {side.name: _speed.block_ms(records, side.name) for side in sides},
        "speedup": {side.name: _speed.speedup(records, FIRST, side.name)[0] for side in sides},
    }


def work(name: str, feed: dict[str, Any], scratch: Path) -> int | None:
    """The multiplications with additions of one inference."""
    from modelops.backends._counting import counted_macs
    from modelops.core.artifact import Artifact

    return counted_macs(Artifact.open(RESULTS / "models" / name).model, feed, scratch)


def rows(lines: list[dict[str, Any]], peak: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The table: one row for every model and side."""
    from modelops.measures.distributions import t_quantile

    found = []
    for name in MODELS:
        about = next((line for line in lines if line["model"] == name and line["kind"] == "about"), None)
        launches = [line for line in lines if line["model"] == name and line["kind"] == "launch"]
        for side in about["agreement"] if about and launches else ():
            ms = statistics.median(line["ms"][side] for line in launches)
            logs = [math.log(line["speedup"][side]) for line in launches]
            mean, interval = statistics.fmean(logs), None
            if len(logs) > 2:
                half = t_quantile(0.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
                interval = [math.exp(mean - half), math.exp(mean + half)]
            rate = 2e-6 * about["macs"] / ms if about["macs"] else None
            share = rate / peak["float32_gflops"] if rate and peak else None
            found.append(
                {"model": name, "backend": side, "launches": len(logs), "ms": ms, "speedup": math.exp(mean),
                 "interval": interval, "gflops": rate, "share_of_peak": share, **about["agreement"][side]}
            )  # fmt: skip
    return found


def show(table: list[dict[str, Any]]) -> None:
    print("| model | backend | launches | ms | speed-up over onnxruntime float32 (95 %) | GFLOP/s | of float32 peak "
          "| cosine | largest difference |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |")  # fmt: skip
    for row in table:
        sure = " ({:.3f} to {:.3f})".format(*row["interval"]) if row["interval"] else ""
        rate = f"{row['gflops']:.1f}" if row["gflops"] else "-"
        share = f"{row['share_of_peak']:.0%}" if row["share_of_peak"] else "-"
        print(f"| {row['model']} | {row['backend']} | {row['launches']} | {row['ms']:.4g} "
              f"| {row['speedup']:.3f}x{sure} | {rate} | {share} "
              f"| {row['cosine']:.6f} | {row['difference']:.1e} |")  # fmt: skip


def one_step(name: str, lines: list[dict[str, Any]], scratch: Path, seconds: float) -> dict[str, Any] | None:
    """The next line for a model: what it is, then launch after launch; None where it can't be run here."""
    sides = contenders(name)
    if not sides:
        return None
    mine = [line for line in lines if line["model"] == name]
    feed = feed_of(name)
    if not mine:
        shapes = {key: list(array.shape) for key, array in feed.items()}
        found = {"agreement": agreement(sides, feed, scratch), "macs": work(name, feed, scratch)}
        return {"model": name, "kind": "about", "feed": shapes, **found}
    known = mine[0]["agreement"]
    return launch(name, [side for side in sides if side.name in known], feed, len(mine) - 1, seconds)


def main() -> int:
    from modelops.stages import _peak

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--launches", type=int, default=5, help="of every model")
    parser.add_argument("--share", type=float, default=20.0, help="seconds of timing in one launch")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start nothing new after this time")
    parser.add_argument("--show", action="store_true", help="only print the table of what is there")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    peak = _peak.remembered() if options.show else _peak.measure()
    lines = [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(0 if options.show else options.launches + 1):
            for name in options.models:
                over = time.monotonic() - started > options.seconds
                if over or sum(line["model"] == name for line in lines) > number:
                    continue
                line = one_step(name, lines, Path(scratch), options.share)
                if line is None:
                    continue
                lines.append(line)
                with LINES.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{name}: {line['kind']} after {time.monotonic() - started:.0f} s", file=sys.stderr)
    show(rows(lines, peak))
    return 0


if __name__ == "__main__":
    sys.exit(main())
