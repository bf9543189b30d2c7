"""Figures of a comparison are those of the plain formulas, however the stream is cut."""

from __future__ import annotations

import json
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from modelops.measures import comparison, tallies
from modelops.measures.comparison import Comparison, compare, guess_head
from modelops.measures.differences import Difference


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def one(y: Any, x: Any, name: str = "y", **options: Any) -> Difference:
    return compare([({name: np.asarray(y)}, {name: np.asarray(x)})], **options)[name]


def noisy(shape: tuple[int, ...], noise: float = 1e-3, dtype: str = "float32") -> tuple[Any, Any]:
    y = rng().normal(size=shape).astype(dtype)
    return y, (y + noise * rng().normal(size=shape)[::-1]).astype(dtype)


def test_figures_are_the_plain_formulas() -> None:
    y, x = noisy((40, 6, 7))
    d = one(y, x)
    a, b = y.astype(float), x.astype(float)
    delta = np.abs(a - b)
    assert d.max_abs == delta.max()
    assert d.scale == np.abs(a).max()
    assert d.max_scaled == pytest.approx(delta.max() / np.abs(a).max())
    assert d.max_rms == pytest.approx(delta.max() / np.sqrt((a**2).mean()))
    assert d.mean_abs == pytest.approx(delta.mean())
    assert d.sqnr == pytest.approx(20 * np.log10(np.linalg.norm(a) / np.linalg.norm(a - b)))
    rows_a, rows_b = a.reshape(40, -1), b.reshape(40, -1)
    cosine = (rows_a * rows_b).sum(1) / np.linalg.norm(rows_a, axis=1) / np.linalg.norm(rows_b, axis=1)
    assert (d.cosine_mean, d.cosine_min) == pytest.approx((cosine.mean(), cosine.min()))
    assert (d.rows, d.elements, d.compared) == (40, y.size, y.size)
    assert d.varies
    assert not d.identical


@pytest.mark.parametrize(("figure", "share"), [("p50_abs", 0.5), ("p99_abs", 0.99), ("p999_abs", 0.999)])
def test_quantiles_are_at_most_one_bin_above_the_truth(figure: str, share: float) -> None:
    y, x = noisy((50, 1000))
    truth = np.quantile(np.abs(y.astype(float) - x), share, method="inverted_cdf")
    assert truth <= getattr(one(y, x), figure) <= truth * 1.033


def test_the_cut_of_the_stream_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    y, x = noisy((60, 12))
    x[5, 3] = np.nan
    whole = one(y, x, "logits")
    for module in (comparison, tallies):  # pieces of 5 elements cut rows apart
        monkeypatch.setattr(module, "CHUNK", 5)
    batches = [({"logits": y[i : i + 7]}, {"logits": x[i : i + 7]}) for i in range(0, 60, 7)]
    cut = compare(batches)["logits"]
    for name, value in whole.to_dict().items():
        # the floor of ULPs follows the scale as known so far, and sums are taken in another order
        if name not in ("ulp_p99", "ulp_max"):
            assert cut.to_dict()[name] == (pytest.approx(value) if isinstance(value, float) else value), name


def test_ulps_count_steps_between_neighbours() -> None:
    for dtype in ("float16", "float32", "float64"):
        y = rng().uniform(1.1, 1.9, size=(1, 400)).astype(dtype)  # within one power of two, so one unit for all
        x = y
        for _ in range(3):
            x = np.nextafter(x, np.array(9, dtype))
        d = one(y, x)
        assert d.ulp_max == 3.0
        assert d.ulp_p99 == 3.0


def test_bfloat16_is_a_float() -> None:
    y, x = noisy((40, 8), 1e-1)
    d = one(y.astype(ml_dtypes.bfloat16), x.astype(ml_dtypes.bfloat16))
    assert not d.exact
    assert d.dtype == "bfloat16"
    assert d.sqnr is not None
    assert 10 < d.sqnr < 40


