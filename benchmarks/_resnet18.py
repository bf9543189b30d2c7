"""A ResNet-18 for digits of 32 by 32 pixels (0.56 G multiplications): trained once, kept below results/quantize.

``modelops convert benchmarks/_resnet18.py:build OUT`` takes what ``python benchmarks/_resnet18.py`` trained.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

FOLDER = Path(__file__).with_name("results") / "quantize" / "resnet18"
WEIGHTS = FOLDER / "weights.safetensors"
# (pixels, epochs): most is learned on small images, at a quarter of the work.
COURSE = ((16, 12), (32, 3))
BATCH = 32
HELD_OUT = 540


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(inner)) + self.shortcut(x))


class ResNet18(nn.Module):
    """Images (n, 3, 32, 32) → logits (n, 10): the form for small images, with a stem of 3 by 3 and no pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
        self.blocks = nn.Sequential(*(Block(*width) for width in widths), Block(512, 512, 1))
        self.head = nn.Linear(512, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(image)).mean(dim=(2, 3)))


def data() -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """((images, labels) to train with, the same held out); images are three equal channels from 0 to 1."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    grey = torch.from_numpy(images[order].reshape(-1, 1, 8, 8).astype(np.float32) / 16)
    large = functional.interpolate(grey, size=(32, 32), mode="bilinear", align_corners=False)
    pixels, wanted = large.expand(-1, 3, -1, -1).contiguous().numpy(), labels[order]
    return (pixels[:-HELD_OUT], wanted[:-HELD_OUT]), (pixels[-HELD_OUT:], wanted[-HELD_OUT:])


def train() -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    (pixels, labels), (held, wanted) = data()
    x, y = torch.from_numpy(pixels), torch.from_numpy(labels)
    network = ResNet18()
    sizes = [size for size, epochs in COURSE for _ in range(epochs)]
    steps = len(sizes) * (len(x) // BATCH)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, steps)
    generator = torch.Generator().manual_seed(0)
    started = time.monotonic()
    for epoch, size in enumerate(sizes):
        network.train()
        for rows in torch.randperm(len(x), generator=generator)[: len(x) // BATCH * BATCH].split(BATCH):
            loss = functional.cross_entropy(network(_moved(x[rows], size, generator)), y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
    network.eval()
    with torch.no_grad():
        right = torch.cat([network(part).argmax(1) for part in torch.from_numpy(held).split(64)]).numpy() == wanted
    print(f"held out: {right.mean():.2%} of {len(right)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), WEIGHTS)


def _moved(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Each image turned by up to 10 degrees, scaled and shifted by a little, in this many pixels."""
    angle, scale, *shift = torch.rand(4, len(images), generator=generator) * 2 - 1
    angle, scale = angle * 0.17, 1 + 0.08 * scale
    cosine, sine = scale * torch.cos(angle), scale * torch.sin(angle)
    rows = torch.stack([cosine, -sine, 0.08 * shift[0], sine, cosine, 0.08 * shift[1]], dim=1)
    grid = functional.affine_grid(rows.view(-1, 2, 3), [len(images), 1, size, size], align_corners=False)
    return functional.grid_sample(images[:, :1], grid, align_corners=False).expand(-1, 3, -1, -1)


def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from safetensors.torch import load_file

    network = ResNet18()
    network.load_state_dict(load_file(WEIGHTS), strict=True)
    return network.eval(), (torch.from_numpy(data()[0][0][:8]),)


if __name__ == "__main__":
    train()
