"""simplify beside each bare engine: nodes, size, seconds, peak memory, and speed in onnxruntime.

    python benchmarks/simplify.py [--models minilm,...] [--exporters dynamo,torchscript] [--batches 1,8]
        [--steps convert,make,time] [--tools simplify,...] [--sequence 128] [--seconds 60] [--fresh]

Models: MiniLM (examples/minilm/prepare.py gets it), ResNet-50, MobileNetV2, ViT-B/16 and GPT-2 with random weights.
Three steps, each of which goes on where it was left: ``convert`` writes the ONNX files, ``make`` lets every tool
simplify each of them (in one process tree per tool, whose memory is watched), ``time`` runs all results side by side,
launch by launch, for ``--seconds`` for each model and batch. Only the last one wants a quiet machine. The tools that
fuse into onnxruntime's own operators stand in the lower half of each table. Texts have ``--sequence`` tokens. A source
in results/simplify/NAME-EXPORTER/source is taken as it is, whatever made it (``--exporters dynamo-sdpa``). Results lie
in results/simplify/.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "simplify"
MODELS = {
    "minilm": HERE.parent / "examples" / "minilm" / "model",
    "resnet50": f"{HERE / '_networks.py'}:resnet50",
    "mobilenet_v2": f"{HERE / '_networks.py'}:mobilenet_v2",
    "vit": f"{HERE / '_networks.py'}:vit",
    "gpt2": f"{HERE / '_networks.py'}:gpt2",
}
PLAIN = ("onnxsim", "onnxslim", "onnxscript", "onnxruntime")
FUSING = ("optimize_for_ort", "onnxruntime_transformers")
OURS = {"simplify": {}, "simplify --fuse": {"fuse": "onnxruntime", "speed_budget": 60.0}}
TRANSFORMERS = ("minilm", "vit", "gpt2")


def convert(name: str, exporter: str, folder: Path) -> str:
    """Write the source; why it can't be, or an empty string."""
    from modelops.errors import ModelOpsError
    from modelops.pipeline import run_stage
    from modelops.stages.convert import Convert

    if (folder / "source").exists():
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        outcome = run_stage(Convert.parse({"exporter": exporter}), str(MODELS[name]), folder / "source")
    except ModelOpsError as error:
        return error.message[:200]
    worst = outcome.report.worst()
    return "" if outcome.exit_code == 0 else f"{worst.name}: {worst.message[:200]}" if worst else "refused"


def make_ours(options: dict[str, Any], source: Path, place: Path) -> dict[str, Any]:
    from modelops.pipeline import run_stage
    from modelops.stages.simplify import Simplify

    stage = Simplify.parse({"engine": {"name": "auto", **options}})
    outcome = run_stage(stage, str(source), place)
    details = outcome.report.details
    spent = {"seconds": outcome.seconds, "peak_memory_bytes": outcome.peak_memory_bytes}
    return {**spent, "chosen": details.get("chosen"), "attempts": details.get("attempts")}


def make_bare(tool: str, source: Path, place: Path) -> dict[str, Any]:
    from modelops.core import worker

    place.mkdir(exist_ok=True)
    arguments = {"source": str(source / "model.onnx"), "target": str(place / "model.onnx")}
    limits = worker.Limits(wall_seconds=600.0)
    outcome = worker.call(f"_bare_simplifiers:{tool}", arguments, limits=limits, what=tool)
    return {"seconds": outcome.seconds, "peak_memory_bytes": outcome.peak_memory_bytes}


def make(tool: str, folder: Path) -> dict[str, Any]:
    """What became of the source with one tool: seconds, memory, nodes, bytes, and whether it still does the same."""
    from modelops.core.artifact import Artifact
    from modelops.core.worker import WorkerBug
    from modelops.errors import ModelOpsError
    from modelops.graphs.describe import summary
    from modelops.stages._compare import structural_checks

    source, place = folder / "source", folder / tool.replace(" --", "-")
    shutil.rmtree(place, ignore_errors=True)
    try:
        row = make_ours(OURS[tool], source, place) if tool in OURS else make_bare(tool, source, place)
    except (ModelOpsError, WorkerBug) as error:
        return {"failed": str(error).strip().splitlines()[-1][:160]}
    model = place / "model.onnx"
    found = summary(model)
    row |= {"nodes": found["nodes"], "bytes": _bytes(place), "attention": _attention(found["operators"])}
    try:
        checks = structural_checks(Artifact.open(source), model)
    except ModelOpsError as error:
        return {**row, "wrong": error.message[:160]}
    broken = next((check for check in checks if check.verdict == "fail"), None)
    return row if broken is None else {**row, "wrong": f"{broken.name}: {broken.message[:160]}"}


def _attention(operators: dict[str, int]) -> int:
    return sum(count for op, count in operators.items() if op.rpartition(":")[2].endswith("Attention"))