def test_tiny_elements_do_not_count_in_ulps() -> None:
    d = one(np.array([[1.0, 1e-9]], "f4"), np.array([[1.0, 2e-9]], "f4"))
    assert d.ulp_max == 0


def test_identical_outputs_have_infinite_sqnr_and_json_for_it() -> None:
    y, _ = noisy((4, 5))
    d = one(y, y.copy())
    assert d.sqnr == math.inf
    assert d.identical
    values = json.loads(json.dumps(d.to_dict(), allow_nan=False))
    assert values["sqnr"] is None
    assert values["identical"] is True


@pytest.mark.parametrize("special", [np.nan, np.inf, 0.0])
def test_saved_differences_come_back_the_same(special: float) -> None:
    y, x = noisy((8, 5))
    x[2, 2] = special
    for d in (one(y, x), one(y * 0, x, "logits"), one(np.arange(4), np.arange(4) + 1)):
        assert Difference.parse(json.loads(json.dumps(d.to_dict(), allow_nan=False))) == d


def test_masks_of_values_that_are_not_finite_are_compared() -> None:
    y = np.array([[1.0, np.nan, np.inf, -np.inf], [2.0, 3.0, 4.0, np.nan]], "f4")
    same = one(y, y.copy())
    assert (same.mask_mismatches, same.compared, same.identical) == (0, 4, True)
    x = y.copy()
    x[0, 2], x[1, 0], x[1, 3] = -np.inf, np.nan, 5.0  # sign of infinity, a new NaN, a lost NaN
    d = one(y, x)
    assert (d.mask_mismatches, d.new_nonfinite) == (3, 1)
    assert d.worst is not None
    assert (d.worst.row, d.worst.index, d.worst.reference, d.worst.actual) == (0, (2,), "inf", "-inf")
    assert not d.identical


def test_worst_element_names_its_input_across_batches() -> None:
    y, x = noisy((30, 3, 4), 1e-6)
    x[17, 2, 1] += 5
    batches = [({"y": y[i : i + 8]}, {"y": x[i : i + 8]}) for i in range(0, 30, 8)]
    worst = compare(batches)["y"].worst
    assert worst is not None
    assert (worst.row, worst.index) == (17, (2, 1))
    assert worst.actual == pytest.approx(float(y[17, 2, 1]) + 5, abs=1e-4)


def test_extreme_magnitudes_neither_overflow_nor_vanish() -> None:
    y, x = noisy((32, 10), 1e-3, "float64")
    plain = one(y, x).sqnr
    for scale in (1e-300, 1e300):
        assert one(y * scale, x * scale).sqnr == pytest.approx(plain)


def test_another_shape_a_missing_and_an_extra_output_are_problems() -> None:
    y = np.ones((2, 3), "f4")
    result = compare([({"a": y, "b": y}, {"a": y[:, :2], "c": y})])
    assert result["a"].problem == "shape (2, 2), the reference has (2, 3)"
    assert result["b"].problem == "missing"
    assert result["c"].problem == "not in the reference"
    assert not any(d.identical for d in result.values())


def test_a_changed_dtype_is_kept_and_still_measured() -> None:
    y, x = noisy((40, 5))
    d = one(y, x.astype("float16"))
    assert (d.dtype, d.actual_dtype) == ("float32", "float16")
    assert d.sqnr is not None
    assert d.ulp_p99 is None


def test_class_scores_are_compared_by_decision_and_divergence() -> None:
    y = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.6, 0.3, 0.1]]))
    x = y.copy()
    x[2] = np.log([0.5, 0.2, 0.3])
    d = one(y, x, "logits")
    assert (d.head, d.top1, d.decisions) == ("classes", 0.75, 4)
    p, q = np.exp(y[2]), np.exp(x[2])
    assert d.kl_mean == pytest.approx(float((p * np.log(p / q)).sum()) / 4)
    probabilities = one(np.exp(y), np.exp(x), "probabilities")  # no softmax twice
    assert probabilities.kl_mean == pytest.approx(d.kl_mean, rel=1e-6)


