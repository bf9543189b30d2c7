"""The command line starts light: nothing heavy is imported until a stage needs it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

GUARD = """
import sys
sys.argv = ["modelops", {words}]
from modelops.cli.main import run
code = run(sys.argv[1:])
heavy = set("torch onnx onnx_ir onnxruntime onnxscript numpy pydantic transformers openvino sklearn".split())
found = sorted(heavy & set(sys.modules))
sys.stdout.flush()
print("HEAVY", found, "TYPER", "typer" in sys.modules, "CODE", code, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "words",
    ["'--help'", "'--version'", "'convert', '--help'", "'quantize', '--help'", "'bench', '--help'", "'run', '--help'"],
)
def test_help_imports_nothing_heavy(words: str) -> None:
    done = subprocess.run([sys.executable, "-c", GUARD.format(words=words)], capture_output=True, text=True, check=True)
    assert "HEAVY [] " in done.stderr
    assert "CODE 0" in done.stderr
    assert done.stdout


def test_the_root_help_names_every_command_and_exit_code(
    modelops: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    page = modelops("--help").stdout
    for word in ("convert", "simplify", "quantize", "prune", "validate", "bench", "run", "inspect", "diff", "doctor"):
        assert f"\n  {word} " in page
    assert "70 a bug" in page


def test_a_plugins_method_appears_in_help(modelops: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    page = modelops("quantize", "--help").stdout
    assert "halves" in page and "--least" in page


def test_the_version_is_the_packages(modelops: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    import modelops as package

    assert modelops("--version").stdout == f"modelops {package.__version__}\n"
