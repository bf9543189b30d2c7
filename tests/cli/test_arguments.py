"""Whatever is typed: one clear message, the right exit code, never a traceback and never exit 1."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelops.cli.main import run

WORDS = [
    "convert", "simplify", "quantize", "prune", "validate", "bench", "run", "inspect", "diff", "doctor", "help",
    "--help", "-h", "--version", "--json", "--quiet", "--verbose", "--debug", "--force", "--advisory", "--report",
    "json=x", "junit=", "--time-limit", "--memory-limit", "--method", "static", "dynamic", "weights", "--engine",
    "onnxsim", "--data", "--samples", "--against", "--backend", "null", "--out", "--like", "--", "-", "", "0", "-1",
    "nan", "1e999", "1%", "no/such/path", "model.onnx", ".", "/", "\u2028", "--no-such-flag", "--samples=x", "a=b",
    "recipe.toml", "file.py:function", "@convert", "\x1b[31m", "::error::x",
]  # fmt: skip


def outcome(words: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(words)
    logging.basicConfig(level=logging.WARNING, force=True)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module", autouse=True)
def _empty_folder(tmp_path_factory: pytest.TempPathFactory) -> object:
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("empty"))
    yield
    os.chdir(before)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=8)), max_size=7))
def test_no_command_line_ends_in_a_traceback_or_in_exit_1(words: list[str]) -> None:
    if words and words[0] == "doctor":
        words = ["doctor", "--no-such-flag", *words[1:]]  # a real doctor imports every backend
    code, out, err = outcome(words)
    assert code in {0, 2, 4, 7}, (code, err)
    assert "Traceback" not in err or "--debug" in words
    assert "\x1b[31m" not in err
    if code != 0 and "--json" in words[: words.index("--") if "--" in words else None]:
        document = json.loads(out)
        assert document["exit_code"] == code and document["error"]["message"]
    elif code != 0:
        assert "error: " in err and not out


@pytest.mark.parametrize(
    ("words", "code", "message", "hint"),
    [
        (["quantise", "a", "b"], 2, "unknown command", "quantize"),
        (["quantize", "a"], 2, "Missing argument", "--help"),
        (["quantize", "a", "b", "--metod", "static"], 2, "no such option: --metod", "did you mean --method?"),
        (["convert", "a", "b", "--opsett", "18"], 2, "no such option: --opsett", "did you mean --opset?"),
        (["convert", "a", "b", "--frob"], 2, "no such option: --frob", "--help"),
        (["quantize", "a", "b", "--method", "statick"], 2, "statick", "static"),
        (["quantize", "no-such", "b"], 2, "no such artifact", ""),
        (["quantize", "a", "b", "--method", "static", "--bits", "4"], 2, "--bits needs --method weights", "--method"),
        (["bench", "a", "--budget", "soon"], 2, "--budget", "number"),
        (["validate", "a", "--report", "pdf=x"], 2, "report format", "known"),
        (["validate", "a", "--report", "junit"], 2, "FORMAT=PATH", "junit"),
        (["run", "no-such.toml"], 2, "no such recipe", ""),
        (["run", "--like", "x", "y"], 2, "--out", "--like"),
        (["inspect", "."], 4, "manifest.json", "directory"),
        (["convert", "a", "b", "--time-limit", "soon"], 2, "--time-limit", "number"),
        (["validate", "a", "--quiet", "--debug"], 2, "contradicts", "one of them"),
    ],
)
def test_a_mistake_gets_its_message(words: list[str], code: int, message: str, hint: str) -> None:
    found, _, err = outcome(words)
    assert found == code, err
    assert message in err and hint in err
    found, out, _ = outcome([*words, "--json"])
    document = json.loads(out)
    assert found == code and message in document["error"]["message"] and hint in document["error"]["hint"]
