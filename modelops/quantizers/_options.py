"""Options that several methods share: declared once, with one meaning and one help sentence."""

from __future__ import annotations

from modelops.core.component import option
from modelops.errors import UsageError
from modelops.quantizers import Quantizer
from modelops.quantizers._int8 import ReducedRange
from modelops.quantizers._targets import TargetName


class Selective(Quantizer):
    """A method that leaves nodes alone when it is asked to."""

    exclude: tuple[str, ...] = option(
        default=(), help="Nodes to leave in float, by name or by what they write; * and ? match."
    )


class Targeted(Selective):
    """A method that writes for certain kernels."""

    target: TargetName = option(
        default="auto", help="The kernels to make it for: signs, 7 bits and symmetry follow; auto asks this machine's."
    )


class Fusing(Selective):
    """A method for operators of its choice, fused first."""

    op_types: tuple[str, ...] = option(default=(), help="Operators to quantize (default: all that the method knows).")
    fuse: bool = option(
        default=True, help="Fuse attention and normalization for onnxruntime first, where that is found right."
    )


class Integer(Fusing, Targeted):
    """A method that multiplies 8-bit integers, and improves a graph for it on the samples of --data."""

    per_channel: bool = option(default=True, help="Give every output channel of a weight its own scale.")
    reduce_range: ReducedRange = option(
        default="auto", help="Keep weights to 7 bits, as CPUs without VNNI need to stay exact; auto asks the target."
    )

    migrate: bool = option(
        default=True,
        help="With --data, move the spread of what products read into weights, where that lowers the error.",
    )
    outliers: bool = option(
        default=True, help="With --data, multiply the few columns that stand out in float, where they cost precision."
    )
    compensate: bool = option(
        default=True, help="With --data, round the weights of products so that errors cancel on the samples."
    )
    correct_bias: bool = option(
        default=True, help="With --data, take mean errors off biases, where that lowers the error."
    )

    approximate: bool = option(
        default=True, help="Compute Gelu by tanh: a third faster, and off by 0.0005 at most, which 8 bits hide."
    )

    explain: bool = option(
        default=False, help="Measure what every node costs: a table in the report, and with matplotlib a picture."
    )
    least_sqnr: float = option(
        default=0.0,
        help="Signal over noise of outputs to keep, in dB: nodes go back to float, or to ranges found as it runs.",
        min=0,
        max=120,
    )
    search_time: float = option(default=60.0, help="Time for measuring nodes.", min=1, unit="seconds")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.search_time != type(self).search_time and not (self.explain or self.least_sqnr):
            raise UsageError("--search-time is for --explain or --least-sqnr", hint="add one, or leave it out")
