"""Is a PASS of quantize's accuracy gate honest? Models that passed are tried on 20,000 samples that no gate has seen.

    python benchmarks/honest_gate.py [--runs 40] [--seconds 3600]

Every run is seeded, and draws a task, a model and a way to quantize it:

- tasks: scikit-learn's digits under random shifts and rotations, or ``make_classification``; more rows can be drawn
- ways: those that lose nothing, those that lose far too much, and those that lose about what is allowed, where a gate
  could be fooled: ranges that clip, 4-bit weights, one scale for a whole matrix, and what ``auto`` chooses

Nothing is timed: every model counts as faster than float.

The gate sees 3,000 rows and a budget of one point. The promise: of the runs that pass, at most 5 % lose more than a
point on the 20,000 rows; and at least half pass. The drop on 20,000 rows has an error of its own, told beside it.
Every run is added to benchmarks/results/honest_gate.jsonl at once: interrupt it, and go on later.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from modelops.core.artifact import Artifact, Draft
from modelops.graphs import runs
from modelops.graphs.wrap import wrap
from modelops.measures.distributions import proportion_bounds
from modelops.measures.drops import paired_bounds
from modelops.quantizers import REGISTRY
from modelops.stages import quantize
from modelops.stages._search import Search

RESULTS = Path(__file__).with_name("results") / "honest_gate.jsonl"
BUDGET = 0.01
TRAINING, CALIBRATION, EVALUATION, UNTOUCHED = 4000, 128, 3000, 20_000

WAYS: tuple[dict[str, Any], ...] = (
    {"name": "auto"},
    {"name": "static", "ranges": "percentile", "percentile": 99.0},
    {"name": "weights", "bits": 4, "block_size": 16},
    {"name": "static", "ranges": "percentile", "percentile": 97.0},
    {"name": "dynamic", "per_channel": False},
    {"name": "static", "ranges": "percentile", "percentile": 95.0},
    {"name": "static", "ranges": "minmax", "per_channel": False},
    {"name": "weights", "bits": 4, "block_size": 64},
    {"name": "static", "ranges": "percentile", "percentile": 90.0},
    {"name": "weights", "bits": 4, "block_size": 32},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=40, help="how many seeded runs")
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop after this long; run again to go on")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    given.results.parent.mkdir(exist_ok=True)
    done = {row["seed"]: row for row in read(given.results)}
    end = time.monotonic() + given.seconds
    for seed in range(given.runs):
        if seed in done or time.monotonic() > end:
            continue
        with tempfile.TemporaryDirectory(prefix="modelops-honest-") as folder:
            done[seed] = one_run(seed, Path(folder))
        with open(given.results, "a") as file:
            file.write(json.dumps(done[seed]) + "\n")
        print(told(done[seed]), flush=True)
    summarise([done[seed] for seed in sorted(done) if seed < given.runs])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def one_run(seed: int, folder: Path) -> dict[str, Any]:
    """Train, quantize by the gate, and hold what came out against rows that the gate has not seen."""
    rng = np.random.default_rng([seed, 20261123])
    task = "digits" if seed % 2 == 0 else "classification"
    x, labels = digits(rng) if task == "digits" else classification(seed)
    parts = np.cumsum([TRAINING, CALIBRATION, EVALUATION, UNTOUCHED])
    (xt, yt), (xc, _), (xe, ye), (xu, yu) = (
        (x[end - size : end], labels[end - size : end])
        for end, size in zip(parts, (TRAINING, CALIBRATION, EVALUATION, UNTOUCHED), strict=True)
    )
    train(xt, yt, seed, folder / "model.onnx")
    source = wrap(folder / "model.onnx", folder / "artifact")
    np.savez(folder / "calibration.npz", x=xc)
    np.savez(folder / "evaluation.npz", x=xe, labels=ye)
    way = WAYS[(seed // 2) % len(WAYS)]
    method = REGISTRY.load(way["name"]).parse({key: value for key, value in way.items() if key != "name"})
    stage = quantize.Quantize(
        method=method,
        data=folder / "calibration.npz",
        eval=folder / "evaluation.npz",
        metric="top1",
        max_drop=BUDGET,
        seed=seed,
    )
    (folder / "draft").mkdir()
    report = untimed(stage, source, folder / "draft", rng)
    drop = next((check for check in report.checks if check.name == "top1.drop"), None)
    row: dict[str, Any] = {
        "seed": seed,
        "task": task,
        "way": way,
        "made": report.details.get("candidate", way["name"]),
        "exit_code": report.exit_code,
        "verdict": drop.verdict if drop is not None else report.verdict,
        "evaluation_drop": drop.value if drop is not None else None,
    }
    model = folder / "draft" / "model.onnx"
    if model.is_file():
        row |= truth(source, model, xu, yu)
    return row


def untimed(stage: quantize.Quantize, source: Artifact, folder: Path, rng: np.random.Generator) -> Any:
    """The stage's report with made-up speeds, always faster than float: accuracy is all that counts here."""

    def look(*_: Any) -> dict[str, Any]:
        return {"ratios": [float(rng.uniform(0.1, 0.9))] * 3, "untimed": "", "latency_ms": None, "float_ms": None}

    pace = quantize.Pace("pass", "not timed", ())
    with mock.patch.object(quantize, "timed", lambda *_: pace), mock.patch.object(Search, "_look", look):
        return stage.run(source, Draft(folder))


