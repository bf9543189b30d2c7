"""Modules that convert is tried on: each is the smallest that shows one thing."""

from __future__ import annotations

import torch
from torch import nn


class Cnn(nn.Module):
    """A ``view`` on the batch, as many networks have it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(36, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(self.dropout(x.view(x.size(0), -1)))


class Nested(nn.Module):
    """A dict in; dicts, tuples and None out."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 5)

    def forward(self, batch):
        scores = self.head(batch["image"])
        best, index = scores.topk(2)
        boxes = batch["boxes"].gather(1, index)
        return {"logits": scores * batch["scale"][:, None], "top": (best, index, None), "boxes": {"kept": boxes}}


class Tagger(nn.Module):
    """Any number of tokens; the states have their batch on the second axis."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        states, (last, _) = self.lstm(self.embed(tokens))
        return {"logits": self.head(states), "last": last}


class Detector(nn.Module):
    """Scores and boxes at every place of an image, the best of them by top-k, and greedy non-maximum suppression."""

    def __init__(self, kept: int = 12, overlap: float = 0.3):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU())
        self.scores, self.corners = nn.Conv2d(8, 5, 1), nn.Conv2d(8, 4, 1)
        self.kept, self.overlap = kept, overlap

    def forward(self, image):
        features = self.backbone(image)
        best, classes = self.scores(features).flatten(2).softmax(1).max(1)
        scores, places = best.topk(self.kept, dim=1)
        boxes = self.corners(features).flatten(2).transpose(1, 2).sigmoid() * 32
        boxes = boxes.gather(1, places[..., None].expand(-1, -1, 4))
        low, high = torch.minimum(boxes[..., :2], boxes[..., 2:]), torch.maximum(boxes[..., :2], boxes[..., 2:])
        inner = torch.minimum(high[:, :, None], high[:, None]) - torch.maximum(low[:, :, None], low[:, None])
        inner = inner.clamp(min=0).prod(-1)
        area = (high - low).prod(-1)
        over = inner / (area[:, :, None] + area[:, None] - inner) > self.overlap
        keep = torch.ones_like(scores, dtype=torch.bool)
        for place in range(self.kept):
            later = torch.arange(self.kept) > place
            keep = keep & ~(over[:, place] & keep[:, place : place + 1] & later)
        return {
            "boxes": torch.cat([low, high], -1),
            "scores": scores * keep,
            "classes": classes.gather(1, places),
            "keep": keep,
        }


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.after(self.linear(x), x)

    def after(self, y, x):
        return y


class Dropped(Linear):
    def after(self, y, x):
        return nn.functional.dropout(y)


class Logarithm(Linear):
    def after(self, y, x):
        return torch.log(y)


class Mixed(Linear):
    def after(self, y, x):
        return y, 3.0


class Empty(Linear):
    def after(self, y, x):
        return {"y": None}


class Fixed(Linear):
    def after(self, y, x):
        return y.reshape(2, 2, 2).sum(1)


class Branching(Linear):
    def after(self, y, x):
        return y if x.sum() > 0 else y * 2


class Specialised(Linear):
    """Python looks at the batch, so that what is recorded holds for one batch only."""

    def after(self, y, x):
        return y.view(2, 4) if x.shape[0] == 2 else y * 1.5


class Raising(Linear):
    def after(self, y, x):
        raise RuntimeError("never trained")


class Deaf(Linear):
    """An output that hardly depends on the input."""

    def after(self, y, x):
        return torch.ones_like(y) + 1e-6 * y


class Padded(nn.Module):
    """Needs five steps at least, and gives one value for a whole batch beside one for each row."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 5)

    def forward(self, x):
        y = self.conv(x)
        return {"y": y, "mean": y.mean()}


class Unused(Linear):
    def forward(self, x, ignored):
        return self.linear(x)


def cnn():
    return Cnn(), torch.rand(1, 1, 8, 8)


def cnn_alone():
    return Cnn()


def nested():
    return Nested(), {"image": torch.randn(4, 6), "boxes": torch.randn(4, 5), "scale": torch.rand(4) + 1}


def tagger():
    return Tagger(), torch.randint(0, 30, (2, 9))


def tagger_alone():
    return Tagger()


def detector():
    return Detector(), {"image": torch.rand(2, 3, 32, 32)}


def padded():
    return Padded(), torch.randn(2, 3, 12)


def unused():
    return Unused(), (torch.randn(2, 4), torch.randn(2, 7))


def linear():
    return Linear(), torch.randn(2, 4)


def trained():
    """The function may train: gradients are on, and random numbers are seeded."""
    net, x = Linear(), torch.randn(8, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), x).backward()
        optimizer.step()
    return net, x


def fixed():
    return Fixed(), torch.randn(2, 4)


def named(name):
    return globals()[name](), torch.randn(2, 4)


def __getattr__(name):
    if name.startswith("only_"):
        return lambda: named(name.removeprefix("only_"))
    raise AttributeError(name)
