"""Whether validate names the node that is wrong: one node is perturbed in each of many models, and has to be found.

    python benchmarks/_zoo.py                      # once: makes the models
    python benchmarks/locator.py [--models N] [--seconds N] [--seed N]
    python benchmarks/locator.py --time MODEL      # seconds of validate, plain and with --locate, of a model artifact

The models are CNNs and transformers (random weights) from both exporters, held against themselves, and int8 models in
QDQ form, held against the float model: there every node is off by something, and the perturbed one by more. A
perturbation counts only when it moves an output: by more than 1e-4 of its scale, or, for int8, so that SQNR falls by
6 dB. ``right`` says that the first suspect is the perturbed node itself, ``third`` that it is among three.
Results are appended to ``results/locator.jsonl`` and read back from it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from _mutants import KINDS, Mutant, mutants, scale, zero_point
from _zoo import float_of, models

from modelops.core.artifact import Artifact
from modelops.errors import ModelOpsError
from modelops.graphs import describe, runs, seeded
from modelops.graphs.matching import noise
from modelops.measures.distributions import wilson
from modelops.stages._locate import Locator, Suspect

RESULTS = Path(__file__).with_name("results") / "locator.jsonl"
ROWS = 8
# What breaks one node of a quantized model beyond what quantization itself does.
_BROKEN = {
    "weight x1.02": scale(4.0), "quantized scale x1.02": scale(0.2), "zero point + 1": zero_point(60),
    "scales of other channels": KINDS["scales of other channels"], "transposed weight": KINDS["transposed weight"],
    "other operator": KINDS["other operator"], "swapped inputs": KINDS["swapped inputs"],
}  # fmt: skip


def feed_of(path: Path) -> dict[str, Any]:
    return seeded.random_feed(describe.signature(path), ROWS, 5, bounds=seeded.index_bounds(path))


def outputs(path: Path, feed: dict[str, Any]) -> dict[str, Any]:
    with runs.session(path, trusted=True, optimization="disabled") as session:
        return runs.run(session, feed)


def moved(before: dict[str, Any], after: dict[str, Any]) -> float:
    """The largest difference as a share of the output's scale; infinite where shapes or masks differ."""
    worst = 0.0
    for name, one in before.items():
        other = after[name]
        if one.shape != other.shape or math.isinf(noise(one, other)):
            return math.inf
        size = float(np.abs(one[np.isfinite(one)]).max(initial=0.0)) or 1.0
        worst = max(worst, float(np.abs(np.nan_to_num(one) - np.nan_to_num(other)).max(initial=0.0)) / size)
    return worst


def perturbed(path: Path, reference: Path, seed: int, place: Path) -> tuple[Mutant, float] | None:
    """The first mutant that moves an output enough; it lies at ``place`` then."""
    model, chance = onnx.load(path), random.Random(f"{path.name} {seed}")
    quantized = path != reference
    feed = feed_of(reference)
    target = outputs(reference, feed)
    usual = max(noise(target[n], v) for n, v in outputs(path, feed).items()) if quantized else 0.0
    for mutant in mutants(model, chance, _BROKEN if quantized else None):
        place.write_bytes(mutant.model.SerializeToString())
        try:
            found = outputs(place, feed)
        except ModelOpsError:
            continue
        if quantized:
            error = max(noise(target[n], v) for n, v in found.items())
            if 2 * usual < error < math.inf:
                return mutant, error
        elif (error := moved(target, found)) > 1e-4:
            return mutant, error
    return None


