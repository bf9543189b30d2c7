from __future__ import annotations

import pytest
import torch

from modelops.stages._transformers import aid_for, linear_scan


@pytest.mark.parametrize("length", [1, 2, 37])
def test_a_scan_gives_what_a_loop_over_all_elements_gives(length):
    gates = torch.rand(2, 3, length, 4, dtype=torch.float64)
    values = torch.randn(2, 3, length, 4, dtype=torch.float64)
    _, found = linear_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (gates, values), dim=2)
    state = torch.zeros(2, 3, 4, dtype=torch.float64)
    for place in range(length):
        state = gates[:, :, place] * state + values[:, :, place]
        torch.testing.assert_close(found[:, :, place], state)


def test_only_models_of_transformers_are_aided():
    assert aid_for(torch.nn.Linear(2, 2)) is None