def test_top5_counts_the_first_class_among_five() -> None:
    y = np.tile(np.arange(10.0), (2, 1))
    x = y.copy()
    x[0, 9], x[1, 9] = 4.5, 3.5  # four are better, then five
    assert (one(y, x, "logits").top1, one(y, x, "logits").top5) == (0.0, 0.5)


def test_a_tie_is_no_disagreement() -> None:
    y = np.array([[1.0, 1.0 - 1e-7, 0.0], [1.0, 0.9, 0.0]])
    x = y[:, [1, 0, 2]]
    assert one(y, x, "logits").top1 == 0.5


def test_nan_scores_are_a_disagreement_and_masked_scores_are_not() -> None:
    y = np.array([[1.0, -np.inf, 0.0], [0.0, 2.0, -np.inf]])
    assert one(y, y.copy(), "logits").top1 == 1.0
    assert one(y, y.copy(), "logits").kl_mean == 0.0
    x = y.copy()
    x[1, 1] = np.nan
    assert one(y, x, "logits").top1 == 0.5


def test_padding_of_huge_scores_does_not_hide_changed_decisions() -> None:
    y = np.array([[1.0, 2.0, -1e30], [3.0, 1.0, -1e30]])
    x = np.array([[2.0, 1.0, -1e30], [3.0, 1.0, -1e30]])
    assert one(y, x, "logits").top1 == 0.5


def test_nearest_neighbours_are_compared_for_embeddings() -> None:
    base = rng().normal(size=(30, 16))
    assert one(base, base * 3, "embedding").nearest == 1.0
    d = one(base, rng().normal(size=(30, 16))[::-1], "sentence_embedding")
    assert d.head == "embedding"
    assert d.nearest is not None
    assert d.nearest < 0.4
    assert d.nearest_rows == 30
    assert d.top1 is None


def test_nearest_neighbours_keep_a_bounded_number_of_rows() -> None:
    neighbours = tallies.Neighbours(most=50)
    for _ in range(4):
        rows = rng().normal(size=(30, 8))
        neighbours.add(rows, rows)
    assert neighbours.agreement() == (1.0, 50)


@pytest.mark.parametrize(
    ("name", "shape", "head"),
    [
        ("logits", (4, 10), "classes"),
        ("logits", (4, 7, 10), "classes"),
        ("output", (4, 10), "classes"),
        ("last_hidden_state", (4, 7, 10), "other"),
        ("pooler_output", (4, 10), "embedding"),
        ("image", (4, 3, 8, 8), "other"),
        ("output", (4, 1), "other"),
        ("output", (4,), "other"),
    ],
)
def test_the_head_is_guessed_from_name_and_shape(name: str, shape: tuple[int, ...], head: str) -> None:
    assert guess_head(name, rng().normal(size=shape)) == head


def test_rows_of_length_one_are_an_embedding_and_probabilities_are_classes() -> None:
    values = rng().normal(size=(6, 12))
    assert guess_head("out", values / np.linalg.norm(values, axis=1, keepdims=True)) == "embedding"
    one_hot = np.eye(12)[:6]  # of length one as well
    assert guess_head("out", one_hot) == "classes"
    assert guess_head("out", np.tile(one_hot[:, None], (1, 2, 1))) == "classes"


def test_the_caller_can_tell_the_head() -> None:
    y, x = noisy((40, 5))
    assert one(y, x, "y", heads={"y": "embedding"}).nearest is not None
    assert one(y, x, "y", heads={"y": "other"}).top1 is None


def test_constant_references_are_seen_to_vary_not() -> None:
    row = rng().normal(size=(1, 20)).astype("f4")
    assert one(np.tile(row, (9, 1)), np.tile(row, (9, 1))).varies is False
    nearly = np.tile(row, (9, 1)) * (1 + 1e-5 * rng().normal(size=(9, 1)))
    assert one(nearly, nearly).varies is False
    assert one(row, row).varies is None
    assert one(np.zeros((5, 3)), np.zeros((5, 3))).varies is False


