"""Hostile, broken and oversized files are refused, with the file and the part named; honest ones are let in."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import hostile_models as hostile
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from modelops.errors import InputRefused, ModelOpsError
from modelops.graphs.safety import GraphLimits, check


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def refused(path: Path, *words: str, limits: GraphLimits | None = None) -> InputRefused:
    with pytest.raises(InputRefused) as caught:
        check(path, limits=limits or GraphLimits())
    assert str(path) in caught.value.message
    assert caught.value.hint
    for word in words:
        assert word in caught.value.message
    return caught.value


def perceptron() -> onnx.ModelProto:
    """An honest model: two weights, one in raw_data and one in float_data."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="first"),
        helper.make_node("Add", ["h", "b"], ["y"], name="second"),
    ]
    weights = [hostile.constant("w", np.ones((4, 3)), np.float32), helper.make_tensor("b", 1, [3], [0.0, 1.0, 2.0])]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    return hostile.model(nodes, weights, inputs=[x])


def test_an_honest_model_is_let_in(tmp_path: Path) -> None:
    check(saved(perceptron(), tmp_path))


def test_every_model_of_the_onnx_package_is_let_in() -> None:
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data"
    paths = [path for path in folder.rglob("*.onnx") if "/light/" not in str(path)]
    assert len(paths) > 100
    for path in paths:
        check(path)


@pytest.mark.parametrize("name", hostile.BOMBS)
def test_bomb_is_refused_at_little_cost(name: str, tmp_path: Path) -> None:
    path = saved(hostile.BOMBS[name](), tmp_path)
    assert path.stat().st_size < 20_000
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    refused(path)
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_deeply_nested_message_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.onnx"
    path.write_bytes(hostile.deep_message())
    refused(path)


def test_bombs_below_the_limits_are_let_in(tmp_path: Path) -> None:
    for made in (
        hostile.add_to_x(*hostile.concat_doubling(10, "x")),
        hostile.doubling_functions(8),
        hostile.deep_subgraphs(6),
        hostile._counting_loop(100),
    ):
        check(saved(made, tmp_path))


def test_a_while_loop_with_the_largest_trip_count_is_let_in(tmp_path: Path) -> None:
    """What torch makes of ``while``: a trip count that means nothing, and a condition that is computed."""
    step = [helper.make_node("Add", ["a", "one"], ["b"]), helper.make_node("Less", ["b", "ten"], ["going2"])]
    node = hostile.loop(2**63 - 1, step, start="x")
    node.attribute[0].g.output[0].name = "going2"
    weights = [hostile.constant(name, value, np.float32) for name, value in (("one", 1), ("ten", 10))]
    check(saved(hostile.add_to_x([node], "v", hostile.constant("trips", 2**63 - 1), *weights), tmp_path))


def test_bomb_in_a_function_that_nothing_calls_is_refused(tmp_path: Path) -> None:
    size = helper.make_node("Constant", [], ["s"], value_ints=[2**40])
    made = perceptron()
    made.functions.append(hostile.function("f", size, helper.make_node("ConstantOfShape", ["s"], ["b"])))
    refused(saved(made, tmp_path), "ConstantOfShape")


def test_message_of_a_bomb_names_the_node_and_the_sizes(tmp_path: Path) -> None:
    made = hostile.BOMBS["expand to 10 GB"]()
    made.graph.node[0].name = "culprit"
    refused(saved(made, tmp_path), "culprit", "Expand", "9.31 GiB", "4 GiB")


@pytest.mark.parametrize("place", hostile.PLACES)
def test_external_data_outside_is_refused_wherever_a_tensor_is(place: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"s" * 16)
    folder = tmp_path / "model"
    folder.mkdir()
    for location in ("../secret", str(tmp_path / "secret")):
        tensor = hostile.external("t", location)
        if place == "sparse_indices":
            tensor = hostile.external("t", location, shape=(4,))
            tensor.data_type = TensorProto.INT32
        refused(saved(hostile.PLACES[place](tensor), folder), repr(location))


def test_every_trick_of_external_data_is_refused(tmp_path: Path) -> None:
    cases = hostile.locations(tmp_path)
    for name, keys in cases.items():
        model = hostile.in_initializer(hostile.external("t", **keys))  # type: ignore[arg-type]
        refused(saved(model, tmp_path / "model"), "'t'"), name


def test_plain_external_data_is_let_in(tmp_path: Path) -> None:
    hostile.locations(tmp_path)
    for keys in ({}, {"offset": 48}, {"offset": 8, "length": 16, "checksum": "none"}):
        for make in hostile.PLACES.values():
            if make is hostile.in_sparse_indices:
                continue
            check(saved(make(hostile.external("t", "plain", **keys)), tmp_path / "model"))
    (tmp_path / "model" / "sub" / "deeper").write_bytes(b"d" * 16)
    check(saved(hostile.in_initializer(hostile.external("t", "./sub/deeper")), tmp_path / "model"))


def test_overlapping_ranges_are_refused_and_tied_ones_let_in(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(64))
    first = hostile.external("t", "data", offset=0, length=16)
    for offset, allowed in ((0, True), (16, True), (8, False), (15, False)):
        second = hostile.external("u", "data", offset=offset, length=16)
        path = saved(hostile.add_to_x([], "t", first, second), tmp_path)
        if allowed:
            check(path)
        else:
            refused(path, "'data'", "overlaps")


