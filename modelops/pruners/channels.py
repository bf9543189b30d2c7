"""Structured pruning of the graph itself: whole channels go, so that what is left is smaller and really faster."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from modelops.core.component import option
from modelops.core.report import Metric
from modelops.core.workbench import Done, Workbench
from modelops.errors import StageFailed, UsageError
from modelops.pruners import CUT, ZEROED, Pruner

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from modelops.pruners._allocation import Allocation
    from modelops.pruners._costs import Cost
    from modelops.pruners._groups import Anatomy
    from modelops.pruners._importance import Importance
    from modelops.pruners._targets import Plan

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
    heads: float | None = option(
        default=None,
        help="Share of the attention heads to remove, where it differs from that of channels.",
        min=0.0,
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
    latency: float | None = option(
        default=None,
        help="Share of the time that may remain, as measured on this machine, instead.",
        min=0.02,
        max=0.99,
        unit="fraction",
    )
    allocation: Literal["uniform", "global", "latency"] | None = option(
        default=None,
        help="Where channels go: the same share everywhere, where least is lost, or where most time is gained for it; "
        "the last with --latency, else the first.",
    )
    importance: Literal["l1", "l2", "activation", "reconstruction", "bn-scale", "random"] | None = option(
        default=None,
        help="How channels are ranked: by norms of weights, by what they carry, by what can't be made up for, by batch "
        "normalization; at random as a control. By default activation with data, else l2.",
    )
    recover: Literal["none", "bias", "least-squares"] | None = option(
        default=None, help="How what is left makes up for what went; least-squares where there is data, else none."
    )
    round_to: int = option(
        default=8, help="Leave multiples of this many channels, as fast kernels like them.", min=1, max=1024
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        targets = {"--channels": self.channels, "--macs": self.macs, "--latency": self.latency}
        given = [flag for flag, value in targets.items() if value is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} can't both be the target", hint="give one of them")
        if self.heads is not None and self.latency is not None:
            raise UsageError("--heads goes with --channels or --macs, not with --latency", hint="leave one of them out")

    @property
    def targeted(self) -> bool:
        return any(target is not None for target in (self.channels, self.heads, self.macs, self.latency))

    def aimed(self, removed: float) -> Self:
        work = round(1 - removed, 6)
        return dataclasses.replace(self, channels=None, latency=None, macs=work, allocation=self._allocation)

    def prune(self, source: Path, target: Path, workbench: Workbench) -> Done:
        from modelops.graphs import files
        from modelops.graphs.batches import BatchAxis
        from modelops.pruners import _surgery
        from modelops.pruners._allocation import gone_of
        from modelops.pruners._costs import mac_cost
        from modelops.pruners._importance import scores
        from modelops.pruners._recover import recover

        ranking = self._ranking(workbench)
        method = self._recovery(workbench)
        anatomy = self._opened(source, workbench)
        if not any(group.size > 1 for group in anatomy.groups):
            raise _nothing(anatomy)
        score = scores(anatomy, ranking, workbench)
        plan = self._plan(anatomy, score, source, workbench)
        gone = gone_of(anatomy, score, plan.removed)
        cost = mac_cost(anatomy)
        before, after = cost.total([0] * len(plan.removed)), cost.total(plan.removed)
        removed, hidden = anatomy.removed_channels(gone), anatomy.hidden_channels()
        with _surgery.zeroed(anatomy, gone) as model:
            files.save(model, workbench.scratch / ZEROED)
        model = anatomy.network.model
        whole = model.clone() if method != "none" else None
        kept = anatomy.kept_positions(gone)
        _surgery.cut(anatomy, gone)
        recovered: dict[str, Any] = {}
        (workbench.scratch / CUT).unlink(missing_ok=True)
        if whole is not None and method != "none":
            files.save(model, workbench.scratch / CUT)
            axis = BatchAxis.of(workbench.signature)
            found = recover(whole, model, kept, workbench.batches(), axis, workbench.scratch, method)
            recovered = {"method": method, "refitted": found.refitted, "left": found.left}
        files.save(model, target)
        return Done(
            notes=self._notes(anatomy),
            metrics=(
                Metric("macs_before", round(before)),
                Metric("macs", round(after)),
                Metric("channels_before", hidden),
                Metric("channels", hidden - removed),
            ),
            details={
                "asked": plan.asked,
                "also_asked": list(plan.more),
                "importance": ranking,
                "allocation": self._allocation,
                "groups": _described(anatomy, score, plan, cost),
                "plan": plan.facts,
                "recovered": recovered,
                "skipped": [item.to_dict() for item in anatomy.skipped],
            },
        )

    @property
    def _allocation(self) -> Allocation:
        return self.allocation or ("latency" if self.latency is not None else "uniform")

    def _ranking(self, workbench: Workbench) -> Importance:
        from modelops.pruners._importance import WITH_DATA

        if self.importance in WITH_DATA and not workbench.has_data:
            raise UsageError(f"--importance {self.importance} needs samples", hint="give some with --data")
        return self.importance or ("activation" if workbench.has_data else "l2")

    def _recovery(self, workbench: Workbench) -> Literal["none", "bias", "least-squares"]:
        if self.recover is None:
            return "least-squares" if workbench.has_data else "none"
        if self.recover != "none" and not workbench.has_data:
            raise UsageError(f"--recover {self.recover} needs samples", hint="give some with --data")
        return self.recover

    def _opened(self, source: Path, workbench: Workbench) -> Anatomy:
        from modelops.pruners._groups import examine
        from modelops.pruners._network import opened

        return examine(opened(source, workbench.signature, self._feed(source, workbench), workbench.scratch))

    def _feed(self, source: Path, workbench: Workbench) -> dict[str, Any]:
        """Inputs for the one run that shows shapes."""
        from modelops.graphs.batches import BatchAxis
        from modelops.graphs.seeded import index_bounds, random_feed
        from modelops.pruners._flight import small

        if workbench.has_data:
            return next(iter(small(workbench.batches(), BatchAxis.of(workbench.signature))))
        return random_feed(workbench.signature, _ROWS, bounds=index_bounds(source))

    def _plan(self, anatomy: Anatomy, score: NDArray[np.float64], source: Path, workbench: Workbench) -> Plan:
        """How many channels every group loses."""
        from modelops.pruners._targets import Planner

        planner = Planner(
            anatomy,
            score,
            self._allocation,
            self.round_to,
            source,
            workbench,
            lambda: self._opened(source, workbench),
        )
        if self.macs is not None:
            return planner.by_macs(self.macs, self.heads)
        if self.latency is not None:
            return planner.by_latency(self.latency)
        return planner.by_channels(0.5 if self.channels is None else self.channels, self.heads)

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


def _described(anatomy: Anatomy, score: NDArray[np.float64], plan: Plan, cost: Cost) -> list[dict[str, Any]]:
    """By group: what was kept and removed, the share of its importance that went, and what the cut of it saves."""
    import numpy as np

    from modelops.pruners._network import following, label

    found = []
    nodes = {label(node): node for node in anatomy.network.nodes}
    for number, (group, removed) in enumerate(zip(anatomy.groups, plan.removed, strict=True)):
        values = np.sort(score[group.classes])
        row = {
            "nodes": list(group.makers),
            "fused_as": [following(nodes[maker]) for maker in group.makers if maker in nodes],
            "kind": "heads" if group.heads else "channels",
            "kept": group.size - removed,
            "removed": removed,
            "width": group.width,
            "importance_lost": float(values[:removed].sum() / max(values.sum(), 1e-300)),
            # What the group would still compute, if it alone had been left as it was.
            "macs_saved": round(-cost.gain(plan.removed, number, -removed)),
        }
        if plan.saved is not None:
            row["seconds_saved"] = plan.saved[number]
        found.append(row)
    return found


def _nothing(anatomy: Anatomy) -> StageFailed:
    if not anatomy.seeds:
        return StageFailed(
            "nothing to prune: no convolution or matrix product with constant weights",
            hint="prune models that have some, or zero single weights with --method magnitude",
        )
    first = anatomy.skipped[0] if anatomy.skipped and not anatomy.groups else None
    reason = f"{first.node}: {first.reason}" if first else "each channel is the last of its kind"
    return StageFailed(f"nothing to prune: no group of channels can be cut ({reason})", hint="see --method magnitude")
