"""Quantized models beside float and beside other quantizers: accuracy, speed, size and time, by turns in one run.

    python benchmarks/quantize.py [--models minilm resnet18 resnet50 mobilenet vit gpt2] [--seconds 3600] [--budget 60]

==========  =====================================================================  ==================================
model       what it is                                                             judged on
==========  =====================================================================  ==================================
minilm      all-MiniLM-L6-v2 (examples/minilm/prepare.py gets it)                  1,000 sentences of docstrings
resnet18    trained here once on digits of 32 by 32 pixels                         540 held-out digits
resnet50    random weights: speed, and signal to noise                             64 seeded images
mobilenet   MobileNetV2, the same                                                  64 seeded images
vit         ViT-B/16, the same                                                     32 seeded images
gpt2        GPT-2 124M, the same                                                   32 seeded sequences of 128 tokens
==========  =====================================================================  ==================================

Columns: float; onnxruntime's ``quantize_dynamic(per_channel=True)``; its ``quantize_static`` with default options, and
as an expert would call it here; NNCF; Olive; modelops dynamic, static, and what auto chose. All are given the graph
that modelops converted, whose attention is spelled out. "onnxruntime dynamic, plain export" (minilm) is what a user
has without it: the same call on what ``torch.onnx.export`` gives by default. Peers are run from an environment of
their own; without it their column says "not installed":

    python3 -m venv benchmarks/.peers/nncf && benchmarks/.peers/nncf/bin/pip install nncf onnx onnxruntime
    python3 -m venv benchmarks/.peers/olive && benchmarks/.peers/olive/bin/pip install olive-ai requests onnxruntime

Sentences are timed padded to 128 tokens, the others as they are. Beside every timing stands what it can't exceed by
much: how many times as fast as floats this CPU multiplies large matrices of 8-bit integers.

A model's columns are timed by turns in the same launches, for every batch and number of threads. What is made, judged
or timed is written to benchmarks/results/quantize/ at once: interrupt it, and go on later with the same command.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _samples import CALIBRATION, digits, pictures, sentences, tokens

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).with_name("results") / "quantize"
RECORDS = FOLDER / "records.jsonl"
PEERS = Path(__file__).with_name(".peers")
OWN = ("modelops dynamic", "modelops static", "modelops auto")
PLAIN = "onnxruntime dynamic, plain export"
BARE = {
    "onnxruntime dynamic": ("", "onnxruntime_dynamic"),
    "onnxruntime static": ("", "onnxruntime_static"),
    "onnxruntime static u8s8": ("", "onnxruntime_static_u8"),
    "NNCF": ("nncf", "nncf"),
    "Olive": ("olive", "olive"),
}
STATIC = ("onnxruntime static", "onnxruntime static u8s8", "NNCF", "Olive", "modelops static")
DYNAMIC = ("onnxruntime dynamic", "onnxruntime static u8s8", "NNCF", "Olive", "modelops dynamic", "modelops static")
# Tokens that sentences are padded to where they are timed.
LENGTH = 128


@dataclass(frozen=True)
class Subject:
    """A model: where it comes from, its data, the settings (batch, threads) that it is timed in, and its dimensions."""

    source: str
    data: Callable[[Path], None]
    settings: tuple[tuple[int, int], ...]
    columns: tuple[str, ...] = (*BARE, *OWN)
    openvino: bool = False
    inputs: tuple[str, ...] = ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument(
        "--columns",
        nargs="*",
        choices=[PLAIN, *BARE, *OWN],
        help="make and judge these alone, and time them beside float in launches of their own",
    )
    parser.add_argument("--seconds", type=float, default=3600.0, help="start nothing new after this long")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for the timing of one setting")
    parser.add_argument("--again", action="store_true", help="time again what has been timed")
    parser.add_argument("--no-timing", action="store_true", help="make and judge, and time nothing")
    given = parser.parse_args()
    end = time.monotonic() + given.seconds
    for name in given.models:
        for step in steps(name, given):
            if time.monotonic() > end:
                print("the time is up: run the same command to go on")
                break
            step()
        show(name)


def steps(name: str, given: argparse.Namespace) -> Iterator[Callable[[], None]]:
    """What is left to do for a model, in order."""
    subject, place = SUBJECTS[name], FOLDER / name
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "float" / "model.onnx").is_file():
        yield lambda: convert(subject, place)
    if not (place / "evaluation.npz").is_file():
        yield lambda: subject.data(place)
    columns = [column for column in subject.columns if column in (given.columns or subject.columns)]
    for column in columns:
        if not known(name, "made", column):
            yield lambda column=column: make(name, column, place)
    for column in columns:
        if (made := known(name, "made", column)) and made["model"] and not known(name, "judged", column):
            yield lambda column=column: judge(name, column, place)
    few = columns if given.columns else None
    for batch, threads in () if given.no_timing else subject.settings:
        if given.again or not known(name, "timed", setting(batch, threads, few)):
            yield lambda batch=batch, threads=threads: timed(name, batch, threads, place, given.budget, few)


def setting(batch: int, threads: int, few: list[str] | None = None) -> str:
    """What a timing is called: few columns alone are another one than all."""
    return f"batch {batch}, {threads} threads" + (f": {', '.join(few)}" if few else "")


def records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.is_file() else []


def known(subject: str, kind: str, column: str) -> dict[str, Any] | None:
    """The latest record of that kind; None where there is none."""
    fitting = [row for row in records() if (row["subject"], row["kind"], row["column"]) == (subject, kind, column)]
    return fitting[-1] if fitting else None


def note(subject: str, kind: str, column: str, **facts: Any) -> None:
    with open(RECORDS, "a") as file:
        file.write(json.dumps({"subject": subject, "kind": kind, "column": column, **facts}) + "\n")
    print(f"{subject}: {kind} {column} {facts.get('seconds', 0):.1f} s", flush=True)


def convert(subject: Subject, place: Path) -> None:
    source = subject.source
    if source.endswith("_resnet18.py:build") and not (place / "weights.safetensors").is_file():
        subprocess.run([sys.executable, str(ROOT / "benchmarks" / "_resnet18.py")], check=True)
    command(
        "convert", source, place / "float", "--force", *(word for text in subject.inputs for word in ("--input", text))
    )


def command(*words: object) -> int:
    return subprocess.run([sys.executable, "-m", "modelops.cli.main", *map(str, words)], check=False).returncode


def make(name: str, column: str, place: Path) -> None:
    """Make one column's model, in a process of its own; the record tells its file, or why there is none."""
    target = place / column.replace(" ", "-") / "model.onnx"
    target.parent.mkdir(exist_ok=True)
    source, feeds = place / "float" / "model.onnx", place / "calibration.npz"
    if column == PLAIN:
        source = place / "plain.onnx"
        if not source.is_file():
            script = Path(__file__).with_name("_plain_export.py")
            subprocess.run([sys.executable, str(script), str(source)], check=True, capture_output=True)
    if column in OWN:
        words = [sys.executable, __file__, "--make", name, column]
    else:
        environment, function = BARE.get(column, BARE["onnxruntime dynamic"])
        python = PEERS / environment / "bin" / "python" if environment else Path(sys.executable)
        if not python.exists():
            note(name, "made", column, model="", reason="not installed")
            return
        script = Path(__file__).with_name("_bare_quantizers.py")
        words = [str(python), str(script), function, str(source), str(target), str(feeds)]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        environ = {**os.environ, "CI": "1"}  # without Olive's telemetry
        # Some tools leave files where they are run.
        child = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=log, text=True, env=environ, cwd=target.parent
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        said = log.read().strip().splitlines()
    seconds, peak = time.monotonic() - started, usage.ru_maxrss / 1024
    if child.returncode or not target.is_file():
        note(name, "made", column, model="", reason=(said or ["no file"])[-1][:300], seconds=seconds, peak_mib=peak)
        return
    size = sum(file.stat().st_size for file in target.parent.glob("model.onnx*"))
    chosen = (target.parent / "chosen.json").read_text() if (target.parent / "chosen.json").is_file() else ""
    note(name, "made", column, model=str(target), bytes=size, seconds=seconds, peak_mib=peak, chosen=chosen)