def trial(path: Path, seed: int) -> dict[str, Any]:
    """One model with one node perturbed, and whom the locator blames."""
    reference = float_of(path) if path.name.startswith("qdq-") else path
    row: dict[str, Any] = {"model": path.stem, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "mutant.onnx"
        found = perturbed(path, reference, seed, place)
        if found is None:
            return {**row, "skipped": "nothing in it moves an output"}
        mutant, error = found
        row |= {"kind": mutant.kind, "node": mutant.node, "op": mutant.op, "moved": min(error, 1e9)}
        started = time.perf_counter()
        with Locator(reference, place, feed_of(reference), Path(folder), loose=path != reference) as locator:
            located = locator.run()
            named = [[suspect.node, *suspect.nodes] for suspect in located.suspects]
        hits = [_is(mutant, suspect) for suspect in located.suspects]
        place_of = hits.index(True) + 1 if True in hits else None
        return row | {
            "place": place_of,
            "right": place_of == 1,
            "third": place_of is not None and place_of <= 3,
            "named": [one[0] for one in named[:3]],
            "nodes_named": len(named[0]) - 1 if named else 0,
            "seconds": round(time.perf_counter() - started, 2),
        }


def _is(mutant: Mutant, suspect: Suspect) -> bool:
    """The named node itself; or, where a mutant put other nodes in its place, the one that makes its output."""
    return suspect.node == mutant.node or (suspect.output == mutant.output and mutant.kind == "tanh for erf")


def done() -> dict[tuple[str, int], dict[str, Any]]:
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    return {(row["model"], row["seed"]): row for row in rows}


def summary(rows: list[dict[str, Any]]) -> None:
    counted = [row for row in rows if "skipped" not in row]
    for group in ("cnn", "transformer", "qdq", ""):
        part = [row for row in counted if row["model"].startswith(group)]
        if not part:
            continue
        right, third = sum(row["right"] for row in part), sum(row["third"] for row in part)
        low, high = wilson(right, len(part))
        print(
            f"{group or 'all':<12} {len(part):4} models: first {right} ({right / len(part):.1%}, 95 % interval "
            f"{low:.1%} to {high:.1%}), among three {third} ({third / len(part):.1%})"
        )
    for row in counted:
        if not row["right"]:
            print(f"  missed: {row['model']} {row['kind']} at {row['node']} ({row['op']}): {row['named']}")


def timed(model: Path) -> None:
    """Seconds of three validations each, of a model against a copy with one perturbed weight."""
    with tempfile.TemporaryDirectory() as folder:
        source = Artifact.open(model).model if model.is_dir() else model
        changed = Path(folder) / "changed.onnx"
        one = next(mutants(onnx.load(source), random.Random(0), {"weight x1.02": scale(1.02)}))
        changed.write_bytes(one.model.SerializeToString())
        seconds: dict[str, list[float]] = {"plain": [], "with the node": []}
        for number in range(6):
            name = list(seconds)[number % 2]
            given, flags = (source, ["--no-invariance"]) if name == "plain" else (changed, ["--no-invariance"])
            words = [
                sys.executable,
                "-m",
                "modelops.cli.main",
                "validate",
                str(given),
                "--against",
                str(source),
                *flags,
            ]
            started = time.perf_counter()
            code = subprocess.run(words, capture_output=True, check=False).returncode
            seconds[name].append(time.perf_counter() - started)
            assert code == (0 if name == "plain" else 1), code
        plain, located = (float(np.median(values)) for values in seconds.values())
        print(f"plain {plain:.2f} s, with the wrong node {located:.2f} s: {located / plain:.2f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=60, help="models to perturb")
    parser.add_argument("--seconds", type=float, default=3600.0, help="time to spend")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time", type=Path, metavar="MODEL", help="time one model instead")
    options = parser.parse_args()
    if options.time:
        timed(options.time)
        return
    known, end = done(), time.monotonic() + options.seconds
    chance = random.Random(options.seed)
    groups = [models("cnn"), models("transformer"), models("qdq")]
    for group in groups:
        chance.shuffle(group)
    order = [group[n] for n in range(max(map(len, groups))) for group in groups if n < len(group)]
    rows: list[dict[str, Any]] = []
    for path in order:
        if sum("skipped" not in row for row in rows) >= options.models or time.monotonic() > end:
            break
        row = known.get((path.stem, options.seed))
        if row is None:
            try:
                row = trial(path, options.seed)
            except ModelOpsError as error:
                row = {"model": path.stem, "seed": options.seed, "skipped": f"error: {error.message[:200]}"}
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
        rows.append(row)
    summary(rows)


if __name__ == "__main__":
    main()
