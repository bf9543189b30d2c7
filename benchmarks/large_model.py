"""A model of more than 2 GB through convert, inspect and validate: seconds, peak memory, and where its weights lie.

    python benchmarks/large_model.py [--gigabytes 2.5] [--keep DIR]

The model is a chain of layers with random weights and external data, written below $TMPDIR (which needs six times its
size). The last validation is against a copy with one changed weight, and has to name the node that reads it. Memory is
the resident size of all processes together, the page cache that they map included. The exit code is 1 when a command
fails, when the peak is more than three times the model, or when a weight lies in the .onnx file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "safety"), str(ROOT / "tests" / "graphs")]

from under_watch import watch  # noqa: E402

RESULTS = Path(__file__).with_name("results")
WIDTH = 4096
MOST = 3.0


def write_model(path: Path, gigabytes: float) -> int:
    """Write the model, its weights beside it; gives the bytes of both."""
    layer = WIDTH * WIDTH * 4
    count = max(1, round(gigabytes * 1e9 / layer))
    block = np.random.default_rng(0).standard_normal((WIDTH, WIDTH), dtype=np.float32) / np.float32(WIDTH**0.5)
    nodes, weights, last = [], [], "x"
    with path.with_name("weights.bin").open("wb") as file:
        for number in range(count):
            file.write(np.roll(block, 97 * number, axis=number % 2).tobytes())
            weight = TensorProto(name=f"w{number}", dims=[WIDTH, WIDTH], data_type=TensorProto.FLOAT)
            weight.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "weights.bin"), ("offset", number * layer), ("length", layer)):
                weight.external_data.add(key=key, value=str(value))
            weights.append(weight)
            nodes.append(helper.make_node("MatMul", [last, f"w{number}"], [f"h{number}"]))
            last = "y" if number == count - 1 else f"t{number}"
            nodes.append(helper.make_node("Tanh", [f"h{number}"], [last]))
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDTH])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path.stat().st_size + count * layer


def write_changed(source: Path, target: Path) -> str:
    """A copy of the model whose middle layer has one weight changed; gives the name of what that layer makes."""
    target.mkdir()
    shutil.copyfile(source / "large.onnx", target / "large.onnx")
    shutil.copyfile(source / "weights.bin", target / "weights.bin")
    layer = WIDTH * WIDTH * 4
    number = (source / "weights.bin").stat().st_size // layer // 2
    with (target / "weights.bin").open("r+b") as file:
        file.seek(number * layer + 4 * WIDTH)
        file.write(np.full(WIDTH, 0.5, np.float32).tobytes())
    return f"h{number}"


def measure(folder: Path, gigabytes: float) -> dict[str, object]:
    """Write the model into ``folder``, run the commands on it, and give what they took and what was found wrong."""
    source = folder / "source"
    source.mkdir()
    size = write_model(source / "large.onnx", gigabytes)
    steps, problems = [], []
    wrong = write_changed(source, folder / "changed")
    for words in (
        ["convert", "source/large.onnx", "made"],
        ["inspect", "made"],
        ["inspect", "made", "--verify"],
        ["validate", "made", "evidence"],
        ["validate", "made", "blamed", "--against", "changed/large.onnx"],
    ):
        seen = watch(words, folder, longest=3600)
        ratio = seen.peak_bytes / size
        steps.append({"command": " ".join(words), "seconds": seen.seconds, "peak_bytes": seen.peak_bytes})
        print(f"{steps[-1]['command']:<36} {seen.seconds:7.1f} s  {seen.peak_bytes / 2**30:5.2f} GiB  {ratio:.2f}x")
        if "--against" in words:
            located = json.loads((folder / "blamed" / "measurements.json").read_text())["located"]
            if seen.code != 1 or located["suspects"][0]["output"] != wrong:
                problems.append(f"validate ends with {seen.code} and blames {located}, not {wrong}")
        elif seen.code != 0:
            problems.append(f"{words[0]} ends with {seen.code}: {seen.output[-500:]}")
            break
        if ratio > MOST:
            problems.append(f"{words[0]} took {ratio:.1f} times the model's size")
    problems += _placed_wrongly(folder / "made")
    return {"model_bytes": size, "steps": steps, "problems": problems}


def _placed_wrongly(made: Path) -> list[str]:
    """What is wrong with where the artifact keeps its weights: below the stated size in one file, else in a second."""
    if not (made / "manifest.json").is_file():
        return ["nothing was published"]
    files = {file["path"]: file["size"] for file in json.loads((made / "manifest.json").read_text())["files"]}
    proto = onnx.load(made / "model.onnx", load_external_data=False)
    inside = [tensor.name for tensor in proto.graph.initializer if tensor.data_location != TensorProto.EXTERNAL]
    found = [f"weights in the .onnx file: {', '.join(inside[:3])}"] if inside else []
    if "model.onnx.data" not in files or files["model.onnx"] > 1 << 20:
        found.append(f"files: {files}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.5)
    parser.add_argument("--keep", type=Path, help="work in this folder, which must be empty, and leave all there")
    options = parser.parse_args()
    if options.keep is not None:
        result = measure(options.keep, options.gigabytes)
    else:
        with tempfile.TemporaryDirectory(prefix="modelops-large-") as folder:
            os.environ["MODELOPS_CACHE"] = str(Path(folder) / "cache")
            result = measure(Path(folder), options.gigabytes)
    print(f"model: {int(str(result['model_bytes'])):,} bytes; problems: {result['problems'] or 'none'}")
    RESULTS.mkdir(exist_ok=True)
    machine = {"platform": platform.platform(), "cpus": os.cpu_count()}
    (RESULTS / "large_model.json").write_text(json.dumps({**machine, **result}, indent=1) + "\n")
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
