from __future__ import annotations

from modelops.core.tensors import Signature, TensorSpec
from modelops.graphs.batches import row_axes


def test_the_batch_is_found_on_whatever_axis_of_an_output():
    inputs = (TensorSpec("tokens", "int64", ("batch", "time")),)
    outputs = (
        TensorSpec("logits", "float32", ("batch", "time", 3)),
        TensorSpec("state", "float32", (1, "batch", 8)),
        TensorSpec("mean", "float32", ()),
        TensorSpec("pairs", "float32", ("batch", "batch")),
    )
    assert row_axes(Signature(inputs, outputs)) == {"state": 1}
    assert row_axes(Signature((TensorSpec("x", "float32", (1, 3)),), outputs)) == {}
