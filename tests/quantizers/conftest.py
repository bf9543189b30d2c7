"""Small models that hold what quantizers meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantizer_models import model_of, weights


@pytest.fixture
def conv_net(tmp_path: Path) -> Path:
    """Conv, BatchNormalization, Relu, a residual sum, pooling and a Gemm, as exporters leave them in training mode."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[n, 3, 8, 8] image) => (float[n, 5] logits) {
        c1 = Conv <pads = [1, 1, 1, 1]> (image, w1)
        b1 = BatchNormalization (c1, gamma, beta, mean, var)
        r1 = Relu (b1)
        c2 = Conv <pads = [1, 1, 1, 1]> (r1, w2, bias2)
        s = Add (c2, r1)
        r2 = Relu (s)
        p = GlobalAveragePool (r2)
        f = Flatten (p)
        logits = Gemm <transB = 1> (f, wf, bf)
    }"""
    channels = {
        "w1": weights(16, 3, 3, 3, seed=1),
        "gamma": np.linspace(0.5, 2, 16, dtype=np.float32),
        "beta": weights(16, seed=2),
        "mean": weights(16, seed=3),
        "var": np.linspace(0.1, 3, 16, dtype=np.float32),
        "w2": weights(16, 16, 3, 3, seed=4, scale=0.1),
        "bias2": weights(16, seed=5),
        "wf": weights(5, 16, seed=6, scale=1.0),
        "bf": weights(5, seed=7),
    }
    return model_of(text, channels, tmp_path / "conv.onnx")


@pytest.fixture
def attention(tmp_path: Path) -> Path:
    """One head of attention with a −3.4e38 mask, on word numbers: what a sentence encoder is made of."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (int64[n, t] ids, bool[n, t] keep) => (float[n, t, 64] hidden) {
        x = Gather (table, ids)
        q = MatMul (x, wq)
        k = MatMul (x, wk)
        v = MatMul (x, wv)
        kt = Transpose <perm = [0, 2, 1]> (k)
        scores = MatMul (q, kt)
        small = Mul (scores, eighth)
        mask = Where (keep, zero, never)
        wide = Unsqueeze (mask, one)
        masked = Add (small, wide)
        share = Softmax <axis = -1> (masked)
        mixed = MatMul (share, v)
        hidden = MatMul (mixed, wo)
    }"""
    constants = {
        "table": weights(200, 64, seed=1, scale=1.0) * np.linspace(0.2, 2, 200, dtype=np.float32)[:, None],
        **{name: weights(64, 64, seed=seed, scale=0.15) for seed, name in enumerate(("wq", "wk", "wv", "wo"), 2)},
        "eighth": np.float32(0.125),
        "zero": np.float32(0),
        "never": np.float32(-3.4028235e38),
        "one": np.array([1], dtype=np.int64),
    }
    return model_of(text, constants, tmp_path / "attention.onnx")


@pytest.fixture
def tokens() -> dict[str, Any]:
    """Word numbers, and masks of different lengths."""
    rng = np.random.default_rng(5)
    lengths = rng.integers(3, 13, size=64)
    return {"ids": rng.integers(0, 200, size=(64, 12)), "keep": np.arange(12)[None, :] < lengths[:, None]}


@pytest.fixture
def images() -> dict[str, Any]:
    return {"image": np.random.default_rng(9).normal(size=(64, 3, 8, 8)).astype(np.float32)}
