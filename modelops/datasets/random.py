"""Seeded random samples by signature: written ``random``, or ``random:256`` for that many."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from modelops.core.component import option
from modelops.datasets import Context, Dataset, Sample
from modelops.errors import InputRefused, UsageError
from modelops.graphs.batches import split
from modelops.graphs.seeded import index_bounds, random_feed

_DEFAULT = 128
_AT_ONCE = 32


class Random(Dataset):
    """Seeded random samples by the model's signature: "random", or "random:256" for that many."""

    made_up = True

    seed: int = option(default=0, help="Seed of the random samples.", min=0)

    @classmethod
    def reads(cls, path: Path) -> bool:
        return re.fullmatch(r"random(:\d+)?", str(path)) is not None and not path.exists()

    def samples(self, path: Path, context: Context, limit: int | None = None) -> Iterator[Sample]:
        number = str(path).partition(":")[2]
        if not self.reads(path):
            raise UsageError(f"{path} is not random samples", hint='write "random", or "random:256" for that many')
        count = int(number) if number else (limit or _DEFAULT)
        count = count if limit is None else min(count, limit)
        model = context.directory / "model.onnx" if context.directory else None
        bounds = index_bounds(model) if model is not None and model.exists() else {}
        done = 0
        while done < count:
            # Always the same number at a time: the first samples do not depend on how many are asked for.
            feed = random_feed(context.signature, _AT_ONCE, seed=self.seed * 1_000_003 + done, bounds=bounds)
            made = split(feed, context.signature)
            if not made:
                raise InputRefused("the model takes batches of no samples", hint="convert it with a batch of 1 or more")
            for sample in made[: count - done]:
                yield Sample(sample, key=f"random sample {done}")
                done += 1
