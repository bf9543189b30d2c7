"""scikit-learn: fitted estimators from skops files, or from joblib files and pickles that are trusted."""

from __future__ import annotations

import importlib
import importlib.util
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelops.core.extras import pip_hint
from modelops.errors import EnvironmentMissing, InputRefused, StageFailed, missing_path
from modelops.sources import Loaded, Request, Source
from modelops.sources._programs import executed, loading, trusted
from modelops.sources._weights import listed

_LARGEST = 1 << 30
_SAFER = "save it with skops.io.dump(model, 'model.skops')"


class Sklearn(Source):
    """A fitted scikit-learn estimator: .skops, which is data, or .joblib, which is a program."""

    framework = "sklearn"
    requires = ("sklearn", "skl2onnx")
    tools = ("scikit-learn", "skl2onnx")
    takes = frozenset({"allow_code"})

    @classmethod
    def reads(cls, spec: str) -> bool:
        return spec.endswith((".skops", ".joblib"))

    def inputs(self, spec: str) -> Mapping[str, Path]:
        path = Path(spec)
        if not path.is_file():
            raise missing_path("file", path)
        return {"source": path}

    def open(self, spec: str, request: Request) -> Loaded:
        path = Path(spec)
        if not path.is_file():
            raise missing_path("file", path)
        if path.suffix == ".skops":
            estimator, ran = _from_skops(path, request)
        else:
            trusted(spec, request, what="a pickle", runs=lambda name: name.endswith(".pkl"), safer=_SAFER)
            joblib = importlib.import_module("joblib")

            with loading(path, "joblib"):
                estimator = joblib.load(path)
            ran = True
        if not hasattr(estimator, "predict") or not hasattr(estimator, "get_params"):
            raise StageFailed(f"{path} holds {type(estimator).__name__}, not a scikit-learn model", hint=_SAFER)
        return Loaded(module=estimator, code_executed=executed(path) if ran else ())


def _from_skops(path: Path, request: Request) -> tuple[Any, bool]:
    """The estimator, and whether types were loaded that skops does not trust by itself."""
    if importlib.util.find_spec("skops") is None:
        raise EnvironmentMissing(f"reading {path.name} needs skops, not installed here", hint=pip_hint(["skops"]))
    _refuse_bomb(path)
    io = importlib.import_module("skops.io")
    with loading(path, "skops"):
        untrusted = io.get_untrusted_types(file=path)
    if untrusted and not request.allow_code:
        raise InputRefused(
            f"{path} names types that could run code: {listed(untrusted)}",
            hint="leave them out of the model, or add --allow-code if you trust it",
        )
    with loading(path, "skops"):
        return io.load(path, trusted=untrusted), bool(untrusted)


def _refuse_bomb(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            total = sum(info.file_size for info in archive.infolist())
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise InputRefused(f"{path} is not a skops file: {error}", hint=_SAFER) from error
    if total > _LARGEST and total > 100 * path.stat().st_size:
        raise InputRefused(f"{path} would grow to {total} bytes: it looks like a zip bomb", hint="get the file again")
