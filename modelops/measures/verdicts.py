"""Which of two models is faster: a verdict that does not cry wolf on a noisy machine.

A launch is one fresh process for each model, timed in pairs close in time and in random order. Its one figure is the
median over pairs of log(time of A / time of B); only launches are replicated, so only they are counted (Kalibera and
Jones, *Rigorous benchmarking in reasonable time*, 2013), and Student's t bounds their mean. A is the model that is
judged, B the one that it is held against.

::

    FAIL           A is surely slower than B by more than ``ignore``   lower bound > log(1 + ignore)
    PASS           A is surely not slower by ``detect``                 upper bound < log(1 + detect)
    INCONCLUSIVE   neither, after the last look

Launches are looked at after 5, 8, 12 and 20 of them. Each look spends the same share of ``alpha`` (Bonferroni), so the
chance of a wrong FAIL, or of a wrong PASS, is at most ``alpha`` over all looks together. When time runs out between two
looks, the next one is taken early: the number of looks, and so the error, stays what it was.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Literal

from modelops.core.report import Check, Verdict
from modelops.errors import InputRefused, UsageError
from modelops.measures.distributions import t_quantile

Clock = Literal["wall", "cpu"]

LOOKS = (5, 8, 12, 20)
UNSTEADY_MOST = 0.3  # share of launches that may not have come to rest

_LAUNCHES_MIN = 3
_LAUNCHES_MOST = 1000  # more is not worth naming


@dataclass(frozen=True)
class Pair:
    """Two blocks of the same number of iterations, run one after the other; ``first`` says which came first."""

    first: Literal["A", "B"]
    wall_ns_a: int
    wall_ns_b: int
    cpu_ns_a: int
    cpu_ns_b: int
    iterations: int

    def log_ratio(self, clock: Clock) -> float | None:
        """log(time of A / time of B); None when a clock gave no time."""
        a, b = (self.wall_ns_a, self.wall_ns_b) if clock == "wall" else (self.cpu_ns_a, self.cpu_ns_b)
        return math.log(a / b) if a > 0 and b > 0 else None


@dataclass(frozen=True)
class Launch:
    """The pairs of one fresh process of each model. ``steady`` False says that its times had not come to rest."""

    pairs: tuple[Pair, ...]
    steady: bool = True

    def log_ratio(self, clock: Clock = "wall") -> float | None:
        """The launch's one figure, the median over pairs of log(time of A / time of B); None without a timed pair."""
        ratios = [ratio for pair in self.pairs if (ratio := pair.log_ratio(clock)) is not None]
        return median(ratios) if 2 * len(ratios) > len(self.pairs) else None

    def swapped(self) -> Launch:
        """The same launch with A and B exchanged."""
        return dataclasses.replace(
            self,
            pairs=tuple(
                Pair("B" if p.first == "A" else "A", p.wall_ns_b, p.wall_ns_a, p.cpu_ns_b, p.cpu_ns_a, p.iterations)
                for p in self.pairs
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        return {"steady": self.steady, "pairs": [list(dataclasses.astuple(pair)) for pair in self.pairs]}

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Launch:
        """The launch that ``to_dict`` wrote; InputRefused when it holds anything else."""
        pairs = values.get("pairs")
        if not isinstance(pairs, list) or not isinstance(values.get("steady"), bool):
            raise InputRefused("a launch needs 'pairs', a list, and 'steady', true or false")
        for pair in pairs:
            numbers = pair[1:] if isinstance(pair, list) and len(pair) == 6 and pair[0] in ("A", "B") else [None]
            if any(type(number) is not int or number < 0 for number in numbers):
                raise InputRefused(f"a pair is ['A' or 'B', five whole numbers], not {pair!r}")
        return cls(tuple(Pair(*pair) for pair in pairs), values["steady"])


@dataclass(frozen=True)
class Rules:
    """What is asked. ``at_least`` X asks that A is X times as fast as B, in place of ``ignore`` and ``detect``.

    ``alpha`` is the error allowed on each side over all ``looks``; when several verdicts are given at once, divide it
    by their number. UsageError for margins that can't be decided between.
    """

    ignore: float = 0.02
    detect: float = 0.05
    at_least: float | None = None
    alpha: float = 0.01
    looks: tuple[int, ...] = LOOKS

    def __post_init__(self) -> None:
        if not 0 <= self.ignore < self.detect:
            raise UsageError(
                f"the slow-down to ignore ({self.ignore:g}) must lie below the one to detect ({self.detect:g})",
                hint="for example --ignore 2% --detect 5%",
            )
        if self.at_least is not None and not 0 < self.at_least < math.inf:
            raise UsageError(f"a speed-up of {self.at_least:g} can't be asked for", hint="for example --at-least 1.5x")
        if not 0 < self.alpha < 0.5:
            raise UsageError(f"an error of {self.alpha:g} can't be asked for", hint="it lies between 0 and 0.5")
        rising = all(a < b for a, b in zip(self.looks, self.looks[1:], strict=False))
        if not self.looks or self.looks[0] < _LAUNCHES_MIN or not rising:
            raise UsageError(f"looks must rise and start at {_LAUNCHES_MIN} launches or more, not {self.looks}")

    @property
    def fail_above(self) -> float:
        """The log-ratio beyond which A is too slow."""
        return math.log1p(self.ignore) if self.at_least is None else -math.log(self.at_least)

    @property
    def pass_below(self) -> float:
        """The log-ratio below which A is fast enough."""
        return math.log1p(self.detect) if self.at_least is None else -math.log(self.at_least)

    @property
    def demand(self) -> str:
        """The threshold as text, such as ``not 5 % slower``."""
        if self.at_least is not None:
            return f"at least {self.at_least:g}x as fast"
        return f"not {100 * self.detect:g} % slower"


@dataclass(frozen=True)
class SpeedVerdict:
    """``ratio`` = time of A / time of B, with one-sided bounds ``low`` and ``high``, each at ``confidence``.

    ``would_need`` estimates how many launches would settle an inconclusive verdict; None where none are needed, or none
    would do. ``half_width`` is that of the interval, as a share of the ratio.
    """

    verdict: Verdict
    message: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    confidence: float = 0.99
    launches: int = 0
    would_need: int | None = None
    half_width: float | None = None
    demand: str = ""

    def check(self, name: str = "speed") -> Check:
        """The verdict as a check of a report."""
        return Check(name, self.verdict, self.message, self.ratio, self.demand, self.launches)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def decide(
    launches: Sequence[Launch],
    rules: Rules | None = None,
    *,
    final: bool = False,
    clock: Clock = "wall",
    names: tuple[str, str] = ("A", "B"),
) -> SpeedVerdict | None:
    """The verdict, or None when more launches are wanted. ``final`` says that there will be no more.

    A live loop calls this after every launch; called once on all recorded launches it takes the same looks in the same
    order, and so derives the same verdict.
    """
    figures = [launch.log_ratio(clock) for launch in launches]
    steady = [launch.steady and figure is not None for launch, figure in zip(launches, figures, strict=True)]
    return decide_ratios(figures, rules, steady=steady, final=final, names=names)


def decide_ratios(
    figures: Sequence[float | None],
    rules: Rules | None = None,
    *,
    steady: Sequence[bool] | None = None,
    final: bool = False,
    names: tuple[str, str] = ("A", "B"),
) -> SpeedVerdict | None:
    """``decide`` on the launches' own log-ratios; None stands for a launch without a figure."""
    rules = rules or Rules()
    steady = [True] * len(figures) if steady is None else steady
    planned = [look for look in rules.looks if look <= len(figures)]
    if final and len(planned) < len(rules.looks) and (not planned or planned[-1] < len(figures)):
        planned.append(len(figures))
    for look in planned:
        last = look == rules.looks[-1] or (final and look == planned[-1])
        found = _look(figures[:look], steady[:look], rules, last, names)
        if found:
            return found
    if final:
        return SpeedVerdict("inconclusive", "no launch was timed", demand=rules.demand)
    return None


def order_effect(launches: Sequence[Launch], clock: Clock = "wall") -> float | None:
    """How much longer a block takes when it runs second, as a share: half the gap between the two orders' medians.

    Random order keeps this from the verdict; it is worth knowing because a fixed order would add it.
    """
    sides: dict[str, list[float]] = {"A": [], "B": []}
    for launch in launches:
        for pair in launch.pairs:
            ratio = pair.log_ratio(clock)
            if ratio is not None:
                sides[pair.first].append(ratio)
    if not sides["A"] or not sides["B"]:
        return None
    return math.expm1((median(sides["B"]) - median(sides["A"])) / 2)


def _look(
    figures: Sequence[float | None], steady: Sequence[bool], rules: Rules, last: bool, names: tuple[str, str]
) -> SpeedVerdict | None:
    """One look at the launches so far: a verdict, or None to go on."""
    known = [figure for figure in figures if figure is not None]
    count, confidence = len(figures), 1 - rules.alpha
    if len(known) < _LAUNCHES_MIN:
        if not last:
            return None
        text = f"{_launches(len(known))} can't be judged: at least {_LAUNCHES_MIN} are needed"
        return SpeedVerdict(
            "inconclusive", text, None, None, None, confidence, count, rules.looks[0], None, rules.demand
        )
    mean = fmean(known)
    spread = math.sqrt(math.fsum((figure - mean) ** 2 for figure in known) / (len(known) - 1))
    quantile = t_quantile(1 - rules.alpha / len(rules.looks), len(known) - 1)
    half = quantile * spread / math.sqrt(len(known))
    low, high = mean - half, mean + half
    rough = sum(not one for one in steady) / count
    verdict: Verdict = "fail" if low > rules.fail_above else "pass" if high < rules.pass_below else "inconclusive"
    if rough > UNSTEADY_MOST:
        verdict = "inconclusive"
    if verdict == "inconclusive" and not last:
        return None
    need = None
    text = _sentence(mean, low, high, confidence, len(known), names)
    if rough > UNSTEADY_MOST:
        text += (
            f"; {rough:.0%} of the launches did not come to rest, more than {UNSTEADY_MOST:.0%}: quieten the machine"
        )
    elif verdict == "inconclusive":
        need = _launches_needed(mean, spread, rules, len(known))
        wish = (
            f"about {need} launches would settle it" if need else f"not even {_LAUNCHES_MOST} launches would settle it"
        )
        text += f", which is ±{_percent(math.expm1(half))} %: neither {_failing(rules)} nor {rules.demand}; {wish}"
    elif verdict == "fail":
        text += f", surely {_failing(rules)}"
    else:
        text += f", surely {rules.demand}"
    bounds = (math.exp(mean), math.exp(low), math.exp(high))
    return SpeedVerdict(verdict, text, *bounds, confidence, count, need, math.expm1(half), rules.demand)


def _launches_needed(mean: float, spread: float, rules: Rules, count: int) -> int | None:
    """How many launches bring one of the bounds to its side, if mean and spread stay what they are."""
    room = max(mean - rules.fail_above, rules.pass_below - mean)

    def settles(n: int) -> bool:
        return t_quantile(1 - rules.alpha / len(rules.looks), n - 1) * spread / math.sqrt(n) < room

    if room <= 0 or not settles(_LAUNCHES_MOST):
        return None
    low, high = count, _LAUNCHES_MOST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if settles(middle) else (middle, high)
    return high


def _failing(rules: Rules) -> str:
    if rules.at_least is not None:
        return f"less than {rules.at_least:g}x as fast"
    return f"more than {100 * rules.ignore:g} % slower"


def _sentence(mean: float, low: float, high: float, confidence: float, count: int, names: tuple[str, str]) -> str:
    """What was measured: in per cent when near, as a factor when far apart."""
    sure = f"{100 * confidence:g} % bounds"
    if abs(mean) < math.log(1.2):
        change = 100 * math.expm1(mean)
        word = "slower" if change >= 0 else "faster"
        bounds = sorted(math.copysign(100, change) * math.expm1(x) for x in (low, high))
        said = f"{abs(change):.1f} % {word} than {names[1]} ({sure} {bounds[0]:.1f}…{bounds[1]:.1f} %"
    else:
        said = f"{math.exp(-mean):.3g}x as fast as {names[1]} ({sure} {math.exp(-high):.3g}…{math.exp(-low):.3g}"
    return f"{names[0]} is {said}, {_launches(count)})"


def _launches(count: int) -> str:
    return f"{count} launch" if count == 1 else f"{count} launches"


def _percent(share: float) -> str:
    """A share in per cent, with two digits below ten and none behind the point above: "1.5", "150"."""
    return f"{100 * share:.2g}" if share < 0.1 else f"{100 * share:.0f}"
