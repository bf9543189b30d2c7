"""Which form of attention and which exporter make the model that onnxruntime runs fastest: what --attention auto knows.

    python benchmarks/convert_attention.py [--models DIR ...] [--budget 60s] [--seconds 3600]

Every model, by default all-MiniLM-L6-v2 (after `python examples/minilm/prepare.py`), is converted with the plain and
the fused form of attention by both exporters. `modelops bench` races each against the fused form from dynamo, which is
what an export does unless somebody says otherwise: in fresh processes, by turns, with a 95 % interval. Every race is a
line of results/convert_attention.jsonl, and is not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results") / "convert_attention.jsonl"
MINILM = ROOT / "examples" / "minilm" / "model"
FORMS = [("sdpa", "dynamo"), ("eager", "dynamo"), ("eager", "torchscript"), ("sdpa", "torchscript")]


def modelops(*words: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "modelops.cli.main", *words, "--json"], capture_output=True, text=True, check=False
    )
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def converted(model: Path, folder: Path, attention: str, exporter: str) -> Path:
    target = folder / f"{model.name}-{attention}-{exporter}"
    if not target.exists():
        words = ["convert", str(model), str(target), "--attention", attention, "--exporter", exporter]
        document = modelops(*words)
        if document["exit_code"] != 0:
            raise SystemExit(f"{' '.join(words)}: {document['error']}")
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", default=[MINILM])
    parser.add_argument("--budget", default="60s", help="time for each race")
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no race after this")
    options = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    known = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="modelops-attention-") as folder:
        for model in options.models:
            for attention, exporter in FORMS[1:]:
                key = {"model": model.name, "attention": attention, "exporter": exporter}
                if any(key.items() <= row.items() for row in known) or time.monotonic() - started > options.seconds:
                    continue
                base = converted(model, Path(folder), *FORMS[0])
                other = converted(model, Path(folder), attention, exporter)
                document = modelops("bench", str(other), "--against", str(base), "--budget", options.budget)
                metrics = {entry["name"]: entry for entry in document["report"]["metrics"]}
                row = {**key, "speedup": metrics.get("speedup", {}), "verdict": document["verdict"]}
                known.append(row)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    for row in known:
        value, interval = row["speedup"].get("value"), row["speedup"].get("interval")
        print(f"{row['model']:<24}{row['attention']:<7}{row['exporter']:<12}{value} {interval}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
