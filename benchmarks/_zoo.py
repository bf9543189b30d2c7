"""Small models of many kinds for the campaigns on validate: CNNs and transformers from both exporters, and their int8.

    python benchmarks/_zoo.py [--seconds N]

Makes what is missing below ``benchmarks/results/zoo`` and lists what is there: ``cnn-*``, ``transformer-*`` (random
weights, no download; each from torch's two exporters), ``qdq-*`` (onnxruntime's static int8 of some of them, the float
model beside it by the name behind ``qdq-``). Weights are drawn so that outputs depend on inputs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PLACE = Path(__file__).with_name("results") / "zoo"
TRANSFORMERS = (
    "bert", "distilbert", "roberta", "gpt2", "vit", "albert", "electra", "mpnet", "opt", "deit", "layoutlm",
    "camembert",
    "gpt_neo", "ernie", "xlm-roberta", "squeezebert", "dinov2", "beit", "poolformer", "mobilevit",
)  # fmt: skip
EXPORTERS = ("torchscript", "dynamo")


def models(*kinds: str) -> list[Path]:
    """The models that are there, of these kinds."""
    return sorted(path for kind in kinds for path in PLACE.glob(f"{kind}-*.onnx"))


def float_of(path: Path) -> Path:
    """The float model that a quantized one was made of."""
    return path.with_name(path.name.removeprefix("qdq-"))


def _cnns() -> dict[str, Any]:
    import torch
    from torch import nn

    def block(i: int, o: int, s: int = 1, act: Any = nn.ReLU, groups: int = 1) -> Any:
        return nn.Sequential(nn.Conv2d(i, o, 3, s, 1, groups=groups, bias=False), nn.BatchNorm2d(o), act())

    class Residual(nn.Module):
        def __init__(self, c: int, act: Any = nn.ReLU) -> None:
            super().__init__()
            self.a, self.b, self.act = block(c, c, act=act), nn.Conv2d(c, c, 3, padding=1), act()

        def forward(self, x: Any) -> Any:
            return self.act(x + self.b(self.a(x)))

    class Excite(nn.Module):
        def __init__(self, c: int) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(c, c // 2, 1), nn.Conv2d(c // 2, c, 1)

        def forward(self, x: Any) -> Any:
            return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))

    class Dense(nn.Module):
        def __init__(self, c: int) -> None:
            super().__init__()
            self.a, self.b = block(c, 8), block(c + 8, 8)

        def forward(self, x: Any) -> Any:
            x = torch.cat([x, self.a(x)], 1)
            return torch.cat([x, self.b(x)], 1)

    class Upwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = block(3, 8), block(8, 16, 2), block(16, 16, 2)
            self.up, self.d = nn.ConvTranspose2d(16, 16, 2, 2), block(32, 8)

        def forward(self, x: Any) -> Any:
            a = self.a(x)
            b = self.b(a)
            y = self.d(torch.cat([b, self.up(self.c(b))], 1))
            return nn.functional.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=False) + a

    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = block(3, 16, 2), block(16, 16, groups=4), nn.Linear(16, 10)

        def forward(self, x: Any) -> Any:
            y = self.b(self.a(x))
            n, _, h, w = y.shape
            y = y.view(n, 4, 4, h, w).transpose(1, 2).reshape(n, 16, h, w)
            return torch.log_softmax(self.head(y.mean((2, 3))), 1)

    class Next(nn.Module):
        def __init__(self, c: int) -> None:
            super().__init__()
            self.deep, self.norm = nn.Conv2d(c, c, 7, padding=3, groups=c), nn.LayerNorm(c)
            self.wide, self.narrow = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)

        def forward(self, x: Any) -> Any:
            y = self.norm(self.deep(x).permute(0, 2, 3, 1))
            return x + self.narrow(nn.functional.gelu(self.wide(y))).permute(0, 3, 1, 2)

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = block(3, 16, 2), nn.Conv2d(16, 32, 1), nn.Linear(16, 5)

        def forward(self, x: Any) -> Any:
            value, gate = self.b(self.a(x)).chunk(2, 1)
            return self.head((torch.tanh(value) - torch.sigmoid(gate) / 3).clamp(-0.5, 0.5).mean((2, 3)))

    def head(c: int) -> Any:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))

    return {
        "plain": nn.Sequential(block(3, 16), nn.MaxPool2d(2), block(16, 24), nn.AvgPool2d(2), head(24)),
        "residual": nn.Sequential(block(3, 16, 2), Residual(16), Residual(16), head(16)),
        "mobile": nn.Sequential(block(3, 16, 2, nn.Hardswish), block(16, 16, 1, nn.ReLU6, 16), Excite(16), head(16)),
        "dense": nn.Sequential(block(3, 8, 2), Dense(8), head(24)),
        "upwards": Upwards(),
        "shuffled": Shuffled(),
        "next": nn.Sequential(nn.Conv2d(3, 16, 4, 4), Next(16), Next(16), head(16)),
        "split": Split(),
        "elu": nn.Sequential(
            nn.Conv2d(3, 12, 3, dilation=2), nn.GroupNorm(3, 12), nn.ELU(0.7), head(12), nn.Softmax(1)
        ),
        "leaky": nn.Sequential(block(3, 12, 2, nn.LeakyReLU), Residual(12, nn.SiLU), nn.InstanceNorm2d(12), head(12)),
    }  # fmt: skip


def _export(module: Any, args: tuple[Any, ...], names: list[str], axes: Any, exporter: str, path: Path) -> None:
    import torch

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        if exporter == "torchscript":
            torch.onnx.export(
                module, args, str(path), input_names=names, dynamic_axes=axes, dynamo=False, opset_version=17
            )
        else:
            program = torch.onnx.export(
                module, args, input_names=names, dynamo=True, verbose=False, external_data=False,
                dynamic_shapes=tuple(
                    dict.fromkeys(axes.get(name, {}), torch.export.Dim.DYNAMIC) for name in names
                ),
            )  # fmt: skip
            program.save(str(path), external_data=False)


def _wrapped(tiny: Any) -> Any:
    """The model as a module that takes its inputs in their order and gives tensors."""
    import torch
    from _tiny_models import flat

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny.module

        def forward(self, *values: Any) -> Any:
            found = flat(self.inner(**dict(zip(tiny.inputs, values, strict=True))))
            return tuple(value for value in found if value.is_floating_point())

    return Wrapped().eval()


def _jobs() -> Iterator[tuple[str, Any]]:
    for exporter in EXPORTERS:
        for name in _cnns():
            yield f"cnn-{name}-{exporter}", ("cnn", name, exporter)
        for name in TRANSFORMERS if exporter == "torchscript" else TRANSFORMERS[:8]:  # dynamo takes a minute each
            yield f"transformer-{name}-{exporter}", ("transformer", name, exporter)


def _make(job: tuple[str, str, str], path: Path) -> None:
    import torch
    from _networks import _lively
    from _tiny_models import build

    kind, name, exporter = job
    torch.manual_seed(0)
    if kind == "cnn":
        module = _lively(_cnns()[name])
        _export(module, (torch.randn(2, 3, 32, 32),), ["x"], {"x": {0: "batch"}}, exporter, path)
        return
    tiny = build(name)
    args = tuple(tiny.inputs.values())
    if exporter == "torchscript":
        _export(_wrapped(tiny), args, list(tiny.inputs), tiny.dynamic, exporter, path)
        return
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        shapes = {n: dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for n, axes in tiny.dynamic.items()}
        try:
            program = torch.onnx.export(
                tiny.module.eval(), (), kwargs=tiny.inputs, dynamic_shapes=shapes, dynamo=True, verbose=False
            )
        except Exception:  # fixed sizes then
            program = torch.onnx.export(tiny.module.eval(), (), kwargs=tiny.inputs, dynamo=True, verbose=False)
        program.save(str(path), external_data=False)


def _quantize(path: Path, target: Path) -> None:
    """onnxruntime's own static int8 in QDQ form, calibrated on seeded inputs."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    from modelops.graphs import describe, seeded

    feeds = [
        seeded.random_feed(describe.signature(path), 4, seed, bounds=seeded.index_bounds(path)) for seed in range(4)
    ]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return feeds.pop() if feeds else None

    logging.disable(logging.WARNING)
    quantize_static(
        str(path), str(target), Reader(), quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8, per_channel="cnn" in path.name, reduce_range=True,
    )  # fmt: skip


def build_all(seconds: float) -> None:
    """Make what is missing, for that long; a model that an exporter can't make leaves an empty ``.failed`` file."""
    PLACE.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    for name, job in _jobs():
        _attempt(name, lambda path, job=job: _make(job, path), end)
        made = PLACE / f"{name}.onnx"
        if made.exists():
            _attempt(f"qdq-{name}", lambda target, path=made: _quantize(path, target), end)


def _attempt(name: str, make: Any, end: float) -> None:
    path, failed = PLACE / f"{name}.onnx", PLACE / f"{name}.failed"
    if path.exists() or failed.exists() or time.monotonic() > end:
        return
    started, fresh = time.monotonic(), PLACE / f".{name}.onnx"
    try:
        make(fresh)
        fresh.rename(path)
        print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
    except Exception as error:
        fresh.unlink(missing_ok=True)
        failed.write_text(f"{type(error).__name__}: {error}"[:2000])
        print(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:160]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800.0, help="time to spend")
    build_all(parser.parse_args().seconds)
    for kind in ("cnn", "transformer", "qdq"):
        print(f"{kind}: {len(models(kind))} models")


if __name__ == "__main__":
    main()
