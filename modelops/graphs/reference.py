"""reference.npz: sample inputs of a model, and what its source framework made of them.

``convert`` writes the file and every later stage carries it along, so that a model can be held against its original
without that framework. The file is a plain .npz without compression; the name of an array is ``case/part/tensor``::

    rows/inputs/input_ids      rows/outputs/logits      rows/outputs64/logits      rows/columns/logits

The feed of a case runs as it stands. The case ``rows`` holds 32 seeded rows or more; where the model's batch is fixed,
or where it has none, the rows come as the cases ``rows-00``, ``rows-01`` and so on. Every other case is one corner of
the shapes that the model accepts. ``columns`` says which indices of an output's last axis were kept, where it was too
wide to keep whole. ``outputs64`` is what the source gave when it ran in float64, where it could.

Equal cases give equal bytes.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.errors import InputRefused
from modelops.graphs.arrays import read_npz

if TYPE_CHECKING:
    from numpy.typing import NDArray

FILE_NAME = "reference.npz"
LIMIT_BYTES = 64 << 20
ROWS = "rows"

_PARTS = ("inputs", "outputs", "outputs64", "columns")
_FEWEST_COLUMNS = 16


@dataclass(frozen=True)
class Case:
    """One feed, and the source's outputs for it.

    ``columns`` holds, for an output that was cut, the indices of its last axis that ``outputs`` and ``outputs64`` keep.
    """

    name: str
    feed: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[Any]]
    outputs64: Mapping[str, NDArray[Any]] | None = None
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def is_rows(self) -> bool:
        """Whether the case holds sample rows, and is not a corner of the shapes."""
        return self.name == ROWS or self.name.startswith(f"{ROWS}-")

    def take(self, outputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The same part of a model's outputs as was kept of the source's."""
        return {
            name: value[..., self.columns[name]] if self._fits(name, value) else value
            for name, value in outputs.items()
        }

    def _fits(self, name: str, value: NDArray[Any]) -> bool:
        """Whether an output is as wide as what was cut; another one is told by its shape."""
        kept = self.columns.get(name)
        return kept is not None and bool(value.ndim) and (not kept.size or value.shape[-1] > int(kept.max()))


def write(path: Path, cases: Sequence[Case]) -> None:
    """Write the cases, in their order, into a new file whose bytes depend on nothing else."""
    import numpy as np

    with zipfile.ZipFile(path, "x", compression=zipfile.ZIP_STORED) as archive:
        for case in cases:
            for part, arrays in zip(_PARTS, (case.feed, case.outputs, case.outputs64, case.columns), strict=True):
                for name, array in (arrays or {}).items():
                    info = zipfile.ZipInfo(f"{case.name}/{part}/{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
                    info.create_system, info.external_attr = 3, 0o644 << 16
                    with archive.open(info, "w") as file:
                        np.lib.format.write_array(file, np.asarray(array, order="C"), (1, 0), allow_pickle=False)


def read(path: Path) -> list[Case]:
    """The cases of a file, in their order; InputRefused when it is not what ``write`` writes."""
    found: dict[str, dict[str, dict[str, NDArray[Any]]]] = {}
    for key, array in read_npz(path, limit_bytes=8 * LIMIT_BYTES).items():
        case, _, rest = key.partition("/")
        part, _, name = rest.partition("/")
        if part not in _PARTS or not name:
            raise InputRefused(f"{path}: {key!r} is not an array of a reference", hint="make the artifact anew")
        found.setdefault(case, {part: {} for part in _PARTS})[part][name] = array
    return [_case(path, name, parts) for name, parts in found.items()]


def _case(path: Path, name: str, parts: Mapping[str, dict[str, NDArray[Any]]]) -> Case:
    outputs, outputs64, columns = parts["outputs"], parts["outputs64"], parts["columns"]
    if not outputs:
        raise InputRefused(f"{path}: the case {name!r} has no outputs", hint="make the artifact anew")
    for other in (*outputs64, *columns):
        if other not in outputs:
            raise InputRefused(f"{path}: the case {name!r} has no output {other!r}", hint="make the artifact anew")
    for output, kept in columns.items():
        if kept.dtype.kind not in "iu" or kept.ndim != 1 or (kept.size and kept.min() < 0):
            raise InputRefused(
                f"{path}: {name}/columns/{output} is not a list of indices", hint="make the artifact anew"
            )
    return Case(name, parts["inputs"], outputs, outputs64 or None, columns)


def affordable(
    shapes: Iterable[Mapping[str, tuple[tuple[int, ...], int]]], *, available: int
) -> list[dict[str, NDArray[Any]]]:
    """Which columns to keep of each case's outputs, so that all that is kept fits into ``available`` bytes.

    ``shapes`` gives for each case the shape of every output and the bytes that one element takes. The widest outputs
    are cut first, to indices that are spread over the whole width and always the same; at least 16 columns stay.
    """
    cases = [dict(shapes_of_case) for shapes_of_case in shapes]
    sizes = {
        (number, name): _product(shape) * size
        for number, case in enumerate(cases)
        for name, (shape, size) in case.items()
    }
    bound = _level(sorted(sizes.values()), available)
    kept: list[dict[str, NDArray[Any]]] = []
    for number, case in enumerate(cases):
        columns = {}
        for name, (shape, _) in case.items():
            width = shape[-1] if shape else 1
            count = max(_FEWEST_COLUMNS, int(width * min(1.0, bound / max(1, sizes[number, name]))))
            if count < width:
                columns[name] = _spread(width, count)
        kept.append(columns)
    return kept


def _level(sizes: Sequence[int], available: int) -> float:
    """The greatest size at which Σ min(size, level) still fits; infinite when all of it fits."""
    left, count = float(available), len(sizes)
    for size in sizes:
        if size * count > left:
            return max(0.0, left / count)
        left -= size
        count -= 1
    return float("inf")


def _spread(width: int, count: int) -> NDArray[Any]:
    """``count`` indices below ``width``: one from each of as many equal stretches, at a place that varies."""
    import numpy as np

    edges = np.linspace(0, width, count + 1)
    offsets = np.random.RandomState(0).random_sample(count)  # its stream is the same in every version of numpy
    return np.unique((edges[:-1] + offsets * np.diff(edges)).astype(np.int64).clip(0, width - 1))


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for dim in shape:
        total *= dim
    return total
