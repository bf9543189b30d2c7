"""Gates say pass only on enough data that could have failed, and fail in one sentence with the numbers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelops.core.report import Check, Report
from modelops.errors import UsageError
from modelops.measures.comparison import compare
from modelops.measures.differences import Difference
from modelops.measures.gates import FIGURES, TRANSITIONS, Gate, TransitionName
from modelops.measures.judging import Float64Errors, judge, warnings


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def pair(rows: int = 40, width: int = 10, noise: float = 0.0, dtype: str = "float32") -> tuple[Any, Any]:
    y = rng().normal(size=(rows, width))
    x = y + noise * np.random.default_rng(4).normal(size=(rows, width))
    return y.astype(dtype), x.astype(dtype)


def measured(y: Any, x: Any, name: str = "logits", **options: Any) -> dict[str, Difference]:
    return compare([({name: y}, {name: x})], **options)


def judged(
    differences: Mapping[str, Difference], transition: TransitionName = "structural", real: bool = False, **options: Any
) -> dict[str, Check]:
    return {check.name: check for check in judge(differences, transition, agreement_evaluated=real, **options)}


def verdict(checks: Mapping[str, Check]) -> str:
    return Report(checks=tuple(checks.values())).verdict


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_identical_outputs_pass_every_transition(transition: TransitionName) -> None:
    y, _ = pair(300)
    checks = judged(measured(y, y.copy()), transition, real=True)
    assert verdict(checks) == "pass"
    assert all(checks.values()), checks


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_nothing_passes_on_zero_comparisons(transition: TransitionName) -> None:
    empty = np.zeros((0, 4), "f4")
    infinite = np.full((40, 4), np.nan, "f4")
    for differences in ({}, measured(empty, empty), measured(infinite, infinite)):
        assert verdict(judged(differences, transition, real=True)) == "inconclusive"


@pytest.mark.parametrize("transition", TRANSITIONS)
@pytest.mark.parametrize("name", ["logits", "embedding", "other"])
def test_no_numeric_gate_passes_on_a_constant_reference(transition: TransitionName, name: str) -> None:
    y = np.tile(rng().normal(size=(1, 10)).astype("f4"), (300, 1))
    for reference in (y, y * 0, y * (1 + 1e-6 * rng().normal(size=(300, 1)))):
        checks = judged(measured(reference, reference.copy(), name), transition, real=True)
        passed = [check.name for check in checks.values() if check and not check.name.endswith((".form", ".finite"))]
        assert passed == []


@pytest.mark.parametrize("rows", [1, 5, 31])
def test_too_few_rows_are_inconclusive(rows: int) -> None:
    y, _ = pair(rows)
    checks = judged(measured(y, y.copy()))
    assert verdict(checks) == "inconclusive"
    assert not any(check for check in checks.values() if not check.name.endswith(".form"))
    assert "at least 32 are needed" in checks["logits.sqnr"].message


def test_a_broken_gate_fails_even_on_few_rows() -> None:
    assert verdict(judged(measured(*pair(5, noise=0.1)))) == "fail"


@pytest.mark.parametrize(
    ("transition", "rows", "width", "expected"),
    [
        ("structural", 16, 256, "pass"),
        ("structural", 16, 255, "inconclusive"),
        ("structural", 15, 1000, "inconclusive"),
        ("structural", 32, 2, "pass"),
        ("int8", 16, 256, "inconclusive"),
        ("int8", 31, 1000, "inconclusive"),
    ],
)
def test_half_the_rows_are_enough_for_exact_rewrites_with_many_numbers(
    transition: TransitionName, rows: int, width: int, expected: str
) -> None:
    y, _ = pair(rows, width)
    assert verdict(judged(measured(y, y.copy()), transition)) == expected


def test_rows_min_is_the_callers() -> None:
    y, _ = pair(8)
    assert verdict(judged(measured(y, y.copy()), rows_min=8)) == "pass"


def test_float32_noise_passes_and_a_changed_gelu_fails_the_structural_gate() -> None:
    erf = np.vectorize(__import__("math").erf)
    z, _ = pair(40, 50, dtype="float64")
    exact = (0.5 * z * (1 + erf(z / np.sqrt(2)))).astype("f4")
    tanh = (0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))).astype("f4")
    rounding = exact * (1 + 1e-7 * np.random.default_rng(1).uniform(-1, 1, size=exact.shape)).astype("f4")
    assert verdict(judged(measured(exact, rounding))) == "pass"
    assert verdict(judged(measured(exact, tanh))) == "fail"


def test_the_message_holds_value_threshold_and_rows() -> None:
    y, x = pair(34, noise=1.6e-5)
    check = judged(measured(y, x))["logits.sqnr"]
    assert check.verdict == "fail"
    assert check.message.startswith(f"logits: SQNR {check.value:.4g} dB, needs >= 100 dB (34 rows), worst in row ")
    assert (check.threshold, check.n) == (">= 100 dB", 34)


def test_one_wrong_element_fails_by_scale_though_sqnr_may_not() -> None:
    y, _ = pair(4000, 100)
    x = y.copy()
    x[7, 3] += 2e-3
    checks = judged(measured(y, x))
    assert checks["logits.sqnr"].verdict == "pass"
    assert checks["logits.max_scaled"].verdict == "fail"
    assert "row 7[3]" in checks["logits.max_scaled"].message


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_other_shapes_and_missing_outputs_fail(transition: TransitionName) -> None:
    y, _ = pair()
    assert verdict(judged(measured(y, y[:, :5]), transition)) == "fail"
    assert judged(compare([({"a": y, "b": y}, {"a": y})]), transition)["b.form"].message == "b: missing"
    assert verdict(judged(compare([({"a": y}, {"a": y, "b": y})]), transition)) == "fail"


def test_another_dtype_fails_except_the_one_the_transition_makes() -> None:
    y, _ = pair(40)
    half = measured(y, y.astype("f2"))
    assert judged(half)["logits.form"].message == "logits: dtype float16, the reference has float32"
    assert judged(half, "bfloat16")["logits.form"].verdict == "fail"
    assert verdict(judged(half, "float16")) == "pass"


def test_new_nan_fails_everywhere_and_lost_nan_fails_where_nothing_should_change() -> None:
    y, _ = pair(300)
    y[3, 3] = np.nan
    x = np.nan_to_num(y)
    assert judged(measured(x, y), "int8", real=True)["logits.finite"].verdict == "fail"
    assert judged(measured(y, x), "int8", real=True)["logits.finite"].verdict == "pass"
    lost = judged(measured(y, x))["logits.finite"]
    assert lost.verdict == "fail"
    assert "row 3[3]: 0 for nan" in lost.message


def test_agreement_needs_real_data_and_enough_of_it() -> None:
    y, x = pair(300, noise=1e-3)
    made_up = judged(measured(y, x), "int8")["logits.top1"]
    assert made_up.verdict == "not-evaluated"
    assert "--data" in made_up.message
    few = judged(measured(y[:255], x[:255]), "int8", real=True)["logits.top1"]
    assert few.verdict == "not-evaluated"
    assert "255 rows of data, needs 256" in few.message
    enough = judged(measured(y, x), "int8", real=True)["logits.top1"]
    assert enough.verdict == "pass"
    assert "agreement with the model before, not accuracy" in enough.message
    assert "95 % interval 98.7…100 %" in enough.message


def test_agreement_of_the_head_is_what_int8_is_judged_by() -> None:
    y, x = pair(300, 16, noise=0.1)
    assert judged(measured(y, x), "int8", real=True)["logits.top1"].verdict == "fail"
    assert judged(measured(y, x, "embedding"), "int8", real=True)["embedding.nearest"].n == 300
    tokens = judged(measured(y[:, None], x[:, None]), "int8", real=True)
    assert tokens["logits.kl_mean"].verdict == "pass"  # 0.005 nats
    assert "logits.top1" not in tokens
    labels = judged(measured(y.argmax(1), x.argmax(1), "label"), "int8", real=True)
    assert labels["label.equal"].verdict == "fail"
    assert judged(measured(y.argmax(1), x.argmax(1), "label"), "int8")["label.equal"].verdict == "not-evaluated"


def test_a_task_metric_takes_the_place_of_agreement() -> None:
    y, x = pair(300, noise=0.3)
    assert verdict(judged(measured(y, x), "int8", real=True)) == "fail"
    assert verdict(judged(measured(y, x), "int8", real=True, task_metric=True)) == "pass"


@pytest.mark.parametrize(
    ("transition", "noise"), [("float16", 1e-2), ("bfloat16", 4e-2), ("int8", 0.4), ("weights", 0.4)]
)
def test_sqnr_has_the_floor_of_the_transition(transition: TransitionName, noise: float) -> None:
    assert judged(measured(*pair(40, noise=noise / 2)), transition)["logits.sqnr"].verdict == "pass"
    assert judged(measured(*pair(40, noise=noise)), transition)["logits.sqnr"].verdict == "fail"


def test_outputs_of_low_precision_are_held_to_what_they_can_carry() -> None:
    y, _ = pair(40, dtype="float64")
    differences = measured(y.astype("f2"), (y * (1 + 5e-4)).astype("f2"))
    checks = judged(differences)
    assert verdict(checks) == "pass"
    assert checks["logits.sqnr"].threshold == ">= 40 dB"


@pytest.mark.parametrize("transition", ["int8", "weights", "prune"])
def test_an_output_that_no_longer_reacts_fails(transition: TransitionName) -> None:
    y, _ = pair(300)
    y += 100  # so that the constant has a fine SQNR
    checks = judged(measured(y, np.full_like(y, 100), "hidden", heads={"hidden": "other"}), transition)
    assert checks["hidden.alive"].verdict == "fail"
    assert verdict(checks) == "fail"


def test_integers_must_be_equal_where_nothing_should_change() -> None:
    y, _ = pair(300)
    chosen = y.argmax(1)
    assert judged(measured(chosen, chosen.copy(), "label"))["label.equal"].verdict == "pass"
    other = chosen.copy()
    other[9] += 1
    check = judged(measured(chosen, other, "label"))["label.equal"]
    assert check.verdict == "fail"
    assert "99.67 %" in check.message
    assert "row 9" in check.message


def test_a_constant_integer_is_judged_beside_an_output_that_varies() -> None:
    y, _ = pair()
    size = np.full((40, 1), 10)
    assert verdict(judged(compare([({"logits": y, "size": size}, {"logits": y, "size": size})]))) == "pass"
    assert verdict(judged(compare([({"size": size}, {"size": size})]))) == "inconclusive"


def test_text_outputs_are_judged_by_equality() -> None:
    words = np.array(["cat", "dog"] * 20)
    assert verdict(judged(measured(words, words.copy(), "label"))) == "pass"
    assert verdict(judged(measured(words, words[::-1], "label"))) == "fail"
    assert verdict(judged(measured(words[:1].repeat(40), words[:1].repeat(40), "label"))) == "inconclusive"


def test_error_against_float64_may_be_four_times_the_sources_own() -> None:
    exact, _ = pair(40, dtype="float64")
    source = exact * (1 + 1e-6)
    for factor, wanted in ((3.5, "pass"), (5.0, "fail")):
        actual = exact * (1 + factor * 1e-6)
        errors = Float64Errors(measured(exact, source), measured(exact, actual))
        check = judged(measured(source, actual), float64=errors)["logits.float64"]
        assert check.verdict == wanted
        assert "four times the source's own" in check.message


def test_a_zero_reference_gives_no_scale_to_fail_by() -> None:
    zeros = np.zeros((40, 4), "f4")
    assert judged(measured(zeros, zeros + 1e-9))["logits.sqnr"].verdict == "inconclusive"


def test_asked_gates_replace_those_of_the_table() -> None:
    y, x = pair(40, noise=1e-4)  # 80 dB
    assert verdict(judged(measured(y, x))) == "fail"
    checks = judged(measured(y, x), overrides=["logits.sqnr>=60", "max_scaled<=1e-3"])
    assert verdict(checks) == "pass"
    assert checks["logits.sqnr"].threshold == ">= 60 dB"
    assert verdict(judged(measured(y, x), "int8", overrides=["sqnr>=90"])) == "fail"


def test_asked_gates_go_by_output() -> None:
    y, x = pair(40, noise=1e-4)
    both = compare([({"a.x": y, "b": y}, {"a.x": y, "b": x})])
    checks = judged(both, overrides=["b.sqnr>=60", "b.max_scaled<=1e-3"])
    assert checks["a.x.sqnr"].threshold == ">= 100 dB"
    assert verdict(checks) == "pass"
    assert judged(both, overrides=["a.?.sqnr>=110"])["a.x.sqnr"].threshold == ">= 110 dB"


def test_an_asked_gate_never_goes_unjudged_quietly() -> None:
    y, _ = pair(40)
    differences = measured(y, y.copy(), "embedding")
    for gate in ("top1>=0.9", "embedding.top1>=0.9", "nearest>=0.9", "emb*.kl<=1"):
        checks = judged(differences, overrides=[gate])
        assert verdict(checks) == "inconclusive", gate


def test_a_gate_on_no_output_names_the_nearest() -> None:
    y, _ = pair(40)
    with pytest.raises(UsageError, match="logit") as caught:
        judged(measured(y, y), overrides=["logit.sqnr>=40"])
    assert caught.value.hint == "did you mean 'logits'?"


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("top1>=0.98", Gate("top1", ">=", 0.98, asked=True, agreement=True)),
        ("top1 >= 98%", Gate("top1", ">=", 0.98, asked=True, agreement=True)),
        ("logits.sqnr>=40", Gate("sqnr", ">=", 40, "logits", asked=True)),
        ("a.b/c:0.max_scaled<1e-5", Gate("max_scaled", "<", 1e-5, "a.b/c:0", asked=True)),
        ("*_score.kl<=.1", Gate("kl_mean", "<=", 0.1, "*_score", asked=True, agreement=True)),
        ("equal==1", Gate("equal", "==", 1, asked=True)),
    ],
)
def test_gates_are_read_as_users_write_them(text: str, gate: Gate) -> None:
    assert Gate.parse(text) == gate
    assert Gate.parse(str(gate)) == gate


@pytest.mark.parametrize("text", ["", "sqnr", "sqnr=40", "sqnr>=", "sqnr>=forty", "sqnr>=nan", "sqnr>=inf", ">=3"])
def test_malformed_gates_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError):
        Gate.parse(text)


def test_unknown_figures_name_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        Gate.parse("logits.sqrn>=40")
    assert caught.value.hint == "did you mean 'sqnr'?"


def test_a_gate_the_wrong_way_round_is_refused() -> None:
    with pytest.raises(UsageError, match="better when higher") as caught:
        Gate.parse("sqnr<=40")
    assert caught.value.hint == "write sqnr>=40"


@given(st.text(max_size=30))
def test_any_text_is_a_gate_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert Gate.parse(text).figure in FIGURES


def test_every_figure_is_one_of_the_difference() -> None:
    d = next(iter(measured(*pair(40)).values()))
    assert all(hasattr(d, name) for name in FIGURES)
    assert all(gate.figure in FIGURES for row in TRANSITIONS.values() for gate in (*row.hard, *row.warn))


def test_checks_are_json() -> None:
    y, x = pair(40)
    zeros = np.zeros_like(y)
    for a, b in ((y, x), (zeros, x + 1), (y, x * np.nan)):
        for check in judged(measured(a, b)).values():
            json.dumps(check.to_dict(), allow_nan=False)


def test_saved_differences_are_judged_the_same() -> None:
    differences = measured(*pair(300, noise=0.05))
    again = {name: Difference.parse(json.loads(json.dumps(d.to_dict()))) for name, d in differences.items()}
    for transition in TRANSITIONS:
        assert judged(again, transition, real=True) == judged(differences, transition, real=True)


def test_warnings_tell_what_is_unusual() -> None:
    assert warnings(measured(*pair(40, noise=0.2)), "int8")[0].startswith("logits: SQNR 13.")
    assert warnings(measured(*pair(40)), "int8") == []


def test_unknown_transitions_name_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        judge({}, "structure", agreement_evaluated=False)  # type: ignore[arg-type]
    assert "structural" in caught.value.hint
