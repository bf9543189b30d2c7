"""The table of gates: how far an output may move, by what was done to the model in between.

::

    transition   always judged                                  judged on 256 rows of real data
    structural   SQNR >= 100 dB, error <= 2e-5 of the scale      –
    export       the same                                       –
    float16      SQNR >= 40 dB                                  same first class >= 99.5 %
    bfloat16     SQNR >= 30 dB                                  same first class >= 99 %
    int8         SQNR >= 10 dB, still reacts to its input        first class >= 97 %, or KL <= 0.01 for tokens,
                                                                or nearest neighbour >= 85 % for embeddings
    weights      the same                                       first class >= 90 % and KL <= 0.05, or neighbour >= 85 %
    prune        still reacts to its input                       as int8

Everywhere: dtypes and shapes are equal, no NaN or infinity is new (structural, export: none is lost either), and
integers are equal except where scores tie. A structural gate needs 32 rows that vary, or 16 with 4,096 numbers; no gate
passes on fewer, on a constant reference or on nothing. An output that is itself float16 or bfloat16 is held to that
row's SQNR.

The thresholds follow what was measured on real models: float32 through two runtimes lies at 117–133 dB and 2e-6 of the
scale, float16 at 60 dB, good int8 at 18–34 dB.
"""

from __future__ import annotations

import fnmatch
import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from modelops.errors import UsageError, unknown_name

# What a task metric may lose where nobody says more: a point.
POINT = 0.01
TransitionName = Literal["structural", "export", "float16", "bfloat16", "int8", "weights", "prune"]

_OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq}
_ALIASES = {"kl": "kl_mean", "nn": "nearest", "cosine": "cosine_min"}


@dataclass(frozen=True)
class Figure:
    """How a figure of ``Difference`` is called, counted and read."""

    label: str
    unit: str = ""  # "dB", "%" for shares, or nothing
    higher: bool = False  # whether more is better
    agreement: bool = False  # means something on real data only

    def text(self, value: float) -> str:
        if self.unit == "%":
            return f"{100 * value:.4g} %"
        return f"{value:.4g} {self.unit}".rstrip()


FIGURES: dict[str, Figure] = {
    "sqnr": Figure("SQNR", "dB", higher=True),
    "max_abs": Figure("largest error"),
    "max_scaled": Figure("largest error as a share of the scale"),
    "max_rms": Figure("largest error as a share of the rms"),
    "mean_abs": Figure("mean error"),
    "p50_abs": Figure("median error"),
    "p99_abs": Figure("99 % error"),
    "p999_abs": Figure("99.9 % error"),
    "cosine_mean": Figure("mean cosine", higher=True),
    "cosine_min": Figure("smallest cosine", higher=True),
    "ulp_p99": Figure("99 % error in ULPs"),
    "ulp_max": Figure("largest error in ULPs"),
    "top1": Figure("same first class", "%", higher=True, agreement=True),
    "top5": Figure("first class among five", "%", higher=True, agreement=True),
    "kl_mean": Figure("mean KL divergence", agreement=True),
    "kl_p99": Figure("99 % KL divergence", agreement=True),
    "nearest": Figure("same nearest neighbour", "%", higher=True, agreement=True),
    "equal": Figure("equal elements", "%", higher=True),
    "new_nonfinite": Figure("new NaN or infinite elements"),
    "mask_mismatches": Figure("NaN or infinite elements on one side only"),
}


