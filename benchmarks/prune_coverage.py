"""What prune follows and what it leaves alone, with the proof of every cut: on tiny networks of many architectures.

    python benchmarks/prune_coverage.py [--seconds N] [--peer PYTHON] [--only NAME …] [--table]

Models are those that ``python benchmarks/_zoo.py`` made (convolutional networks and transformers, random weights) and
more of transformers' types, exported on the way and kept below ``results/prune/models``. Of each, half the channels of
every group are removed; then the cut graph is run beside the source in which nothing reads the same channels, which
must give the same outputs within 1e-5 of scale. Results go to ``results/prune/coverage.jsonl``, one line for a model;
what is there is not done again. ``--table`` only prints what is there.

Beside it, onnxsim prunes the same files: heads and then channels, half of each, as its functions offer it; what counts
is how many parameters are left, whether the outputs keep their shapes, and whether the file runs. It offers no proof.

With ``--peer``, torch-pruning (DepGraph) prunes the same types in PyTorch: give the Python of a venv that has it,
made with

    python -m venv benchmarks/.peers/torch-pruning
    echo "$PWD/.venv/lib/python3.11/site-packages" > \
        benchmarks/.peers/torch-pruning/lib/python3.11/site-packages/modelops.pth
    benchmarks/.peers/torch-pruning/bin/pip install --no-deps torch-pruning==1.6.1
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

HERE = Path(__file__).parent
FOLDER = HERE / "results" / "prune"
RESULTS = FOLDER / "coverage.jsonl"
ZOO = HERE / "results" / "zoo"
# Beside the zoo's: convolutional and hierarchical networks, gated feed-forward, fused projections, encoders of sound.
MORE = (
    "resnet", "regnet", "efficientnet", "convnextv2", "swin", "segformer", "pvt_v2",
    "levit", "cvt", "llama", "qwen2", "gemma", "bloom", "falcon", "t5", "mobilebert", "deberta-v2", "wav2vec2",
    "whisper", "hiera", "dinat", "vit_mae",
)  # fmt: skip
# Types whose sizes hang together in a way that shrinking them one by one breaks: (class, its configuration).
BY_HAND: dict[str, tuple[str, dict[str, Any]]] = {
    "efficientnet": (
        "EfficientNet",
        {
            "image_size": 64,
            "kernel_sizes": [3, 3, 5],
            "in_channels": [32, 16, 24],
            "out_channels": [16, 24, 40],
            "depthwise_padding": [],
            "strides": [1, 2, 2],
            "num_block_repeats": [1, 2, 1],
            "expand_ratios": [1, 6, 6],
            "width_coefficient": 1.0,
            "depth_coefficient": 1.0,
            "hidden_dim": 160,
        },
    ),
    "swin": (
        "Swin",
        {"image_size": 56, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 7},
    ),
}
PEER = """
import json, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {folder!r})
import torch, torch_pruning as tp
from _tiny_models import build
tiny = build({name!r})
model, inputs = tiny.module.eval(), tiny.inputs
before = sum(p.numel() for p in model.parameters())
shapes = lambda out: [tuple(v.shape) for v in out.values() if hasattr(v, "shape")]
with torch.no_grad():
    was = shapes(model(**inputs))
for parameter in model.parameters():
    parameter.requires_grad_(True)
pruner = tp.pruner.BasePruner(
    model, inputs, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=0.5,
    forward_fn=lambda m, i: m(**i),
    output_transform=lambda out: [v for v in out.values() if hasattr(v, "grad_fn")],
)
pruner.step()
with torch.no_grad():
    now = shapes(model(**inputs))
