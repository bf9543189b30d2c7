"""Train the network on scikit-learn's digits; write data/calibration.npz, data/held_out.npz and weights.safetensors.

The 1,797 images lie in the order in which they were collected, writer by writer. The first 1,197 train and the last
600 are held out, so that hardly a hand, and no image, is on both sides. Calibration images are training images: what
is held out is never looked at before it judges.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from model import WEIGHTS, DigitsNet
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

DATA = Path(__file__).with_name("data")
TRAINING, CALIBRATION = 1197, 256
BATCH = 64
LEAST_ACCURACY = 0.97


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args().epochs
    # One thread and one seed: the same weights, bit for bit, whenever this machine trains them again.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    started = time.perf_counter()

    digits = load_digits()
    images = torch.from_numpy((digits.images / 16).astype(np.float32))[:, None]
    labels = torch.from_numpy(digits.target)
    network = train(images[:TRAINING], labels[:TRAINING], epochs)
    accuracy = right(network, images[TRAINING:], labels[TRAINING:])
    seconds = time.perf_counter() - started
    print(f"trained for {seconds:.1f} s: {accuracy:.2%} of {len(images) - TRAINING} held-out images are right")
    if accuracy < LEAST_ACCURACY:
        raise SystemExit(f"that is less than {LEAST_ACCURACY:.0%}: nothing is written")

    DATA.mkdir(exist_ok=True)
    calibration = torch.randperm(TRAINING)[:CALIBRATION]
    np.savez(DATA / "calibration.npz", image=images[calibration].numpy(), labels=labels[calibration].numpy())
    np.savez(DATA / "held_out.npz", image=images[TRAINING:].numpy(), labels=labels[TRAINING:].numpy())
    save_file(network.state_dict(), WEIGHTS)


def train(images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    network = DigitsNet()
    batches = len(images) // BATCH
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=epochs * batches)
    network.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images))[: batches * BATCH].split(BATCH):
            logits = network(distorted(images[rows]))
            loss = functional.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def distorted(images: Tensor) -> Tensor:
    """The images turned, sheared, scaled and moved a little, each in its own way."""

    def random(spread: float) -> Tensor:
        return (torch.rand(len(images)) - 0.5) * spread

    turn, shear, scale = random(0.5), random(0.4), 1 + random(0.3)
    first = torch.stack([scale * turn.cos(), shear - scale * turn.sin(), random(0.4)], dim=1)
    second = torch.stack([scale * turn.sin(), scale * turn.cos(), random(0.4)], dim=1)
    grid = functional.affine_grid(torch.stack([first, second], dim=1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


@torch.inference_mode()
def right(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (network(images).argmax(dim=1) == labels).float().mean().item()


if __name__ == "__main__":
    main()
