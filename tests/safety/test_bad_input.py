"""What people get wrong ends with the exit code of the table and one plain message, and never waits for ever."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import hostile_models as hostile
import numpy as np
import pytest
from onnx import TensorProto, helper
from under_watch import commands, forged

from modelops.core.tensors import Signature, TensorSpec
from modelops.datasets import Context
from modelops.datasets.random import Random
from modelops.errors import InputRefused

VERBS = ("convert", "simplify", "quantize", "prune", "validate", "bench")


@pytest.fixture
def folder(tmp_path: Path, write_perceptron: Callable[..., Path]) -> Path:
    """A folder with a model in a file and in an artifact, and with things that are neither."""
    model = write_perceptron(tmp_path / "model.onnx")
    forged(model.read_bytes(), tmp_path / "made")
    for name in ("tmp", "empty", "named.onnx"):
        (tmp_path / name).mkdir()
    for name in ("pipe", "pipe.onnx", "pipe.npz", "pipe.jsonl", "pipe.py"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "endless.onnx").symlink_to("/dev/zero")
    (tmp_path / "nowhere").symlink_to("nothing")
    (tmp_path / "round").symlink_to("round")
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "empty.npz", x=np.zeros((0, 8), np.float32))
    np.savez(tmp_path / "wide.npz", x=np.zeros((4, 9), np.float32))
    np.savez(tmp_path / "nan.npz", x=np.full((4, 8), np.nan, np.float32))
    (tmp_path / "recipe.toml").write_text('source = "nothing.onnx"\n[[step]]\nstage = "convert"\n')
    return tmp_path


SOURCES = {
    "": 2,
    "nothing.onnx": 2,
    "nowhere": 2,
    "round": 2,
    "x" * 300: 4,
    "pipe": 4,
    "pipe.onnx": 4,
    "endless.onnx": 4,
    "/dev/zero": 4,
    "empty": 4,
    "named.onnx": 4,
    "text.npz": 4,
}


def test_no_source_is_waited_for_or_misread(folder: Path) -> None:
    before = sorted(os.listdir(folder))
    lines = [[VERBS[number % len(VERBS)], source, "out"] for number, source in enumerate(SOURCES)]
    lines += [["convert", source, "out"] for source in ("pipe.onnx", "endless.onnx", "empty")]
    wanted = [*SOURCES.values(), 4, 4, 4]
    for line, code, (found, said) in zip(lines, wanted, commands(lines, folder), strict=True):
        assert found == code and "Traceback" not in said and said.startswith("error: "), (line, found, said)
    assert sorted(os.listdir(folder)) == before


DATA = {
    "": 2,
    "nothing.npz": 2,
    "nowhere": 2,
    "pipe": 2,
    "pipe.npz": 2,
    "/dev/zero": 2,
    "empty": 2,
    ".": 2,
    "/usr": 2,  # and is not read through before that is said
    "text.npz": 4,
    "empty.npz": 4,
    "wide.npz": 4,
    "nan.npz": 4,
}


def test_no_data_is_waited_for_or_misread(folder: Path) -> None:
    takers = (["validate", "made", "--against", "made"], ["bench", "made"], ["prune", "made", "out"])
    lines = [[*takers[number % len(takers)], "--data", data] for number, data in enumerate(DATA)]
    lines += [["validate", "made", "--against", "made", "--data", "pipe.jsonl", "--dataset", "jsonl"]]
    started = time.monotonic()
    for line, code, (found, said) in zip(lines, [*DATA.values(), 4], commands(lines, folder), strict=True):
        assert found == code and "Traceback" not in said and "error: " in said, (line, found, said)
    assert time.monotonic() - started < 60
    assert not (folder / "out").exists()


TARGETS = {
    "": "empty",
    "made": "inside",
    "made/deeper": "inside",
    ".": "inside",
    "model.onnx": "not an artifact",
    "empty": "not an artifact",
    "nowhere": "not an artifact",
    "round": "not an artifact",
    "/dev/null": "not an artifact",
    ".out.tmp-2-1-0123abcd": "drafts",
}


def test_no_target_is_taken_that_is_something_else(folder: Path) -> None:
    before = sorted(os.listdir(folder))
    lines = [["simplify", "made", target, *more] for target in TARGETS for more in ([], ["--force"])]
    words = [word for word in TARGETS.values() for _ in range(2)]
    for line, word, (code, said) in zip(lines, words, commands(lines, folder), strict=True):
        assert code == 2 and word in said, (line, code, said)
    assert sorted(os.listdir(folder)) == before


def test_a_run_that_can_not_start_leaves_no_folder(folder: Path) -> None:
    [(code, said)] = commands([["run", "recipe.toml", "--out", "out"]], folder)
    assert code == 2 and "nothing.onnx" in said
    assert not (folder / "out").exists()


def test_a_name_that_is_not_utf_8_is_refused(folder: Path) -> None:
    for words in ([b"convert", b"\xff.onnx", b"out"], [b"convert", b"model.onnx", b"\xff"]):
        command = [os.fsencode(sys.executable), b"-m", b"modelops.cli.main", *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
        assert done.returncode == 2 and b"UTF-8" in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_work_is_done_whether_anyone_listens_or_not(closed: str, folder: Path) -> None:
    command = f"{sys.executable} -m modelops.cli.main convert model.onnx out {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert done.returncode == (6 if "full" in closed else 0)
    assert (folder / "out" / "manifest.json").is_file()


def test_an_interrupt_is_one_document_too(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "modelops.cli.main", "bench", "made", "out", "--json"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    while not list(folder.glob(".out.tmp-*")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and json.loads(out)["error"]["code"] == "interrupted", (out, errors)


def test_what_may_not_be_read_is_named(folder: Path) -> None:
    if os.getuid() == 0:
        pytest.skip("everything may be read by root")
    (folder / "made" / "model.onnx").chmod(0)
    (folder / "empty").chmod(0)
    lines = [["inspect", "made"], ["simplify", "made", "out"], ["inspect", "empty"], ["convert", "empty", "out"]]
    for line, (code, said) in zip(lines, commands(lines, folder), strict=True):
        assert code == 4 and "ermission" in said, (line, code, said)
    (folder / "empty").chmod(0o755)


def test_random_samples_for_a_model_that_takes_none_are_refused() -> None:
    signature = Signature((TensorSpec("x", "float32", (0, 4)),), (TensorSpec("y", "float32", (0, 4)),))
    with pytest.raises(InputRefused, match="no samples"):
        next(Random.parse({}).samples(Path("random:4"), Context(signature, None)))


def test_inputs_that_are_no_tensors_are_named(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    sequence = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None)
    first = helper.make_node("SequenceAt", ["s", "zero"], ["y"])
    made = helper.make_node("SequenceConstruct", ["x"], ["s"])
    models = {
        "in": hostile.model([first], [hostile.constant("zero", 0)], inputs=[sequence]),
        "out": hostile.model([made], inputs=[hostile.X], outputs=[sequence]),
    }
    for name, model in models.items():
        (tmp_path / f"{name}.onnx").write_bytes(model.SerializeToString())
    lines = [[verb, f"{name}.onnx", "made"] for name in models for verb in ("convert", "bench")]
    for line, (code, said) in zip(lines, commands(lines, tmp_path), strict=True):
        assert code == 5 and "tensors" in said, (line, code, said)
