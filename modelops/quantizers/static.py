"""Int8 weights and activations, with ranges found on samples: the usual choice for convolutional networks.

The file stays in standard operators (QuantizeLinear, DequantizeLinear); a runtime fuses them into integer kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from modelops.core.component import option
from modelops.core.workbench import Done, Workbench
from modelops.errors import UsageError, tool
from modelops.quantizers._budget import Grounds, Left, copied
from modelops.quantizers._histograms import Range, Rule
from modelops.quantizers._improvements import Improved
from modelops.quantizers._int8 import reduces
from modelops.quantizers._memory import Memory
from modelops.quantizers._options import Integer
from modelops.quantizers._plan import OPS, PRODUCTS, Facts, Plan, plan
from modelops.quantizers._rounding import Scheme
from modelops.quantizers._scope import (
    WEIGHTY,
    all_left_out,
    chosen_ops,
    described_nodes,
    excluded_nodes,
    nothing_to_quantize,
    refuse_quantized,
)
from modelops.quantizers._targets import Target, known, resolve

if TYPE_CHECKING:
    import onnx


class Static(Integer):
    """8-bit weights and activations, with ranges from calibration data."""

    tools = ("onnx", "onnx-ir", "onnxruntime", "onnxscript")

    ranges: Rule = option(
        default="minmax",
        help="How the range of an activation is found: minmax clips nothing, auto takes the best for each.",
    )
    percentile: float = option(
        default=99.99, help="Share of values in range on each side, with --ranges percentile or auto.", min=50, max=100
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.percentile != type(self).percentile and self.ranges not in ("percentile", "auto"):
            raise UsageError("--percentile needs --ranges percentile or auto", hint="add it, or leave --percentile out")

    def quantize(self, source: Path, target: Path, workbench: Workbench) -> Done:
        from modelops.quantizers._budget import within

        refuse_quantized(source)
        if not workbench.has_data:
            raise UsageError(
                "--method static needs --data, to find the ranges of activations",
                hint="give a folder or file of samples, or use --method dynamic",
            )

        def make(left: Left) -> tuple[Done, Grounds | None]:
            return self._made(source, target, workbench, left)

        return within(make, source, target, least_sqnr=self.least_sqnr, explain=self.explain, seconds=self.search_time)

    def _made(self, source: Path, target: Path, workbench: Workbench, left: Left) -> tuple[Done, Grounds | None]:
        """Quantize once, but for these nodes of the prepared graph."""
        from modelops.quantizers import _qdq

        ops = chosen_ops(self.op_types, OPS, "static")
        place, model, excluded, fusions, note = self._opened(source, workbench.scratch)
        excluded |= left.floats | left.moving
        first = plan(model, ops, excluded, set())
        if not first.weighted and (left_out := plan(model, ops, set(), set()).weighted):
            raise nothing_to_quantize(all_left_out(len(left_out)))
        if not first.weighted:
            count = len(model.graph.node)
            raise nothing_to_quantize(f"no Conv, Gemm or MatMul with float32 weights among {count} nodes")
        memory = Memory(model, workbench.batches, workbench.scratch)
        final, found, special = self._calibrated(model, first, ops, excluded, memory)
        weighted = [node for node in model.graph.node if node.op_type in WEIGHTY]
        floats = described_nodes(n for n in weighted if n.name not in left.moving | set(final.names))
        target_kernels = resolve(self.target)
        reduced = reduces(self.reduce_range, target_kernels)
        scheme = Scheme(self.per_channel, reduced, self.ranges, self.percentile)
        model, final, better = self._improved(
            place, model, final, found, scheme, memory, target_kernels, special.changed
        )
        found = found | better.ranges
        grounds = None
        if self.explain or self.least_sqnr:
            movable = _movable(final) if not (target_kernels.options or target_kernels.signed) else frozenset[str]()
            grounds = Grounds(copied(model), tuple(final.names), found, scheme, memory, movable, target_kernels.exact)
        written = _qdq.inserted(
            model, final, found, per_channel=self.per_channel, reduced=reduced, target=target_kernels
        )
        dropped, tables, cheaper = self._finished(
            written, final, left.moving, excluded if "Gather" in ops else None, target, reduced=reduced
        )
        kernels = _qdq.kernels(target)
        weights = "int8, 7 bits" if reduced else "int8"
        done = Done(
            notes=(
                *note,
                *([better.note] if better.note else []),
                *cheaper,
                *_notes(final, first, special, kernels["unfused"]),
            ),
            details={
                "quantized": {**described_nodes(final.nodes), "dynamic": len(left.moving), "tables": len(tables)},
                "left_float": floats,
                "nodes": sorted([*final.names, *left.moving, *tables]),
                "weights": weights,
                "target": {**target_kernels.to_dict(), "weights": weights},
                "fusions": fusions,
                "special_tensors": sorted(special.left),
                "clipped_tensors": sorted(special.bounded),
                **kernels,
                "pairs_dropped": dropped,
                **({"improvements": better.table} if better.table else {}),
            },
        )
        return done, grounds

    def _calibrated(
        self, model: onnx.ModelProto, first: Plan, ops: frozenset[str], excluded: set[str], memory: Memory
    ) -> tuple[Plan, dict[str, Range], _Special]:
        """(plan without the nodes around special tensors, ranges that it needs, special tensors)."""
        from modelops.quantizers._calibration import special_tensors
        from modelops.quantizers._sentinels import clipped, touched

        facts = Facts(model)
        names = first.tensors(facts)
        ordinary, bounded = clipped(memory, names)
        seen = ordinary.extents(names)
        special = special_tensors(model, seen)
        final = plan(model, ops, excluded, special)
        if not final.weighted:
            raise nothing_to_quantize("every node with weights touches a tensor that holds mask values or NaN")
        wanted = {name: seen[name] for name in final.tensors(facts)}
        found = ordinary.ranges(wanted, self.ranges, self.percentile)
        return final, found, _Special(special, bounded, touched(memory, ordinary, names))

    def _improved(
        self,
        place: Path,
        model: onnx.ModelProto,
        final: Plan,
        found: Mapping[str, Range],
        scheme: Scheme,
        memory: Memory,
        kernels: Target,
        alone: set[str],
    ) -> tuple[onnx.ModelProto, Plan, Improved]:
        """(the model made easier to quantize, the plan in it, what was done); no node that reads ``alone`` is."""
        import onnx

        from modelops.quantizers._improvements import Improve, improved
        from modelops.quantizers._shifts import correct

        wanted = Improve(self.migrate, self.outliers, self.compensate, self.correct_bias)
        if kernels.options or not wanted.anything:
            # Errors are simulated with asymmetric ranges, as CPUs have them.
            return model, final, Improved(place, [], {})
        eligible = [node for node in final.weighted if not alone & set(node.input)]
        if final.attention:
            better = improved(place, [node.name for node in eligible], scheme, wanted, memory)
            model = onnx.load(str(better.model))
            names = set(final.names)
            return model, replace(final, nodes=tuple(n for n in model.graph.node if n.name in names)), better
        table = correct(model, eligible, found, scheme, memory) if self.correct_bias else []
        return model, final, Improved(place, table, {})

    def _finished(
        self,
        written: onnx.ModelProto,
        final: Plan,
        moving: frozenset[str],
        excluded: set[str] | None,
        target: Path,
        *,
        reduced: bool,
    ) -> tuple[int, list[str], list[str]]:
        """Write the graph after our own passes; (pairs dropped, tables quantized, remarks).

        None leaves all tables float.
        """
        from modelops.graphs import files
        from modelops.quantizers import _qdq
        from modelops.quantizers._attention import rewritten
        from modelops.quantizers._moving import Writer
        from modelops.quantizers._sums import apart
        from modelops.quantizers._tables import quantize_tables
        from modelops.quantizers._weights import cleaned, products

        with tool("writing the quantized graph"):
            graph = _qdq.read(written)
            dropped = _qdq.drop_idle_pairs(graph, final.names)
            writer = Writer(graph.graph, per_channel=self.per_channel, reduced=reduced)
            for product in [product for product in products(graph.graph) if product.name in moving]:
                writer.replace(product)
            apart(graph)
            tables = [] if excluded is None else quantize_tables(graph, excluded=excluded)
            cheaper = rewritten(graph, fuse=self._fuses, approximate=self.approximate)
            files.save(cleaned(graph), target)
        return dropped, tables, cheaper

    def _opened(
        self, source: Path, scratch: Path
    ) -> tuple[Path, onnx.ModelProto, set[str], dict[str, int], tuple[str, ...]]:
        """(file and graph ready to be quantized, nodes to leave float in it, fusions made, remarks)."""
        import onnx

        from modelops.quantizers._fusions import fused
        from modelops.quantizers._preparation import prepared

        place = prepared(source, scratch)
        model = onnx.load(str(place))
        excluded = self._excluded(source, model)
        if not self._fuses:
            return place, model, excluded, {}, ()
        place, fusions, note = fused(place, scratch, excluded)
        model = onnx.load(str(place)) if fusions else model
        return place, model, excluded, fusions, (note,) if note else ()

    @property
    def _fuses(self) -> bool:
        kernels = known(self.target)
        return self.fuse and (kernels is None or kernels.fuses)

    def _excluded(self, source: Path, model: onnx.ModelProto) -> set[str]:
        """The nodes of the prepared graph that the user's patterns mean, told by the names in the source."""
        if not self.exclude:
            return set()
        from modelops.quantizers._weights import read

        writes = {str(node.name): [str(value.name) for value in node.outputs] for node in read(source).graph}
        names = excluded_nodes(self.exclude, writes)
        tensors = {tensor for name in names for tensor in writes[name]}
        return {node.name for node in model.graph.node if node.name in names or tensors & set(node.output)}


