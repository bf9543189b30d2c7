"""Why int8 is no faster here: what a profile of the models, and the kernels of this machine, say about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelops.backends import Backend
from modelops.core.artifact import Artifact
from modelops.errors import Inconclusive, ModelOpsError
from modelops.stages._profile import operators, profiled
from modelops.stages._race import Contender

Node = Mapping[str, Any]

# The operators that integer kernels take over, as a runtime names them after its own fusions.
_CONVOLUTIONS = frozenset({"Conv", "FusedConv", "NhwcFusedConv"})
_PRODUCTS = frozenset({"MatMul", "Gemm", "FusedGemm"})
_CONVERSIONS = frozenset({"DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"})
_MUCH = 0.3
_SOME = 0.1


def reasons(
    source: Artifact, candidate: Path | None, backend: Backend, feed: Mapping[str, Any], scratch: Path
) -> list[str]:
    """Sentences on what keeps int8 from being faster; none where the runtime has no profiler, or nothing stands out."""
    try:
        nodes = profiled(Contender("float", backend, source.model), feed, scratch)
        after = profiled(Contender("quantized", backend, candidate), feed, scratch) if candidate is not None else []
    except (ModelOpsError, Inconclusive):
        return []
    return [*of_float(nodes, weighted_products(source.model)), *of_quantized(after)]


def remedies(method: str, *, accurate: bool, searched: bool) -> str:
    """What the user can try next, in one sentence: after a model that lost too much, or one that is too slow."""
    if accurate:
        return "next: --if-slower keep-source publishes the float model, publish the int8 one all the same"
    tries = ["--exclude leaves nodes in float (--explain tells what each costs)"]
    if method in ("dynamic", "static") and not searched:
        tries.insert(0, "--least-sqnr 30 gives back the nodes that cost most")
    if method != "float16":
        tries.append("--method float16 loses hardly anything")
    return f"next: {'; '.join(tries)}; --max-drop allows more with labels"


def weighted_products(model: Path) -> frozenset[str]:
    """The names of the products whose second factor is in the file: only they have integer kernels."""
    from modelops.quantizers._weights import products, read

    return frozenset(product.name for product in products(read(model).graph))


def of_float(nodes: Sequence[Node], weighted: frozenset[str]) -> list[str]:
    """What the float model's profile says: time that int8 can't shorten, and layers too small for it."""
    from modelops.quantizers._kernels import probed

    total = sum(node["microseconds"] for node in nodes)
    if not total:
        return []
    groups = {
        "convolutions": [node for node in nodes if node["op"] in _CONVOLUTIONS],
        "products": [node for node in nodes if node["op"] in _PRODUCTS and _is_weighted(node, weighted)],
    }
    inside = sum(node["microseconds"] for group in groups.values() for node in group)
    found = []
    outside = 1 - inside / total
    if outside >= _MUCH:
        rest = [row for row in operators(nodes) if row["op"] not in _CONVOLUTIONS | _PRODUCTS]
        named = ", ".join(f"{row['op']} {row['share']:.0%}" for row in rest[:3])
        text = f"this model spends {outside:.0%} of its time outside operators that int8 makes faster"
        found.append(f"{text} ({named})" if named else text)
    kernels = probed()
    for name, least in (("convolutions", kernels.conv_pays), ("products", kernels.matmul_pays)):
        found += _too_small(name, groups[name], least)
    return found


def _is_weighted(node: Node, weighted: frozenset[str]) -> bool:
    """Whether a profiled product is one with constant weights; the runtime may have added to its name."""
    if node["op"] != "MatMul" or not weighted:
        return True
    name = str(node["name"])
    while name and name not in weighted:
        name = name.rpartition("/")[0]
    return bool(name)


def _too_small(name: str, nodes: Sequence[Node], least: int | None) -> list[str]:
    known = [node for node in nodes if node["macs"]]
    if not known:
        return []
    if least is None:
        return [f"int8 {name} of the sizes that were probed are never faster than float ones on this CPU"]
    small = [node for node in known if node["macs"] < least]
    if not small:
        return []
    return [
        f"{len(small)} of {len(known)} {name} are below the size where int8 pays on this CPU "
        f"(about {least:,} multiplications)"
    ]


def of_quantized(nodes: Sequence[Node]) -> list[str]:
    """What the quantized model's profile says: time that goes into conversions between integers and floats."""
    total = sum(node["microseconds"] for node in nodes)
    converting = [node for node in nodes if node["op"] in _CONVERSIONS]
    share = sum(node["microseconds"] for node in converting) / total if total else 0.0
    if share < _SOME:
        return []
    return [f"{len(converting)} conversions between integers and floats take {share:.0%} of the int8 model's time"]