def make_own(name: str, column: str) -> None:
    """Ours: the methods alone, without gates, so that random weights get a row too; auto with its whole search."""
    from modelops.core.artifact import Artifact, Draft
    from modelops.quantizers import REGISTRY
    from modelops.stages._workbench import SampleBench
    from modelops.stages.quantize import Quantize

    place = FOLDER / name
    source, folder = Artifact.open(place / "float"), place / column.replace(" ", "-")
    data, scratch = place / "calibration.npz", folder / "scratch"
    method = column.split()[1]
    if method == "auto":
        with np.load(place / "evaluation.npz") as stored:
            allowed = 0.02 if "labels" in stored.files else None
        stage = Quantize(data=data, eval=place / "evaluation.npz", if_slower="publish", max_drop=allowed)
        report = stage.run(source, Draft(folder))
        told = {"candidates": report.details.get("candidates"), "chosen": report.details.get("candidate")}
        (folder / "chosen.json").write_text(json.dumps(told))
        return
    scratch.mkdir(exist_ok=True)
    options = {"ranges": "auto"} if method == "static" else {}
    bench = SampleBench(source, scratch, data, None, CALIBRATION, 8)
    REGISTRY.load(method).parse(options).quantize(source.model, folder / "model.onnx", bench)


def judge(name: str, column: str, place: Path) -> None:
    """How far the outputs moved on the evaluation rows, and how many labels are still met."""
    made = known(name, "made", column)
    assert made is not None
    started = time.monotonic()
    with np.load(place / "evaluation.npz") as stored:
        arrays = {key: stored[key] for key in stored.files if key != "labels"}
        labels = stored["labels"] if "labels" in stored.files else None
    remembered = place / "outputs.npy"
    if not remembered.is_file():
        np.save(remembered, outputs(place / "float" / "model.onnx", arrays))
    before, after = np.load(remembered), outputs(Path(made["model"]), arrays)
    note(name, "judged", column, **figures(before, after, labels), seconds=time.monotonic() - started)