def _movable(final: Plan) -> frozenset[str]:
    """The nodes that can also find the range of what they read as they run."""
    return frozenset(
        node.name
        for node in final.nodes
        if node.op_type in PRODUCTS and all(item.name != "beta" or item.f == 1 for item in node.attribute)
    )


@dataclass(frozen=True)
class _Special:
    """Tensors with sentinels: left alone, clipped, and those that clipping changed."""

    left: set[str]
    bounded: set[str]
    changed: set[str]


def _notes(final: Plan, first: Plan, special: _Special, unfused: dict[str, int]) -> list[str]:
    notes = []
    if final.attention:
        notes.append("this graph has attention: only its products with weights are integer, their results stay float")
    if special.bounded:
        notes.append(
            f"mask values in {', '.join(sorted(special.bounded)[:3])}{' …' if len(special.bounded) > 3 else ''} are "
            "clipped near the ordinary ones: in float that changed no output on any sample"
        )
    lost = [node for node in first.nodes if node.name not in set(final.names)]
    if lost:
        listed = ", ".join(f"{count} {op}" for op, count in described_nodes(lost).items())
        notes.append(f"left float because mask values or NaN pass through: {listed}")
    if unfused:
        listed = ", ".join(f"{count} {op}" for op, count in unfused.items())
        notes.append(f"warning: onnxruntime has no integer kernel for {listed} here; they run in float")
    return notes
