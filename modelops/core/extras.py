"""Which extra of the distribution brings which package, for hints that name the pip command."""

from __future__ import annotations

from collections.abc import Iterable

DISTRIBUTION = "modelops-toolkit"

_EXTRAS = {
    "torch": "torch",
    "transformers": "huggingface",
    "tokenizers": "huggingface",
    "safetensors": "huggingface",
    "PIL": "images",
    "sklearn": "sklearn",
    "skl2onnx": "sklearn",
    "skops": "sklearn",
    "openvino": "openvino",
    "matplotlib": "plots",
}


def pip_hint(packages: Iterable[str]) -> str:
    """The command that installs these import names, from a checkout of modelops where an extra brings them."""
    extras = sorted({_EXTRAS[package] for package in packages if package in _EXTRAS})
    others = [package for package in packages if package not in _EXTRAS]
    parts = []
    if extras:
        parts.append(f"'.[{','.join(extras)}]'")
    parts.extend(others)
    where = " (in a checkout of modelops)" if extras else ""
    return f"pip install {' '.join(parts)}{where}"
