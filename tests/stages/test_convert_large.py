"""A torch model above 2 GB through convert, inspect and validate."""

from __future__ import annotations

import pytest
from under_watch import watch


@pytest.mark.slow
def test_a_model_above_two_gigabytes_takes_three_times_its_size_at_most(tmp_path):
    (tmp_path / "big.py").write_text(
        "import torch\n"
        "def build():\n"
        "    layers = [part for _ in range(9) for part in (torch.nn.Linear(8192, 8192), torch.nn.Tanh())]\n"
        "    return torch.nn.Sequential(*layers), torch.randn(2, 8192)\n"
    )
    size = 9 * (8192 * 8192 + 8192) * 4
    assert size > 2 << 30
    for words in (["convert", "big.py:build", "out"], ["inspect", "out"], ["validate", "out", "evidence"]):
        seen = watch(words, tmp_path, longest=3600)
        print(f"{words[0]}: {seen.seconds:.0f} s, {seen.peak_bytes / size:.2f} times the weights")
        assert seen.code == 0, seen.output
        assert seen.peak_bytes < 3 * size
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"model.onnx", "model.onnx.data"}
