"""The same source and options give the same artifact: elsewhere, elsewhen, on one core, in another language."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4 * 6 * 6, 16)
        self.third = torch.nn.Linear(16, 4)

    def forward(self, x):
        hidden = torch.nn.functional.gelu(self.first(x)).flatten(1)
        return self.third(torch.tanh(self.second(hidden)))

def build():
    torch.manual_seed(3)
    return Net().eval(), (torch.zeros(2, 3, 8, 8),)
"""

CHAIN = (
    ("convert", "net.py:build", "from-torch"),
    ("convert", "perceptron.onnx", "from-onnx"),
    ("simplify", "from-torch", "simple", "--engine", "onnxslim"),
    ("prune", "from-torch", "sparse", "--method", "magnitude", "--speed-budget", "0"),
    ("quantize", "from-torch", "weights", "--method", "weights", "--speed-budget", "1s"),
    ("quantize", "from-onnx", "dynamic", "--method", "dynamic", "--speed-budget", "1s", "--if-slower", "publish"),
)

DRIVER = """
import json, os, sys
os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[-int(sys.argv[1]):]))
from modelops.cli.main import run
for words in json.load(sys.stdin):
    code = run([*words, "--quiet"])
    if code:
        sys.exit(f"{words}: {code}")
"""


def made(folder: Path, write_perceptron: Callable[..., Path], *, cores: int, **environment: str) -> dict[str, str]:
    """The id of every artifact of the chain, made in this folder under these settings."""
    folder.mkdir(parents=True)
    (folder / "net.py").write_text(NET)
    write_perceptron(folder / "perceptron.onnx")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(cores)],
        input=json.dumps(CHAIN),
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **environment, "MODELOPS_CACHE": str(folder / "cache")},
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: json.loads((folder / name / "manifest.json").read_text())["id"] for _, _, name, *_ in CHAIN}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system can't pin a process to a core")
def test_artifacts_are_the_same_wherever_and_whenever_they_are_made(
    tmp_path: Path, write_perceptron: Callable[..., Path]
) -> None:
    pytest.importorskip("torch")
    here = made(
        tmp_path / "here", write_perceptron, cores=1024, TZ="UTC", PYTHONHASHSEED="1", SOURCE_DATE_EPOCH="1000000000"
    )
    there = made(
        tmp_path / "an other place" / "ünï" / "further down", write_perceptron, cores=1,
        TZ="Asia/Kathmandu", LC_ALL="C", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", PYTHONHASHSEED="77",
        HOME=str(tmp_path), COLUMNS="40",
    )  # fmt: skip
    assert here == there
    assert len(set(here.values())) == len(CHAIN)
