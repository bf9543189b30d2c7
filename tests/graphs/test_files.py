"""Models are written whole, the same everywhere, without traces of the machine, and read back as they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hostile_models as build
import ml_dtypes
import numpy as np
import onnx
import onnx_ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from modelops.errors import InputRefused, ModelOpsError, ResourceExhausted, StageFailed
from modelops.graphs import files, lean, wire
from modelops.graphs.files import load, load_proto, rewrite, save

TRACE = 'File "/home/somebody/net.py", line 12, in forward\n    return self.layer(x)'


def write(model: onnx.ModelProto, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def layers(count: int = 4, width: int = 64) -> onnx.ModelProto:
    """Sums of the input and some weights of ``width`` squared floats; the last two are tied to one array."""
    weights = [build.constant(f"w{n}", np.arange(width**2).reshape(width, width) + n, np.float32) for n in range(count)]
    names = ["x", *(f"h{n}" for n in range(count - 1)), "y"]
    nodes = [helper.make_node("Add", [names[n], f"w{n}"], [names[n + 1]]) for n in range(count)]
    return build.model(nodes, weights, inputs=[helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, width])])


def every_type() -> onnx.ModelProto:
    """A weight of every element type, once in raw_data and once in the field of its type, in graph and attributes."""
    rng = np.random.default_rng(0)
    weights = []
    for code, (name, bits) in files.tensors.TYPES.items():
        if code > max(helper.get_all_tensor_dtypes()):
            continue
        if name == "object":
            weights.append(helper.make_tensor("text", code, [3], [b"a", b"", "ü".encode()]))
            continue
        values = rng.integers(0, 2, (3, 301)).astype(helper.tensor_dtype_to_np_dtype(code))
        weights.append(numpy_helper.from_array(values, f"raw_{name}"))
        if bits != 6:
            weights.append(helper.make_tensor(f"typed_{name}", code, [3, 301], values.ravel()))
    weights.append(helper.make_tensor("scalar", TensorProto.FLOAT, [], [1.5]))
    weights.append(helper.make_tensor("nothing", TensorProto.FLOAT, [0, 3], []))
    constants = [
        helper.make_node("Constant", [], [f"c_{weight.name}"], value=weight)
        for weight in weights
        if weight.name[0] == "r"
    ]
    out = helper.make_tensor_value_info("o", TensorProto.FLOAT, None)
    inside = build.constant("inside", np.ones(500), np.float32)
    branch = helper.make_graph([helper.make_node("Identity", ["inside"], ["o"])], "b", [], [out], [inside])
    choice = helper.make_node("If", ["raw_bool_one"], ["k"], then_branch=branch, else_branch=branch)
    weights.append(build.constant("raw_bool_one", True, np.bool_))
    constant = helper.make_node("Constant", [], ["f"], value=build.constant("", np.full(600, 7), np.float32))
    own = build.function("own", constant, helper.make_node("Add", ["a", "f"], ["b"]))
    nodes = [*constants, choice, build.own("own", "x", "z"), helper.make_node("Add", ["k", "x"], ["y"])]
    return build.model(nodes, weights, functions=[own])


def contents(path: Path) -> list[tuple[str, int, list[int], bytes]]:
    """Name, type, shape and bytes of every tensor, wherever it lies."""
    found = []
    with lean.opened(path) as model:
        for tensor in (place.tensor for place in files.tensors.tensors(model.proto)):
            text = tensor.data_type == TensorProto.STRING
            data = b"\0".join(tensor.string_data) if text else model.packed(tensor)
            found.append((tensor.name, tensor.data_type, list(tensor.dims), data))
    return found


def in_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


WAYS: dict[str, Callable[[Path, Path, int], object]] = {
    "rewrite": lambda source, target, above: rewrite(source, target, external_above=above),
    "load and save": lambda source, target, above: save(load(source), target, external_above=above),
}


@pytest.mark.parametrize("above", [10**9, 0], ids=["one file", "two files"])
@pytest.mark.parametrize("way", WAYS)
def test_every_element_type_survives(way: str, above: int, tmp_path: Path) -> None:
    source = write(every_type(), tmp_path / "source.onnx")
    before = contents(source)
    assert len(before) > 60
    for step in range(2):  # the second time, weights come from where the first put them
        target = tmp_path / f"{step}.onnx"
        WAYS[way](source, target, above)
        assert contents(target) == before
        assert (tmp_path / f"{step}.onnx.data").exists() == (above == 0)
        source = target
    loaded = {value.name: value.const_value for value in load(source).graph.initializers.values()}
    assert loaded["raw_bfloat16"].numpy().dtype == ml_dtypes.bfloat16
    assert list(loaded["text"].string_data()) == [b"a", b"", "ü".encode()]
    onnx.checker.check_model(str(source))


@pytest.mark.parametrize("above", [10**9, 0], ids=["one file", "two files"])
@pytest.mark.parametrize("way", WAYS)
def test_the_same_model_gives_the_same_bytes_anywhere(way: str, above: int, tmp_path: Path) -> None:
    made = []
    for number in range(2):
        folder = tmp_path / f"folder {number}"
        (folder / "out").mkdir(parents=True)
        WAYS[way](write(layers(), folder / "given.onnx"), folder / "out" / "model.onnx", above)
        made.append(in_files(folder / "out"))
    assert made[0] == made[1]
    assert set(made[0]) == ({"model.onnx"} if above else {"model.onnx", "model.onnx.data"})
    again = tmp_path / "again"
    again.mkdir()
    WAYS[way](tmp_path / "folder 0" / "out" / "model.onnx", again / "model.onnx", above)
    assert in_files(again) == made[0]


def test_weights_above_the_limit_go_to_a_real_file(tmp_path: Path) -> None:
    source = write(layers(), tmp_path / "source.onnx")
    target = tmp_path / "model.onnx"
    rewrite(source, target, external_above=4 * 64 * 64 * 4)
    assert not (tmp_path / "model.onnx.data").exists()
    rewrite(source, target, external_above=4 * 64 * 64 * 4 - 1)
    data = tmp_path / "model.onnx.data"
    assert data.stat().st_nlink == 1
    assert not data.is_symlink()
    assert target.stat().st_size < 2000
    onnx.checker.check_model(str(target))
    assert contents(target) == contents(source)
    save(load(target), target, external_above=10**9)  # in place, and back into one file
    assert not data.exists()
    assert contents(target) == contents(source)


def test_saving_twice_does_not_grow_the_data(tmp_path: Path) -> None:
    model = load(write(layers(), tmp_path / "source.onnx"))
    target = tmp_path / "model.onnx"
    for _ in range(2):
        save(model, target, external_above=0)
    assert (tmp_path / "model.onnx.data").stat().st_size == 4 * 64 * 64 * 4
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "model.onnx.data", "source.onnx"]


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    rewrite(write(layers(1), tmp_path / "source.onnx"), tmp_path / "model.onnx", external_above=0)
    tied = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    tied.graph.initializer.add().CopyFrom(tied.graph.initializer[0])
    tied.graph.initializer[1].name = "w1"
    write(tied, tmp_path / "model.onnx")
    rewrite(tmp_path / "model.onnx", tmp_path / "again.onnx", external_above=0)
    assert (tmp_path / "again.onnx.data").stat().st_size == 64 * 64 * 4


def test_a_large_model_is_loaded_without_its_weights(tmp_path: Path) -> None:
    source = write(layers(6, 1024), tmp_path / "source.onnx")
    model = load(source)
    weight = model.graph.initializers["w3"].const_value
    assert isinstance(weight, onnx_ir.ExternalTensor)
    assert weight.raw is None
    assert weight.numpy()[0, 5] == 8.0
    save(model, tmp_path / "model.onnx")
    assert contents(tmp_path / "model.onnx") == contents(source)
    assert len(load_proto(tmp_path / "model.onnx").graph.initializer[5].raw_data) == 1024 * 1024 * 4


def test_editing_a_weight_is_saved(tmp_path: Path) -> None:
    model = load(write(layers(), tmp_path / "source.onnx"))
    model.graph.initializers["w1"].const_value = onnx_ir.tensor(np.full((64, 64), 3, np.float32), name="w1")
    for above in (0, 10**9):
        save(model, tmp_path / "model.onnx", external_above=above)
        proto = load_proto(tmp_path / "model.onnx")
        assert (numpy_helper.to_array(proto.graph.initializer[1]) == 3).all()
        assert (numpy_helper.to_array(proto.graph.initializer[2])[0, :2] == [2, 3]).all()


def test_a_large_model_takes_little_memory(tmp_path: Path) -> None:
    """40 MB of weights, in one file and in two, take far less than that to rewrite."""
    write(layers(10, 1024), tmp_path / "source.onnx")
    code = """