def outputs(model: Path, arrays: dict[str, Any]) -> Any:
    """The first output for every row, one row at a time as in use (dynamic ranges depend on the batch)."""
    from modelops.graphs import runs

    rows = []
    with runs.session(model, threads=0) as session:
        for row in range(len(next(iter(arrays.values())))):
            feed = {key: array[row : row + 1] for key, array in arrays.items()}
            if "attention_mask" in feed:  # without padding
                length = int(feed["attention_mask"].sum())
                feed = {key: array[:, :length] for key, array in feed.items()}
            found = next(iter(runs.run(session, feed).values()))
            rows.append(found.reshape(-1, found.shape[-1])[-1])
    return np.stack(rows).astype(np.float64)


def figures(before: Any, after: Any, labels: Any) -> dict[str, Any]:
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (before, after)]
    cosines = (unit[0] * unit[1]).sum(axis=1)
    nearest = []
    for x in unit:
        scores = x @ x.T
        np.fill_diagonal(scores, -2)
        nearest.append(scores.argmax(axis=1))
    noise = np.linalg.norm(before - after)
    found = {
        "rows": len(before),
        "sqnr": float(20 * np.log10(np.linalg.norm(before) / noise)) if noise else None,
        "cosine_mean": float(cosines.mean()),
        "cosine_min": float(cosines.min()),
        "nearest": float((nearest[0] == nearest[1]).mean()),
        "same_top1": float((before.argmax(1) == after.argmax(1)).mean()),
    }
    if labels is not None:
        from modelops.measures.drops import paired_bounds

        right, still = before.argmax(1) == labels, after.argmax(1) == labels
        lost, gained = int((right & ~still).sum()), int((still & ~right).sum())
        bound = paired_bounds(lost, gained, len(labels))[1]
        found |= {"top1": float(still.mean()), "top1_float": float(right.mean()), "drop_bound": bound}
    return found


def timed(name: str, batch: int, threads: int, place: Path, budget: float, few: list[str] | None = None) -> None:
    """All columns of a model, or few, in the same launches."""
    from modelops.backends import REGISTRY
    from modelops.stages._race import Contender, standings

    subject = SUBJECTS[name]
    cpu = REGISTRY.load("onnxruntime-cpu").parse({"threads": threads})
    contenders = [Contender("float", cpu, place / "float" / "model.onnx")]
    if (place / "plain.onnx").is_file():
        contenders.append(Contender("float, plain export", cpu, place / "plain.onnx"))
    for column in few or subject.columns:
        made = known(name, "made", column)
        if made is not None and made["model"]:
            contenders.append(Contender(column, cpu, Path(made["model"])))
    openvino = REGISTRY.load("openvino-cpu").parse({"threads": threads})
    if subject.openvino and not openvino.missing():
        contenders.append(Contender("float on OpenVINO", openvino, place / "float" / "model.onnx"))
        static = known(name, "made", "modelops static")
        if static is not None and static["model"]:
            contenders.append(Contender("modelops static on OpenVINO", openvino, Path(static["model"])))
    with np.load(place / "evaluation.npz") as stored:
        feed = {key: stored[key][:batch] for key in stored.files if key != "labels"}
    if "token_type_ids" in feed:
        feed = {key: np.pad(array[:, :LENGTH], ((0, 0), (0, LENGTH - array.shape[1]))) for key, array in feed.items()}
    started = time.monotonic()
    found = standings(contenders, feed, budget_seconds=budget)
    note(
        name,
        "timed",
        setting(batch, threads, few),
        seconds=time.monotonic() - started,
        launches=found.launches,
        ceiling=ceiling(),
        rows={
            one.name: {"ms": one.latency_ms, "speedup": one.speedup, "interval": one.interval}
            for one in found.standings
        },
    )


