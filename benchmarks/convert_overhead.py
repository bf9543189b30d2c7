"""What `modelops convert` adds around the call of the exporter: seconds by part, and the peak of memory, beside a peer.

    python benchmarks/convert_overhead.py [--runs 3] [--seconds 3600] [--only minilm,vit] [--optimum PYTHON]

Models: all-MiniLM-L6-v2 (real weights, after `python examples/minilm/prepare.py`), and ResNet-50, ViT-base,
MobileNetV2 and GPT-2 124M with seeded random weights, written below --models first. Three tools take turns:

    modelops    modelops convert DIR OUT
    bare        from_pretrained and torch.onnx.export in one script: no check, no second shape
    optimum     optimum-cli export onnx: checks one shape, and ends with 0 on a mismatch

The peer needs an environment of its own; without it its rows say "not installed":

    python -m venv benchmarks/.peers/optimum
    benchmarks/.peers/optimum/bin/pip install torch==2.13.0 optimum==2.1.0 optimum-onnx==0.1.0 transformers==4.57.6 \\
        onnx==1.23.2 onnxruntime==1.32.0

Columns: ``wall`` of the whole command; ``call``, the calls of torch.onnx.export and what they import; ``load``, torch,
transformers and the weights, which any script needs; ``float64``, the source's run in float64; ``rest`` is everything
else: starting, the checks at four shapes or more, writing, describing and hashing, as far as it does not happen during
the call. ``rest/call`` holds it against the call that it was added to, ``rest/bare`` against that of the bare script,
which nothing runs beside, and which writes the file. ``peak`` is the resident memory of all processes together at one
moment; what a process shares with its copy counts twice. Every run is a line of results/convert_overhead.jsonl, and is
not repeated once it passed. With --runs above 1 the table shows medians. The exit code is 1 where the rest takes longer
than the call on MiniLM, ResNet-50 or ViT, or GPT-2 peaks above four times its weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from modelops.core import worker

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results") / "convert_overhead.jsonl"
MINILM = ROOT / "examples" / "minilm" / "model"
OPTIMUM = Path(__file__).with_name(".peers") / "optimum/bin/python"
# By name: the class and configuration of the random model, and what optimum calls its task.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "minilm": ("", {}, "feature-extraction"),
    "resnet50": ("ResNetForImageClassification", {"num_labels": 1000}, "image-classification"),
    "vit": ("ViTForImageClassification", {"num_labels": 1000}, "image-classification"),
    "mobilenetv2": ("MobileNetV2ForImageClassification", {"num_labels": 1001}, "image-classification"),
    "gpt2": ("GPT2LMHeadModel", {}, "text-generation"),
}
TOOLS = ("modelops", "bare", "optimum")
HELD = ("minilm", "resnet50", "vit")
MOST_OF_WEIGHTS = 4.0

BARE = """
import inspect, json, os, sys, time
started = time.monotonic()
import torch, transformers
folder, target = sys.argv[1:]
config = json.load(open(os.path.join(folder, "config.json")))
cls = getattr(transformers, config["architectures"][0])
model = cls.from_pretrained(folder, dtype=torch.float32).eval()
model.config.use_cache = False
if model.main_input_name == "input_ids":
    ids = torch.randint(0, model.config.vocab_size, (2, 12))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "token_type_ids" in inspect.signature(model.forward).parameters and hasattr(model.config, "type_vocab_size"):
        inputs["token_type_ids"] = torch.zeros_like(ids)
    shapes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in inputs}
else:
    inputs = {"pixel_values": torch.randn(2, 3, 224, 224)}
    shapes = {name: {0: torch.export.Dim.DYNAMIC} for name in inputs}
loaded = time.monotonic()
torch.onnx.export(model, (), target + ".onnx", kwargs=inputs, dynamic_shapes=shapes, dynamo=True, verbose=False)
called = time.monotonic()
json.dump({"load": loaded - started, "call": called - loaded}, open(target + ".json", "w"))
"""

PEER = """
import json, os, sys, time
import torch.onnx
export, target, spent = torch.onnx.export, sys.argv.pop(1), [0.0]
def timed(*args, **kwargs):
    started = time.monotonic()
    try:
        return export(*args, **kwargs)
    finally:
        spent[0] += time.monotonic() - started
        json.dump({"call": spent[0]}, open(target + ".json", "w"))