@dataclass(frozen=True)
class Gate:
    """One demand: the figure of every output that the glob ``output`` matches must hold against the threshold."""

    figure: str
    comparison: str
    threshold: float
    output: str = "*"
    asked: bool = False  # by the user: never goes unjudged quietly
    agreement: bool = False

    @classmethod
    def parse(cls, text: str) -> Gate:
        """The gate that a user writes: ``top1>=0.98``, ``logits.sqnr>=40``, ``"*_score.nearest>=85%"``."""
        found = re.fullmatch(r"\s*(?:(.*)\.)?([A-Za-z_0-9]+)\s*(>=|<=|==|>|<)\s*([^\s%]+)\s*(%?)\s*", text)
        if not found:
            raise UsageError(
                f"gate {text!r} is not of the form [OUTPUT.]FIGURE>=NUMBER", hint='for example "logits.sqnr>=40"'
            )
        output, name, comparison, number, percent = found.groups()
        name = _ALIASES.get(name, name)
        if name not in FIGURES:
            raise unknown_name("figure", name, FIGURES)
        try:
            threshold = float(number) / (100 if percent else 1)
        except ValueError as error:
            hint = 'for example "logits.sqnr>=40"'
            raise UsageError(f"gate {text!r}: {number!r} is not a number", hint=hint) from error
        if not math.isfinite(threshold):
            raise UsageError(f"gate {text!r}: the threshold must be finite")
        if FIGURES[name].higher == ("<" in comparison) and comparison != "==":
            better = "higher" if FIGURES[name].higher else "lower"
            turned = ">=" if FIGURES[name].higher else "<="
            raise UsageError(
                f"gate {text!r} would fail good models: {name} is better when {better}",
                hint=f"write {name}{turned}{number}{percent}",
            )
        return cls(name, comparison, threshold, output or "*", True, FIGURES[name].agreement)

    def matches(self, output: str) -> bool:
        return fnmatch.fnmatchcase(output, self.output)

    def holds(self, value: float) -> bool:
        return bool(_OPERATORS[self.comparison](value, self.threshold))

    @property
    def demand(self) -> str:
        """Such as ``>= 100 dB``."""
        return f"{self.comparison} {FIGURES[self.figure].text(self.threshold)}"

    def __str__(self) -> str:
        where = "" if self.output == "*" else f"{self.output}."
        return f"{where}{self.figure}{self.comparison}{self.threshold:g}"


@dataclass(frozen=True)
class Transition:
    """One row of the table. ``agreement`` is by what the output means; ``warn`` is told, not judged."""

    hard: tuple[Gate, ...] = ()
    agreement: Mapping[str, tuple[Gate, ...]] = field(default_factory=dict)
    warn: tuple[Gate, ...] = ()
    strict: bool = False  # masks equal both ways, integers equal, error against float64
    alive: bool = False  # the output must still react to its input
    dtype: str = ""  # what a float output may turn into


def at_least(figure: str, threshold: float) -> Gate:
    return Gate(figure, ">=", threshold, agreement=FIGURES[figure].agreement)


def at_most(figure: str, threshold: float) -> Gate:
    return Gate(figure, "<=", threshold, agreement=FIGURES[figure].agreement)


def _same(share: float) -> tuple[Gate, ...]:
    """The agreement of integer outputs (chosen labels)."""
    return (replace(at_least("equal", share), agreement=True),)


_STRUCTURAL = Transition(
    hard=(at_least("sqnr", 100), at_most("max_scaled", 2e-5)), warn=(at_most("max_scaled", 1e-6),), strict=True
)
_INT8_AGREEMENT: dict[str, tuple[Gate, ...]] = {
    "classes": (at_least("top1", 0.97),),
    "tokens": (at_most("kl_mean", 0.01),),
    "embedding": (at_least("nearest", 0.85),),
    "exact": _same(0.97),
}
_WEIGHTS_SCORES = (at_least("top1", 0.90), at_most("kl_mean", 0.05))

TRANSITIONS: dict[TransitionName, Transition] = {
    "structural": _STRUCTURAL,
    "export": _STRUCTURAL,
    "float16": Transition(
        hard=(at_least("sqnr", 40),),
        agreement={head: (at_least("top1", 0.995),) for head in ("classes", "tokens")} | {"exact": _same(0.995)},
        warn=(at_least("sqnr", 50),),
        dtype="float16",
    ),
    "bfloat16": Transition(
        hard=(at_least("sqnr", 30),),
        agreement={head: (at_least("top1", 0.99),) for head in ("classes", "tokens")} | {"exact": _same(0.99)},
        warn=(at_least("sqnr", 35),),
        dtype="bfloat16",
    ),
    "int8": Transition(
        hard=(at_least("sqnr", 10),),
        agreement=_INT8_AGREEMENT,
        warn=(at_least("sqnr", 20), at_least("cosine_min", 0.98)),
        alive=True,
    ),
    "weights": Transition(
        hard=(at_least("sqnr", 10),),
        agreement={
            "classes": _WEIGHTS_SCORES,
            "tokens": _WEIGHTS_SCORES,
            "embedding": (at_least("nearest", 0.85),),
            "exact": _same(0.90),
        },
        warn=(at_most("kl_p99", 0.5),),
        alive=True,
    ),
    "prune": Transition(agreement=_INT8_AGREEMENT, warn=(at_least("sqnr", 10),), alive=True),
}
