"""Datasets: every form of data gives the same samples, and every way to be wrong is refused by name."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

from modelops.core.artifact import Artifact
from modelops.core.manifest import Manifest
from modelops.core.tensors import Signature, TensorSpec
from modelops.datasets import REGISTRY, Context, Dataset
from modelops.errors import EnvironmentMissing, InputRefused, ModelOpsError, StageFailed, UsageError
from modelops.stages._workbench import SampleBench, open_dataset

X = TensorSpec("x", "float32", ("batch", 3))
IDS = TensorSpec("ids", "int64", ("batch", "length"))
ONE = Signature((X,), ())
TWO = Signature((X, IDS), ())
VALUES = np.arange(12, dtype=np.float32).reshape(4, 3)


def bench(
    signature: Signature, data: Path | str, tmp_path: Path, samples: int | None = None, batch: int = 1, **options: Any
) -> SampleBench:
    graphs = {"model": {"file": "model.onnx", "signature": signature.to_dict()}}
    artifact = Artifact(tmp_path, Manifest(kind="model", files=(), graphs=graphs, created=""))
    path = Path(data)
    dataset = REGISTRY.load(open_dataset(path).name).parse(options) if options else None
    return SampleBench(artifact, tmp_path, path, dataset, samples, batch)


def save_npz(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez(path / "data.npz", **arrays)
    return path / "data.npz"


def save_folder(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    (path / "folder").mkdir(parents=True)
    for name, array in arrays.items():
        np.save(path / "folder" / f"{name}.npy", array)
    return path / "folder"


def save_jsonl(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    rows = zip(*(array.tolist() for array in arrays.values()), strict=True)
    names = ["label" if name == "labels" else name for name in arrays]
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    (path / "data.jsonl").write_text("\n".join(lines) + "\n\n")
    return path / "data.jsonl"


def save_function(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez(path / "hidden.npz", **arrays)
    (path / "helper.py").write_text("import numpy as np\ndef read(path):\n    return dict(np.load(path))\n")
    (path / "data.py").write_text(
        "from pathlib import Path\nimport helper\n"
        "def samples():\n"
        "    arrays = helper.read(Path(__file__).parent / 'hidden.npz')\n"
        "    labels = arrays.pop('labels', None)\n"
        "    for i in range(len(next(iter(arrays.values())))):\n"
        "        feed = {name: array[i] for name, array in arrays.items()}\n"
        "        yield feed if labels is None else (feed, int(labels[i]))\n"
    )
    return Path(f"{path / 'data.py'}:samples")


def save_test_data(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    for row in range(len(next(iter(arrays.values())))):
        folder = path / "sets" / f"test_data_set_{row}"
        folder.mkdir(parents=True)
        for number, (name, array) in enumerate(arrays.items()):
            tensor = numpy_helper.from_array(array[row : row + 1], name)
            (folder / f"input_{number}.pb").write_bytes(tensor.SerializeToString())
    return path / "sets"


SAVERS = {
    "npz": save_npz,
    "npy-folder": save_folder,
    "jsonl": save_jsonl,
    "python-function": save_function,
    "onnx-test-data": save_test_data,
}
Saver = Callable[[Path, dict[str, np.ndarray]], Path]


@pytest.mark.parametrize("name", SAVERS)
def test_every_form_gives_the_same_feeds(tmp_path: Path, name: str) -> None:
    data = SAVERS[name](tmp_path, {"x": VALUES})
    found = bench(ONE, data, tmp_path)
    assert found.dataset is not None
    assert found.dataset.name == name
    np.testing.assert_array_equal(np.concatenate([feed["x"] for feed in found.batches()]), VALUES)
    assert all(feed["x"].dtype == np.float32 and feed["x"].shape == (1, 3) for feed in found.batches())
    limited = bench(ONE, data, tmp_path, samples=3, batch=2)
    assert [feed["x"].shape for feed in limited.batches()] == [(2, 3), (1, 3)]


@pytest.mark.parametrize("name", [name for name in SAVERS if name != "onnx-test-data"])
def test_every_form_gives_its_labels(tmp_path: Path, name: str) -> None:
    data = SAVERS[name](tmp_path, {"x": VALUES, "labels": np.array([3, 1, 0, 2])})
    assert bench(ONE, data, tmp_path).labels() == [3, 1, 0, 2]
    assert bench(ONE, data, tmp_path, samples=2).labels() == [3, 1]


def test_without_labels_there_are_none(tmp_path: Path) -> None:
    assert bench(ONE, save_npz(tmp_path, {"x": VALUES}), tmp_path).labels() is None


NARROW = {"x": VALUES, "ids": np.ones((4, 5), np.int64)}
REFUSED: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "missing input": ({"x": VALUES}, "ids"),
    "unknown input": ({**NARROW, "idz": np.ones(4)}, "idz"),
    "wrong dtype": ({**NARROW, "ids": np.ones((4, 5))}, "ids.*float64.*int64"),
    "wrong shape": ({**NARROW, "x": np.ones((4, 2), np.float32)}, r"x.*\[2\].*\[3\]"),
    "wrong rank": ({**NARROW, "ids": np.ones(4, np.int64)}, "ids.*shape"),
    "not finite": ({**NARROW, "x": np.full((4, 3), np.nan, np.float32)}, "nan"),
    "infinite": ({**NARROW, "x": np.full((4, 3), np.inf)}, "inf"),
    "texts": ({**NARROW, "x": np.full((4, 3), "a")}, "x"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("name", [name for name in SAVERS if name != "onnx-test-data"])
def test_data_that_does_not_fit_is_refused_by_name(tmp_path: Path, name: str, case: str) -> None:
    arrays, reason = REFUSED[case]
    with pytest.raises(InputRefused, match=reason):
        list(bench(TWO, SAVERS[name](tmp_path, arrays), tmp_path).batches())


@pytest.mark.parametrize("save", [save_npz, save_folder])
@pytest.mark.parametrize(
    "arrays",
    [
        {**NARROW, "ids": np.ones((3, 5), np.int64)},
        {**NARROW, "labels": np.zeros(5)},
        {"x": VALUES[:0], "ids": np.ones((0, 5), np.int64)},
        {"x": np.float32(3), "ids": np.ones((4, 5), np.int64)},
    ],
    ids=["unequal lengths", "too many labels", "empty", "scalar"],
)
def test_lengths_that_differ_and_empty_data_are_refused(tmp_path: Path, save: Saver, arrays: dict) -> None:
    with pytest.raises(InputRefused):
        list(bench(TWO, save(tmp_path, arrays), tmp_path).batches())


def test_lossless_conversions_are_made_and_stated(tmp_path: Path) -> None:
    arrays = {"x": VALUES.astype(np.float64), "ids": np.arange(20, dtype=np.int32).reshape(4, 5)}
    found = bench(TWO, save_npz(tmp_path, arrays), tmp_path, batch=4)
    (feed,) = found.batches()
    assert feed["x"].dtype == np.float32
    assert feed["ids"].dtype == np.int64
    np.testing.assert_array_equal(feed["ids"], arrays["ids"])
    assert len(found.notes) == 2
    assert "float64" in found.notes[0]


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("int8", np.array([[300]])),
        ("uint8", np.array([[-1]])),
        ("int64", np.array([[2**63]], np.uint64)),
        ("float16", np.array([[1e6]])),
        ("float32", np.array([[2**24 + 1]])),
        ("int64", np.array([[1.0]])),
        ("bool", np.array([[1]])),
    ],
)
def test_conversions_that_lose_values_are_refused(tmp_path: Path, dtype: str, values: np.ndarray) -> None:
    signature = Signature((TensorSpec("x", dtype, ("batch", 1)),), ())
    with pytest.raises(InputRefused, match=dtype):
        list(bench(signature, save_npz(tmp_path, {"x": values}), tmp_path).batches())


def test_bfloat16_data_is_read(tmp_path: Path) -> None:
    import ml_dtypes

    signature = Signature((TensorSpec("x", "bfloat16", ("batch", 2)),), ())
    values = np.array([[1.5, 2]], ml_dtypes.bfloat16)
    (feed,) = bench(signature, save_npz(tmp_path, {"x": values}), tmp_path).batches()
    assert feed["x"].dtype == ml_dtypes.bfloat16
    assert (feed["x"] == values).all()


def test_npz_feeds_a_fixed_batch_in_chunks_of_that_size(tmp_path: Path) -> None:
    signature = Signature((TensorSpec("x", "float32", (3, 3)),), ())
    found = bench(signature, save_npz(tmp_path, {"x": VALUES}), tmp_path)
    chunks = list(found.chunks())
    assert [(chunk.feed["x"].shape, chunk.rows) for chunk in chunks] == [((3, 3), 3), ((3, 3), 1)]
    np.testing.assert_array_equal(chunks[1].feed["x"], VALUES[[3, 3, 3]])


def test_arrays_with_a_batch_axis_per_sample_are_split(tmp_path: Path) -> None:
    signature = Signature((TensorSpec("x", "float32", (1, 3)),), ())
    data = save_npz(tmp_path, {"x": VALUES[:, None], "labels": np.arange(4)})
    found = bench(signature, data, tmp_path)
    assert found.labels() == [0, 1, 2, 3]
    assert [feed["x"].shape for feed in found.batches()] == [(1, 3)] * 4


def test_inputs_without_a_batch_axis_are_shared_or_given_per_sample(tmp_path: Path) -> None:
    signature = Signature((X, TensorSpec("t", "float32", ())), ())
    shared = bench(signature, save_npz(tmp_path, {"x": VALUES, "t": np.float32(2)}), tmp_path, batch=4)
    assert [feed["x"].shape for feed in shared.batches()] == [(4, 3)]
    each = np.array([1, 1, 2, 2], np.float32)
    apart = bench(signature, save_npz(tmp_path, {"x": VALUES, "t": each}), tmp_path, batch=4)
    assert [(feed["x"].shape, float(feed["t"])) for feed in apart.batches()] == [((2, 3), 1.0), ((2, 3), 2.0)]


def test_lengths_are_filled_only_where_the_model_takes_a_mask(tmp_path: Path) -> None:
    lines = '{"ids": [1, 2, 3], "attention_mask": [1, 1, 1]}\n{"ids": [4], "attention_mask": [1]}\n'
    (tmp_path / "a.jsonl").write_text(lines)
    masked = Signature((IDS, TensorSpec("attention_mask", "int64", ("batch", "length"))), ())
    (feed,) = bench(masked, tmp_path / "a.jsonl", tmp_path, batch=2).batches()
    assert feed["ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert feed["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    (tmp_path / "b.jsonl").write_text('{"ids": [1, 2, 3]}\n{"ids": [4]}\n')
    plain = bench(Signature((IDS,), ()), tmp_path / "b.jsonl", tmp_path, batch=2)
    assert [feed["ids"].tolist() for feed in plain.batches()] == [[[1, 2, 3]], [[4]]]


def test_inputs_that_share_a_dimension_must_agree(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"ids": [1, 2, 3], "attention_mask": [1]}\n')
    signature = Signature((IDS, TensorSpec("attention_mask", "int64", ("batch", "length"))), ())
    with pytest.raises(InputRefused, match=r"a\.jsonl:1.*length.*1.*3"):
        list(bench(signature, tmp_path / "a.jsonl", tmp_path).batches())


# --- jsonl ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"x": [1, [2]]}', '{"x": {"a": 1}}', "\xff\xfe", "[" * 100_000, '{"x": NaN}', '{"x": null}']
)
def test_malformed_lines_are_refused_with_their_number(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"x": [1, 2, 3]}\n' + line.encode("latin-1") + b"\n")
    signature = Signature((X,), ())
    with pytest.raises(InputRefused, match=r"a\.jsonl:2"):
        list(bench(signature, tmp_path / "a.jsonl", tmp_path).batches())


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghij"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    made.save(str(folder / "tokenizer.json"))


def text_signature(length: int | str = "length") -> Signature:
    names = ("input_ids", "attention_mask", "token_type_ids")
    return Signature(tuple(TensorSpec(name, "int64", ("batch", length)) for name in names), ())


def test_texts_go_through_the_tokenizer_of_the_artifact(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    (tmp_path / "a.jsonl").write_text(
        '{"text": "a b c", "label": "good"}\n{"text": "a", "text_pair": "b z", "label": "bad"}\n'
    )
    found = bench(text_signature(), tmp_path / "a.jsonl", tmp_path, batch=8)
    (feed,) = found.batches()
    assert feed["input_ids"].tolist() == [[1, 4, 5, 6, 2, 0], [1, 4, 2, 5, 3, 2]]
    assert feed["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert feed["token_type_ids"].tolist() == [[0] * 6, [0, 0, 0, 1, 1, 1]]
    assert found.labels() == ["good", "bad"]


def test_texts_are_cut_and_filled_to_the_length_that_the_model_takes(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "a b c d e f"}\n{"text": "a"}\n')
    fixed = list(bench(text_signature(5), tmp_path / "a.jsonl", tmp_path).batches())
    assert [feed["input_ids"].tolist() for feed in fixed] == [[[1, 4, 5, 6, 2]], [[1, 4, 2, 0, 0]]]
    assert fixed[1]["attention_mask"].tolist() == [[1, 1, 1, 0, 0]]
    cut = list(bench(text_signature(), tmp_path / "a.jsonl", tmp_path, max_length=3).batches())
    assert [feed["input_ids"].tolist() for feed in cut] == [[[1, 4, 2]], [[1, 4, 2]]]
    with pytest.raises(UsageError, match="--max-length 9"):
        list(bench(text_signature(5), tmp_path / "a.jsonl", tmp_path, max_length=9).batches())


@pytest.mark.parametrize(
    ("line", "reason"),
    [('{"text": 3}', "not a string"), ('{"text": "a", "lable": 1}', "lable"), ('{"text": ["a"]}', "not a string")],
)
def test_malformed_texts_are_refused(tmp_path: Path, line: str, reason: str) -> None:
    tokenizer(tmp_path)
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(InputRefused, match=reason):
        list(bench(text_signature(), tmp_path / "a.jsonl", tmp_path).batches())


def test_texts_need_a_tokenizer_and_inputs_that_texts_can_give(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InputRefused, match=r"tokenizer\.json"):
        list(bench(text_signature(), tmp_path / "a.jsonl", tmp_path).batches())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputRefused, match="not a tokenizer"):
        list(bench(text_signature(), tmp_path / "a.jsonl", tmp_path).batches())
    tokenizer(tmp_path)
    signature = Signature((*text_signature().inputs, TensorSpec("pixels", "float32", ("batch", 3))), ())
    with pytest.raises(InputRefused, match="pixels"):
        list(bench(signature, tmp_path / "a.jsonl", tmp_path).batches())


# --- images --------------------------------------------------------------------------------------------------------


def image(path: Path, size: tuple[int, int] = (8, 8), colour: tuple[int, int, int] = (255, 0, 51)) -> Path:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def pictures(*dims: int | str, dtype: str = "float32") -> Signature:
    return Signature((TensorSpec("pixels", dtype, ("batch", *dims)),), ())


def test_class_folders_are_labels_and_take_turns(tmp_path: Path) -> None:
    for name in ("dog/1.png", "dog/2.png", "cat/1.png", "cat/2.jpg"):
        image(tmp_path / "data" / name)
    assert bench(pictures(3, 8, 8), tmp_path / "data", tmp_path).labels() == [0, 1, 0, 1]
    for name in ("7/1.png", "10/1.png"):
        image(tmp_path / "digits" / name)
    assert sorted(bench(pictures(3, 8, 8), tmp_path / "digits", tmp_path).labels() or []) == [7, 10]


def test_images_are_scaled_normalised_and_laid_out_as_declared(tmp_path: Path) -> None:
    image(tmp_path / "data" / "a.png")
    (feed,) = bench(pictures(3, 8, 8), tmp_path / "data", tmp_path).batches()
    np.testing.assert_allclose(feed["pixels"][0, :, 0, 0], [1, 0, 0.2], atol=1e-6)
    options = {"layout": "nhwc", "mean": [0.5, 0, 0], "std": [0.5, 1, 2]}
    (feed,) = bench(pictures(8, 8, 3), tmp_path / "data", tmp_path, **options).batches()
    np.testing.assert_allclose(feed["pixels"][0, 0, 0], [1, 0, 0.1], atol=1e-6)
    (feed,) = bench(pictures(8, 8, 3, dtype="uint8"), tmp_path / "data", tmp_path, layout="nhwc").batches()
    assert feed["pixels"].dtype == np.uint8
    assert feed["pixels"][0, 0, 0].tolist() == [255, 0, 51]
    (feed,) = bench(pictures(1, 8, 8), tmp_path / "data", tmp_path).batches()
    assert feed["pixels"].shape == (1, 1, 8, 8)


def test_images_are_resized_to_cover_and_cropped_from_the_middle(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "data" / "a.png"
    path.parent.mkdir()
    stripes = np.zeros((10, 30, 3), np.uint8)
    stripes[:, 10:20] = 255
    Image.fromarray(stripes).save(path)
    (feed,) = bench(pictures(3, 10, 10), path.parent, tmp_path).batches()
    assert (feed["pixels"] == 1).all()
    (feed,) = bench(pictures(3, "h", "w"), path.parent, tmp_path).batches()
    assert feed["pixels"].shape == (1, 3, 10, 30)
    (feed,) = bench(pictures(3, "h", "w"), path.parent, tmp_path, size=20, crop=16).batches()
    assert feed["pixels"].shape == (1, 3, 16, 16)
    with pytest.raises(InputRefused, match="less than the 16x16"):
        list(bench(pictures(3, "h", "w"), path.parent, tmp_path, size=8, crop=16).batches())


def resized(png: bytes, width: int, height: int) -> bytes:
    """The picture with a header that claims other dimensions."""
    chunk = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]


def test_broken_and_huge_images_are_refused_by_name(tmp_path: Path) -> None:
    whole = image(tmp_path / "ok" / "a.png", (64, 64)).read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "fake.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n")
    (tmp_path / "huge").mkdir()
    (tmp_path / "huge" / "huge.png").write_bytes(resized(whole, 11_000, 10_000))
    for name, reason in (("cut", "not a whole image"), ("fake", "not a whole image"), ("huge", "11000x10000")):
        with pytest.raises(InputRefused, match=rf"{name}\.png.*{reason}"):
            list(bench(pictures(3, 8, 8), tmp_path / name, tmp_path).batches())


def test_images_that_no_model_input_takes_are_refused(tmp_path: Path) -> None:
    image(tmp_path / "data" / "a.png")
    for signature, reason in ((ONE, "four axes"), (TWO, "four axes"), (pictures(8, 8, 3), "nchw")):
        with pytest.raises(InputRefused, match=reason):
            list(bench(signature, tmp_path / "data", tmp_path).batches())
    for options in ({"mean": [1.0, 2.0]}, {"std": [0.0]}):
        with pytest.raises(UsageError):
            list(bench(pictures(3, 8, 8), tmp_path / "data", tmp_path, **options).batches())
    image(tmp_path / "data" / "sub" / "b.png")
    with pytest.raises(InputRefused, match="beside class subfolders"):
        list(bench(pictures(3, 8, 8), tmp_path / "data", tmp_path).batches())


def test_images_without_pillow_name_the_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image(tmp_path / "data" / "a.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "PIL" else object())
    with pytest.raises(EnvironmentMissing) as caught:
        open_dataset(tmp_path / "data")
    assert "images" in caught.value.hint


# --- python functions ----------------------------------------------------------------------------------------------


def test_code_of_the_user_is_named_with_its_digest_and_leaves_nothing_behind(tmp_path: Path) -> None:
    data = save_function(tmp_path, {"x": VALUES})
    found = bench(ONE, data, tmp_path)
    list(found.batches())
    assert [Path(entry["path"]).name for entry in found.code_executed()] == ["data.py", "helper.py"]
    assert not (tmp_path / "__pycache__").exists()


@pytest.mark.parametrize(
    ("body", "error", "reason"),
    [
        ("raise ValueError('no such thing')", StageFailed, "line 2.*no such thing"),
        ("return None", StageFailed, "TypeError"),
        ("return [3]", InputRefused, "sample 0.*int"),
        ("return [{'x': object()}]", InputRefused, "x"),
        ("return [{'x': [[1], [2, 3]]}]", InputRefused, "no array"),
        ("return []", InputRefused, "no samples"),
        ("return [({'x': [1., 2, 3]}, 1), {'x': [1., 2, 3]}]", InputRefused, "sample 1 has no label"),
    ],
)
def test_functions_that_fail_or_give_something_else_are_refused(
    tmp_path: Path, body: str, error: type[ModelOpsError], reason: str
) -> None:
    (tmp_path / "data.py").write_text(f"def samples():\n    {body}\n")
    with pytest.raises(error, match=reason):
        bench(ONE, f"{tmp_path}/data.py:samples", tmp_path).labels()


def test_unknown_functions_and_files_are_usage_errors(tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text("def samples():\n    return []\n")
    with pytest.raises(UsageError, match="sample_") as caught:
        list(bench(ONE, f"{tmp_path}/data.py:sample_", tmp_path).samples())
    assert "samples" in caught.value.hint
    with pytest.raises(UsageError):
        bench(ONE, f"{tmp_path}/other.py:samples", tmp_path)


def test_feeds_with_a_batch_axis_are_split_with_their_labels(tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text(
        "import numpy as np\ndef samples():\n    yield {'x': np.ones((3, 3), np.float32)}, [1, 2, 3]\n"
    )
    found = bench(ONE, f"{tmp_path}/data.py:samples", tmp_path, batch=2)
    assert [feed["x"].shape for feed in found.batches()] == [(2, 3), (1, 3)]
    assert found.labels() == [1, 2, 3]


# --- ONNX test data ------------------------------------------------------------------------------------------------


def test_test_data_is_read_in_the_order_of_its_numbers_and_of_the_inputs(tmp_path: Path) -> None:
    for number in (10, 2):
        folder = tmp_path / "sets" / f"test_data_set_{number}"
        folder.mkdir(parents=True)
        for place, array in enumerate((np.full((1, 3), number, np.float32), np.ones((1, number), np.int64))):
            (folder / f"input_{place}.pb").write_bytes(numpy_helper.from_array(array).SerializeToString())
    feeds = list(bench(TWO, tmp_path / "sets", tmp_path).batches())
    assert [feed["x"][0, 0] for feed in feeds] == [2, 10]
    assert feeds[0]["ids"].shape == (1, 2)
    (one,) = bench(TWO, tmp_path / "sets" / "test_data_set_2", tmp_path).batches()
    assert one["x"][0, 0] == 2


def test_broken_test_data_is_refused_by_name(tmp_path: Path) -> None:
    good = numpy_helper.from_array(VALUES)
    short = numpy_helper.from_array(VALUES)
    short.dims[0] = 400_000_000_000
    external = numpy_helper.from_array(VALUES)
    external.data_location = 1
    negative = numpy_helper.from_array(VALUES)
    negative.dims[0] = -4
    whole = good.SerializeToString()
    contents = [whole[:-3], b"\xff\xff", b"", short.SerializeToString(), external.SerializeToString()]
    for number, content in enumerate([*contents, negative.SerializeToString()]):
        folder = tmp_path / str(number) / "test_data_set_0"
        folder.mkdir(parents=True)
        (folder / "input_0.pb").write_bytes(content)
        with pytest.raises(InputRefused, match=r"input_0\.pb"):
            list(bench(ONE, folder.parent, tmp_path).batches())


# --- random, and choosing ------------------------------------------------------------------------------------------


def test_random_samples_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    first, again = (list(bench(TWO, "random:5", tmp_path).batches()) for _ in range(2))
    assert len(first) == 5
    for one, other in zip(first, again, strict=True):
        assert all((one[name] == other[name]).all() for name in one)
    longer = list(bench(TWO, "random:40", tmp_path).batches())
    assert (longer[0]["x"] == first[0]["x"]).all()
    (other,) = bench(TWO, "random:1", tmp_path, seed=1).batches()
    assert (other["x"] != first[0]["x"]).any()
    assert len(list(bench(TWO, "random", tmp_path, samples=3).batches())) == 3
    assert len(list(bench(TWO, "random", tmp_path).batches())) == 128


def test_paths_that_nothing_or_two_forms_read_are_usage_errors(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(UsageError, match="no dataset reads"):
        open_dataset(tmp_path / "data.csv")
    with pytest.raises(UsageError, match="no such data") as caught:
        open_dataset(tmp_path / "dato.csv")
    assert "data.csv" in caught.value.hint
    save_folder(tmp_path, {"x": VALUES})
    image(tmp_path / "folder" / "a.png")
    with pytest.raises(UsageError, match="images or npy-folder"):
        open_dataset(tmp_path / "folder")


def test_a_chosen_dataset_that_does_not_fit_the_path_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save_npz(tmp_path, {"x": VALUES})
    context = Context(ONE, tmp_path)
    for name in REGISTRY.builtin():
        dataset: Dataset = REGISTRY.load(name).parse({})
        wrong = tmp_path / "empty" if name != "npy-folder" else tmp_path / "data.npz"
        with pytest.raises((InputRefused, UsageError)):
            list(dataset.samples(wrong, context, 1))


def test_no_data_is_a_usage_error_that_names_the_flag(tmp_path: Path) -> None:
    artifact = bench(ONE, save_npz(tmp_path, {"x": VALUES}), tmp_path).source
    empty = SampleBench(artifact, tmp_path)
    assert not empty.has_data
    with pytest.raises(UsageError) as caught:
        list(empty.batches())
    assert "--data" in caught.value.hint
    with pytest.raises(UsageError, match="needs --data"):
        SampleBench(artifact, tmp_path, None, REGISTRY.load("npz").parse({}))
