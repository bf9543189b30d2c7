"""The promise of the speed verdict, on simulated machines and recorded ones, and its words."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from modelops.errors import InputRefused, UsageError
from modelops.measures.verdicts import LOOKS, Launch, Pair, Rules, SpeedVerdict, decide, decide_ratios, order_effect

TRACES = Path(__file__).parent / "traces"
RUNS = 20_000
PAIRS = 20


def simulated(runs: int, seed: int, *, noise: float = 1.0, order: str = "random") -> NDArray[np.float64]:
    """Log-ratios of two equal models, of shape (run, launch): the medians of pairs of blocks on a noisy machine.

    A launch is a series of blocks whose log-times hold a drift (AR(1), 10 %), a step of the clock rate in every third
    launch, bursts of a neighbour over three blocks, noise of single blocks, what the launch's memory layout costs each
    side, and 0.6 % for whoever runs second: together the launches scatter like the recorded ones.
    """
    r = np.random.default_rng(seed)
    shape = (runs * LOOKS[-1], 2 * PAIRS)
    drift = np.empty(shape, np.float32)
    drift[:, 0] = 0.10 * r.standard_normal(shape[0], np.float32)
    for slot in range(1, shape[1]):
        drift[:, slot] = 0.97 * drift[:, slot - 1] + 0.0243 * r.standard_normal(shape[0], np.float32)
    burst = r.random(shape, np.float32) < 0.02
    burst[:, 1:] |= burst[:, :-1]
    burst[:, 1:] |= burst[:, :-1]
    times = drift + noise * (0.02 * r.standard_normal(shape, np.float32) + 0.5 * burst * r.random(shape, np.float32))
    stepping = np.where(r.random((shape[0], 1)) < 0.33, r.integers(0, shape[1], (shape[0], 1)), shape[1])
    times += (np.arange(shape[1]) >= stepping) * np.float32(0.2)
    times[:, 1::2] += 0.006
    layout = noise * 0.003 * (r.standard_normal((shape[0], 1)) + r.standard_normal((shape[0], 1)))
    second = times[:, 1::2] - times[:, ::2]
    a_second = r.random(second.shape) < 0.5 if order == "random" else order == "A second"
    result: NDArray[np.float64] = np.median(np.where(a_second, second, -second) + layout, axis=1)
    return result.reshape(runs, LOOKS[-1])


@cache
def identical() -> list[list[float]]:
    return [row for seed in range(10) for row in simulated(RUNS // 10, seed).tolist()]


def verdicts(runs: list[list[float]], slower: float, rules: Rules | None = None) -> Counter[str]:
    """How often each verdict is given when A takes ``1 + slower`` times as long."""
    shift = math.log1p(slower)
    found = (decide_ratios([x + shift for x in run], rules, final=True) for run in runs)
    return Counter(one.verdict for one in found if one)


def test_simulated_launches_scatter_like_recorded_ones() -> None:
    spread = float(np.std(identical()[:2000]))
    recorded = [x for x in (launch.log_ratio() for launch in recorded_launches("identical", PAIRS)) if x is not None]
    assert 0.7 < spread / np.std(recorded) < 1.4


def test_identical_models_hardly_ever_fail() -> None:
    counts = verdicts(identical(), 0.0)
    assert counts["fail"] < 0.001 * RUNS
    assert counts["pass"] > 0.99 * RUNS


def test_a_slow_down_of_five_per_cent_is_caught() -> None:
    counts = verdicts(identical(), 0.05)
    assert counts["fail"] >= 0.95 * RUNS
    assert counts["pass"] <= 0.01 * RUNS


def test_a_slow_down_that_is_ignored_hardly_ever_fails() -> None:
    assert verdicts(identical(), 0.02)["fail"] <= 0.01 * RUNS


def test_a_faster_model_passes() -> None:
    assert verdicts(identical()[:4000], -0.05)["pass"] > 0.999 * 4000


def test_a_very_noisy_machine_makes_verdicts_inconclusive_not_wrong() -> None:
    noisy = simulated(2000, 99, noise=8.0).tolist()
    same, slower = verdicts(noisy, 0.02), verdicts(noisy, 0.05)
    assert same["fail"] <= 0.015 * 2000  # 1 %, and three standard errors
    assert slower["pass"] <= 0.015 * 2000
    assert slower["inconclusive"] > 0.3 * 2000


def test_stopping_early_when_time_runs_out_keeps_the_error() -> None:
    for stop in (3, 4, 6, 10):
        runs = [run[:stop] for run in identical()[:5000]]
        assert verdicts(runs, 0.02)["fail"] <= 0.014 * 5000, stop
        assert verdicts(runs, 0.05)["pass"] <= 0.014 * 5000, stop


def test_a_demanded_speed_up_is_proved_or_refuted() -> None:
    runs, rules = identical()[:3000], Rules(at_least=1.5)
    assert verdicts(runs, 1 / 1.6 - 1, rules)["pass"] > 0.99 * 3000
    assert verdicts(runs, 1 / 1.4 - 1, rules)["fail"] > 0.99 * 3000
    edge = verdicts(runs, 1 / 1.5 - 1, rules)
    assert edge["pass"] <= 0.016 * 3000
    assert edge["fail"] <= 0.016 * 3000


def test_a_fixed_order_biases_and_a_random_one_does_not() -> None:
    random, fixed = simulated(500, 5), simulated(500, 5, order="A second")
    error = float(np.std(random)) / math.sqrt(random.size)
    assert abs(random.mean()) < 4 * error
    assert fixed.mean() == pytest.approx(0.006, abs=0.001)


def test_swapped_sides_give_the_opposite_ratio() -> None:
    for run in identical()[:300]:
        there, back = decide_ratios(run, final=True), decide_ratios([-x for x in run], final=True)
        assert there
        assert back
        if there.launches == back.launches:
            assert (there.ratio, there.low, there.high) == pytest.approx((1 / back.ratio, 1 / back.high, 1 / back.low))  # type: ignore[operator]


def recorded_launches(name: str, pairs: int = 40) -> list[Launch]:
    found: dict[int, list[Pair]] = defaultdict(list)
    for line in (TRACES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        launch, _, iterations, first, wall_a, wall_b, cpu_a, cpu_b = json.loads(line)
        found[launch].append(Pair(first, wall_a, wall_b, cpu_a, cpu_b, iterations))
    return [Launch(tuple(found[launch][:pairs])) for launch in sorted(found)]


def settled(launches: list[Launch], rules: Rules | None = None, **options: Any) -> SpeedVerdict:
    found = decide(launches, rules, final=True, **options)
    assert found is not None
    return found


@pytest.mark.parametrize("clock", ["wall", "cpu"])
@pytest.mark.parametrize("pairs", [20, 40])
def test_recorded_identical_models_pass_from_every_start_and_on_either_side(clock: str, pairs: int) -> None:
    launches = recorded_launches("identical", pairs)
    assert len(launches) == 24
    for start in range(24):
        turned = launches[start:] + launches[:start]
        for side in (turned, [launch.swapped() for launch in turned]):
            assert settled(side, clock=clock).verdict == "pass"


@pytest.mark.parametrize("clock", ["wall", "cpu"])
@pytest.mark.parametrize("pairs", [20, 40])
def test_the_recorded_slow_down_fails_from_every_start(clock: str, pairs: int) -> None:
    launches = [launch.swapped() for launch in recorded_launches("slower-5-percent", pairs)]  # judge the slower one
    assert len(launches) == 12
    for start in range(12):
        found = settled(launches[start:] + launches[:start], clock=clock)
        assert found.verdict == "fail"
        assert found.ratio == pytest.approx(1.06, abs=0.015)
    assert settled(recorded_launches("slower-5-percent", pairs), clock=clock).verdict == "pass"


def test_the_recorded_order_effect_is_seen() -> None:
    assert order_effect(recorded_launches("identical")) == pytest.approx(0.006, abs=0.001)
    assert order_effect([]) is None


def test_a_live_loop_and_a_replay_come_to_the_same_verdict() -> None:
    for name in ("identical", "slower-5-percent"):
        launches = [launch.swapped() for launch in recorded_launches(name, 20)]
        live = next(found for count in range(1, 25) if (found := decide(launches[:count])))
        assert settled(launches) == live
        saved = [Launch.parse(json.loads(json.dumps(launch.to_dict()))) for launch in launches]
        assert saved == launches
        assert decide(saved) == live


def test_nothing_is_decided_between_looks() -> None:
    far = [0.5, 0.5001, 0.5002, 0.4999, 0.4998, 0.5]
    assert decide_ratios(far[:4]) is None
    assert decide_ratios(far[:5]).verdict == "fail"  # type: ignore[union-attr]
    torn = [0.0, 0.1, -0.1, 0.05, -0.05, 0.0]
    assert decide_ratios(torn) is None
    assert decide_ratios(torn, final=True).verdict == "inconclusive"  # type: ignore[union-attr]


def test_the_last_look_ends_the_search() -> None:
    torn = [0.1, -0.1] * 12
    found = decide_ratios(torn)
    assert found
    assert (found.verdict, found.launches) == ("inconclusive", 20)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_launches_are_inconclusive(count: int) -> None:
    found = decide_ratios([0.0] * count, final=True)
    assert found
    assert found.verdict == "inconclusive"
    assert decide_ratios([0.0] * count) is None


def test_launches_that_did_not_come_to_rest_are_not_judged() -> None:
    for figures in ([0.0] * 5, [0.5] * 5):
        steady = [True, True, True, False, False]
        assert decide_ratios(figures, steady=steady) is None
        found = decide_ratios(figures, steady=steady, final=True)
        assert found
        assert found.verdict == "inconclusive"
        assert "40% of the launches did not come to rest" in found.message
        assert decide_ratios(figures, steady=[True] * 4 + [False]) is not None


def test_clocks_that_gave_no_time_never_pass() -> None:
    broken = Launch(tuple(Pair("A", 100, 100, 0, 0, 1) for _ in range(5)))
    found = decide([broken] * 20, clock="cpu", final=True)
    assert found
    assert found.verdict == "inconclusive"
    assert decide([broken] * 5).verdict == "pass"  # type: ignore[union-attr]


def test_the_message_says_how_much_how_sure_and_from_what() -> None:
    slower = decide_ratios([math.log(1.031) + x for x in (-0.001, 0.001, 0.0, 0.0015, -0.0015)], names=("new", "old"))
    assert slower
    assert slower.message == (
        "new is 3.1 % slower than old (99 % bounds 2.8…3.4 %, 5 launches), surely more than 2 % slower"
    )
    assert slower.check().threshold == "not 5 % slower"
    faster = decide_ratios([math.log(1 / 2) + x for x in (-0.001, 0.001, 0.0, 0.0015, -0.0015)])
    assert faster
    assert faster.message == "A is 2x as fast as B (99 % bounds 1.99…2.01, 5 launches), surely not 5 % slower"


def test_an_inconclusive_verdict_says_what_would_settle_it() -> None:
    torn = [0.03, -0.03, 0.01, -0.01, 0.0]
    found = decide_ratios(torn, final=True)
    assert found
    assert found.would_need is not None
    assert f"about {found.would_need} launches would settle it" in found.message
    assert found.half_width == pytest.approx(math.sqrt(found.high / found.low) - 1)  # type: ignore[operator]
    exactly = decide_ratios([-math.log(1.5) + x for x in torn], Rules(at_least=1.5), final=True)
    assert exactly
    assert exactly.would_need is None
    assert "not even 1000 launches" in exactly.message


def test_what_is_asked_must_be_decidable() -> None:
    for values in (
        {"ignore": 0.05, "detect": 0.05},
        {"ignore": -0.01},
        {"at_least": 0.0},
        {"alpha": 0.0},
        {"looks": ()},
        {"looks": (8, 5)},
        {"looks": (2, 5)},
    ):
        with pytest.raises(UsageError):
            Rules(**values)  # type: ignore[arg-type, unused-ignore]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"pairs": [], "steady": 1},
        {"pairs": [["A", 1, 2, 3, 4]], "steady": True},
        {"pairs": [["C", 1, 2, 3, 4, 5]], "steady": True},
        {"pairs": [["A", 1, 2, 3, 4, 5.0]], "steady": True},
        {"pairs": [["A", 1, -2, 3, 4, 5]], "steady": True},
        {"pairs": ["A12345"], "steady": True},
    ],
)
def test_altered_launches_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InputRefused):
        Launch.parse(values)


def test_verdicts_are_json() -> None:
    for figures in ([0.0] * 5, [], [0.1, -0.1, 0.3]):
        found = decide_ratios(figures, final=True)
        assert found
        json.dumps(found.to_dict(), allow_nan=False)
        json.dumps(found.check().to_dict(), allow_nan=False)
