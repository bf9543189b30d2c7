"""A small residual network for 8×8 grey images of digits: `modelops convert model.py:build`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("weights.safetensors")
DATA = Path(__file__).with_name("data")


class Block(nn.Module):
    """Two convolutions beside a shortcut; a stride of 2 halves the image."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, image: Tensor) -> Tensor:
        inner = torch.relu(self.first_norm(self.first(image)))
        return torch.relu(self.second_norm(self.second(inner)) + self.shortcut(image))


class DigitsNet(nn.Module):
    """Images (n, 1, 8, 8) with values from 0 to 1 → logits (n, 10)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
        self.head = nn.Linear(4 * width, 10)

    def forward(self, image: Tensor) -> Tensor:
        features = self.blocks(self.stem(image))
        return self.head(features.mean(dim=(2, 3)))


def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The trained network, and real images as the example of its input: what is made up later is made like them."""
    import numpy as np
    from safetensors.torch import load_file

    if not WEIGHTS.is_file():
        raise FileNotFoundError(f"{WEIGHTS} is not there yet: run train.py first")
    network = DigitsNet()
    network.load_state_dict(load_file(WEIGHTS), strict=True)
    images = np.load(DATA / "calibration.npz")["image"][:32]
    return network.eval(), (torch.from_numpy(images),)