torch.onnx.export = timed
from optimum.commands.optimum_cli import main
sys.argv[0] = "optimum-cli"
main()
"""


def prepared(name: str, folder: Path) -> Path | None:
    """The directory of a model; None where MiniLM was not fetched."""
    cls, values, _ = MODELS[name]
    if not cls:
        return MINILM if (MINILM / "model.safetensors").is_file() else None
    place = folder / name
    if not (place / "model.safetensors").is_file():
        script = (
            "import json, sys, torch, transformers\n"
            "cls = getattr(transformers, sys.argv[1])\n"
            "torch.manual_seed(0)\n"
            "cls(cls.config_class(**json.loads(sys.argv[2]))).save_pretrained(sys.argv[3])\n"
        )
        subprocess.run([sys.executable, "-c", script, cls, json.dumps(values), str(place)], check=True)
    return place


def words(tool: str, model: Path, task: str, target: Path, optimum: Path) -> list[str]:
    if tool == "modelops":
        return [sys.executable, "-m", "modelops.cli.main", "convert", str(model), str(target), "--json"]
    if tool == "bare":
        return [sys.executable, "-c", BARE, str(model), str(target)]
    options = ["export", "onnx", "--model", str(model), "--task", task, str(target)]
    return [str(optimum), "-c", PEER, str(target), *options]


def watched(command: list[str], output: Path) -> tuple[int, float, int]:
    """(exit code, seconds, most resident bytes of all its processes together) of a command."""
    started, peak = time.monotonic(), 0
    with output.open("wb") as file, output.with_suffix(".err").open("wb") as errors:
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        process = subprocess.Popen(command, stdout=file, stderr=errors, stdin=subprocess.DEVNULL, env=env)
        while process.poll() is None:
            peak = max(peak, sum(worker.resident_bytes(pid) for pid in worker.tree(process.pid)))
            time.sleep(0.02)
    return process.returncode, time.monotonic() - started, peak


def run(tool: str, name: str, model: Path, optimum: Path) -> dict[str, Any]:
    """One conversion, and where its time went."""
    with tempfile.TemporaryDirectory(prefix="modelops-overhead-") as folder:
        target, output = Path(folder) / "out", Path(folder) / "output"
        os.environ["MODELOPS_CACHE"] = str(Path(folder) / "cache")
        code, wall, peak = watched(words(tool, model, MODELS[name][2], target, optimum), output)
        said, errors = (path.read_text(errors="replace") for path in (output, output.with_suffix(".err")))
        row: dict[str, Any] = {"exit": code, "wall": wall, "peak": peak, "load": None, "call": None, "float64": None}
        if tool == "modelops" and said.startswith("{"):
            document = json.loads(said)
            details = document["report"]["details"]
            seconds = details["seconds"]
            row |= {"parts": seconds, "rung": details.get("rung"), "verdict": document["verdict"]}
            row |= {"load": seconds["opening"], "call": seconds["export"], "float64": seconds.get("float64", 0.0)}
            row |= {"rows": [entry["inputs"] for entry in details.get("shapes", ()) if "inputs" in entry]}
        elif target.with_suffix(".json").is_file():
            row |= json.loads(target.with_suffix(".json").read_text())
        if tool == "optimum" and "max diff" in (said + errors).lower():
            row["verdict"] = "max diff" + (said + errors).lower().split("max diff")[1].split("\n")[0][:60]
        if code != 0:
            row["said"] = (said + errors)[-500:]
    if row["call"] is not None:
        row["rest"] = wall - row["call"] - (row["load"] or 0.0) - (row["float64"] or 0.0)
    return row


def known() -> list[dict[str, Any]]:
    if not RESULTS.is_file():
        return []
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines() if line.strip()]
    return [row for row in rows if row["exit"] == 0]


def weights(model: Path) -> int:
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))


def table(rows: list[dict[str, Any]], models: dict[str, Path | None], optimum: Path) -> list[str]:
    """The lines of the table, and of what is not held."""
    head = ("runs", "wall", "call", "load", "float64", "rest", "rest/call", "rest/bare", "peak MiB", "of weights")
    lines = [("{:<12}{:<10}" + "{:>10}" * 10).format("model", "tool", *head)]
    for name, model in models.items():
        if model is None:
            lines.append(f"{name:<12}not there: python examples/minilm/prepare.py")
            continue
        bare = middle([row for row in rows if (row["model"], row["tool"]) == (name, "bare")], "call")
        for tool in TOOLS:
            mine = [row for row in rows if (row["model"], row["tool"]) == (name, tool)]
            if not mine:
                lines.append(f"{name:<12}{tool:<10}" + ("not installed" if tool == "optimum" else "not run"))
                continue
            lines.append(_line(name, tool, mine, weights(model), bare))
    return lines


def _line(name: str, tool: str, rows: list[dict[str, Any]], size: int, bare: float | None = None) -> str:
    def shown(key: str) -> str:
        value = middle(rows, key)
        return "-" if value is None else f"{value:.1f}"

    call, rest, peak = middle(rows, "call"), middle(rows, "rest"), middle(rows, "peak") or 0.0
    ratios = [f"{rest / by:.2f}" if by and rest is not None and tool != "optimum" else "-" for by in (call, bare)]
    cells = (len(rows), *map(shown, ("wall", "call", "load", "float64", "rest")), *ratios)
    text = f"{name:<12}{tool:<10}" + ("{:>10}" * 10).format(*cells, f"{peak / 2**20:.0f}", f"{peak / size:.2f}x")
    ends = {f"exit {row['exit']} {row.get('verdict') or ''}".strip() for row in rows}
    return f"{text}  {'; '.join(sorted(ends))}"


def middle(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return statistics.median(values) if values else None


def problems(rows: list[dict[str, Any]], models: dict[str, Path | None]) -> list[str]:
    """What was promised and does not hold."""
    found = []
    for name, model in models.items():
        mine = [row for row in rows if (row["model"], row["tool"]) == (name, "modelops")]
        if model is None or not mine:
            continue
        found += [f"{name}: exit {row['exit']}: {row.get('said', '')[-200:]}" for row in mine if row["exit"] != 0]
        call, rest, peak = middle(mine, "call"), middle(mine, "rest"), middle(mine, "peak")
        if name in HELD and call and rest and rest > call:
            found.append(f"{name}: the rest takes {rest:.1f} s, the call {call:.1f} s")
        if name == "gpt2" and peak and peak > MOST_OF_WEIGHTS * weights(model):
            found.append(f"{name}: peaks at {peak / weights(model):.2f} times its weights")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no run after this")
    parser.add_argument("--only", default="", help="models, by name, with commas between")
    parser.add_argument("--tools", default=",".join(TOOLS), help="tools, by name, with commas between")
    parser.add_argument("--models", type=Path, default=Path(__file__).with_name("results") / "overhead-models")
    parser.add_argument("--optimum", type=Path, default=OPTIMUM, help="the python of the peer's environment")
    parser.add_argument("--anew", action="store_true", help="forget earlier runs")
    options = parser.parse_args()
    names = [name for name in MODELS if not options.only or name in options.only.split(",")]
    if options.anew:
        RESULTS.unlink(missing_ok=True)
    RESULTS.parent.mkdir(exist_ok=True)
    options.models.mkdir(parents=True, exist_ok=True)
    models = {name: prepared(name, options.models) for name in names}
    tools = [tool for tool in options.tools.split(",") if tool != "optimum" or options.optimum.is_file()]
    started, rows = time.monotonic(), known()
    print(f"{platform.platform()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}; by turns, {options.runs} runs")
    for number in range(options.runs):
        for name, model in models.items():
            for tool in tools:
                done = [row for row in rows if (row["model"], row["tool"]) == (name, tool)]
                if model is None or len(done) > number or time.monotonic() - started > options.seconds:
                    continue
                row = {"model": name, "tool": tool, "load1": os.getloadavg()[0]}
                row |= run(tool, name, model, options.optimum)
                rows.append(row)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(_line(name, tool, [row], weights(model)), flush=True)
    print("\n".join(["", *table(rows, models, options.optimum)]))
    broken = problems(rows, models)
    print("\n".join(["", *broken]) if broken else "\nall of it holds")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
