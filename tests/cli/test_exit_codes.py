"""One command, from end to end, for every exit code of the table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def artifact(
    tmp_path_factory: pytest.TempPathFactory, write_perceptron: Callable[..., Path], modelops: Command
) -> Path:
    folder = tmp_path_factory.mktemp("exit-codes")
    done = modelops("convert", write_perceptron(folder / "m.onnx"), folder / "made")
    assert done.returncode == 0, done.stderr
    return folder / "made"


def failed(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The error of the one document on standard output."""
    error: dict[str, str] = json.loads(done.stdout)["error"]
    assert "Traceback" not in done.stderr
    return error


def test_0_a_whole_artifact_is_shown(artifact: Path, modelops: Command) -> None:
    done = modelops("inspect", artifact, "--verify")
    assert done.returncode == 0 and "MatMul 2" in done.stdout


def test_0_quietly_nothing_is_printed(artifact: Path, modelops: Command) -> None:
    done = modelops("inspect", artifact, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_1_a_different_model_fails_its_gate(
    artifact: Path, tmp_path: Path, modelops: Command, write_perceptron: Callable[..., Path]
) -> None:
    other = write_perceptron(tmp_path / "other.onnx", seed=1)
    done = modelops("validate", artifact, tmp_path / "evidence", "--against", other, "--json")
    assert done.returncode == 1 and failed(done)["code"] == "gate-failed"
    # Evidence is written whatever the verdict.
    shown = json.loads(modelops("inspect", tmp_path / "evidence", "--json").stdout)
    assert shown["kind"] == "evidence" and shown["history"][0]["report"]["verdict"] == "fail"


def test_2_an_unknown_flag_is_usage(artifact: Path, modelops: Command) -> None:
    done = modelops("validate", artifact, "--agains", "x", "--json")
    assert done.returncode == 2 and failed(done)["code"] == "usage"


def test_3_too_few_samples_are_inconclusive(artifact: Path, tmp_path: Path, modelops: Command) -> None:
    import numpy as np

    np.savez(tmp_path / "few.npz", x=np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32))
    done = modelops("validate", artifact, "--against", artifact, "--data", tmp_path / "few.npz", "--json")
    assert done.returncode == 3 and failed(done)["code"] == "inconclusive"


def test_4_an_altered_artifact_is_refused(artifact: Path, tmp_path: Path, modelops: Command) -> None:
    import shutil

    copy = shutil.copytree(artifact, tmp_path / "copy")
    content = bytearray((copy / "model.onnx").read_bytes())
    content[-20] ^= 1
    (copy / "model.onnx").write_bytes(content)
    done = modelops("simplify", copy, tmp_path / "out", "--json")
    assert done.returncode == 4 and "model.onnx" in failed(done)["message"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "hint"),
    [("convert", "model.py:build"), ("inspect", "modelops convert"), ("bench", "modelops convert")],
)
def test_4_a_python_file_alone_is_told_how_to_name_its_function(
    command: str, hint: str, tmp_path: Path, modelops: Command
) -> None:
    (tmp_path / "model.py").write_text("raise SystemExit('never run')\n")
    target = [tmp_path / "out"] if command == "convert" else []
    done = modelops(command, tmp_path / "model.py", *target, "--json")
    assert done.returncode == 4 and hint in failed(done)["hint"]


def test_5_user_code_that_raises_fails_the_stage(tmp_path: Path, modelops: Command) -> None:
    (tmp_path / "train.py").write_text("def build():\n    raise RuntimeError('no weights today')\n")
    done = modelops("convert", f"{tmp_path / 'train.py'}:build", tmp_path / "out", "--json")
    assert done.returncode == 5 and "no weights today" in failed(done)["message"]
    assert os.listdir(tmp_path) == ["train.py"] or set(os.listdir(tmp_path)) == {"train.py", "__pycache__"}


def test_a_failure_is_reported_with_debug_too(artifact: Path, tmp_path: Path, modelops: Command) -> None:
    report = tmp_path / "report.json"
    words = ["simplify", artifact, tmp_path / "out", "--time-limit", "0.1", "--debug", "--report", f"json={report}"]
    done = modelops(*words)
    assert done.returncode == 6 and "Traceback" in done.stderr
    assert json.loads(report.read_text())["error"]["code"] == "resource-exhausted"


def test_6_a_time_limit_ends_the_stage_and_leaves_nothing(artifact: Path, tmp_path: Path, modelops: Command) -> None:
    done = modelops("simplify", artifact, tmp_path / "out", "--time-limit", "0.1", "--json")
    assert done.returncode == 6 and "0 s" in failed(done)["message"]
    assert os.listdir(tmp_path) == []


def test_6_a_full_disk_leaves_nothing(artifact: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=2k none {disk}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("unshare and tmpfs are not allowed here")
    command = f"{sys.executable} -m modelops.cli.main simplify {artifact} {disk}/out; echo code $?; ls -A {disk}"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{mount} && {command}"], capture_output=True, text=True, check=False
    )
    assert "code 6" in done.stdout, (done.stdout, done.stderr)
    assert done.stdout.strip().endswith("code 6")  # nothing is listed after it


@pytest.mark.parametrize("backend", ["onnxruntime-cuda"])
def test_7_a_device_that_is_not_here_is_named(artifact: Path, backend: str, modelops: Command) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("CUDA is here")
    done = modelops("bench", artifact, "--backend", backend, "--json")
    assert done.returncode == 7 and "pip" in failed(done)["hint"]


def test_70_a_bug_shows_its_traceback_and_where_to_report_it(artifact: Path, tmp_path: Path, modelops: Command) -> None:
    package = tmp_path / "site"
    (package / "buggy-1.0.dist-info").mkdir(parents=True)
    (package / "buggy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: buggy\nVersion: 1.0\n")
    (package / "buggy-1.0.dist-info" / "entry_points.txt").write_text("[modelops.quantizers]\nbuggy = buggy\n")
    (package / "buggy.py").write_text(
        "from modelops.quantizers import Quantizer\n"
        "class Buggy(Quantizer):\n"
        "    '''Divides by zero.'''\n"
        "    def quantize(self, source, target, workbench):\n"
        "        return 1 / 0\n"
    )
    path = os.pathsep.join([str(package), os.environ["PYTHONPATH"]])
    done = modelops("quantize", artifact, tmp_path / "out", "--method", "buggy", PYTHONPATH=path)
    assert done.returncode == 70
    assert "ZeroDivisionError" in done.stderr and "report" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_130_an_interrupt_leaves_nothing_behind(artifact: Path, tmp_path: Path, number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "modelops.cli.main", "bench", str(artifact), str(tmp_path / "out"), "--budget", "60"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Tests that a shell runs in the background inherit an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not any(entry.name.startswith(".out.tmp") for entry in tmp_path.iterdir()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in errors
    assert os.listdir(tmp_path) == []


def test_6_a_time_limit_holds_for_what_doctor_measures(modelops: Command) -> None:
    done = modelops("doctor", "--peak", "--time-limit", "0.1", "--json")
    assert done.returncode == 6 and failed(done)["code"] == "resource-exhausted"