def test_file_behind_a_symbolic_link_that_the_user_named_is_let_in(tmp_path: Path) -> None:
    saved(perceptron(), tmp_path)
    (tmp_path / "link.onnx").symlink_to(tmp_path / "model.onnx")
    check(tmp_path / "link.onnx")


def replace_name(model: onnx.ModelProto, name: str, other: bytes) -> None:
    model.ParseFromString(model.SerializeToString().replace(name.encode(), other))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.ClearField("graph"), "no graph"),
        (lambda m: m.ClearField("opset_import"), "no operator set"),
        (lambda m: m.ClearField("ir_version"), "IR version 0"),
        (lambda m: setattr(m, "ir_version", 999), "IR version 999"),
        (lambda m: setattr(m.opset_import[0], "version", 999), "operator set 999"),
        (lambda m: m.opset_import.add(domain="ai.onnx", version=7), "two versions"),
        (lambda m: setattr(m.graph.initializer[0], "raw_data", b"1234"), "'w'"),
        (lambda m: setattr(m.graph.initializer[0], "data_type", 99), "unknown"),
        (lambda m: setattr(m.graph.initializer[0], "name", ""), "no name"),
        (lambda m: m.graph.initializer[0].dims.__setitem__(0, -4), "impossible"),
        (lambda m: m.graph.initializer[0].dims.extend([2**62, 2**62]), "impossible"),
        (lambda m: m.graph.initializer[0].float_data.append(1.0), "twice"),
        (lambda m: m.graph.initializer[1].float_data.append(1.0), "4 elements"),
        (lambda m: m.graph.initializer[1].segment.SetInParent(), "segments"),
        (lambda m: m.graph.initializer[1].CopyFrom(m.graph.initializer[0]), "defined twice"),
        (lambda m: m.graph.node[0].input.__setitem__(0, "nothing"), "'nothing'"),
        (lambda m: m.graph.node[1].output.__setitem__(0, "h"), "defined twice"),
        (lambda m: m.graph.node.reverse(), "'h'"),
        (lambda m: m.graph.output[0].__setattr__("name", "nowhere"), "'nowhere'"),
        (lambda m: setattr(m.graph.node[0], "op_type", "EPContext"), "'first'"),
        (
            lambda m: m.functions.append(helper.make_function("", "Add", ["a"], ["b"], [], [])),
            "stands in for a standard operator",
        ),
        (lambda m: replace_name(m, "first", b"fi\xffst"), "not UTF-8"),
        (lambda m: m.functions.extend([hostile.function("f")] * 2), "defined twice"),
    ],
)
def test_malformed_model_is_refused(change, words: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    made = perceptron()
    change(made)
    refused(saved(made, tmp_path), words)


def test_limits_on_nodes_hold(tmp_path: Path) -> None:
    refused(saved(perceptron(), tmp_path), "more than 1 nodes", limits=GraphLimits(nodes=1))
    refused(
        saved(hostile.doubling_functions(6), tmp_path),
        "more than 20",
        limits=GraphLimits(freely_expanded=20, expansion=1),
    )
    refused(saved(perceptron(), tmp_path), "1 steps", limits=GraphLimits(visits=1))


def test_missing_empty_and_irregular_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**31)
    for name, words in (("none", "No such file"), ("empty", "empty"), (".", "regular"), ("large", "protobuf")):
        refused(tmp_path / name, words)
    assert "external data" in refused(tmp_path / "large").hint


def test_every_prefix_is_refused(tmp_path: Path) -> None:
    whole = perceptron().SerializeToString()
    check(saved(perceptron(), tmp_path))
    path = tmp_path / "cut.onnx"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        # The operator sets stand last; the second of them, which nothing uses here, may go missing unnoticed.
        if length != len(whole) - len(hostile.OPSETS[1].SerializeToString()) - 2:
            refused(path)


def test_prefixes_of_a_large_file_are_refused(tmp_path: Path) -> None:
    """Large files are scanned before they are parsed, which is another way to meet their end."""
    whole = large_model().SerializeToString()
    path = tmp_path / "cut.onnx"
    for length in (8_400_000, 10_000_000, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path)
    path.write_bytes(whole)
    check(path)


def large_model() -> onnx.ModelProto:
    weights = [hostile.constant(f"w{n}", np.full((512, 1024), n), np.float32) for n in range(6)]
    names = ["x", *(f"h{n}" for n in range(5)), "y"]
    nodes = [helper.make_node("Add", [names[n], f"w{n}"], [names[n + 1]]) for n in range(6)]
    return hostile.model(nodes, weights)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=8))
@pytest.mark.parametrize("source", ["perceptron", "functions", "sparse"])
def test_flipped_bytes_raise_nothing_but_our_errors(
    source: str, flips: list[tuple[float, int]], tmp_path: Path
) -> None:
    models = {
        "perceptron": perceptron,
        "functions": lambda: hostile.doubling_functions(3),
        "sparse": lambda: hostile.in_sparse_values(hostile.constant("t", [1, 2, 3, 4], np.float32)),
    }
    data = bytearray(models[source]().SerializeToString())
    for where, mask in flips:
        data[int(where * len(data))] ^= mask
    path = tmp_path / "flipped.onnx"
    path.write_bytes(data)
    try:
        check(path)
    except ModelOpsError as error:
        assert str(path) in error.message


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_garbage_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "garbage.onnx"
    path.write_bytes(data)
    refused(path)
