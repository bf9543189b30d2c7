"""The worker's side of a stage: run it on a draft, then describe what it wrote."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from modelops.core import cache
from modelops.core.artifact import Artifact, Draft
from modelops.errors import StageFailed


def run(stage: str, options: Mapping[str, Any], source: str, draft: str) -> dict[str, Any]:
    """Run a stage: ``source`` is the path of an artifact, or the text of a source; ``draft`` an empty directory.

    Gives the report, the description of the model that was written, and the files that user code read.
    """
    from modelops.graphs.wrap import admitted, describe
    from modelops.stages import REGISTRY

    component = REGISTRY.load(stage).parse(options)
    place = Draft(Path(draft))
    reads = _Reads(excluded=(Path(draft), cache.root(), Path(source)))
    reads.start()
    artifact = Artifact.open(Path(source)) if component.reads == "model" else None
    if artifact is not None and not component.takes_evidence():
        artifact = admitted(artifact)
    report = component.run(source if artifact is None else artifact, place)
    # Without code of the user's, every file that was read is named by an option, and digested with the key.
    own_code = bool(report.details.get("code_executed"))
    result: dict[str, Any] = {
        "report": report.to_dict(),
        "graphs": {},
        "model": {},
        "files_read": reads.stop() if own_code else {},
        "unseen_readers": sorted(_UNSEEN & set(sys.modules)) if own_code else [],
    }
    if component.writes == "model" and report.exit_code == 0:
        if artifact is not None:
            place.carry(artifact)
        if not (place.path / "model.onnx").is_file():
            raise StageFailed(f"{stage} passed but wrote no model.onnx", hint="report this with the command you ran")
        result["graphs"], result["model"] = describe(place.path)
    return result


def wrap(path: str, target: str) -> str:
    """Wrap a bare .onnx file into an artifact at ``target``; gives its id."""
    from modelops.graphs.wrap import wrap as wrap_file

    return wrap_file(Path(path), Path(target)).id


# Packages whose compiled code opens files by itself, where no audit event tells.
_UNSEEN = frozenset(
    {"cv2", "duckdb", "h5py", "netCDF4", "polars", "pyarrow", "rasterio", "tables", "torchcodec", "zarr"}
)


class _Reads:
    """Which files the user's own code opens: by Python's audit events, and by safetensors, which opens on its own.

    Files that belong to Python, to installed packages or to the system are passed over. What other compiled code opens
    (HDF5, Arrow, OpenCV) is not seen: its packages are named, and the step runs again each time.
    """

    def __init__(self, excluded: tuple[Path, ...]) -> None:
        roots = [*excluded, Path(sys.prefix), Path(sys.base_prefix), Path(__file__).parents[1], Path("/proc")]
        roots += [Path("/sys"), Path("/dev"), Path("/etc"), Path("/usr"), Path("/lib"), Path("/var")]
        self._roots = tuple(str(root.resolve()) + os.sep for root in roots)
        self._found: set[str] = set()
        self._active = False

    def start(self) -> None:
        self._active = True
        sys.addaudithook(self._hook)
        if find_spec("safetensors") is None:
            return
        import safetensors

        original = safetensors.safe_open

        def recorded(filename: Any, *args: Any, **kwargs: Any) -> Any:
            self._found.add(os.path.abspath(os.fsdecode(filename)))
            return original(filename, *args, **kwargs)

        # safetensors.torch takes the name from here when user code imports it, which it has not done yet.
        vars(safetensors)["safe_open"] = recorded

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self._active and event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
            mode, flags = args[1], args[2]
            writes = "w" in mode or "a" in mode or "x" in mode if isinstance(mode, str) else bool(flags & 3)
            if not writes:
                self._found.add(os.path.abspath(os.fsdecode(args[0])))

    def stop(self) -> dict[str, str]:
        """Digest by absolute path, of the files that still exist."""
        self._active = False
        temporary = str(Path(tempfile.gettempdir()).resolve()) + os.sep  # this worker's own
        found = {}
        for name in sorted(self._found):
            real = os.path.realpath(name)
            if real.startswith((*self._roots, temporary)) or name.endswith(".pyc") or not os.path.isfile(real):
                continue
            found[name] = cache.digest_of(Path(real))
        return found
