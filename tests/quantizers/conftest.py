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


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A layer of a transformer encoder as exporters write it: two heads, additive mask, a sum and its normalization."""
    text = """<ir_version: 8, opset_import: ["" : 18]>
    net (float[n, t, 32] x, float[n, 1, t, t] mask) => (float[n, t, 32] y) {
        q0 = MatMul (x, wq)
        q1 = Add (q0, bq)
        q2 = Reshape (q1, heads)
        q = Transpose <perm = [0, 2, 1, 3]> (q2)
        k0 = MatMul (x, wk)
        k1 = Add (k0, bk)
        k2 = Reshape (k1, heads)
        k3 = Transpose <perm = [0, 2, 1, 3]> (k2)
        k = Transpose <perm = [0, 1, 3, 2]> (k3)
        v0 = MatMul (x, wv)
        v1 = Add (v0, bv)
        v2 = Reshape (v1, heads)
        v = Transpose <perm = [0, 2, 1, 3]> (v2)
        qs = Mul (q, root)
        ks = Mul (k, root)
        scores = MatMul (qs, ks)
        masked = Add (scores, mask)
        share = Softmax <axis = -1> (masked)
        mixed = MatMul (share, v)
        m1 = Transpose <perm = [0, 2, 1, 3]> (mixed)
        m2 = Reshape (m1, flat)
        o0 = MatMul (m2, wo)
        o1 = Add (o0, bo)
        sum = Add (o1, x)
        y = LayerNormalization <axis = -1> (sum, gamma, beta)
    }"""
    constants = {
        **{name: weights(32, 32, seed=seed, scale=0.2) for seed, name in enumerate(("wq", "wk", "wv", "wo"))},
        **{name: weights(32, seed=seed) for seed, name in enumerate(("bq", "bk", "bv", "bo", "gamma", "beta"), 4)},
        "heads": np.array([0, 0, 2, 16]),
        "flat": np.array([0, 0, 32]),
        "root": np.float32(0.5),
    }
    return model_of(text, constants, tmp_path / "encoder.onnx")


@pytest.fixture
def states() -> dict[str, Any]:
    """Hidden states, and a mask that hides the second half of every other sample."""
    rng = np.random.default_rng(2)
    mask = np.zeros((32, 1, 6, 6), np.float32)
    mask[::2, :, :, 3:] = -3.4028235e38
    return {"x": rng.normal(size=(32, 6, 32)).astype(np.float32), "mask": mask}
