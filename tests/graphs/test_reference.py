from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from modelops.errors import InputRefused
from modelops.graphs import reference
from modelops.graphs.reference import Case


def _cases() -> list[Case]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 4)).astype(np.float32)
    wide = rng.normal(size=(32, 3)).astype(np.float32)
    exact = {"y": x.astype(np.float64) * 2}
    rows = Case("rows", {"x": x}, {"y": x * 2, "w/de": wide}, exact, {"w/de": np.array([0, 5, 9])})
    return [rows, Case("minimum", {"x": x[:1]}, {"y": x[:1] * 2, "w/de": wide[:1], "n": np.array(3)})]


def test_what_was_written_is_read_back(tmp_path):
    reference.write(tmp_path / "reference.npz", _cases())
    rows, corner = reference.read(tmp_path / "reference.npz")
    assert (rows.name, corner.name, rows.is_rows, corner.is_rows) == ("rows", "minimum", True, False)
    np.testing.assert_array_equal(rows.feed["x"], _cases()[0].feed["x"])
    np.testing.assert_array_equal(rows.outputs["w/de"], _cases()[0].outputs["w/de"])
    assert rows.outputs64 is not None and rows.outputs64["y"].dtype == np.float64
    assert corner.outputs64 is None and not corner.columns and corner.outputs["n"].shape == ()


def test_equal_cases_give_equal_bytes_that_numpy_reads(tmp_path):
    for name in ("a", "b"):
        reference.write(tmp_path / name, _cases())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert np.load(tmp_path / "a")["rows/outputs/y"].shape == (32, 4)


def test_take_cuts_a_models_outputs_as_the_source_was_cut():
    case = _cases()[0]
    taken = case.take({"y": np.ones((32, 4)), "w/de": np.arange(10.0)[None]})
    assert taken["y"].shape == (32, 4)
    np.testing.assert_array_equal(taken["w/de"], [[0.0, 5.0, 9.0]])


def test_wide_outputs_are_cut_and_narrow_ones_kept_whole():
    shapes = [{"logits": ((32, 16, 50257), 12), "pooled": ((32, 768), 12)}, {"logits": ((1, 1, 50257), 12)}]
    kept = reference.affordable(shapes, available=20 << 20)
    assert "pooled" not in kept[0] and "logits" not in kept[1]
    columns = kept[0]["logits"]
    assert len(columns) * 32 * 16 * 12 + 32 * 768 * 12 + 50257 * 12 <= 20 << 20
    assert columns.min() < 100 and columns.max() > 50157 and (np.diff(columns) > 0).all()
    assert reference.affordable(shapes, available=1 << 40) == [{}, {}]


def test_the_fewest_columns_stay_however_little_is_available():
    (kept,) = reference.affordable([{"y": ((1000, 1000), 4), "z": ((4, 8), 4)}], available=0)
    assert len(kept["y"]) == 16 and "z" not in kept


@pytest.mark.parametrize(
    ("name", "array"),
    [("rows/inputs/x.npy", [1.0]), ("rows/other/x.npy", [1.0]), ("x.npy", [1.0]), ("rows/columns/y.npy", [1])],
)
def test_a_file_that_is_no_reference_is_refused(tmp_path, name, array):
    buffer = io.BytesIO()
    np.save(buffer, np.array(array))
    with zipfile.ZipFile(tmp_path / "r.npz", "w") as archive:
        archive.writestr(name, buffer.getvalue())
    with pytest.raises(InputRefused):
        reference.read(tmp_path / "r.npz")
