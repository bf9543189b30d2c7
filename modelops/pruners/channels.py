"""Structured pruning of the graph itself: whole channels go, so that what is left is smaller and really faster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modelops.core.component import option
from modelops.core.report import Metric
from modelops.core.workbench import Done, Workbench
from modelops.errors import StageFailed, UsageError
from modelops.pruners import CUT, ZEROED, Pruner

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from modelops.pruners._groups import Anatomy

# Samples in the run that shows shapes; two, so that nothing is mistaken for the batch.
_ROWS = 2


class Channels(Pruner):
    """Remove whole channels of convolutions and matrix products, and whatever depends on them."""

    tools = ("onnx", "onnx-ir", "onnxruntime")

    channels: float | None = option(
        default=None,
        help="Share of the channels of every group to remove (default 50%).",
        min=0.01,
        max=0.95,
        unit="fraction",
    )
    macs: float | None = option(
        default=None,
        help="Share of the multiply-accumulates that may remain, instead.",
        min=0.01,
        max=0.99,
        unit="fraction",
    )
    importance: Literal["l1", "l2", "activation"] | None = option(
        default=None,
        help="How channels are ranked: by a norm of their weights, or by what they carry; the latter with data.",
    )
    recover: Literal["none", "bias", "least-squares"] | None = option(
        default=None, help="How what is left makes up for what went; least-squares where there is data, else none."
    )
    round_to: int = option(
        default=8, help="Leave multiples of this many channels, as fast kernels like them.", min=1, max=1024
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels is not None and self.macs is not None:
            raise UsageError("--channels and --macs can't both be the target", hint="give one of them")

    def prune(self, source: Path, target: Path, workbench: Workbench) -> Done:
        from modelops.graphs import files
        from modelops.graphs.batches import BatchAxis
        from modelops.pruners import _groups, _surgery
        from modelops.pruners._macs import MacCounter
        from modelops.pruners._network import opened
        from modelops.pruners._recover import recover

        self._refuse_missing_data(workbench)
        method = self._recovery(workbench)
        network = opened(source, workbench.signature, self._feed(source, workbench), workbench.scratch)
        anatomy = _groups.examine(network)
        if not any(group.size > 1 for group in anatomy.groups):
            raise _nothing(anatomy)
        gone = self._chosen(anatomy, workbench)
        counter = MacCounter(anatomy)
        before, after = counter.count(), counter.count(gone)
        removed, hidden = anatomy.removed_channels(gone), anatomy.hidden_channels()
        with _surgery.zeroed(anatomy, gone) as model:
            files.save(model, workbench.scratch / ZEROED)
        whole = network.model.clone() if method != "none" else None
        kept = anatomy.kept_positions(gone)
        _surgery.cut(anatomy, gone)
        recovered: dict[str, Any] = {}
        if whole is not None and method != "none":
            files.save(network.model, workbench.scratch / CUT)
            axis = BatchAxis.of(workbench.signature)
            found = recover(whole, network.model, kept, workbench.batches(), axis, workbench.scratch, method)
            recovered = {"method": method, "refitted": found.refitted, "left": found.left}
        files.save(network.model, target)
        return Done(
            notes=self._notes(anatomy),
            metrics=(
                Metric("macs_before", before),
                Metric("macs", after),
                Metric("channels_before", hidden),
                Metric("channels", hidden - removed),
            ),
            details={
                "asked": self._asked(after / before if before else 1.0, removed / hidden if hidden else 0.0),
                "groups": [_described(group, gone) for group in anatomy.groups],
                "recovered": recovered,
                "skipped": [item.to_dict() for item in anatomy.skipped],
            },
        )

    def _refuse_missing_data(self, workbench: Workbench) -> None:
        if self.importance == "activation" and not workbench.has_data:
            raise UsageError("--importance activation needs samples", hint="give some with --data")

    def _recovery(self, workbench: Workbench) -> Literal["none", "bias", "least-squares"]:
        if self.recover is None:
            return "least-squares" if workbench.has_data else "none"
        if self.recover != "none" and not workbench.has_data:
            raise UsageError(f"--recover {self.recover} needs samples", hint="give some with --data")
        return self.recover

    def _feed(self, source: Path, workbench: Workbench) -> dict[str, Any]:
        """Inputs for the one run that shows shapes."""
        from modelops.graphs.batches import BatchAxis
        from modelops.graphs.seeded import index_bounds, random_feed
        from modelops.pruners._flight import small

        if workbench.has_data:
            return next(iter(small(workbench.batches(), BatchAxis.of(workbench.signature))))
        return random_feed(workbench.signature, _ROWS, bounds=index_bounds(source))

    def _chosen(self, anatomy: Anatomy, workbench: Workbench) -> NDArray[np.bool_]:
        """Which classes of channels go."""
        from modelops.graphs.batches import BatchAxis
        from modelops.pruners import _allocation, _groups
        from modelops.pruners._activations import variances

        ranking = self.importance or ("activation" if workbench.has_data else "l2")
        if ranking == "activation":
            axis = BatchAxis.of(workbench.signature)
            found = variances(anatomy, workbench.batches(), axis, workbench.scratch)
            score = _groups.losses(anatomy, found)
        else:
            score = _groups.norms(anatomy, ranking)
        if self.macs is not None:
            return _allocation.by_macs(anatomy, score, self.macs, self.round_to)
        return _allocation.by_share(anatomy, score, self._share, self.round_to)

    @property
    def _share(self) -> float:
        return 0.5 if self.channels is None else self.channels

    def _asked(self, macs_left: float, channels_removed: float) -> dict[str, Any]:
        if self.macs is not None:
            return {"what": "multiply-accumulates", "removed": 1 - self.macs, "reached": 1 - macs_left}
        return {"what": "channels", "removed": self._share, "reached": channels_removed}

    def _notes(self, anatomy: Anatomy) -> tuple[str, ...]:
        from modelops.pruners._allocation import step_of

        notes = []
        inside = [item for item in anatomy.skipped if not item.interface]
        if inside:
            channels = sum(item.channels for item in inside)
            such = f"such as {inside[0].node}: {inside[0].reason}"
            notes.append(f"{channels} channels of {len(inside)} nodes were left alone, {such}")
        narrow = sum(group.size > 1 and group.size <= step_of(group, self.round_to) for group in anatomy.groups)
        if narrow:
            notes.append(f"{narrow} groups are too narrow for --round-to {self.round_to}")
        return tuple(notes)


def _described(group: Any, gone: NDArray[np.bool_]) -> dict[str, Any]:
    removed = int(gone[group.classes].sum())
    return {"nodes": list(group.makers), "kept": group.size - removed, "removed": removed, "width": group.width}


def _nothing(anatomy: Anatomy) -> StageFailed:
    if not anatomy.seeds:
        return StageFailed(
            "nothing to prune: no convolution or matrix product with constant weights",
            hint="prune models that have some, or zero single weights with --method magnitude",
        )
    first = anatomy.skipped[0] if anatomy.skipped and not anatomy.groups else None
    reason = f"{first.node}: {first.reason}" if first else "each channel is the last of its kind"
    return StageFailed(f"nothing to prune: no group of channels can be cut ({reason})", hint="see --method magnitude")
