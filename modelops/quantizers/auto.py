"""The method that finds the method: candidates that make sense for a graph, in the order in which they promise most.

Which of them is fastest and accurate enough only a measurement tells: the stage measures them one after another, and
keeps the best. See ``Auto.plan`` for what is tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelops.core.component import option
from modelops.core.workbench import Done, Workbench
from modelops.errors import GateFailed, UsageError
from modelops.quantizers import REGISTRY, Quantizer
from modelops.quantizers._options import Targeted
from modelops.quantizers._scope import bare, nothing_to_quantize, refuse_quantized
from modelops.quantizers._targets import known

# Weights in blocks pay where a product waits for memory, which small matrices do not: they stay in the CPU's caches.
_LARGE_WEIGHTS = 64 << 20
# Signal over noise, in dB, to be kept by leaving nodes in float.
_KEPT = (20.0, 30.0, 40.0)


@dataclass(frozen=True)
class Candidate:
    """One way to make the model: a method with its options; without one, the float graph with its operators fused.

    ``unless`` names candidates that make this one needless once they were accurate enough: it is as fast at best.
    """

    name: str
    method: Quantizer | None
    unless: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What decides which candidates make sense: counts of nodes, whether the graph attends, and bytes of weights."""

    convolutions: int
    products: int
    recurrent: int
    attention: bool
    weight_bytes: int
    has_data: bool

    @classmethod
    def of(cls, source: Path, *, has_data: bool) -> Facts:
        from modelops.graphs.describe import summary
        from modelops.quantizers._weights import products, read

        found = summary(source)
        counts: dict[str, int] = {}
        for op, count in found["operators"].items():
            counts[bare(op)] = counts.get(bare(op), 0) + int(count)
        graph = read(source).graph
        weighted = {product.name for product in products(graph)}
        activations = any(
            node.op_type == "MatMul" and all(value is not None and value.const_value is None for value in node.inputs)
            for node in graph
        )
        fused = any(name.endswith("Attention") for name in counts)
        return cls(
            convolutions=counts.get("Conv", 0),
            products=len(weighted),
            recurrent=sum(counts.get(op, 0) for op in ("LSTM", "GRU", "RNN")),
            attention=fused or (activations and "Softmax" in counts),
            weight_bytes=sum(int(size) for size in found["weight_bytes"].values()),
            has_data=has_data,
        )


