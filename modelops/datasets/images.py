"""A folder of images; class subfolders, where there are any, are the labels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from modelops.core.component import option
from modelops.core.registry import require
from modelops.core.tensors import TensorSpec
from modelops.datasets import Context, Dataset, Sample
from modelops.errors import InputRefused, UsageError
from modelops.graphs.arrays import numpy_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"})
# Named, so that no file makes Pillow try the formats that start other programs (EPS).
_FORMATS: Final = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF")
_LARGEST_PIXELS: Final = 100_000_000
_MODES: Final = {1: "L", 3: "RGB", 4: "RGBA"}


class Images(Dataset):
    """A folder of images. Class subfolders are labels: their number where all are numbers, else their place by name."""

    requires = ("PIL",)
    tools = ("pillow",)

    size: int | None = option(
        default=None,
        help="Resize the shorter side to this; by default just enough to cover the model's input.",
        min=1,
        max=16384,
    )
    crop: int | None = option(
        default=None,
        help="Crop a square of this side from the middle; by default the model's input, where it is fixed.",
        min=1,
    )
    scale: float | None = option(
        default=None, help="Factor on pixel values of 0 to 255; by default 1/255, and 1 for models that take integers."
    )
    mean: tuple[float, ...] = option(
        default=(0.0,), help="Mean to subtract after scaling, one value or one per channel."
    )
    std: tuple[float, ...] = option(
        default=(1.0,), help="Standard deviation to divide by, one value or one per channel."
    )
    layout: Literal["nchw", "nhwc"] = option(default="nchw", help="Order of the axes that the model takes.")

    @classmethod
    def reads(cls, path: Path) -> bool:
        return path.is_dir() and any(_is_image(file) for pattern in ("*", "*/*") for file in path.glob(pattern))

    def samples(self, path: Path, context: Context, limit: int | None = None) -> Iterator[Sample]:
        require(type(self))
        spec = self._input(context)
        files = _files(path)
        if not files:
            raise InputRefused(f"{path} holds no images", hint=f"known: {', '.join(sorted(_SUFFIXES))}")
        for file, label in files[:limit]:
            yield Sample({spec.name: self._pixels(file, spec)}, label, str(file))

    def _input(self, context: Context) -> TensorSpec:
        """The input that takes the image."""
        inputs = context.signature.inputs
        if len(inputs) != 1 or len(inputs[0].shape) != 4:
            raise InputRefused(
                f"images fit a model with one input of four axes, not {', '.join(map(str, inputs)) or 'none'}",
                hint="give arrays instead (.npz)",
            )
        channels = self._dims(inputs[0])[0]
        if isinstance(channels, int) and channels not in _MODES:
            raise InputRefused(
                f"{inputs[0]} would be an image of {channels} channels in the layout {self.layout}",
                hint="choose the other --layout" if inputs[0].shape[-1] in _MODES else "give arrays instead (.npz)",
            )
        count = channels if isinstance(channels, int) else 3
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, count):
                raise UsageError(f"--{name} has {len(values)} values", hint=f"give 1, or {count}: one per channel")
        if 0.0 in self.std:
            raise UsageError("--std is 0", hint="it is what values are divided by")
        return inputs[0]

    def _dims(self, spec: TensorSpec) -> tuple[int | str, int | str, int | str]:
        """(channels, height, width) of the input."""
        one, two, three = spec.shape[1:]
        return (one, two, three) if self.layout == "nchw" else (three, one, two)

    def _pixels(self, file: Path, spec: TensorSpec) -> NDArray[Any]:
        """The image as the model takes it."""
        import numpy as np

        channels, height, width = self._dims(spec)
        image = _opened(file, _MODES[channels if isinstance(channels, int) else 3])
        values: NDArray[Any] = np.asarray(self._fitted(image, file, height, width), dtype=np.float32)
        values = values[:, :, None] if values.ndim == 2 else values
        dtype = numpy_dtype(spec.dtype)
        scale = self.scale if self.scale is not None else 1.0 if dtype.kind in "iu" else 1 / 255
        values = (values * np.float32(scale) - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        if self.layout == "nchw":
            values = values.transpose(2, 0, 1)
        if dtype.kind in "iu":
            if (values != np.rint(values)).any():
                raise UsageError(f"the model takes {spec.dtype}", hint="leave --scale, --mean and --std away")
            return values.astype(np.int64)  # fitted to the narrower type later, which refuses what it can't hold
        return values

    def _fitted(self, image: Any, file: Path, height: int | str, width: int | str) -> Any:
        """The image resized and cropped."""
        from PIL import Image

        box = (self.crop, self.crop) if self.crop else None
        if box is None and isinstance(height, int) and isinstance(width, int):
            box = (width, height)
        if self.size is not None:
            factor = self.size / min(image.size)
        elif box is not None:
            factor = max(box[0] / image.width, box[1] / image.height)
        else:
            factor = 1.0
        least = box if box is not None and self.size is None else (1, 1)  # rounding must not lose the last pixel
        target = tuple(max(low, math.floor(side * factor + 0.5)) for low, side in zip(least, image.size, strict=True))
        _refuse_huge(target, file)
        if target != image.size:
            image = image.resize(target, Image.Resampling.BILINEAR)
        if box is None:
            return image
        left, top = (image.width - box[0]) // 2, (image.height - box[1]) // 2
        if left < 0 or top < 0:
            raise InputRefused(
                f"{file} is {image.width}x{image.height} after resizing, less than the {box[0]}x{box[1]} to crop",
                hint="raise --size, or lower --crop",
            )
        return image.crop((left, top, left + box[0], top + box[1]))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in _SUFFIXES and not file.name.startswith(".") and file.is_file()


def _files(path: Path) -> list[tuple[Path, int | None]]:
    """(image, label); classes take turns, so that the first samples are of all of them."""
    plain = sorted(file for file in path.iterdir() if _is_image(file))
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    classes = {folder: sorted(file for file in folder.iterdir() if _is_image(file)) for folder in folders}
    classes = {folder: files for folder, files in classes.items() if files}
    if plain and classes:
        raise InputRefused(
            f"{path} holds images beside class subfolders ({plain[0].name}, {next(iter(classes)).name}/)",
            hint="put every image into a subfolder, or none",
        )
    if plain:
        return [(file, None) for file in plain]
    numbers = all(folder.name.isdecimal() for folder in classes)
    labelled = [
        [(file, int(folder.name) if numbers else place) for file in files]
        for place, (folder, files) in enumerate(classes.items())
    ]
    return [entry for turn in zip_longest(*labelled) for entry in turn if entry is not None]


def _opened(file: Path, mode: str) -> Any:
    """The whole image in that mode; InputRefused where it is broken, no image, or huge."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            with Image.open(file, formats=_FORMATS) as image:
                _refuse_huge(image.size, file)
                return ImageOps.exif_transpose(image).convert(mode)
    except InputRefused:
        raise
    except Image.DecompressionBombError as error:
        raise InputRefused(f"{file} is larger than any image should be: {error}", hint="remove it") from error
    except Exception as error:  # Pillow's readers fail in many ways on broken files
        raise InputRefused(f"{file} is not a whole image: {error}", hint="remove or replace it") from error


def _refuse_huge(size: tuple[int, ...], file: Path) -> None:
    if math.prod(size) > _LARGEST_PIXELS:
        raise InputRefused(
            f"{file}: {size[0]}x{size[1]} pixels are more than {_LARGEST_PIXELS}", hint="remove it, or make it smaller"
        )