import json, resource, sys
from pathlib import Path
import onnx, onnx_ir, google.protobuf
from modelops.graphs import describe, files, safety
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
folder, start = Path(sys.argv[1]), peak()
files.rewrite(folder / "source.onnx", folder / "a.onnx", external_above=0)
files.rewrite(folder / "a.onnx", folder / "b.onnx", external_above=0)
files.load(folder / "source.onnx"), describe.summary(folder / "source.onnx"), safety.check(folder / "b.onnx")
rewritten = peak() - start
files.save(files.load(folder / "b.onnx"), folder / "c.onnx", external_above=0)
print(json.dumps([rewritten, peak() - start]))
"""
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    rewritten, saved = json.loads(out.stdout)
    assert rewritten < 25
    assert saved < 35
    assert (tmp_path / "b.onnx.data").read_bytes() == (tmp_path / "c.onnx.data").read_bytes()


def test_traces_and_paths_are_removed_and_the_rest_kept(tmp_path: Path) -> None:
    model = layers()
    node = model.graph.node[0]
    node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="anything")
    node.metadata_props.add(key="note", value=TRACE)
    node.metadata_props.add(key="scope", value="/encoder/layer.0/Add")
    node.doc_string = TRACE
    model.graph.node[1].metadata_props.add(key="from", value="/tmp/build/net.pt")
    model.metadata_props.add(key="author", value="somebody")
    model.metadata_props.add(key="home", value=r"C:\Users\somebody")
    model.graph.doc_string = "about: /srv/models/a"
    model.graph.input[0].doc_string = "/root/x.py:3"
    model.graph.initializer[0].doc_string = "exported by ~/run"
    model.doc_string = "An adder, and/or a summer."
    source, target = write(model, tmp_path / "source.onnx"), tmp_path / "model.onnx"
    notes = rewrite(source, target)
    assert any("8 stack traces and paths" in note for note in notes)
    text = target.read_bytes()
    for word in (b"net.py", b"/tmp", b"Users", b"/srv", b"/root", b"~/run", b"stack_trace"):
        assert word in source.read_bytes()
        assert word not in text
    kept = onnx.load(target)
    assert kept.doc_string == model.doc_string
    assert [(entry.key, entry.value) for entry in kept.graph.node[0].metadata_props] == [
        ("scope", "/encoder/layer.0/Add")
    ]
    assert [entry.key for entry in kept.metadata_props] == ["author"]
    assert not any("traces" in note for note in rewrite(target, tmp_path / "again.onnx"))


def test_nodes_and_dimensions_get_names(tmp_path: Path) -> None:
    model = layers()
    model.graph.node[2].name = model.graph.node[3].name = "twin"
    model.graph.node[1].name = "Add_0"
    branch = helper.make_graph([helper.make_node("Relu", ["x"], ["o"], name="twin")], "b", [], [build.Y])
    branch.output[0].name = "o"
    model.graph.node.append(helper.make_node("If", ["c"], ["k"], then_branch=branch, else_branch=branch))
    model.graph.initializer.append(build.constant("c", True, np.bool_))
    rewrite(write(model, tmp_path / "source.onnx"), tmp_path / "model.onnx")
    named = onnx.load(tmp_path / "model.onnx")
    inner = [attribute.g.node[0].name for attribute in named.graph.node[4].attribute]
    names = [node.name for node in named.graph.node] + inner
    assert names[:5] == ["Add_1", "Add_0", "twin", "twin_0", "If_0"]
    assert len(set(names)) == 7
    assert named.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "x_dim0"
    assert named.graph.input[0].type.tensor_type.shape.dim[1].dim_value == 64


@pytest.mark.parametrize("rank", [1, 2])
def test_sparse_weights_become_dense(rank: int, tmp_path: Path) -> None:
    values, dims = build.constant("s", [1, 2, 3], np.float32), [2, 3]
    places = [[0, 1], [1, 0], [1, 2]] if rank == 2 else [1, 3, 5]
    sparse = helper.make_sparse_tensor(values, build.constant("i", places), dims)
    node = helper.make_node("Constant", [], ["k"], sparse_value=sparse)
    model = build.add_to_x([node, helper.make_node("Add", ["k", "s"], ["both"])], "both")
    model.graph.sparse_initializer.append(sparse)
    source = write(model, tmp_path / "source.onnx")
    assert "2 sparse weights made dense" in rewrite(source, tmp_path / "model.onnx")
    dense = onnx.load(tmp_path / "model.onnx")
    expected = [[0, 1, 0], [2, 0, 3]]
    assert numpy_helper.to_array(dense.graph.initializer[0]).tolist() == expected
    assert numpy_helper.to_array(dense.graph.node[0].attribute[0].t).tolist() == expected
    assert load(source).graph.initializers["s"].const_value.numpy().tolist() == expected
    assert len(load_proto(source).graph.sparse_initializer) == 1


def test_sparse_indices_outside_are_refused(tmp_path: Path) -> None:
    for places in ([0, 6], [-1, 0]):
        model = build.add_to_x([], "s")
        sparse = helper.make_sparse_tensor(build.constant("s", [1, 2], np.float32), build.constant("i", places), [2, 3])
        model.graph.sparse_initializer.append(sparse)
        with pytest.raises(InputRefused, match=r"source\.onnx: sparse initializer 's'"):
            rewrite(write(model, tmp_path / "source.onnx"), tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == ["source.onnx"]


def test_hostile_models_are_not_written_or_loaded(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"s" * 16)
    source = write(build.in_initializer(build.external("t", "../secret")), tmp_path / "in" / "model.onnx")
    for use in (load, load_proto, lambda path: rewrite(path, tmp_path / "out.onnx")):
        with pytest.raises(InputRefused, match=r"model\.onnx"):
            use(source)
    assert not (tmp_path / "out.onnx").exists()


def test_data_swapped_for_a_link_after_the_check_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_bytes(b"s" * 16)
    folder = tmp_path / "in"
    source = write(build.in_initializer(build.external("t", "data")), folder / "model.onnx")
    (folder / "data").write_bytes(bytes(16))
    real = files.check_parsed

    def checked_then_swapped(model: lean.Lean) -> object:
        found = real(model)
        (folder / "data").unlink()
        (folder / "data").symlink_to(tmp_path / "secret")
        return found

    monkeypatch.setattr(files, "check_parsed", checked_then_swapped)
    with pytest.raises(InputRefused, match="symbolic link"):
        rewrite(source, tmp_path / "out.onnx")
    assert sorted(os.listdir(tmp_path)) == ["in", "secret"]


def test_training_information_is_dropped_and_said(tmp_path: Path) -> None:
    model = layers()
    model.training_info.add().algorithm.name = "step"
    assert "training information dropped" in rewrite(write(model, tmp_path / "source.onnx"), tmp_path / "model.onnx")
    assert not onnx.load(tmp_path / "model.onnx").training_info


def test_what_the_intermediate_form_lacks_is_refused_clearly(tmp_path: Path) -> None:
    model = layers()
    of_maps = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(1, None))
    model.graph.output.append(helper.make_value_info("h0", helper.make_sequence_type_proto(of_maps)))
    source = write(model, tmp_path / "source.onnx")
    rewrite(source, tmp_path / "model.onnx")
    with pytest.raises(StageFailed, match="onnx_ir failed"):
        load(source)


def test_full_disk_leaves_nothing_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(layers(), tmp_path / "source.onnx")
    rewrite(source, tmp_path / "model.onnx", external_above=0)
    before = in_files(tmp_path)

    def full(self: lean.Span, out: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lean.Span, "copy", full)
    with pytest.raises(ResourceExhausted, match="No space left"):
        rewrite(tmp_path / "model.onnx", tmp_path / "model.onnx", external_above=0)
    assert in_files(tmp_path) == before


def test_a_message_beyond_two_gigabytes_is_not_attempted(tmp_path: Path) -> None:
    model = build.in_initializer(build.external("t", "data", shape=[2**29]))
    source = write(model, tmp_path / "source.onnx")
    with (tmp_path / "data").open("wb") as data:
        data.truncate(2**31)
    with pytest.raises(ResourceExhausted, match="one protobuf message"):
        load_proto(source)
    assert load(source).graph.initializers["t"].const_value.nbytes == 2**31


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=4))
def test_scanning_a_large_file_sees_what_parsing_sees(
    flips: list[tuple[float, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes, taken for a small file and for a large one, give the same model or are both refused."""
    data = bytearray(layers(2, 6).SerializeToString())
    for where, mask in flips:
        data[int(where * len(data))] ^= mask
    source = tmp_path / "source.onnx"
    source.write_bytes(data)
    results = []
    for small, large in ((2**30, 2**30), (0, 32)):
        monkeypatch.setattr(lean, "_SMALL_FILE", small)
        monkeypatch.setattr(wire, "LARGE", large)
        try:
            rewrite(source, tmp_path / "model.onnx")
            results.append((tmp_path / "model.onnx").read_bytes())
        except ModelOpsError as error:
            # Protobuf's groups, which nobody writes, are the one thing that only the parser skips.
            results.append(b"group" if "wire type" in error.message else b"refused")
    assert results[0] == results[1] or results[1] == b"group"
