"""Attention within a window and of global tokens, as Longformer and LED have it, for graphs of any length.

transformers' own form lays chunks over each other by strides of memory, pads the sequence to whole windows, and takes
another path where a batch has global tokens: an exporter records all three for the one example. These stand in for
them, and give the same; memory stays linear in the length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def windowed_attention(
    self: Any,
    hidden_states: Any,
    attention_mask: Any = None,
    is_index_masked: Any = None,
    is_index_global_attn: Any = None,
    is_global_attn: Any = None,  # noqa: ARG001
    output_attentions: bool = False,
) -> tuple[Any]:
    """The forward of LongformerSelfAttention: what tokens [batch, length, width] take from window and global tokens.

    The masks are [batch, length]; attention_mask is 0 for tokens that attend within their window. After Beltagy, Peters
    and Cohan, "Longformer" (2020), section 3.1.
    """
    import torch

    if output_attentions:
        raise NotImplementedError("a graph gives no attention weights of windows")
    heads, window, width = self.num_heads, self.one_sided_attn_window_size, hidden_states.shape[-1]
    least = torch.finfo(hidden_states.dtype).min

    def split(value: Any) -> Any:
        return value.unflatten(-1, (heads, -1)).transpose(1, 2)

    query = split(self.query(hidden_states) / self.head_dim**0.5)
    key, value = split(self.key(hidden_states)), split(self.value(hidden_states))
    places, known = _globals(is_index_global_attn)
    index = places[:, None, :, None].expand(-1, heads, -1, self.head_dim)

    far = query @ key.gather(2, index).transpose(-1, -2)
    far = far.masked_fill(~known[:, None, None, :], least)
    near = _near_scores(query, key, (attention_mask != 0).type_as(query) * least, window)
    shares = torch.cat([far, near], dim=-1).softmax(dim=-1, dtype=torch.float32)
    shares = shares.masked_fill(is_index_masked[:, None, :, None], 0.0).type_as(query)
    far, near = shares.split([places.shape[1], 3 * window], dim=-1)
    found = far @ value.gather(2, index) + _near_values(near, value, window)
    found = found.transpose(1, 2).flatten(2)

    asked = hidden_states.gather(1, places[..., None].expand(-1, -1, width))
    asked = split(self.query_global(asked) / self.head_dim**0.5)
    scores = asked @ split(self.key_global(hidden_states)).transpose(-1, -2)
    scores = scores.masked_fill(is_index_masked[:, None, None, :], least)
    shares = scores.softmax(dim=-1, dtype=torch.float32).type_as(query)
    answers = (shares @ split(self.value_global(hidden_states))).transpose(1, 2).flatten(2)
    rank = (is_index_global_attn.long().cumsum(dim=1) - 1).clamp(min=0)
    answers = answers.gather(1, rank[..., None].expand(-1, -1, width))
    return (torch.where(is_index_global_attn[..., None], answers, found),)


def _globals(is_global: Any) -> tuple[Any, Any]:
    """The places of global tokens in their order [batch, count], and which of these are one; at least one place."""
    import torch

    length = is_global.shape[1]
    counts = is_global.long().sum(dim=1)
    most = counts.max().clamp(min=1).item()
    torch._check(most >= 1)
    torch._check(most <= length)
    place = torch.arange(length, device=is_global.device)
    ordered = torch.where(is_global, place, place + length).sort(dim=1).values
    ordered = torch.where(ordered < length, ordered, ordered - length)
    slots = torch.arange(most, device=is_global.device)
    return ordered.gather(1, slots.expand(is_global.shape[0], -1)), slots < counts[:, None]


def _blocks(value: Any, window: int) -> Any:
    """[batch, heads, length, size] in blocks of a window, zeros at the end: [batch, heads, blocks, window, size]."""
    import torch

    padding = (window - value.shape[2] % window) % window
    return torch.nn.functional.pad(value, (0, 0, 0, padding)).unflatten(2, (-1, window))


def _around(value: Any, window: int) -> Any:
    """Every block with those before and after it: [batch, heads, blocks, 3 window, size]; beyond the ends are zeros."""
    import torch

    blocks = _blocks(value, window)
    padded = torch.nn.functional.pad(blocks, (0, 0, 0, 0, 1, 1))
    return torch.cat([padded[:, :, :-2], blocks, padded[:, :, 2:]], dim=3)


def _near_scores(query: Any, key: Any, penalty: Any, window: int) -> Any:
    """Scores [batch, heads, length, 3 window] of each token for the blocks around its own; -inf beyond the window."""
    import torch

    length = query.shape[2]
    asked, around = _blocks(query, window), _around(key, window)
    scores = asked @ around.transpose(-1, -2) + _around(penalty[:, None, :, None], window).transpose(-1, -2)
    count = asked.shape[2]
    row = torch.arange(window, device=query.device)[:, None]
    column = torch.arange(3 * window, device=query.device)[None, :]
    within = (column >= row) & (column <= row + 2 * window)
    place = torch.arange(count, device=query.device)[:, None] * window + column - window
    there = (place >= 0) & (place < length)
    scores = scores.masked_fill(~(within & there[:, None, :]), float("-inf"))
    return scores.flatten(2, 3)[:, :, :length]


def _near_values(shares: Any, value: Any, window: int) -> Any:
    """The values of the blocks around each token [batch, heads, length, size], by their shares."""
    length = value.shape[2]
    return (_blocks(shares, window) @ _around(value, window)).flatten(2, 3)[:, :, :length]


def _unpadded(_self: Any, **given: Any) -> tuple[Any, ...]:
    """Nothing to pad, and what was given: ``windowed_attention`` takes any length."""
    return (0, *(value for name, value in given.items() if name != "pad_token_id"))


STAND_INS: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "LongformerSelfAttention": {"forward": windowed_attention},
    "LongformerModel": {"_pad_to_window_size": _unpadded},
    "LEDEncoderSelfAttention": {"forward": windowed_attention},
    "LEDEncoder": {"_pad_to_window_size": _unpadded},
}
"""By the name of a class of transformers: what takes the place of its methods."""
