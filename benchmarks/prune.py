"""Pruned models beside the unpruned and beside torch-pruning: work, speed by turns in one run, accuracy, time, memory.

    python benchmarks/prune.py [--parts peers digits minilm chain cost] [--seconds N] [--budget 60] [--threads 1 2]

=======  =============================================================================================================
part     what is measured
=======  =============================================================================================================
peers    ResNet-50 and MobileNetV2 (random weights), half the channels: ours by every ranking, with the proof of each
         cut, and torch-pruning's (DepGraph, L2), timed by turns in the same launches, batch 1
digits   the trained network of examples/digits (python examples/digits/train.py): half, and 30 %, of the MACs left
minilm   all-MiniLM-L6-v2 (python examples/minilm/prepare.py): 25 % of feed-forward widths and 1 head in 6 go;
         cosine with the unpruned model's embeddings on 512 held-out sentences
chain    the ResNet-18 of benchmarks/_resnet18.py (run it once), pruned to half the MACs, where least is lost or where
         most time is gained, and to 30 %; then quantized, in one recipe: speed over float, and the drop of top-1
cost     half the channels of ResNet-50 with 128 images: seconds and peak memory; of MobileNetV2, peak memory with 512
         images beside that with 64
=======  =============================================================================================================

What was found is written to benchmarks/results/prune/figures.json at once: interrupt it, and go on later with the same
command; ``--again PART`` measures a part anew. torch-pruning is run from an environment of its own (see
prune_coverage.py); without it its rows say "not installed".
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).with_name("results") / "prune"
FIGURES = FOLDER / "figures.json"
PEER = Path(__file__).with_name(".peers") / "torch-pruning/bin/python"
NETWORKS = {"resnet50": "resnet50", "mobilenet_v2": "mobilenet_v2"}
RANKINGS = ("l1", "l2", "activation", "random", "bn-scale", "reconstruction")
IMAGES = 32
DEPGRAPH = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {folder!r})
import torch, torch_pruning as tp, _networks
model, inputs = getattr(_networks, {name!r})()
for parameter in model.parameters():
    parameter.requires_grad_(True)
last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
tp.pruner.BasePruner(
    model, inputs, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=0.5, round_to=8,
    ignored_layers=[last], forward_fn=lambda m, i: m(**i), output_transform=lambda out: out.logits.sum(),
).step()
with torch.no_grad():
    torch.onnx.export(
        model.eval(), (), {path!r}, kwargs=inputs, dynamo=True, verbose=False, external_data=False,
        dynamic_shapes=dict(pixel_values={{0: torch.export.Dim.DYNAMIC}}),
    )
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--again", nargs="*", default=(), choices=list(PARTS))
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further step after so many seconds")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for each timing")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    figures = Figures(time.monotonic() + options.seconds, options.budget, tuple(options.threads))
    for part in options.again:
        figures.forget(part)
    for part in dict.fromkeys([*options.parts, *options.again]):
        PARTS[part](figures)
    print(json.dumps(figures.found, indent=1))


class Figures:
    """What was found so far, on disk; a step that was done is not done again."""

    def __init__(self, end: float, budget: float, threads: tuple[int, ...]) -> None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, Any] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
        self.end, self.budget, self.threads = end, budget, threads

    def step(self, name: str, work: Any) -> Any:
        if name not in self.found:
            if time.monotonic() > self.end:
                print(f"out of time before {name}: run again to go on")
                return None
            print(f"{name} …", flush=True)
            found = work()
            self.found = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}  # parts may run side by side
            self.found[name] = found
            FIGURES.write_text(json.dumps(self.found, indent=1) + "\n")
        return self.found[name]

    def forget(self, part: str) -> None:
        self.found = {name: value for name, value in self.found.items() if not name.startswith(f"{part}/")}
        FIGURES.write_text(json.dumps(self.found, indent=1) + "\n")


def modelops(*arguments: object) -> dict[str, Any]:
    """The document that a command printed."""
    command = [str(Path(sys.executable).with_name("modelops")), *map(str, arguments), "--json"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if not found.stdout:
        raise SystemExit(f"{' '.join(command)}\n{found.stderr}")
    return dict(json.loads(found.stdout))


def converted(name: str, source: object) -> Path:
    target = FOLDER / "models" / name
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        document = modelops("convert", source, target)
        if document["exit_code"]:
            raise SystemExit(f"convert {source}: {document['error']}")
    return target


def unfolded(name: str) -> Path:
    """The network with its batch normalizations: TorchScript's exporter can be told not to fold them."""
    import torch

    from modelops.graphs.wrap import wrap

    target = FOLDER / "models" / f"{name}-unfolded"
    if not target.is_dir():
        sys.path.insert(0, str(ROOT / "benchmarks"))
        import _networks

        module, inputs = getattr(_networks, name)()

        class Logits(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = module.eval()

            def forward(self, pixel_values: Any) -> Any:
                return self.inner(pixel_values=pixel_values).logits

        place = target.with_suffix(".onnx")
        torch.onnx.export(
            Logits().eval(),
            (inputs["pixel_values"],),
            str(place),
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_axes={"pixel_values": {0: "batch"}, "logits": {0: "batch"}},
        )
        wrap(place, target)
        place.unlink()
    return target


def images(name: str, count: int) -> Path:
    """Made-up images: only their number and size matter here."""
    place = FOLDER / f"images-{name}-{count}.npz"
    if not place.is_file():
        pixels = np.random.default_rng(0).normal(size=(count, 3, 224, 224)).astype(np.float32)
        np.savez(place, pixel_values=pixels)
    return place


def macs(model: Path) -> int:
    """Multiply-accumulates of one sample, counted as prune counts them."""
    import tempfile

    from modelops.graphs.describe import signature
    from modelops.graphs.seeded import random_feed
    from modelops.pruners._costs import mac_cost
    from modelops.pruners._groups import examine
    from modelops.pruners._network import opened

    with tempfile.TemporaryDirectory() as folder:
        known = signature(model)
        anatomy = examine(opened(model, known, random_feed(known, 1), Path(folder)))
        return round(mac_cost(anatomy).total([0] * len(anatomy.groups)))


def summary(document: dict[str, Any]) -> dict[str, Any]:
    """What a prune said of itself."""
    report = document["report"] or {}
    keep = {"seconds": document["seconds"], "peak_bytes": document["peak_memory_bytes"], "exit": document["exit_code"]}
    values = {metric["name"]: metric["value"] for metric in report.get("metrics", ())}
    checks = {check["name"]: [check["verdict"], check["value"]] for check in report.get("checks", ())}
    return {**keep, "metrics": values, "checks": checks, "error": document.get("error")}


def timed(models: dict[str, Path], feed: dict[str, Any], figures: Figures) -> dict[str, Any]:
    """Every model's speed over the first, by turns in the same launches, with its interval."""
    from modelops.backends import REGISTRY
    from modelops.stages._race import Contender, standings

    found = {}
    for threads in figures.threads:
        backend = REGISTRY.load("onnxruntime-cpu").parse({"threads": threads})
        sides = [Contender(name, backend, path) for name, path in models.items()]
        rows = standings(sides, feed, budget_seconds=figures.budget, most_launches=8)
        found[f"threads {threads}"] = {
            row.name: {"ms": row.latency_ms, "speedup": row.speedup, "interval": row.interval} for row in rows.standings
        } | {"launches": rows.launches}
    return found


def cut(source: Path, target: Path, name: str, ranking: str) -> dict[str, Any]:
    """Half the channels, by this ranking, with the proof; without gates, which random weights can't pass."""
    import tempfile

    from modelops.core.artifact import Artifact
    from modelops.pruners import REGISTRY
    from modelops.stages._workbench import SampleBench
    from modelops.stages.prune import _surgery

    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        data = images(name, IMAGES) if ranking in ("activation", "reconstruction") else None
        artifact = Artifact.open(source)
        bench = SampleBench(artifact, Path(folder), data, None, None, 16)
        pruner = REGISTRY.load("channels").parse({"channels": 0.5, "importance": ranking, "recover": "none"})
        started = time.monotonic()
        done = pruner.prune(artifact.model, target / "model.onnx", bench)
        seconds = time.monotonic() - started
        check = _surgery(artifact, bench, target / "model.onnx")
    values = {metric.name: metric.value for metric in done.metrics}
    return {"seconds": seconds, "surgery": check.value if check else None, "metrics": values}


def peers(figures: Figures) -> None:
    for name, build in NETWORKS.items():
        source = converted(name, f"{ROOT}/benchmarks/_networks.py:{build}")
        models: dict[str, Path] = {"source": source / "model.onnx"}
        for ranking in RANKINGS:
            target = FOLDER / "models" / f"{name}-{ranking}"
            figures.step(
                f"peers/{name}/{ranking}",
                lambda t=target, r=ranking, s=source, n=name: cut(unfolded(n) if r == "bn-scale" else s, t, n, r),
            )
            if (target / "model.onnx").is_file() and ranking == "l2":
                models["modelops"] = target / "model.onnx"
        place = FOLDER / "models" / f"{name}-depgraph.onnx"
        if PEER.is_file() and not place.is_file():
            script = DEPGRAPH.format(folder=str(ROOT / "benchmarks"), name=build, path=str(place))
            done = subprocess.run([str(PEER), "-c", script], capture_output=True, text=True)
            if done.returncode:
                print(done.stderr[-500:])
        if place.is_file():
            models["torch-pruning"] = place
        elif not PEER.is_file():
            print("torch-pruning: not installed")
        figures.step(f"peers/{name}/macs", lambda m=models: {key: macs(path) for key, path in m.items()})
        feed = {"pixel_values": np.random.default_rng(1).normal(size=(1, 3, 224, 224)).astype(np.float32)}
        figures.step(f"peers/{name}/speed", lambda m=models, f=feed: timed(m, f, figures))


def digits(figures: Figures) -> None:
    example = ROOT / "examples" / "digits"
    source = converted("digits", f"{example}/model.py:build")
    data = ("--data", example / "data/calibration.npz", "--samples", 256, "--eval", example / "data/held_out.npz")
    budget = ("--max-drop", "3%", "--speed-budget", f"{figures.budget}s", "--force")
    for left in (50, 30):
        target = FOLDER / "models" / f"digits-{left}"
        figures.step(
            f"digits/{left}",
            lambda n=left, t=target: summary(modelops("prune", source, t, "--macs", f"{n}%", *data, *budget)),
        )


def sentences(count: int) -> Path:
    """Sentences of the standard library's docstrings, none from the modules of those that are held out."""
    place = FOLDER / f"sentences-{count}.jsonl"
    if not place.is_file():
        sys.path.insert(0, str(ROOT / "examples" / "minilm"))
        import prepare

        apart = set(prepare.HELD_OUT.split())
        names = sorted(name for name in sys.stdlib_module_names if name not in apart and not name.startswith("_"))
        held = (ROOT / "examples/minilm/data/held_out.jsonl").read_text()
        found = dict.fromkeys(text for text in prepare.sentences(" ".join(names)) if json.dumps(text) not in held)
        texts = prepare.spread(list(found), count)
        place.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return place


def minilm(figures: Figures) -> None:
    example = ROOT / "examples" / "minilm"
    source = converted("minilm", example / "model")
    best = ("--importance", "reconstruction", "--allocation", "global")
    ways: dict[str, tuple[int, tuple[str, ...]]] = {
        "default": (256, ()),
        "best": (256, best),
        "best-1024": (1024, best),
        "best-2048": (2048, best),
    }
    for name, (count, way) in ways.items():
        figures.step(
            f"minilm/{name}",
            lambda n=name, w=way, c=count: summary(
                modelops(
                    "prune",
                    source,
                    FOLDER / "models" / f"minilm-{n}",
                    *("--channels", "25%", "--heads", "16.67%", "--best-effort", *w),
                    *("--data", sentences(c), "--samples", c, "--eval", example / "data/held_out.jsonl"),
                    *("--speed-budget", f"{figures.budget}s", "--force", "--memory-limit", "8g", "--time-limit", "2h"),
                )
            ),
        )


RECIPE = """
source = "{root}/benchmarks/_resnet18.py:build"

[[step]]
stage = "convert"

[[step]]
stage = "prune"
method = {{name = "channels", macs = {macs}, importance = "reconstruction", allocation = "{allocation}"}}
data = "{folder}/digits32.npz"
samples = 512
eval = "{folder}/digits32-held.npz"
max_drop = 0.03
speed_budget = "1s"

[[step]]
stage = "quantize"
method = "static"
data = "{folder}/digits32.npz"
eval = "{folder}/digits32-held.npz"
max_drop = 0.03
speed_budget = "1s"
if_slower = "publish"

[[step]]
stage = "validate"
against = "@convert"
data = "{folder}/digits32-held.npz"
metric = "top1"
max_drop = 0.015
advisory = true
"""


def chain(figures: Figures) -> None:
    """Half of the multiply-accumulates where least is lost, or where most time is gained, or more; then 8 bits."""
    for name, macs, allocation in (("global", 0.5, "global"), ("latency", 0.5, "latency"), ("deeper", 0.3, "latency")):
        models = figures.step(f"chain/{name}", lambda n=name, m=macs, a=allocation: chained(n, m, a))
        if models is None:
            return
        feed = {"image": np.load(FOLDER / "digits32-held.npz")["image"][:1]}
        paths = {step: FOLDER / f"chain-{name}" / step / "model.onnx" for step in models["models"]}
        figures.step(f"chain/{name}/speed", lambda p=paths, f=feed: timed(p, f, figures))


def chained(name: str, macs: float, allocation: str) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import _resnet18

    (pixels, labels), (held, wanted) = _resnet18.data()
    np.savez(FOLDER / "digits32.npz", image=pixels[:1024], labels=labels[:1024])
    np.savez(FOLDER / "digits32-held.npz", image=held, labels=wanted)
    recipe, out = FOLDER / f"chain-{name}.toml", FOLDER / f"chain-{name}"
    recipe.write_text(RECIPE.format(root=ROOT, folder=FOLDER, macs=macs, allocation=allocation))
    document = modelops("run", recipe, "--out", out, "--memory-limit", "8g", "--time-limit", "2h")
    if not document["steps"]:
        raise SystemExit(f"{recipe}: {document['error']}")
    steps = {step["command"]: summary(step) for step in document["steps"]}
    models = [place.name for place in sorted(out.glob("0?-*")) if (place / "model.onnx").is_file()]
    return {"steps": steps, "models": models, "error": document["error"]}


def cost(figures: Figures) -> None:
    """Time and memory of one ResNet-50; what more samples add, on a network that many of them go through in time."""
    for name, count in (("resnet50", 128), ("mobilenet_v2", 64), ("mobilenet_v2", 512)):
        figures.step(f"cost/{name}/{count}", lambda n=name, c=count: spent(n, c))


def spent(name: str, count: int) -> dict[str, Any]:
    source = converted(name, f"{ROOT}/benchmarks/_networks.py:{name}")
    document = modelops(
        "prune",
        source,
        FOLDER / "models" / f"cost-{name}-{count}",
        *("--channels", "50%", "--data", images(name, count + 32), "--samples", count, "--speed-budget", "0"),
        *("--force", "--memory-limit", "12g", "--time-limit", "2h"),
    )
    return summary(document) | {"model_bytes": sum(path.stat().st_size for path in source.glob("model.onnx*"))}


PARTS = {"peers": peers, "digits": digits, "minilm": minilm, "chain": chain, "cost": cost}

if __name__ == "__main__":
    main()