class Auto(Targeted):
    """Tries what makes sense for the graph and this machine, and keeps the fastest that is accurate enough."""

    tools = ("onnx", "onnx-ir", "onnxruntime", "onnxscript")

    budget: float = option(
        default=300.0, help="Time for the search; what is best by then is taken.", min=1.0, unit="seconds"
    )
    explain: bool = option(
        default=False,
        help="Measure what every node of the best costs: a table in the report, and with matplotlib a picture.",
    )

    def plan(self, facts: Facts) -> tuple[Candidate, ...]:
        """The candidates for such a graph, the most promising first.

        UsageError for ``explain`` without data, and for convolutions without data: only ranges that were calibrated
        make them faster. GateFailed where there is nothing to quantize.
        """
        if self.explain and not facts.has_data:
            raise UsageError("--explain needs --data, to measure on", hint="give a folder or file of samples")
        if facts.convolutions and not facts.has_data and not facts.products:
            raise UsageError(
                "this model has convolutions, which only --method static makes faster, and that needs --data",
                hint="give samples with --data, or choose --method dynamic or weights",
            )
        found = list(self._promising(facts))
        if not found:
            reason = "neither convolutions nor products with constant weights"
            if facts.recurrent:
                reason += f"; the {facts.recurrent} recurrent nodes have no integer form here (float16 halves the file)"
            raise nothing_to_quantize(reason)
        kernels = known(self.target)
        if kernels is not None and not kernels.fuses:
            found = [one for one in found if one.method is not None and getattr(one.method, "fuse", True)]
        if kernels is not None and kernels.pairs:
            found = [one for one in found if one.method is not None and one.method.name == "static"]
            if len(found) == 1:
                found += self._kept("static", found[0].name, ranges="auto")
            if not found:
                raise UsageError(
                    f"--target {self.target} takes what --method static writes, which needs --data",
                    hint="give samples with --data",
                )
        return tuple(found)

    def _promising(self, facts: Facts) -> Iterator[Candidate]:
        """By what does most of the work; a transformer that begins with a convolution is one of products."""
        if not facts.convolutions or (facts.attention and facts.products > facts.convolutions):
            yield from self._products(facts)
            return
        yield from self._convolutional(facts)
        if facts.attention:
            yield Candidate("float, fused", None)

    def _convolutional(self, facts: Facts) -> Iterator[Candidate]:
        if facts.has_data:
            yield self._static("static, best ranges", ranges="auto")
            yield self._static("static, widest ranges", ranges="minmax", unless=("static, best ranges",))
            yield from self._kept("static", "static, best ranges", ranges="auto")
        if facts.products > 1 or not facts.has_data:
            yield self._dynamic("dynamic")

    def _products(self, facts: Facts) -> Iterator[Candidate]:
        if facts.products:
            yield self._dynamic("dynamic")
            if facts.attention:
                yield Candidate("float, fused", None)
            if facts.has_data:
                yield self._static("static, best ranges", ranges="auto")
                yield from self._kept("dynamic", "dynamic")
            if facts.attention:
                yield self._dynamic("dynamic, not fused", unless=("dynamic",), fuse=False)
            if facts.weight_bytes >= _LARGE_WEIGHTS:
                yield Candidate("weights of 8 bits", self._made("weights"), unless=("dynamic",))

    def _static(self, name: str, unless: tuple[str, ...] = (), **options: Any) -> Candidate:
        return Candidate(name, self._made("static", target=self.target, **options), unless)

    def _dynamic(self, name: str, unless: tuple[str, ...] = (), **options: Any) -> Candidate:
        return Candidate(name, self._made("dynamic", target=self.target, **options), unless)

    def _kept(self, method: str, base: str, **options: Any) -> Iterator[Candidate]:
        """What to try where ``base`` is not accurate enough: the nodes that cost most stay in float."""
        unless: tuple[str, ...] = (base,)
        for least in _KEPT:
            name = f"{base}, float where {least:g} dB need it"
            made = self._made(
                method, target=self.target, least_sqnr=least, search_time=max(1.0, self.budget / 5), **options
            )
            yield Candidate(name, made, unless)
            unless = (*unless, name)

    def explained(self, candidate: Mapping[str, Any]) -> Candidate | None:
        """The same candidate, by its name and options, that also measures its nodes; None where none are measured."""
        if candidate["name"] not in ("static", "dynamic"):
            return None
        options = {name: value for name, value in candidate.items() if name != "name"}
        method = REGISTRY.ready(candidate["name"]).parse(
            {**options, "explain": True, "search_time": max(1.0, self.budget / 5)}
        )
        return Candidate("explained", method)

    def _made(self, name: str, **options: Any) -> Quantizer:
        return REGISTRY.ready(name).parse({"exclude": self.exclude, **options})

    def quantize(self, source: Path, target: Path, workbench: Workbench) -> Done:
        """Called alone, without a stage that measures: the first candidate that can be made."""
        refuse_quantized(source)
        reasons = []
        for candidate in self.plan(Facts.of(source, has_data=workbench.has_data)):
            if candidate.method is None:
                continue
            try:
                done = candidate.method.quantize(source, target, workbench)
            except GateFailed as error:
                reasons.append(f"{candidate.name}: {error.message}")
                continue
            return Done((*done.notes, f"{candidate.name} was made without a search"), done.metrics, done.details)
        raise nothing_to_quantize("; ".join(reasons))