def ceiling() -> float:
    """How many times as fast as in float this CPU multiplies large matrices of 8-bit integers, on one thread."""
    from onnx import helper

    from modelops.quantizers import _kernels

    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(512, 1024)).astype(np.float32), rng.normal(size=(1024, 1024)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    floating = _kernels._model(nodes, {"w": w}, {"x": x}, "y", 1)
    rows = rng.integers(0, 256, x.shape, dtype=np.uint8)
    integer = _kernels._integer_product(rows, rng.integers(-64, 65, w.shape, dtype=np.int8))
    return _kernels._seconds(floating, {"x": x}) / _kernels._seconds(integer, {"x": rows})


def show(name: str) -> None:
    """The table of one model, in Markdown."""
    subject = SUBJECTS[name]
    settings = [setting(batch, threads) for batch, threads in subject.settings]
    runs = [known(name, "timed", setting) for setting in settings]
    columns = ["float", *subject.columns]
    columns = list(dict.fromkeys([*columns, *(column for run in runs if run for column in run["rows"])]))
    print(f"\n{name}\n\n| | MiB | made in, peak | accuracy | " + " | ".join(settings) + " |")
    print("|---|---|---|---|" + "---|" * len(settings))
    if ratios := [run["ceiling"] for run in runs if run]:
        print(f"| int8 over float32, large matrices | | | | {min(ratios):.2f} to {max(ratios):.2f} |")
    for column in columns:
        made, judged = known(name, "made", column) or {}, known(name, "judged", column) or {}
        if column in subject.columns and not made.get("model"):
            print(f"| {column} | {made.get('reason', 'not made yet')} | | | " + " | " * len(settings))
            continue
        size = f"{made['bytes'] / 2**20:.1f}" if made else ""
        seconds = f"{made['seconds']:.1f} s, {made['peak_mib']:.0f} MiB" if made else ""
        speeds = [speed(run["rows"].get(column)) if run else "" for run in runs]
        print(f"| {column} | {size} | {seconds} | {accuracy(judged)} | " + " | ".join(speeds) + " |")
    for run in {row["column"]: row for row in records() if row["subject"] == name and row["kind"] == "timed"}.values():
        if run["column"] not in settings:
            rows = "; ".join(f"{column} {speed(row)}" for column, row in run["rows"].items())
            print(f"\n{run['column']}, {run['launches']} launches: {rows}")


def accuracy(judged: dict[str, Any]) -> str:
    if not judged:
        return ""
    text = f"cosine {judged['cosine_mean']:.4f}, nearest {judged['nearest']:.3f}"
    if judged["sqnr"] is not None:
        text += f", {judged['sqnr']:.1f} dB"
    if "top1" in judged:
        drop = 100 * (judged["top1_float"] - judged["top1"])
        text += f", top1 {judged['top1']:.4f} ({drop:+.2f} lost, at most {100 * judged['drop_bound']:.2f})"
    return f"{text} (n={judged['rows']})"


def speed(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    interval = f" ({row['interval'][0]:.2f}…{row['interval'][1]:.2f})" if row["interval"] else ""
    return f"{row['speedup']:.2f}x{interval}, {row['ms']:.2f} ms"


FOUR = ((1, 1), (1, 2), (8, 1), (8, 2))
TWO = ((1, 1), (1, 2))
NETWORKS = f"{ROOT / 'benchmarks' / '_networks.py'}:"
SUBJECTS = {
    "minilm": Subject(str(ROOT / "examples" / "minilm" / "model"), sentences, FOUR, (PLAIN, *BARE, *OWN)),
    "resnet18": Subject(f"{ROOT / 'benchmarks' / '_resnet18.py'}:build", digits, TWO, STATIC, openvino=True),
    "resnet50": Subject(f"{NETWORKS}resnet50", pictures(64), TWO, STATIC),
    "mobilenet": Subject(f"{NETWORKS}mobilenet_v2", pictures(64), TWO, STATIC),
    "vit": Subject(f"{NETWORKS}vit", pictures(32), TWO, DYNAMIC),
    "gpt2": Subject(
        f"{NETWORKS}gpt2",
        tokens,
        TWO,
        DYNAMIC,
        inputs=("input_ids:int64[batch,sequence]", "attention_mask:int64[batch,sequence]"),
    ),
}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make_own(*sys.argv[2:4])
    else:
        main()
