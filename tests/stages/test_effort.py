"""How much work a row is: counted on the calls themselves, and decisive for how many rows and threads are used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from modelops.core import machine
from modelops.sources._first_run import first_run
from modelops.stages._eager import Eager
from modelops.stages._effort import Effort, settle_threads


class Attention(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    ("module", "shape", "operations"),
    [
        (nn.Linear(8, 5), (3, 8), 2 * 3 * 8 * 5),
        (nn.Linear(8, 5, bias=False), (2, 3, 8), 2 * 6 * 8 * 5),
        (nn.Conv2d(4, 6, 3, groups=2), (1, 4, 8, 8), 2 * 6 * 36 * 2 * 9),
        (nn.ConvTranspose1d(4, 6, 3), (1, 4, 8), 2 * 4 * 8 * 6 * 3),
        (Attention(), (1, 2, 7, 16), 4 * 2 * 7 * 7 * 16),
        (nn.ReLU(), (3, 8), 0),
    ],
    ids=["linear", "matrix", "convolution", "transposed", "attention", "none"],
)
def test_operations_are_counted(module, shape, operations):
    with torch.no_grad():
        run = first_run(lambda: module(torch.randn(shape)))
    assert run.operations == operations
    effort = Effort.of(run, 2)
    assert effort.convolutions == ("Conv" in type(module).__name__)
    assert (effort.operations, effort.seconds) == (operations / 2, run.seconds / 2)


def test_a_module_that_does_not_run_while_it_is_counted_runs_without():
    calls = []

    def call():
        calls.append(torch.utils._python_dispatch._get_current_dispatch_mode())
        if calls[-1] is not None:
            raise NotImplementedError("not under a mode")
        return 5

    run = first_run(call)
    assert (run.outputs, run.operations, len(calls)) == (5, 0.0, 2)


def test_an_expensive_model_is_checked_on_fewer_rows_and_more_threads():
    cheap, large, huge = Effort(4e9), Effort(7e9), Effort(500e9)
    assert [effort.rows(None) for effort in (Effort(), cheap, large, huge)] == [32, 32, 20, 16]
    assert huge.rows(32) == 32 and cheap.rows(5) == 5
    assert [effort.high for effort in (Effort(), cheap, large, huge)] == [False, False, True, True]
    assert [effort.threads(32) for effort in (Effort(), cheap, huge, Effort(500e9, 0.9))] == [1, 1, 2, 1]
    assert [effort.threads(32, double=True) for effort in (Effort(1e9), cheap, Effort(8e9, 0.9))] == [1, 2, 1]


def test_threads_do_not_depend_on_how_many_cpus_there_are(monkeypatch):
    monkeypatch.setattr(machine, "usable_cpus", lambda: 1)
    one = Effort(500e9).threads(32)
    monkeypatch.setattr(machine, "usable_cpus", lambda: 64)
    assert Effort(500e9).threads(32) == one


class Recorded(nn.Module):
    """Gives what its list says, and notes on how many threads it was asked."""

    def __init__(self, results):
        super().__init__()
        self.results, self.threads = iter(results), []

    def forward(self, x):
        self.threads.append(torch.get_num_threads())
        return x + next(self.results)


@pytest.mark.parametrize(
    ("results", "asked", "kept", "differing"),
    [
        ([0, 0], [1, 4], 4, None),
        ([0, 1, 0], [1, 4, 1], 1, None),
        ([0, 1, 2, 2], [1, 4, 1, 1], 1, None),
        ([0, 1, 2, 3], [1, 4, 1, 1], 1, "output"),
    ],
    ids=["same", "otherwise on threads", "otherwise when counted", "random"],
)
def test_threads_are_used_where_they_give_the_same(results, asked, kept, differing):
    module = Recorded(results)
    eager = Eager(module, (torch.zeros(2),), {})
    torch.set_num_threads(1)
    feed = {"x": np.zeros(2, np.float32)}
    first = eager.probe(feed)
    assert settle_threads(eager, feed, first, 4) == differing
    assert (module.threads, eager.threads) == (asked, kept)
