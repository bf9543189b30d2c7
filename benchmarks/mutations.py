"""Whether validate kills mutants, and leaves the models alone that they were made of.

    python benchmarks/_zoo.py                      # once: makes the CNNs, transformers and int8 models
    python benchmarks/mutations.py [--models N] [--each N] [--seconds N] [--seed N]
    python benchmarks/mutations.py --summary

Models are those of the zoo and of onnx's own backend suite (shipped and generated) that validate can judge: the model
against itself must pass. Unmodified, each is judged twice, as onnxruntime runs it unoptimised on one thread against
all optimisations on one and on two threads (quantized models, whose kernels for integers rightly differ from those for
floats, optimised on both sides); a verdict of "fail" there is a false alarm. Then up to ``--each`` mutants of every
model are judged as structural changes on inputs that validate makes up. Whether a mutant changes an output is told on
other inputs: 128 rows of other seeds and of three scales. Three bands are counted apart, by the largest change as a
share of the output's scale::

    changed    above 1e-4       has to be killed
    edge       2e-5 to 1e-4     near the gate
    noise      below            what float32 itself does

Results are appended to ``results/mutations.jsonl`` and read back from it, so that a run goes on where one ended.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from _mutants import mutants
from _zoo import models

from modelops.core.artifact import Artifact, drafting
from modelops.errors import ModelOpsError
from modelops.graphs import runs, seeded
from modelops.graphs.batches import BatchAxis
from modelops.graphs.wrap import wrap
from modelops.measures.distributions import wilson
from modelops.measures.judging import judge
from modelops.stages._measuring import Given, Side, compare_models
from modelops.stages.validate import Validate

RESULTS = Path(__file__).with_name("results") / "mutations.jsonl"
CHANGED, EDGE = 1e-4, 2e-5


def sources(seed: int) -> list[tuple[str, Any]]:
    """(name, how to get the model) of everything, in an order drawn once."""
    from _onnx_cases import load

    found: list[tuple[str, Any]] = [(path.stem, path) for path in models("cnn", "transformer", "qdq")]
    suite = load()
    shipped = [(case.name, case.model) for case in suite if case.kind != "node"]
    generated = [(case.name, case.model) for case in suite if case.kind == "node"]
    random.Random(seed).shuffle(found)
    random.Random(seed).shuffle(shipped)
    random.Random(seed).shuffle(generated)
    groups = [found, shipped, generated]
    return [group[n] for n in range(max(map(len, groups))) for group in groups if n < len(group)]


def verdict(candidate: Artifact, reference: Artifact, threads: int = 1) -> str:
    """What validate says of one model against another."""
    with tempfile.TemporaryDirectory() as folder, drafting(Path(folder) / "out") as publication:
        stage = Validate.parse(
            {
                "against": str(reference.path),
                "invariance": False,
                "backend": {"name": "onnxruntime-cpu", "threads": threads},
            }
        )
        return str(stage.run(candidate, publication.draft).verdict)


def alarms(artifact: Artifact) -> dict[str, str]:
    """The verdict on the same model run in another way, by the number of threads."""
    signature = artifact.signature
    bounds = seeded.index_bounds(artifact.model)
    axis = BatchAxis.of(signature)
    quantized = {"QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "MatMulInteger", "ConvInteger"}
    plain = not quantized & set(artifact.manifest.model["operators"])
    found = {}
    for threads in (1, 2):
        stream = [
            Given(feed, axis.rows(feed), str(n), made_up=True)
            for n, feed in enumerate(seeded.random_feeds(signature, 32, 0, bounds))
        ]
        with (
            runs.session(artifact.model, trusted=True, optimization="disabled" if plain else "all") as one,
            runs.session(artifact.model, trusted=True, threads=threads) as other,
        ):
            differences = compare_models(
                Side(_Runs(one, signature), signature), Side(_Runs(other, signature), signature), stream
            ).differences
        verdicts = [check.verdict for check in judge(differences, "structural", agreement_evaluated=False)]
        found[str(threads)] = "fail" if "fail" in verdicts else "no alarm"
    return found


class _Runs:
    """A session as Side takes it."""

    def __init__(self, session: runs.Session, signature: Any) -> None:
        self._session, self.signature = session, signature

    def run(self, feed: Any) -> dict[str, Any]:
        return runs.run(self._session, feed)


def change(reference: Artifact, mutant: Path) -> float:
    """The largest change of an output on other inputs, as a share of its scale; infinite for shapes, masks, errors."""
    signature, bounds = reference.signature, seeded.index_bounds(reference.model)
    worst = 0.0
    with runs.session(reference.model, trusted=True) as one:
        try:
            other = runs.session(mutant, trusted=True)
        except ModelOpsError:
            return math.inf
        with other:
            for feed in _others(signature, bounds):
                try:
                    wanted = runs.run(one, feed)
                except ModelOpsError:
                    continue
                try:
                    worst = max(worst, _moved(wanted, runs.run(other, feed)))
                except ModelOpsError:
                    return math.inf
                if worst > 1:
                    break
    return worst


def _others(signature: Any, bounds: Any) -> Iterator[dict[str, Any]]:
    count = 4 if BatchAxis.of(signature).symbol else 16
    for seed in range(1000, 1000 + count):
        feed = seeded.random_feed(signature, 32, seed, bounds=bounds)
        factor = (1.0, 1.0, 0.1, 3.0)[seed % 4]
        yield {n: (a * a.dtype.type(factor) if a.dtype.kind == "f" else a) for n, a in feed.items()}


def _moved(before: dict[str, Any], after: dict[str, Any]) -> float:
    worst = 0.0
    for name, one in before.items():
        other = after[name]
        if one.shape != other.shape or one.dtype != other.dtype:
            return math.inf
        if one.dtype.kind != "f":
            worst = max(worst, 0.0 if np.array_equal(one, other) else math.inf)
            continue
        y, x = one.astype(np.float64), other.astype(np.float64)
        both = np.isfinite(y) & np.isfinite(x)
        if not (both | (y == x) | (np.isnan(y) & np.isnan(x))).all():
            return math.inf
        size = float(np.abs(y[both]).max(initial=0.0))
        off = float(np.abs(y[both] - x[both]).max(initial=0.0))
        worst = max(worst, off / size if size else (math.inf if off else 0.0))
    return worst


def study(name: str, given: Any, each: int, seed: int) -> dict[str, Any]:
    """One model, unmodified and mutated."""
    row: dict[str, Any] = {"model": name, "seed": seed}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        proto = onnx.load(given) if isinstance(given, Path) else given
        bare = folder / "model.onnx"
        bare.write_bytes(proto.SerializeToString())
        try:
            artifact = wrap(bare, folder / "artifact")
            found = verdict(artifact, artifact)
            if found != "pass":
                return {**row, "skipped": f"the model against itself is {found}"}
            row["alarms"] = alarms(artifact)
            row["self_2_threads"] = verdict(artifact, artifact, threads=2)
        except ModelOpsError as error:
            return {**row, "skipped": error.message[:200]}
        row["mutants"] = []
        plain = onnx.load(artifact.model)
        for number, mutant in enumerate(mutants(plain, random.Random(f"{name} {seed}"))):
            if len(row["mutants"]) >= each:
                break
            place = folder / f"mutant{number}.onnx"
            place.write_bytes(mutant.model.SerializeToString())
            moved = change(artifact, place)
            try:
                verdict_of = verdict(wrap(place, folder / f"mutant{number}"), artifact)
            except ModelOpsError as error:
                verdict_of = f"refused: {error.message[:80]}"
            row["mutants"].append(
                {"kind": mutant.kind, "op": mutant.op, "moved": min(moved, 1e9), "verdict": verdict_of}
            )
    return row


def summary(rows: list[dict[str, Any]]) -> None:
    counted = [row for row in rows if "mutants" in row]
    wrong = [(row["model"], n) for row in counted for n, v in row["alarms"].items() if v == "fail"]
    wrong += [(row["model"], "2, itself") for row in counted if row["self_2_threads"] != "pass"]
    print(f"{len(counted)} models ({sum('skipped' in row for row in rows)} could not be judged)")
    print(f"false alarms on unmodified models: {len(wrong)} of {3 * len(counted)} {wrong or ''}")
    every = [(row["model"], one) for row in counted for one in row["mutants"]]
    for band, low, high in (("changed", CHANGED, math.inf), ("edge", EDGE, CHANGED), ("noise", -1.0, EDGE)):
        part = [(model, one) for model, one in every if low < one["moved"] <= high]
        if not part:
            continue
        killed = [one for _, one in part if one["verdict"] == "fail" or one["verdict"].startswith("refused")]
        a, b = wilson(len(killed), len(part))
        print(
            f"{band:<8} {len(part):5} mutants, killed {len(killed)} ({len(killed) / len(part):.2%}, {a:.2%} to {b:.2%})"
        )
        if band != "noise":
            for model, one in part:
                if one not in killed:
                    print(
                        f"  survivor: {model}: {one['kind']} at {one['op']}, moved {one['moved']:.2g}, {one['verdict']}"
                    )
    print("by kind:", dict(Counter(one["kind"] for _, one in every if one["moved"] > CHANGED).most_common()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=150, help="models to judge")
    parser.add_argument("--each", type=int, default=8, help="mutants of each, at most")
    parser.add_argument("--seconds", type=float, default=3600.0, help="time to spend")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--summary", action="store_true", help="only read the results")
    options = parser.parse_args()
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    known = {row["model"]: row for row in map(json.loads, lines) if row["seed"] == options.seed}
    if options.summary:
        summary(list(known.values()))
        return
    end = time.monotonic() + options.seconds
    rows: list[dict[str, Any]] = []
    for name, given in sources(options.seed):
        if sum("mutants" in row for row in rows) >= options.models or time.monotonic() > end:
            break
        if name not in known:
            known[name] = study(name, given, options.each, options.seed)
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(known[name]) + "\n")
        rows.append(known[name])
    summary(rows)


if __name__ == "__main__":
    main()
