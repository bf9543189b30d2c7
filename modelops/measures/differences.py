"""What one output of two models differs by: figures that can be saved, and judged again later.

The scale of an output is the largest finite magnitude in the reference: an absolute tolerance without it would accept
an error of 0.2 % in an output of size 0.005. Cosine looks fine on outputs that are not (0.992 while every seventh
nearest neighbour changed), so it is reported and never the only judge; element-wise relative error is dreadful on
outputs that are fine, so it is left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Head = Literal["classes", "embedding", "other"]

DEGENERATE = 1e-3  # an output that moves less than this share of its scale from input to input tests nothing


@dataclass(frozen=True)
class Worst:
    """The element that differs most: its input's number in the stream, its index in that row, and both values.

    ``input`` names the inputs that it came from, where the stream has names, and ``input_row`` the row in them.
    """

    row: int
    index: tuple[int, ...]
    reference: float | str
    actual: float | str
    input: str = ""
    input_row: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "index": list(self.index)}

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Worst:
        place = (values.get("input", ""), values.get("input_row", 0))
        return cls(values["row"], tuple(values["index"]), values["reference"], values["actual"], *place)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What one output of two models differs by. Figures are None where they do not apply.

    ``problem`` says in words why the two could not be compared (missing, another shape). ``rows`` counts inputs,
    ``compared`` the elements that are finite on both sides. Quantiles (``p50_abs`` …, ``ulp_p99``, ``kl_p99``) come
    from histograms with bins 3 % wide and are never understated. ``signal`` and ``noise`` are the norms ‖y‖ and
    ‖y − x‖.
    """

    output: str
    dtype: str = ""
    actual_dtype: str = ""
    rank: int = 0
    shape: tuple[int | str, ...] = ()  # of the outputs as they came, rows first; "*" where a size varied
    head: Head = "other"
    exact: bool = False  # integers, booleans, strings: judged by equality
    problem: str = ""
    rows: int = 0
    elements: int = 0
    compared: int = 0
    mask_mismatches: int = 0  # elements whose NaN or infinity is not there on the other side
    new_nonfinite: int = 0  # … of which those that the reference does not have
    scale: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    max_abs: float | None = None
    mean_abs: float | None = None
    p50_abs: float | None = None
    p99_abs: float | None = None
    p999_abs: float | None = None
    cosine_mean: float | None = None
    cosine_min: float | None = None
    ulp_p99: float | None = None
    ulp_max: float | None = None
    top1: float | None = None
    top5: float | None = None
    decisions: int = 0  # vectors that top1 and top5 count
    kl_mean: float | None = None
    kl_p99: float | None = None
    nearest: float | None = None
    nearest_rows: int = 0
    equal: float | None = None  # share of equal elements, ties left out
    ties: int = 0
    variation: float | None = None  # how far the reference moves from input to input, as a share of its scale
    actual_variation: float | None = None
    worst: Worst | None = None

    @property
    def sqnr(self) -> float | None:
        """Signal to quantization noise, 20·log10(‖y‖/‖y − x‖) in dB; infinite when nothing differs."""
        if self.exact or not self.compared:
            return None
        if self.noise == 0:
            return math.inf
        if not math.isfinite(self.signal):
            return None  # numbers whose squares no float64 holds
        return 20 * (math.log10(self.signal) - math.log10(self.noise)) if self.signal > 0 else -math.inf

    @property
    def max_scaled(self) -> float | None:
        """The largest error as a share of the largest magnitude in the reference."""
        return _ratio(self.max_abs, self.scale)

    @property
    def max_rms(self) -> float | None:
        """The largest error as a share of the root mean square of the reference."""
        return _ratio(self.max_abs, self.signal / math.sqrt(self.compared) if self.compared else 0.0)

    @property
    def identical(self) -> bool:
        """Whether every element is the same, those that are not finite included."""
        if self.problem or self.elements == 0 or self.mask_mismatches:
            return False
        return self.equal == 1.0 if self.exact else self.max_abs in (0.0, None)

    @property
    def varies(self) -> bool | None:
        """Whether the reference moves with its input; None when there were not two inputs to tell."""
        return None if self.variation is None else self.variation >= DEGENERATE

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON values: where a figure is infinite it is null, and ``identical`` tells why."""
        values = {name: getattr(self, name) for name in (*_FIELDS, "sqnr", "max_scaled", "max_rms", "identical")}
        values["shape"] = list(self.shape)
        values["worst"] = self.worst.to_dict() if self.worst else None
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Difference:
        """The difference that ``to_dict`` wrote: saved measurements can be judged anew."""
        known = {name: values[name] for name in _FIELDS if name in values}
        known["shape"] = tuple(known.get("shape", ()))
        for name in ("signal", "noise"):
            if known.get(name) is None:
                known[name] = math.inf
        known["worst"] = Worst.parse(values["worst"]) if values.get("worst") else None
        return cls(**known)


_FIELDS = tuple(field.name for field in dataclasses.fields(Difference))


def _ratio(value: float | None, scale: float) -> float | None:
    if value is None:
        return None
    if scale > 0:
        return value / scale
    return 0.0 if value == 0 else math.inf