def _bytes(place: Path) -> int:
    return sum(file.stat().st_size for file in place.glob("model.onnx*"))


def time_all(folder: Path, rows: dict[str, Any], batch: int, sequence: int, seconds: float) -> dict[str, Any]:
    """How many times as fast as the source each result is that runs, with its interval."""
    from modelops.backends import REGISTRY
    from modelops.core.artifact import Artifact
    from modelops.stages._feed import timing_feed
    from modelops.stages._race import Contender, standings

    backend = REGISTRY.load("onnxruntime-cpu").parse({})
    source = Artifact.open(folder / "source")
    runs = [tool for tool, row in rows.items() if "failed" not in row and not row.get("wrong", "").startswith("runs")]
    contenders = [Contender("source", backend, source.model)]
    contenders += [Contender(tool, backend, folder / tool.replace(" --", "-") / "model.onnx") for tool in runs]
    sizes = {dim: sequence for dim in source.signature.dynamic if dim.lower().startswith("seq")}
    feed, _ = timing_feed(source, batch=batch, sizes=sizes)
    found = standings(contenders, feed, budget_seconds=seconds, most_launches=12)
    return {
        one.name: {"speedup": one.speedup, "interval": one.interval, "ms": one.latency_ms, "launches": found.launches}
        for one in found.standings
    }


def show(name: str, exporter: str, data: dict[str, Any], batches: list[int]) -> None:
    rows, times = data["tools"], data["times"]
    print(f"\n{name}, {exporter}: {data['nodes']} nodes, {data['bytes'] / 1e6:.1f} MB")
    head = " ".join(f"{f'speed, batch {batch}':>22}" for batch in batches)
    print(f"{'tool':<26} {'nodes':>6} {'MB':>7} {'s':>6} {'peak MiB':>9} {'attention':>9} {head}")
    for tool, row in rows.items():
        if "failed" in row:
            print(f"{tool:<26} failed: {row['failed']}")
            continue
        cells = []
        for batch in batches:
            one = times.get(str(batch), {}).get(tool)
            interval = f" ({one['interval'][0]:.2f}…{one['interval'][1]:.2f})" if one and one["interval"] else ""
            cells.append(f"{one['speedup']:.3f}{interval}" if one else "–")
        print(
            f"{tool:<26} {row['nodes']:>6} {row['bytes'] / 1e6:>7.1f} {row['seconds']:>6.1f} "
            f"{(row['peak_memory_bytes'] or 0) / 2**20:>9.0f} {row['attention']:>9} "
            + " ".join(f"{cell:>22}" for cell in cells)
            + (f"  {row['chosen'] or 'source kept'}" if "chosen" in row else "")
            + (f"  WRONG: {row['wrong']}" if "wrong" in row else "")
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--exporters", default="dynamo,torchscript")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--steps", default="convert,make,time")
    parser.add_argument("--tools", default="", help="make and time these alone")
    parser.add_argument("--sequence", type=int, default=128, help="tokens of a text that is timed")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--fresh", action="store_true", help="make and time anew")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    from modelops.graphs.describe import summary

    batches = [int(text) for text in options.batches.split(",")]
    for name in options.models.split(","):
        for exporter in options.exporters.split(","):
            folder = RESULTS / f"{name}-{exporter}"
            place = folder / "rows.json"
            if "convert" in options.steps and (problem := convert(name, exporter, folder)):
                print(f"\n{name}, {exporter}: not converted: {problem}")
                continue
            if not (folder / "source").exists():
                continue
            data = json.loads(place.read_text()) if place.exists() and not options.fresh else {"tools": {}, "times": {}}
            data["nodes"] = summary(folder / "source" / "model.onnx")["nodes"]
            data["bytes"] = _bytes(folder / "source")
            tools = [*PLAIN, "simplify", *((*FUSING, "simplify --fuse") if name in TRANSFORMERS else ())]
            wanted = [tool for tool in tools if not options.tools or tool in options.tools.split(",")]
            for tool in wanted if "make" in options.steps else ():
                if tool not in data["tools"]:
                    data["tools"][tool] = make(tool, folder)
                    place.write_text(json.dumps(data, indent=1) + "\n")
            for batch in batches if "time" in options.steps else ():
                if str(batch) not in data["times"]:
                    made = {tool: data["tools"][tool] for tool in wanted if tool in data["tools"]}
                    data["times"][str(batch)] = time_all(folder, made, batch, options.sequence, options.seconds)
                    place.write_text(json.dumps(data, indent=1) + "\n")
            data["tools"] = {tool: data["tools"][tool] for tool in tools if tool in data["tools"]}
            show(name, exporter, data, batches)
    return 0


if __name__ == "__main__":
    sys.exit(main())
