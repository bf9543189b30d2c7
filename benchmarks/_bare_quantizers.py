"""Quantizers called as their own documentation says, each on files; for the columns beside ours.

    python benchmarks/_bare_quantizers.py onnxruntime_static SOURCE TARGET FEEDS.npz

Every function is run in a process of its own, with the Python of the environment that has the package. FEEDS holds the
calibration samples, one array by input, samples along the first axis.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def samples(feeds: str) -> Iterator[dict[str, Any]]:
    with np.load(feeds) as stored:
        arrays = {name: stored[name] for name in stored.files}
    for row in range(len(next(iter(arrays.values())))):
        yield {name: array[row : row + 1] for name, array in arrays.items()}


def onnxruntime_dynamic(source: str, target: str, feeds: str) -> None:
    del feeds
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)


def onnxruntime_static(source: str, target: str, feeds: str) -> None:
    _static(source, target, feeds)


def onnxruntime_static_u8(source: str, target: str, feeds: str) -> None:
    """The same with unsigned activations, per channel and with 7 bits: what an expert would ask for on this CPU."""
    from onnxruntime.quantization import QuantType

    _static(source, target, feeds, activation_type=QuantType.QUInt8, per_channel=True, reduce_range=True)


def _static(source: str, target: str, feeds: str, **options: Any) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._rest = samples(feeds)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._rest, None)

    with tempfile.TemporaryDirectory() as folder:
        prepared = str(Path(folder) / "prepared.onnx")
        try:
            quant_pre_process(source, prepared)
        except Exception as error:
            print(f"quant_pre_process failed, left out: {error}", file=sys.stderr)
            prepared = source
        quantize_static(prepared, target, Reader(), **options)


def nncf(source: str, target: str, feeds: str) -> None:
    import onnx
    from nncf import Dataset, ModelType, QuantizationPreset, quantize

    model = onnx.load(source)
    transformer = any(node.op_type == "Softmax" for node in model.graph.node)
    given = {"model_type": ModelType.TRANSFORMER} if transformer else {}
    dataset = Dataset(list(samples(feeds)))
    onnx.save(quantize(model, dataset, preset=QuantizationPreset.MIXED, **given), target)


def olive(source: str, target: str, feeds: str) -> None:
    """Olive's passes, with its own defaults: dynamic for transformers, static for others."""
    import shutil

    import onnx
    from olive.workflows import run

    script = Path(target).with_name("olive_data.py")
    script.write_text(_OLIVE_DATA.format(folder=str(Path(__file__).parent), feeds=feeds))
    transformer = any(node.op_type == "Softmax" for node in onnx.load(source, load_external_data=False).graph.node)
    data = {
        "name": "samples",
        "type": "DummyDataContainer",
        "user_script": str(script),
        "load_dataset_config": {"type": "modelops_samples"},
    }
    passes = (
        {"type": "OnnxDynamicQuantization"} if transformer else {"type": "OnnxStaticQuantization", "data_config": data}
    )
    with tempfile.TemporaryDirectory() as folder:
        run(
            {
                "input_model": {"type": "ONNXModel", "model_path": source},
                "passes": {"quantize": passes},
                "output_dir": folder,
                "cache_dir": str(Path(folder) / "cache"),
                "evaluate_input_model": False,
            }
        )
        shutil.copy(next(Path(folder).rglob("model.onnx")), target)


_OLIVE_DATA = """
import sys
sys.path.insert(0, {folder!r})
from _bare_quantizers import samples
from olive.data.registry import Registry

@Registry.register_dataset("modelops_samples")
def load(**_):
    return [(row, 0) for row in samples({feeds!r})]
"""


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
