"""Seeded inputs: always the same, in range, and of several lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from modelops.core.tensors import Signature, TensorSpec
from modelops.errors import ResourceExhausted
from modelops.graphs.batches import BatchAxis, collate, split
from modelops.graphs.seeded import corner_feeds, index_bounds, random_feed, random_feeds

TEXT = Signature(
    (
        TensorSpec("input_ids", "int64", ("batch", "sequence")),
        TensorSpec("attention_mask", "int64", ("batch", "sequence")),
        TensorSpec("position_ids", "int64", ("batch", "sequence")),
    ),
    (),
)


def one(dtype: str, *shape: int | str, name: str = "x") -> Signature:
    return Signature((TensorSpec(name, dtype, shape),), ())


def test_same_seed_gives_the_same_feed_whatever_else_the_model_takes() -> None:
    feeds = [random_feed(TEXT, 8, seed) for seed in (0, 0, 1)]
    assert all((feeds[0][name] == feeds[1][name]).all() for name in feeds[0])
    assert any((feeds[0][name] != feeds[2][name]).any() for name in feeds[0])
    alone = random_feed(Signature(TEXT.inputs[1:2], ()), 8, 0)
    assert (alone["attention_mask"] == feeds[0]["attention_mask"]).all()


def test_token_ids_stay_in_range_and_masks_have_several_lengths() -> None:
    feed = random_feed(TEXT, 64, bounds={"input_ids": 30_000})
    assert feed["input_ids"].min() >= 0 and 20_000 < feed["input_ids"].max() < 30_000
    assert feed["position_ids"][0].tolist() == list(range(16))
    lengths = feed["attention_mask"].sum(axis=1)
    assert lengths[0] == 16
    assert lengths.min() == 1
    assert len(set(lengths.tolist())) > 4
    assert (np.diff(feed["attention_mask"], axis=1) <= 0).all()


@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "float64", "int8", "uint8", "int32", "int64", "uint64", "bool"]
)
def test_every_dtype_varies(dtype: str) -> None:
    values = random_feed(one(dtype, "batch", 6), 16)["x"]
    assert values.dtype.name == dtype
    assert values.shape == (16, 6)
    assert len(np.unique(values.astype(np.float64))) > 1


def test_texts_and_numbers_without_axes_are_made_too() -> None:
    texts = random_feed(one("object", "batch", 1), 4)["x"]
    assert texts.shape == (4, 1)
    assert isinstance(texts[0, 0], str)
    assert random_feed(one("float32"), 4)["x"].shape == ()


def test_dimensions_get_sizes_that_fit_their_names_and_each_other() -> None:
    signature = Signature(
        (
            TensorSpec("ids", "int64", ("batch", "sequence")),
            TensorSpec("cache", "float32", ("batch", 2, "past", 4)),
            TensorSpec("mask", "int64", ("batch", "past + sequence")),
            TensorSpec("pixels", "float32", ("batch", 3, "height", "width")),
        ),
        (),
    )
    shapes = {name: array.shape for name, array in random_feed(signature, 3).items()}
    assert shapes["mask"] == (3, shapes["cache"][2] + shapes["ids"][1])
    assert shapes["pixels"] == (3, 3, 32, 32)
    assert random_feed(signature, 3, sizes={"sequence": 5})["mask"].shape == (3, shapes["cache"][2] + 5)


def test_inputs_beyond_all_measure_are_refused_before_they_are_made() -> None:
    for shape in (("batch", 10**12), ("batch", "n*1000000000000"), ("batch", 2**62, 2**62)):
        with pytest.raises(ResourceExhausted, match="elements"):
            random_feed(one("float32", *shape), 2)
    deep = "(" * 5000 + "n" + ")" * 5000 + "+1"
    assert random_feed(one("float32", "batch", deep), 2)["x"].shape == (2, 8)


def test_corners_are_one_sample_and_small_and_odd_sizes() -> None:
    shapes = [feed["input_ids"].shape for feed in corner_feeds(TEXT)]
    assert shapes == [(1, 16), (2, 1), (2, 7)]
    assert corner_feeds(one("float32", 4, 3)) == []
    images = [feed["x"].shape for feed in corner_feeds(one("float32", "n", 3, "height", "width"))]
    assert images == [(1, 3, 32, 32), (2, 3, 1, 1), (2, 3, 7, 7), (2, 3, 1, 7), (2, 3, 7, 1)]
    apart = Signature(tuple(TensorSpec(name, "int64", ("n", f"{name}_dim1")) for name in ("ids", "mask")), ())
    assert [(f["ids"].shape, f["mask"].shape) for f in corner_feeds(apart)][1:] == [((2, 1),) * 2, ((2, 7),) * 2]


def test_models_with_a_fixed_batch_get_several_feeds() -> None:
    feeds = random_feeds(one("float32", 5, 3), 32)
    assert [feed["x"].shape for feed in feeds] == [(5, 3)] * 7
    assert len(np.unique(np.concatenate([feed["x"] for feed in feeds])[:, 0])) == 35


def test_bounds_come_from_the_tables_that_ids_look_things_up_in(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    node = helper.make_node
    tables = {"words": (50, 4), "columns": (4, 9), "places": (7, 4)}
    nodes = [
        node("Cast", ["ids"], ["wide"], to=TensorProto.INT64),
        node("Unsqueeze", ["wide", "axes"], ["column"]),
        node("Gather", ["words", "column"], ["a"]),
        node("Gather", ["columns", "kinds"], ["b"], axis=1),
        node("QuantizeLinear", ["places", "scale"], ["q"]),
        node("Gather", ["places", "kinds"], ["c"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tables",
        [value(name, TensorProto.INT32, ["batch"]) for name in ("ids", "kinds", "free")],
        [value(name, TensorProto.FLOAT, None) for name in "abc"],
        [
            *(numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in tables.items()),
            numpy_helper.from_array(np.array([1]), "axes"),
            numpy_helper.from_array(np.float32(1), "scale"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "m.onnx")
    assert index_bounds(tmp_path / "m.onnx") == {"ids": 50, "kinds": 7}


@pytest.mark.parametrize(
    ("shapes", "inputs", "size"),
    [
        ({"x": ("batch", 3), "y": ("batch",)}, {"x", "y"}, None),
        ({"x": ("batch", 3), "t": (), "w": ("other", 2)}, {"x"}, None),
        ({"x": ("x_dim0", 3), "y": ("y_dim0", 3)}, {"x", "y"}, None),
        ({"x": ("n", 3), "y": ("y_dim0", 3)}, {"x", "y"}, None),
        ({"x": (4, 3), "y": (4,), "z": (2,)}, {"x", "y"}, 4),
        ({"t": ()}, set(), None),
    ],
)
def test_batch_axis_is_the_leading_dimension_that_inputs_share(
    shapes: dict[str, tuple[int | str, ...]], inputs: set[str], size: int | None
) -> None:
    signature = Signature(tuple(TensorSpec(name, "float32", shape) for name, shape in shapes.items()), ())
    axis = BatchAxis.of(signature)
    assert (axis.inputs, axis.size) == (inputs, size)


def test_split_undoes_collate() -> None:
    feed = random_feed(TEXT, 5)
    again = collate(split(feed, TEXT), TEXT)
    assert all((again[name] == feed[name]).all() for name in feed)
