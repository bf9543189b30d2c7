"""What quantized models are calibrated on and judged by: calibration.npz and evaluation.npz beside a model."""

from __future__ import annotations

import ast
import re
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
CALIBRATION = 128


def sentences(place: Path) -> None:
    """Sentences of docstrings as tokens and masks: 1,000 to judge by, and others, of other modules, to calibrate."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(ROOT / "examples" / "minilm" / "model" / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    pattern = re.compile(r"[A-Z][a-z]+ [^<>{}\[\]`*|\\=]{25,180}[a-z)]\.")
    found: dict[str, list[str]] = {"calibration": [], "evaluation": []}
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(library.rglob("*.py")):
        relative = file.relative_to(library)
        if "site-packages" in relative.parts or "test" in file.as_posix():
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [" ".join((ast.get_docstring(n) or "").split()) for n in ast.walk(tree) if isinstance(n, nodes)]
        part = "calibration" if sum(relative.parts[0].encode()) % 5 == 0 else "evaluation"
        found[part] += [sentence for text in texts for sentence in pattern.findall(text)]
    for part, count in (("calibration", CALIBRATION), ("evaluation", 1000)):
        others = set(found["calibration"]) if part == "evaluation" else set()
        texts = [text for text in dict.fromkeys(found[part]) if text not in others]
        picked = [texts[k] for k in np.linspace(0, len(texts) - 1, count).astype(int)]
        encoded = [tokenizer.encode(text).ids for text in picked]
        longest = max(map(len, encoded))
        ids, mask = np.zeros((count, longest), np.int64), np.zeros((count, longest), np.int64)
        for row, tokens in enumerate(encoded):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        write(place / f"{part}.npz", input_ids=ids, attention_mask=mask, token_type_ids=np.zeros_like(ids))


def digits(place: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from _resnet18 import data

    (images, _), (held, labels) = data()
    write(place / "calibration.npz", image=images[:CALIBRATION])
    write(place / "evaluation.npz", image=held, labels=labels)


def pictures(count: int) -> Callable[[Path], None]:
    """Seeded images with the spectrum of photographs: every octave is as strong as the next."""

    def made(place: Path) -> None:
        for part, rows, seed in (("calibration", CALIBRATION, 1), ("evaluation", count, 2)):
            rng = np.random.default_rng(seed)
            found = np.zeros((rows, 3, 224, 224), np.float32)
            for size in (1, 7, 14, 28, 56, 112, 224):
                found += rng.normal(size=(rows, 3, size, size)).repeat(224 // size, 2).repeat(224 // size, 3) / 2.6
            write(place / f"{part}.npz", pixel_values=found.astype(np.float32))

    return made


def tokens(place: Path) -> None:
    for part, rows, seed in (("calibration", CALIBRATION, 1), ("evaluation", 32, 2)):
        ids = np.random.default_rng(seed).integers(0, 50257, size=(rows, 128))
        write(place / f"{part}.npz", input_ids=ids, attention_mask=np.ones_like(ids))


def write(path: Path, **arrays: Any) -> None:
    """Write the arrays that the model takes; it may take fewer than there are."""
    from modelops.core.artifact import Artifact

    names = {spec.name for spec in Artifact.open(path.parent / "float").signature.inputs} | {"labels"}
    np.savez(path, **{name: array for name, array in arrays.items() if name in names})