after = sum(p.numel() for p in model.parameters())
print("RESULT" + json.dumps(dict(parameters_left=after / before, outputs_changed=was != now)))
"""
# What onnxsim makes of a file: heads first, then channels; on the simplified graph, where it finds more.
ONNXSIM = """
import json, sys
import numpy as np, onnx, onnxruntime as ort, onnxsim
from modelops.graphs.describe import signature
from modelops.graphs.seeded import index_bounds, random_feed
from pathlib import Path
path = Path(sys.argv[1])
source = onnx.load(path)
count = lambda model: sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
pruned = onnxsim.apply_attention_head_pruning(source, 0.5)
pruned = onnxsim.apply_structured_pruning(pruned, 0.5)
feed = random_feed(signature(path), 2, bounds=index_bounds(path))
run = lambda model: ort.InferenceSession(model.SerializeToString()).run(None, feed)
before, after = run(source), run(pruned)
changed = [a.shape for a in before] != [b.shape for b in after]
finite = all(np.isfinite(b).all() for b in after if b.dtype.kind == "f")
print("RESULT" + json.dumps(dict(
    parameters_left=count(pruned) / count(source), outputs_changed=changed, finite=bool(finite))))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--peer", type=Path, default=Path(__file__).with_name(".peers") / "torch-pruning/bin/python")
    parser.add_argument("--only", nargs="*", default=())
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds
    done = {row["model"]: row for row in _rows()}
    names = [] if options.table else [name for name in _names() if not options.only or name in options.only]
    todo = [("ours", name) for name in names if name not in done]
    if options.peer.is_file():
        todo += [("peer", name) for name in names if not name.startswith("cnn-")]
    todo += [("onnxsim", name) for name in names]
    for side, name in todo:
        if time.monotonic() > end:
            print("out of time: run again to go on")
            break
        if side == "ours":
            done[name] = {"model": name, **_looked_at(name)}
        elif side == "peer" and "groups" in done[name] and "torch_pruning" not in done[name]:
            model_type = name.removeprefix("transformer-").removesuffix("-torchscript").removesuffix("-dynamo")
            done[name]["torch_pruning"] = _peer(options.peer, model_type)
        elif side == "onnxsim" and name in done and "onnxsim" not in done[name] and (path := _file(name)).is_file():
            done[name]["onnxsim"] = _told([sys.executable, "-W", "ignore", "-c", ONNXSIM, str(path)])
        else:
            continue
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in done.values()))
        print(_line(done[name]), flush=True)
    _table(list(done.values()))


def _names() -> list[str]:
    # Transformers from one exporter: their sizes differ between the two in name alone.
    there = [path.stem for kind in ("cnn-*", "transformer-*-torchscript") for path in sorted(ZOO.glob(f"{kind}.onnx"))]
    return [*there, *MORE]


def _rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def _file(name: str) -> Path:
    """Where the exported model is, or will be."""
    path = ZOO / f"{name}.onnx"
    return path if path.is_file() else FOLDER / "models" / f"{name}.onnx"


