"""Files that mean harm end a command with exit 4 or 6, soon, in bounded memory, and leave nothing."""

from __future__ import annotations

import io
import json
import resource
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import data_bombs
import hostile_models as hostile
import numpy as np
import pytest
from onnx import TensorProto, helper
from under_watch import READERS, Seen, forged, watch, words

from modelops.errors import InputRefused
from modelops.sources._checkpoint import checked_config
from modelops.sources._weights import read_state

#: Every kind of bomb and every reader at least once; all pairs are in benchmarks/bombs.py.
BARE = (
    ("constant of 10 GB", "bench, the other"),
    ("constant concat doubling", "simplify, onnxsim"),
    ("doubling functions", "simplify, onnxslim"),
    ("recursive functions", "validate, the other"),
    ("loop of 2^62 turns", "convert"),
    ("expand to 10 GB", "prune, channels"),
    ("deep message", "simplify, onnxscript"),
)
FORGED = (
    ("constant of 10 GB", "simplify, onnxruntime"),
    ("expand to 10 GB", "simplify, auto"),
    ("constant concat doubling", "quantize, weights"),
    ("concat doubling of an input", "quantize, static"),
    ("doubling functions", "validate"),
    ("loop of 2^62 turns over an input", "bench"),
    ("recursive functions", "prune, magnitude"),
    ("doubling functions", "quantize, dynamic"),
)


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory, write_perceptron: Callable[..., Path]) -> Path:
    model = write_perceptron(tmp_path_factory.mktemp("harmless") / "model.onnx")
    return forged(model.read_bytes(), model.with_name("made"))


def bomb(name: str) -> bytes:
    return hostile.deep_message() if name == "deep message" else hostile.BOMBS[name]().SerializeToString()


def refused(seen: Seen, *said: str) -> None:
    assert not seen.problems(), (seen.problems(), seen.output)
    for text in said:
        assert text in seen.output, seen.output


def test_every_reader_meets_a_bomb() -> None:
    assert {reader for _, reader in (*BARE, *FORGED)} == set(READERS)


@pytest.mark.parametrize(("name", "reader"), BARE)
def test_bomb_in_a_bare_file_is_refused(name: str, reader: str, harmless: Path, tmp_path: Path) -> None:
    model = tmp_path / "bomb.onnx"
    model.write_bytes(bomb(name))
    refused(watch(words(reader, model, harmless, tmp_path / "out"), tmp_path), "bomb.onnx")


@pytest.mark.parametrize(("name", "reader"), FORGED)
def test_bomb_in_an_artifact_is_refused(name: str, reader: str, harmless: Path, tmp_path: Path) -> None:
    model = forged(bomb(name), tmp_path / "bomb")
    refused(watch(words(reader, model, harmless, tmp_path / "out"), tmp_path), "bomb/model.onnx")


def test_memory_that_only_the_data_asks_for_ends_the_stage(harmless: Path, tmp_path: Path) -> None:
    (tmp_path / "bomb.onnx").write_bytes(data_bombs.allocation())
    arguments = words("convert", tmp_path / "bomb.onnx", harmless, tmp_path / "out")
    refused(watch([*arguments, "--memory-limit", "1g"], tmp_path), "memory")


def test_time_that_only_the_data_asks_for_ends_the_stage(harmless: Path, tmp_path: Path) -> None:
    (tmp_path / "bomb.onnx").write_bytes(data_bombs.endless())
    arguments = words("validate, the other", tmp_path / "bomb.onnx", tmp_path / "bomb.onnx", tmp_path / "out")
    refused(watch([*arguments, "--time-limit", "5"], tmp_path), "--time-limit")


def zip_of_zeros(path: Path, member: str, head: bytes, mebibytes: int) -> None:
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(member, "w") as file,
    ):
        file.write(head)
        for _ in range(mebibytes):
            file.write(bytes(1 << 20))


def npy_header(shape: tuple[int, ...]) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return out.getvalue()