def digits(rng: np.random.Generator) -> tuple[Any, Any]:
    """Digits, each shifted by up to a pixel and turned by up to 20 degrees, of 8 by 8 pixels in a row."""
    from scipy.ndimage import affine_transform
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    count = TRAINING + CALIBRATION + EVALUATION + UNTOUCHED
    chosen = rng.integers(0, len(images), count)
    angles, shifts = np.deg2rad(rng.uniform(-20, 20, count)), rng.uniform(-1, 1, (count, 2))
    found = np.empty((count, 64), np.float32)
    for row, (pick, angle, shift) in enumerate(zip(chosen, angles, shifts, strict=True)):
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        offset = 3.5 - turn @ (3.5 + shift)
        found[row] = affine_transform(images[pick].reshape(8, 8), turn, offset, order=1).ravel() / 16
    return found, labels[chosen]


def classification(seed: int) -> tuple[Any, Any]:
    from sklearn.datasets import make_classification

    x, labels = make_classification(
        n_samples=TRAINING + CALIBRATION + EVALUATION + UNTOUCHED,
        n_features=24,
        n_informative=12,
        n_classes=6,
        n_clusters_per_class=2,
        class_sep=1.5,
        random_state=seed,
    )
    return x.astype(np.float32), labels


def train(x: Any, labels: Any, seed: int, path: Path) -> None:
    """A perceptron of two hidden layers, as an ONNX file that gives logits."""
    import warnings

    from onnx import TensorProto, helper, numpy_helper, save
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        net = MLPClassifier((96, 64), max_iter=40, random_state=seed).fit(x, labels)
    nodes, weights, last = [], [], "x"
    for number, (matrix, bias) in enumerate(zip(net.coefs_, net.intercepts_, strict=True)):
        final = number == len(net.coefs_) - 1
        weights.append(numpy_helper.from_array(matrix.astype(np.float32), f"w{number}"))
        weights.append(numpy_helper.from_array(bias.astype(np.float32), f"b{number}"))
        name = "logits" if final else f"h{number}"
        nodes.append(helper.make_node("Gemm", [last, f"w{number}", f"b{number}"], [name], name=f"layer{number}"))
        last = name
        if not final:
            last = f"r{number}"
            nodes.append(helper.make_node("Relu", [name], [last], name=f"relu{number}"))
    graph = helper.make_graph(
        nodes,
        "perceptron",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", x.shape[1]])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(net.classes_)])],
        weights,
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def truth(source: Artifact, model: Path, x: Any, labels: Any) -> dict[str, Any]:
    """The drop on the rows that nobody has seen, and what it surely exceeds and stays below (95 % each)."""
    right = []
    for path in (source.model, model):
        with runs.session(path) as session:
            parts = [runs.run(session, {"x": part})["logits"].argmax(1) for part in np.array_split(x, 20)]
        right.append(np.concatenate(parts) == labels)
    before, after = right
    lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
    lower, upper = paired_bounds(lost, gained, len(labels))
    drop = (lost - gained) / len(labels)
    return {"true_drop": drop, "true_lower": lower, "true_upper": upper, "accuracy": float(before.mean())}


def told(row: dict[str, Any]) -> str:
    seen = "-" if row["evaluation_drop"] is None else f"{100 * row['evaluation_drop']:+.2f}"
    true = f"{100 * row['true_drop']:+.2f}" if "true_drop" in row else "-"
    return (
        f"{row['seed']:3d} {row['task']:14} {row['made']:22} {row['verdict']:13} drop seen {seen}, true {true} points"
    )


def summarise(rows: list[dict[str, Any]]) -> None:
    passed = [row for row in rows if row["exit_code"] == 0 and row["verdict"] == "pass"]
    beyond = [row for row in passed if row["true_drop"] > BUDGET]
    surely = [row for row in passed if row["true_lower"] > BUDGET]
    failed = [row for row in rows if row["verdict"] == "fail"]
    wrong = [row for row in failed if row.get("true_drop", 1.0) <= BUDGET]
    print(
        f"\n{len(rows)} runs: {len(passed)} PASS, {len(failed)} FAIL, {len(rows) - len(passed) - len(failed)} undecided"
    )
    if passed:
        upper = proportion_bounds(len(beyond), len(passed), 0.95)[1]
        print(
            f"of the {len(passed)} that passed, {len(beyond)} lose more than a point on {UNTOUCHED:,} untouched rows "
            f"({len(surely)} of them surely); the true share is at most {100 * upper:.0f} % (95 %)"
        )
    print(f"of the {len(failed)} that failed, {len(wrong)} lose no more than a point there")
    kept = len(passed) >= len(rows) / 2 and len(beyond) <= 0.05 * len(passed)
    print("the promise is kept" if kept else "the promise is NOT kept")


if __name__ == "__main__":
    main()