def _looked_at(name: str) -> dict[str, Any]:
    """Prune the model, and prove the cut; what was not pruned comes with its reason."""
    from modelops.errors import ModelOpsError
    from modelops.graphs.wrap import wrap
    from modelops.pruners import REGISTRY
    from modelops.stages._workbench import SampleBench
    from modelops.stages.prune import _surgery

    path = _file(name)
    if not path.is_file():
        problem = _export(name)
        if problem:
            return {"outcome": "not exported", "reason": problem}
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        try:
            source = wrap(path, Path(folder) / "source")
            bench = SampleBench(source, Path(folder))
            pruner = REGISTRY.load("channels").parse({"channels": 0.5, "round_to": 1})
            target = Path(folder) / "pruned.onnx"
            done = pruner.prune(source.model, target, bench)
            check = _surgery(source, bench, target)
        except ModelOpsError as error:
            return {"outcome": "left alone", "reason": error.message}
        except Exception as error:
            return {"outcome": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
    values = {metric.name: metric.value for metric in done.metrics}
    groups = done.details["groups"]
    kept_out = [item for item in done.details["skipped"] if not item["interface"]]
    reasons: dict[str, int] = {}
    for item in kept_out:
        reasons[item["reason"].split(" '")[0]] = reasons.get(item["reason"].split(" '")[0], 0) + item["channels"]
    return {
        "outcome": "pruned" if check is not None and check.verdict == "pass" else "failed",
        "error": None if check is None else check.value,
        "groups": len(groups),
        "heads": sum(group["kind"] == "heads" for group in groups),
        "channels": values["channels_before"],
        "removed": values["channels_before"] - values["channels"],
        "macs_left": values["macs"] / values["macs_before"],
        "left_alone": sum(item["channels"] for item in kept_out),
        "reasons": dict(sorted(reasons.items(), key=lambda pair: -pair[1])[:3]),
        "seconds": time.monotonic() - started,
    }


def _export(name: str) -> str:
    """Export a type of transformers; why not, where that fails."""
    import torch
    from _tiny_models import build

    path = FOLDER / "models" / f"{name}.onnx"
    if path.is_file():
        return ""
    path.parent.mkdir(exist_ok=True)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            if name in BY_HAND:
                module, inputs = _by_hand(name)
                dynamic = {"pixel_values": {0: "batch"}}
            else:
                tiny = build(name)
                module, inputs, dynamic = tiny.module, tiny.inputs, tiny.dynamic
            # Sizes that are the same carry the same name, so that inputs can be made up that fit together.
            dims = {label: torch.export.Dim(label, min=2) for axes in dynamic.values() for label in axes.values()}
            shapes = {n: {axis: dims[label] for axis, label in axes.items()} for n, axes in dynamic.items()}
            program = torch.onnx.export(
                module.eval(), (), kwargs=inputs, dynamic_shapes=shapes, dynamo=True, verbose=False
            )
            program.save(str(path), external_data=False)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    return ""


def _by_hand(name: str) -> tuple[Any, dict[str, Any]]:
    """A small network of this type with random weights, and images for it."""
    import torch
    import transformers
    from _networks import _lively

    family, sizes = BY_HAND[name]
    config = getattr(transformers, f"{family}Config")(**sizes)
    module = _lively(getattr(transformers, f"{family}Model")(config))
    pixels = torch.randn(2, 3, sizes["image_size"], sizes["image_size"], generator=torch.Generator().manual_seed(1))
    return module, {"pixel_values": pixels}


def _peer(python: Path, name: str) -> dict[str, Any]:
    return _told([str(python), "-c", PEER.format(folder=str(HERE), name=name)])


def _told(command: list[str]) -> dict[str, Any]:
    """What a script printed as its result; its last words where it failed."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return {"error": "took longer than 300 s"}
    for line in found.stdout.splitlines():
        if line.startswith("RESULT"):
            return dict(json.loads(line.removeprefix("RESULT")))
    return {"error": (found.stderr.strip().splitlines() or ["no output"])[-1][:200]}


def _line(row: dict[str, Any]) -> str:
    name = row["model"].removesuffix("-torchscript").removesuffix("-dynamo")
    if "groups" not in row:
        return f"| {name} | {row['outcome']} | | | | | {row['reason'][:90]} | {_theirs(row)} |"
    why = "; ".join(f"{count} {reason}" for reason, count in row["reasons"].items())
    return (
        f"| {name} | {row['outcome']} | {row['groups']} | {row['heads']} | {row['removed']} of {row['channels']} | "
        f"{row['macs_left']:.0%} | {row['error']:.0e} | {why or '–'} | {_theirs(row)} |"
    )


def _theirs(row: dict[str, Any]) -> str:
    return " | ".join(_peer_text(row.get(peer)) for peer in ("torch_pruning", "onnxsim"))


def _peer_text(peer: dict[str, Any] | None) -> str:
    if peer is None:
        return "not run"
    if "error" in peer:
        return f"failed: {peer['error'][:60]}"
    if peer["parameters_left"] > 0.999:
        return "nothing removed"
    changed = ", changed the outputs' shape" if peer["outputs_changed"] else ""
    return f"{peer['parameters_left']:.0%} of parameters left{changed}"


def _counts(rows: list[dict[str, Any]], peer: str) -> str:
    """What became of all models that a peer was given."""
    texts = [_peer_text(row.get(peer)) for row in rows if row.get(peer) is not None]
    failed = sum(text.startswith("failed") for text in texts)
    changed = sum("changed" in text for text in texts)
    nothing = sum(text == "nothing removed" for text in texts)
    pruned = len(texts) - failed - changed - nothing
    return (
        f"{peer}: of {len(texts)} it pruned {pruned}, changed the shape of the outputs of {changed}, removed nothing "
        f"from {nothing} and failed on {failed}"
    )


def _table(rows: list[dict[str, Any]]) -> None:
    print(
        "\n| model | outcome | groups | of heads | channels removed | MACs left | error | left alone | torch-pruning | "
        "onnxsim |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print(_line(row))
    counts = {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in {row["outcome"] for row in rows}}
    print(f"\n{len(rows)} models: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    for peer in ("torch_pruning", "onnxsim"):
        print(_counts(rows, peer))


if __name__ == "__main__":
    main()