def huge_png(side: int) -> bytes:
    """A few hundred bytes that say they are an image of side × side pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def data_bomb(name: str, folder: Path) -> Path:
    """Data that is far more than it looks."""
    if name == "grows.npz":
        zip_of_zeros(folder / name, "x.npy", npy_header((9 << 20, 8)), 9 * 32)
        return folder / name
    place, content = {
        "claims": ("claims/x.npy", npy_header((1 << 37, 8)) + bytes(64)),
        "images": ("images/huge.png", huge_png(60_000)),
        "deep.jsonl": ("deep.jsonl", b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"),
        "wide.jsonl": ("wide.jsonl", b'{"x": [' + b"0," * 36_000_000 + b"0]}\n"),
    }[name]
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).write_bytes(content)
    return folder / name


def image_model() -> bytes:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])
    return hostile.model([helper.make_node("Relu", ["x"], ["y"])], inputs=[x]).SerializeToString()


@pytest.mark.parametrize(
    ("name", "verb", "options"),
    [
        ("grows.npz", "quantize", ["--method", "static"]),
        ("claims", "validate", ["--against", "@harmless"]),
        ("images", "bench", []),
        ("deep.jsonl", "prune", ["--method", "magnitude"]),
        ("wide.jsonl", "validate", ["--against", "@harmless"]),
    ],
)
def test_bomb_in_data_is_refused(name: str, verb: str, options: list[str], harmless: Path, tmp_path: Path) -> None:
    data = data_bomb(name, tmp_path)
    model = harmless
    if name == "images":
        pytest.importorskip("PIL")
        model = tmp_path / "image.onnx"
        model.write_bytes(image_model())
    given = [str(harmless) if word == "@harmless" else word for word in options]
    out = str(tmp_path / "out")
    refused(watch([verb, str(model), out, *given, "--data", str(data)], tmp_path), name)


@pytest.mark.parametrize("content", ["deep", "long", "sparse"])
def test_bomb_in_a_manifest_is_refused(content: str, harmless: Path, tmp_path: Path) -> None:
    model = forged((harmless / "model.onnx").read_bytes(), tmp_path / "made")
    place = model / "manifest.json"
    if content == "deep":
        place.write_bytes(b'{"schema": ' + b"[" * 200_000)
    elif content == "long":
        place.write_bytes(b'{"schema": [' + b"[]," * 5_000_000 + b"0]}")
    else:
        with place.open("wb") as file:
            file.truncate(1 << 40)
    refused(watch(["simplify", str(model), str(tmp_path / "out")], tmp_path), "manifest.json")


def test_bomb_in_a_recipe_is_refused(tmp_path: Path) -> None:
    for name, content in (("deep", b"x = " + b"[" * 100_000), ("keys", b"a." * 100_000 + b"b = 1\n")):
        recipe = tmp_path / f"{name}.toml"
        recipe.write_bytes(content)
        refused(watch(["run", str(recipe), "--out", str(tmp_path / "out")], tmp_path), recipe.name)


def weight_bomb(name: str, folder: Path) -> Path:
    """Weights that claim, or grow into, far more than they are."""
    claims = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    deep = b'{"w": ' + b"[" * 200_000
    heads = {"claims.safetensors": (len(claims), claims), "deep.safetensors": (len(deep), deep)}
    if name == "grows.pt":
        zip_of_zeros(folder / name, "archive/data/0", b"", 200)
    else:
        length, head = heads.get(name, (1 << 40, b"{}"))
        (folder / name).write_bytes(struct.pack("<Q", length) + head)
    return folder / name


@pytest.mark.parametrize("name", ["claims.safetensors", "deep.safetensors", "header.safetensors", "grows.pt"])
def test_bomb_in_weights_is_refused_unread(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = weight_bomb(name, tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputRefused, match=name):
        read_state(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_bomb_in_a_hugging_face_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    weight_bomb("deep.safetensors", tmp_path).rename(tmp_path / "model.safetensors")
    with pytest.raises(InputRefused, match=r"model\.safetensors"):
        checked_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b'{"a": ' + b"[" * 200_000)
    with pytest.raises(InputRefused, match=r"config\.json"):
        checked_config(tmp_path)