def test_rows_of_different_shapes_are_compared_by_their_means() -> None:
    batches = [np.full((1, width), float(width)) for width in range(2, 6)]
    assert compare(({"y": b}, {"y": b}) for b in batches)["y"].varies
    flat = [np.full((1, width), 1.0) for width in range(2, 6)]
    assert compare(({"y": b}, {"y": b}) for b in flat)["y"].varies is False


def test_integers_are_compared_by_equality() -> None:
    y = np.arange(20).reshape(10, 2)
    x = y.copy()
    x[3, 1] += 1
    d = one(y, x)
    assert (d.exact, d.equal, d.sqnr) == (True, 0.95, None)
    assert d.worst is not None
    assert (d.worst.row, d.worst.index, d.worst.reference, d.worst.actual) == (3, (1,), 7.0, 8.0)
    assert one(y, y.copy()).identical
    assert one(y % 2 == 0, y % 2 == 0).equal == 1.0


def test_large_integers_are_not_rounded() -> None:
    assert one(np.array([2**53]), np.array([2**53 + 1])).equal == 0.0


def test_strings_are_compared_by_equality() -> None:
    assert one(np.array(["cat", "dog"]), np.array(["cat", "cow"])).equal == 0.5
    assert one(np.array(["1", "2"]), np.array([1, 2])).equal == 0.0


def test_an_index_may_differ_where_the_scores_tie() -> None:
    scores = np.array([[0.5, 0.5 + 1e-9, 0.0], [0.1, 0.9, 0.0], [0.9, 0.1, 0.0]])
    chosen = np.array([1, 1, 0])
    tied = compare([({"logits": scores, "label": chosen}, {"logits": scores, "label": np.array([0, 1, 0])})])["label"]
    assert (tied.equal, tied.ties) == (1.0, 1)
    wrong = compare([({"logits": scores, "label": chosen}, {"logits": scores, "label": np.array([1, 2, 0])})])["label"]
    assert wrong.equal == pytest.approx(2 / 3)
    assert wrong.ties == 0


def test_without_a_batch_axis_a_pair_is_one_row() -> None:
    y, x = noisy((3, 4))
    assert one(y, x).rows == 3
    assert one(y, x, batched=False).rows == 1
    assert one(np.float32(1), np.float32(1)).rows == 1


def test_empty_outputs_compare_nothing() -> None:
    d = one(np.zeros((0, 4), "f4"), np.zeros((0, 4), "f4"))
    assert (d.rows, d.compared, d.sqnr, d.identical) == (0, 0, None, False)
    assert one(np.zeros((3, 0), "f4"), np.zeros((3, 0), "f4")).compared == 0
    assert compare([]) == {}


def test_complex_outputs_are_compared_by_their_parts() -> None:
    y = rng().normal(size=(40, 3)) + 1j * rng().normal(size=(40, 3))
    d = one(y, y + 1e-3j)
    assert d.max_abs == pytest.approx(1e-3)


def test_memory_stays_bounded_over_a_long_stream() -> None:
    comparing = Comparison()
    y, x = noisy((64, 4096))
    comparing.add({"y": y}, {"y": x})
    import tracemalloc

    tracemalloc.start()
    for _ in range(20):
        comparing.add({"y": y}, {"y": x})
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 1 << 20
    assert peak < 24 << 20  # a dozen temporaries of one batch; the stream is 20 MB on each side


def test_rows_on_another_axis_are_counted_there():
    states = np.random.default_rng(0).normal(size=(1, 32, 8)).astype(np.float32)
    comparison = Comparison(axes={"state": 1})
    comparison.add({"state": states, "y": states[0]}, {"state": states, "y": states[0]})
    found = comparison.differences()
    assert found["state"].rows == found["y"].rows == 32
    assert found["state"].varies
