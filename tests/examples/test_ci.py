"""The examples for GitHub and GitLab: valid by their schemas, and every line of theirs runs as it stands."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import modelops

CI = Path(__file__).parents[2] / "examples" / "ci"
PACKAGE = Path(modelops.__file__).parent
GITHUB = yaml.safe_load((CI / "github-actions.yml").read_text())
GITLAB = yaml.safe_load((CI / "gitlab-ci.yml").read_text())

MODEL = """
import numpy as np
import torch


class Nearest(torch.nn.Module):
    def __init__(self, centres):
        super().__init__()
        self.layer = torch.nn.Linear(*reversed(centres.shape))
        with torch.no_grad():
            self.layer.weight.copy_(centres)
            self.layer.bias.copy_(-0.5 * (centres**2).sum(1))

    def forward(self, x):
        return self.layer(x)


def build():
    centres = torch.from_numpy(np.load("centres.npy"))
    return Nearest(centres).eval(), {"x": torch.randn(8, centres.shape[1])}
"""


def lines() -> list[str]:
    """Every command of both files, in the order of the jobs, each once."""
    steps = [step["run"] for job in GITHUB["jobs"].values() for step in job["steps"] if "run" in step]
    return list(dict.fromkeys([*steps, *(line for job in GITLAB.values() for line in job["script"])]))


def repository(folder: Path) -> Path:
    """What a user's repository holds: the model, its data, the script, and modelops as a wheel."""
    rng = np.random.default_rng(11)
    centres = rng.normal(size=(4, 16)).astype(np.float32)
    (folder / "data").mkdir(parents=True)
    np.save(folder / "centres.npy", centres)
    for name, rows in (("calibration", 64), ("held_out", 600)):
        labels = rng.integers(0, 4, rows)
        x = (centres[labels] + 0.05 * rng.normal(size=(rows, 16))).astype(np.float32)
        np.savez(folder / "data" / f"{name}.npz", x=x, labels=labels)
    (folder / "model.py").write_text(MODEL)
    (folder / "gate.sh").write_text((CI / "gate.sh").read_text())
    write_wheel(folder / "wheels")
    return folder


def write_wheel(folder: Path) -> None:
    """The package as ``pip wheel`` would pack it, without asking an index for a build tool."""
    folder.mkdir()
    name = f"modelops_toolkit-{modelops.__version__}"
    about = {
        "METADATA": f"Metadata-Version: 2.1\nName: modelops-toolkit\nVersion: {modelops.__version__}\n"
        "Provides-Extra: torch\nRequires-Dist: torch; extra == 'torch'\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "entry_points.txt": "[console_scripts]\nmodelops = modelops.cli.main:main\n",
    }
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        files = [f"modelops/{path.relative_to(PACKAGE).as_posix()}" for path in sorted(PACKAGE.rglob("*.py"))]
        for file in files:
            wheel.write(PACKAGE.parent / file, file)
        for file, text in about.items():
            wheel.writestr(f"{name}.dist-info/{file}", text)
        listed = [*files, *(f"{name}.dist-info/{file}" for file in (*about, "RECORD"))]
        wheel.writestr(f"{name}.dist-info/RECORD", "".join(f"{file},,\n" for file in listed))


def run(line: str, place: Path) -> None:
    """The line as a runner would run it; pip installs into a folder of the test, and asks no index."""
    site = place / "site"
    path = os.pathsep.join([str(site / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    pip = {"PIP_TARGET": str(site), "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", line],
        cwd=place,
        env={
            **os.environ,
            **pip,
            "PATH": path,
            "PYTHONPATH": str(site),
            "BUDGET": "2s",
            "GITHUB_STEP_SUMMARY": str(place / "summary.md"),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.skipif(not find_spec("torch"), reason="torch is not installed")
def test_every_line_of_both_files_runs(tmp_path: Path) -> None:
    place = repository(tmp_path / "repository")

    for line in lines():
        run(line, place)

    assert (place / "site" / "modelops").is_dir(), "the wheel was not installed"
    assert "bench" in (place / "summary.md").read_text()
    [upload] = [step for step in GITHUB["jobs"]["gate"]["steps"] if "upload-artifact" in step.get("uses", "")]
    for kept in (*upload["with"]["path"].split(), *GITLAB["model-gate"]["artifacts"]["paths"]):
        assert (place / kept).is_dir(), kept
    assert len(list(place.glob(GITLAB["model-gate"]["artifacts"]["reports"]["junit"]))) == 3


def check(schema: str, file: Path) -> int:
    words = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(file)]
    return subprocess.run(words, capture_output=True, check=False).returncode


FILES: list[tuple[str, str, Any]] = [
    ("vendor.github-workflows", "github-actions.yml", {"jobs": {"gate": {"steps": [{"runs": "make"}]}}}),
    ("vendor.gitlab-ci", "gitlab-ci.yml", {"model-gate": {"script": 3}}),
]


@pytest.mark.skipif(not find_spec("check_jsonschema"), reason="check-jsonschema is not installed")
@pytest.mark.parametrize(("schema", "name", "wrong"), FILES)
def test_the_files_are_what_their_services_read(schema: str, name: str, wrong: Any, tmp_path: Path) -> None:
    assert check(schema, CI / name) == 0
    (tmp_path / name).write_text(yaml.safe_dump(wrong))
    assert check(schema, tmp_path / name) == 1
