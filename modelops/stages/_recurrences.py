"""Recurrences over a sequence as one ONNX Scan: what stands in for loops in Python that a graph can't hold.

A loop that takes one step for every token, or every chunk of them, fixes the length of what an exporter records.
These functions take the arguments of the functions of transformers that they stand in for, and give the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def linear_scan(combine: Callable[[Any, Any], Any], values: Any, dim: int, **_settings: Any) -> Any:
    """The states of ``state = gate * state + value`` along a dimension, from a state of zero.

    Stands in for torch's associative scan of pairs of gates and values; ``combine`` is what joins two pairs.
    """
    import torch
    from torch._higher_order_ops.scan import scan

    gates, added = (value.movedim(dim, 0) for value in values)

    def step(state: Any, pair: Any) -> Any:
        _, following = combine((torch.ones_like(state), state), pair)
        return following, following.clone()

    _, states = scan(step, torch.zeros_like(values[1].select(dim, 0)), (gates, added))
    return None, states.movedim(0, dim)


def gated_delta_rule(
    query: Any,
    key: Any,
    value: Any,
    g: Any,
    beta: Any,
    chunk_size: int = 64,
    initial_state: Any = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_settings: Any,
) -> tuple[Any, Any]:
    """Linear attention by the gated delta rule, a chunk at a time: outputs, and the last state where it is wanted.

    query and key are [batch, length, heads, key size], value [batch, length, heads, value size], g and beta
    [batch, length, heads]; g is the logarithm of what is kept of the state. After Yang, Kautz and Hatamizadeh,
    "Gated Delta Networks" (2024), section 3.3, and rounded as transformers' own form of it is.
    """
    import torch
    from torch._higher_order_ops.scan import scan

    dtype, length, groups = query.dtype, key.shape[1], value.shape[2] // key.shape[2]
    if groups != 1:
        query, key = (each.repeat_interleave(groups, dim=2) for each in (query, key))
    query, key, value, beta, g = (each.transpose(1, 2).float() for each in (query, key, value, beta, g))
    query, key = _normal(query, key) if use_qk_l2norm_in_kernel else (query, key)
    query = query * query.shape[-1] ** -0.5
    learnt = beta.unsqueeze(-1)
    query, key, keys, values = (_chunks(each, chunk_size) for each in (query, key, key * learnt, value * learnt))
    # torch adds up in float64 and rounds each sum once; onnxruntime rounds at every step, which exp() makes large.
    kept = _chunks(g.unsqueeze(-1), chunk_size).squeeze(-1).double().cumsum(dim=3).float()
    later = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=key.device).triu(1)
    decay = (kept.unsqueeze(4) - kept.unsqueeze(3)).masked_fill(later, float("-inf")).exp()
    sides = torch.cat([values, keys * kept.exp().unsqueeze(-1)], dim=-1)
    solved = _solved((keys @ key.transpose(-1, -2)) * decay, sides)

    def step(state: Any, chunk: Any) -> Any:
        fresh, known, asked, within, key, keep = chunk
        added = fresh - known @ state
        return state * keep + key.transpose(-1, -2) @ added, asked @ state + within @ added

    parts = (
        *solved.split([values.shape[-1], keys.shape[-1]], dim=-1),
        query * kept.exp().unsqueeze(-1),
        (query @ key.transpose(-1, -2)) * decay,
        key * (kept[..., -1:] - kept).exp().unsqueeze(-1),
        kept[..., -1].exp()[..., None, None],
    )
    parts = tuple(each.movedim(2, 0) for each in parts)
    start = torch.zeros_like(key[:, :, 0].transpose(-1, -2) @ values[:, :, 0])
    last, outputs = scan(step, start if initial_state is None else initial_state.to(start), parts)
    outputs = outputs.movedim(0, 2).flatten(2, 3)[:, :, :length].transpose(1, 2)
    return outputs.to(dtype), last if output_final_state else None


def _normal(*vectors: Any) -> list[Any]:
    """The vectors along the last axis, with a norm of one."""
    import torch

    return [each * torch.rsqrt((each * each).sum(dim=-1, keepdim=True) + 1e-6) for each in vectors]


def _chunks(value: Any, size: int) -> Any:
    """[batch, heads, length, width] in chunks of the length, zeros at its end: [batch, heads, chunks, size, width]."""
    import torch

    padding = (size - value.shape[2] % size) % size
    return torch.nn.functional.pad(value, (0, 0, 0, padding)).unflatten(2, (-1, size))


def _solved(system: Any, sides: Any) -> Any:
    """The solution of a triangular system with ones on its diagonal, a row at a time; what is above counts as zero."""
    import torch
    from torch._higher_order_ops.scan import scan

    def step(solved: Any, row: Any) -> Any:
        factors, side, here = row
        found = side - (factors.unsqueeze(-2) @ solved).squeeze(-2)
        return solved + here.unsqueeze(-1) * found.unsqueeze(-2), found

    size = system.shape[-1]
    rows = (system.tril(-1).movedim(3, 0), sides.movedim(3, 0), torch.eye(size, device=sides.device))
    _, solved = scan(step, torch.zeros_like(sides), rows)
    return solved.movedim(0, 3)


def channel_delta_rule(
    query: Any,
    key: Any,
    value: Any,
    g: Any,
    beta: Any,
    initial_state: Any = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_settings: Any,
) -> tuple[Any, Any]:
    """The gated delta rule with a decay for every channel, a token at a time: g has the shape of key.

    After the Kimi team, "Kimi Linear" (2025), equation 1.
    """
    import torch
    from torch._higher_order_ops.scan import scan

    dtype = query.dtype
    query, key, value, kept, beta = (each.movedim(1, 0).float() for each in (query, key, value, g, beta))
    query, key = _normal(query, key) if use_qk_l2norm_in_kernel else (query, key)
    query = query * query.shape[-1] ** -0.5

    def step(state: Any, token: Any) -> Any:
        q, k, v, keep, learn = token
        state = state * keep.unsqueeze(-1)
        known = (state * k.unsqueeze(-1)).sum(dim=-2)
        state = state + k.unsqueeze(-1) * ((v - known) * learn.unsqueeze(-1)).unsqueeze(-2)
        return state, (state * q.unsqueeze(-1)).sum(dim=-2)

    start = torch.zeros_like(key[0].unsqueeze(-1) * value[0].unsqueeze(-2))
    tokens = (query, key, value, kept.exp(), beta)
    last, outputs = scan(step, start if initial_state is None else initial_state.to(start), tokens)
    return outputs.movedim(0, 1).to(dtype), last if output_final_state else None


def selective_scan(
    hidden_states: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    *_chunk_size: int,
    D: Any = None,
    dt_bias: Any = None,
    initial_states: Any = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_settings: Any,
) -> Any:
    """A state space model with one decay for each head, a token at a time: outputs, and the last state where wanted.

    hidden_states are [batch, length, heads, head size], dt [batch, length, heads], A [heads], B and C
    [batch, length, groups, state size]. After Dao and Gu, "Transformers are SSMs" (2024), section 2.
    """
    import torch
    from torch._higher_order_ops.scan import scan

    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = torch.nn.functional.softplus(dt) if dt_softplus else dt
    dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1]).float()
    hidden_states, groups = hidden_states.float(), hidden_states.shape[2] // B.shape[2]
    read, write = (each.float().repeat_interleave(groups, dim=2) for each in (C, B))

    def step(state: Any, token: Any) -> Any:
        keep, x, b, c = token
        state = state * keep[..., None, None] + x.unsqueeze(-1) * b.unsqueeze(-2)
        return state, (state * c.unsqueeze(-2)).sum(dim=-1)

    tokens = (torch.exp(A.float() * dt), hidden_states * dt.unsqueeze(-1), write, read)
    tokens = tuple(each.movedim(1, 0) for each in tokens)
    start = torch.zeros_like(tokens[1][0].unsqueeze(-1) * tokens[2][0].unsqueeze(-2))
    last, outputs = scan(step, start if initial_states is None else initial_states.to(start), tokens)
    outputs = outputs.movedim(0, 1)
    if D is not None:
        outputs = outputs + D[..., None] * hidden_states
    return (outputs, last) if return_final_states else outputs
