"""Figures as a person reads them, said in one way by every message, table and report."""

from __future__ import annotations

_SIZES = ("bytes", "KiB", "MiB", "GiB", "TiB")


def size_text(count: float) -> str:
    """A number of bytes: "512 bytes", "45.1 KiB", "1.04 GiB"."""
    rank = 0
    while abs(count) >= 1024 and rank < len(_SIZES) - 1:
        count /= 1024
        rank += 1
    if rank == 0:
        return f"{count:,.0f} bytes"
    return f"{count:.3g} {_SIZES[rank]}" if abs(count) < 1000 else f"{count:.0f} {_SIZES[rank]}"
